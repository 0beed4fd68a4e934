"""Sparse models of a routing policy's activations beside those of others: speed, memory, loading, quality.

    make bench BENCH=clt                          every part; what was measured before is kept
    make bench BENCH=clt ARGS="--part speed"      or memory, loader, quality, policy
    make bench BENCH=clt ARGS="--quick"           quality on a policy and with sparse models that are trained briefly

Others are installed below runs/bench-clt/peers, with the torch that is here. Figures stay there too, under the hash of
what was asked for and of the code that they follow from, so a benchmark that was interrupted goes on where it was;
--afresh measures again.

Speed: both sides take steps on the same batches (float32, Adam, 4096 rows, two threads), in turns of ten, so that both
meet the same disturbances; the figure is the median of five turns, in rows per second. Ours are whole steps of
training, with clipping and the count of dead features, which the others' have not. Quality: as many rows for all, in
batches of 4096; of the others the best of their optimisers, each with its own rate of learning.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save_file

from benchmarks._clt_ours import ANY, Steps, made_up
from benchmarks._policy_gap import policy_gap
from ethogram.bench import Figure, form
from ethogram.specs.clt import ActivationsSpec, CltSpec, PolicySpec
from services.clt.activations.collect import collect
from services.clt.activations.loader import Batches, everything
from services.clt.activations.store import ActivationStore
from services.clt.policy.job import default_policy
from services.clt.sparse.evaluate import evaluate
from services.clt.sparse.train import SparseTrainer
from services.runtime.console import ConsoleRun

ROOT = Path("runs/bench-clt")
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
SOURCES = ("ethogram/specs/clt.py", "services/clt", "services/runtime")
BENCH = ("benchmarks/clt.py", "benchmarks/_clt_ours.py", "benchmarks/_clt_peers.py")
PARTS = ("speed", "memory", "loader", "quality", "policy")
BATCH, K, THREADS = 4096, 32, 2
TURNS, TURN = 5, 10
SPEED: dict[str, tuple[dict[str, Any], float | None]] = {
    "pair_d128_e4": ({"width": 128, "expansion": 4}, 1.0),
    "pair_d128_e16": ({"width": 128, "expansion": 16}, 1.5),
    "pair_d128_e32": ({"width": 128, "expansion": 32}, None),
    "pair_d256_e16": ({"width": 256, "expansion": 16}, 1.5),
    "true_clt": ({"width": 128, "expansion": 16, "kind": "cross_layer", "layers": 3}, 2.0),
}
"""Cases, and the least ratio to the others' rows per second."""
LOADED_ROWS = 524_288
QUALITY_K = (8, 16, 32, 64)
PAIR = ("encoder_layer_1_pre_mlp", "encoder_layer_1_mlp")
_BEGAN = time.monotonic()


def say(text: str) -> None:
    """Progress, for people."""
    sys.stderr.write(f"{time.monotonic() - _BEGAN:6.0f} s  {text}\n")
    sys.stderr.flush()


def code(*sources: str) -> str:
    """Hash of code."""
    digest = hashlib.sha256()
    for source in map(Path, sources):
        for file in [source] if source.is_file() else sorted(source.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def measured(
    name: str, asked: object, sources: tuple[str, ...], afresh: bool, measure: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """What ``measure`` gives, or what it gave before for the same question and code."""
    key = hashlib.sha256(json.dumps([asked, code(*sources)], sort_keys=True).encode()).hexdigest()[:12]
    kept = ROOT / "figures" / f"{name}-{key}.json"
    if afresh or not kept.exists():
        found = measure()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=2))
    else:
        say(f"{name}: kept from {kept}")
    figures: dict[str, float] = json.loads(kept.read_text())
    return figures


def peers() -> Path:
    """The interpreter of the others' environment, which is made if it is not there."""
    folder = ROOT / "peers"
    python, stamp = folder / "bin" / "python", folder / "ready"
    if not stamp.exists() or stamp.read_text() != "\n".join(PEERS):
        say(f"installing {', '.join(PEERS[:2])}")
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *PEERS],
            check=True,
            stdout=sys.stderr,
        )
        about = "import sysconfig; print(sysconfig.get_path('purelib'))"
        own = Path(subprocess.run([python, "-c", about], check=True, capture_output=True, text=True).stdout.strip())
        # All else is what is here: its torch is the very same.
        (own / "ours.pth").write_text(sysconfig.get_path("purelib"))
        stamp.write_text("\n".join(PEERS))
    return python


class Peer:
    """A process of others' code that does what it is asked, as a ``with`` block."""

    def __init__(self) -> None:
        hidden = {"PYTHONPATH": "", "SPARSIFY_DISABLE_TRITON": "1", "HF_HUB_OFFLINE": "1"}
        # -P: this folder has a platform.py.
        self._process = subprocess.Popen(
            [peers().absolute(), "-P", PEER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | hidden,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, do: str, **about: Any) -> dict[str, float]:
        """Have it do something."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"do": do, **about}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the others' process ended with {self._process.wait()}")
        found: dict[str, float] = json.loads(answer)
        return found


def case_of(name: str) -> dict[str, Any]:
    """A case of the part on speed."""
    common = {"kind": "pair", "layers": 1, "k": K, "batch": BATCH, "threads": THREADS, "batches": 4}
    return common | SPEED[name][0]


def store_of(case: dict[str, Any]) -> ActivationStore:
    """A small store for a case."""
    folder = ROOT / "stores" / f"{case['width']}x{case['layers']}"
    return made_up(folder, case["width"], case["layers"], 16 * 4096, 16_384)


def ready(case: dict[str, Any], steps: Steps, peer: Peer) -> None:
    """Have the other side make the model of a case, with the same batches."""
    file = ROOT / "stores" / "batches.safetensors"
    steps.save(file)
    features, kind = case["expansion"] * case["width"], "pair" if case["kind"] == "pair" else "cross"
    peer.ask("make", kind=kind, file=str(file), features=features, k=case["k"], threads=case["threads"])


def speed_of(name: str) -> dict[str, float]:
    """Rows per second of a case, ours and theirs, in turns."""
    case = case_of(name)
    steps = Steps(case, store_of(case))
    with Peer() as peer:
        ready(case, steps, peer)
        # Whatever happens once, and steps until encoders get a gradient.
        steps.take(TURN), peer.ask("steps", count=TURN // 2)
        turns = [(steps.take(TURN), peer.ask("steps", count=TURN)["seconds"]) for _ in range(TURNS)]
    steps.close()
    ours, theirs = (TURN * BATCH / statistics.median(side) for side in zip(*turns, strict=True))
    ratios = [b / a for a, b in turns]
    say(f"{name}: {ours:.0f} rows/s, others {theirs:.0f}; by turns {', '.join(f'{one:.2f}' for one in ratios)} x")
    return {"ours": ours, "theirs": theirs}


def speed(afresh: bool) -> dict[str, Figure]:
    """How fast steps are."""
    figures = {}
    for name, (_, bar) in SPEED.items():
        found = measured(name, case_of(name), (*SOURCES, *BENCH), afresh, partial(speed_of, name))
        figures[name] = Figure(found["ours"], ">=" if bar else None, bar, found["theirs"], of_ratio=True)
    return figures


def fresh(what: str, case: dict[str, Any]) -> float:
    """Something of ours, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks._clt_ours", what, json.dumps(case)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def memory_of(name: str) -> dict[str, float]:
    """Memory that ten steps of a case take, MiB."""
    case = case_of(name)
    store = store_of(case)
    steps = Steps(case, store)
    with Peer() as peer:
        ready(case, steps, peer)
        theirs = peer.ask("memory", count=TURN)["mib"]
    steps.close()
    ours = fresh("memory", case | {"store": str(store.folder)})
    say(f"ten steps of {name} take {ours:.0f} MiB, others' {theirs:.0f}")
    return {"ours": ours, "theirs": theirs}


def memory(afresh: bool) -> dict[str, Figure]:
    """What steps take beyond data and parameters."""
    name = "pair_d256_e16"
    found = measured("memory", case_of(name), (*SOURCES, *BENCH), afresh, lambda: memory_of(name))
    return {"memory_ratio": Figure(found["ours"], "<=", 0.5, found["theirs"], of_ratio=True)}


def loaded() -> dict[str, float]:
    """Figures of the loader, on a store that is not in its process's memory."""
    case = case_of("pair_d128_e16")
    store = made_up(ROOT / "stores" / "loaded", 128, 1, LOADED_ROWS, 32_768)
    steps = Steps(case, store)
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
    steps.close()
    load, train = statistics.median(loads), statistics.median(trains)
    say(f"loader: {load:.0f} rows/s, training {train:.0f}")
    return {
        "load": load,
        "train": train,
        "rss": fresh("loader", {"store": str(store.folder), "batch": BATCH}),
        "unequal": float(unequal(store, count)),
    }


def unequal(store: ActivationStore, count: int) -> int:
    """Batches that differ for one who goes on in the middle of an epoch, or of the next."""
    with Batches(store, store.hooks, BATCH, seed=1) as whole:
        told = [[tensor.sum(0) for tensor in whole.at(step)] for step in range(count + count // 2)]
    differ = 0
    for start in (count // 3, count + 3):
        with Batches(store, store.hooks, BATCH, seed=1) as again:
            for step in range(start, min(start + 40, len(told))):
                found = [tensor.sum(0) for tensor in again.at(step)]
                differ += not all(torch.equal(a, b) for a, b in zip(found, told[step], strict=True))
    return differ


def loader(afresh: bool) -> dict[str, Figure]:
    """How fast batches come, in what memory, and whether they are the same for one who goes on."""
    found = measured("loader", case_of("pair_d128_e16"), (*SOURCES, *BENCH), afresh, loaded)
    return {
        "loader_ratio": Figure(found["load"], ">=", 3.0, found["train"], of_ratio=True),
        "loader_rss_shards": Figure(found["rss"]),
        "resume_unequal": Figure(found["unequal"], "==", 0.0),
    }


def real(quick: bool) -> ActivationStore:
    """A store of what a policy's second layer does."""
    spec = PolicySpec()
    if quick:
        spec = spec.model_copy(update={"training": spec.training.model_copy(update={"steps": 300})})
    policy = default_policy(spec=spec)
    asked = ActivationsSpec(
        policy=ANY, pairs=["->".join(PAIR)], instances=20_000 if quick else 40_000, shard_rows=32_768
    )
    with ConsoleRun() as run:
        return collect(asked, ROOT / "stores" / f"policy-{policy.digest[:12]}-{asked.instances}", run, policy)


def quality_spec(k: int, steps: int) -> CltSpec:
    """All but k, expansion and steps as it is by default."""
    return CltSpec.model_validate(
        {
            "activations": ANY,
            "sources": [PAIR[0]],
            "targets": [PAIR[1]],
            "model": {"expansion": 8, "k": k},
            "training": {"steps": steps, "batch_size": BATCH},
        }
    )


def ours(store: ActivationStore, spec: CltSpec) -> dict[str, float]:
    """Train ours and judge it."""
    torch.set_num_threads(THREADS)
    began = time.perf_counter()
    with SparseTrainer(spec, store) as trainer:
        trainer.start()
        while trainer.step < trainer.steps:
            trainer.advance()
            if trainer.step % 500 == 0:
                say(f"ours: step {trainer.step} of {trainer.steps}")
        seconds = time.perf_counter() - began
        figures, _ = evaluate(trainer.model, store, store.rows("validation"))
        dead = float(sum(int(one.sum()) for one in trainer.dead)) / sum(trainer.model.features)
    return {"fvu": figures["fvu"], "l0": figures["l0"], "dead": dead, "seconds": seconds}


def theirs(store: ActivationStore, spec: CltSpec, optimizer: str) -> dict[str, float]:
    """Train a ``SparseCoder`` on as many rows, in the units that ours has, which do not change the figures."""
    files = {split: ROOT / "stores" / f"{store.digest[:12]}-{split}.safetensors" for split in ("train", "validation")}
    with SparseTrainer(spec, store) as trainer:
        model = trainer.model
    for split, file in files.items():
        if not file.exists():
            source, target = everything(store, list(PAIR), split)
            read, write = model.scaled([source], "read")[0], model.scaled([target], "write")[0]
            save_file({"input": read.half(), "target": write.half()}, file)
    assert spec.model.k is not None
    with Peer() as peer:
        return peer.ask(
            "train",
            train=str(files["train"]),
            held_out=str(files["validation"]),
            features=model.features[0],
            k=spec.model.k,
            batch_size=spec.training.batch_size,
            steps=spec.training.steps,
            optimizer=optimizer,
            seed=0,
            threads=THREADS,
        )


def quality(afresh: bool, quick: bool) -> dict[str, Figure]:
    """Share of the variance of held-out rows that is not explained, of models with as many active features."""
    store, steps = real(quick), 300 if quick else 4000
    figures: dict[str, Figure] = {}
    dead = []
    for k in QUALITY_K:
        spec = quality_spec(k, steps)
        asked = [store.digest, spec.model_dump(mode="json")]
        own = measured(f"ours-k{k}", asked, SOURCES, afresh, partial(ours, store, spec))
        others = {}
        for optimizer in ("adam", "signum"):
            asked_of = [store.digest, k, steps, optimizer]
            others[optimizer] = measured(
                f"theirs-{optimizer}-k{k}", asked_of, BENCH[2:], afresh, partial(theirs, store, spec, optimizer)
            )
        said = ", ".join(f"{name} {one['fvu']:.5f} (l0 {one['l0']:.2f})" for name, one in others.items())
        say(f"k {k}: fvu {own['fvu']:.5f} (l0 {own['l0']:.2f}, dead {own['dead']:.3f}); others {said}")
        best = min(one["fvu"] for one in others.values())
        figures[f"fvu_ratio_k{k}"] = Figure(own["fvu"], "<=", 1.0, best, of_ratio=True)
        dead.append(own["dead"])
    # The form has no less-than: of a thousand features nine may be dead.
    return {**figures, "dead_fraction": Figure(max(dead), "<=", 0.0099)}


def policy(afresh: bool) -> dict[str, Figure]:
    """The policy that all this is of."""
    sources = ("ethogram/specs/clt.py", "services/clt/policy")

    def measure() -> dict[str, float]:
        found = policy_gap(ROOT / f"policy-{code(*sources)}", say)
        return {"gap": found.gap, "minutes": found.seconds / 60}

    found = measured("policy", PolicySpec().model_dump(mode="json"), sources, afresh, measure)
    return {
        "policy_gap": Figure(found["gap"], "<=", 0.03),
        "policy_minutes": Figure(found["minutes"], "<=", 20.0),
    }


def main() -> None:
    """The benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.clt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["all", *PARTS], default="all")
    parser.add_argument("--quick", action="store_true", help="a brief policy and few steps for the part quality")
    parser.add_argument("--afresh", action="store_true", help="measure again what was measured before")
    given = parser.parse_args()
    torch.manual_seed(0)
    parts: dict[str, Callable[[], dict[str, Figure]]] = {
        "speed": lambda: speed(given.afresh),
        "memory": lambda: memory(given.afresh),
        "loader": lambda: loader(given.afresh),
        "quality": lambda: quality(given.afresh, given.quick),
        "policy": lambda: policy(given.afresh),
    }
    figures: dict[str, Figure] = {}
    for name, part in parts.items():
        if given.part in ("all", name):
            figures |= part()
    whole = form("clt", figures)
    print(json.dumps(whole))
    sys.exit(0 if whole["ok"] else 1)


if __name__ == "__main__":
    main()
