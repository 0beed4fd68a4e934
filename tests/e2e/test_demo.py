"""The main job at small size, as a user runs it: from nothing to a report, and a second time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.platform.test_up import command, environment, leftovers

FIGURES = {
    *("agreement", "add.target_mean", "add.all_gate", "remove.target_mean", "remove.all_gate"),
    *("controls.max_all_gate", "seconds", "peak_rss_mib", "up_s", "first_event_s"),
}


def demo(state: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command("demo", "--quick", "--state", str(state), "--output", str(output), *more),
        capture_output=True,
        text=True,
        # One thread: with more, two jobs on a busy machine wait for each other.
        env=environment(ETHOGRAM_THREADS="1"),
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.timeout(900)
def test_from_nothing_to_a_report_and_again(tmp_path: Path) -> None:
    state, output = tmp_path / "state", tmp_path / "demo"
    first = demo(state, output)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    assert report["bench"] == "demo"
    assert set(report["figures"]) == FIGURES
    assert all(set(one) == {"value", "op", "bar", "ok", "peer", "ratio"} for one in report["figures"].values())
    assert all(one["value"] is not None for one in report["figures"].values())
    assert report["figures"]["agreement"]["value"] > 0.8
    assert report["figures"]["peak_rss_mib"]["value"] < 4096
    assert report["reused"] == []
    for png in ("latent_map.png", "steering.png"):
        assert (output / png).read_bytes().startswith(b"\x89PNG")
    steered = load_file(output / "steered.safetensors")
    changed = [not np.array_equal(steered[f"source.{n}"], steered[f"steered.{n}"]) for n in names(steered)]
    assert changed
    assert all(changed)
    # What the service itself measured: an edit moves its behaviour the way that it was asked to.
    served = report["served"]
    assert {key.split()[0] for key in served} == {"add", "remove"}
    assert all(one["after"] < one["before"] for key, one in served.items() if key.startswith("remove"))
    assert all(one["after"] > one["before"] for key, one in served.items() if key.startswith("add"))
    assert "starts_with(A)" in first.stdout
    assert leftovers(state) == []

    second = demo(state, output, "--json")
    again = json.loads(second.stdout)
    assert again["reused"] == ["zoo", "codec"]
    assert (again["jobs"], again["model"]) == (report["jobs"], report["model"])
    assert again["figures"]["agreement"] == report["figures"]["agreement"]
    assert again["figures"]["seconds"] == report["figures"]["seconds"]
    assert "reusing" in second.stderr
    assert leftovers(state) == []


def names(tensors: dict[str, Any]) -> list[str]:
    return [name.removeprefix("source.") for name in tensors if name.startswith("source.")]
