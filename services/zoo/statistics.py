"""What a zoo holds, in numbers: read back from its records, a shard at a time."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from services.zoo.dataset import matrix, read_about, read_records

Numbers = NDArray[np.float64]


@dataclass
class Statistics:
    """Figures of one zoo."""

    strata: list[str]
    """The patterns, then ``none``."""
    subjects: int
    candidates: int
    """Candidates that were trained; the last of them may be neither accepted nor rejected."""
    rejected: dict[str, int]
    """Candidates that were not accepted, by cause."""
    origin: str
    """Where the subjects come from, as a sentence."""
    accuracy: Numbers
    """Mean held-out accuracy by stratum ``[patterns + 1]``; NaN of one without sequences."""
    degraded_accuracy: Numbers | None
    """The same after the first of two stages."""
    together: NDArray[np.int64]
    """How many subjects have both of two patterns ``[patterns, patterns]``; on the diagonal, how many have one."""
    shapes: dict[str, int]
    """Subjects by hidden layers and activation."""
    improvement: float | None
    """Mean gain on the target pattern, over the subjects of which it is known; None where it is of none."""
    tokens: dict[str, tuple[float, int]]
    """Of each task whose tokens were counted: mean and most of a record."""
    twins: dict[str, Any] | None
    """How staged candidates differ from twins that were trained without corruption, as in ``zoo.json``."""

    @classmethod
    def of(cls, folder: Path) -> Statistics:
        """Statistics of the zoo in ``folder``."""
        about, spec, patterns = read_about(folder)
        names = [pattern.name for pattern in patterns]
        staged = spec.staged is not None
        stages = ["accuracy", "degraded_accuracy"] if staged else ["accuracy"]
        sums = {name: np.zeros(len(names) + 1) for name in stages}
        measured = {name: np.zeros(len(names) + 1) for name in stages}
        counted = spec.tasks if spec.format is not None and spec.format.tokenizer is not None else []
        tokens = {task: (0, 0) for task in counted}
        subjects, shapes, gains = 0, Counter[str](), list[Numbers]()
        together = np.zeros((len(names), len(names)), np.int64)
        columns = ["patterns", "layers", "activation", *sums, *(f"{task}_tokens" for task in counted)]
        for table in read_records(folder, [*columns, "improvement"] if staged else columns):
            subjects += len(table)
            labels = np.array([[name in row for name in names] for row in table["patterns"].to_pylist()], np.int64)
            together += labels.T @ labels
            for name, total in sums.items():
                values = matrix(table, name, len(names) + 1).double()
                total += values.nansum(0).numpy()
                measured[name] += (~values.isnan()).sum(0).numpy()
            shapes.update(f"{layers} x {of}" for layers, of in zip(table["layers"], table["activation"], strict=True))
            for task, (count, most) in tokens.items():
                numbers = table[f"{task}_tokens"].to_pylist()
                tokens[task] = (count + sum(numbers), max([most, *numbers]))
            if staged:
                gains.append(table["improvement"].to_numpy())
        known = np.concatenate([gain[~np.isnan(gain)] for gain in gains]) if gains else np.zeros(0)
        # NaN of a stratum without sequences.
        with np.errstate(invalid="ignore"):
            means = {name: total / measured[name] for name, total in sums.items()}
        return cls(
            [*names, "none"],
            subjects,
            about.get("candidates", subjects),
            about.get("rejected", {}),
            _origin(about, subjects),
            means["accuracy"],
            means.get("degraded_accuracy"),
            together,
            dict(sorted(shapes.items())),
            sum(known.tolist()) / len(known) if len(known) else None,
            {task: (count / subjects, most) for task, (count, most) in tokens.items()},
            about.get("twins"),
        )

    @property
    def effect(self) -> str:
        """What corruption does, in words; nothing where there are no twins."""
        if self.twins is None:
            return ""
        degraded, improvement = (_interval(self.twins[name]) for name in ("degraded_accuracy", "improvement"))
        # Not in zoos of earlier versions.
        elsewhere = self.twins.get("degraded_accuracy_elsewhere", {"mean": None})
        other_strata = ""
        if elsewhere["mean"] is not None:
            other_strata = f" Elsewhere it changed the accuracy after the first stage by {_interval(elsewhere)}."
        return (
            f"The first {self.twins['candidates']:,} candidates, accepted or not, were trained once more without "
            "corruption, from the same start and in the same order. On the target pattern, corruption changed the "
            f"accuracy after the first stage by {degraded} and the gain of the second by {improvement}, held-out and "
            f"with 95 % confidence intervals.{other_strata} {self.twins['accepted']:.0%} of these candidates pass the "
            f"checks, and {self.twins['twins_accepted']:.0%} of their twins."
        )

    def figures(self) -> dict[str, Any]:
        """The figures of a job's result."""
        figures: dict[str, Any] = {
            "subjects": self.subjects,
            "candidates": self.candidates,
            "rejected": dict(sorted(self.rejected.items(), key=lambda item: -item[1])),
            "accuracy": round(float(np.nanmean(self.accuracy)), 4),
            "accuracy_by_pattern": _rounded(self.strata, self.accuracy),
            "subjects_by_pattern": dict(zip(self.strata, np.diag(self.together).tolist(), strict=False)),
        }
        if self.degraded_accuracy is not None:
            figures["degraded_accuracy"] = round(float(np.nanmean(self.degraded_accuracy)), 4)
            figures["degraded_accuracy_by_pattern"] = _rounded(self.strata, self.degraded_accuracy)
            figures["improvement"] = None if self.improvement is None else round(self.improvement, 4)
        if self.twins is not None:
            figures["twins"] = self.twins
        if self.tokens:
            tokens = self.tokens.items()
            figures["tokens"] = {task: {"mean": round(mean, 1), "max": most} for task, (mean, most) in tokens}
        return figures


def _origin(about: dict[str, Any], subjects: int) -> str:
    if "imported" in about:
        return f"They come from another dataset ({about['imported']}); signatures and accuracies were taken anew."
    candidates = about.get("candidates", subjects)
    accepted = candidates - sum(about.get("rejected", {}).values())
    kept = "all of these" if accepted == subjects else f"the first {subjects:,} of these"
    return f"{candidates:,} candidates were trained, {accepted:,} passed the checks, and {kept} are kept."


def _interval(effect: dict[str, float | None]) -> str:
    mean, *ends = (effect[name] for name in ("mean", "low", "high"))
    text = f"{mean:+.3f}"
    return text if None in ends else f"{text} ({ends[0]:+.3f} to {ends[1]:+.3f})"


def _rounded(names: list[str], values: Numbers) -> dict[str, float | None]:
    rounded = [None if math.isnan(value) else round(value, 4) for value in values.tolist()]
    return dict(zip(names, rounded, strict=True))
