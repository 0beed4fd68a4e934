"""A codec as the server runs it: NumPy in, NumPy out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ethogram.specs.edits import Behavior, Steering
from services.crossmodal import checks
from services.crossmodal.codec import Batch, Codec
from services.inference.batcher import Arrays
from services.inference.dataplane import Request

LATENTS, ROWS = "latents", "rows"


class ServedCodec:
    """A loaded codec.

    The ``check_`` methods and the attributes are for any thread. The other methods are for the device's thread alone;
    they take and return arrays whose first axis is the batch, and a row's result does not depend on other rows.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._network_bytes, self._latent_bytes = 4 * codec.layout.size, 4 * codec.latent_dim
        self.behaviors: tuple[Behavior, ...] = tuple(codec.behaviors)
        """The behaviours that it can steer, in the model's order."""

    @classmethod
    def load(cls, folder: Path, device: str) -> ServedCodec:
        """The codec of an artifact's folder."""
        return cls(Codec.load(folder, device))

    def check_networks(
        self, networks: Arrays, activation: str | None = None, steering: Steering | None = None
    ) -> Request:
        """Check networks, and that the codec has the behaviours of ``steering``. Raises :class:`InvalidInput`."""
        answer_bytes = 0
        if steering is not None:
            self._codec.check_edits(steering.edits)
            answer_bytes = self._network_bytes + self._latent_bytes
        # Copies: what comes from the wire are read-only views of a message.
        tensors = {name: torch.tensor(array) for name, array in networks.items()}
        batch = self._codec.check_networks(tensors, activation)
        return _request(batch, "networks", answer_bytes, steering)

    def check_signatures(self, signatures: NDArray[Any]) -> Request:
        """Check signatures ``[batch, neurons, values]``. Raises :class:`InvalidInput`."""
        return _request(self._codec.check_signatures(torch.tensor(signatures)), "signatures")

    def check_latents(self, latents: NDArray[Any], hidden: Sequence[int], activation: str | None) -> Request:
        """Check latents ``[batch, latent]`` and the shape of their networks. Raises :class:`InvalidInput`."""
        shape = checks.shape(hidden, activation, self._codec.layout)
        return _request(self._codec.check_latents(torch.tensor(latents), shape), "latents", self._network_bytes)

    def encode(self, arrays: Arrays, shape: int) -> Arrays:
        """Networks to ``latents``."""
        return _arrays({LATENTS: self._codec.encode(_batch(arrays, shape))})

    def encode_signatures(self, arrays: Arrays, shape: int) -> Arrays:
        """Signatures to ``latents``."""
        return _arrays({LATENTS: self._codec.encode_signatures(_batch(arrays, shape))})

    def decode(self, arrays: Arrays, shape: int) -> Arrays:
        """Latents to parameters."""
        return _arrays(self._codec.decode(_batch(arrays, shape)))

    def steer(self, arrays: Arrays, shape: int, steering: Steering) -> Arrays:
        """Networks to steered parameters, and ``latents``."""
        params, latents = self._codec.steer(_batch(arrays, shape), *steering[:3], direction=steering.direction)
        return _arrays(params | {LATENTS: latents})

    def effect(self, arrays: Arrays, shape: int, steering: Steering) -> Arrays:
        """Networks to steered parameters, and the fields of :class:`services.crossmodal.codec.Effect` by name."""
        effect = self._codec.effect(_batch(arrays, shape), *steering[:3], direction=steering.direction)
        fields = {name: value for name, value in effect._asdict().items() if name not in ("networks", "scores")}
        return _arrays(effect.networks | fields | effect.scores._asdict())

    def evaluate(self, arrays: Arrays, shape: int) -> Arrays:
        """Networks to ``recall`` and ``false_positive_rate``."""
        recall, rate = self._codec.evaluate(_batch(arrays, shape))
        return _arrays({"recall": recall, "false_positive_rate": rate})


def _request(batch: Batch, field: str, answer_bytes: int = 0, steering: Steering | None = None) -> Request:
    options: dict[str, Hashable] = {"shape": batch.shape} | ({} if steering is None else {"steering": steering})
    return Request({ROWS: batch.rows.numpy()}, field, options, answer_bytes)


def _batch(arrays: Arrays, shape: int) -> Batch:
    return Batch(torch.from_numpy(arrays[ROWS]), shape)


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
