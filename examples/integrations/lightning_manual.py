"""Lightning with manual optimization: the whole of ESAM, the choice of B+ included."""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esam_kernels import ESAM, RandomState, cross_entropy


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))

    def losses(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.net(images), labels)

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        esam = optimizer.optimizer  # what Lightning has wrapped
        noise = RandomState()
        loss_before = self.losses(*batch)
        esam.backward(loss_before.mean())
        esam.first_step(zero_grad=True)
        with torch.no_grad(), noise.replay():
            loss_after = self.losses(*batch)
        selected = esam.select(loss_before, loss_after, *batch)
        self.manual_backward(self.losses(*selected).mean())
        optimizer.step()  # second_step, counted by Lightning in trainer.global_step
        esam.zero_grad()
        self.log("loss", loss_before.mean())

    def configure_optimizers(self) -> ESAM:
        return ESAM(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=self)


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
        return (model.eval().net(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.3f}")
