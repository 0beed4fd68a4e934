"""Metrics as TensorBoard reads them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event

from services.runtime.scalars import write_scalars


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """What an event file says: records are a length, its checksum, the event, and the event's checksum."""
    (file,) = folder.glob("events.out.tfevents*")
    data, found = file.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    return found


def test_every_number_is_a_scalar(tmp_path: Path) -> None:
    rows = [
        {"stage": "train", "step": 1, "loss": 0.5, "accuracy": None},
        {"stage": "train", "step": 2, "loss": 0.25, "accuracy": 1.0},
        {"step": 3, "share": 2.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    write_scalars(tmp_path / "metrics.jsonl", tmp_path)
    expected = [("train/loss", 1, 0.5), ("train/loss", 2, 0.25), ("train/accuracy", 2, 1.0), ("share", 3, 2.0)]
    assert scalars(tmp_path) == expected
