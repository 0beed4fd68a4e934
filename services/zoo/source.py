"""Open zoos in either form (ours, or records with JSON text), from a folder or the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError

from ethogram.errors import InvalidInput
from ethogram.specs.base import HubSpec
from services.artifacts.hub import fetch
from services.runtime.run import Run
from services.zoo.dataset import ABOUT, BASELINE, FORMER, Zoo, read_about, with_probes
from services.zoo.json_records import SUFFIXES, JsonRecords, files_in
from services.zoo.meanings import PATTERNS
from services.zoo.pools import JUDGED, JUDGED_NONE, Evaluation, probes
from services.zoo.subjects import encode, flatten
from services.zoo.universe import Universe


def locate(source: str, field: str) -> Path:
    """The file or folder ``source``; where there is none, the dataset ``owner/name`` of the Hugging Face Hub, in a
    folder of the Hub's cache. ``field``: where the source was named, for error messages.

    Raises :class:`InvalidInput` for what is neither or may not be read, and :class:`ethogram.errors.Unavailable`
    without a Hub.
    """
    path = Path(source)
    if path.exists():
        return path
    try:
        repo = HubSpec(repo="" if path.suffix in SUFFIXES else source).repo
    except ValidationError:
        text = f"{source} is no file or folder here, and no name of a dataset on the Hub, e.g. me/my-zoo"
        raise InvalidInput.field(field, text) from None
    include = [*(f"*{suffix}" for suffix in SUFFIXES), ABOUT, BASELINE, PATTERNS]
    # The name may be a misspelt folder.
    return fetch(repo, "dataset", include, field=field, described=f"{source}, which is no file or folder here")


def open_zoo(source: Path, run: Run | None = None) -> Zoo:
    """The zoo in ``source``: a folder in our own form, or records in the JSON-string form, a file or a folder of them
    (see :mod:`services.zoo.json_records`). Raises :class:`InvalidInput` naming what is missing or wrong."""
    run = run or Run()
    if (source / ABOUT).is_file():
        about, _, _ = read_about(source)
        if about["format"] == FORMER and "imported" not in about:
            text = "an earlier version split sequences differently: a few that are held out now were trained on"
            run.log(f"{ABOUT}: {text}; make the zoo again for figures that hold", "warning")
        return Zoo.load(source)
    if not files_in(source):
        raise InvalidInput.field("zoo", f"{source} has neither {ABOUT} nor .parquet or .jsonl files")
    records = JsonRecords(source, run=run)
    # The rest is as an import to our own form has it: accuracies are measured, and missing probes drawn.
    spec = records.spec
    universe = Universe(spec.vocab_size, spec.sequence_length, records.patterns)
    universe.check()
    if records.baseline is not None:
        spec, chosen = with_probes(spec, records.baseline)
    else:
        chosen = probes(universe, spec.signature.probes, spec.seed)
    evaluation = Evaluation.build(universe, JUDGED, JUDGED_NONE, seed=spec.seed)
    run.stage("judge", len(records), "records")
    indices, labels, accuracy, networks = [], [], [], []
    for done, (index, record) in enumerate(records, 1):
        selected = torch.tensor([[pattern.name in record.patterns for pattern in records.patterns]])
        questions = encode(record.shape, evaluation.sequences)
        indices.append(index)
        labels.append(selected)
        accuracy.append(evaluation.accuracy(record.improved, questions, record.shape.activation, selected))
        networks.append((record.shape, flatten(record.improved)[0]))
        run.advance(done)
    return Zoo.of_shapes(
        spec, torch.tensor(indices), networks, labels=torch.cat(labels), accuracy=torch.cat(accuracy), probes=chosen
    )
