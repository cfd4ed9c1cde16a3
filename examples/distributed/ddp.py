"""ESAM on DistributedDataParallel: handwritten digits on two processes.

torchrun --nproc-per-node 2 examples/distributed/ddp.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esam_kernels import ESAM, cross_entropy

EPOCHS, BATCH, TRAINING_IMAGES = 10, 32, 1347


def main() -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(device)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    images, labels = (torch.tensor(array, device=device) for array in load_digits(return_X_y=True))
    images = images.float() / 16

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    model = DistributedDataParallel(model)
    # The same seed on every rank, so that all perturb the same weights, each for its own batch.
    optimizer = ESAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, gamma=0.5, model=model)

    def losses(inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(model(inputs), targets)

    for epoch in range(EPOCHS):
        order = torch.randperm(TRAINING_IMAGES, generator=torch.Generator().manual_seed(epoch)).to(device)
        # Equally many batches on every rank, or the last one would wait for the others forever.
        for batch in order[: TRAINING_IMAGES // (BATCH * ranks) * BATCH * ranks].view(-1, ranks, BATCH)[:, rank]:
            optimizer.step(losses, images[batch], labels[batch])

    model.eval()
    with torch.no_grad():
        right = model.module(images[TRAINING_IMAGES:]).argmax(1) == labels[TRAINING_IMAGES:]
    if rank == 0:
        print(f"test accuracy {right.float().mean():.3f} on {ranks} processes")
    dist.barrier()  # all leave together: gloo may abort a rank whose peer has gone
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
