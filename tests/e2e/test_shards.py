"""A zoo made by several jobs on the platform, and the probes of one zoo used by another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pytest

from ethogram.client import Client
from ethogram.errors import EthogramError
from ethogram.platform.stack import Platform
from ethogram.platform.state import StateDir
from ethogram.specs.generation import GenerationSpec
from services.generation.pipeline import DatasetGenerationPipeline
from services.zoo.dataset import BASELINE, read_records

SPEC: dict[str, Any] = {
    "subjects": 2500,
    "vocab_size": 5,
    "sequence_length": 4,
    "patterns": [{"name": "starts_with", "token": "A"}, {"name": "ends_with", "token": "B"}],
    "max_patterns_per_batch": 2,
    "subject": {"layers": 1, "neurons": 4},
    "training": {"steps": 20, "batch_size": 16},
    "signature": {"probes": 16, "methods": ["mean"]},
    "min_accuracy": 0.2,
}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_jobs_make_a_zoo_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REDIS_URL", raising=False)
    monkeypatch.setenv("ETHOGRAM_THREADS", "1")
    with Platform(StateDir(tmp_path / "state")) as platform, Client(platform.url) as client:
        job = client.wait(client.submit("generation", SPEC | {"shards": 2}).id).check()
        assert {"zoo", "report"} <= {artifact.name for artifact in client.artifacts(job=job.id)}
        assert sum(other.parent == job.id for other in client.jobs()) >= 2
        client.get(client.output(job.id, "zoo").id, tmp_path / "many")
        figures = DatasetGenerationPipeline(GenerationSpec.model_validate(SPEC)).run(tmp_path / "one")
        one, many = (pyarrow.concat_tables(read_records(tmp_path / name)) for name in ("one", "many"))
        assert one.equals(many) and len(one) == 2500
        result = client.job(job.id).result
        assert result is not None and result["rejected"] == figures["rejected"]

        probes = {"baseline": {"job": job.id, "artifact": "zoo"}}
        small = SPEC | {"subjects": 3, "seed": 9, "signature": probes}
        other = client.wait(client.submit("generation", small).id).check()
        client.get(client.output(other.id, "zoo").id, tmp_path / "other")
        assert (tmp_path / "other" / BASELINE).read_text() == (tmp_path / "one" / BASELINE).read_text()
        bad = client.wait(client.submit("generation", small | {"vocab_size": 6}).id)
        with pytest.raises(EthogramError, match=r"baseline_dataset\.json\.vocab_size: is 5, but the spec's is 6"):
            bad.check()
