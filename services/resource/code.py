"""The code of soft tokens that the default language model was taught to read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from services.resource.texts import OPTIONS, PAD, SLOTS, option
from services.runtime.reading import reading

FILE = "soft_token_code.safetensors"
"""Beside the model's own files."""
CONTENTS = [PAD, *"0123456789.", *map(option, range(OPTIONS))]
"""What a slot may hold; the first one: nothing."""
CONTENT = {"": 0} | {text: index for index, text in enumerate(CONTENTS)}
"""Index of a content."""


def own_dimensions(hidden: int) -> Tensor:
    """The dimensions of a soft token that each slot has to itself at first, ``[slots, hidden]``."""
    dimensions, numbers = torch.arange(hidden).unsqueeze(0), torch.arange(SLOTS).unsqueeze(1)
    return (dimensions * SLOTS // hidden == numbers) | (numbers * hidden // SLOTS == dimensions)


class SoftTokenCode(nn.Module):
    """Soft tokens of rows of any schema: the sum of a vector for the content of each slot, normalised. It is trained
    with the language model; an encoder of some schema begins as it."""

    WIDTH = 8

    def __init__(self, hidden: int, generator: torch.Generator | None = None) -> None:
        super().__init__()

        def normal(*shape: int, scale: float) -> Tensor:
            return scale * torch.randn(*shape, generator=generator)

        self.content = nn.Parameter(normal(len(CONTENTS), self.WIDTH, scale=1.0))
        # The dimensions of a slot begin with components of its content's vector as they are, in the same order in all
        # slots, so that one map reads them all.
        dimensions = own_dimensions(hidden)
        component = (dimensions.long().cumsum(1) - 1).clamp_min(0) % self.WIDTH
        copies = nn.functional.one_hot(component, self.WIDTH).transpose(1, 2).contiguous() * dimensions.unsqueeze(1)
        self.bind = nn.Parameter(SLOTS**0.5 * copies + normal(SLOTS, self.WIDTH, hidden, scale=0.1 * self.WIDTH**-0.5))
        self.base = nn.Parameter(normal(hidden, scale=1.0))

    def forward(self, contents: Tensor, slots: Sequence[int]) -> Tensor:
        """Soft tokens ``[rows, tokens, hidden]``. ``contents``: index of the content of each slot, ``[rows, sum of
        slots]``; ``slots``: of each soft token."""
        parts = []
        for part, count in zip(torch.split(self.content[contents], list(slots), 1), slots, strict=True):
            code = torch.einsum("rsw,swh->rh", part, self.bind[:count])
            parts.append(nn.functional.layer_norm(code + self.base, code.shape[1:]))
        return torch.stack(parts, 1)

    def vectors(self) -> Tensor:
        """What each content adds in each slot, before the norm, ``[slots, contents, hidden]``."""
        return torch.einsum("cw,swh->sch", self.content, self.bind)

    def save(self, folder: Path) -> None:
        """Write it into the folder of its language model."""
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}, folder / FILE
        )

    @staticmethod
    def load(folder: Path, hidden: int, field: str) -> SoftTokenCode | None:
        """That of the language model in a folder, of size ``hidden``; None for a model without one. Raises
        :class:`InvalidInput` of ``field`` for a file that is not such a code."""
        if not (folder / FILE).exists():
            return None
        code = SoftTokenCode(hidden)
        with reading(folder, FILE, "language model", field) as file:
            code.load_state_dict(load_file(file))
        return code.requires_grad_(False)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for _, tensor in sorted(self.state_dict().items()):
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()
