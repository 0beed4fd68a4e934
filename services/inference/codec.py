"""A codec as the server runs it: NumPy in, NumPy out, on the device's thread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from services.crossmodal import checks
from services.crossmodal.codec import Behavior, Codec, Strength
from services.crossmodal.steering import Direction, Edit, Mode
from services.inference.batcher import Arrays
from services.zoo.subjects import Architecture

LATENTS = "latents"


class Change(NamedTuple):
    """Checked edits, and how they are applied."""

    edits: tuple[Edit, ...]
    mode: Mode
    strength: Strength
    direction: Direction


class ServedCodec:
    """A loaded codec. Every method takes and gives arrays whose first axis is the batch, and treats rows alone.

    Checks, and what is read in ``__init__``, are for any thread; the other methods are for the device's alone.
    """

    artifact_type = "codec"

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.network_bytes: int = 4 * codec.layout.size
        """Most bytes of one network as float32."""
        self.signature_shape: tuple[int, int] = codec.signature_shape
        """(neurons, values) of one signature."""
        self.latent_size: int = codec.latent_dim
        """Length of a latent."""
        self.behaviors: tuple[Behavior, ...] = tuple(codec.behaviors)
        """What it can steer, in the model's order."""

    @classmethod
    def load(cls, folder: Path, device: str) -> ServedCodec:
        """The codec of a bundle's folder."""
        return cls(Codec.load(folder, device))

    def check_networks(self, networks: Arrays, activation: str | None = None) -> tuple[Arrays, Architecture]:
        """The networks as float32 in the model's order of parameters, and their shape; or :class:`InvalidInput`."""
        checked, shape = checks.networks(_tensors(networks), self._codec.layout, activation)
        return _arrays(checked), self._codec.layout.shapes[shape]

    def check_shape(self, hidden: Sequence[int], activation: str | None) -> Architecture:
        """The shape that a request names, of those the model knows; or :class:`InvalidInput`."""
        return checks.shape(hidden, activation, self._codec.layout)

    def check_rows(self, array: NDArray[Any], shape: tuple[int, ...], field: str) -> NDArray[np.float32]:
        """A batch of ``shape`` as float32, or :class:`InvalidInput`."""
        return _arrays({field: checks.batch(torch.tensor(array), shape, field)})[field]

    def encode(self, networks: Arrays, shape: Architecture) -> Arrays:
        """Parameters to ``latents``."""
        with torch.inference_mode():
            return {LATENTS: self._codec.encode(_tensors(networks), shape.activation).cpu().numpy()}

    def encode_signatures(self, arrays: Arrays) -> Arrays:
        """``signatures`` to ``latents``."""
        with torch.inference_mode():
            return {LATENTS: self._codec.encode_signatures(_tensors(arrays)["signatures"]).cpu().numpy()}

    def decode(self, arrays: Arrays, shape: Architecture) -> Arrays:
        """``latents`` to parameters."""
        with torch.inference_mode():
            return _arrays(self._codec.decode(_tensors(arrays)[LATENTS], shape))

    def steer(self, networks: Arrays, shape: Architecture, change: Change) -> Arrays:
        """Parameters to steered parameters, and ``latents``."""
        with torch.inference_mode():
            edits, mode, strength, direction = change
            params, latents = self._codec.steer(
                _tensors(networks), edits, mode, strength, direction=direction, activation=shape.activation
            )
            return _arrays(params) | {LATENTS: latents.cpu().numpy()}

    def effect(self, networks: Arrays, shape: Architecture, change: Change) -> Arrays:
        """Parameters to steered parameters, and by name what :class:`services.crossmodal.codec.Effect` has."""
        with torch.inference_mode():
            edits, mode, strength, direction = change
            found = self._codec.effect(
                _tensors(networks), edits, mode, strength, direction=direction, activation=shape.activation
            )
            others = {name: getattr(found, name) for name in ("strength", "had", "predicted", "recall")}
            others |= {LATENTS: found.latents, "false_positive_rate": found.false_positive_rate}
            return _arrays(
                found.networks | others | {name: one.float() for name, one in found.scores._asdict().items()}
            )

    def evaluate(self, networks: Arrays, shape: Architecture) -> Arrays:
        """Parameters to ``recall`` and ``false_positive_rate``."""
        with torch.inference_mode():
            recall, rate = self._codec.evaluate(_tensors(networks), shape.activation)
            return _arrays({"recall": recall, "false_positive_rate": rate})


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    # A copy: what comes from the wire is a read-only view of a message.
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
