"""The client of the embedding service: configurations to vectors, vectors to text, requirements to configurations."""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, Self, TypeVar

import numpy as np
from google.protobuf.message import Message
from numpy.typing import ArrayLike, NDArray

from ethogram import channel
from ethogram import networks as network_files
from ethogram.channel import Channel, Methods
from ethogram.errors import EthogramError, InvalidInput, Violation
from ethogram.v1 import embedding_pb2 as pb
from ethogram.v1.embedding_pb2_grpc import EmbeddingServiceStub
from ethogram.v1.inference_pb2 import ModelRef
from ethogram.wire import from_tensor, to_tensor

__all__ = [
    "AsyncEmbedding",
    "Described",
    "Embedded",
    "Embedding",
    "Field",
    "Fields",
    "Recommended",
]

UNKNOWN = "unknown"
"""What stands for a value that is not known; None does too."""
DESCRIBED_ROWS = 32
"""Rows that are described by one message of a stream: a language model takes seconds for more."""

_OF_REQUEST = re.compile(r"requests\.(\d+)\.(.+?)(?:\.(\d+))?")
"""A field of a request of a stream, with the row if it names one."""

Floats = NDArray[np.floating[Any]]
Values = Mapping[str, Any]
Configurations = Values | Sequence[Values]

P = ParamSpec("P")
R = TypeVar("R")


class Field(NamedTuple):
    """A field of the configurations of a model: a number, or a category with ``labels``.

    ``column``: its name in the table of measurements; ``low`` and ``high``: the range of training; ``price``: cost per
    unit; ``measured``: whether it is an outcome, such as a latency.
    """

    name: str
    column: str
    unit: str
    labels: list[str]
    low: float
    high: float
    decimals: int
    price: float
    measured: bool


class Fields(NamedTuple):
    """The fields of a model, its forms of description, the length of an embedding, and which model answered."""

    fields: list[Field]
    templates: list[str]
    size: int
    model: str
    version: str


class Embedded(NamedTuple):
    """``embeddings`` ``[batch, size]``, or ``[size]`` of a single configuration.

    ``outside``: for each row, or the single one, the names of the numbers outside the range of training; embeddings of
    these are less exact.
    """

    embeddings: Floats
    outside: list[Any]
    model: str
    version: str


class Described(NamedTuple):
    """``texts`` of the rows, or of the single one, and the ``configurations`` read back from them, each a dictionary;
    None for a text that cannot be read. ``outside`` as in :class:`Embedded`."""

    texts: Any
    configurations: Any
    outside: list[Any]
    model: str
    version: str


class Recommended(NamedTuple):
    """The cheapest ``configurations``, each a dictionary, or the one of a single row.

    ``price``; ``predicted``: the measured ``dimension``; ``upper``: what it stays below with the confidence asked for;
    ``fits``: whether that is below the bound. If not, no configuration is, and this one comes closest. All are
    ``[batch]``, or scalars of a single row. ``measurements``: how many the prediction was fitted on, and
    ``measurements_left_out``: how many of the model's it was not, of many a random part being used. ``outside``: for
    each row, or the single one, ``dimension`` where it is predicted outside the range of training, which is less
    certain.

    Fields that were not given are chosen, also those without a price, which may describe the workload: give these.
    """

    configurations: Any
    price: Floats
    predicted: Floats
    upper: Floats
    fits: NDArray[np.bool_]
    dimension: str
    measurements: int
    measurements_left_out: int
    outside: list[Any]
    model: str
    version: str


class Embedding(Channel):
    """A connection to the embedding service at ``target`` (``host:port``). Thread-safe; close it, or use ``with``.

    Configurations are dictionaries of values by field: numbers, labels of categories, and None or ``unknown`` for what
    is not known. A list of them is a batch, as is one dictionary of lists or arrays; one dictionary of values is a
    single row, which gets answers without a batch axis. Sets of any size can be given: large ones travel in parts.

    Every call raises :class:`~ethogram.errors.InvalidInput` (which names field and row, as
    ``configurations.cores.3``, rows counting from 0), :class:`~ethogram.errors.NotFound`,
    :class:`~ethogram.errors.IllegalState` (the language model is not on the server),
    :class:`~ethogram.errors.TooLarge` (the server is busy) or :class:`~ethogram.errors.Unavailable` (no answer within
    ``timeout`` seconds per part).
    """

    def __init__(self, target: str, *, timeout: float = 60.0) -> None:
        super().__init__(target, timeout=timeout)
        stub = EmbeddingServiceStub(self._channel)
        self._list_fields = stub.ListFields
        self._methods: dict[type[Message], Methods[Any]] = {
            pb.EmbedResourcesRequest: (stub.EmbedResources, stub.EmbedResourcesStream),
            pb.DescribeRequest: (stub.Describe, stub.DescribeStream),
            pb.RecommendRequest: (stub.Recommend, stub.RecommendStream),
        }

    def fields(self, model: str, *, version: str | None = None) -> Fields:
        """The fields of the configurations of ``model``."""
        answer = self._call(self._list_fields, pb.ListFieldsRequest(model=_reference(model, version)))
        fields = [
            Field(f.name, f.column, f.unit, list(f.labels), f.low, f.high, f.decimals, f.price, f.measured)
            for f in answer.fields
        ]
        return Fields(fields, list(answer.templates), answer.size, answer.model.name, answer.model.version)

    def embed(self, model: str, configurations: Configurations, *, version: str | None = None) -> Embedded:
        """Embeddings of configurations. A field that is left out is unknown; the tool must be known."""
        batch = _Batch.of(configurations)
        answers, name = self._run(pb.EmbedResourcesRequest, batch, model, version)
        joined = np.concatenate([from_tensor(answer.embeddings, "embeddings") for answer in answers])
        return Embedded(batch.one(joined), batch.outside(answers), *name)

    def describe(
        self, model: str, configurations: Configurations, *, template: str | None = None, version: str | None = None
    ) -> Described:
        """What the language model writes of the embeddings of configurations, also of what is unknown in them;
        ``template``: form of description, by default the first. The first call loads the language model."""
        return self._describe(_Batch.of(configurations), model, template, version)

    def describe_embeddings(
        self, model: str, embeddings: ArrayLike, *, template: str | None = None, version: str | None = None
    ) -> Described:
        """:meth:`describe` of embeddings ``[batch, size]``, or ``[size]``."""
        array = network_files.floats(embeddings, "embeddings")
        single = array.ndim < 2
        batch = _Batch({"embeddings": array[None] if single else array}, len(array) if not single else 1, single)
        return self._describe(batch, model, template, version)

    def recommend(
        self,
        model: str,
        given: Configurations,
        bound: float | Sequence[float],
        *,
        confidence: float = 0.9,
        dimension: str | None = None,
        version: str | None = None,
    ) -> Recommended:
        """The cheapest configurations with the ``given`` values, the tool among them, whose measured ``dimension``, by
        default the first, stays below ``bound`` with this confidence. ``bound``: of all rows, or one for each."""
        batch = _Batch.of(given)
        try:
            bounds = np.asarray(bound)
        except ValueError:
            bounds = np.array(None)
        if bounds.dtype.kind not in "fiu":
            raise InvalidInput.field("bound", "must be a number, or a list with one for each row")
        bounds = np.broadcast_to(bounds, batch.rows) if bounds.ndim == 0 else bounds
        if bounds.shape != (batch.rows,):
            raise InvalidInput.field("bound", f"has {len(bounds)} values, and there are {batch.rows} rows")
        answers, name = self._run(
            pb.RecommendRequest,
            batch,
            model,
            version,
            by_row={"bounds": bounds.tolist()},
            confidence=confidence,
            dimension=dimension or "",
        )
        numbers = {
            name: batch.one(np.concatenate([from_tensor(getattr(answer, name), name) for answer in answers]))
            for name in ("price", "predicted", "upper")
        }
        fits = batch.one(np.array([fit for answer in answers for fit in answer.fits]))
        return Recommended(
            batch.one(_dictionaries(answers)),
            **numbers,
            fits=fits,
            dimension=answers[0].dimension,
            measurements=answers[0].measurements,
            measurements_left_out=answers[0].measurements_left_out,
            outside=batch.outside(answers),
            model=name[0],
            version=name[1],
        )

    def _describe(self, batch: _Batch, model: str, template: str | None, version: str | None) -> Described:
        answers, name = self._run(
            pb.DescribeRequest, batch, model, version, most_rows=DESCRIBED_ROWS, template=template or ""
        )
        texts = [text for answer in answers for text in answer.texts]
        readable = [flag for answer in answers for flag in answer.readable]
        found = [row if flag else None for row, flag in zip(_dictionaries(answers), readable, strict=True)]
        return Described(batch.one(texts), batch.one(found), batch.outside(answers), *name)

    def _run(
        self,
        request: type[Message],
        batch: _Batch,
        model: str,
        version: str | None,
        *,
        most_rows: int = channel.PART_ROWS,
        by_row: Mapping[str, Sequence[float]] | None = None,
        **fields: Any,
    ) -> tuple[list[Any], tuple[str, str]]:
        """The answers to all parts of ``batch``, of at most ``most_rows`` rows, in order, and name and version of the
        model that gave them. ``by_row``: fields with a value for each row."""

        def part(reference: ModelRef, rows: slice) -> Message:
            own = {name: values[rows] for name, values in (by_row or {}).items()}
            return request(model=reference, **batch.part(rows), **own, **fields)

        answers = self._run_parts(
            self._methods[request],
            part,
            _reference(model, version),
            lambda: _reference(model, version or self.fields(model).version),
            rows=batch.rows,
            row_bytes=max(batch.row_bytes, channel.PART_BYTES // most_rows),
        )
        answered = answers[0].model
        return answers, (answered.name, answered.version)

    def _relocate_error(self, error: EthogramError, parts: Sequence[slice]) -> EthogramError:
        # The server names the request of the stream, and the row in it.
        message, violations = error.message.partition(" of the stream: ")[2] or error.message, []
        for field, description in error.violations:
            if found := _OF_REQUEST.fullmatch(field):
                number, name, row = found.groups()
                whole = name if row is None else f"{name}.{parts[int(number)].start + int(row)}"
                message = message.replace(f"{field.removeprefix(f'requests.{number}.')}: ", f"{whole}: ", 1)
                field = whole
            violations.append(Violation(field, description))
        return type(error)(message, violations)


def _in_thread(
    method: Callable[Concatenate[Embedding, P], R],
) -> Callable[Concatenate[AsyncEmbedding, P], Coroutine[Any, Any, R]]:
    @wraps(method)
    async def call(self: AsyncEmbedding, /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.to_thread(method, self._embedding, *args, **kwargs)

    return call


class AsyncEmbedding:
    """:class:`Embedding` for ``asyncio``: the same methods, to be awaited. Close it, or use ``async with``."""

    def __init__(self, target: str, *, timeout: float = 60.0) -> None:
        self._embedding = Embedding(target, timeout=timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """End the connection."""
        self._embedding.close()

    fields = _in_thread(Embedding.fields)
    embed = _in_thread(Embedding.embed)
    describe = _in_thread(Embedding.describe)
    describe_embeddings = _in_thread(Embedding.describe_embeddings)
    recommend = _in_thread(Embedding.recommend)


@dataclass(frozen=True)
class _Batch:
    """Embeddings, or configurations by column."""

    columns: Mapping[str, Any]
    """Arrays of numbers, or lists of labels, with the places of what is unknown; or ``embeddings``."""
    rows: int
    single: bool
    """Whether the caller gave one row, without a batch axis."""

    @classmethod
    def of(cls, configurations: Configurations) -> _Batch:
        if not isinstance(configurations, Mapping):
            return cls(_columns(_transposed(configurations)), len(configurations), single=False)
        lists = {name: values for name, values in configurations.items() if _is_list(values)}
        if not lists:
            return cls(_columns({name: [value] for name, value in configurations.items()}), 1, single=True)
        rows = max(map(len, lists.values()))
        for name, values in configurations.items():
            if name not in lists or len(values) != rows:
                found = f"{len(values)} values" if name in lists else "one value"
                raise InvalidInput.field(f"configurations.{name}", f"has {found}, and others have {rows}")
        return cls(_columns(lists), rows, single=False)

    @property
    def row_bytes(self) -> int:
        if "embeddings" in self.columns:
            return int(self.columns["embeddings"].nbytes) // max(self.rows, 1)
        return 32 * len(self.columns)

    def part(self, rows: slice) -> dict[str, Any]:
        """Some of the rows, as a field of a request."""
        if "embeddings" in self.columns:
            return {"embeddings": to_tensor(self.columns["embeddings"][rows])}
        columns = {
            name: pb.ResourceColumn(**{kind: values[rows]}, unknown=unknown[rows] if any(unknown) else ())
            for name, (kind, values, unknown) in self.columns.items()
        }
        return {"configurations": pb.ResourceRows(columns=columns)}

    def one(self, rows: Any) -> Any:
        """``rows``, or the one that a caller gave without a batch axis."""
        return rows[0] if self.single else rows

    def outside(self, answers: Sequence[Any]) -> Any:
        """For each row the fields that are outside the range of training."""
        names: list[list[str]] = []
        for answer in answers:
            start = len(names)
            names += [[] for _ in range(_rows_of(answer))]
            for marked in answer.outside:
                names[start + marked.row] = list(marked.fields)
        return self.one(names)


def _rows_of(answer: Any) -> int:
    match answer:
        case pb.DescribeResponse():
            return len(answer.texts)
        case pb.RecommendResponse():
            return len(answer.fits)
        case _:
            return int(answer.embeddings.shape[0])


def _is_list(values: object) -> bool:
    return isinstance(values, list | tuple) or (hasattr(values, "__len__") and np.ndim(values) == 1)  # type: ignore[arg-type]


def _transposed(rows: Sequence[Values]) -> dict[str, list[Any]]:
    """Columns of rows; what a row does not have is unknown."""
    names: dict[str, None] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InvalidInput.field(f"configurations.{number}", "must be a dictionary of values by field")
        names |= dict.fromkeys(row)
    return {name: [row.get(name) for row in rows] for name in names}


def _columns(columns: Mapping[str, Any]) -> dict[str, tuple[str, list[Any], list[bool]]]:
    """``numbers`` or ``labels`` of each column, as protobuf takes them, and which are unknown."""
    return {name: _column(f"configurations.{name}", values) for name, values in columns.items()}


def _array(values: Any) -> Any:
    """Numbers of another library, such as a Series of pandas or a tensor of torch, as a NumPy array."""
    if hasattr(values, "dtype") and not isinstance(values, np.ndarray):
        # Some cannot be one: a tensor on a GPU, one with a gradient, one in bfloat16.
        with suppress(TypeError, ValueError, RuntimeError):
            array = np.asarray(values)
            return array if array.dtype.kind in "fiu" else values
    return values


def _column(field: str, values: Any) -> tuple[str, list[Any], list[bool]]:
    values = _array(values)
    if isinstance(values, np.ndarray) and values.dtype.kind == "f":
        values = [_float(cell) for cell in values] if values.itemsize < 8 else values
    cells = values.tolist() if hasattr(values, "tolist") else list(values)
    if isinstance(values, np.ndarray) and values.dtype.kind in "fiu":
        return "numbers", cells, [False] * len(cells)
    texts = {cell for cell in cells if isinstance(cell, str)}
    # Whether `unknown` alone is a label is for the model to say.
    labels = bool(texts) and (texts != {UNKNOWN} or all(cell is None or cell in texts for cell in cells))
    taken = str if labels else (int, float, np.number)
    found: list[Any] = []
    unknown: list[bool] = []
    for row, cell in enumerate(cells):
        unknown.append(cell is None or (not labels and isinstance(cell, str)))
        if not unknown[-1] and (isinstance(cell, bool) or not isinstance(cell, taken)):
            expected = "text, as in other rows" if labels else "a number or text"
            raise InvalidInput.field(f"{field}.{row}", f"must be {expected}, not {cell!r}")
        found.append(("" if unknown[-1] else cell) if labels else 0.0 if unknown[-1] else _float(cell))
    return "labels" if labels else "numbers", found, unknown


def _float(number: Any) -> float:
    """A number as floats have it: infinite, which a model refuses, where none is as large. One of fewer bits is taken
    as it is written: 0.1 of 32 bits has more decimals in 64."""
    if isinstance(number, np.floating) and number.itemsize < 8:
        return float(str(number))
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def _dictionaries(answers: Sequence[Any]) -> list[dict[str, Any]]:
    """The ``configurations`` of answers, as dictionaries by field."""
    rows: list[dict[str, Any]] = []
    for answer in answers:
        columns = {name: column.labels or column.numbers for name, column in answer.configurations.columns.items()}
        rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return rows


def _reference(name: str, version: str | None) -> ModelRef:
    return ModelRef(name=name, version=version or "")
