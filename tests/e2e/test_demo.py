"""The main job at small size, as a user runs it: from nothing to a report, and a second time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ethogram.cli.main import run
from tests.platform.test_up import command, environment, leftovers, up

FIGURES = {
    *("agreement", "add.target_mean", "add.all_gate", "remove.target_mean", "remove.all_gate"),
    *("controls.max_all_gate", "seconds", "peak_rss_mib", "up_s", "first_event_s"),
    *("add.kept_mean", "remove.kept_mean", "nearest_train.agreement"),
    *(
        f"{edit}.{way}.{name}"
        for edit in ("add", "remove")
        for way in ("same_label", "nearest_train", "centroid")
        for name in ("all_gate", "kept_mean")
    ),
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
def test_from_nothing_to_a_report_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, output = tmp_path / "state", tmp_path / "demo"
    first = demo(state, output)
    report: dict[str, Any] = json.loads((output / "report.json").read_text())
    assert report["bench"] == "demo"
    assert set(report["figures"]) == FIGURES
    keys = {"value", "op", "bar", "ok", "peer", "ratio", "judged"}
    assert all(set(one) == keys for one in report["figures"].values())
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
    assert all(name in first.stdout for name in ("Kept", "Same label", "Nearest train", "Centroid", "Best control"))
    assert any("better than a lookup" in sentence for sentence in report["summary"])
    assert all(" ".join(sentence.split()) in " ".join(first.stderr.split()) for sentence in report["summary"])
    assert leftovers(state) == []

    with up(state) as (_, said):
        second = demo(state, output, "--json")
        monkeypatch.setenv("ETHOGRAM_URL", said["url"])

        def cli(*arguments: str) -> Any:
            with pytest.raises(SystemExit) as left:
                run([*arguments, "--json"])
            answer = capsys.readouterr()
            assert left.value.code == 0, answer.err
            return json.loads(answer.out)

        use_the_published_model(cli, tmp_path, output / "evaluation" / "held_out.safetensors")
        wrong = subprocess.run(
            command("steer", "demo-quick", str(tmp_path / "one.safetensors"), "--add", "nothing"),
            capture_output=True,
            text=True,
            env=environment(ETHOGRAM_URL=said["url"]),
            check=False,
        )
        assert wrong.returncode == 2
        assert "--add nothing: unknown; this model has" in wrong.stderr
    assert leftovers(state) == []
    assert f"using the platform at {said['url']}" in second.stderr
    again = json.loads(second.stdout)
    assert again["reused"] == ["zoo", "codec"]
    assert (again["jobs"], again["model"]) == (report["jobs"], report["model"])
    assert again["figures"]["agreement"] == report["figures"]["agreement"]
    assert again["figures"]["seconds"] == {**report["figures"]["seconds"], "kept": True}
    assert "reusing" in second.stderr


def names(tensors: dict[str, Any]) -> list[str]:
    return [name.removeprefix("source.") for name in tensors if name.startswith("source.")]


def use_the_published_model(cli: Callable[..., Any], folder: Path, held_out: Path) -> None:
    """Encode, decode, steer and evaluate files with the demo's model, as a user does."""
    networks = {name: value for name, value in load_file(held_out).items()}
    save_file(networks, folder / "many.safetensors")
    # One that has what is taken away below, which is the first behaviour.
    has = int(load_file(held_out.with_name("held_out_labels.safetensors"))["labels"][:, 0].argmax())
    save_file({name: value[has] for name, value in networks.items()}, folder / "one.safetensors")
    model, count = "demo-quick", len(networks["layers.0.bias"])
    names = [item["name"] for item in cli("models", "behaviors", model)["behaviors"]]
    assert names[0] == "starts_with(A)"
    for file, batch in (("many", [count]), ("one", [])):
        given, latents, decoded, steered = (
            str(folder / f"{file}{what}.safetensors") for what in ("", "-latents", "-decoded", "-steered")
        )
        answer = cli("encode", model, given, "-o", latents)
        assert answer["tensors"]["latents"] == [*batch, 32]
        answer = cli("decode", model, latents, "-o", decoded)
        assert answer["tensors"] == {name: [*batch, *value.shape[1:]] for name, value in networks.items()}
        cli("steer", model, given, "--remove", "starts_with(A)", "-o", steered)
        before, after = (cli("evaluate", model, path) for path in (given, steered))
        column = names.index("starts_with(A)")
        assert np.mean(np.asarray(after["recall"])[..., column]) < np.mean(np.asarray(before["recall"])[..., column])
