"""Lists: filters, order, and pages that stay whole while rows are added."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ethogram.errors import InvalidInput
from services.jobs.queries import decode_cursor, encode_cursor
from services.jobs.registry import JobRegistry, JobState
from tests.jobs.steps import artifact_id, claim, codec, job_in, submit


def test_pages_are_stable_while_jobs_are_added(registry: JobRegistry) -> None:
    jobs = [submit(registry).id for _ in range(7)]
    seen, cursor = [], None
    while True:
        page, cursor = registry.list(limit=3, cursor=cursor)
        seen += [job.id for job in page]
        submit(registry)
        if cursor is None:
            break
    assert seen == jobs[::-1]


def test_the_last_page_has_no_cursor(registry: JobRegistry) -> None:
    for _ in range(4):
        submit(registry)
    page, cursor = registry.list(limit=4)
    assert (len(page), cursor) == (4, None)
    page, cursor = registry.list(limit=2)
    assert cursor is not None
    assert registry.list(limit=2, cursor=cursor)[1] is None


def test_filters(registry: JobRegistry) -> None:
    failed, _ = job_in(registry, JobState.FAILED)
    registry.add_artifact(artifact_id(1), "zoo", "zoo", 1)
    trained, _ = registry.submit("crossmodal", codec(None, artifact_id(1)), labels={"run": "a'b", "x.y/z": "1"})
    submit(registry, tenant="other")

    def ids(**filters: Any) -> list[str]:
        return [job.id for job in registry.list(**filters)[0]]

    assert ids() == [trained.id, failed.id]
    assert ids(kind="generation") == [failed.id]
    assert ids(state="FAILED") == ids(state=JobState.FAILED) == [failed.id]
    assert ids(labels={"run": "a'b", "x.y/z": "1"}) == [trained.id]
    assert ids(labels={"run": "a'b", "x.y/z": "2"}) == ids(labels={"none": "1"}) == []
    assert ids(kind="generation", state="QUEUED") == []
    assert len(ids(tenant="other")) == 1


def test_artifacts(registry: JobRegistry) -> None:
    submit(registry)
    attempt = claim(registry)
    for number in range(5):
        registry.commit_artifact(attempt.attempt, f"part-{number}", "zoo", artifact_id(number), number)
    registry.add_artifact(artifact_id(9), "mine", "codec", 1)
    first, cursor = registry.artifacts(limit=4)
    rest, end = registry.artifacts(limit=4, cursor=cursor)
    assert [row.name for row in first + rest] == ["mine", "part-4", "part-3", "part-2", "part-1", "part-0"]
    assert end is None
    assert [row.name for row in registry.artifacts(type="codec")[0]] == ["mine"]
    assert len(registry.artifacts(job=attempt.job.id)[0]) == 5
    assert registry.artifacts(job="job_none")[0] == []
    assert registry.artifacts(tenant="other")[0] == []


BAD_CURSORS = ["", "x", "%%%", "ä", "am9iczo", "am9iczotMQ", base64.urlsafe_b64encode("jobs:१२".encode()).decode()]


@pytest.mark.parametrize("cursor", [*BAD_CURSORS, encode_cursor("artifacts", 1), "A" * 1000])
def test_a_bad_cursor(registry: JobRegistry, cursor: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        registry.list(cursor=cursor)
    assert caught.value.violations[0].field == "cursor"


@pytest.mark.parametrize(
    ("filters", "field"),
    [
        ({"limit": 0}, "limit"),
        ({"limit": 1001}, "limit"),
        ({"state": "DONE"}, "state"),
        ({"kind": "a\0"}, "kind"),
        ({"labels": {"a\0": "b"}}, "labels"),
        ({"labels": {'a"b': "c"}}, "labels"),
        ({"tenant": "\0"}, "tenant"),
    ],
)
def test_a_bad_filter(registry: JobRegistry, filters: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        registry.list(**filters)
    assert caught.value.violations[0].field.startswith(field)


@given(st.text(max_size=40))
def test_no_text_breaks_the_cursor(text: str) -> None:
    try:
        number = decode_cursor("jobs", text)
    except InvalidInput:
        return
    assert decode_cursor("jobs", encode_cursor("jobs", number)) == number


@given(st.integers(0, 2**59))
def test_a_cursor_comes_back(number: int) -> None:
    assert decode_cursor("jobs", encode_cursor("jobs", number)) == number
