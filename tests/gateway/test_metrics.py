"""What Prometheus is told."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ethogram.platform.stack import free_port
from ethogram.specs.generation import GenerationSpec
from gateway import metrics
from services.inference.metrics import InferenceMetrics
from services.jobs.registry import JobRegistry
from tests.gateway.running import Gateway, stream, submit
from tests.workers.stack import Stack, wait_for
from workers.metrics import ReconcilerMetrics, WorkerMetrics

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return samples(text).get((name, frozenset(labels.items())), 0.0)


def test_requests_are_counted_by_route_and_not_by_path(gateway: Gateway) -> None:
    def count(route: str, status: str) -> float:
        text = gateway.http.get("/metrics").text
        return value(text, "ethogram_http_requests_total", method="GET", route=route, status=status)

    before = count("/v1/jobs/{job_id}", "404"), count("unknown", "404")
    for number in range(3):
        assert gateway.http.get(f"/v1/jobs/job_{number}").status_code == 404
        assert gateway.http.get(f"/nowhere/{number}").status_code == 404
    assert (count("/v1/jobs/{job_id}", "404"), count("unknown", "404")) == (before[0] + 3, before[1] + 3)
    text = gateway.http.get("/metrics").text
    assert "nowhere" not in text
    assert value(text, "ethogram_http_request_seconds_count", method="GET", route="/v1/jobs/{job_id}") >= 3


def test_streams_are_counted_while_they_are_open(gateway: Gateway) -> None:
    job = submit(gateway, queue="nobody")
    before = value(gateway.http.get("/metrics").text, "ethogram_stream_bytes_total")
    with gateway.http.stream("GET", f"/v1/jobs/{job}/events") as response:
        chunks = response.iter_raw()
        next(chunks)
        assert value(gateway.http.get("/metrics").text, "ethogram_streams") >= 1
    stream(gateway, job, follow="false")
    text = gateway.http.get("/metrics").text
    assert value(text, "ethogram_stream_bytes_total") > before
    # A stream of hours is no slow request.
    route = "/v1/jobs/{job_id}/events"
    assert value(text, "ethogram_http_request_seconds_count", method="GET", route=route) == 0


def test_queues_are_told_as_they_are(gateway: Gateway) -> None:
    queue = "metered"
    registry = gateway.services.registry
    registry.submit("generation", GenerationSpec(), queue=queue)
    registry.submit("generation", GenerationSpec(), queue=queue)
    claim = registry.claim_next(queue, "w", 10)
    assert claim is not None
    registry.succeed(claim.attempt, {})
    late = datetime.now(UTC) + timedelta(hours=1)
    registry.submit("generation", GenerationSpec(), queue=queue, not_before=late)
    time.sleep(metrics._KEEP_SECONDS + 0.1)
    text = gateway.http.get("/metrics").text
    assert value(text, "ethogram_jobs", queue=queue, state="ready") == 1
    assert value(text, "ethogram_jobs", queue=queue, state="held") == 1
    assert value(text, "ethogram_queue_oldest_ready_seconds", queue=queue) > 1
    assert value(text, "ethogram_registry_up") == 1


def test_without_a_database_the_rest_is_told(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    registry = JobRegistry.open(f"sqlite:///{path}")
    told = metrics.GatewayMetrics(registry, lambda: 0)
    registry.close()
    for file in tmp_path.iterdir():
        file.unlink()
    path.mkdir()
    text = generate_latest(told.registry).decode()
    assert value(text, "ethogram_registry_up") == 0
    assert "ethogram_streams" in text


@pytest.mark.slow
def test_workers_and_reconcilers_tell_of_themselves(tmp_path: Path, redis_url: str) -> None:
    stack = Stack(tmp_path, redis_url)
    ports = free_port(), free_port()
    try:
        stack.worker(metrics_port=str(ports[0]))
        stack.start("workers.reconciler", "--parent-pipe", metrics_port=str(ports[1]))
        stack.wait(stack.submit(2, 0.3))

        def told(port: int) -> str:
            return httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text

        def ended() -> float:
            text = told(ports[0])
            return value(text, "ethogram_worker_attempts_total", kind="generation", outcome="succeeded")

        wait_for("the attempt to be counted", lambda: ended() == 1)
        worker = told(ports[0])
        assert value(worker, "ethogram_worker_slots") == 1
        assert value(worker, "ethogram_worker_busy_slots") == 0
        assert value(worker, "ethogram_worker_claims_total", queue=stack.queue) == 1
        assert value(worker, "ethogram_worker_events_total") >= 2
        assert value(worker, "ethogram_worker_attempt_seconds_sum", kind="generation") > 0.6
        assert value(told(ports[1]), "ethogram_reconciler_looks_total") >= 1
        # A second one on the same port says so and leaves.
        second = stack.worker(metrics_port=str(ports[0]))
        assert second.wait(15) == 2
        assert "ETHOGRAM_METRICS_PORT" in stack.said()
    finally:
        stack.close()


@pytest.mark.parametrize("process", ["gateway", "worker", "reconciler", "inference"])
def test_the_document_names_every_metric(gateway: Gateway, process: str) -> None:
    text = {
        "gateway": lambda: gateway.http.get("/metrics").text,
        "worker": lambda: generate_latest(WorkerMetrics(1).registry).decode(),
        "reconciler": lambda: generate_latest(ReconcilerMetrics().registry).decode(),
        "inference": lambda: generate_latest(InferenceMetrics(models=int, pending=int).registry).decode(),
    }[process]()
    exposed = {
        family.name + ("_total" if family.type == "counter" else "")
        for family in text_string_to_metric_families(text)
        # When a counter began: the client library adds it to each.
        if not family.name.endswith("_created")
    }
    document = DOCUMENT.read_text()
    section = document.split(f"## {process.title()}")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(ethogram_\w+)`", section, re.M)) == exposed
