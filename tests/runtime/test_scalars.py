"""Metrics as TensorBoard reads them."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from services.runtime.metrics import MetricsWriter


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What an event file says: records are a length, its checksum, the event, and the event's checksum."""
    (file,) = folder.glob("events.out.tfevents*")
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        record = data[12 : 12 + size]
        checksums = struct.pack("<I", masked_crc32c(data[:8])), struct.pack("<I", masked_crc32c(record))
        assert (data[8:12], data[12 + size : 16 + size]) == checksums
        event = Event.FromString(record)
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    return found


def test_every_number_is_a_scalar(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write("train", 1, {"loss": 0.5, "accuracy": float("nan")})
    writer.write("train", 2, {"loss": 0.25, "accuracy": 1.0})
    writer.write("", 3, {"share": 2.0})
    writer.write("", 70_000, {"norm (L2)": -1e39})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"stage": "train", "step": 1, "loss": 0.5, "accuracy": None},
        {"stage": "train", "step": 2, "loss": 0.25, "accuracy": 1.0},
        {"stage": "", "step": 3, "share": 2.0},
        {"stage": "", "step": 70_000, "norm (L2)": -1e39},
    ]
    # Scalars are float32, and TensorBoard's names have no brackets.
    expected = [("train/loss", 1, 0.5), ("train/loss", 2, 0.25), ("train/accuracy", 2, 1.0), ("share", 3, 2.0)]
    assert scalars(tmp_path) == [*expected, ("norm__L2_", 70_000, float("-inf"))]


def test_metrics_do_not_import_torch(tmp_path: Path) -> None:
    lines = (
        "import sys, pathlib",
        "from services.runtime.metrics import MetricsWriter",
        "MetricsWriter(pathlib.Path(sys.argv[1])).write('train', 1, {'loss': 0.5})",
        "sys.exit('torch' in sys.modules)",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines), tmp_path], check=True)
    assert scalars(tmp_path) == [("train/loss", 1, 0.5)]


def test_scalars_appear_while_the_run_goes_on(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write("train", 1, {"loss": 0.5})
    deadline = time.monotonic() + 30
    while scalars(tmp_path) != [("train/loss", 1, 0.5)]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    writer.close()


def test_resumed_metrics_are_those_of_the_checkpoint_and_no_scalar_is_there_twice(tmp_path: Path) -> None:
    first = MetricsWriter(tmp_path / "run")
    first.write("train", 1, {"loss": 0.5})
    first.checkpoint(tmp_path / "checkpoint", lambda state: (state / "step").touch())
    first.write("train", 2, {"loss": 9.0})
    first.close()
    assert (tmp_path / "checkpoint" / "state" / "step").exists()

    resumed = MetricsWriter(tmp_path / "run", tmp_path / "checkpoint")
    resumed.write("train", 2, {"loss": 0.25})
    resumed.close()
    assert scalars(tmp_path / "run") == [("train/loss", 1, 0.5), ("train/loss", 2, 0.25)]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2

    # One that ends before another number comes has the earlier ones.
    MetricsWriter(tmp_path / "run", tmp_path / "checkpoint").close()
    assert scalars(tmp_path / "run") == [("train/loss", 1, 0.5)]
