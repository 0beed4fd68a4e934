"""Any sequence of what jobs and people do, against a plain account of what must live."""

from __future__ import annotations

import random
import secrets
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from sqlalchemy import select

from ethogram.errors import IllegalState, NotFound
from ethogram.specs.base import ArtifactRef
from ethogram.specs.crossmodal import CrossmodalSpec
from ethogram.specs.generation import GenerationSpec
from services.artifacts.store import ArtifactStore
from services.jobs.registry import Claim, JobRegistry, JobState
from services.jobs.tables import Artifact
from workers.collector import Housekeeper
from workers.metrics import ReconcilerMetrics
from workers.settings import WorkerSettings


@dataclass
class Account:
    """What a job has, as the test keeps it."""

    outputs: dict[str, str] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)
    inputs: set[str] = field(default_factory=set)
    checkpoint: str | None = None
    succeeded: bool = False


class World:
    """A registry, a store, and what is known to have happened."""

    def __init__(self, folder: Path, url: str, seed: int) -> None:
        self.folder, self.chance = folder, random.Random(seed)
        self.registry = JobRegistry.open(f"sqlite:///{folder / 'registry.db'}")
        self.store = ArtifactStore(url)
        self.config = WorkerSettings(gc_grace_seconds=0.0)
        self.keeper = Housekeeper(self.registry, self.store, self.config, ReconcilerMetrics())
        self.jobs: dict[str, Account] = {}
        self.uploads, self.published = set[str](), set[str]()
        self.running: dict[str, Claim] = {}
        self.uncommitted: dict[str, set[str]] = {}
        """Attempt to what it has written and may commit."""

    def put(self, name: str, attempt: Claim | None = None) -> str:
        """Files of which most are the same as others'."""
        source = self.folder / secrets.token_hex(4)
        source.mkdir()
        for number in range(self.chance.randint(1, 3)):
            (source / f"{number}.txt").write_text(self.chance.choice("abcdefgh") * 100)
        job, owner = (attempt.job.id, attempt.attempt) if attempt else (None, None)
        id, _ = self.store.put(source, name=name, type="codec", job=job, attempt=owner)
        shutil.rmtree(source)
        return id

    def any_running(self) -> Claim | None:
        return self.chance.choice(list(self.running.values())) if self.running else None

    def rows(self) -> list[str]:
        return sorted({*self.uploads, *(id for job in self.jobs.values() for id in job.outputs.values())})

    def submit(self) -> None:
        rows = self.rows()
        if rows and self.chance.random() < 0.4:
            given = self.chance.choice(rows)
            spec: GenerationSpec | CrossmodalSpec = CrossmodalSpec(zoo=ArtifactRef(artifact=given))
            job, _ = self.registry.submit("crossmodal", spec, queue="q")
            self.jobs[job.id] = Account(inputs={given})
        else:
            job, _ = self.registry.submit("generation", GenerationSpec(), queue="q")
            self.jobs[job.id] = Account()

    def claim(self) -> None:
        claim = self.registry.claim_next("q", "w", 10.0)
        if claim is not None:
            self.running[claim.attempt] = claim
            self.uncommitted[claim.attempt] = set()

    def write(self) -> None:
        claim = self.any_running()
        if claim is not None:
            self.uncommitted[claim.attempt].add(self.put("zoo", claim))

    def commit(self) -> None:
        """An output, that may take the place of an earlier one."""
        claim = self.any_running()
        if claim is None:
            return
        written = sorted(self.uncommitted[claim.attempt])
        id = written[0] if written else self.put("zoo", claim)
        self.registry.commit_artifact(claim.attempt, "zoo", "codec", id, 1)
        self.uncommitted[claim.attempt].discard(id)
        self.jobs[claim.job.id].outputs["zoo"] = id
        self.jobs[claim.job.id].made.add(id)

    def checkpoint(self) -> None:
        claim = self.any_running()
        if claim is not None:
            id = self.put("checkpoint", claim)
            self.registry.commit_checkpoint(claim.attempt, id, 1)
            self.jobs[claim.job.id].checkpoint = id

    def end(self) -> None:
        claim = self.any_running()
        if claim is None:
            return
        account = self.jobs[claim.job.id]
        match self.chance.choice(["succeed", "fail", "stop", "crash"]):
            case "succeed":
                self.registry.succeed(claim.attempt, {})
                account.succeeded = True
            case "fail":
                self.registry.fail(claim.attempt, {"reason": "INVALID_INPUT", "message": "no"})
            case "stop":
                self.registry.release(claim.attempt, "stopped")
            case _:
                self.registry.release(claim.attempt, "crashed")
        del self.running[claim.attempt], self.uncommitted[claim.attempt]

    def retry(self) -> None:
        job = self.any_job()
        if job is not None and self.registry.get(job).state is JobState.FAILED:
            self.registry.retry(job)

    def upload(self) -> None:
        id = self.put("mine")
        if self.chance.random() < 0.7:
            self.registry.add_artifact(id, "mine", "codec", 1)
            self.uploads.add(id)

    def break_off(self) -> None:
        """A writer dies between its files and its manifest."""
        source = self.folder / "broken"
        source.write_text(self.chance.choice("abcdefgh") * 100 + self.chance.choice(["", "x"]))
        self.store.backend.add(source)

    def publish(self) -> None:
        rows = self.rows()
        if rows:
            id = self.chance.choice(rows)
            self.store.publish("default", "m", id)
            self.published.add(id)
            if self.chance.random() < 0.5:
                self.store.retire("default", "m", self.store.model("default", "m").version)

    def delete_artifact(self) -> None:
        rows = self.rows()
        if not rows:
            return
        id = self.chance.choice(rows)
        try:
            self.registry.deletable_artifact(id)
            self.store.withdraw(id)
            self.registry.delete_artifact(id)
        except IllegalState:
            return
        self.uploads.discard(id)
        self.published.discard(id)
        for job in self.jobs.values():
            job.outputs = {name: made for name, made in job.outputs.items() if made != id}

    def delete_job(self) -> None:
        job = self.any_job()
        if job is None:
            return
        try:
            self.registry.delete_job(job, self.store.published())
        except IllegalState:
            return
        # Those that a later output had replaced, too.
        self.uploads |= self.jobs.pop(job).made & self.published

    def any_job(self) -> str | None:
        return self.chance.choice(sorted(self.jobs)) if self.jobs else None

    def restart(self) -> None:
        self.keeper = Housekeeper(self.registry, self.store, self.config, ReconcilerMetrics())

    def must_live(self) -> set[str]:
        alive = {*self.rows(), *self.published}
        for job in self.jobs.values():
            alive |= job.inputs
            if job.checkpoint is not None and not job.succeeded:
                alive.add(job.checkpoint)
        return alive.union(*self.uncommitted.values())

    def check(self) -> None:
        """Collect. All that must live is whole, and nothing else is there."""
        alive = self.must_live()
        self.keeper.look()
        files = set()
        for id in alive:
            target = self.folder / secrets.token_hex(4)
            self.store.fetch(id, target)
            shutil.rmtree(target)
            files |= {file.sha256 for file in self.store.manifest(id).files.values()}
        assert self.held("manifests") == {f"{id}.json" for id in alive}
        assert self.held("blobs") == files
        with self.registry._database.read() as session:
            named = {id: superseded for id, superseded in session.execute(select(Artifact.id, Artifact.superseded))}
        assert named.keys() <= alive, "a row without an artifact"
        assert {id for id, superseded in named.items() if not superseded} == set(self.rows())

    def held(self, folder: str) -> set[str]:
        names = self.store.backend.names
        return {name for part in names(folder) for name in names(f"{folder}/{part}")}


STEPS = [
    *[
        "submit",
        "claim",
        "write",
        "commit",
        "commit",
        "checkpoint",
        "checkpoint",
        "end",
        "retry",
        "upload",
        "break_off",
    ],
    *["publish", "delete_artifact", "delete_job", "restart"],
]


@pytest.mark.parametrize("seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 60))])
def test_what_must_live_lives_and_the_rest_goes(tmp_path: Path, seed: int) -> None:
    url = str(tmp_path / "store") if seed % 2 else f"memory://{secrets.token_hex(6)}"
    world = World(tmp_path, url, seed)
    for _ in range(12):
        for _ in range(world.chance.randint(1, 8)):
            getattr(world, world.chance.choice(STEPS))()
        world.check()
    world.registry.close()


def test_a_name_that_was_forgotten_names_nothing(tmp_path: Path) -> None:
    world = World(tmp_path, str(tmp_path / "store"), 0)
    world.submit()
    world.claim()
    old = world.put("zoo", world.any_running())
    (attempt,) = world.running
    world.registry.commit_artifact(attempt, "zoo", "codec", old, 1)
    world.commit()
    # Replaced, but a job may still name it by its id; then it stays.
    job, _ = world.registry.submit("crossmodal", CrossmodalSpec(zoo=ArtifactRef(artifact=old)), queue="q2")
    world.keeper.look()
    world.store.fetch(old, tmp_path / "fetched")
    world.registry.request_cancel(job.id)
    world.registry.delete_job(job.id)
    world.keeper.look()
    with pytest.raises(NotFound):
        world.registry.submit("crossmodal", CrossmodalSpec(zoo=ArtifactRef(artifact=old)), queue="q2")
    world.registry.close()
