"""Submitting: what is kept, what is refused, and idempotency keys."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from ethogram.errors import Conflict, IllegalState, InvalidInput, NotFound
from ethogram.specs.clt import PolicySpec
from ethogram.specs.generation import GenerationSpec
from services.jobs.registry import Job, JobRegistry, JobState
from tests.jobs.steps import ERROR, artifact_id, claim, codec, finish, submit, zoo


def test_a_job_is_kept_as_submitted(registry: JobRegistry) -> None:
    later = datetime(2040, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))
    job, created = registry.submit(
        "generation",
        zoo(7),
        queue="gpu",
        priority=-3,
        not_before=later,
        max_attempts=5,
        labels={"team/name": "zürich 'x' \"y\""},
        trace="00-abc-def-01",
    )
    assert created
    assert registry.get(job.id) == job
    assert (job.state, job.queue, job.priority, job.max_attempts, job.seq) == (JobState.QUEUED, "gpu", -3, 5, 1)
    assert job.not_before == later
    assert job.not_before.utcoffset() == timedelta(0)
    assert job.labels == {"team/name": "zürich 'x' \"y\""}
    assert GenerationSpec.model_validate(job.spec) == zoo(7)
    assert abs((datetime.now(UTC) - job.created_at).total_seconds()) < 60
    assert (job.started_at, job.finished_at, job.cancel_requested, job.waits_for) == (None, None, False, [])
    assert [(event.seq, event.type, event.data) for event in registry.events(job.id)] == [
        (1, "state", {"state": "QUEUED"})
    ]


def test_the_queue_is_that_of_the_kind(registry: JobRegistry) -> None:
    assert submit(registry).queue == "cpu"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"queue": "a b"}, "queue"),
        ({"queue": ""}, "queue"),
        ({"queue": "q\0"}, "queue"),
        ({"priority": 1001}, "priority"),
        ({"priority": "1"}, "priority"),
        ({"not_before": datetime(2030, 1, 1)}, "not_before"),
        ({"not_before": datetime.max.replace(tzinfo=timezone(-timedelta(hours=1)))}, "not_before"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"labels": {"a b": "c"}}, "labels"),
        ({"labels": {"a": "c\0"}}, "labels.a"),
        ({"labels": {"a": "\ud800"}}, "labels.a"),
        ({"labels": {"a": 1}}, "labels.a"),
        ({"labels": {"a": "x" * 256}}, "labels.a"),
        ({"labels": {f"k{n}": "" for n in range(33)}}, "labels"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "k\0"}, "idempotency_key"),
        ({"idempotency_key": "k" * 256}, "idempotency_key"),
        ({"tenant": "../x"}, "tenant"),
    ],
)
def test_a_wrong_option_is_named(registry: JobRegistry, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        submit(registry, **options)
    assert caught.value.violations[0].field.startswith(field)
    assert registry.list()[0] == []


def test_unknown_kind_and_foreign_spec(registry: JobRegistry) -> None:
    with pytest.raises(InvalidInput, match="kind: is none of"):
        registry.submit("cooking", zoo())
    with pytest.raises(InvalidInput, match="spec: is a GenerationSpec"):
        registry.submit("crossmodal", zoo())


def test_an_input_that_does_not_exist_is_named(registry: JobRegistry) -> None:
    with pytest.raises(NotFound) as caught:
        registry.submit("crossmodal", codec("job_none"))
    assert caught.value.violations[0].field == "spec.zoo.job"
    with pytest.raises(NotFound) as caught:
        registry.submit("crossmodal", codec(None, artifact_id(9)))
    assert caught.value.violations[0].field == "spec.zoo.artifact"
    done = submit(registry)
    finish(registry, claim(registry), name="other")
    with pytest.raises(NotFound, match="it made: other") as caught:
        registry.submit("crossmodal", codec(done.id))
    assert caught.value.violations[0].field == "spec.zoo.artifact"


def test_an_input_job_that_failed_is_refused(registry: JobRegistry) -> None:
    job = submit(registry)
    registry.fail(claim(registry).attempt, ERROR)
    with pytest.raises(IllegalState, match="has failed: retry it first") as caught:
        registry.submit("crossmodal", codec(job.id))
    assert caught.value.violations[0].field == "spec.zoo.job"


def test_another_tenants_things_do_not_exist(registry: JobRegistry) -> None:
    job = submit(registry)
    registry.add_artifact(artifact_id(1), "zoo", "zoo", 1)
    for spec in (codec(job.id), codec(None, artifact_id(1))):
        with pytest.raises(NotFound):
            registry.submit("crossmodal", spec, tenant="other")


def test_an_input_that_is_there_is_resolved_at_once(registry: JobRegistry) -> None:
    source = submit(registry)
    finish(registry, claim(registry), 5)
    registry.add_artifact(artifact_id(6), "mine", "zoo", 1)
    assert registry.submit("crossmodal", codec(source.id))[0].inputs == {"zoo": artifact_id(5)}
    assert registry.submit("crossmodal", codec(None, artifact_id(6)))[0].inputs == {"zoo": artifact_id(6)}


def test_the_same_key_and_request_give_the_same_job(registry: JobRegistry) -> None:
    first, created = registry.submit("generation", zoo(), labels={"a": "1", "b": "2"}, idempotency_key="k")
    again, created_again = registry.submit("generation", zoo(), labels={"b": "2", "a": "1"}, idempotency_key="k")
    assert (created, created_again, again) == (True, False, first)
    # The state of today, not that of the first answer.
    claim(registry)
    assert registry.submit("generation", zoo(), labels={"a": "1", "b": "2"}, idempotency_key="k")[0].state == "RUNNING"


@pytest.mark.parametrize("options", [{"priority": 1}, {"labels": {"a": "b"}}, {"queue": "gpu"}, {"max_attempts": 1}])
def test_the_same_key_with_another_request_is_a_conflict(registry: JobRegistry, options: dict[str, Any]) -> None:
    registry.submit("generation", zoo(), idempotency_key="k")
    with pytest.raises(Conflict, match="send a new key"):
        registry.submit("generation", zoo(), idempotency_key="k", **options)
    with pytest.raises(Conflict):
        registry.submit("generation", zoo(1), idempotency_key="k")
    assert len(registry.list()[0]) == 1


def test_keys_of_tenants_are_apart(registry: JobRegistry) -> None:
    first, _ = registry.submit("generation", zoo(), idempotency_key="k")
    other, created = registry.submit("generation", zoo(1), idempotency_key="k", tenant="other")
    assert created
    assert other.id != first.id


def test_a_refused_submission_does_not_use_up_its_key(registry: JobRegistry) -> None:
    with pytest.raises(NotFound):
        registry.submit("crossmodal", codec("job_none"), idempotency_key="k")
    assert registry.submit("generation", zoo(), idempotency_key="k")[1]


def test_a_request_that_earlier_versions_took_is_refused_but_its_key_answers(
    registry: JobRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = PolicySpec(evaluation=0, samples=4)
    with monkeypatch.context() as patch:
        patch.setattr(PolicySpec, "refuse_new", lambda *_: None)
        made, _ = registry.submit("policy", spec, idempotency_key="k")
    assert registry.submit("policy", spec, idempotency_key="k") == (made, False)
    with pytest.raises(InvalidInput, match=r"^spec\.samples: has no effect"):
        registry.submit("policy", spec, idempotency_key="other")
    with pytest.raises(InvalidInput, match=r"^spec\.samples: has no effect"):
        registry.check("policy", spec)
    assert len(registry.list()[0]) == 1


def test_the_same_key_from_many_threads_makes_one_job(registry: JobRegistry) -> None:
    answers: list[tuple[Job, bool]] = []
    barrier = threading.Barrier(8)

    def send() -> None:
        barrier.wait()
        answers.append(registry.submit("generation", zoo(), idempotency_key="k"))

    threads = [threading.Thread(target=send) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.id for job, _ in answers}) == 1
    assert sum(created for _, created in answers) == 1
    assert len(registry.list()[0]) == 1
