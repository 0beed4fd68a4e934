"""A codec as the server runs it: NumPy in, NumPy out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray

from ethogram.errors import InvalidInput
from ethogram.specs.edits import Steering
from services.crossmodal import checks
from services.crossmodal.codec import Batch, Behavior, Codec
from services.inference.batcher import Arrays

LATENTS, ROWS = "latents", "rows"


class Request(NamedTuple):
    """The checked rows of a request: what a :class:`ServedCodec` computes on without checking them again."""

    arrays: Arrays
    shape: int
    """Which of the codec's network shapes the rows have."""


class ServedCodec:
    """A loaded codec.

    The ``check_`` methods, and what is read in ``__init__``, are for any thread. The others are for the device's thread
    alone; they take and give arrays whose first axis is the batch, and a row's result does not depend on other rows.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.network_bytes: int = 4 * codec.layout.size
        """Most bytes of one network as float32."""
        self.latent_bytes: int = 4 * codec.latent_dim
        """Bytes of one latent as float32."""
        self.behaviors: tuple[Behavior, ...] = tuple(codec.behaviors)
        """What it can steer, in the model's order."""

    @classmethod
    def load(cls, folder: Path, device: str) -> ServedCodec:
        """The codec of an artifact's folder."""
        return cls(Codec.load(folder, device))

    def check_networks(
        self, networks: Arrays, activation: str | None = None, steering: Steering | None = None
    ) -> Request:
        """Networks, and that the codec has the behaviours of ``steering``; or :class:`InvalidInput`."""
        if steering is not None:
            self._codec.check_edits(steering)
        return _request(lambda: self._codec.check_networks(_tensors(networks), activation))

    def check_signatures(self, signatures: NDArray[Any]) -> Request:
        """Signatures ``[batch, neurons, values]``, or :class:`InvalidInput`."""
        return _request(lambda: self._codec.check_signatures(torch.tensor(signatures)))

    def check_latents(self, latents: NDArray[Any], hidden: Sequence[int], activation: str | None) -> Request:
        """Latents ``[batch, latent]`` and the shape of their networks, of those the model knows; or
        :class:`InvalidInput`."""
        shape = checks.shape(hidden, activation, self._codec.layout)
        return _request(lambda: self._codec.check_latents(torch.tensor(latents), shape))

    @torch.inference_mode()
    def encode(self, arrays: Arrays, shape: int) -> Arrays:
        """Networks to ``latents``."""
        return _arrays({LATENTS: self._codec.encode(_batch(arrays, shape))})

    @torch.inference_mode()
    def encode_signatures(self, arrays: Arrays, shape: int) -> Arrays:
        """Signatures to ``latents``."""
        return _arrays({LATENTS: self._codec.encode_signatures(_batch(arrays, shape))})

    @torch.inference_mode()
    def decode(self, arrays: Arrays, shape: int) -> Arrays:
        """Latents to parameters."""
        return _arrays(self._codec.decode(_batch(arrays, shape)))

    @torch.inference_mode()
    def steer(self, arrays: Arrays, shape: int, steering: Steering) -> Arrays:
        """Networks to steered parameters, and ``latents``."""
        params, latents = self._codec.steer(_batch(arrays, shape), steering)
        return _arrays(params | {LATENTS: latents})

    @torch.inference_mode()
    def effect(self, arrays: Arrays, shape: int, steering: Steering) -> Arrays:
        """Networks to steered parameters, and the fields of :class:`services.crossmodal.codec.Effect` by name."""
        effect = self._codec.effect(_batch(arrays, shape), steering)
        fields = {name: value for name, value in effect._asdict().items() if name not in ("networks", "scores")}
        return _arrays(effect.networks | fields | effect.scores._asdict())

    @torch.inference_mode()
    def evaluate(self, arrays: Arrays, shape: int) -> Arrays:
        """Networks to ``recall`` and ``false_positive_rate``."""
        recall, rate = self._codec.evaluate(_batch(arrays, shape))
        return _arrays({"recall": recall, "false_positive_rate": rate})


def _request(check: Callable[[], Batch]) -> Request:
    try:
        batch = check()
    except checks.NotFinite as error:
        # A request's numbers are in the field `data` of a tensor.
        field, description = error.violations[0]
        raise InvalidInput.field(f"{field}.data", description) from None
    return Request({ROWS: batch.rows.numpy()}, batch.shape)


def _batch(arrays: Arrays, shape: int) -> Batch:
    return Batch(torch.from_numpy(arrays[ROWS]), shape)


def _tensors(arrays: Arrays) -> dict[str, torch.Tensor]:
    # A copy: what comes from the wire is a read-only view of a message.
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: tensor.float().cpu().numpy() for name, tensor in tensors.items()}
