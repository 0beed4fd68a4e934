"""Submitting, listing and steering jobs over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from ethogram.specs.generation import GenerationSpec
from ethogram.specs.kinds import EXAMPLE_JOB, KINDS
from tests.gateway.running import GENERATION, TINY, Gateway, fields, submit


def test_submit_and_get(gateway: Gateway) -> None:
    body = GENERATION | {
        "queue": "big",
        "priority": 5,
        "max_attempts": 2,
        "labels": {"paper": "a"},
        "not_before": "2030-01-01T01:00:00+01:00",
    }
    answer = gateway.http.post("/v1/jobs", json=body)
    assert answer.status_code == 201
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    assert (job["state"], job["queue"], job["priority"], job["max_attempts"]) == ("QUEUED", "big", 5, 2)
    assert job["labels"] == {"paper": "a"} and job["not_before"] == "2030-01-01T00:00:00Z"
    assert job["spec"]["training"]["steps"] == 5 and job["spec"]["vocab_size"] == 7
    assert gateway.http.get(answer.headers["location"]).json() == job


def test_dry_run_queues_nothing(gateway: Gateway) -> None:
    before = gateway.http.get("/v1/jobs", params={"limit": "1"}).json()
    answer = gateway.http.post("/v1/jobs", json=GENERATION, params={"dry_run": "true"})
    assert answer.status_code == 200
    assert answer.json()["queue"] == "cpu" and answer.json()["spec"]["subject"]["layers"] == {"min": 2, "max": 2}
    assert gateway.http.get("/v1/jobs", params={"limit": "1"}).json() == before


def test_idempotency(gateway: Gateway) -> None:
    key = {"Idempotency-Key": "once"}
    first = gateway.http.post("/v1/jobs", json=GENERATION, headers=key)
    # Spelled differently, the same request: what counts is the spec with its defaults.
    same = GENERATION | {"spec": {**TINY, "vocab_size": 7}, "priority": 0}
    again = gateway.http.post("/v1/jobs", json=same, headers=key)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["id"] == first.json()["id"]
    other = gateway.http.post("/v1/jobs", json=GENERATION | {"priority": 1}, headers=key)
    assert fields(other, 409) == []
    assert other.json()["reason"] == "CONFLICT"


def test_one_key_at_the_same_time_makes_one_job(gateway: Gateway) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda _: gateway.http.post("/v1/jobs", json=GENERATION, headers={"Idempotency-Key": "race"}), range(16)
            )
        )
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert sorted(answer.status_code for answer in answers) == [200] * 15 + [201]


def test_pages_are_whole_while_jobs_are_added(gateway: Gateway) -> None:
    made = [submit(gateway, labels={"set": "pages"}) for _ in range(7)]
    params = {"label": "set=pages", "limit": "3"}
    seen: list[str] = []
    for _ in range(10):
        page = gateway.http.get("/v1/jobs", params=params).json()
        seen += [job["id"] for job in page["items"]]
        if page["next_cursor"] is None:
            break
        params["cursor"] = page["next_cursor"]
        submit(gateway, labels={"set": "pages"})
    assert seen == made[::-1]


def test_filters(gateway: Gateway) -> None:
    job = submit(gateway, labels={"set": "filters"})
    gateway.http.post(f"/v1/jobs/{job}/cancel")
    submit(gateway, labels={"set": "filters"})

    def ids(**params: str) -> list[str]:
        answer = gateway.http.get("/v1/jobs", params={"label": "set=filters", **params})
        return [item["id"] for item in answer.json()["items"]]

    assert ids(state="CANCELLED") == [job]
    assert len(ids(kind="generation")) == 2
    assert ids(kind="crossmodal") == []


def test_cancel_and_retry(gateway: Gateway) -> None:
    job = submit(gateway)
    assert fields(gateway.http.post(f"/v1/jobs/{job}/retry"), 409) == []
    assert gateway.http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "CANCELLED"
    again = gateway.http.post(f"/v1/jobs/{job}/cancel")
    assert fields(again, 409) == [] and again.json()["reason"] == "ILLEGAL_STATE"
    assert gateway.http.post(f"/v1/jobs/{job}/retry").json()["state"] == "QUEUED"


def test_running_job_is_cancelled_by_its_worker(gateway: Gateway) -> None:
    job = submit(gateway, queue="cancelled")
    claim = gateway.services.registry.claim_next("cancelled", "worker", 30)
    assert claim is not None
    assert gateway.http.post(f"/v1/jobs/{job}/cancel").json()["state"] == "CANCELLING"
    assert gateway.services.registry.heartbeat(claim.attempt) is True


def test_pipeline(gateway: Gateway) -> None:
    codec = {"kind": "crossmodal", "spec": {"zoo": {"job": "zoo", "artifact": "zoo"}}}
    body = {"jobs": {"codec": codec, "zoo": GENERATION}}
    answer = gateway.http.post("/v1/pipelines", json=body, headers={"Idempotency-Key": "pipeline"})
    assert answer.status_code == 201, answer.text
    jobs = answer.json()["jobs"]
    assert list(jobs) == ["codec", "zoo"]
    assert jobs["codec"]["waits_for"] == [jobs["zoo"]["id"]]
    assert jobs["codec"]["spec"]["zoo"]["job"] == jobs["zoo"]["id"]
    again = gateway.http.post("/v1/pipelines", json=body, headers={"Idempotency-Key": "pipeline"})
    assert (answer.status_code, again.status_code) == (201, 200)
    assert again.json() == answer.json()


def test_examples_of_the_documentation_are_accepted(gateway: Gateway) -> None:
    paths = gateway.http.get("/openapi.json").json()["paths"]

    def examples(path: str) -> dict[str, dict[str, object]]:
        found: dict[str, dict[str, object]] = paths[path]["post"]["requestBody"]["content"]["application/json"][
            "examples"
        ]
        return found

    assert set(examples("/v1/jobs")) == set(KINDS)
    zoo = gateway.http.post("/v1/jobs", json=examples("/v1/jobs")["generation"]["value"]).json()["id"]
    for path in ("/v1/jobs", "/v1/pipelines"):
        for example in examples(path).values():
            body = str(gateway.http.build_request("POST", path, json=example["value"]).content, "utf-8")
            answer = gateway.http.post(
                path, content=body.replace(EXAMPLE_JOB, zoo), headers={"Content-Type": "application/json"}
            )
            assert answer.status_code == 201, answer.text


def test_documentation_shows_every_kind(gateway: Gateway) -> None:
    schema = gateway.http.get("/openapi.json").json()
    body = schema["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["discriminator"]["mapping"]) == set(KINDS)
    for kind in KINDS.values():
        assert kind.spec.__name__ in schema["components"]["schemas"]
    assert gateway.http.get("/docs").status_code == 200


def test_kinds_and_info(gateway: Gateway) -> None:
    kinds = gateway.http.get("/v1/kinds").json()
    assert [kind["name"] for kind in kinds] == list(KINDS)
    assert kinds[0]["schema"]["properties"]["subjects"]["default"] == 2048
    info = gateway.http.get("/v1/info").json()
    assert set(info) == {"version", "inference"} and ":" in info["inference"]


def test_children_of_a_job(gateway: Gateway) -> None:
    registry, queue = gateway.services.registry, "parents"
    parent = submit(gateway, queue=queue)
    claim = registry.claim_next(queue, "w", 10)
    assert claim is not None
    child = registry.spawn(claim.attempt, "part", "generation", GenerationSpec())
    found = gateway.http.get("/v1/jobs", params={"parent": parent}).json()["items"]
    assert [(job["id"], job["parent"], job["name"]) for job in found] == [(child.id, parent, "part")]
    assert gateway.http.get("/v1/jobs", params={"parent": child.id}).json()["items"] == []


def test_retry_from_the_start(gateway: Gateway) -> None:
    registry, queue = gateway.services.registry, "retries"
    job = submit(gateway, queue=queue)
    for from_start in (False, True):
        claim = registry.claim_next(queue, "w", 10)
        assert claim is not None
        registry.commit_checkpoint(claim.attempt, "a" * 64, 3)
        registry.fail(claim.attempt, {"reason": "INTERNAL", "message": "a defect"})
        answer = gateway.http.post(f"/v1/jobs/{job}/retry", params={"from_start": str(from_start).lower()})
        assert answer.status_code == 200
        assert (answer.json()["checkpoint"] is None) is from_start


def test_limits_of_a_job(gateway: Gateway) -> None:
    body = GENERATION | {"time_limit_seconds": 60, "stall_limit_seconds": None}
    job = gateway.http.post("/v1/jobs", json=body).json()
    assert (job["time_limit_seconds"], job["stall_limit_seconds"], job["ran_seconds"]) == (60, None, 0)
    wrong = gateway.http.post("/v1/jobs", json=GENERATION | {"time_limit_seconds": 0})
    assert wrong.status_code == 422
    assert wrong.json()["violations"][0]["field"] == "time_limit_seconds"
