"""Does the job engine keep its promises while processes die and stall, disks fill and clocks step?

    make bench BENCH=chaos                              # at least 200 faults, half on SQLite, half on PostgreSQL
    make bench BENCH=chaos ARGS="--faults 40 --seed 7"  # another draw, smaller
    make bench BENCH=chaos ARGS="--part claims"         # only how long a claim takes in a long queue

The last line is one JSON object. Standard error says what went wrong and where the logs are kept.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, insert, select

from benchmarks import _kit
from benchmarks._chaos import checks
from benchmarks._chaos.arena import Arena, spawn
from benchmarks._chaos.faults import FaultInjector
from benchmarks._chaos.workload import Workload
from benchmarks._kit import Figures, say
from benchmarks._watchers import watcher_events_lost
from ethogram.bench import Figure, form
from ethogram.platform.stack import free_port
from ethogram.specs.generation import GenerationSpec
from services.jobs import tables
from services.jobs.registry import JobRegistry
from tests.postgres_server import start_postgres
from tests.redis_server import start_redis

DATABASES = ("sqlite", "postgresql")
SHORT, LONG = 100, 10_000
"""Waiting jobs of a short and of a long queue."""
_ROUNDS, _CLAIMS = 4, 40
_DRAIN_SECONDS = 300.0
_JOB = re.compile(r"job_[a-z0-9]{20}")


@dataclass
class Outcome:
    """What happened in one arena."""

    faults: int
    jobs: int
    stale_refused: int
    detection: list[float]
    """Lease periods between a worker's death and the loss of each of its attempts."""
    wrong: dict[str, list[str]]
    """What is wrong, by check: ``lost``, ``duplicated``, ``unequal``, ``stale_accepted``, ``orphans``."""


def suffer(folder: Path, database: str, *, faults: int, jobs: int, seed: int) -> Outcome:
    """Inject ``faults`` faults into one platform while it works on at least ``jobs`` jobs."""
    arena = Arena(folder, database)
    left = 0
    try:
        say(f"{database}: the platform is up")
        chance = random.Random(f"faults {seed} {database}")
        workload, injector = Workload(arena, seed), FaultInjector(arena, chance)
        submitting = spawn(workload.errors, workload.run, jobs)
        try:
            reported = 0
            while (done := injector.counts.total()) < faults:
                time.sleep(chance.uniform(0.0, 0.6))
                injector.inject()
                if done // 10 > reported:
                    reported = done // 10
                    say(f"{database}: {done} of {faults} faults, {len(workload.submissions)} jobs")
        finally:
            workload.enough.set()
            injector.close()
        submitting.join(120)
        if submitting.is_alive():
            workload.errors.append("submissions are not answered")
        say(f"{database}: {faults} faults done, {len(workload.submissions)} jobs; waiting for their ends")
        workload.drain(_DRAIN_SECONDS)
        scratch = folder / "fetched"
        scratch.mkdir()
        evidence = workload.evidence(scratch)
        for attempt in {event.attempt for job in evidence for event in job.events if event.attempt is not None}:
            injector.write_stale(attempt)
        keys = {submission.key: submission.ids for submission in workload.submissions}
        uploads = checks.uploads(workload.uploads, workload.fetched(scratch))
        outcome = Outcome(
            faults=injector.counts.total(),
            jobs=len(evidence),
            stale_refused=injector.stale_refused,
            detection=injector.detection,
            wrong={
                "lost": [*checks.lost(evidence), *uploads, *workload.errors, *injector.errors],
                "duplicated": checks.duplicated(evidence, keys, workload.roots()),
                "unequal": checks.unequal(evidence),
                "stale_accepted": [*injector.stale_accepted, *checks.stale(evidence)],
            },
        )
        for name, times in sorted(injector.counts.items()):
            say(f"    {times:3} x {name}")
    finally:
        left = arena.close()
    outlived = ["a process outlived its platform"] * left
    outcome.wrong["orphans"] = [*arena.orphans.found.values(), *outlived]
    histories = {job.job.id: checks.history(job) for job in evidence}
    for check, sentences in outcome.wrong.items():
        for sentence in sentences:
            say(f"WRONG, {check}: {sentence}")
            for job_id in set(_JOB.findall(sentence)) & histories.keys():
                say("\n".join(histories.pop(job_id)))
    return outcome


def faults(arguments: argparse.Namespace) -> Figures:
    """The promises under faults. Where one is broken, the logs and databases are kept for people."""
    folder = Path(tempfile.mkdtemp(prefix="ethogram-chaos-"))
    databases = _databases(arguments)
    share = {name: -(-getattr(arguments, name) // len(databases)) for name in ("faults", "jobs")}
    outcomes = [suffer(folder / database, database, seed=arguments.seed, **share) for database in databases]

    def count(check: str) -> int:
        return sum(len(outcome.wrong[check]) for outcome in outcomes)

    refused, accepted = sum(outcome.stale_refused for outcome in outcomes), count("stale_accepted")
    detection = [leases for outcome in outcomes for leases in outcome.detection]
    say(f"{len(detection)} losses of attempts were timed; {refused} stale writes were refused, {accepted} accepted")
    figures = {
        "faults": Figure(sum(outcome.faults for outcome in outcomes), ">=", arguments.faults),
        "jobs": Figure(sum(outcome.jobs for outcome in outcomes), ">=", arguments.jobs),
        **{check: Figure(count(check), "==", 0) for check in ("lost", "duplicated", "unequal")},
        "stale_refused": Figure(refused / (refused + accepted) if refused else None, "==", 1.0),
        "detection_leases": Figure(max(detection, default=None), "<=", 2.0),
        "orphans": Figure(count("orphans"), "==", 0),
    }
    if form("chaos", figures)["ok"]:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        say(f"promises were broken; logs and databases are in {folder}")
    return figures


def claims(arguments: argparse.Namespace) -> Figures:
    """How long a claim takes in a long queue and in a short one."""
    databases = _databases(arguments)
    with tempfile.TemporaryDirectory(prefix="ethogram-chaos-") as scratch, ExitStack() as servers:
        urls = {"sqlite": f"sqlite:///{scratch}/claims.db"}
        if "postgresql" in databases:
            urls["postgresql"] = servers.enter_context(closing(start_postgres(Path(scratch)))).url
        return {"claim_flat_ratio": Figure(claim_flat_ratio([urls[database] for database in databases]), "<=", 1.5)}


def claim_flat_ratio(urls: Sequence[str]) -> float:
    """The worst ratio of median claim times, 10,000 waiting jobs to 100, over the empty databases at ``urls``, with one
    tenant and with twenty."""
    worst = 0.0
    for url in urls:
        registry = JobRegistry.open(url)
        try:
            for tenants in (1, 20):
                seconds: dict[int, list[float]] = {SHORT: [], LONG: []}
                # Alternate, so that whatever else the machine does affects both.
                for turn in range(_ROUNDS):
                    for waiting in (SHORT, LONG) if turn % 2 else (LONG, SHORT):
                        _fill(registry, waiting, tenants)
                        seconds[waiting] += [_claim(registry) for _ in range(_CLAIMS)]
                short, long = (statistics.median(seconds[waiting]) * 1e3 for waiting in (SHORT, LONG))
                say(
                    f"claims, {url.split(':')[0]}, {tenants} tenant(s): {short:.2f} ms of {SHORT}, "
                    f"{long:.2f} ms of {LONG}: {long / short:.2f}"
                )
                worst = max(worst, long / short)
        finally:
            registry.close()
    return worst


def _claim(registry: JobRegistry) -> float:
    began = time.perf_counter()
    claim = registry.claim_next("cpu", "bench", 10.0)
    seconds = time.perf_counter() - began
    assert claim is not None
    registry.succeed(claim.attempt, {})
    return seconds


def _fill(registry: JobRegistry, waiting: int, tenants: int) -> None:
    """Empty the registry and queue ``waiting`` jobs."""
    database = registry._database
    with database.write() as session:
        for table in (tables.Event, tables.Attempt, tables.Turn, tables.Job):
            session.execute(delete(table))
    registry.submit("generation", GenerationSpec())
    job: Any = tables.Job.__table__
    with database.write() as session:
        row = dict(session.execute(select(job)).mappings().one())
        first = row["number"]
        session.execute(
            insert(job),
            [
                {**row, "number": first + i, "id": f"job_{first + i:020}", "tenant": f"tenant-{i % tenants}"}
                for i in range(1, waiting)
            ],
        )
        if not database.sqlite:
            # Move the counter past the rows that were inserted with a number.
            sequence = func.pg_get_serial_sequence("jobs", "number")
            session.execute(select(func.setval(sequence, select(func.max(job.c.number)).scalar_subquery())))
    if not database.sqlite:
        # PostgreSQL's autovacuum would do so a moment later.
        with database._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE jobs")


def watchers(_: argparse.Namespace) -> Figures:
    """Whether a thousand watchers of one job see all its events."""
    with tempfile.TemporaryDirectory(prefix="ethogram-chaos-") as scratch:
        port = free_port()
        with start_redis(port, Path(scratch)) as server:
            try:
                lost = watcher_events_lost(Path(scratch), f"redis://127.0.0.1:{port}/0")
            finally:
                server.kill()
    return {"watcher_events_lost": Figure(lost, "==", 0)}


def _databases(arguments: argparse.Namespace) -> tuple[str, ...]:
    return DATABASES if arguments.database == "both" else (arguments.database,)


if __name__ == "__main__":
    parts = dict(claims=claims, watchers=watchers, faults=faults)
    parser = _kit.parser(__doc__, parts)
    parser.add_argument("--faults", type=int, default=200, help="number of faults in all (200)")
    parser.add_argument("--jobs", type=int, default=50, help="least number of jobs in all (50)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws of faults and jobs (0)")
    parser.add_argument("--database", choices=["both", *DATABASES], default="both")
    _kit.run("chaos", parser.parse_args(), parts)
