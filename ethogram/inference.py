"""The client of the inference service: encode, decode, steer and evaluate networks with a published model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike, NDArray

from ethogram import networks as network_files
from ethogram.channel import Channel, Methods
from ethogram.errors import InvalidInput
from ethogram.networks import Networks
from ethogram.specs.edits import Behavior, Direction, Edit, EditLike, Mode, Operation, Steering
from ethogram.v1 import common_pb2
from ethogram.v1 import inference_pb2 as pb
from ethogram.v1.inference_pb2_grpc import CodecServiceStub, SteeringServiceStub
from ethogram.wire import fields_of, from_tensor, to_tensor

# With the types of edits, which users import from here too.
__all__ = ["Behavior", "Direction", "Edit", "Effect", "Evaluated", "Inference", "Mode", "Operation", "Steered"]

Floats = NDArray[np.floating[Any]]


class Behaviors(NamedTuple):
    """The behaviours of a model, and which model answered."""

    behaviors: list[Behavior]
    model: str
    version: str


class Encoded(NamedTuple):
    """``latents`` ``[batch, latent]``, or ``[latent]`` of a single network."""

    latents: Floats
    model: str
    version: str


class Decoded(NamedTuple):
    """``networks``: parameters ``[batch, ...]`` by name, without the batch axis for a single latent."""

    networks: dict[str, Floats]
    model: str
    version: str


class Steered(NamedTuple):
    """The steered ``networks``, named as those that were given, and their ``latents`` after the edit."""

    networks: dict[str, Floats]
    latents: Floats
    model: str
    version: str


class Evaluated(NamedTuple):
    """How networks answer held-out sequences.

    ``recall`` ``[batch, behaviours]``: share of the sequences with a behaviour that a network answers yes to, NaN of a
    behaviour without any; ``false_positive_rate`` ``[batch]``: share of the sequences without any behaviour. No batch
    axis for a single network.
    """

    behaviors: list[str]
    recall: Floats
    false_positive_rate: Floats
    model: str
    version: str


class Effect(NamedTuple):
    """What edits do to networks; no batch axis for a single one.

    ``networks`` and ``latents`` after the edit; ``strength`` ``[batch]``; ``had``: whether each network was seen to
    have each behaviour before, bool ``[batch, behaviours]``; ``predicted`` ``[batch, 2, behaviours]``: the chance of
    each behaviour as read from the latent, before and after; ``recall`` ``[batch, 2, behaviours]`` and
    ``false_positive_rate`` ``[batch, 2]``: measured on held-out sequences, before and after; ``target`` ``[batch]``:
    accuracy where the edit decides, NaN where it decides nothing; ``local`` ``[batch]``: change of accuracy everywhere
    else; ``kept`` ``[batch]``: share of the answers there that are still those before.
    """

    behaviors: list[str]
    networks: dict[str, Floats]
    latents: Floats
    strength: Floats
    had: NDArray[np.bool_]
    predicted: Floats
    recall: Floats
    false_positive_rate: Floats
    target: Floats
    local: Floats
    kept: Floats
    model: str
    version: str


class Inference(Channel):
    """A connection to an inference service at ``target`` (``host:port``). Thread-safe; close it, or use ``with``.

    Networks are dictionaries of arrays, or the path of a safetensors file: a batch (first axis of every parameter), or
    one network without a batch axis, which gets answers without one. Parameters are named ``layers.0.weight``,
    ``layers.0.bias``, ...; a state dict of ``torch.nn.Sequential`` (``0.weight``, ``2.weight``, ...) works too, as do
    tensors of PyTorch. Numbers are float32, float64, float16 or bfloat16; answers are float32. Sets of any size can be
    given: large ones travel in parts. A model that was trained on networks of several shapes takes any
    of them, one shape per call; ``activation`` says which where shapes differ in it alone. Edits are
    ``("add", behavior)``, ``("remove", behavior)``, ``("replace", behavior, by)`` or
    :class:`~ethogram.specs.edits.Edit`.

    Every call raises :class:`~ethogram.errors.InvalidInput`, :class:`~ethogram.errors.NotFound`,
    :class:`~ethogram.errors.TooLarge` (the server is busy, or one network is too large) or
    :class:`~ethogram.errors.Unavailable` (no answer within ``timeout`` seconds per part).
    """

    def __init__(self, target: str, *, timeout: float = 60.0) -> None:
        super().__init__(target, timeout=timeout)
        codec, steering = CodecServiceStub(self._channel), SteeringServiceStub(self._channel)
        self._list_behaviors = steering.ListBehaviors
        self._methods: dict[type[Message], Methods[Any]] = {
            pb.EncodeRequest: (codec.Encode, codec.EncodeStream),
            pb.DecodeRequest: (codec.Decode, codec.DecodeStream),
            pb.SteerRequest: (steering.Steer, steering.SteerStream),
            pb.EvaluateRequest: (steering.Evaluate, steering.EvaluateStream),
        }

    def behaviors(self, model: str, *, version: str | None = None) -> Behaviors:
        """The behaviours that ``model`` can steer."""
        answer = self._call(self._list_behaviors, pb.ListBehaviorsRequest(model=_reference(model, version)))
        behaviors = [Behavior(b.name, b.description, b.positives) for b in answer.behaviors]
        return Behaviors(behaviors, answer.model.name, answer.model.version)

    def encode(
        self, model: str, networks: Networks | str | Path, *, activation: str | None = None, version: str | None = None
    ) -> Encoded:
        """Latents of networks; their signatures are taken on the model's own probes."""
        return self._encode(_Batch.of(networks, activation), model, version)

    def encode_signatures(self, model: str, signatures: ArrayLike, *, version: str | None = None) -> Encoded:
        """Latents of signatures ``[batch, neurons, values]`` (or ``[neurons, values]``) taken on the model's probes."""
        return self._encode(_Batch.of_array(signatures, 2, "signatures"), model, version)

    def decode(
        self,
        model: str,
        latents: ArrayLike,
        *,
        hidden: Sequence[int] = (),
        activation: str | None = None,
        version: str | None = None,
    ) -> Decoded:
        """Networks of latents ``[batch, latent]`` (or ``[latent]``); ``hidden``: widths of their hidden layers, where
        the model knows networks of several shapes."""
        batch = _Batch.of_array(latents, 1, "latents")
        shape = pb.Architecture(hidden=hidden, activation=activation or "")
        answers, name = self._run(pb.DecodeRequest, batch, model, version, architecture=shape)
        return Decoded(batch.networks(answers), *name)

    def steer(
        self,
        model: str,
        networks: Networks | str | Path,
        edits: Sequence[EditLike],
        *,
        mode: Mode = "residual",
        strength: float | Literal["auto"] = 1.0,
        direction: Direction = "learned",
        activation: str | None = None,
        version: str | None = None,
    ) -> Steered:
        """Networks that gain (``("add", behaviour)``), lose (``("remove", behaviour)``) or exchange (``("replace",
        behaviour, by)``) behaviours.

        ``residual`` keeps the source's weights and adds what the edit changes; ``direct`` takes the decoded ones.
        ``strength`` ``auto`` is chosen for each network on sequences used neither for training nor for evaluation.
        """
        fields = fields_of(Steering.of(edits, mode, strength, direction))
        batch = _Batch.of(networks, activation)
        answers, name = self._run(pb.SteerRequest, batch, model, version, **fields)
        return Steered(batch.networks(answers), batch.join(answers, "latents"), *name)

    def evaluate(
        self, model: str, networks: Networks | str | Path, *, activation: str | None = None, version: str | None = None
    ) -> Evaluated:
        """How networks behave on labelled sequences that no network of the model's zoo was trained on."""
        batch = _Batch.of(networks, activation)
        answers, name = self._run(pb.EvaluateRequest, batch, model, version)
        recall, rate = batch.join(answers, "recall"), batch.join(answers, "false_positive_rate")
        return Evaluated(list(answers[0].behaviors), recall, rate, *name)

    def effect(
        self,
        model: str,
        networks: Networks | str | Path,
        edits: Sequence[EditLike],
        *,
        mode: Mode = "residual",
        strength: float | Literal["auto"] = 1.0,
        direction: Direction = "learned",
        activation: str | None = None,
        version: str | None = None,
    ) -> Effect:
        """What :meth:`steer` with the same arguments does to networks: predicted from their latents, and measured on
        held-out sequences."""
        batch = _Batch.of(networks, activation)
        steering = fields_of(Steering.of(edits, mode, strength, direction))
        answers, name = self._run(pb.EvaluateRequest, batch, model, version, **steering)
        names = ("latents", "strength", "had", "predicted", "recall", "false_positive_rate", "target", "local", "kept")
        effects = [answer.effect for answer in answers]
        fields: dict[str, Any] = {field: batch.join(effects, field) for field in names}
        fields["had"] = fields["had"] > 0
        return Effect(list(answers[0].behaviors), batch.networks(effects), **fields, model=name[0], version=name[1])

    def _encode(self, batch: _Batch, model: str, version: str | None) -> Encoded:
        answers, name = self._run(pb.EncodeRequest, batch, model, version)
        return Encoded(batch.join(answers, "latents"), *name)

    def _run(
        self, request: type[Message], batch: _Batch, model: str, version: str | None, **fields: Any
    ) -> tuple[list[Any], tuple[str, str]]:
        """The answers to all parts of ``batch``, in order, and name and version of the model that gave them."""
        answers = self._run_parts(
            self._methods[request],
            lambda reference, rows: request(model=reference, **batch.part(rows), **fields),
            _reference(model, version),
            lambda: _reference(model, version or self.behaviors(model).version),
            rows=batch.rows,
            row_bytes=batch.row_bytes,
        )
        answered = answers[0].model
        return answers, (answered.name, answered.version)


@dataclass(frozen=True)
class _Batch:
    """Arrays with a batch axis: networks with the platform's names of the parameters, or one array."""

    arrays: dict[str, NDArray[Any]]
    single: bool
    """Whether the caller gave one row, without a batch axis."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The caller's name of each parameter to the platform's."""
    activation: str | None = None

    @classmethod
    def of_array(cls, values: ArrayLike, axes: int, name: str) -> _Batch:
        """``values``, with a batch axis before its ``axes`` axes if they lack one."""
        array = network_files.floats(values, name)
        single = array.ndim <= axes
        return cls({name: array[None] if single else array}, single)

    @classmethod
    def of(cls, networks: Networks | str | Path, activation: str | None) -> _Batch:
        given = network_files.load(networks) if isinstance(networks, str | Path) else networks
        if not isinstance(given, Mapping):
            text = "needs arrays by parameter name, or a safetensors file; of a torch module send its state_dict()"
            raise InvalidInput.field("networks", text)
        if wrong := [name for name in given if not isinstance(name, str)]:
            raise InvalidInput.field("networks", f"{wrong[0]!r} is no parameter's name, such as 'layers.0.weight'")
        if not given:
            raise InvalidInput.field("networks.parameters", "holds no parameter")
        names = network_files.layer_names(given)
        arrays = {
            names[name]: network_files.floats(array, f"networks.parameters.{name}") for name, array in given.items()
        }
        single = network_files.is_single(arrays)
        # A parameter without axes is the server's to refuse.
        batch = {name: array[None] if single else np.atleast_1d(array) for name, array in arrays.items()}
        count = max(map(len, batch.values()))
        for name, array in batch.items():
            # In parts it would look like another mistake.
            if len(array) != count:
                text = f"has the shape {list(array.shape)}, so a batch of {len(array)}, but others have {count}"
                raise InvalidInput.field(f"networks.parameters.{name}", text)
        return cls(batch, single, names, activation)

    @property
    def rows(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def row_bytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values()) // max(self.rows, 1)

    def part(self, rows: slice) -> dict[str, Any]:
        """Some of the rows, as a field of a request."""
        tensors = {name: to_tensor(array[rows]) for name, array in self.arrays.items()}
        if not self.names:
            return tensors
        return {"networks": pb.Networks(parameters=tensors, activation=self.activation or "")}

    def join(self, messages: Sequence[Any], field: str) -> Floats:
        """The tensor ``field`` of all answers, without a batch axis if the caller gave none."""
        return self._joined([getattr(message, field) for message in messages], field)

    def networks(self, messages: Sequence[Any]) -> dict[str, Floats]:
        """The ``networks`` of all answers, with the caller's names of the parameters if networks were given."""
        parts = [message.networks.parameters for message in messages]
        names = self.names or {name: name for name in network_files.in_order(parts[0])}
        return {name: self._joined([part[wire] for part in parts], wire) for name, wire in names.items()}

    def _joined(self, tensors: Sequence[common_pb2.Tensor], field: str) -> Floats:
        joined = np.concatenate([from_tensor(tensor, field) for tensor in tensors])
        return cast(Floats, joined[0] if self.single else joined)


def _reference(name: str, version: str | None) -> pb.ModelRef:
    return pb.ModelRef(name=name, version=version or "")
