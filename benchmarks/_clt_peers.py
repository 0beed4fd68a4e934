"""Other people's transcoders, run in a process of their own and driven directly: no loop of theirs.

Reads lines ``[function, {argument: value}]`` and answers each with a JSON object: ``make`` a model for the batches of
a safetensors file, then take ``steps`` on them in turn or measure their ``memory``; or ``train`` and evaluate one.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_ROWS_AT_ONCE = 8192


def resident(name: str) -> float:
    """A line of this process's status, MiB: ``VmRSS`` is what is resident, ``VmHWM`` the most there was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {name}")


def extra_mib(work: Callable[[], object]) -> float:
    """Most memory that ``work`` took beyond what was resident before."""
    Path("/proc/self/clear_refs").write_text("5")  # The most there was, from now on.
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def pair(width: int, features: int, k: int) -> Any:
    """A ``SparseCoder`` in its transcoder form."""
    sparsify = import_module("sparsify")
    config = sparsify.SparseCoderConfig(num_latents=features, k=k, transcode=True)
    return sparsify.SparseCoder(width, config)


class Pair:
    """Steps of a ``SparseCoder``: its own share of unexplained variance, and Adam."""

    def __init__(self, batches: list[dict[str, Tensor]], features: int, k: int) -> None:
        self.batches, self.done = batches, 0
        self.model = pair(batches[0]["input.0"].shape[1], features, k)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = self.model(batch["input.0"], batch["target.0"]).fvu
        return found

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.loss(self.batches[self.done % len(self.batches)]).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.done += 1


class Cross(Pair):
    """Steps of a ``CrossLayerTranscoder``: its own error of reconstruction, without its penalties, and Adam."""

    def __init__(self, batches: list[dict[str, Tensor]], features: int, k: int) -> None:
        self.batches, self.done = batches, 0
        self.layers, width = len(batches[0]) // 2, batches[0]["input.0"].shape[1]
        config = import_module("clt.config")
        # It takes the largest of all layers together.
        form = config.CLTConfig(
            num_features=features, num_layers=self.layers, d_model=width, activation_fn="topk", topk_k=k * self.layers
        )
        training = config.TrainingConfig(
            learning_rate=1e-3, training_steps=1000, normalization_method="none", activation_path="none"
        )
        model = import_module("clt.models.clt")
        self.model = model.CrossLayerTranscoder(form, process_group=None, device=torch.device("cpu"))
        self.losses = import_module("clt.training.losses").LossManager(training)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        inputs, targets = ({i: batch[f"{side}.{i}"] for i in range(self.layers)} for side in ("input", "target"))
        found: Tensor = self.losses.compute_reconstruction_loss(self.model(inputs), targets)
        return found


def train(
    *,
    train: str,
    held_out: str,
    features: int,
    k: int,
    batch_size: int,
    steps: int,
    optimizer: str,
    seed: int,
    threads: int,
) -> dict[str, float]:
    """Train a ``SparseCoder`` as its trainer does by default, with its own rates of learning, on so many rows, and
    judge it. Rows come in a new order in each epoch."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    rows = load_file(train)
    inputs, targets = rows["input"], rows["target"]
    model = pair(inputs.shape[1], features, k)
    rate = {"adam": 2e-4, "signum": 5e-3}[optimizer] / math.sqrt(features / 2**14)
    stepper: Any
    if optimizer == "adam":
        stepper = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
        # Its default, in a run that is not short.
        rise = min(1000, steps // 10)
        falling = torch.optim.lr_scheduler.LambdaLR(
            stepper, lambda step: min(step / max(1, rise), (steps - step) / max(1, steps - rise))
        )
    else:
        signum = import_module("sparsify.sign_sgd").SignSGD(model.parameters(), lr=rate)
        stepper = import_module("schedulefree").ScheduleFreeWrapper(signum, momentum=0.95)
        stepper.train()
    # Its own start: the encoder is centred, and the decoder writes the mean.
    first = inputs[:65_536].float(), targets[:65_536].float()
    with torch.no_grad():
        model.encoder.bias.copy_(-first[0].mean(0) @ model.encoder.weight.T)
        model.b_dec.copy_(first[1].mean(0))
    order = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.int64)
    began = time.perf_counter()
    for step in range(steps):
        while len(queue) < batch_size:
            queue = torch.cat([queue, torch.randperm(len(inputs), generator=order)])
        chosen, queue = queue[:batch_size], queue[batch_size:]
        stepper.zero_grad()
        model(inputs[chosen].float(), targets[chosen].float()).fvu.backward()
        stepper.step()
        if optimizer == "adam":
            falling.step()
        if step % 100 == 0:
            sys.stderr.write(f"peer: step {step} of {steps}\n")
    seconds = time.perf_counter() - began
    if optimizer != "adam":
        stepper.eval()
    return {**judge(model, load_file(held_out)), "seconds": seconds}


@torch.no_grad()
def judge(model: nn.Module, rows: dict[str, Tensor]) -> dict[str, float]:
    """Share of the variance about the mean that is not explained, and active features of a row."""
    error = active = 0.0
    for start in range(0, len(rows["input"]), _ROWS_AT_ONCE):
        part = rows["input"][start : start + _ROWS_AT_ONCE].float(), rows["target"][start : start + _ROWS_AT_ONCE]
        found = model(part[0])
        error += float((found.sae_out - part[1].float()).double().square().sum())
        active += float((found.latent_acts > 0).sum())
    targets = rows["target"].double()
    variance = float((targets - targets.mean(0)).square().sum())
    return {"fvu": error / variance, "l0": active / len(targets)}


MADE: list[Pair] = []
"""The model that steps are taken of."""


def take(count: int) -> None:
    """Take steps."""
    for _ in range(count):
        MADE[0].step()


def make(kind: str, file: str, features: int, k: int, threads: int) -> dict[str, float]:
    """Make the model to take steps of."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    tensors = load_file(file)
    count = 1 + max(int(name.split(".")[2]) for name in tensors)
    batches = [
        {name.rpartition(".")[0]: tensor for name, tensor in tensors.items() if name.endswith(f".{number}")}
        for number in range(count)
    ]
    MADE[:] = [(Pair if kind == "pair" else Cross)(batches, features, k)]
    return {}


def steps(count: int) -> dict[str, float]:
    """Seconds that so many steps take."""
    began = time.perf_counter()
    take(count)
    return {"seconds": time.perf_counter() - began}


def memory(count: int) -> dict[str, float]:
    """Memory that so many steps take beyond what was there, MiB."""
    return {"mib": extra_mib(lambda: take(count))}


if __name__ == "__main__":
    functions: dict[str, Callable[..., dict[str, float]]]
    functions = {"make": make, "steps": steps, "memory": memory, "train": train}
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(functions[name](**arguments)), file=answers, flush=True)
