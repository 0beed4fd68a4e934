"""How fast a zoo is made, beside a plain PyTorch loop, and whether it is right.

    make bench BENCH=generation
    make bench BENCH=generation ARGS="--part speed --records 500"

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import _kit
from benchmarks._kit import Figures, say
from benchmarks._plain import plain_loop
from ethogram.bench import Figure
from ethogram.cli.files import read_mapping
from ethogram.specs.generation import GenerationSpec
from services.generation.buckets import BucketTrainer
from services.generation.data import Candidates, Examples
from services.generation.pipeline import DatasetGenerationPipeline, generate
from services.generation.sampler import PatternDatasetSampler
from services.runtime.console import CHECKPOINT, ConsoleRun
from services.zoo.dataset import Zoo, read_records
from services.zoo.oracle import canonical, recover
from services.zoo.subjects import activations
from services.zoo.universe import HELD_OUT, SELECTION, TRAIN, VALIDATION
from tests.zoo.oracles import ORACLES

EXAMPLE = Path("examples/staged.yaml")
KILLS = 10


def example(**changes: Any) -> GenerationSpec:
    """The example preset."""
    return GenerationSpec.model_validate(read_mapping(EXAMPLE, "spec") | changes)


def small(**changes: Any) -> GenerationSpec:
    """The small preset: five layers of eight neurons, 345 parameters."""
    subject = example().subject.model_dump() | {"layers": 5, "neurons": 8}
    return example(vocab_size=10, sequence_length=5, subject=subject, **changes)


def speed(arguments: argparse.Namespace) -> Figures:
    """Candidates a second beside the plain loop's, both presets; and held-out accuracy beside the plain loop's.

    Neither time has the drawing of pools in it. Ours has the start of processes, all files, and the twins, which count
    as candidates; the plain loop's is that of training, checking and describing its candidates alone.
    """
    figures: Figures = {}
    records = arguments.records
    for name, spec, tried, bar in (
        ("plain_loop_ratio", example(subjects=records), arguments.candidates, 5.0),
        ("small_preset_ratio", small(subjects=records), arguments.candidates // 2, 30.0),
    ):
        with tempfile.TemporaryDirectory() as folder:
            zoo, pipeline = Path(folder) / "zoo", DatasetGenerationPipeline(spec)
            began = time.monotonic()
            made = pipeline.run(zoo)
            seconds = time.monotonic() - began
            tables = [table.to_pylist() for table in read_records(zoo, ["index", "accuracy"])]
        ours = {row["index"]: row["accuracy"] for table in tables for row in table}
        candidates, twins = made["candidates"], 2 * made["twins"]["candidates"]
        rate, accepted = (candidates + twins) / seconds, 1 - sum(made["rejected"].values()) / candidates
        say(f"{name}: {seconds:.0f} s for {candidates} candidates, and {twins} trained for the twins")
        say(f"{rate:.1f} candidates/s, {records / seconds:.1f} records/s, {accepted:.1%} accepted {made['rejected']}")
        plain_seconds, plain = plain_loop(spec, tried)
        say(f"plain loop: {tried / plain_seconds:.1f} candidates/s, {len(plain) / tried:.1%} accepted")
        figures[name] = Figure(rate, ">=", bar, tried / plain_seconds, judged="ratio")
        if name == "plain_loop_ratio":
            figures["records_per_s"] = Figure(records / seconds, ">=", 40.0)
            figures["acceptance"] = Figure(accepted)
            figures["bmm_fraction"] = Figure(_bmm_fraction(BucketTrainer(spec)), ">=", 0.4)
            both = [record for record in plain if record.candidate in ours]
            mean = statistics.fmean(statistics.fmean(ours[record.candidate]) for record in both)
            plain_mean = statistics.fmean(statistics.fmean(record.accuracy) for record in both)
            say(f"held-out accuracy: {mean:.4f}, plain loop {plain_mean:.4f}; of {len(both)} that both accepted")
            figures["accuracy_difference"] = Figure(mean - plain_mean, ">=", -0.005)
    return figures


def _bmm_fraction(trainer: BucketTrainer) -> float:
    """Of the time that a block takes on one core, what ``torch.bmm`` alone takes for the same products, less the share
    of their operations that only padding to the widest needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    products, whole, alone = defaultdict[tuple[Any, ...], float](float), 0.0, 0.0
    original = torch.bmm

    def noted(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        products[a.shape, a.stride(), b.shape, b.stride()] += needed((*a.shape[1:], b.shape[2]), bucket.neurons)
        return original(a, b, out=out) if out is not None else original(a, b)

    for bucket in trainer.buckets(0):
        began = time.perf_counter()
        trainer.train(bucket)
        whole += time.perf_counter() - began
        torch.bmm = noted  # type: ignore[assignment]
        try:
            trainer.train(bucket)
        finally:
            torch.bmm = original
    for (a_shape, a_stride, b_shape, b_stride), times in products.items():
        a = torch.empty_strided(a_shape, a_stride).normal_()
        b = torch.empty_strided(b_shape, b_stride).normal_()
        c = torch.bmm(a, b)
        began = time.perf_counter()
        for _ in range(5):
            torch.bmm(a, b, out=c)
        alone += (time.perf_counter() - began) / 5 * times
    torch.set_num_threads(threads)
    return alone / whole


def needed(sizes: Sequence[int], widths: Tensor) -> float:
    """Of the operations of a product of ``sizes`` in a bucket of networks of ``widths`` (int64 ``[models]``), which are
    padded to the widest, the share that these networks need."""
    widest, share = int(widths.max()), torch.ones(len(widths))
    for size in sizes:
        # Also with a row of ones for the biases.
        if size in (widest, widest + 1):
            share *= (widths + size - widest) / size
    return float(share.mean())


def truth(_: argparse.Namespace) -> Figures:
    """Labels against predicates in plain Python over the whole universe, splits, and weights out of signatures."""
    sampler = PatternDatasetSampler(example())
    universe, wrong = sampler.universe, 0
    rows = [tuple(row) for row in universe.sequences.tolist()]
    for column, pattern in enumerate(sampler.patterns):
        expected = torch.tensor([ORACLES[pattern.kind](row) for row in rows])
        wrong += int((universe.membership[:, column] != expected).sum())
        say(f"{pattern.name}: {int(expected.sum())} of {len(rows)} sequences")
    row_of = {row: number for number, row in enumerate(rows)}

    def numbers(sequences: Tensor) -> list[int]:
        """Where ``sequences`` are in the universe."""
        return [row_of[tuple(sequence)] for sequence in sequences.tolist()]

    candidates = Candidates.draw(sampler.spec, torch.arange(64), len(sampler.patterns))
    examples = Examples.draw(sampler.spec.seed, "examples", candidates, 512, sampler.train)
    for i in range(64):
        matches = universe.membership[numbers(sampler.train.sequences[examples.rows[i]])]
        wrong += int((examples.labels[i] != (matches & candidates.selected[i]).any(1)).sum())
    sequences = {
        TRAIN: sampler.train.sequences,
        VALIDATION: sampler.baseline.sequences,
        SELECTION: sampler.selection.sequences,
        HELD_OUT: sampler.evaluation.sequences,
    }
    used = {split: set(numbers(rows)) for split, rows in sequences.items()}
    overlap = sum(len(one & other) for one, other in combinations(used.values(), 2))
    overlap += sum(int(universe.split[i]) != split for split, found in used.items() for i in found)
    return {
        "mislabelled": Figure(wrong, "==", 0),
        "overlap": Figure(overlap, "==", 0),
        "oracle_error": Figure(_oracle_error(generate(GenerationSpec(subjects=64))), "<=", 1e-3),
    }


def _oracle_error(zoo: Zoo) -> float:
    """Largest relative error of a layer's weights, found from raw signatures; of what the probes show at all."""
    inputs, architecture = zoo.probe_inputs, zoo.architecture
    found = canonical(recover(zoo.signatures.transpose(1, 2), inputs, architecture), architecture)
    layers, worst = activations(zoo.params, inputs, architecture.activation), 0.0
    for name, true in canonical(zoo.params, architecture).items():
        layer = int(name.split(".")[1])
        seen = torch.ones_like(true, dtype=torch.bool)
        if layer > 0:
            # A neuron that no probe wakes passes nothing on; one that is never off cannot be told from the bias.
            awake = (layers[layer - 1] > 0).sum(1)
            lively = (awake > 2).unsqueeze(1)
            seen = lively.expand_as(true) if true.dim() == 3 else (awake.amin(1, keepdim=True) > 2).expand_as(true)
        difference = ((found[name] - true) * seen).flatten(1).norm(dim=1)
        size = (true * seen).flatten(1).norm(dim=1).clamp(min=1e-6)
        worst = max(worst, float((difference / size).max()))
    return worst


def generate_into(spec: GenerationSpec, folder: Path, checkpoints: Path | None = None) -> int:
    """In a process of its own: make a zoo, with a checkpoint after each block. Returns the peak memory, KiB."""
    with ConsoleRun(checkpoints, checkpoint_seconds=0) as run:
        DatasetGenerationPipeline(spec).run(folder, run)
    # Its own, and that of the largest of the processes that trained for it.
    return sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def memory(_: argparse.Namespace) -> Figures:
    """Peak memory of making four times as many records, of nearly every candidate."""
    staged = read_mapping(EXAMPLE, "spec")["staged"] | {
        "min_degradation_threshold": 0,
        "min_specificity": -1,
        "max_instability": 1,
        "max_other_degradation": 1,
    }
    peaks = []
    with tempfile.TemporaryDirectory() as folder:
        for records in (4000, 16_000):
            spec = small(subjects=records, staged=staged)
            peaks.append(_kit.in_child(generate_into, spec, Path(folder, str(records))))
            say(f"{records} records: {peaks[-1] / 1024:.0f} MiB")
    return {"rss_ratio_4x": Figure(peaks[1] / peaks[0], "<=", 1.2)}


def resume(arguments: argparse.Namespace) -> Figures:
    """Killed at seeded moments and resumed, how many zoos differ from the one that was not killed; and how many were
    resumed from a checkpoint, not from the start."""
    spec, chance, unequal, from_checkpoint = small(subjects=700), random.Random(arguments.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        began = time.monotonic()
        _kit.in_child(generate_into, spec, whole)
        seconds = time.monotonic() - began
        tables = list(read_records(whole))
        for kill in range(KILLS):
            checkpoints, resumed = Path(scratch, f"checkpoints-{kill}"), Path(scratch, f"resumed-{kill}")
            making = get_context("spawn").Process(
                target=generate_into, args=(spec, Path(scratch, f"killed-{kill}"), checkpoints)
            )
            making.start()
            time.sleep(chance.uniform(0.3, 1.0) * seconds)
            making.kill()
            making.join()
            kept = (checkpoints / CHECKPOINT).exists()
            _kit.in_child(generate_into, spec, resumed, checkpoints)
            records = list(read_records(resumed))
            same = len(records) == len(tables) and all(a.equals(b) for a, b in zip(records, tables, strict=True))
            unequal += not same
            from_checkpoint += kept
            say(f"killed with {'a' if kept else 'no'} checkpoint: {'same' if same else 'DIFFERENT'}")
    return {
        "resume_unequal": Figure(unequal, "==", 0),
        "resumed_from_checkpoint": Figure(from_checkpoint, ">=", 1),
    }


if __name__ == "__main__":
    parts = dict(speed=speed, truth=truth, memory=memory, resume=resume)
    parser = _kit.parser(__doc__, parts)
    parser.add_argument("--records", type=int, default=5000, help="records of each preset (5000)")
    parser.add_argument("--candidates", type=int, default=3300, help="candidates of the plain loop (3300)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of kills (0)")
    _kit.run("generation", parser.parse_args(), parts)
