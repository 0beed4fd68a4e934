"""The servicer on a real channel."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from ethogram.convert import to_proto
from ethogram.errors import InvalidInput
from ethogram.rpc import CHANNEL_OPTIONS, error_of
from ethogram.specs.generation import GenerationSpec
from ethogram.specs.kinds import KINDS
from ethogram.v1 import generation_pb2, generation_pb2_grpc, jobs_pb2
from services.artifacts.store import ArtifactStore
from services.kinds import request_type
from services.runtime.servicer import add_to_server
from services.zoo.dataset import Zoo
from tests.generation.conftest import small_spec


@pytest.fixture(scope="module")
def stub() -> Iterator[generation_pb2_grpc.GenerationServiceStub]:
    server = grpc.server(ThreadPoolExecutor(4), options=CHANNEL_OPTIONS)
    add_to_server(server, KINDS["generation"], request_type(KINDS["generation"]))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)
    server.stop(None)


def request(spec: GenerationSpec, folder: Path) -> generation_pb2.RunGenerationRequest:
    (folder / "work").mkdir()
    context = jobs_pb2.RunContext(
        job="job_1",
        attempt="att_1",
        tenant="default",
        store=str(folder / "store"),
        work_dir=str(folder / "work"),
        checkpoint_seconds=3600,
        threads=2,
    )
    return generation_pb2.RunGenerationRequest(context=context, spec=to_proto(spec, generation_pb2.GenerationSpec))


def test_a_run_streams_progress_and_leaves_a_zoo(
    stub: generation_pb2_grpc.GenerationServiceStub, tmp_path: Path
) -> None:
    spec = small_spec(subjects=8)
    events = list(stub.Run(request(spec, tmp_path), timeout=120))
    kinds = [event.WhichOneof("event") for event in events]
    assert "progress" in kinds and kinds[-1] == "result"
    assert json.loads(events[-1].result.json)["subjects"] == 8
    made = next(event.artifact for event in events if event.WhichOneof("event") == "artifact")
    assert (made.name, made.type) == ("zoo", "zoo")
    zoo = Zoo.load(ArtifactStore(str(tmp_path / "store")).fetch(made.id, tmp_path / "zoo"))
    assert len(zoo) == 8 and zoo.spec == spec


def test_a_wrong_spec_names_its_field(stub: generation_pb2_grpc.GenerationServiceStub, tmp_path: Path) -> None:
    wrong = request(small_spec(sequence_length=10), tmp_path)
    wrong.spec.patterns.add(name="no_repeats")
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Run(wrong, timeout=120))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    error = error_of(caught.value)
    assert isinstance(error, InvalidInput) and error.violations[0].field == "spec.patterns.4"


def unknown_field(spec: generation_pb2.GenerationSpec) -> None:
    spec.subject.MergeFromString(b"\xf8\x3e\x01")


@pytest.mark.parametrize(
    ("spoil", "field"),
    [
        (lambda spec: setattr(spec, "subjects", 0), "spec.subjects"),
        (lambda spec: setattr(spec.training, "learning_rate", float("nan")), "spec.training.learning_rate"),
        (lambda spec: setattr(spec.training, "learning_rate", float("inf")), "spec.training.learning_rate"),
        (lambda spec: spec.subject.activations.append(77), "spec.subject.activations.0"),
        (lambda spec: setattr(spec.subject.layers, "min", 9), "spec.subject.layers"),
        (lambda spec: spec.patterns.add(), "spec.patterns.4.name"),
        (lambda spec: spec.patterns.add(name="none_such"), "spec.patterns.4.name"),
        (unknown_field, "spec.subject"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(
    stub: generation_pb2_grpc.GenerationServiceStub,
    tmp_path: Path,
    spoil: Callable[[generation_pb2.GenerationSpec], None],
    field: str,
) -> None:
    wrong = request(small_spec(), tmp_path)
    spoil(wrong.spec)
    with pytest.raises(grpc.RpcError) as caught:
        list(stub.Run(wrong, timeout=60))
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert [violation.field for violation in error_of(caught.value).violations] == [field]
    assert not (tmp_path / "store").exists()
