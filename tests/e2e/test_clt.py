"""The jobs of clt on a platform: policy, activations, autoencoder, tied transcoder, and a sweep by children."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ethogram.client import Client
from ethogram.errors import EthogramError
from services.clt.activations.store import ActivationStore
from services.clt.sparse.evaluate import evaluate
from services.clt.sparse.model import SparseModel

POLICY: dict[str, Any] = {
    "nodes": 6,
    "model": {"hidden_dim": 16, "layers": 2, "heads": 4, "feed_forward": 32},
    "training": {"steps": 4, "batch_size": 4, "validate_every": 2, "validation": 8},
    "evaluation": 4,
    "samples": 0,
}
FORM = {"model": {"k": 6}, "training": {"steps": 30, "batch_size": 256, "validate_every": 30}}


@pytest.mark.timeout(300)
def test_from_a_policy_to_a_sweep(tmp_path: Path, client: Client) -> None:
    def made(job: str, name: str) -> dict[str, str]:
        return {"job": job, "artifact": name}

    policy = client.submit("policy", POLICY)
    asked = {"policy": made(policy.id, "policy"), "instances": 600, "shard_rows": 600}
    activations = client.submit("activations", asked)
    on = {"activations": made(activations.id, "activations")}
    ends = {"sources": ["encoder_layer_0_pre_mlp"], "targets": ["encoder_layer_1_mlp"]}
    sae = client.submit("sae", {**on, **FORM, "hook": "encoder_layer_1_mlp"})
    tied = {**FORM, "model": {"k": 6, "dictionary": made(sae.id, "model")}}
    clt = client.submit("clt", {**on, **tied, **ends})
    grid = {
        "grid": [{"option": "model.k", "values": ["4", "2000"]}],
        "pairs": ["encoder_layer_0_mlp->encoder_layer_1_mlp"],
    }
    sweep = client.submit("sweep", {**on, "training": FORM["training"], **grid})
    for job in (policy, activations, sae, clt):
        client.wait(job.id).check()
    client.get(client.output(activations.id, "activations").id, tmp_path / "store")
    client.get(client.output(clt.id, "model").id, tmp_path / "model")
    client.get(client.output(sae.id, "model").id, tmp_path / "sae")
    store, model = ActivationStore.open(tmp_path / "store"), SparseModel.load(tmp_path / "model")
    assert store.rows("train") + store.rows("validation") == 3600
    result = client.job(clt.id).result
    assert result is not None
    assert evaluate(model, store, 65_536)[0]["fvu"] == pytest.approx(result["figures"]["fvu"], rel=1e-5)
    assert model.decoders[0].equal(SparseModel.load(tmp_path / "sae").decoders[0])

    # What one run of a sweep cannot do costs none of the others.
    ended = client.wait(sweep.id).check().result
    assert ended is not None and len(ended["runs"]) == 1 and len(ended["failed"]) == 1
    assert "spec.model.k: 2000 is more than the 128 features" in next(iter(ended["failed"].values()))
    client.get(client.output(sweep.id, "models").id, tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == list(ended["runs"])

    wrong = client.wait(client.submit("clt", {**on, **FORM, "sources": ["nowhere"], "targets": ["nowhere"]}).id)
    with pytest.raises(EthogramError, match=r"spec\.sources\.0: the store has no nowhere"):
        wrong.check()
