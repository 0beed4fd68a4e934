"""The parts around a job: bell, notifications, reconciler, settings, process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import redis as redis_client

from ethogram.errors import InvalidInput, Unavailable
from ethogram.platform.stack import free_port
from ethogram.specs.generation import GenerationSpec
from ethogram.specs.kinds import KINDS
from services.jobs.registry import JobRegistry, JobState
from services.jobs.signals import CHANNEL, Bell, Notifier, celery_queue, checked_redis_url
from services.runtime import scratch
from tests.workers.stack import gone, wait_for
from workers import child as child_process
from workers import process
from workers.ledger import Context
from workers.metrics import ReconcilerMetrics, WorkerMetrics
from workers.process import MAX_SOCKET_PATH, Child, ChildFailed, ForkServer, child_environment, describe_exit
from workers.reconciler import Reconciler
from workers.settings import Slot, WorkerSettings, slots_of
from workers.supervisor import run_attempt

SLOT = Slot(0, "cpu", 2, "")


def test_rings_are_merged_into_one_that_waits(redis_url: str) -> None:
    queue, bell = f"test-{uuid4().hex[:8]}", Bell(redis_url)
    client = redis_client.Redis.from_url(redis_url)
    for _ in range(5):
        bell.ring(queue)
        assert bell.flush(5)
    assert client.llen(celery_queue(queue)) == 1
    client.delete(celery_queue(queue))
    bell.ring(queue)
    bell.close()
    assert client.llen(celery_queue(queue)) == 1
    client.delete(celery_queue(queue))


def test_nobody_waits_for_a_redis_that_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    bell, notifier = Bell(url), Notifier(url)
    began = time.monotonic()
    for index in range(100):
        bell.ring(f"queue{index}")
        notifier.notify(f"job{index}", index)
    assert time.monotonic() - began < 0.1
    bell.flush(10)
    notifier.flush(10)
    assert len([record for record in caplog.records if "Start Redis again" in record.message]) == 2
    bell.close()
    notifier.close()


def test_a_gateway_hears_the_newest_event(redis_url: str) -> None:
    # Untyped.
    client: Any = redis_client.Redis.from_url(redis_url)
    listener = client.pubsub(ignore_subscribe_messages=True)
    listener.subscribe(CHANNEL)
    listener.get_message(timeout=1)
    notifier, job = Notifier(redis_url), f"job_{uuid4().hex}"
    for seq in range(1, 50):
        notifier.notify(job, seq)
    notifier.close()
    heard = []
    while (message := listener.get_message(timeout=0.5)) is not None:
        told = json.loads(message["data"])
        if told["job"] == job:
            heard.append(told["seq"])
    assert heard == sorted(heard)
    assert heard[-1] == 49


@pytest.mark.parametrize(
    "url", ["redis+cluster://h:1", "redis://a:1,b:2/0", "http://h", "localhost", "", "redis://h:99999", "redis://[h"]
)
def test_redis_urls_that_celery_cannot_use(url: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        checked_redis_url(url)
    assert refused.value.violations[0].field == "REDIS_URL"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_reconciler_believes_heartbeats_and_its_own_clock(tmp_path: Path, redis_url: str) -> None:
    registry = JobRegistry.open(f"sqlite:///{tmp_path / 'registry.db'}")
    bell, notifier, clock = Bell(redis_url), Notifier(redis_url), Clock()
    queue = f"test-{uuid4().hex[:8]}"
    job, _ = registry.submit("generation", GenerationSpec(), queue=queue)
    reconciler = Reconciler(registry, bell, notifier, ReconcilerMetrics(), clock)
    reconciler.look()
    assert bell.flush(5)
    client = redis_client.Redis.from_url(redis_url)
    assert client.delete(celery_queue(queue)) == 1, "there was work, and nobody rang"

    claim = registry.claim_next(queue, "w", lease_seconds=10)
    assert claim is not None
    for _ in range(30):
        clock.now += 1
        registry.heartbeat(claim.attempt)
        reconciler.look()
    assert registry.get(job.id).state is JobState.RUNNING
    # The reconciler slept: what it did not see does not count.
    clock.now += 3600
    reconciler.look()
    assert registry.get(job.id).state is JobState.RUNNING
    for _ in range(11):
        clock.now += 1
        reconciler.look()
        if registry.get(job.id).state is JobState.QUEUED:
            break
    released = registry.get(job.id)
    assert released.state is JobState.QUEUED
    assert released.not_before is not None
    bell.close()
    notifier.close()
    registry.close()


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ETHOGRAM_QUEUES", "cpu, gpu")
    monkeypatch.setenv("REDIS_URL", "redis://h:1/2")
    monkeypatch.setenv("ETHOGRAM_STORE", "here")
    config = WorkerSettings.read()
    assert config.queues == ["cpu", "gpu"]
    assert config.redis_url == "redis://h:1/2"
    assert config.store_url == str(tmp_path / "here")
    assert config.database == f"sqlite:///{tmp_path / 'runs/state/registry.db'}"
    monkeypatch.setenv("ETHOGRAM_DEVICE", "abacus")
    with pytest.raises(InvalidInput, match="ETHOGRAM_DEVICE"):
        WorkerSettings.read()


def test_slots_own_a_gpu_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    slots = slots_of(WorkerSettings(device="cuda", slots=2, threads=3))
    assert [(slot.device, slot.gpus, slot.threads) for slot in slots] == [("cuda:0", "4", 3), ("cuda:0", "6", 3)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [slot.gpus for slot in slots_of(WorkerSettings(device="cuda", slots=2))] == ["0", "1"]
    assert [(slot.device, slot.gpus) for slot in slots_of(WorkerSettings())] == [("cpu", "")]


def test_the_environment_of_a_child() -> None:
    seen = {
        "PATH": "/bin",
        "LC_ALL": "C",
        "HF_TOKEN": "t",
        "ALL_PROXY": "p",
        "no_proxy": "n",
        "CUDA_DEVICE_ORDER": "PCI",
    }
    seen |= {"ETHOGRAM_CACHE": "c", "XDG_CACHE_HOME": "x", "MPLCONFIGDIR": "m", "NUMBA_CACHE_DIR": "n"}
    seen |= {"TORCHINDUCTOR_CACHE_DIR": "t", "TRITON_CACHE_DIR": "t", "XDG_RUNTIME_DIR": "r", "TMPDIR": "t"}
    hidden = {"REDIS_URL": "r", "ETHOGRAM_DATABASE_URL": "d", "ETHOGRAM_STATE": "s", "X": "y"}
    made = child_environment(SLOT, seen | hidden)
    assert seen.items() <= made.items()
    assert not hidden.keys() & made.keys()
    assert made["OMP_NUM_THREADS"] == "2"
    assert made["CUDA_VISIBLE_DEVICES"] == ""


LIGHT = replace(KINDS["generation"], job="tests.workers.science:count")


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    with closing(ForkServer(SLOT)) as made:
        yield made


def test_a_child_answers_at_once_and_leaves_nothing(server: ForkServer, tmp_path: Path) -> None:
    child = Child(LIGHT, server, tmp_path)
    began = time.monotonic()
    child.wait_ready(lambda: False)
    assert time.monotonic() - began < 5
    assert len(str(child.socket)) <= MAX_SOCKET_PATH
    assert child.socket.parent.stat().st_mode & 0o777 == 0o700
    pid = child.pid
    child.close(grace=3)
    assert not child.socket.parent.exists()
    assert not Path(f"/proc/{pid}").exists()


def test_each_job_has_a_process_of_its_own_with_what_was_imported(server: ForkServer, tmp_path: Path) -> None:
    pids = []
    for _ in range(2):
        child = Child(LIGHT, server, tmp_path)
        child.wait_ready(lambda: False)
        assert child.pid is not None
        pids.append(child.pid)
        assert os.getsid(child.pid) == child.pid != os.getsid(psutil.Process(child.pid).ppid())
        assert (psutil.Process(child.pid).cwd(), child.died(0)) == (str(tmp_path), None)
        os.kill(child.pid, signal.SIGKILL)
        assert child.died(5) == -signal.SIGKILL
        child.close(grace=0)
    assert len({*pids}) == 2 and not any(psutil.pid_exists(pid) for pid in pids)


@pytest.mark.parametrize("running", [True, False])
def test_a_fork_server_that_is_killed_takes_its_job_along_and_is_started_again(
    running: bool, server: ForkServer, tmp_path: Path
) -> None:
    child = Child(LIGHT, server, tmp_path)
    child.wait_ready(lambda: False)
    assert child.pid is not None
    job, parent = child.pid, psutil.Process(child.pid).ppid()
    if not running:
        child.close(grace=3)
    os.kill(parent, signal.SIGKILL)
    if running:
        assert child.died(5) == -signal.SIGKILL
        # Its number may be another's by now.
        assert child.pid is None
        child.kill()
        child.close(grace=3)
    wait_for("both to end", lambda: gone(job) and gone(parent))
    again = Child(LIGHT, server, tmp_path)
    again.wait_ready(lambda: False)
    again.close(grace=3)


def test_what_jobs_import_survives_a_fork() -> None:
    """No import of a kind starts threads of its own or touches a device, and a forked process can compute with all
    threads. Those of libraries, which only a slot's environment makes them start, survive it."""
    code = (
        "import _thread, os, time; from ethogram.specs.kinds import KINDS\n"
        "from workers.child import fork_obstacle, load, renew\n"
        "assert all([load(kind.job) for kind in KINDS.values()])\n"
        "import numpy, torch\n"
        "assert not fork_obstacle() and not torch.cuda.is_initialized()\n"
        "if os.fork() == 0:\n"
        "    torch.set_num_threads(2)\n"
        "    for x in (torch.ones(700, 700), numpy.ones((700, 700))): assert float((x @ x)[0, 0]) == 700\n"
        "    os._exit(7)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 7\n"
        "numpy.random.seed(0); first = numpy.random.rand(); numpy.random.seed(0); renew()\n"
        "assert first != numpy.random.rand(), 'two jobs draw the same'\n"
        "_thread.start_new_thread(time.sleep, (0.05,))\n"
        "assert not fork_obstacle(), 'a thread that is about to end'\n"
        "_thread.start_new_thread(time.sleep, (60,))\n"
        "assert fork_obstacle().startswith('started the threads '), 'a thread that Python does not list'"
    )
    environment = child_environment(SLOT, os.environ)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


@pytest.mark.parametrize("in_child", ["time.sleep(60)", "os.kill(os.getpid(), 9)"])
def test_a_fork_that_does_not_end_well_is_an_obstacle(in_child: str) -> None:
    code = (
        "import os, time; from workers import child\n"
        f"os.register_at_fork(after_in_child=lambda: {in_child}); child.TRIAL_SECONDS = 0.2\n"
        "assert child.fork_obstacle() == 'does not survive a fork'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_device_that_is_open_does_not_survive_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_process, "DEVICES", (str(tmp_path / "nvidia"),))
    with (tmp_path / "nvidia0").open("w"):
        assert child_process.fork_obstacle() == f"opened {tmp_path / 'nvidia0'}"


def test_a_fork_that_fails_is_told_and_the_next_job_has_a_new_server(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os; from workers import child\n"
        "def fork(): raise OSError(11, 'Resource temporarily unavailable')\n"
        "os.fork = fork; child.main()"
    )
    server.close()
    with monkeypatch.context() as patch:
        patch.setattr(process, "module_command", lambda *_: [sys.executable, "-c", code])
        child = Child(LIGHT, server, tmp_path)
        with pytest.raises(ChildFailed, match="the process that starts the slot's jobs ended"):
            child.wait_ready(lambda: False)
        assert "Resource temporarily unavailable" in child.last_output()
        child.close(grace=0)
    child = Child(LIGHT, server, tmp_path)
    child.wait_ready(lambda: False)
    child.close(grace=3)


def test_a_process_that_has_no_group_yet_can_be_killed(server: ForkServer, tmp_path: Path) -> None:
    child = Child(LIGHT, server, tmp_path)
    with subprocess.Popen(["sleep", "60"]) as other:
        child.pid = other.pid
        child.kill()
        assert other.wait(5) == -signal.SIGKILL
    child.pid = None
    child.close(grace=0)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize(
    ("tmpdir", "shared", "chosen"),
    [
        ("own", "shared", "own"),
        (None, "shared", "shared"),
        ("nowhere", "shared", "shared"),
        ("long" * 30, "shared", "shared"),
        ("nowhere", "nowhere", "run"),
        ("long" * 30, "file", "run"),
    ],
)
def test_the_socket_is_where_it_can_be(
    tmpdir: str | None,
    shared: str,
    chosen: str,
    *,
    server: ForkServer,
    short_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("own", "run", "shared", "long" * 30):
        (short_folder / name).mkdir()
    (short_folder / "file").touch()
    monkeypatch.delenv("TMPDIR", raising=False)
    if tmpdir is not None:
        monkeypatch.setenv("TMPDIR", str(short_folder / tmpdir))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_folder / "run"))
    monkeypatch.setattr(process, "SHARED_TMP", str(short_folder / shared))
    child = Child(LIGHT, server, short_folder)
    assert child.socket.parent.parent == short_folder / chosen
    child.wait_ready(lambda: False)
    child.close(grace=3)
    assert not any(path.name.startswith("ethogram-") for path in short_folder.glob("*/*"))


def test_no_room_for_a_socket_is_a_crash_that_says_what_to_do(
    short_folder: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = short_folder / ("long" * 30)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(process, "SHARED_TMP", str(short_folder / "nowhere"))
    registry = JobRegistry.open(f"sqlite:///{short_folder / 'registry.db'}")
    job, _ = registry.submit("generation", GenerationSpec(), queue="no-room", max_attempts=1)
    claim = registry.claim_next("no-room", "w", lease_seconds=10)
    assert claim is not None
    config = WorkerSettings(state=short_folder, redis_url=redis_url)
    with closing(Notifier(redis_url)) as notifier:
        metrics = WorkerMetrics(1)
        run_attempt(
            Context(config, KINDS, registry, notifier, metrics, short_folder / "work", threading.Event()),
            claim,
            ForkServer(SLOT),
        )
    error = registry.get(job.id).error
    assert error is not None
    assert "no folder can have the socket of the job's process" in error["message"]
    assert f"{long}: its path is too long for a unix socket" in error["message"]
    assert "nowhere: No such file or directory); set TMPDIR" in error["message"]
    assert not list(long.iterdir())
    registry.close()


def test_scratch_of_dead_workers_is_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from services.runtime import scratch\n"
        "with scratch.folder(pathlib.Path(sys.argv[1]), 'dead') as own: (own / 'att').mkdir(); os._exit(0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert len(list(tmp_path.iterdir())) == 1
    with scratch.folder(tmp_path, "first") as first:
        assert list(tmp_path.iterdir()) == [first]
        with scratch.folder(tmp_path, "second") as second:
            assert {first, second} == set(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_exits_are_told_in_words() -> None:
    assert "SIGKILL; the machine may be out of memory" in describe_exit(-9)
    assert "SIGSEGV" in describe_exit(-11)
    assert "status 3" in describe_exit(3)


def test_the_worker_never_loads_torch() -> None:
    code = "import sys, workers.app, workers.reconciler; print([m for m in ('torch', 'datasets') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def test_after_an_outage_all_attempts_have_their_whole_lease(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = JobRegistry.open(f"sqlite:///{tmp_path / 'registry.db'}")
    bell, notifier, clock = Bell(redis_url), Notifier(redis_url), Clock()
    job, _ = registry.submit("generation", GenerationSpec(), queue="outage")
    registry.claim_next("outage", "w", lease_seconds=10)
    reconciler = Reconciler(registry, bell, notifier, ReconcilerMetrics(), clock)

    def look(times: int) -> JobState:
        for _ in range(times):
            clock.now += 1
            reconciler.look()
        return registry.get(job.id).state

    def read_only(*_: object) -> None:
        raise Unavailable("it cannot be written")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "release", read_only)
        with pytest.raises(Unavailable):
            look(12)
    assert look(10) is JobState.RUNNING
    assert look(3) is JobState.QUEUED
    bell.close()
    notifier.close()
    registry.close()
