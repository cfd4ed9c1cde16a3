"""Lightning with automatic optimization: ESAM gets the closure that Lightning gives to every torch optimizer.

The closure shows one loss, not one a sample, so that B+ is the whole batch: lightning_manual.py has the choice of B+.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esam_kernels import ESAM


class Classifier(lightning.LightningModule):
    def __init__(self, beta: float = 0.6) -> None:
        super().__init__()
        self.beta = beta
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self(images), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> dict:
        optimizer = ESAM(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, beta=self.beta, model=self)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "epoch"}}


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def main(epochs: int = 5) -> float:
    lightning.seed_everything(0)
    images, labels = digits()
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)
    model = Classifier()
    trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, logger=False)
    trainer.fit(model, loader)
    with torch.no_grad():
        return (model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.3f}")
