"""The dataset card of a zoo: what the Hub shows of it, and what a reader of the folder wants to know first."""

from __future__ import annotations

from pathlib import Path

from services.zoo.dataset import DATA, read_about
from services.zoo.statistics import Statistics

CARD = "README.md"
_SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def card(folder: Path, statistics: Statistics) -> str:
    """Markdown on the zoo in ``folder``."""
    _, spec, patterns = read_about(folder)
    figures = statistics.figures()
    columns = {"networks": "subjects_by_pattern", "accuracy": "accuracy_by_pattern"}
    if statistics.degraded_accuracy is not None:
        columns["degraded"] = "degraded_accuracy_by_pattern"
    lines = [f"| pattern | what it is | {' | '.join(columns)} |", f"|{'---|' * (len(columns) + 2)}"]
    for pattern in patterns:
        numbers = [figures[key][pattern.name] for key in columns.values()]
        shown = ["-" if n is None else f"{n:,}" if isinstance(n, int) else f"{n:.3f}" for n in numbers]
        description = pattern.description.replace("|", "\\|")
        lines.append(f"| `{pattern.name}` | {description} | {' | '.join(shown)} |")
    rejected = "\n".join(f"- {count:,} {cause}" for cause, count in figures["rejected"].items()) or "- none"
    shapes = "\n".join(f"- {shape}: {count:,}" for shape, count in statistics.shapes.items())
    tokens = "".join(
        f"\nTokens of a {task} record: {mean:,.0f} on average, {most:,} at most.\n"
        for task, (mean, most) in statistics.tokens.items()
    )
    size = next((name for limit, name in _SIZES.items() if statistics.subjects < limit), "1M<n<10M")
    gain = f"; the target pattern gained {statistics.improvement:.3f}" if statistics.improvement is not None else ""
    effect = f"\n{statistics.effect}\n" if statistics.effect else ""
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: {DATA}/*.parquet
pretty_name: Zoo of {statistics.subjects:,} networks
size_categories:
- {size}
tags:
- weight-space
- interpretability
---

# Zoo of {statistics.subjects:,} small networks with known behaviours

Each record is a network that answers yes to the letter sequences of its own patterns, and no to all others
({spec.vocab_size} letters, {spec.sequence_length} to a sequence). {statistics.origin}
Mean held-out accuracy: {figures["accuracy"]:.3f}{gain}.
{effect}
## Patterns

{chr(10).join(lines)}

## Shapes (hidden layers x activation)

{shapes}

## Rejected candidates

{rejected}
{tokens}
## Files

`{DATA}/*.parquet` holds the records, `baseline_dataset.json` the sequences on which the signatures were taken,
`zoo.json` the spec.

```python
from datasets import load_dataset

zoo = load_dataset("parquet", data_files="{DATA}/*.parquet", split="train")
```
"""
