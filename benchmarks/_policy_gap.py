"""The default routing policy: how long it trains, and how far its greedy tours are from a solver's."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ethogram.specs.clt import PolicySpec
from services.clt.policy.decode import greedy
from services.clt.policy.evaluate import evaluation_instances
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.train import train_policy
from services.clt.policy.tsp import gaps, lengths, reference
from services.runtime.console import ConsoleRun

INSTANCES = 1000
_CHECKPOINT_SECONDS = 30.0


class PolicyGap(NamedTuple):
    """What training came to."""

    gap: float
    """Mean of how much longer greedy tours, one per instance, are than the solver's, as a share."""
    seconds: float
    """That training took, over all its parts if it was interrupted."""


class _Timed(ConsoleRun):
    """Keeps the seconds of training with each checkpoint."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, checkpoint_seconds=_CHECKPOINT_SECONDS)
        before = 0.0 if self.resume is None else float(json.loads((self.resume / "seconds.json").read_text()))
        self._begun = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Of training so far."""
        return time.perf_counter() - self._begun

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        def timed(folder: Path) -> None:
            write(folder)
            (folder / "seconds.json").write_text(json.dumps(self.seconds))

        super().checkpoint(step, timed)


def policy_gap(folder: Path, progress: Callable[[str], None], spec: PolicySpec | None = None) -> PolicyGap:
    """Train the policy of the default spec below ``folder``, or take the one that is there, and compare it with a
    solver over 1,000 instances. What was interrupted goes on from its last checkpoint."""
    spec = (spec or PolicySpec()).model_copy(update={"evaluation": INSTANCES})
    about, kept = spec.model_dump(mode="json"), folder / "policy"
    result = folder / "trained.json"
    if not result.exists() or json.loads(result.read_text())["spec"] != about:
        progress(f"training a policy: {spec.training.steps} steps of {spec.training.batch_size} instances")
        with (run := _Timed(folder)):
            policy = train_policy(spec, run)
            seconds = run.seconds
        policy.save(kept, {"spec": about})
        result.write_text(json.dumps({"spec": about, "seconds": seconds}))
    progress(f"comparing its tours of {INSTANCES} instances with the solver's")
    cities = evaluation_instances(spec)
    tours = greedy(AttentionPolicy.load(kept), cities)
    gap = float(gaps(lengths(cities, tours), lengths(cities, reference(cities))).mean())
    return PolicyGap(gap, float(json.loads(result.read_text())["seconds"]))
