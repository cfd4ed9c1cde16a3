"""Hugging Face Accelerate: the three phases between ``prepare`` and ``optimizer.step()``."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from esam_kernels import ESAM, RandomState, cross_entropy


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    data = load_digits()
    return torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)


def main(epochs: int = 5, **arguments) -> float:
    set_seed(0)
    accelerator = Accelerator(**arguments)
    images, labels = digits()
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    loader = DataLoader(TensorDataset(images[:1400], labels[:1400]), batch_size=64, shuffle=True)
    model, loader = accelerator.prepare(model, loader)
    esam = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(esam, T_max=22 * epochs)
    optimizer, scheduler = accelerator.prepare(esam, scheduler)

    def losses(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return cross_entropy(model(images), labels)

    for _ in range(epochs):
        for batch in loader:
            noise = RandomState([accelerator.device])
            with accelerator.no_sync(model):  # each process perturbs for its own batch
                loss_before = losses(*batch)
                loss = loss_before.mean()
                esam.backward(accelerator.scaler.scale(loss) if accelerator.scaler else loss)
            esam.first_step(zero_grad=True)
            with torch.no_grad(), noise.replay():
                loss_after = losses(*batch)
            selected = esam.select(loss_before, loss_after, *batch)
            accelerator.backward(losses(*selected).mean())
            accelerator.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()  # second_step, or restore() where the scaler skips the update
            scheduler.step()
            optimizer.zero_grad()
    with torch.no_grad():
        predicted = model.eval()(images[1400:].to(accelerator.device)).argmax(1)
    return (predicted.cpu() == labels[1400:]).float().mean().item()


if __name__ == "__main__":
    print(f"test accuracy {main():.3f}")
