"""A process of a test: claims and finishes jobs with a few threads until there are none, and prints what it had."""

from __future__ import annotations

import sys
import threading

from services.jobs.registry import JobRegistry


def main(url: str, threads: int) -> None:
    """Print one job id per claim, then the ids of the succeeded."""
    registry = JobRegistry.open(url)
    claimed: list[str] = []

    def work() -> None:
        while (claim := registry.claim_next("cpu", "w", 10)) is not None:
            claimed.append(claim.job.id)
            registry.append_events(claim.attempt, [("log", {"message": "hello"})])
            registry.succeed(claim.attempt, {})

    sys.stdin.readline()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.stdout.write("\n".join(claimed))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
