"""Whatever is sent, the answer is a problem that names the field; never a 500."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.gateway.running import GENERATION, Gateway, fields, submit

JSON = {"Content-Type": "application/json"}


def spec(text: str) -> str:
    return '{"kind": "generation", "spec": ' + text + "}"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ('{"kind": "alchemy", "spec": {}}', "kind"),
        ('{"kind": 3, "spec": {}}', "kind"),
        ('{"spec": {}}', "kind"),
        ('{"kind": "generation"}', "spec"),
        ('{"kind": "generation", "spec": {}, "colour": 1}', "colour"),
        (spec('{"subject": {"wings": 2}}'), "spec.subject.wings"),
        (spec('{"subjects": "12"}'), "spec.subjects"),
        (spec('{"subjects": 1.5}'), "spec.subjects"),
        (spec('{"subjects": true}'), "spec.subjects"),
        (spec('{"training": []}'), "spec.training"),
        (spec('{"training": {"steps": 0}}'), "spec.training.steps"),
        (spec('{"training": {"learning_rate": NaN}}'), "spec.training.learning_rate"),
        (spec('{"training": {"learning_rate": Infinity}}'), "spec.training.learning_rate"),
        (spec('{"training": {"learning_rate": -Infinity}}'), "spec.training.learning_rate"),
        (spec('{"training": {"learning_rate": 1e400}}'), "spec.training.learning_rate"),
        (spec('{"training": {"learning_rate": ' + "9" * 400 + "}}"), "spec.training.learning_rate"),
        (spec('{"seed": 9223372036854775808}'), "spec.seed"),
        (spec('{"seed": -1}'), "spec.seed"),
        (spec('{"signature": {"methods": ["mean"], "bins": 4}}'), "spec.signature.bins"),
        (spec('{"patterns": [{"name": "palindrome"}, {"name": "nonsense"}]}'), "spec.patterns.1.name"),
        (spec('{"patterns": [{"name": "starts_with", "token": "\\u0000"}]}'), "spec.patterns.0.token"),
        (spec('{"patterns": [{"name": "\\ud800"}]}'), "spec.patterns.0.name"),
        (spec('{"\\ud800": 1}'), "spec (a key)"),
        (spec('{"a\\u0000b": 1}'), "spec (a key)"),
        ('{"kind": "generation", "spec": {}, "labels": {"a": "b\\u0000c"}}', "labels.a"),
        ('{"kind": "generation", "spec": {}, "labels": {"a": "\\udfff"}}', "labels.a"),
        ('{"kind": "generation", "spec": {}, "labels": {"a": 1}}', "labels.a"),
        ('{"kind": "generation", "spec": {}, "priority": 1e400}', "priority"),
        ('{"kind": "generation", "spec": {}, "queue": "a b"}', "queue"),
        ('{"kind": "generation", "spec": {}, "max_attempts": 0}', "max_attempts"),
        ('{"kind": "generation", "spec": {}, "not_before": "tomorrow"}', "not_before"),
        ('{"kind": "generation", "spec": {}, "not_before": "2030-01-01T00:00:00"}', "not_before"),
        ('{"kind": "generation", "spec": {}, "not_before": "9999-12-31T23:59:59-23:59"}', "not_before"),
        ('{"kind": "crossmodal", "spec": {}}', "spec.zoo"),
        ('{"kind": "crossmodal", "spec": {"zoo": {"job": "../x", "artifact": "zoo"}}}', "spec.zoo.job"),
        ("[1]", "(root)"),
        ('"generation"', "(root)"),
        ("null", "(root)"),
        ("{", "(root)"),
        ("", "(root)"),
        ('"\\ud800"', "(root)"),
        ("[" * 5000 + "]" * 5000, "(root)"),
        (spec('{"patterns": ' + "[" * 900 + "]" * 900 + "}"), "spec.patterns.0"),
        (spec('{"seed": ' + "1" * 5000 + "}"), "(root)"),
    ],
)
def test_names_the_field(gateway: Gateway, body: str, field: str) -> None:
    answer = gateway.http.post("/v1/jobs", content=body, headers=JSON)
    assert field in fields(answer), answer.text


def test_bytes_that_are_no_text(gateway: Gateway) -> None:
    assert fields(gateway.http.post("/v1/jobs", content=b'{"kind": "\xff\xfe"}', headers=JSON)) == ["(root)"]


def test_another_content_type(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/jobs", content=json.dumps(GENERATION), headers={"Content-Type": "text/plain"})
    assert fields(answer) == ["(root)"]
    assert "application/json" in answer.json()["detail"]


def test_json_that_is_called_otherwise(gateway: Gateway) -> None:
    for body in ("{", json.dumps(GENERATION)):
        answer = gateway.http.post("/v1/jobs", content=body, headers={"Content-Type": "text/json"})
        assert fields(answer) == ["(root)"]


def test_every_wrong_field_at_once_but_not_without_end(gateway: Gateway) -> None:
    answer = gateway.http.post("/v1/jobs", json={"kind": "generation", "spec": {"seed": -1, "subjects": 0}})
    assert fields(answer) == ["spec.seed", "spec.subjects"]
    many = {"kind": "generation", "spec": {f"unknown_{i}": 0 for i in range(500)}}
    assert len(fields(gateway.http.post("/v1/jobs", json=many))) == 20


def test_pipeline_paths(gateway: Gateway) -> None:
    def post(jobs: Any) -> list[str]:
        return fields(gateway.http.post("/v1/pipelines", json={"jobs": jobs}))

    bad = {"kind": "generation", "spec": {"training": {"steps": 0}}}
    # Named like a kind, so that the paths show that names are not taken for the union's tags.
    assert post({"generation": bad}) == ["jobs.generation.spec.training.steps"]
    assert post({"zoo": {"kind": "alchemy"}}) == ["jobs.zoo.kind"]
    assert post({}) == ["jobs"]
    codec = {"kind": "crossmodal", "spec": {"zoo": {"job": "menagerie", "artifact": "zoo"}}}
    assert post({"zoo": GENERATION, "codec": codec}) == ["jobs.codec.spec.zoo.job"]
    codec = {"kind": "crossmodal", "spec": {"zoo": {"job": "codec", "artifact": "zoo"}}}
    assert post({"codec": codec}) == ["jobs"]


def test_queries_and_headers(gateway: Gateway) -> None:
    http = gateway.http
    assert fields(http.get("/v1/jobs", params={"limit": "0"})) == ["limit"]
    assert fields(http.get("/v1/jobs", params={"limit": "many"})) == ["limit"]
    assert fields(http.get("/v1/jobs", params={"state": "asleep"})) == ["state"]
    assert fields(http.get("/v1/jobs", params={"kind": "alchemy"})) == ["kind"]
    assert fields(http.get("/v1/jobs", params={"cursor": "%%%"})) == ["cursor"]
    assert fields(http.get("/v1/jobs", params={"cursor": "\0"})) == ["cursor"]
    assert fields(http.get("/v1/jobs/%00")) == ["job_id"]
    assert fields(http.get("/v1/jobs", params={"label": "x"})) == ["label"]
    assert fields(http.get("/v1/artifacts", params={"type": "a\0"})) == ["type"]
    assert fields(http.post("/v1/jobs", json=GENERATION, headers={"Idempotency-Key": "k" * 300})) == ["idempotency-key"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/jobs/job_none",
        "/v1/jobs/job_none/events",
        "/v1/jobs/%F0%28%8C%28",
        "/v1/jobs/" + "a" * 2000,
        "/v1/artifacts/" + "0" * 64,
        "/v1/artifacts/" + "0" * 64 + "/files/a",
        "/v1/artifacts/none",
        "/v1/models/none",
        "/v1/models/none?version=2",
        "/v1/nothing",
        "/",
    ],
)
def test_unknown_things(gateway: Gateway, path: str) -> None:
    answer = gateway.http.get(path)
    assert fields(answer, 404) == []
    assert answer.json()["reason"] == "NOT_FOUND"


def test_unknown_inputs_are_named(gateway: Gateway) -> None:
    for ref, field in (
        ({"job": "job_none", "artifact": "zoo"}, "spec.zoo.job"),
        ({"artifact": "0" * 64}, "spec.zoo.artifact"),
    ):
        for params in ({}, {"dry_run": "true"}):
            body = {"kind": "crossmodal", "spec": {"zoo": ref}}
            assert fields(gateway.http.post("/v1/jobs", json=body, params=params), 404) == [field]


def test_a_dry_run_refuses_what_a_submission_would(gateway: Gateway) -> None:
    job = submit(gateway, queue="done")
    claim = gateway.services.registry.claim_next("done", "worker", 30)
    assert claim is not None
    gateway.services.registry.succeed(claim.attempt, {})
    body = {"kind": "crossmodal", "spec": {"zoo": {"job": job, "artifact": "zoo"}}}
    answers = [gateway.http.post("/v1/jobs", json=body, params=params) for params in ({}, {"dry_run": "true"})]
    assert [fields(answer, 404) for answer in answers] == [["spec.zoo.artifact"]] * 2


def test_a_schema_without_a_table_is_refused_at_once(gateway: Gateway) -> None:
    dimension, template = {"name": "size", "labels": ["small"]}, {"name": "plain", "text": "{tool} {size}"}
    body = {"kind": "resource", "spec": {"table": {"dimensions": [dimension], "templates": [template]}}}
    for params in ({}, {"dry_run": "true"}):
        assert fields(gateway.http.post("/v1/jobs", json=body, params=params)) == ["spec.profiling"]


def test_method_not_allowed(gateway: Gateway) -> None:
    answer = gateway.http.delete("/v1/jobs")
    assert fields(answer, 405) == []
    assert answer.headers["allow"]


def test_body_over_the_limit(gateway: Gateway) -> None:
    for content in (b"x" * 200_000, (b"x" * 20_000 for _ in range(10))):
        answer = gateway.http.post("/v1/jobs", content=content, headers=JSON)
        assert fields(answer, 413) == []
        assert answer.json()["reason"] == "RESOURCE_EXHAUSTED"


def test_request_id(gateway: Gateway) -> None:
    own = gateway.http.get("/v1/jobs/none", headers={"X-Request-ID": "mine-1"})
    assert own.json()["request_id"] == own.headers["x-request-id"] == "mine-1"
    forged = gateway.http.get("/healthz", headers={"X-Request-ID": "a b"})
    assert forged.headers["x-request-id"] != "a b"


def test_a_defect_answers_with_the_request_id_alone(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(gateway.services.registry, "get", broken)
    answer = gateway.http.get("/v1/jobs/job_x")
    assert fields(answer, 500) == []
    assert answer.json()["reason"] == "INTERNAL" and "secret" not in answer.text
    assert "secret detail" in caplog.text
    assert any(getattr(record, "request_id", "") == answer.json()["request_id"] for record in caplog.records)
