"""Runs every job on a tiny fixed spec, and reduces what it makes to digests and a few numbers.

``python -m tests.golden.compute`` prints one JSON object: for each case ``digests`` (SHA-256 of tensors, columns,
histories and figures) and ``numbers`` (norms and figures, for machines that round otherwise). Start it by
:func:`tests.golden.record.computed`, which makes the arithmetic the same on all x86-64 processors.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor

from ethogram.specs.kinds import KINDS
from services.clt.activations.store import ActivationStore
from services.clt.policy.decode import greedy, sample
from services.clt.policy.model import AttentionPolicy
from services.clt.sparse.model import SparseModel
from services.crossmodal.codec import Codec
from services.zoo.dataset import Zoo
from tests.recorder import Recorder

HERE = Path(__file__).parent
ARTIFACTS, CASES = HERE / "artifacts", HERE / "cases.json"
Found = dict[str, dict[str, Any]]


class Keeper(Recorder):
    """Keeps artifacts as folders, and all metrics."""

    def __init__(self, folder: Path, inputs: Mapping[str, Path]) -> None:
        super().__init__(folder, inputs=inputs)
        self.folder = folder
        self.history: dict[str, list[tuple[int, float]]] = {}

    def metric(self, step: int, **values: float) -> None:
        for name, value in values.items():
            self.history.setdefault(name, []).append((step, float(value)))

    def artifact(self, name: str, type: str, folder: Path) -> None:
        # Reports are pictures of what is here already.
        if name != "report":
            super().artifact(name, type, folder)


class Digests:
    """Collects what a case makes."""

    def __init__(self) -> None:
        self.found: Found = {"digests": {}, "numbers": {}}

    def text(self, name: str, value: Any) -> None:
        """Of anything that JSON holds; floats are written to the last bit."""
        self.found["digests"][name] = _sha(json.dumps(value, sort_keys=True).encode())

    def number(self, name: str, value: float) -> None:
        self.found["numbers"][name] = float(value)

    def tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Of tensors by name, whatever file they are in."""
        parts = []
        for key, tensor in sorted(tensors.items()):
            plain = tensor.detach().cpu().contiguous()
            parts.append(f"{key} {plain.dtype} {tuple(plain.shape)} ".encode() + _bytes(plain))
        self.found["digests"][name] = _sha(b"".join(parts))
        floats = [tensor.detach().double().flatten() for tensor in tensors.values() if tensor.is_floating_point()]
        if floats:
            self.number(f"{name} norm", float(torch.cat(floats).nan_to_num(0, 0, 0).norm()))

    def folder(self, folder: Path) -> None:
        """Of every safetensors file and every column of a parquet file below ``folder``."""
        for path in sorted(folder.rglob("*.safetensors")):
            self.tensors(str(path.relative_to(folder)), load_file(path))
        for path in sorted(folder.rglob("*.parquet")):
            table = parquet.read_table(path)
            for column in table.column_names:
                name = f"{path.relative_to(folder)} {column}"
                values = table[column].to_pylist()
                self.text(name, values)
                numbers = [float(v) for v in _leaves(values) if isinstance(v, float) and abs(v) < float("inf")]
                if numbers:
                    self.number(f"{name} norm", float(torch.tensor(numbers, dtype=torch.float64).norm()))


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, dict):
        for part in value.values():
            yield from _leaves(part)
    else:
        yield value


def job(kind: str, spec: Mapping[str, Any], inputs: Mapping[str, str]) -> Found:
    """What a job makes of ``spec``; ``inputs``: spec path to a folder of :data:`ARTIFACTS`."""
    digests = Digests()
    with tempfile.TemporaryDirectory() as scratch:
        keeper = Keeper(Path(scratch), {path: ARTIFACTS / name for path, name in inputs.items()})
        module, _, function = KINDS[kind].job.partition(":")
        result = getattr(import_module(module), function)(KINDS[kind].spec.model_validate(spec), keeper)
        digests.folder(keeper.folder)
    for name, values in keeper.history.items():
        # Without the name of its group, if it has one.
        short = name.rpartition("/")[2]
        digests.text(f"history {short}", values)
        digests.number(f"last {short}", values[-1][1])
    for name, value in result.items():
        digests.text(f"result {name}", value)
    for name, value in (result.get("figures") or {}).items():
        if isinstance(value, float | int):
            digests.number(f"figure {name}", value)
    return digests.found


def zoo() -> Found:
    digests, zoo = Digests(), Zoo.load(ARTIFACTS / "zoo")
    digests.tensors("networks", {**zoo.params, "probes": zoo.probes, "index": zoo.index})
    digests.tensors("signatures", {"": zoo.signatures})
    digests.text("digest", zoo.digest)
    return digests.found


def codec(name: str) -> Found:
    digests, zoo, codec = Digests(), Zoo.load(ARTIFACTS / "zoo"), Codec.load(ARTIFACTS / name)
    networks = {key: tensor[:8] for key, tensor in zoo.params.items()}
    latents = codec.encode(networks)
    digests.tensors("latents", {"": latents})
    digests.tensors("decoded", codec.decode(latents))
    behavior = codec.behaviors[0].name
    for mode in ("residual", "direct"):
        steered, strength = codec.steer(networks, [("add", behavior)], mode=mode)
        digests.tensors(f"steered {mode}", {**steered, "strength": strength})
    recall, false_positives = codec.evaluate(networks)
    digests.tensors("behaviour", {"recall": recall, "false_positive_rate": false_positives})
    return digests.found


def policy() -> Found:
    digests, policy = Digests(), AttentionPolicy.load(ARTIFACTS / "policy")
    cities = torch.rand(16, policy.nodes, 2, generator=torch.Generator().manual_seed(1))
    digests.tensors("tours", {"greedy": greedy(policy, cities)})
    digests.tensors("stream", {"": policy.encoder(cities)})
    digests.text("digest", policy.digest)
    digests.tensors("sampled", {"": sample(policy, cities, 4, torch.Generator().manual_seed(2))})
    return digests.found


def store() -> Found:
    digests, store = Digests(), ActivationStore.open(ARTIFACTS / "activations")
    names = [*store.hooks, "instance", "position"]
    for split in ("train", "validation"):
        for number in range(len(store.shards(split))):
            digests.tensors(f"{split} {number}", dict(zip(names, store.read(split, number, names), strict=True)))
    for hook in store.hooks:
        digests.tensors(f"mean {hook}", {"": store.statistics(hook).mean})
    digests.text("digest", store.digest)
    return digests.found


def sparse(name: str) -> Found:
    digests, model = Digests(), SparseModel.load(ARTIFACTS / name)
    store = ActivationStore.open(ARTIFACTS / "activations")
    rows = [tensor.float() for tensor in store.read("validation", 0, model.streams.sources)]
    digests.tensors("outputs", dict(zip(model.streams.targets, model(rows), strict=True)))
    active = [code.dense() for code in model.encode(model.scaled(rows, "read"))]
    digests.tensors("features", {str(number): values for number, values in enumerate(active)})
    return digests.found


LOADS: dict[str, Callable[[], Found]] = {
    "load zoo": zoo,
    "load codec-mlp": lambda: codec("codec-mlp"),
    "load codec-transformer": lambda: codec("codec-transformer"),
    "load policy": policy,
    "load activations": store,
    "load sae": lambda: sparse("sae"),
    "load clt": lambda: sparse("clt"),
}


def compute() -> dict[str, Found]:
    """All cases: the jobs of ``cases.json``, and the artifacts of an earlier version as the loaders read them."""
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    # Pictures take most of the time, and are compared nowhere.
    Figure.savefig = lambda *_, **__: None  # type: ignore[method-assign]
    cases = json.loads(CASES.read_text())
    found = {name: job(case["kind"], case["spec"], case["inputs"]) for name, case in cases.items()}
    return found | {name: load() for name, load in LOADS.items()}


if __name__ == "__main__":
    # What the jobs print is no part of the answer.
    sys.stdout.write("\n" + json.dumps(compute()) + "\n")
