"""Instances of other distributions and of one's own, for policies and for stores; and policies of other steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from ethogram.cli.output import execute
from ethogram.errors import InvalidInput
from ethogram.specs.clt import ActivationsSpec
from ethogram.specs.kinds import KINDS
from services.clt.__main__ import app
from services.clt.activations import job as activations
from services.clt.activations.collect import collect
from services.clt.activations.hooks import capture, policy_points
from services.clt.activations.store import SPLITS, ActivationStore
from services.clt.policy import job
from services.clt.policy.evaluate import evaluation_instances
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.train import PolicyTrainer
from services.clt.policy.tsp import cities_in, instances
from services.runtime.run import Run
from services.runtime.seeds import generator
from tests.clt.conftest import policy_spec, small_policy
from tests.recorder import Recorder

REF = {"artifact": "x"}
MINE = instances(80, 9, generator(0, "mine"))
HOOK = "encoder_layer_0"


def spec_of(**fields: Any) -> ActivationsSpec:
    given = {"policy": REF, "instances": 40, "validation": 0.2, "hooks": [HOOK], "dtype": "float32", **fields}
    return ActivationsSpec.model_validate(given)


def recorded(store: ActivationStore) -> Tensor:
    """What is at the hook point, ``[instances, cities, width]``."""
    per_instance = store.manifest.rows_per_instance
    rows = torch.empty(store.manifest.instances.total, per_instance, store.widths[HOOK])
    for split in SPLITS:
        for number in range(len(store.shards(split))):
            values, instance, position = store.read(split, number, [HOOK, "instance", "position"])
            rows[instance.long(), position.long()] = values
    return rows


def by_hand(policy: AttentionPolicy, cities: Tensor) -> Tensor:
    with capture(policy, [policy_points(policy)[HOOK]]) as found:
        policy.encoder(cities)
    return found[HOOK]


def test_a_store_is_of_the_instances_that_its_spec_names(tmp_path: Path) -> None:
    policy = small_policy()
    stores = {
        name: collect(spec_of(**fields), tmp_path / name, Run(), policy, cities=cities)
        for name, fields, cities in (
            ("uniform", {}, None),
            ("clustered", {"distribution": "clustered"}, None),
            ("mine", {"cities": REF}, MINE),
        )
    }
    clustered = instances(1024, 7, generator(0, "instances", 0), "clustered")[:40]
    torch.testing.assert_close(recorded(stores["clustered"]), by_hand(policy, clustered), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(recorded(stores["mine"]), by_hand(policy, MINE[:40]), rtol=1e-4, atol=1e-5)
    # A manifest of random uniform instances is as it was, so that stores of before are resumed.
    assert not {"distribution", "cities"} & stores["uniform"].manifest.spec.keys()
    for name, fields, cities, differs in (
        ("clustered", {}, None, "distribution"),
        ("mine", {}, None, "spec"),
        ("mine", {"cities": REF}, MINE.flip(0), "spec.cities"),
    ):
        with pytest.raises(InvalidInput, match=f"holds activations of another spec .*{differs}"):
            collect(spec_of(**fields), tmp_path / name, Run(), policy, cities=cities)
    with pytest.raises(InvalidInput, match=r"spec\.instances: there are 80 in cities, not 81; ask for at most as many"):
        collect(spec_of(cities=REF, instances=81), tmp_path / "more", Run(), policy, cities=MINE)


def test_the_instances_of_a_job_are_an_artifact(tmp_path: Path) -> None:
    small_policy().save(tmp_path / "policy")
    folder = tmp_path / "cities"
    folder.mkdir()
    np.save(folder / "mine.npy", MINE.numpy())
    (folder / "._mine.npy").write_bytes(b"of a file browser")
    inputs = {"policy": tmp_path / "policy", "cities": folder}
    run = Recorder(tmp_path / "run", inputs=inputs)
    assert activations.run(spec_of(cities=REF), run)["figures"]["rows"] == {"train": 32 * 9, "validation": 8 * 9}
    for name in ("activations", "policy"):
        assert KINDS[name].inputs["cities"] == "cities"
    save_file({"cities": MINE}, folder / "again.safetensors")
    with pytest.raises(InvalidInput, match=r"cities: .* has 2 \.npy and \.safetensors files; give one"):
        cities_in(folder)


def test_a_policy_is_trained_on_the_instances_that_its_spec_names() -> None:
    tight = PolicyTrainer(policy_spec(distribution="clustered"))
    assert tight.validation.equal(instances(16, 6, generator(0, "validation"), "clustered"))
    assert evaluation_instances(tight.spec).equal(instances(5, 6, generator(0, "evaluation"), "clustered"))
    mine = {"cities": REF}
    trainer = PolicyTrainer(policy_spec(**mine), cities=MINE)
    assert trainer.nodes == trainer.policy.nodes == 9
    assert trainer.validation.equal(MINE[:16]) and evaluation_instances(trainer.spec, MINE).equal(MINE[16:21])
    # No instance of these is trained on, and many of the others are.
    drawn = torch.cat([trainer._instances(16, "instances", step) for step in range(20)])
    which = (drawn.unsqueeze(1) == MINE).flatten(2).all(2)
    assert not which[:, :21].any() and which.any(0).sum() > 50 and which.any(1).all()
    assert trainer.identity() != PolicyTrainer(policy_spec(**mine), cities=MINE.flip(0)).identity()
    with pytest.raises(
        InvalidInput, match=r"spec\.cities: has 21 instances, and training\.validation and .* hold out 21"
    ):
        PolicyTrainer(policy_spec(**mine), cities=MINE[:21])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cities": REF, "distribution": "clustered"}, "distribution: has no effect"),
        ({"cities": REF, "nodes": 9}, "nodes: has no effect"),
        ({"cities": REF, "nodes": 20}, "nodes: has no effect"),
        ({"policy": None, "distribution": "clustered"}, "distribution: instances of a language model are texts"),
        ({"policy": None, "cities": REF}, "cities: instances of a language model are texts"),
    ],
)
def test_what_instances_cannot_be_is_refused(fields: dict[str, Any], says: str) -> None:
    texts = {"language_model": {"model": "m", "dataset": "d"}} if "policy" in fields else {}
    with pytest.raises(ValidationError, match=says):
        spec_of(**fields, **texts)
    if "policy" not in fields:
        with pytest.raises(ValidationError, match=says):
            policy_spec(**fields)


def test_snapshots_are_policies_of_their_steps(tmp_path: Path) -> None:
    run = Recorder(tmp_path / "run")
    job.run(policy_spec(evaluation=0, training={"snapshots": 2}), run)
    assert [name for name, type in run.artifacts if type == "policy"][:3] == ["snapshot-2", "snapshot-4", "snapshot-6"]
    assert all(KINDS["policy"].makes(*artifact) for artifact in run.artifacts)
    final = AttentionPolicy.load(tmp_path / "run" / "policy").digest
    digests = [AttentionPolicy.load(tmp_path / "run" / f"snapshot-{step}").digest for step in (2, 4, 6)]
    assert len({*digests}) == 3 and digests[-1] == final
    # That of a run which was cut short there.
    trainer = PolicyTrainer(policy_spec(evaluation=0))
    for _ in range(4):
        trainer.advance()
    assert trainer.finished().digest == digests[1]
    # As any policy, a snapshot has activations.
    inputs = {"policy": tmp_path / "run" / "snapshot-4"}
    activations.run(spec_of(), Recorder(tmp_path / "store", inputs=inputs))
    assert ActivationStore.open(tmp_path / "store" / "activations").manifest.source.digest == digests[1]


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: Any) -> Any:
        with pytest.raises(SystemExit) as left:
            execute(app, "clt", [str(argument) for argument in arguments])
        assert not left.value.code
        return json.loads(capsys.readouterr().out)

    np.save(tmp_path / "mine.npy", MINE.numpy())
    fields = policy_spec(evaluation=0, samples=0).model_dump(mode="json", exclude={"nodes"})
    (tmp_path / "spec.json").write_text(json.dumps(fields))
    run = tmp_path / "run"
    given = ("--cities", tmp_path / "mine.npy", "--device", "cpu", "--json")
    call("policy", "-f", tmp_path / "spec.json", "-o", run, *given)
    assert AttentionPolicy.load(run / "policy").nodes == 9
    store = tmp_path / "store"
    call("activations", run, "--pair", "adjacent", "--instances", 30, "-o", store, *given)
    opened = ActivationStore.open(store / "activations")
    assert opened.manifest.pairs == [("encoder_layer_0", "encoder_layer_1")]
    assert opened.manifest.instances.total == 30 and opened.manifest.rows_per_instance == 9
    listed = call("list-pairs", run, "--json")
    wanted = {"set": "adjacent", "source": "encoder_layer_0", "target": "encoder_layer_1", "name": "clt_L0_to_L1"}
    assert wanted in listed and {pair["set"] for pair in listed} == {"mlp", "adjacent", "output", "decoder"}
    assert call("list-pairs", store, "--json") == [wanted]
    inspected = call("inspect-pairs", store, "--pair", "adjacent", "--json")
    assert [pair["pair"] for pair in inspected] == ["clt_L0_to_L1"]
    shutil.rmtree(store)
