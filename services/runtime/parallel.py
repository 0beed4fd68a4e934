"""Training on several devices: each process computes its part of every batch, and gradients are summed.

All start from the first process's state and go by its validations, so that they stay equal and stop together.

torchrun --nproc-per-node 2 -m services.crossmodal train my-zoo -o my-run
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import torch
import torch.distributed
from torch import Tensor

from ethogram.errors import InvalidInput, Unavailable
from services.runtime.devices import chosen_device, launch, missing_torchrun_variables

logger = logging.getLogger(__name__)

T = TypeVar("T")


class World(NamedTuple):
    """The processes of a run."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that reports and keeps artifacts."""
        return self.rank == 0

    def add(self, gradients: Iterable[Tensor]) -> None:
        """Replace each gradient by its sum over the processes."""
        if self.size == 1:
            return
        tensors = list(gradients)
        # One message, because each one waits for the slowest process.
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        torch.distributed.all_reduce(flat)
        for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, rows: Tensor) -> Tensor:
        """The ``rows`` of all processes, in the order of the processes; each may have another number of them."""
        if self.size == 1:
            return rows
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(self.size)]
        torch.distributed.all_gather(counts, count)
        # A message has the same size in all processes.
        padded = rows.new_zeros(max(map(int, counts)), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[: int(number)] for part, number in zip(parts, counts, strict=True)])

    def share_object(self, value: T) -> T:
        """The first process's ``value``, which can be pickled, in every process."""
        values = [value]
        if self.size > 1:
            torch.distributed.broadcast_object_list(values)
        return values[0]

    def broadcast(self, tensors: Mapping[str, Tensor], device: str) -> dict[str, Tensor]:
        """The first process's ``tensors`` in every process, on its ``device``; those of the others are ignored."""
        if self.size == 1:
            return dict(tensors)
        forms = self.share_object({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
        received = {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in forms.items()}
        for name, tensor in received.items():
            if self.first:
                tensor.copy_(tensors[name])
            torch.distributed.broadcast(tensor, 0)
        return received


ALONE = World()


def join(device: str | None = None) -> tuple[World, str]:
    """Join the processes that ``torchrun`` started; without all of its variables in the environment, a world of one.
    Returns the world and this process's device, of the kind of ``device``, by default a GPU if there is one.

    Raises :class:`InvalidInput` for a variable, or a device, that cannot be, and :class:`Unavailable` when the
    processes do not find each other.
    """
    device = device or chosen_device(None)
    if os.environ.get("WORLD_SIZE", "1") != "1" and (missing := missing_torchrun_variables()):
        logger.warning(
            "WORLD_SIZE is %s, but there is no %s: this process computes alone. Use torchrun for several",
            os.environ["WORLD_SIZE"],
            ", ".join(missing),
        )
    launched, (kind, _, index) = launch(), device.partition(":")
    if launched.size == 1:
        return World(), device
    if index:
        text = f"{device} is one device for {launched.size} processes; say {kind}, each takes one"
        raise InvalidInput.field("--device", text)
    if kind == "cuda":
        device = f"cuda:{launched.local_rank}"
        torch.cuda.set_device(device)
    try:
        torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo")
    except (torch.distributed.DistError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
        why = str(error).strip().partition("\n")[0]
        raise Unavailable(f"the {launched.size} processes do not find each other at {where}: {why}") from None
    return World(launched.rank, launched.size), device
