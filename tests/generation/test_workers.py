"""Training in processes of one's own is training in this one."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from ethogram.specs.generation import PatternSpec
from services.generation import workers
from services.generation.buckets import BucketTrainer
from services.generation.pipeline import DatasetGenerationPipeline
from services.generation.workers import Workers
from services.zoo.dataset import Zoo
from tests.generation.conftest import PATTERNS, records, small_spec, staged_spec
from tests.generation.test_generate import same


def test_the_same_zoo(staged: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    DatasetGenerationPipeline(small_spec()).run(tmp_path / "here-too")
    monkeypatch.setattr(workers, "WORTH_PROCESSES", 0.0)
    DatasetGenerationPipeline(staged_spec()).run(tmp_path / "there")
    DatasetGenerationPipeline(small_spec()).run(tmp_path / "there-too")
    assert records(tmp_path / "there") == records(staged[0])
    assert same(Zoo.load(tmp_path / "there-too"), Zoo.load(tmp_path / "here-too"))
    mine = psutil.Process().children(recursive=True)
    assert not [child for child in mine if "services.generation.workers" in child.cmdline()]


def test_processes_have_what_was_drawn_here(tmp_path: Path) -> None:
    """Patterns of one's own and probes from a file too, which they do not read."""
    DatasetGenerationPipeline(small_spec(subjects=2)).run(tmp_path / "zoo")
    own = [*PATTERNS, PatternSpec(name="own", regex="A.*B")]
    spec = small_spec(patterns=own, signature={"baseline": {"artifact": "zoo"}}, min_accuracy=0.0)
    trainer = BucketTrainer(spec, baseline=tmp_path / "zoo")
    shutil.rmtree(tmp_path / "zoo")
    here = trainer.train(trainer.buckets(0)[0]).table
    with closing(Workers(trainer, 1)) as pool:
        assert here.num_rows and pool.submit(0, 0).result().table.equals(here)


def test_modules_of_the_users_own_are_not_mistaken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").mkdir()
    for file in ("services/__init__.py", "types.py", "ethogram.py"):
        (tmp_path / file).write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    with closing(Workers(BucketTrainer(small_spec()), 1)) as pool:
        assert pool.submit(0, 0).result().table.num_rows


def test_this_process_trains_beside_the_others() -> None:
    trainer = BucketTrainer(small_spec())
    for others in (0, 1):
        with closing(Workers(trainer, others, in_process=True)) as pool:
            blocks = [pool.submit(number, 0) for number in range(3)]
            assert all(block.result().table.num_rows for block in blocks)
            assert len(pool._processes) == others
    # On closing, what trains here ends too.
    endless = BucketTrainer(small_spec(training={"steps": 1_000_000}))
    pool = Workers(endless, 0, in_process=True)
    block = pool.submit(0, 0)
    while not block.running():
        time.sleep(0.01)
    pool.close()
    with pytest.raises(CancelledError):
        block.result()


def test_a_process_that_dies_is_told_and_leaves_no_others() -> None:
    pool = Workers(BucketTrainer(small_spec()), 2)
    pool.submit(0, 0).result()
    (process,) = pool._processes
    process.kill()
    with pytest.raises(RuntimeError, match="ended by itself"):
        pool.submit(0, 0).result()
        pool.submit(0, 0).result()
    pool.close()
    assert all(one.poll() is not None for one in pool._processes)


def test_a_process_that_nobody_listens_to_ends_quietly() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "services.generation.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    process.stdout.close()
    task = pickle.dumps(BucketTrainer(small_spec()).sampler)
    assert process.communicate(task + b"[0, 0]\n")[1] == b""


def test_processes_end_with_who_started_them() -> None:
    code = (
        "from services.generation.buckets import BucketTrainer\n"
        "from services.generation.workers import Workers\n"
        "from tests.generation.conftest import small_spec\n"
        "workers = Workers(BucketTrainer(small_spec()), 1)\n"
        "workers.submit(0, 0).result()\n"
        "print(workers._processes[0].pid, flush=True)\n"
        "import time; time.sleep(60)"
    )
    root = str(Path(__file__).parents[2])
    starter = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root, env=os.environ | {"PYTHONPATH": root}
    )
    assert starter.stdout is not None
    worker = psutil.Process(int(starter.stdout.readline()))
    starter.send_signal(signal.SIGKILL)
    starter.communicate()
    deadline = time.monotonic() + 10
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)
