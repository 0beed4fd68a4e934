"""The client of the inference service: encode, decode, steer and evaluate networks with a published model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

import grpc
import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike, NDArray

from ethogram import networks as network_files
from ethogram.errors import InvalidInput, TooLarge
from ethogram.networks import Networks
from ethogram.rpc import CHANNEL_OPTIONS, error_of
from ethogram.tensors import from_tensor, to_tensor
from ethogram.v1 import common_pb2
from ethogram.v1 import inference_pb2 as pb
from ethogram.v1.inference_pb2_grpc import CodecServiceStub, SteeringServiceStub

# A message far below its limit keeps a large set flowing: one part computes while the next travels.
PART_BYTES, PART_ROWS = 8 * 2**20, 512

R = TypeVar("R")
Floats = NDArray[np.floating[Any]]
Operation = Literal["add", "remove", "replace"]
Mode = Literal["residual", "direct"]
Direction = Literal["learned", "mean_difference", "classifier_normal"]
Edit = tuple[Operation, str] | tuple[Operation, str, str]
"""``("add", behaviour)``, ``("remove", behaviour)`` or ``("replace", behaviour, by)``."""

_OPERATIONS = {
    "add": pb.EDIT_OPERATION_ADD,
    "remove": pb.EDIT_OPERATION_REMOVE,
    "replace": pb.EDIT_OPERATION_REPLACE,
}
_MODES = {"residual": pb.EDIT_MODE_RESIDUAL, "direct": pb.EDIT_MODE_DIRECT}
_DIRECTIONS = {
    "learned": pb.DIRECTION_LEARNED,
    "mean_difference": pb.DIRECTION_MEAN_DIFFERENCE,
    "classifier_normal": pb.DIRECTION_CLASSIFIER_NORMAL,
}


class Behavior(NamedTuple):
    """One behaviour that a model can steer."""

    name: str
    description: str
    positives: int
    """Networks of the training zoo that have it."""


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

    ``recall`` ``[batch, behaviours]``: share of the sequences with a behaviour that a network answers yes to;
    ``false_positive_rate`` ``[batch]``: share of the sequences without any. No batch axis for a single network.
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
    else.
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
    model: str
    version: str


class Inference:
    """A connection to an inference service at ``target`` (``host:port``). Thread-safe; close it, or use ``with``.

    Networks are dictionaries of arrays, or the path of a safetensors file: a batch (first axis of every parameter), or
    one network without a batch axis, which gets answers without one. Parameters are named ``layers.0.weight``,
    ``layers.0.bias``, ...; a state dict of ``torch.nn.Sequential`` (``0.weight``, ``2.weight``, ...) is understood too.
    Sets of any size can be given: large ones travel in parts. A model that was trained on networks of several shapes
    takes any of them, all of one in a call; ``activation`` says which where shapes differ in it alone.

    Every call raises :class:`~ethogram.errors.InvalidInput`, :class:`~ethogram.errors.NotFound`,
    :class:`~ethogram.errors.TooLarge` (the server is busy, or one network is too large) or
    :class:`~ethogram.errors.Unavailable` (no answer within ``timeout`` seconds per part).
    """

    def __init__(self, target: str, *, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._channel = grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        self._codec, self._steering = CodecServiceStub(self._channel), SteeringServiceStub(self._channel)

    def __enter__(self) -> Inference:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def behaviors(self, model: str, *, version: str | None = None) -> Behaviors:
        """The behaviours that ``model`` can steer."""
        request = pb.ListBehaviorsRequest(model=_model(model, version))
        answer = _answer(lambda: self._steering.ListBehaviors(request, timeout=self.timeout))
        behaviors = [Behavior(b.name, b.description, b.positives) for b in answer.behaviors]
        return Behaviors(behaviors, answer.model.name, answer.model.version)

    def encode(
        self, model: str, networks: Networks | str | Path, *, activation: str | None = None, version: str | None = None
    ) -> Encoded:
        """Latents of networks; their signatures are taken on the model's own probes."""
        batch = _Batch.of(networks, activation)

        def request(reference: pb.ModelRef, part: slice) -> pb.EncodeRequest:
            return pb.EncodeRequest(model=reference, networks=batch.message(part))

        call = _Call(self._codec.Encode, self._codec.EncodeStream, request, batch.rows, batch.row_bytes)
        return self._encoded(self._run(call, model, version), batch.single)

    def encode_signatures(self, model: str, signatures: ArrayLike, *, version: str | None = None) -> Encoded:
        """Latents of signatures ``[batch, neurons, values]`` (or ``[neurons, values]``) taken on the model's probes."""
        array, single = _with_batch(signatures, 2)

        def request(reference: pb.ModelRef, part: slice) -> pb.EncodeRequest:
            return pb.EncodeRequest(model=reference, signatures=_tensor(array[part], "signatures"))

        call = _Call(self._codec.Encode, self._codec.EncodeStream, request, len(array), _row_bytes(array))
        return self._encoded(self._run(call, model, version), single)

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
        array, single = _with_batch(latents, 1)
        shape = pb.Architecture(hidden=hidden, activation=activation or "")

        def request(reference: pb.ModelRef, part: slice) -> pb.DecodeRequest:
            return pb.DecodeRequest(model=reference, latents=_tensor(array[part], "latents"), architecture=shape)

        call = _Call(self._codec.Decode, self._codec.DecodeStream, request, len(array), _row_bytes(array))
        answers = self._run(call, model, version)
        networks = _join_networks([answer.networks for answer in answers], single)
        return Decoded(networks, answers[0].model.name, answers[0].model.version)

    def steer(
        self,
        model: str,
        networks: Networks | str | Path,
        edits: Sequence[Edit],
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
        ``strength`` ``auto`` is chosen for each network on sequences that are neither trained nor judged on.
        """
        change = _change(edits, mode, strength, direction)
        batch = _Batch.of(networks, activation)

        def request(reference: pb.ModelRef, part: slice) -> pb.SteerRequest:
            return pb.SteerRequest(model=reference, networks=batch.message(part), **change)

        call = _Call(self._steering.Steer, self._steering.SteerStream, request, batch.rows, batch.row_bytes)
        answers = self._run(call, model, version)
        return Steered(
            batch.named([answer.networks for answer in answers]),
            _join([answer.latents for answer in answers], "latents", batch.single),
            answers[0].model.name,
            answers[0].model.version,
        )

    def evaluate(
        self, model: str, networks: Networks | str | Path, *, activation: str | None = None, version: str | None = None
    ) -> Evaluated:
        """How networks behave on labelled sequences that no network of the model's zoo was trained on."""
        batch = _Batch.of(networks, activation)
        answers = self._evaluated(model, batch, {}, version)
        return Evaluated(
            list(answers[0].behaviors),
            _join([answer.recall for answer in answers], "recall", batch.single),
            _join([answer.false_positive_rate for answer in answers], "false_positive_rate", batch.single),
            answers[0].model.name,
            answers[0].model.version,
        )

    def effect(
        self,
        model: str,
        networks: Networks | str | Path,
        edits: Sequence[Edit],
        *,
        mode: Mode = "residual",
        strength: float | Literal["auto"] = 1.0,
        direction: Direction = "learned",
        activation: str | None = None,
        version: str | None = None,
    ) -> Effect:
        """What :meth:`steer` with the same arguments does to networks: predicted from their latents, and measured on
        held-out sequences."""
        change = _change(edits, mode, strength, direction)
        if not edits:
            raise InvalidInput.field("edits", "empty; give at least one")
        batch = _Batch.of(networks, activation)
        answers = self._evaluated(model, batch, change, version)

        def joined(name: str) -> Floats:
            return _join([getattr(answer.effect, name) for answer in answers], name, batch.single)

        return Effect(
            list(answers[0].behaviors),
            batch.named([answer.effect.networks for answer in answers]),
            joined("latents"),
            joined("strength"),
            joined("had") > 0,
            joined("predicted"),
            joined("recall"),
            joined("false_positive_rate"),
            joined("target"),
            joined("local"),
            answers[0].model.name,
            answers[0].model.version,
        )

    def _evaluated(
        self, model: str, batch: _Batch, change: Mapping[str, Any], version: str | None
    ) -> list[pb.EvaluateResponse]:
        def request(reference: pb.ModelRef, part: slice) -> pb.EvaluateRequest:
            return pb.EvaluateRequest(model=reference, networks=batch.message(part), **change)

        call = _Call(self._steering.Evaluate, self._steering.EvaluateStream, request, batch.rows, batch.row_bytes)
        return self._run(call, model, version)

    @staticmethod
    def _encoded(answers: Sequence[pb.EncodeResponse], single: bool) -> Encoded:
        latents = _join([answer.latents for answer in answers], "latents", single)
        return Encoded(latents, answers[0].model.name, answers[0].model.version)

    def _run(self, call: _Call[R], model: str, version: str | None) -> list[R]:
        """The answers to all parts of ``call``, in order."""
        size = max(1, min(PART_ROWS, PART_BYTES // max(call.row_bytes, 1)))
        if call.rows <= size:
            try:
                request = call.request(_model(model, version), slice(0, call.rows))
                return [_answer(lambda: call.unary(request, timeout=self.timeout))]
            except TooLarge as error:
                size = _smaller(min(size, call.rows), error)
        # One version for all parts, also when another is published meanwhile.
        reference = _model(model, version or self.behaviors(model).version)
        answers: list[R] = []
        start = 0
        while start < call.rows:
            parts = [slice(at, min(at + size, call.rows)) for at in range(start, call.rows, size)]
            requests = (call.request(reference, part) for part in parts)
            try:
                for answer in _answers(call.stream(requests, timeout=self.timeout * len(parts))):
                    answers.append(answer)
                    start = min(start + size, call.rows)
            except TooLarge as error:
                size = _smaller(size, error)
        return answers


@dataclass(frozen=True)
class _Call(Generic[R]):
    """One method, unary and as a stream, and how to make its request of some rows."""

    unary: Callable[..., R]
    stream: Callable[..., Iterator[R]]
    request: Callable[[pb.ModelRef, slice], Message]
    rows: int
    row_bytes: int


@dataclass(frozen=True)
class _Batch:
    """Networks with a batch axis and the platform's names."""

    arrays: dict[str, NDArray[Any]]
    names: dict[str, str]
    """The caller's name of each parameter to the platform's."""
    single: bool
    activation: str | None

    @classmethod
    def of(cls, networks: Networks | str | Path, activation: str | None) -> _Batch:
        given = network_files.load(networks) if isinstance(networks, str | Path) else networks
        if not given:
            raise InvalidInput.field("networks.parameters", "holds no parameter")
        arrays = {name: np.asarray(array) for name, array in given.items()}
        single, names = network_files.is_single(arrays), network_files.layer_names(arrays)
        batch = {names[name]: array[None] if single else array for name, array in arrays.items()}
        counts = {name: len(array) for name, array in batch.items() if array.ndim}
        for name, count in counts.items():
            # In parts it would look like another mistake.
            if count != max(counts.values()):
                raise InvalidInput.field(
                    f"networks.parameters.{name}", f"a batch of {count}, but others have {max(counts.values())}"
                )
        return cls(batch, names, single, activation)

    @property
    def rows(self) -> int:
        return max(len(array) if array.ndim else 0 for array in self.arrays.values())

    @property
    def row_bytes(self) -> int:
        return sum(_row_bytes(array) for array in self.arrays.values())

    def message(self, part: slice) -> pb.Networks:
        # A parameter without axes is the server's to refuse.
        tensors = {
            name: _tensor(array[part] if array.ndim else array, f"networks.parameters.{name}")
            for name, array in self.arrays.items()
        }
        return pb.Networks(parameters=tensors, activation=self.activation or "")

    def named(self, parts: Sequence[pb.Networks]) -> dict[str, Floats]:
        """Networks of an answer, with the caller's names."""
        joined = _join_networks(parts, self.single)
        return {name: joined[wire] for name, wire in self.names.items()}


def _change(
    edits: Sequence[Edit], mode: Mode, strength: float | Literal["auto"], direction: Direction
) -> dict[str, Any]:
    """The fields of a request that say what to change, or :class:`InvalidInput`."""
    if mode not in _MODES:
        raise InvalidInput.field("mode", f"must be one of {', '.join(_MODES)}")
    if direction not in _DIRECTIONS:
        raise InvalidInput.field("direction", f"must be one of {', '.join(_DIRECTIONS)}")
    if isinstance(strength, str) and strength != "auto":
        raise InvalidInput.field("strength", "must be auto or a number")
    wire = []
    for i, (operation, behavior, *by) in enumerate(edits):
        if operation not in _OPERATIONS:
            raise InvalidInput.field(f"edits.{i}.operation", f"must be one of {', '.join(_OPERATIONS)}")
        wire.append(pb.Edit(operation=_OPERATIONS[operation], behavior=behavior, by=by[0] if by else ""))
    how = {"auto_strength": True} if strength == "auto" else {"strength": strength}
    return {"edits": wire, "mode": _MODES[mode], "direction": _DIRECTIONS[direction], **how}


def _model(name: str, version: str | None) -> pb.ModelRef:
    return pb.ModelRef(name=name, version=version or "")


def _answer(call: Callable[[], R]) -> R:
    try:
        return call()
    except grpc.RpcError as error:
        raise error_of(error) from None


def _answers(call: Any) -> Iterator[Any]:
    try:
        yield from call
    except grpc.RpcError as error:
        raise error_of(error) from None
    finally:
        # Nothing happens to a call that has ended; one that is left in the middle, by Ctrl-C say, ends too.
        call.cancel()


def _smaller(size: int, error: TooLarge) -> int:
    """Half of ``size``, where that can help: the server named a field that is too large. Else raises ``error``."""
    if size == 1 or not error.violations:
        raise error
    return size // 2


def _tensor(array: NDArray[Any], field: str) -> common_pb2.Tensor:
    try:
        return to_tensor(array)
    except TypeError as error:
        raise InvalidInput.field(field, str(error)) from None


def _with_batch(values: ArrayLike, axes: int) -> tuple[NDArray[Any], bool]:
    """``values`` with a batch axis before its ``axes`` axes, and whether it had none."""
    array = np.asarray(values)
    return (array[None], True) if array.ndim <= axes else (array, False)


def _row_bytes(array: NDArray[Any]) -> int:
    return array.nbytes // max(len(array), 1) if array.ndim else array.nbytes


def _join(tensors: Sequence[common_pb2.Tensor], field: str, single: bool) -> Floats:
    joined = np.concatenate([from_tensor(tensor, field, finite=False) for tensor in tensors])
    return cast(Floats, joined[0] if single else joined)


def _join_networks(parts: Sequence[pb.Networks], single: bool) -> dict[str, Floats]:
    names = network_files.in_order(parts[0].parameters)
    return {name: _join([part.parameters[name] for part in parts], name, single) for name in names}
