"""Training on several devices: each process does its part of every batch, and gradients are added up.

torchrun --nproc-per-node 2 -m services.crossmodal train -f codec.yaml
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor


class World(NamedTuple):
    """The processes of a run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports and keeps."""
        return self.rank == 0

    def add(self, gradients: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over the processes."""
        if self.size == 1:
            return
        tensors = list(gradients)
        # One message: many small ones would each wait for the slowest process.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


ALONE = World()


def join() -> tuple[World, str]:
    """The processes that ``torchrun`` started, and this one's device; a world of one without it."""
    if "WORLD_SIZE" not in os.environ:
        return World(), "cuda" if torch.cuda.is_available() else "cpu"
    local = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    return world, f"cuda:{local}" if cuda else "cpu"
