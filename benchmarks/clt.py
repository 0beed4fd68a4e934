"""Sparse models of a routing policy's activations beside those of others: speed, memory, loading, quality.

    make bench BENCH=clt                          every part
    make bench BENCH=clt ARGS="--part speed"      or memory, loader, quality, policy
    make bench BENCH=clt ARGS="--quick"           quality on a policy and with sparse models that are trained briefly

Others are installed below runs/bench-clt/packages, with the torch that is here. What quality and policy give stays
in runs/bench-clt too (see benchmarks/_kit.py), so an interrupted benchmark resumes; --afresh measures again. Times are
always those of this run.

Speed: both sides take steps on the same batches (float32, Adam, 4096 rows, two threads), in turns of ten, so that both
meet the same disturbances; the figure is the median of five turns, in rows per second. Ours are whole steps of
training, with clipping and the count of dead features, which the others' have not. Quality: as many rows for all, in
batches of 4096; of the others the best of their optimisers, each with its own rate of learning.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import _kit
from benchmarks._clt_peers import extra_mib
from benchmarks._kit import Ask, Cache, Figures, say
from ethogram.bench import Figure
from ethogram.specs.base import ArtifactRef
from ethogram.specs.clt import ActivationsSpec, CltSpec, PolicySpec
from services.clt.activations.collect import collect
from services.clt.activations.loader import Batches, everything
from services.clt.activations.store import SPLITS, ActivationStore, Hook, Instances, Manifest, Source, Writer
from services.clt.policy.decode import greedy
from services.clt.policy.evaluate import evaluation_instances
from services.clt.policy.job import default_policy
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.train import train_policy
from services.clt.policy.tsp import gaps, lengths, reference
from services.clt.sparse.evaluate import evaluate
from services.clt.sparse.train import SparseTrainer, train
from services.runtime.console import ConsoleRun
from services.runtime.run import Run

CACHE = Cache("clt")
ROOT = CACHE.root
PEERS = (
    "eai-sparsify==1.3.3",
    "decode-clt==0.0.1",
    # What importing them needs beyond what is here.
    "accelerate==1.15.0",
    "docstring-parser==0.18.0",
    "einops==0.8.2",
    "natsort==8.4.0",
    "schedulefree==1.4.1",
    "simple-parsing==0.1.9",
)
PEER = Path(__file__).with_name("_clt_peers.py")
SOURCES = ("ethogram/specs/clt.py", "services/clt", "services/language", "services/runtime")
ANY = ArtifactRef(artifact="activations")
ROWS = 16
"""Of an instance of a store that is made up."""
BATCH, K, THREADS = 4096, 32, 2
TURNS, TURN = 5, 10


class Case(NamedTuple):
    """A sparse model to measure steps of: of one pair, or across ``layers``."""

    width: int
    expansion: int
    layers: int = 1


SPEED: dict[str, tuple[Case, float | None]] = {
    "pair_d128_e4": (Case(128, 4), 1.0),
    "pair_d128_e16": (Case(128, 16), 1.5),
    "pair_d128_e32": (Case(128, 32), None),
    "pair_d256_e16": (Case(256, 16), 1.5),
    "true_clt": (Case(128, 16, layers=3), 2.0),
}
"""Cases, and the least ratio to the others' rows per second."""
LOADED_ROWS = 524_288
QUALITY_K = (8, 16, 32, 64)
PAIR = ("encoder_layer_1_pre_mlp", "encoder_layer_1_mlp")


@contextmanager
def peer() -> Iterator[Ask]:
    """A process of others' code: calls a function of :mod:`benchmarks._clt_peers` by name and returns its result."""
    packages = _kit.installed(ROOT / "packages", PEERS)
    with _kit.peer(PEER, packages, {"SPARSIFY_DISABLE_TRITON": "1"}) as ask:
        yield ask


def spec_of(sources: Sequence[str], targets: Sequence[str], expansion: int, k: int, steps: int) -> CltSpec:
    """A spec with the default of every other field."""
    return CltSpec.model_validate(
        {
            "activations": ANY,
            "kind": "pair" if len(sources) == 1 else "cross_layer",
            "sources": list(sources),
            "targets": list(targets),
            "model": {"expansion": expansion, "k": k},
            "training": {"steps": steps, "batch_size": BATCH},
        }
    )


def made_up(width: int, layers: int, rows: int, shard_rows: int) -> ActivationStore:
    """A store of ``layers`` pairs, made unless it is there: sources are sums of a few of many directions, targets a map
    of them."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(8 * width, width, generator=generator), dim=1)
    maps = torch.randn(layers, width, width, generator=generator) / width**0.5
    hooks = [f"layer_{layer}_{side}" for layer in range(layers) for side in ("pre_mlp", "mlp")]
    instances = rows // ROWS
    manifest = Manifest(
        source=Source(kind="policy", digest="0", name="made up"),
        spec={"width": width, "rows": rows},
        seed=0,
        dtype="float16",
        hooks=[Hook(name=hook, width=width) for hook in hooks],
        pairs=[],
        rows_per_instance=ROWS,
        first_position=0,
        shard_instances=shard_rows // ROWS,
        instances=Instances(total=instances + 64, validation=64, drawn="the first"),
    )
    with Writer.open(ROOT / "stores" / f"{width}x{layers}-{rows}", manifest) as writer:
        for split in SPLITS:
            while (room := min(writer.room(split), 512)) > 0:
                values: dict[str, Tensor] = {}
                first = writer.instances(split)
                for layer in range(layers):
                    active = torch.randint(len(directions), (room * ROWS, 24), generator=generator)
                    sizes = torch.rand(room * ROWS, 24, generator=generator)
                    source = torch.nn.functional.embedding_bag(active, directions, per_sample_weights=sizes, mode="sum")
                    values[hooks[2 * layer]] = source.view(room, ROWS, width)
                    values[hooks[2 * layer + 1]] = (source @ maps[layer]).tanh().view(room, ROWS, width)
                writer.add(split, torch.arange(first, first + room), values)
        return writer.finish()


class Steps:
    """Training steps of a case, on a few batches in turn."""

    def __init__(self, case: Case, store: ActivationStore | None = None) -> None:
        self.case = case
        sources, targets = ([f"layer_{layer}_{side}" for layer in range(case.layers)] for side in ("pre_mlp", "mlp"))
        spec = spec_of(sources, targets, case.expansion, K, steps=1_000_000)
        torch.set_num_threads(THREADS)
        with SparseTrainer(spec, store or made_up(case.width, case.layers, 16 * 4096, 16_384)) as self.trainer:
            self.trainer.start()
            self.batches = [self.trainer._sides(self.trainer._batches.at(step)) for step in range(4)]

    def make_peer(self, ask: Ask) -> None:
        """Have the others' process make the model of the case, with the same batches."""
        tensors = {
            f"{side}.{layer}.{number}": one.contiguous()
            for number, batch in enumerate(self.batches)
            for side, streams in zip(("input", "target"), batch, strict=True)
            for layer, one in enumerate(streams)
        }
        file = ROOT / "stores" / "batches.safetensors"
        save_file(tensors, file)
        ask("make", file=str(file), features=self.case.expansion * self.case.width, k=K, threads=THREADS)

    def take(self, count: int) -> float:
        """Take steps; the seconds that they took."""
        began = time.perf_counter()
        for _ in range(count):
            self.trainer.learn(*self.batches[self.trainer.step % len(self.batches)])
        return time.perf_counter() - began


def speed(_: argparse.Namespace) -> Figures:
    """How fast steps are: rows per second of each case, ours and theirs, in turns."""
    figures = {}
    for name, (case, bar) in SPEED.items():
        steps = Steps(case)
        with peer() as ask:
            steps.make_peer(ask)
            # Without what happens once, and the steps until encoders get a gradient.
            steps.take(TURN), ask("steps", count=TURN // 2)
            turns = [(steps.take(TURN), ask("steps", count=TURN)["seconds"]) for _ in range(TURNS)]
        ours, theirs = (TURN * BATCH / statistics.median(side) for side in zip(*turns, strict=True))
        ratios = ", ".join(f"{b / a:.2f}" for a, b in turns)
        say(f"{name}: {ours:.0f} rows/s, others {theirs:.0f}; by turns {ratios} x")
        figures[name] = Figure(ours, ">=" if bar else None, bar, theirs, judged="ratio")
    return figures


def memory(_: argparse.Namespace) -> Figures:
    """Memory that ten steps take beyond data and parameters, MiB."""
    name = "pair_d256_e16"
    with peer() as ask:
        Steps(SPEED[name][0]).make_peer(ask)
        theirs = ask("memory", count=TURN)["mib"]
    ours = _kit.in_child(memory_of_steps, SPEED[name][0])
    say(f"ten steps of {name} take {ours:.0f} MiB, others' {theirs:.0f}")
    return {"memory_ratio": Figure(ours, "<=", 0.5, theirs, judged="ratio")}


def memory_of_steps(case: Case) -> float:
    """Memory that ten steps of ours take, MiB; for a process of its own."""
    steps = Steps(case)
    return extra_mib(lambda: steps.take(TURN))


def memory_of_epoch(folder: Path) -> float:
    """Memory that an epoch through a store takes, in shards; for a process of its own."""
    store = ActivationStore.open(folder)
    hooks = store.hooks
    shard = store.shards("train")[0].rows * sum(store.widths[hook] for hook in hooks) * store.dtype.itemsize / 2**20
    with Batches(store, hooks, BATCH) as first:
        first.at(0)  # What libraries take once.

    def through() -> None:
        with Batches(store, hooks, BATCH) as batches:
            for step in range(int(batches.steps_per_epoch) + 1):
                batches.at(step)

    return extra_mib(through) / shard


def loader(_: argparse.Namespace) -> Figures:
    """How fast batches come, in what memory, and whether they are the same after resuming. The store is not in the
    memory of its process."""
    store = made_up(128, 1, LOADED_ROWS, 32_768)
    steps = Steps(SPEED["pair_d128_e16"][0], store)
    steps.take(TURN)
    with Batches(store, store.hooks, BATCH) as batches:
        batches.at(0)
        count = int(batches.steps_per_epoch)
        loads, trains = [], []
        # In turns, for both to meet the same disturbances; an epoch each.
        for turn in range(3):
            began = time.perf_counter()
            for step in range(1 + turn * count, 1 + (turn + 1) * count):
                batches.at(step)
            loads.append(count * BATCH / (time.perf_counter() - began))
            trains.append(TURN * BATCH / steps.take(TURN))
    load, train = statistics.median(loads), statistics.median(trains)
    say(f"loader: {load:.0f} rows/s, training {train:.0f}")
    return {
        "loader_ratio": Figure(load, ">=", 3.0, train, judged="ratio"),
        "loader_rss_shards": Figure(_kit.in_child(memory_of_epoch, store.folder)),
        "resume_unequal": Figure(unequal(store, count), "==", 0.0),
    }


def unequal(store: ActivationStore, count: int) -> int:
    """Batches that differ after resuming in the middle of an epoch, or of the next."""
    with Batches(store, store.hooks, BATCH, seed=1) as whole:
        expected = [[tensor.sum(0) for tensor in whole.at(step)] for step in range(count + count // 2)]
    differ = 0
    for start in (count // 3, count + 3):
        with Batches(store, store.hooks, BATCH, seed=1) as again:
            for step in range(start, min(start + 40, len(expected))):
                found = [tensor.sum(0) for tensor in again.at(step)]
                differ += not all(torch.equal(a, b) for a, b in zip(found, expected[step], strict=True))
    return differ


def real(quick: bool) -> ActivationStore:
    """Activations of a policy's second layer."""
    spec = PolicySpec()
    if quick:
        spec = spec.model_copy(update={"training": spec.training.model_copy(update={"steps": 300})})
    policy = default_policy(spec=spec)
    asked = ActivationsSpec(
        policy=ANY, pairs=["->".join(PAIR)], instances=20_000 if quick else 40_000, shard_rows=32_768
    )
    with ConsoleRun() as run:
        folder = CACHE.folder("store", [policy.digest, asked], SOURCES)
        return collect(asked, folder, run, policy)


def ours(store: ActivationStore, spec: CltSpec, _: Path) -> dict[str, float]:
    """Train our model and evaluate it on held-out rows."""
    torch.set_num_threads(THREADS)
    with SparseTrainer(spec, store) as trainer, ConsoleRun() as run:
        model = train(trainer, run)
        figures, _density = evaluate(model, store, store.rows("validation"))
    return {"fvu": figures["fvu"], "l0": figures["l0"], **trainer.dead_figure}


def theirs(store: ActivationStore, spec: CltSpec, optimizer: str, _: Path) -> dict[str, float]:
    """Train a ``SparseCoder`` on as many rows, in the units that ours has, which do not change the figures."""
    files = {split: ROOT / "stores" / f"{store.digest[:12]}-{split}.safetensors" for split in ("train", "validation")}
    with SparseTrainer(spec, store) as trainer:
        model = trainer.model
    (ROOT / "stores").mkdir(parents=True, exist_ok=True)
    for split, file in files.items():
        if not file.exists():
            source, target = everything(store, list(PAIR), split)
            read, write = model.scaled([source], "read")[0], model.scaled([target], "write")[0]
            save_file({"input": read.half(), "target": write.half()}, file)
    assert spec.model.k is not None
    with peer() as ask:
        return ask(
            "train",
            train=str(files["train"]),
            held_out=str(files["validation"]),
            features=model.features[0],
            k=spec.model.k,
            batch_size=spec.training.batch_size,
            steps=spec.training.steps,
            optimizer=optimizer,
            threads=THREADS,
        )


def quality(arguments: argparse.Namespace) -> Figures:
    """Share of the variance of held-out rows that is not explained, of models with as many active features."""
    store, steps = real(arguments.quick), 300 if arguments.quick else 4000
    figures: Figures = {}
    dead = []
    for k in QUALITY_K:
        spec = spec_of(PAIR[:1], PAIR[1:], 8, k, steps)
        asked = [store.digest, spec]
        own = CACHE.measured(f"ours-k{k}", asked, SOURCES, partial(ours, store, spec))
        others = {
            name: CACHE.measured(f"theirs-{name}-k{k}", asked, (), partial(theirs, store, spec, name))
            for name in ("adam", "signum")
        }
        rows = {name: one.numbers for name, one in {"ours": own, **others}.items()}
        say(f"k {k}: " + "; ".join(f"{name} fvu {one['fvu']:.5f} (l0 {one['l0']:.2f})" for name, one in rows.items()))
        best = min(one.numbers["fvu"] for one in others.values())
        kept = own.kept or any(one.kept for one in others.values())
        figures[f"fvu_ratio_k{k}"] = Figure(own.numbers["fvu"], "<=", 1.0, best, judged="ratio", kept=kept)
        dead.append(own)
    # The form has no less-than: of a thousand features nine may be dead.
    worst = max(one.numbers["dead"] for one in dead)
    return {**figures, "dead_fraction": Figure(worst, "<=", 0.0099, kept=any(one.kept for one in dead))}


def trained_policy(folder: Path) -> dict[str, float]:
    """Train the policy of the default spec: the mean gap of its greedy tours to a solver's over 1,000 instances, as a
    share, and the minutes of the training unless it resumed."""
    spec = PolicySpec(evaluation=1000)
    say(f"training a policy: {spec.training.steps} steps of {spec.training.batch_size} instances")

    def gap(policy: AttentionPolicy, run: Run) -> dict[str, float]:
        say(f"comparing its tours of {spec.evaluation} instances with the solver's")
        cities = evaluation_instances(spec)
        return {"gap": float(gaps(lengths(cities, greedy(policy, cities)), lengths(cities, reference(cities))).mean())}

    return _kit.trained(folder, partial(train_policy, spec), gap)


def policy(_: argparse.Namespace) -> Figures:
    """How long the default policy trains, and how far its tours are from a solver's."""
    sources = ("ethogram/specs/clt.py", "services/clt/policy", "services/runtime")
    found = CACHE.measured("policy", PolicySpec(), sources, trained_policy)
    return {
        "policy_gap": found.figure("gap", "<=", 0.03),
        "policy_minutes": found.figure("minutes", "<=", 20.0),
    }


if __name__ == "__main__":
    parts = dict(speed=speed, memory=memory, loader=loader, quality=quality, policy=policy)
    parser = _kit.parser(__doc__, parts)
    parser.add_argument("--quick", action="store_true", help="a brief policy and few steps for the part quality")
    parser.add_argument("--afresh", action="store_true", help="measure again what was measured before")
    arguments = parser.parse_args()
    CACHE.afresh = arguments.afresh
    torch.manual_seed(0)
    _kit.run("clt", arguments, parts)
