"""Processes that train buckets of a zoo side by side. In one process Python's lock would hold them up.

Not :mod:`multiprocessing`: its children begin by running the user's script again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import pyarrow
import torch

from ethogram.specs.generation import GenerationSpec
from services.generation.pipeline import Block, DatasetGenerationPipeline

_ROOT = Path(__file__).resolve().parents[2]


class Workers:
    """``count`` processes that work on one spec, each on one core. Close it, and they are gone."""

    def __init__(self, spec: GenerationSpec, count: int, baseline: Path | None = None) -> None:
        self._task = json.dumps([spec.model_dump(mode="json"), str(baseline) if baseline is not None else None])
        self._own = threading.local()
        self._lock, self._closed = threading.Lock(), False
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="bucket")

    def submit(self, block: int, part: int) -> Future[Block]:
        """Train and judge one bucket of a block."""
        return self._pool.submit(self._ask, block, part)

    def close(self) -> None:
        """End them at once."""
        with self._lock:
            self._closed = True
            for process in self._processes:
                process.kill()
        self._pool.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def _ask(self, block: int, part: int) -> Block:
        process = getattr(self._own, "process", None)
        if process is None:
            process = self._own.process = self._start()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps([block, part]).encode() + b"\n")
            process.stdin.flush()
            head = json.loads(process.stdout.readline())
            with pyarrow.ipc.open_stream(process.stdout.read(head["bytes"])) as stream:
                return Block(stream.read_all(), head["causes"])
        except (OSError, ValueError):
            raise RuntimeError(f"a training process ended by itself ({process.wait(10)})") from None

    def _start(self) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        process = subprocess.Popen(
            [sys.executable, "-m", "services.generation.workers"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            # Ctrl-C is for who began this; it ends them then.
            start_new_session=True,
        )
        with self._lock:
            self._processes.append(process)
            if self._closed:
                process.kill()
        assert process.stdin is not None
        process.stdin.write(self._task.encode() + b"\n")
        process.stdin.flush()
        return process


def main() -> None:
    """One of the processes. It leaves when its standard input ends, or its parent dies."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print is no answer.
    os.dup2(2, 1)
    torch.set_num_threads(1)
    questions: IO[bytes] = sys.stdin.buffer
    spec, baseline = json.loads(questions.readline())
    pipeline = DatasetGenerationPipeline(
        GenerationSpec.model_validate(spec), baseline=None if baseline is None else Path(baseline)
    )
    for line in questions:
        number, part = json.loads(line)
        block = pipeline.bucket(pipeline.buckets(number)[part])
        sink = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, block.table.schema) as stream:
            stream.write_table(block.table)
        data: Any = sink.getvalue()
        try:
            answers.write(json.dumps({"causes": block.causes, "bytes": data.size}).encode() + b"\n")
            answers.write(data)
            answers.flush()
        except BrokenPipeError:
            # The parent has died; at exit, Python would try to flush once more.
            os._exit(1)


def _leave_with(parent: int) -> None:
    """What is being trained is nobody's any more."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
