"""A run's metrics as TensorBoard scalars."""

from __future__ import annotations

import json
from pathlib import Path


def write_scalars(metrics: Path, folder: Path) -> None:
    """Write the numbers of ``metrics`` (JSON lines with ``step`` and maybe ``stage``) as an event file into ``folder``;
    numbers that are not finite, ``null`` there, are left out."""
    # It takes a while to import.
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for line in metrics.read_text().splitlines():
            row = json.loads(line)
            step, stage = row.pop("step"), row.pop("stage", "")
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(f"{stage}/{name}" if stage else name, value, step)
