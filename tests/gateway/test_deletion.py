"""Deleting jobs and artifacts, retiring models."""

from __future__ import annotations

from pathlib import Path

from tests.gateway.running import Gateway, fields, submit

CODEC = {"name": "mine", "type": "codec"}


def upload(gateway: Gateway) -> str:
    answer = gateway.http.post("/v1/artifacts", data=CODEC, files=[("files", ("a.txt", b"a"))])
    assert answer.status_code == 201, answer.text
    id: str = answer.json()["id"]
    return id


def refused(gateway: Gateway, path: str) -> str:
    answer = gateway.http.delete(path)
    assert fields(answer, 409) == []
    assert answer.json()["reason"] == "ILLEGAL_STATE"
    detail: str = answer.json()["detail"]
    return detail


def test_a_job(gateway: Gateway) -> None:
    job = submit(gateway)
    assert "cancel it first" in refused(gateway, f"/v1/jobs/{job}")
    assert gateway.http.post(f"/v1/jobs/{job}/cancel").status_code == 200
    answer = gateway.http.delete(f"/v1/jobs/{job}")
    assert (answer.status_code, answer.json()["id"], answer.json()["state"]) == (200, job, "CANCELLED")
    for gone in (gateway.http.get, gateway.http.delete):
        assert fields(gone(f"/v1/jobs/{job}"), 404) == []
    assert gateway.http.get(f"/v1/jobs/{job}/events").status_code == 404


def test_an_artifact(gateway: Gateway) -> None:
    id = upload(gateway)
    answer = gateway.http.delete(f"/v1/artifacts/{id}")
    assert (answer.status_code, answer.json()["id"]) == (200, id)
    for gone in (gateway.http.get, gateway.http.delete):
        assert gone(f"/v1/artifacts/{id}").status_code == 404
    assert gateway.http.delete("/v1/artifacts/nothing").status_code == 404


def test_an_artifact_that_is_needed(gateway: Gateway) -> None:
    id = upload(gateway)
    job = submit(gateway, kind="crossmodal", spec={"zoo": {"artifact": id}})
    assert job in refused(gateway, f"/v1/artifacts/{id}")
    gateway.http.post(f"/v1/jobs/{job}/cancel")
    gateway.http.post("/v1/models", json={"name": "m", "artifact": id})
    assert "retire that first" in refused(gateway, f"/v1/artifacts/{id}")
    for _ in range(2):
        answer = gateway.http.post("/v1/models/m/1/retire")
        assert (answer.status_code, answer.json()["retired"]) == (200, True)
    assert gateway.http.get("/v1/models/m", params={"version": "1"}).status_code == 200
    assert gateway.http.delete(f"/v1/artifacts/{id}").status_code == 200
    assert gateway.http.get("/v1/models/m", params={"version": "1"}).status_code == 404
    assert gateway.http.post("/v1/models/m/1/retire").status_code == 404
    assert gateway.http.get("/v1/models").json()["items"] == []


def test_a_job_whose_output_is_published(gateway: Gateway, tmp_path: Path) -> None:
    job = submit(gateway, queue="deletion")
    claim = gateway.services.registry.claim_next("deletion", "w", 10)
    assert claim is not None
    (tmp_path / "a").write_text("a")
    id, _ = gateway.services.store.put(tmp_path, name="codec", type="codec", job=job, attempt=claim.attempt)
    gateway.services.registry.commit_artifact(claim.attempt, "codec", "codec", id, 1)
    gateway.services.registry.succeed(claim.attempt, {})
    gateway.http.post("/v1/models", json={"name": "kept", "artifact": id})
    assert gateway.http.delete(f"/v1/jobs/{job}").status_code == 200
    artifact = gateway.http.get(f"/v1/artifacts/{id}").json()
    assert (artifact["job"], artifact["manifest"]["job"]) == (None, job)


def test_a_deleted_artifact_is_not_published(gateway: Gateway) -> None:
    id = upload(gateway)
    assert gateway.http.delete(f"/v1/artifacts/{id}").status_code == 200
    # Its bytes are still in the store.
    assert fields(gateway.http.post("/v1/models", json={"name": "late", "artifact": id}), 404) == []
    assert id not in gateway.services.store.published()
