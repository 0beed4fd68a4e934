"""Pipelines: several jobs in one transaction, which name each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ethogram.errors import Conflict, InvalidInput, NotFound
from ethogram.specs.base import ArtifactRef, Spec
from ethogram.specs.clt import GridAxis, SweepSpec
from services.jobs.registry import JobRegistry
from tests.jobs.steps import claim, codec, finish, submit, zoo

Pipeline = Mapping[str, tuple[str, Spec, Mapping[str, Any]]]
MAIN: Pipeline = {
    "codec": ("crossmodal", codec("zoo"), {"queue": "gpu", "labels": {"run": "1"}}),
    "zoo": ("generation", zoo(), {}),
}


def test_names_become_ids_and_jobs_wait(registry: JobRegistry) -> None:
    jobs, _ = registry.submit_pipeline(MAIN)
    assert list(jobs) == ["codec", "zoo"]
    assert jobs["codec"].spec["zoo"] == {"job": jobs["zoo"].id, "artifact": "zoo"}
    assert jobs["codec"].waits_for == [jobs["zoo"].id]
    assert (jobs["codec"].queue, jobs["codec"].labels) == ("gpu", {"run": "1"})
    assert registry.claim_next("gpu", "w", 10) is None
    finish(registry, claim(registry), 3)
    claimed = claim(registry, "gpu")
    assert claimed.job.id == jobs["codec"].id
    assert claimed.job.inputs == {"zoo": f"{3:064x}"}
    assert claimed.job.waits_for == []


def test_a_job_outside_may_be_named_by_its_id(registry: JobRegistry) -> None:
    outside = submit(registry)
    jobs, _ = registry.submit_pipeline({"codec": ("crossmodal", codec(outside.id), {})})
    assert jobs["codec"].waits_for == [outside.id]


@pytest.mark.parametrize(
    ("jobs", "field", "message"),
    [
        ({}, "jobs", "1 to 1000"),
        ({"a b": ("generation", zoo(), {})}, "jobs", "letters"),
        ({"a": ("cooking", zoo(), {})}, "jobs.a.kind", "is none of"),
        ({"a": ("generation", zoo(), {"size": 3})}, "jobs.a.size", "there is no such field"),
        ({"a": ("generation", zoo(), {"priority": 9999})}, "jobs.a.priority", "1000"),
        ({"a": ("crossmodal", codec("b"), {})}, "jobs.a.spec.zoo.job", "no job 'b' in this pipeline"),
        ({"a": ("crossmodal", codec("a"), {})}, "jobs", "circle: a -> a"),
        ({"a": ("crossmodal", codec("b"), {}), "b": ("crossmodal", codec("a"), {})}, "jobs", "circle"),
    ],
)
def test_wrong_pipelines(registry: JobRegistry, jobs: Pipeline, field: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        registry.submit_pipeline(jobs)
    assert caught.value.violations[0].field == field
    assert registry.list()[0] == []


def test_all_or_none(registry: JobRegistry) -> None:
    with pytest.raises(NotFound) as caught:
        registry.submit_pipeline({"zoo": ("generation", zoo(), {}), "codec": ("crossmodal", codec("job_none"), {})})
    assert caught.value.violations[0].field == "jobs.codec.spec.zoo.job"
    assert registry.list()[0] == []


def test_an_option_that_there_is_not_is_named_with_its_job(registry: JobRegistry) -> None:
    spec = SweepSpec(activations=ArtifactRef(artifact="a"), grid=[GridAxis(option="model.kk", values=["1"])])
    with pytest.raises(InvalidInput, match=r"^jobs\.a\.spec\.grid\.0\.option: there is no option model\.kk; there are"):
        registry.submit_pipeline({"a": ("sweep", spec, {})})
    assert registry.list()[0] == []


def test_idempotency(registry: JobRegistry) -> None:
    first, created = registry.submit_pipeline(MAIN, idempotency_key="k")
    assert created
    assert registry.submit_pipeline(MAIN, idempotency_key="k") == (first, False)
    with pytest.raises(Conflict):
        registry.submit_pipeline({"zoo": MAIN["zoo"]}, idempotency_key="k")
    with pytest.raises(Conflict):
        registry.submit("generation", zoo(), idempotency_key="k")
    assert len(registry.list()[0]) == 2
