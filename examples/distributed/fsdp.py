"""ESAM on FSDP2, with a checkpoint that any number of processes can go on from.

torchrun --nproc-per-node 2 examples/distributed/fsdp.py /tmp/digits
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from esam_kernels import ESAM, cross_entropy

EPOCHS, BATCH, TRAINING_IMAGES = 10, 32, 1347


def main(folder: Path) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(device)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)

    images, labels = (torch.tensor(array, device=device) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).to(device)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = ESAM(model.parameters(), torch.optim.AdamW, lr=1e-2, rho=0.05, mask="element", model=model)
    if folder.exists():
        state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    for epoch in range(EPOCHS):
        order = torch.randperm(TRAINING_IMAGES, generator=torch.Generator().manual_seed(epoch)).to(device)
        for batch in order[: TRAINING_IMAGES // (BATCH * ranks) * BATCH * ranks].view(-1, ranks, BATCH)[:, rank]:
            optimizer.step(lambda x, y: cross_entropy(model(x), y), images[batch], labels[batch])
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(model, optimizer))), checkpoint_id=folder)
    with torch.no_grad():  # every rank: the forward gathers the parameters
        right = model(images[TRAINING_IMAGES:]).argmax(1) == labels[TRAINING_IMAGES:]
    if rank == 0:
        print(f"test accuracy {right.float().mean():.3f} after step {optimizer.state_dict()['esam']['step']}")
    dist.barrier()  # all leave together: gloo may abort a rank whose peer has gone
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
