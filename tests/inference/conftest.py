"""A small real codec, a store with it as the published model ``tiny``, and a real server on loopback."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ethogram.inference import Inference
from ethogram.specs.base import ArtifactRef
from ethogram.specs.crossmodal import CodecSpec, CodecTrainingSpec, CrossmodalSpec
from ethogram.specs.generation import GenerationSpec, PatternSpec, SignatureSpec, SubjectSpec, SubjectTrainingSpec
from services.artifacts.store import ArtifactStore
from services.crossmodal.codec import Codec
from services.crossmodal.train import train
from services.generation.pipeline import generate
from services.inference.server import InferenceServer
from services.inference.settings import InferenceSettings
from services.resource.codec import ResourceCodec
from services.zoo.dataset import Zoo
from services.zoo.subjects import Architecture, Params, select

REFRESH_SECONDS = 0.1


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run ``async def`` tests; they need no plug-in for it."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    asyncio.run(pyfuncitem.obj(**arguments))
    return True


@dataclass(frozen=True)
class Material:
    """What codecs and networks are made of here."""

    zoo: Zoo

    @property
    def architecture(self) -> Architecture:
        return self.zoo.architecture

    def networks(self, count: int) -> Params:
        """Networks of the zoo, each with some noise of its own."""
        draws = torch.Generator().manual_seed(count)
        params = select(self.zoo.params, torch.arange(count) % len(self.zoo))
        return {name: value + 0.1 * torch.randn(value.shape, generator=draws) for name, value in params.items()}

    def codec(self, seed: int = 0, zoo: Zoo | None = None) -> Codec:
        """A codec after one step of training: it does what a good one does, only not well."""
        return train(
            CrossmodalSpec(
                zoo=ArtifactRef(artifact="zoo"),
                seed=seed,
                codec=CodecSpec(latent_dim=12, hidden_dim=32, depth=2),
                training=CodecTrainingSpec(steps=1, batch_size=8, queries=16),
            ),
            zoo or self.zoo,
        )


@pytest.fixture(scope="session")
def material() -> Iterator[Material]:
    threads = torch.get_num_threads()
    # The threads of one small operation wait for each other longer than they work.
    torch.set_num_threads(1)
    patterns = [PatternSpec(name="palindrome"), PatternSpec(name="sorted_ascending")]
    spec = GenerationSpec(
        subjects=24,
        vocab_size=5,
        sequence_length=4,
        patterns=[*patterns, PatternSpec(name="starts_with", token="A")],
        max_patterns_per_batch=2,
        subject=SubjectSpec.model_validate({"layers": 2, "neurons": 8}),
        training=SubjectTrainingSpec(steps=2, batch_size=16),
        signature=SignatureSpec(probes=24),
        min_accuracy=0.0,
    )
    yield Material(generate(spec))
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def codec(material: Material) -> Codec:
    return material.codec()


@pytest.fixture(scope="session")
def later_codec(material: Material) -> Codec:
    return material.codec(seed=1)


Publish = Callable[..., str]


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    """Puts a codec, or an encoder of configurations, into the store and publishes it; its artifact's id."""
    store, count = ArtifactStore(str(tmp_path / "state" / "store")), 0

    def put(
        codec: Codec | ResourceCodec, name: str = "tiny", version: str | None = None, parents: Sequence[str] = ()
    ) -> str:
        nonlocal count
        count += 1
        codec.save(tmp_path / f"bundle-{count}")
        kind = "codec" if isinstance(codec, Codec) else "resource-encoder"
        artifact, _ = store.put(tmp_path / f"bundle-{count}", name=kind, type=kind, parents=parents)
        store.publish("default", name, artifact, version)
        return artifact

    return put


class Running:
    """A server on an event loop in a thread of its own."""

    def __init__(self, settings: InferenceSettings) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.server = self.call(self._made(settings)).result(30)
        self.address = self.call(self.server.start()).result(30)

    async def _made(self, settings: InferenceSettings) -> InferenceServer:
        return InferenceServer(settings)

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run ``coroutine`` on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Stop the server, once."""
        if self._thread.is_alive():
            self.call(self.server.stop()).result(30)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


Serve = Callable[..., Running]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts a server over the store, with any settings."""
    running: list[Running] = []

    def start(**settings: Any) -> Running:
        defaults: dict[str, Any] = {"state": tmp_path / "state", "device": "cpu", "refresh_seconds": REFRESH_SECONDS}
        running.append(Running(InferenceSettings(**(defaults | settings))))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture
def server(serve: Serve, publish: Publish, codec: Codec) -> Running:
    """A server with the published model ``tiny``."""
    publish(codec)
    return serve()


@pytest.fixture
def inference(server: Running) -> Iterator[Inference]:
    """A client of ``server``."""
    with Inference(server.address, timeout=20) as client:
        yield client
