"""Devices without float64, which Apple's GPUs are: every kind of job computes there, on a device that refuses it."""

from __future__ import annotations

import json
import os
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.generation import SignatureMethod, SignatureSpec
from ethogram.specs.kinds import KINDS
from services.clt.activations.statistics import Statistics
from services.crossmodal import baselines, evaluate
from services.crossmodal.codec import Codec
from services.crossmodal.model import principal
from services.crossmodal.report import principal_positions
from services.crossmodal.steering import Probe, classifier_normals
from services.runtime.devices import chosen_device, double
from services.zoo.dataset import Zoo
from services.zoo.signatures import ActivationSignatureExtractor
from tests.fake_device import fake_mps
from tests.golden.compute import ARTIFACTS, CASES
from tests.recorder import Recorder

JOBS: dict[str, Any] = json.loads(CASES.read_text())
SHORT: dict[str, Any] = {
    "generation": {"subjects": 1, "counterfactual": None},
    "policy": {"evaluation": 4},
    "activations": {"instances": 8},
}
"""What makes jobs of a kind small."""


def test_the_device_refuses_float64_and_mixtures() -> None:
    with fake_mps() as device:
        rows = torch.randn(3, 4).to(device)
        assert (rows.device.type, (rows @ rows.T).cpu().shape) == ("mps", (3, 3))
        for wrong in (
            rows.double,
            lambda: torch.zeros(3, dtype=torch.float64, device=device),
            lambda: torch.zeros(3).double().to(device),
            lambda: rows.cpu() + rows,
        ):
            with pytest.raises((TypeError, RuntimeError)):
                wrong()
        assert torch.equal(double(rows), rows.cpu().double())
    assert double(torch.ones(2)).dtype == torch.float64


@pytest.mark.filterwarnings("ignore:at..frobenius_norm:UserWarning")
@pytest.mark.parametrize(
    "case",
    [
        *("generation staged", "crossmodal mlp", "crossmodal transformer", "policy rollout", "activations"),
        *("sae topk", "clt pair batchtopk", "clt cross_layer jumprelu", "sweep"),
    ],
)
def test_a_job_of_every_kind_computes_without_float64(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "FINE_STEPS", 1)
    monkeypatch.setattr(evaluate, "STRENGTHS", (0.0, 1.0))
    kind, spec = KINDS[JOBS[case]["kind"]], JOBS[case]["spec"]
    spec = {**spec, **{name: value for name, value in SHORT.get(kind.name, {}).items() if name in spec}}
    if "training" in spec:
        spec["training"] = {**spec["training"], "steps": 2}
    if "staged" in spec:
        spec["staged"] = {**spec["staged"], "epochs": 1, "improvement_epochs": 1}
    recorder = Recorder(tmp_path, inputs={path: ARTIFACTS / name for path, name in JOBS[case]["inputs"].items()})
    with fake_mps() as device:
        recorder.device = device
        result = kind.load_job()(kind.spec.model_validate(spec), recorder)
    json.dumps(result, allow_nan=False)
    assert {name for name, _ in recorder.artifacts} >= set(kind.outputs)


def equal(found: Any, expected: Any) -> bool:
    """Whether tensors, or tuples of them, are equal to the bit, and the found ones on the device."""
    if isinstance(expected, Tensor):
        return found.device.type == "mps" and torch.equal(found.cpu(), expected)
    return all(equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_is_computed_in_float64_is_the_cpus_to_the_bit() -> None:
    zoo = Zoo.load(ARTIFACTS / "zoo")
    methods = list(typing.get_args(SignatureMethod))
    extractor = ActivationSignatureExtractor(
        SignatureSpec(probes=len(zoo.probes), methods=methods, components=3),
        zoo.extractor.inputs,
        torch.ones(len(zoo.probes), 1, dtype=torch.bool),
    )
    vectors, shape, labels = zoo.weights[:20], zoo.shape[:20], zoo.labels[:20]
    latents = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)) + labels[:, :1]
    rows = latents - latents.mean(0)
    with fake_mps() as device:
        there = [tensor.to(device) for tensor in (vectors, shape, latents, labels, rows)]
        assert equal(
            zoo.layout.signatures(there[0], there[1], extractor), zoo.layout.signatures(vectors, shape, extractor)
        )
        probe, expected = Probe.fit(there[2], there[3]), Probe.fit(latents, labels)
        assert equal(probe, expected)
        assert equal(probe.calibrated(there[2], there[3]), expected.calibrated(latents, labels))
        assert equal(classifier_normals(there[2], there[3]), classifier_normals(latents, labels))
        for count in (2, 30):
            assert equal(principal(there[4], count), principal(rows, count))
        assert torch.equal(principal_positions(there[2])[0], principal_positions(latents)[0])
        found, on_cpu = Statistics(6, device), Statistics(6)
        for statistics, part in ((found, there[2]), (on_cpu, latents)):
            statistics.add(part)
        assert torch.equal(found.mean, on_cpu.mean) and torch.equal(found.std, on_cpu.std)


def test_a_codec_is_served_without_float64() -> None:
    zoo = Zoo.load(ARTIFACTS / "zoo")
    networks = {name: tensor[:6] for name, tensor in zoo.params.items()}
    for name in ("codec-mlp", "codec-transformer"):
        expected = Codec.load(ARTIFACTS / name)
        edits = [("add", expected.behaviors[0].name)]
        with fake_mps() as device:
            codec = Codec.load(ARTIFACTS / name, device)
            torch.testing.assert_close(codec.encode(networks).cpu(), expected.encode(networks))
            found = codec.effect(networks, edits, strength="auto", direction="classifier_normal")
            on_cpu = expected.effect(networks, edits, strength="auto", direction="classifier_normal")
            assert found.latents.device.type == "mps"
            torch.testing.assert_close(found.latents.cpu(), on_cpu.latents)
            torch.testing.assert_close(found.strength.cpu(), on_cpu.strength)


def test_what_an_apple_gpu_does_not_have_is_computed_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "")
    monkeypatch.delenv("PYTORCH_ENABLE_MPS_FALLBACK")
    if torch.backends.mps.is_available():
        chosen_device("mps")
    else:
        with pytest.raises(InvalidInput, match="mps cannot be used on this machine"):
            chosen_device("mps")
    assert os.environ["PYTORCH_ENABLE_MPS_FALLBACK"] == "1"
