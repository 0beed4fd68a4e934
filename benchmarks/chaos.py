"""Does the job engine keep its promises while processes die and stall, disks fill and clocks step?

    make bench BENCH=chaos                              # at least 200 faults, half on SQLite, half on PostgreSQL
    make bench BENCH=chaos ARGS="--faults 40 --seed 7"  # another draw, smaller
    make bench BENCH=chaos ARGS="--part claims"         # only how long a claim takes in a long queue

The last line is one JSON object. Failures are listed on standard error; after one the folder
of the logs is kept, and named there.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from benchmarks import _kit
from benchmarks._chaos import checks
from benchmarks._chaos.arena import Arena, spawn
from benchmarks._chaos.faults import Faults
from benchmarks._chaos.workload import Workload
from benchmarks._claims import claim_flat_ratio
from benchmarks._kit import Figures, say
from benchmarks._watchers import watcher_events_lost
from ethogram.bench import Figure, form
from tests.conftest import free_port
from tests.postgres_server import start_postgres
from tests.redis_server import start_redis

DATABASES = ("sqlite", "postgresql")
_DRAIN_SECONDS = 300.0
_JOB = re.compile(r"job_[a-z0-9]{20}")


@dataclass
class Outcome:
    """What happened in one arena."""

    faults: int
    jobs: int
    lost: list[str]
    duplicated: list[str]
    unequal: list[str]
    stale_tried: int
    stale_accepted: list[str]
    detection: list[float]
    orphans: list[str]
    histories: dict[str, list[str]]
    """Job to its events, as lines."""


def suffer(folder: Path, database: str, *, faults: int, jobs: int, seed: int) -> Outcome:
    """``faults`` faults on one platform that works on at least ``jobs`` jobs meanwhile."""
    arena = Arena(folder, database)
    left: int | None = None
    try:
        say(f"{database}: the platform is up")
        chance = random.Random(f"faults {seed} {database}")
        workload, doer = Workload(arena, seed), Faults(arena, chance)
        submitting = spawn(workload.wrong, workload.run, jobs)
        try:
            reported = 0
            while (done := sum(doer.found.done.values())) < faults:
                time.sleep(chance.uniform(0.0, 0.6))
                doer.one()
                if done // 10 > reported:
                    reported = done // 10
                    say(f"{database}: {done} of {faults} faults, {len(workload.asked)} jobs")
        finally:
            workload.enough.set()
            doer.close()
        submitting.join(120)
        if submitting.is_alive():
            workload.wrong.append("submissions are not answered")
        say(f"{database}: {faults} faults done, {len(workload.asked)} jobs; waiting for their ends")
        workload.drain(_DRAIN_SECONDS)
        scratch = folder / "fetched"
        scratch.mkdir()
        found = workload.evidence(scratch)
        for attempt in {event.attempt for one in found for event in one.events if event.attempt is not None}:
            doer.write_stale(attempt)
        keys = {asked.key: asked.ids for asked in workload.asked}
        uploads = checks.uploads(workload.uploads, workload.fetched(scratch))
        outcome = Outcome(
            faults=sum(doer.found.done.values()),
            jobs=len(found),
            lost=[*checks.lost(found), *uploads, *workload.wrong, *doer.found.wrong],
            duplicated=checks.duplicated(found, keys, workload.roots()),
            unequal=checks.unequal(found),
            stale_tried=doer.found.stale_tried,
            stale_accepted=[*doer.found.stale_accepted, *checks.stale(found)],
            detection=doer.found.detection,
            orphans=[],
            histories={one.job.id: checks.history(one) for one in found},
        )
        for name, times in sorted(doer.found.done.items()):
            say(f"    {times:3} x {name}")
    finally:
        left = arena.close()
    outcome.orphans += [*arena.orphans.found.values(), *["a job's process outlived its platform"] * left]
    for what in ("lost", "duplicated", "unequal", "stale_accepted", "orphans"):
        for sentence in getattr(outcome, what):
            say(f"WRONG, {what}: {sentence}")
            for job in set(_JOB.findall(sentence)) & outcome.histories.keys():
                say("\n".join(outcome.histories.pop(job)))
    return outcome


def faults(given: argparse.Namespace) -> Figures:
    """The promises under faults. Logs and databases of a run in which one is broken are left for people."""
    folder = Path(tempfile.mkdtemp(prefix="ethogram-chaos-"))
    databases = DATABASES if given.database == "both" else (given.database,)
    share = -(-given.faults // len(databases)), -(-given.jobs // len(databases))
    found = [
        suffer(folder / database, database, faults=share[0], jobs=share[1], seed=given.seed) for database in databases
    ]
    refused = sum(one.stale_tried for one in found)
    accepted = sum(len(one.stale_accepted) for one in found)
    detection = [seconds for one in found for seconds in one.detection]
    say(f"{len(detection)} losses of attempts were timed; {refused} stale writes were refused, {accepted} accepted")
    figures = {
        "faults": Figure(sum(one.faults for one in found), ">=", given.faults),
        "jobs": Figure(sum(one.jobs for one in found), ">=", given.jobs),
        "lost": Figure(sum(len(one.lost) for one in found), "==", 0),
        "duplicated": Figure(sum(len(one.duplicated) for one in found), "==", 0),
        "unequal": Figure(sum(len(one.unequal) for one in found), "==", 0),
        "stale_refused": Figure(refused / (refused + accepted) if refused else None, "==", 1.0),
        "detection_leases": Figure(max(detection, default=None), "<=", 2.0),
        "orphans": Figure(sum(len(one.orphans) for one in found), "==", 0),
    }
    if form("chaos", figures)["ok"]:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        say(f"promises were broken; logs and databases are in {folder}")
    return figures


def claims(given: argparse.Namespace) -> Figures:
    """How long a claim takes in a long queue beside a short one."""
    databases = DATABASES if given.database == "both" else (given.database,)
    with tempfile.TemporaryDirectory(prefix="ethogram-chaos-") as scratch, ExitStack() as servers:
        urls = {"sqlite": f"sqlite:///{scratch}/claims.db"}
        if "postgresql" in databases:
            urls["postgresql"] = servers.enter_context(closing(start_postgres(Path(scratch)))).url
        return {"claim_flat_ratio": Figure(claim_flat_ratio([urls[database] for database in databases]), "<=", 1.5)}


def watchers(given: argparse.Namespace) -> Figures:
    """Whether a thousand watchers of one job see all its events."""
    with tempfile.TemporaryDirectory(prefix="ethogram-chaos-") as scratch:
        port = free_port()
        server = start_redis(port, Path(scratch))
        try:
            lost = watcher_events_lost(Path(scratch), f"redis://127.0.0.1:{port}/0")
        finally:
            server.kill()
            server.wait()
    return {"watcher_events_lost": Figure(lost, "==", 0)}


PARTS: dict[str, _kit.Part] = {"claims": claims, "watchers": watchers, "faults": faults}


def main() -> None:
    """The benchmark."""
    parser = _kit.parser(__doc__, PARTS)
    parser.add_argument("--faults", type=int, default=200, help="faults in all (200)")
    parser.add_argument("--jobs", type=int, default=50, help="jobs at least, in all (50)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws of faults and jobs (0)")
    parser.add_argument("--database", choices=["both", *DATABASES], default="both")
    _kit.run("chaos", parser.parse_args(), PARTS)


if __name__ == "__main__":
    main()
