"""The models that this process serves: loaded from the store on first use, kept up to date, and evicted."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from ethogram.errors import EthogramError, IllegalState, InvalidInput, NotFound, TooLarge
from services.artifacts.manifest import ModelPointer, check_names
from services.artifacts.store import ArtifactStore, Deleted

M = TypeVar("M")

log = logging.getLogger(__name__)


class Reference(NamedTuple):
    """A model as a request names it."""

    tenant: str
    name: str
    version: str | None
    """None: the latest."""


@dataclass(frozen=True)
class Served(Generic[M]):
    """A loaded model and its version."""

    pointer: ModelPointer
    model: M


@dataclass(frozen=True)
class _Loaded:
    type: str
    """Type of its artifact."""
    model: object
    size: int


class ModelRepository:
    """Published models by name, loaded at most once each and off the event loop.

    ``loaders``: functions that load a model from an artifact's folder, which is deleted afterwards, by type of
    artifact. A new version is loaded before it takes over, so no request waits for it.
    """

    def __init__(
        self,
        store: ArtifactStore,
        loaders: Mapping[str, Callable[[Path], object]],
        *,
        scratch: Path,
        max_models: int = 8,
        max_bytes: int = 8 * 2**30,
        out_of_memory: tuple[type[Exception], ...] = (MemoryError,),
        release_memory: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._loaders, self._scratch = store, loaders, scratch
        self._max_models, self._max_bytes = max_models, max_bytes
        self._out_of_memory, self._release_memory = out_of_memory, release_memory
        self._pointers: dict[Reference, ModelPointer] = {}
        # By artifact id, least recently used first.
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._loading: dict[str, asyncio.Task[_Loaded]] = {}
        # An artifact never changes, so one that cannot be loaded never can.
        self._broken: dict[str, EthogramError] = {}

    def __len__(self) -> int:
        """Models in memory."""
        return len(self._loaded)

    async def get(self, reference: Reference, model_type: type[M]) -> Served[M]:
        """The model that ``reference`` names.

        Raises :class:`NotFound` for one that is not published, :class:`InvalidInput` for one that is not a
        ``model_type``, :class:`IllegalState` for one that cannot be loaded, :class:`TooLarge` for one that has no room.
        """
        pointer = self._pointers.get(reference)
        if pointer is None:
            pointer = await self._resolve(reference)
        loaded = await self._model(pointer)
        self._pointers[reference] = pointer
        if not isinstance(loaded.model, model_type):
            raise InvalidInput.field("model.name", f"{pointer.name} is a {loaded.type}, which this call does not take")
        return Served(pointer, loaded.model)

    async def refresh(self) -> None:
        """Look up each known reference again: later versions take over from older and retired ones."""
        for reference in list(self._pointers):
            try:
                pointer = await self._resolve(reference)
                if pointer != self._pointers.get(reference):
                    await self._model(pointer)
                    self._pointers[reference] = pointer
                    log.info("model %s is now version %s", pointer.name, pointer.version)
            except NotFound:
                await self._drop_if_retired(reference)
            except Exception as error:
                # The model in memory is still right, and the store may be back in two seconds.
                log.warning("model %s could not be looked up again: %s", reference.name, error)
        used = {pointer.artifact for pointer in self._pointers.values()}
        for artifact in [artifact for artifact in self._loaded if artifact not in used]:
            del self._loaded[artifact]

    async def keep_fresh(self, seconds: float) -> None:
        """Refresh every so many ``seconds``, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            await self.refresh()

    async def _drop_if_retired(self, reference: Reference) -> None:
        pointer = self._pointers.get(reference)
        try:
            if pointer is None or not (await self._resolve(reference._replace(version=pointer.version))).retired:
                return
        except Deleted:
            pass
        except EthogramError:
            # Nobody deleted it: its folder is not mounted now.
            log.warning("model %s is missing in the store; it is served from memory", reference.name)
            return
        self._pointers.pop(reference, None)
        log.info("model %s is retired or deleted", reference.name)

    async def _resolve(self, reference: Reference) -> ModelPointer:
        check_names("model.", **reference._asdict())
        return await asyncio.to_thread(self._store.model, *reference)

    async def _model(self, pointer: ModelPointer) -> _Loaded:
        loaded = self._loaded.get(pointer.artifact)
        if loaded is not None:
            self._loaded.move_to_end(pointer.artifact)
            return loaded
        if pointer.artifact in self._broken:
            raise self._broken[pointer.artifact]
        task = self._loading.get(pointer.artifact)
        if task is None:
            task = asyncio.create_task(self._load_once(pointer))
            self._loading[pointer.artifact] = task
            # Whoever waits gets the exception; it is not reported where nobody does.
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
        # One caller's cancellation must not cancel the load that others wait for.
        return await asyncio.shield(task)

    async def _load_once(self, pointer: ModelPointer) -> _Loaded:
        artifact = pointer.artifact
        try:
            manifest = await asyncio.to_thread(self._store.manifest, artifact)
            if manifest.type not in self._loaders:
                served = ", ".join(sorted(self._loaders))
                raise self._refuse(pointer, f"its artifact is a {manifest.type}; this server serves {served}")
            if manifest.size > self._max_bytes:
                raise TooLarge(
                    f"model {pointer.name} version {pointer.version} takes {manifest.size} bytes; this server has room "
                    f"for {self._max_bytes} (ETHOGRAM_MAX_MODEL_BYTES)"
                )
            loaded = _Loaded(manifest.type, await self._load_with_room(pointer, manifest.type), manifest.size)
            self._loaded[artifact] = loaded
            while len(self._loaded) > self._max_models or sum(m.size for m in self._loaded.values()) > self._max_bytes:
                evicted, _ = self._loaded.popitem(last=False)
                self._pointers = {key: kept for key, kept in self._pointers.items() if kept.artifact != evicted}
                log.info("evicted a model", extra={"artifact": evicted})
            log.info("loaded model %s version %s", pointer.name, pointer.version, extra={"bytes": manifest.size})
            return loaded
        finally:
            del self._loading[artifact]

    async def _load_with_room(self, pointer: ModelPointer, type: str) -> object:
        for attempt in (1, 2):
            with tempfile.TemporaryDirectory(dir=self._scratch, prefix="model-") as folder:
                bundle = await asyncio.to_thread(self._store.fetch, pointer.artifact, Path(folder) / "bundle")
                try:
                    return await asyncio.to_thread(self._loaders[type], bundle)
                except self._out_of_memory:
                    pass
                except Exception:
                    log.exception("model %s version %s cannot be loaded", pointer.name, pointer.version)
                    raise self._refuse(pointer, f"its artifact is not a valid {type}") from None
            # Past the handler, so that the traceback no longer keeps the device's tensors alive.
            if attempt == 1:
                log.warning("no memory to load model %s; the others leave", pointer.name)
                self._loaded.clear()
                self._release_memory()
        raise TooLarge(f"the device's memory cannot hold model {pointer.name} version {pointer.version}; try later")

    def _refuse(self, pointer: ModelPointer, cause: str) -> EthogramError:
        error = IllegalState(
            f"model {pointer.name} version {pointer.version} cannot be served: {cause}; publish another version"
        )
        self._broken[pointer.artifact] = error
        return error
