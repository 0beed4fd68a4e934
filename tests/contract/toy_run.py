"""Runs the toy kind in a copy of the repository, which is the current folder; see :mod:`tests.contract.toy_kind`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grpc
from pydantic import TypeAdapter

import ethogram.specs
from ethogram.cli.main import run as run_command
from ethogram.convert import from_proto, to_proto
from ethogram.rpc import CHANNEL_OPTIONS
from ethogram.specs.kinds import KINDS, Kind
from ethogram.v1 import jobs_pb2
from gateway.submissions import JOB_EXAMPLES, Submission
from scripts.contracts import SYSTEMS
from services.artifacts.store import ArtifactStore
from services.kinds import input_refs, request_type, spec_message
from workers.process import Child, ForkServer
from workers.settings import Slot


def check_rest(kind: Kind) -> None:
    """The body of ``POST /v1/jobs`` takes the kind, and its schema and examples show it."""
    adapter: TypeAdapter[Any] = TypeAdapter(Submission)
    job = adapter.validate_python({"kind": "toy", "spec": {**kind.example, "zoo": {"artifact": "f" * 64}}})
    assert list(input_refs(job.spec)) == ["zoo"]
    assert "ToySpec" in adapter.json_schema()["$defs"]
    assert "toy" in JOB_EXAMPLES


def check_messages(kind: Kind) -> None:
    """Specs survive the way to protobuf and back."""
    for values in ({}, kind.example, {"seed": 0, "mode": "sum", "parts": [{"value": 0.0, "label": ""}]}):
        spec = kind.spec.model_validate(values)
        wire = to_proto(spec, spec_message(kind)).SerializeToString()
        assert from_proto(spec_message(kind).FromString(wire), kind.spec) == spec


def check_child(kind: Kind, folder: Path) -> None:
    """A real child process runs the job over a real channel."""
    server = ForkServer(Slot(0, "cpu", 1, ""))
    child = Child(kind, server, folder)
    try:
        child.wait_ready(lambda: False)
        make: Any = request_type(kind)
        context = jobs_pb2.RunContext(
            job="job_1",
            attempt="att_1",
            tenant="default",
            work_dir=str(folder),
            store=str(folder / "store"),
            checkpoint_seconds=60.0,
        )
        request = make(context=context, spec=to_proto(kind.spec.model_validate(kind.example), spec_message(kind)))
        with grpc.insecure_channel(f"unix:{child.socket}", options=CHANNEL_OPTIONS) as channel:
            call = channel.unary_stream(
                kind.rpc,
                request_serializer=make.SerializeToString,
                response_deserializer=jobs_pb2.JobEvent.FromString,
            )
            events = list(call(request, timeout=60))
    finally:
        child.close(grace=3.0)
        server.close()
    assert json.loads(events[-1].result.json) == {"total": 1.5}
    made = {e.artifact.name: e.artifact for e in events if e.WhichOneof("event") == "artifact"}
    assert {name: artifact.type for name, artifact in made.items()} == kind.outputs
    output = ArtifactStore(str(folder / "store")).fetch(made["total"].id, folder / "total-again")
    assert (output / "total.txt").read_text() == "1.5"


def main() -> None:
    assert Path(ethogram.specs.__path__[0]).is_relative_to(Path.cwd()), "this is not the copy"
    kind = KINDS["toy"]
    check_rest(kind)
    check_messages(kind)
    folder = Path(sys.argv[1])
    folder.mkdir()
    check_child(kind, folder)
    assert "services.toy" in SYSTEMS
    run_command(["kinds", "toy"])


if __name__ == "__main__":
    main()
