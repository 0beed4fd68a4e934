"""Other people's transcoders, run in a process of their own and driven directly: no loop of theirs.

Reads lines ``[function, {argument: value}]`` and answers each with a JSON object: ``make`` a model for the batches of
a safetensors file, then take ``steps`` on them in turn or measure their ``memory``; or ``train`` and evaluate one.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib import import_module
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_ROWS_AT_ONCE = 8192
Loss = Callable[[dict[str, Tensor]], Tensor]
"""Of a batch: ``input.LAYER`` and ``target.LAYER``, each ``[rows, width]``."""


def resident(name: str) -> float:
    """A line of this process's status, MiB: ``VmRSS`` is what is resident, ``VmHWM`` the most there was."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise OSError(f"no {name}")


def extra_mib(work: Callable[[], object]) -> float:
    """Most memory that ``work`` took beyond what was resident before."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # The most there was, from now on.
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def pair(width: int, features: int, k: int) -> tuple[Any, Loss]:
    """A ``SparseCoder`` in its transcoder form, and its own share of unexplained variance."""
    sparsify = import_module("sparsify")
    config = sparsify.SparseCoderConfig(num_latents=features, k=k, transcode=True)
    model = sparsify.SparseCoder(width, config)
    return model, lambda batch: model(batch["input.0"], batch["target.0"]).fvu


def cross(width: int, features: int, k: int, layers: int) -> tuple[Any, Loss]:
    """A ``CrossLayerTranscoder``, and its own error of reconstruction without its penalties."""
    config = import_module("clt.config")
    # It takes the largest of all layers together.
    form = config.CLTConfig(
        num_features=features, num_layers=layers, d_model=width, activation_fn="topk", topk_k=k * layers
    )
    training = config.TrainingConfig(
        learning_rate=1e-3, training_steps=1000, normalization_method="none", activation_path="none"
    )
    models, losses = import_module("clt.models.clt"), import_module("clt.training.losses").LossManager(training)
    model = models.CrossLayerTranscoder(form, process_group=None, device=torch.device("cpu"))

    def loss(batch: dict[str, Tensor]) -> Tensor:
        inputs, targets = ({i: batch[f"{side}.{i}"] for i in range(layers)} for side in ("input", "target"))
        error: Tensor = losses.compute_reconstruction_loss(model(inputs), targets)
        return error

    return model, loss


def train(
    *, train: str, held_out: str, features: int, k: int, batch_size: int, steps: int, optimizer: str, threads: int
) -> dict[str, float]:
    """Train a ``SparseCoder`` as its trainer does by default, with its own rates of learning, on so many rows, and
    judge it. Rows come in a new order in each epoch."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = load_file(train)
    inputs, targets = rows["input"], rows["target"]
    model, _ = pair(inputs.shape[1], features, k)
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
    order = torch.Generator().manual_seed(0)
    queue = torch.empty(0, dtype=torch.int64)
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
    if optimizer != "adam":
        stepper.eval()
    return judge(model, load_file(held_out))


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


STEPS: list[Callable[[], None]] = []
"""Takes a step with the model that :func:`make` made."""


def take(count: int) -> None:
    """Take steps."""
    for _ in range(count):
        STEPS[0]()


def make(file: str, features: int, k: int, threads: int) -> dict[str, float]:
    """Make the model of which Adam takes steps, on the batches of ``file`` in turn."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batches: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in load_file(file).items():
        stream, _, number = name.rpartition(".")
        batches[number][stream] = tensor
    layers, width = len(batches["0"]) // 2, batches["0"]["input.0"].shape[1]
    model, loss = pair(width, features, k) if layers == 1 else cross(width, features, k, layers)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    turns = cycle([batches[number] for number in sorted(batches)])

    def step() -> None:
        optimizer.zero_grad()
        loss(next(turns)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    STEPS[:] = [step]
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
