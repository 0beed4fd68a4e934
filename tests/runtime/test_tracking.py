"""Weights & Biases, offline: what is kept is what was logged."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from ethogram.specs.base import WandbSpec
from services.runtime.tracking import tracked
from tests.recorder import Recorder


def payload(log: bytes) -> bytes:
    """The bytes of a LevelDB log's records, which are cut into fragments where a block of 32 KiB ends. A fragment is a
    checksum of four bytes, a length of two, a type, and its bytes; W&B's file has seven bytes before the first."""
    kept, position = b"", 7
    while position + 7 <= len(log):
        size = int.from_bytes(log[position + 4 : position + 6], "little")
        kept += log[position + 7 : position + 7 + size]
        position += 7 + size
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
    return kept


def test_without_credentials_it_is_kept_to_be_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with tracked(WandbSpec(project="zoos", name="mine"), {"seed": 3}, Recorder(tmp_path)) as log:
        log(1, {"loss": 0.515625})
        log(2, {"loss": 0.2578125})
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    kept = payload(file.read_bytes())
    assert all(text in kept for text in (b"zoos", b"mine", b"loss", b"0.515625", b"0.2578125"))


@pytest.mark.parametrize(("mode", "kept"), [("offline", True), ("disabled", False)])
def test_the_spec_says_where_metrics_go(
    mode: Literal["offline", "disabled"], kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the environment says."""
    monkeypatch.setenv("WANDB_MODE", "offline" if mode == "disabled" else "online")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with tracked(WandbSpec(project="zoos", mode=mode), {}, Recorder(tmp_path)) as log:
        log(1, {"loss": 0.5})
    assert any((tmp_path / "wandb").glob("offline-run-*/*.wandb")) == kept


def test_without_a_spec_nothing_happens(tmp_path: Path) -> None:
    with tracked(None, {}, Recorder(tmp_path)) as log:
        log(1, {"loss": 0.5})
    assert not list(tmp_path.iterdir())
