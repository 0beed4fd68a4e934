"""Buckets of a zoo trained side by side, on as many cores as there are: on threads, or in this process and others.

In one process Python's lock holds them up, and processes take some seconds to start. Not :mod:`multiprocessing`: its
children begin by running the user's script again.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

import pyarrow
import torch

from ethogram.platform.process import module_command, server_environment
from ethogram.specs.generation import REGISTERED
from services.generation.buckets import Block, BucketTrainer
from services.generation.sampler import PatternDatasetSampler

_CAUSES = b"causes"
WORTH_PROCESSES = 8.0
"""Seconds of one core's work from which on processes are worth their start."""
# What a core takes of a training step, in seconds: for each sequence and parameter, and for each sequence and neuron.
_PER_PARAMETER, _PER_NEURON = 1.5e-10, 4e-9

Submit = Callable[[int, int], Future[Block]]
"""Trains a bucket: given the number of the block, and its position among the block's buckets."""


@contextmanager
def side_by_side(trainer: BucketTrainer, networks: int, workers: int) -> Iterator[Submit]:
    """A way to train ``workers`` buckets at a time of about ``networks`` networks, each on one core: products this
    small lose more in synchronisation than they gain. On leaving, what is in training ends at once."""
    seconds = networks * _seconds_per_network(trainer)
    if workers > 1 and seconds > WORTH_PROCESSES and not REGISTERED.intersection(trainer.names):
        with closing(Workers(trainer, workers - 1, in_process=True)) as processes:
            yield processes.submit
        return
    with threads(trainer, workers) as pool:
        yield lambda block, part: pool.submit(trainer.train, trainer.buckets(block)[part])


@contextmanager
def threads(trainer: BucketTrainer, count: int) -> Iterator[ThreadPoolExecutor]:
    """``count`` threads that train, each on one core. On leaving, what is in training ends at once."""
    stop = trainer.subject_trainer.stop
    stop.clear()
    pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def _seconds_per_network(trainer: BucketTrainer) -> float:
    """About how long one core trains a candidate."""
    spec = trainer.spec
    widest = trainer.subject_trainer.shape._replace(hidden=(spec.subject.neurons.max,) * spec.subject.layers.max)
    if spec.staged is None:
        branches = 3 * spec.counterfactual.steps if spec.counterfactual is not None else 0
        sequences = (spec.training.steps + branches) * spec.training.batch_size
    else:
        sequences = (spec.staged.epochs + spec.staged.improvement_epochs) * spec.staged.examples
    return sequences * (widest.size * _PER_PARAMETER + widest.neurons * _PER_NEURON)


class Workers:
    """``count`` processes that train what ``trainer`` does, each on one core; with ``in_process``, a thread of this
    process works beside them, and need not wait for a start. :meth:`close` ends them."""

    def __init__(self, trainer: BucketTrainer, count: int, *, in_process: bool = False) -> None:
        self._trainer, self._in_process_is_free = trainer, in_process
        trainer.subject_trainer.stop.clear()
        # Drawing the pools takes about as long as a process takes to start.
        self._task = pickle.dumps(trainer.sampler)
        self._lock, self._closed = threading.Lock(), False
        self._processes: list[subprocess.Popen[bytes]] = []
        # Each thread of the pool has a process; with `in_process`, the first has none.
        self._thread = threading.local()
        self._pool = ThreadPoolExecutor(count + in_process, "bucket", self._start)

    def submit(self, block: int, part: int) -> Future[Block]:
        """Train and check one bucket of a block."""
        return self._pool.submit(self._ask, block, part)

    def close(self) -> None:
        """End them at once."""
        self._trainer.subject_trainer.stop.set()
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def _ask(self, block: int, part: int) -> Block:
        process: subprocess.Popen[bytes] | None = self._thread.process
        if process is None:
            return self._trainer.train(self._trainer.buckets(block)[part])
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(self._thread.unsent + json.dumps([block, part]).encode() + b"\n")
            process.stdin.flush()
            self._thread.unsent = b""
            with pyarrow.ipc.open_stream(process.stdout) as stream:
                table = stream.read_all()
            return Block(table.replace_schema_metadata(), json.loads(table.schema.metadata[_CAUSES]))
        except (OSError, ValueError):
            raise RuntimeError(f"a training process ended by itself ({process.wait(10)})") from None

    def _start(self) -> None:
        """Start the process of this thread, or have it train itself."""
        self._thread.process, self._thread.unsent = None, self._task
        with self._lock:
            in_process, self._in_process_is_free = self._in_process_is_free, False
        if in_process:
            torch.set_num_threads(1)
            return
        process = subprocess.Popen(
            module_command("services.generation.workers"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=server_environment() | {"OMP_NUM_THREADS": "1"},
            # Ctrl-C reaches the process that started this one, which ends it then.
            start_new_session=True,
        )
        with self._lock:
            self._processes.append(process)
            if self._closed:
                process.kill()
        self._thread.process = process


def main() -> None:
    """Answer requests for buckets from standard input, until that ends or the parent dies."""
    threading.Thread(target=_exit_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print must not end up among the answers.
    os.dup2(2, 1)
    torch.set_num_threads(1)
    requests = sys.stdin.buffer
    # Of the parent, and nobody else's.
    sampler: PatternDatasetSampler = pickle.load(requests)  # noqa: S301
    trainer = BucketTrainer(sampler.spec, sampler=sampler)
    for line in requests:
        block, part = json.loads(line)
        answer = trainer.train(trainer.buckets(block)[part])
        table = answer.table.replace_schema_metadata({_CAUSES: json.dumps(answer.causes)})
        try:
            with pyarrow.ipc.new_stream(answers, table.schema) as stream:
                stream.write_table(table)
            answers.flush()
        except BrokenPipeError:
            # The parent has died; at exit, Python would try to flush once more.
            os._exit(1)


def _exit_with(parent: int) -> None:
    """Exit when ``parent`` has ended: nobody waits for what is being trained."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
