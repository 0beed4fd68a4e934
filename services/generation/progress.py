"""How far the generation of a zoo is, as checkpoints keep it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from services.runtime.reading import reading_checkpoint
from services.zoo.dataset import FORMAT, OLD_SPLIT_FORMAT

PATIENCE = 512
"""Candidates after which a hopeless spec is given up."""
MIN_ACCEPTED = 0.02
"""Share of candidates below which a spec counts as hopeless."""
_FILE = "progress.json"


@dataclass
class Progress:
    """How many candidates were accepted, and why others were not."""

    next_block: int = 0
    accepted: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    blocks: list[tuple[int, dict[str, int]]] = field(default_factory=list)
    """Accepted and rejected of each block."""

    def add(self, accepted: int, rejected: dict[str, int]) -> None:
        """Count one more block."""
        self.next_block += 1
        self.blocks.append((accepted, rejected))
        self.accepted += accepted
        self.rejected.update(rejected)

    @property
    def candidates(self) -> int:
        """How many were checked."""
        return self.accepted + sum(self.rejected.values())

    @property
    def acceptance(self) -> float:
        """Expected share of candidates that are accepted: of those so far, or 1 where none was."""
        return self.accepted / max(self.candidates, 1) or 1.0

    def check_hope(self, spec: GenerationSpec, block_size: int) -> None:
        """Raise :class:`InvalidInput` when hardly any of a good number of candidates pass."""
        if self.candidates < max(PATIENCE, block_size) or self.accepted >= self.candidates * MIN_ACCEPTED:
            return
        causes = ", ".join(f"{cause}: {count}" for cause, count in self.rejected.most_common(4))
        field, goal = "spec.staged", "pass the checks"
        advice = (
            "lower min_degradation_threshold, min_specificity or min_accuracy, flip more labels, or take more epochs"
        )
        if spec.staged is None:
            field, goal = "spec.min_accuracy", f"reach {spec.gate}"
            advice = "lower it, train for more steps, use wider subjects or fewer patterns"
        text = f"only {self.accepted} of {self.candidates} candidates {goal} ({causes}); {advice}"
        raise InvalidInput.field(field, text)

    def save(self, folder: Path) -> None:
        """Write the progress into the checkpoint ``folder``."""
        (folder / _FILE).write_text(json.dumps(vars(self) | {"format": FORMAT}), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Progress:
        """Read the checkpoint ``folder``. Raises :class:`InvalidInput` for one of an earlier version, whose subjects
        were trained on another split."""
        with reading_checkpoint():
            state = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            rejected = Counter(state["rejected"])
        if state.pop("format", OLD_SPLIT_FORMAT) != FORMAT:
            text = "was written by another version, which split sequences differently; make the zoo anew"
            raise InvalidInput.field("checkpoint", text)
        with reading_checkpoint():
            return cls(**state | {"rejected": rejected})
