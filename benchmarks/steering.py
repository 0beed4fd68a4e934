"""Whether steering works: agreement, edits that pass both gates, controls, lookups, and the speed of training.

    make bench BENCH=steering                               every part and seed; what was measured before is kept
    make bench BENCH=steering ARGS="--part shared --seed 0" or earlier, independent, step

The parts shared, independent and earlier are examples/ten-behaviors.yaml, examples/independent.yaml and
examples/few-subjects.yaml. Figures and zoos stay below runs/bench-steering (see benchmarks/_kit.py), so an interrupted
benchmark resumes; --afresh measures again. The minutes of a training are those of this run, and null where an earlier
run took part in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import _kit
from benchmarks._kit import Bars, Cache, Figures, Measured, over_seeds, say
from benchmarks._plain_codec import examples_per_second
from ethogram.bench import Figure
from ethogram.cli.files import read_mapping
from ethogram.specs.base import ArtifactRef
from ethogram.specs.crossmodal import CodecSpec, CodecTrainingSpec, CrossmodalSpec
from ethogram.specs.edits import LOOKUPS, OPERATIONS
from ethogram.specs.generation import GenerationSpec
from ethogram.specs.kinds import KINDS
from services.crossmodal.codec import Codec
from services.crossmodal.evaluate import evaluate
from services.crossmodal.train import CodecTrainer, train
from services.generation.pipeline import generate
from services.runtime import local
from services.runtime.folders import RESULT, RunFolder
from services.runtime.run import Run
from services.zoo.dataset import Zoo

CACHE = Cache("steering")
SOURCES = ("ethogram/specs", "services/runtime", "services/zoo", "services/generation", "services/crossmodal")
SEEDS = (0, 1, 2)
HELD_OUT = 512
STEPS = 8000
EARLIER = 64 + 24 + 24
"""Subjects of a behaviour in the setting of earlier work: for training, validation and evaluation."""
_ANY = ArtifactRef(artifact="zoo")


class Specs(NamedTuple):
    """Of a zoo and of the codec that is trained on it."""

    zoo: GenerationSpec
    codec: CrossmodalSpec


def specs(example: str, seed: int) -> Specs:
    """The specs of a pipeline in the examples."""
    jobs = read_mapping(Path("examples", f"{example}.yaml"), "pipeline")["jobs"]
    zoo, codec = (jobs[name]["spec"] | {"seed": seed} for name in ("zoo", "codec"))
    return Specs(GenerationSpec.model_validate(zoo), CrossmodalSpec.model_validate(codec | {"zoo": _ANY}))


def zoo_of(spec: GenerationSpec) -> Zoo:
    """The zoo of a spec, generated once for all codecs that are trained on it."""
    # It does not depend on the code of the codec.
    folder = RunFolder(CACHE.folder("zoo", spec, SOURCES[:-1]))
    if not (folder.root / RESULT).exists():
        local.run(KINDS["generation"], spec, folder, {}, "cpu")
    return Zoo.load(folder.place("zoo"))


def first_of_each(zoo: Zoo) -> Tensor:
    """The first :data:`EARLIER` subjects of each behaviour (bool ``[models]``)."""
    if bool((zoo.labels.sum(0) < EARLIER).any()):
        raise ValueError(f"the zoo has fewer than {EARLIER} subjects of some behaviour")
    return (zoo.labels & (zoo.labels.cumsum(0) <= EARLIER)).any(1)


def judged(name: str, specs: Specs, subjects: Callable[[Zoo], Tensor] | slice = slice(None)) -> Measured:
    """Figures of :func:`services.crossmodal.evaluate.evaluate` of a codec that is trained on the ``subjects`` of a zoo
    (all by default), and the minutes of its training."""

    def measure(folder: Path) -> dict[str, float]:
        zoo = zoo_of(specs.zoo)
        rows = subjects if isinstance(subjects, slice) else subjects(zoo)
        columns = ("index", "shape", "weights", "labels", "accuracy")
        zoo = replace(zoo, **{column: getattr(zoo, column)[rows] for column in columns})

        def evaluated(codec: Codec, run: Run) -> dict[str, float]:
            report = evaluate(codec, zoo, run)
            codec.save(folder / "codec")
            (folder / "report.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
            figures: dict[str, float] = report["figures"]
            gates = [figures[gate] for edit in ("add", "remove") if (gate := f"{edit}.min_pattern_all_gate") in figures]
            return figures | ({"min_pattern_all_gate": min(gates)} if gates else {})

        return _kit.trained(folder / "run", partial(train, specs.codec, zoo), evaluated)

    return CACHE.measured(name, specs, SOURCES, measure)


def shared(arguments: argparse.Namespace) -> Figures:
    """The part on shared initialisation."""
    rows = [judged(f"shared-{seed}", specs("ten-behaviors", seed)) for seed in arguments.seeds]
    return over_seeds(rows, SHARED) | beside(rows, "shared")


def earlier(arguments: argparse.Namespace) -> Figures:
    """The setting of earlier work."""
    rows = [judged(f"earlier-{seed}", specs("few-subjects", seed), first_of_each) for seed in arguments.seeds]
    return over_seeds(rows, EARLIER_FIGURES) | beside(rows, "earlier")


def independent(arguments: argparse.Namespace) -> Figures:
    """The part on independent initialisations, and what steps and subjects buy there."""
    figures: Figures = {}
    seed = arguments.seeds[0]
    for steps, subjects in ((STEPS, 16_384), (STEPS // 2, 16_384), (STEPS // 4, 16_384), (STEPS // 4, 4096)):
        zoo, codec = specs("independent", seed)
        training = codec.training.model_copy(update={"steps": steps})
        pair = Specs(zoo, codec.model_copy(update={"training": training, "held_out": HELD_OUT / subjects}))
        row = judged(f"independent-{seed}-{steps}-{subjects}", pair, slice(subjects))
        if steps == STEPS:
            figures |= beside([row], "independent")
        for name, (key, op, bar) in INDEPENDENT.items():
            if steps == STEPS:
                figures[name] = row.figure(key, op, bar)
            else:
                sizes = f"independent.{steps}_steps.{subjects}_subjects"
                figures[name.replace("independent", sizes)] = row.figure(key)
    return figures


def step(arguments: argparse.Namespace) -> Figures:
    """Training subjects per second with the plain recipe, beside a plain implementation of it: perceptrons of the same
    latent, width and depth, about as many inputs, float32. The bar is on batches of our default size against its 16."""
    # As many numbers of a signature as there are components.
    zoo = generate(GenerationSpec.model_validate({"subjects": 640, "signature": {"probes": 16}}))
    loss = read_mapping(Path("examples/plain.yaml"), "spec")["loss"]

    def ours(batch: int) -> float:
        training = {"batch_size": batch, "precision": "float32"}
        trainer = CodecTrainer(CrossmodalSpec.model_validate({"zoo": _ANY, "loss": loss, "training": training}), zoo)
        trainer.advance()
        done, started = 0, time.perf_counter()
        while time.perf_counter() - started < arguments.seconds:
            done += len(trainer.sampler.batch(trainer.step))
            trainer.advance()
        return done / (time.perf_counter() - started)

    peer = examples_per_second(zoo, CodecSpec(), arguments.seconds)
    default, small = ours(CodecTrainingSpec().batch_size), ours(16)
    say(f"training step: {default:.0f} subjects/s with the default batch, {small:.0f} with 16, plain loop {peer:.0f}")
    return {
        "train_step_ratio": Figure(default, ">=", 5.0, peer, judged="ratio"),
        "train_step_ratio.batch_16": Figure(small, peer=peer),
    }


SHARED: Bars = {
    "shared.agreement": ("agreement", ">=", 0.92),
    "shared.matched": ("matched_beats_same_label", ">=", 0.90),
    "shared.spread": ("spread", ">=", 0.5),
    "shared.add.target_mean": ("add.target_mean", ">=", 0.95),
    "shared.add.all_gate": ("add.all_gate", ">=", 0.85),
    "shared.remove.target_mean": ("remove.target_mean", ">=", 0.95),
    "shared.remove.all_gate": ("remove.all_gate", ">=", 0.85),
    "shared.min_pattern_all_gate": ("min_pattern_all_gate", ">=", 0.65),
    "shared.direct.add.target_mean": ("direct.add.target_mean", ">=", 0.95),
    "shared.direct.add.all_gate": ("direct.add.all_gate", ">=", 0.40),
    "shared.minutes": ("minutes", "<=", 15.0),
    "controls.max_all_gate": ("controls.max_all_gate", "<=", 0.05),
}
INDEPENDENT: Bars = {
    "independent.agreement": ("agreement", ">=", 0.85),
    "independent.add.all_gate": ("add.all_gate", ">=", 0.40),
    "independent.remove.all_gate": ("remove.all_gate", ">=", 0.40),
    "independent.minutes": ("minutes", "<=", 30.0),
}
EARLIER_FIGURES: Bars = {
    "earlier.all_gate": ("direct.replace.all_gate", ">=", 0.85),
    "earlier.min_direction": ("direct.replace.min_pattern_all_gate", ">=", 0.65),
}


def beside(rows: list[Measured], part: str) -> Figures:
    """What stands beside the judged figures, without bars: what edits keep, lookups, the edits for which these have a
    network, and least squares; means over the seeds that have the figure."""
    prefixes = [f"{mode}{edit}" for mode in ("", "direct.") for edit in OPERATIONS]
    names = [f"{prefix}.kept_mean" for prefix in prefixes]
    names += [f"{edit}.{way}.available" for edit in OPERATIONS for way in LOOKUPS]
    for name in ("all_gate", "kept_mean"):
        names += [f"{edit}.{way}.{name}" for edit in OPERATIONS for way in LOOKUPS]
        names += [f"{prefix}.where_{way}.{name}" for prefix in prefixes for way in LOOKUPS]
    figures: Figures = {}
    for name in (*names, "nearest_train.agreement", "oracle.agreement"):
        seeds = [row for row in rows if name in row.numbers]
        if seeds:
            mean = sum(row.numbers[name] for row in seeds) / len(seeds)
            figures[f"{part}.{name}"] = Figure(mean, kept=any(row.kept for row in seeds))
    return figures


if __name__ == "__main__":
    parts = dict(shared=shared, earlier=earlier, independent=independent, step=step)
    parser = _kit.parser(__doc__, parts)
    parser.add_argument("--seed", type=int, choices=SEEDS, help="only this seed (all three; of independent the first)")
    parser.add_argument("--afresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each side of the part step (20)")
    arguments = parser.parse_args()
    arguments.seeds = SEEDS if arguments.seed is None else (arguments.seed,)
    CACHE.afresh = arguments.afresh
    torch.manual_seed(0)
    _kit.run("steering", arguments, parts)
