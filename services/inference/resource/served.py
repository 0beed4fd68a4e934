"""An encoder of configurations as the server runs it: NumPy in, NumPy out."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ethogram.errors import IllegalState, InvalidInput, NotFound, TooLarge
from services.artifacts.store import ArtifactStore
from services.inference.batcher import Arrays
from services.inference.dataplane import Request
from services.inference.repository import Served
from services.language.models import LanguageModel
from services.resource.codec import Column, ResourceCodec
from services.resource.describe import Describer
from services.resource.predict import measured_number
from services.resource.recommend import Recommender
from services.resource.sources import language_model_for

CONFIGURATIONS, EMBEDDINGS = "configurations", "embeddings"
VALUES, UNKNOWN, OUTSIDE, TEXTS = "values", "unknown", "outside", "texts"
CHOICE = ("price", "predicted", "upper", "fits")
GROUP = 16
"""Rows that pass through the language model at once: always so many, whoever else is there, since sums of another shape
may differ in their last bits."""
_FIELD = "language_model"
TEXT_BYTES = 2048
"""About how many bytes the answer to a description takes."""


class ServedResource:
    """A loaded encoder.

    The ``check_`` methods and the attributes are for any thread, the ``prepare_`` methods for the event loop. The other
    methods are for a device's thread alone; they take and return arrays whose first axis is the batch, and a row's
    result does not depend on other rows.
    """

    def __init__(self, codec: ResourceCodec) -> None:
        self.codec, self.schema = codec, codec.schema
        self._preparing: dict[str, asyncio.Task[None]] = {}
        self._describer: Describer | None = None
        self._recommenders: dict[str, Recommender] = {}

    @classmethod
    def load(cls, folder: Path, device: str) -> ServedResource:
        """The encoder of an artifact's folder. Loads no language model."""
        return cls(ResourceCodec.load(folder, device))

    def check_rows(self, columns: Mapping[str, Column], rows: int, answer_bytes: int = 0) -> Request:
        """Check configurations. Raises :class:`InvalidInput`."""
        if not rows:
            raise InvalidInput.field(CONFIGURATIONS, "an empty batch")
        values, unknown = self.codec.column_vectors(columns, rows, CONFIGURATIONS)
        arrays = {VALUES: values.numpy(), UNKNOWN: unknown.numpy()}
        return Request(arrays, CONFIGURATIONS, {}, answer_bytes or 4 * self.codec.size)

    def check_embeddings(self, embeddings: NDArray[Any]) -> Request:
        """Check embeddings ``[batch, size]``. Raises :class:`InvalidInput`."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.codec.size or embeddings.dtype.kind != "f":
            text = f"{embeddings.dtype} {list(embeddings.shape)}, and the model has floats [batch, {self.codec.size}]"
            raise InvalidInput.field(EMBEDDINGS, text)
        if not len(embeddings):
            raise InvalidInput.field(EMBEDDINGS, "an empty batch")
        single = embeddings.astype(np.float32)
        if not np.isfinite(single).all():
            raise InvalidInput.field(EMBEDDINGS, "holds NaN, an infinity, or a number that float32 cannot hold")
        return Request({EMBEDDINGS: single}, EMBEDDINGS, {}, TEXT_BYTES)

    def check_template(self, name: str) -> dict[str, Hashable]:
        """The form of description as an option; the first for an empty name. Raises :class:`InvalidInput`."""
        names = [template.name for template in self.schema.templates]
        if name and name not in names:
            raise InvalidInput.field("template", f"there is no {name!r}; there are {', '.join(names)}")
        return {"template": names.index(name) if name else 0}

    def check_requirements(
        self, columns: Mapping[str, Column], bounds: Sequence[float], confidence: float, dimension: str
    ) -> Request:
        """Check requirements, with a bound for each. Raises :class:`InvalidInput`."""
        if not bounds:
            raise InvalidInput.field("bounds", "an empty batch; give a bound for each row")
        values, unknown = self.codec.column_vectors(columns, len(bounds), CONFIGURATIONS, requirements=True)
        for row, bound in enumerate(bounds):
            if not 0 < bound < np.inf:
                raise InvalidInput.field(f"bounds.{row}", f"must be a number above 0, not {bound:g}")
        if not 0 < confidence < 1:
            raise InvalidInput.field("confidence", f"must be between 0 and 1, not {confidence:g}")
        arrays = {VALUES: values.numpy(), UNKNOWN: unknown.numpy(), "bounds": np.array(bounds, np.float64)}
        arrays["rows"] = np.arange(len(bounds))
        return Request(arrays, CONFIGURATIONS, {"confidence": confidence, "dimension": self.dimension(dimension)})

    async def prepare_describe(self, readers: Readers, artifact: str) -> None:
        """Load the language model of this encoder, the ``artifact``, unless it is there. Raises
        :class:`IllegalState`."""

        def load() -> None:
            self._describer = Describer(readers.get(artifact, self.codec), self.schema)

        await self._once("describe", load)

    async def prepare_recommend(self, dimension: str) -> None:
        """Fit the prediction of a measured dimension unless it is there; see :meth:`dimension`. Raises
        :class:`InvalidInput` for a dimension that is not measured, and :class:`IllegalState` without a table, or with
        too small a one."""
        name = self.dimension(dimension)

        def fit() -> None:
            if self.codec.table is None:
                text = "has no table of measurements, without which nothing can be recommended; train it again"
                raise IllegalState.field("model.name", text)
            try:
                self._recommenders[name] = Recommender(self.codec, self.codec.table, name)
            except InvalidInput as error:
                if any(violation.field == "dimension" for violation in error.violations):
                    raise
                # The request has no other field that this depends on.
                raise IllegalState.field("model.name", f"cannot recommend: {error.message}") from None

        await self._once(f"recommend {name}", fit)

    async def _once(self, name: str, prepare: Callable[[], None]) -> None:
        """Run ``prepare`` on a thread, once for all calls that wait for it; again if it failed."""
        task = self._preparing.get(name)
        if task is None:

            def forget(done: asyncio.Task[None]) -> None:
                if done.cancelled() or done.exception() is not None:
                    del self._preparing[name]

            task = self._preparing[name] = asyncio.create_task(asyncio.to_thread(prepare))
            task.add_done_callback(forget)
        # Who gives up does not cancel it for others.
        await asyncio.shield(task)

    def dimension(self, name: str) -> str:
        """The measured dimension that a request names, by default the first. Raises :class:`IllegalState` where the
        schema has none."""
        try:
            return name or self.schema.names[measured_number(self.schema)]
        except InvalidInput as error:
            raise IllegalState.field("model.name", f"cannot recommend: {error.violations[0].description}") from None

    def measurements(self, dimension: str) -> tuple[int, int]:
        """How many measurements the prediction of a prepared ``dimension`` was fitted on, and how many were left
        out."""
        recommender = self._recommenders[dimension]
        used = recommender.predictor.measurements
        return used, len(recommender.table) - used

    @torch.inference_mode()
    def embed(self, arrays: Arrays) -> Arrays:
        """Vectors to ``embeddings``, and which of their numbers are ``outside`` the range of training."""
        values, unknown = _tensors(arrays, VALUES, UNKNOWN)
        embeddings = self.codec.embed(values, unknown)
        return {EMBEDDINGS: embeddings.numpy(), OUTSIDE: self.codec.outside_mask(values, unknown).numpy()}

    @torch.inference_mode()
    def describe(self, arrays: Arrays, template: int) -> Arrays:
        """Vectors to ``texts``, and which of their numbers are ``outside`` the range of training."""
        values, unknown = _tensors(arrays, VALUES, UNKNOWN)
        outside = self.codec.outside_mask(values, unknown).numpy()
        texts = [
            text
            for rows in _groups(len(values))
            for text in self._write(self.codec.embed(values[rows], unknown[rows]), template)
        ]
        return {TEXTS: _objects(texts[: len(values)]), OUTSIDE: outside}

    @torch.inference_mode()
    def describe_embeddings(self, arrays: Arrays, template: int) -> Arrays:
        """``embeddings`` to ``texts``."""
        (embeddings,) = _tensors(arrays, EMBEDDINGS)
        texts = [text for rows in _groups(len(embeddings)) for text in self._write(embeddings[rows], template)]
        return {TEXTS: _objects(texts[: len(embeddings)])}

    def _write(self, embeddings: torch.Tensor, template: int) -> list[str]:
        assert self._describer is not None
        soft = self.codec.soft(embeddings.to(self._describer.device))
        return self._describer.write(soft, self.schema.templates[template])

    def recommend(self, arrays: Arrays, confidence: float, dimension: str) -> Arrays:
        """Requirements to ``values`` of the recommended configurations, the fields of :data:`CHOICE`, and which numbers
        are predicted ``outside`` the range of training."""
        values, unknown = _tensors(arrays, VALUES, UNKNOWN)
        recommender = self._recommenders[dimension]
        choices = [
            recommender.choose(value, free, float(bound), confidence, CONFIGURATIONS, row=int(row))
            for value, free, bound, row in zip(values, unknown, arrays["bounds"], arrays["rows"], strict=True)
        ]
        found: Arrays = {name: np.array([getattr(choice, name) for choice in choices]) for name in CHOICE}
        found[OUTSIDE] = np.zeros(values.shape, np.bool_)
        found[OUTSIDE][:, recommender.dimension] = [choice.outside for choice in choices]
        return found | {VALUES: torch.stack([choice.values for choice in choices]).numpy()}


class Readers:
    """The language models of encoders, each in memory once, as long as an encoder uses it."""

    def __init__(
        self, store: ArtifactStore, scratch: Path, device: str, out_of_memory: tuple[type[Exception], ...] = ()
    ) -> None:
        self._store, self._scratch, self._device, self._out_of_memory = store, scratch, device, out_of_memory
        self._lock = threading.Lock()
        self._loaded: weakref.WeakValueDictionary[tuple[str, str], LanguageModel] = weakref.WeakValueDictionary()

    def get(self, artifact: str, codec: ResourceCodec) -> LanguageModel:
        """The language model of ``codec``, which is that ``artifact``: an artifact that it was made from, else where
        its spec says. Raises :class:`IllegalState` for one that is not here or is another one, and :class:`TooLarge`
        for one that has no room."""
        # The same weights may have another tokenizer.
        key = str(codec.about.get("language_model_digest")), str(codec.about.get("tokenizer_digest"))
        with self._lock:
            language = self._loaded.get(key)
            if language is None:
                try:
                    language = self._load(artifact, codec)
                except InvalidInput as error:
                    raise IllegalState.field("model.name", f"cannot describe: {error.message}") from None
                except self._out_of_memory:
                    raise TooLarge("the device's memory cannot hold the language model; try later") from None
                self._loaded[key] = language
            return language

    def _load(self, artifact: str, codec: ResourceCodec) -> LanguageModel:
        for parent in self._store.manifest(artifact).parents:
            # A published encoder outlives its job and what else that made.
            with (
                suppress(NotFound),
                tempfile.TemporaryDirectory(dir=self._scratch, prefix="language-model-") as folder,
            ):
                if self._store.manifest(parent).type == "language-model":
                    found = str(self._store.fetch(parent, Path(folder, "model")))
                    return language_model_for(codec, found, self._device, _FIELD)
        return language_model_for(codec, None, self._device, _FIELD)


def named_columns(served: Served[ServedResource], values: NDArray[np.float64]) -> dict[str, list[float] | list[str]]:
    """The columns of vectors ``[rows, fields]``, by name."""
    columns: dict[str, list[float] | list[str]] = {}
    for dimension, column in zip(served.model.schema.dimensions, values.T.tolist(), strict=True):
        columns[dimension.name] = [dimension.labels[int(value)] for value in column] if dimension.labels else column
    return columns


def _groups(rows: int) -> list[torch.Tensor]:
    """Numbers of rows in groups of :data:`GROUP`; the last row fills up the last one."""
    padded = torch.arange(-(-rows // GROUP) * GROUP).clamp_max(rows - 1)
    return list(torch.split(padded, GROUP))


def _tensors(arrays: Arrays, *names: str) -> list[torch.Tensor]:
    return [torch.from_numpy(arrays[name]) for name in names]


def _objects(texts: Sequence[str]) -> NDArray[Any]:
    array = np.empty(len(texts), dtype=object)
    array[:] = texts
    return array
