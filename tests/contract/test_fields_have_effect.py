"""No field of any spec is ignored in silence: set to another value, it changes what the job makes, or it is refused, or
the job warns of it; and what a job warns of does change nothing.

Each field of each base is set to other values, and the jobs of both specs are run, or what they would use is compared.
A new field is tried without further ado; one that cannot have an effect here is in :data:`EXEMPT`, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.kinds import KINDS
from services.clt.activations.store import ActivationStore
from services.clt.policy.tsp import instances
from services.clt.sparse.sweep import run_specs
from services.crossmodal.train import CodecTrainer
from services.runtime.seeds import generator
from services.runtime.training import fit
from services.zoo.dataset import Zoo
from tests.golden.compute import ARTIFACTS
from tests.recorder import Recorder
from tests.tiny_models import TEXTS, save_model

REF = {"artifact": "x"}
TRAINING = {"steps": 6, "batch_size": 48, "validate_every": 3, "warm_up": 2, "learning_rate": 5e-3, "dead_after": 60}
PAIR = {"sources": ["encoder_layer_0_pre_mlp"], "targets": ["encoder_layer_0_mlp"]}
STORE = {"activations": "activations"}
POLICY: dict[str, Any] = {
    "nodes": 6,
    "model": {"hidden_dim": 12, "layers": 2, "heads": 3, "feed_forward": 16},
    "training": {"steps": 4, "batch_size": 8, "validate_every": 2, "validation": 8, "warm_up": 1},
    "evaluation": 4,
    "samples": 2,
}
CODEC = {"latent_dim": 6, "hidden_dim": 8, "depth": 1, "heads": 2}
CODEC_TRAINING = {
    **{"steps": 4, "batch_size": 16, "queries": 16, "learning_rate": 2e-3, "warm_up": 1, "validate_every": 1},
    "precision": "float32",
}
ZOO: dict[str, Any] = {
    "vocab_size": 5,
    "sequence_length": 4,
    "patterns": [
        *({"name": "starts_with", "token": letter} for letter in "AB"),
        {"name": "ends_with", "token": "B"},
        {"name": "vowel_consonant"},
    ],
    "max_patterns_per_batch": 2,
    "min_accuracy": 0.0,
    "signature": {"probes": 8},
    "subjects": 8,
    "subject": {"layers": 1, "neurons": 6},
}
STAGED = {
    **{"examples": 64, "batch_size": 32, "epochs": 3, "improvement_epochs": 3, "patience": 1},
    **{"min_degradation_threshold": 0.0, "max_instability": 1.0, "min_specificity": -1.0},
}


def sparse(**sections: Any) -> dict[str, Any]:
    training = TRAINING | sections.pop("training", {})
    model = {"expansion": 4.0} | sections.pop("model", {})
    return {"activations": REF, "model": model, "training": training, **sections}


def codec(**sections: Any) -> dict[str, Any]:
    sections = {"codec": CODEC | sections.pop("codec", {}), **sections}
    sections["training"] = CODEC_TRAINING | sections.get("training", {})
    return {"zoo": REF, "held_out": 0.25, "validation": 0.1, **sections}


# Name, kind, spec, and inputs: folders of the golden artifacts, or one that the fixture makes.
BASES: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
    (
        "topk, dying",
        "sae",
        sparse(
            hook="encoder_layer_1_mlp",
            model={"k": 4},
            loss={"auxk": 0.03, "auxk_features": 8},
            training={"revive_every": 2, "steps": 8},
        ),
        STORE,
    ),
    ("relu", "sae", sparse(hook="encoder_layer_1_mlp", model={"activation": "relu"}, loss={"l1": 1e-2}), STORE),
    ("jumprelu", "sae", sparse(hook="encoder_layer_1_mlp", model={"activation": "jumprelu"}, loss={"l0": 1e-2}), STORE),
    ("dense relu", "clt", sparse(**PAIR, model={"activation": "relu"}), STORE),
    (
        "batchtopk",
        "clt",
        sparse(
            **PAIR,
            model={"activation": "batchtopk", "k_ratio": 0.2},
            loss={"group_features": 1e-2, "group_heads": 1e-2, "group_size": 4, "heads": 2},
        ),
        STORE,
    ),
    (
        "dictionary",
        "clt",
        sparse(**PAIR, model={"k": 3, "dictionary": REF}),
        STORE | {"model.dictionary": "sae-target"},
    ),
    ("epochs", "clt", sparse(kind="cross_layer", training={"epochs": 0.5, "snapshots": 2}), STORE),
    ("short", "clt", sparse(kind="per_layer", training={"dead_after": 100_000}), STORE),
    (
        "grid",
        "sweep",
        sparse(grid=[{"option": "model.activation", "values": ["topk", "batchtopk"]}], pairs=["mlp"]),
        STORE,
    ),
    ("one activation", "sweep", sparse(model={"activation": "relu"}, loss={"l1": 1e-3}, pairs=["mlp"]), STORE),
    ("pomo", "policy", POLICY, {}),
    ("rollout", "policy", POLICY | {"evaluation": 0, "training": {**POLICY["training"], "baseline": "rollout"}}, {}),
    ("cities", "policy", {**POLICY, "nodes": 20, "cities": REF}, {"cities": "cities"}),
    (
        "policy",
        "activations",
        {"policy": REF, "instances": 24, "validation": 0.2, "shard_rows": 32},
        {"policy": "policy"},
    ),
    (
        "cities",
        "activations",
        {"policy": REF, "cities": REF, "instances": 24, "validation": 0.2, "pairs": ["adjacent"]},
        {"policy": "policy", "cities": "cities"},
    ),
    (
        "texts",
        "activations",
        {"language_model": {"model": "gpt2", "dataset": "texts", "context": 8}, "instances": 20, "validation": 0.2},
        {},
    ),
    ("flat mlp", "crossmodal", codec(codec={"signature_components": 8}), {"zoo": "zoo"}),
    ("mlp of tokens", "crossmodal", codec(codec={"pooling": "mean", "inputs": "both"}), {"zoo": "zoo"}),
    (
        "mlp of signatures",
        "crossmodal",
        codec(codec={"pooling": "max"}, loss={"gamma": 0.0, "variance": 0.1}),
        {"zoo": "zoo"},
    ),
    (
        "transformer",
        "crossmodal",
        codec(
            codec={"architecture": "transformer", "pooling": "cls", "granularity": "chunk", "chunk": 5},
            loss={"gamma": 0.3, "gamma_end": 0.1, "temperature_end": 0.3, "projection": 4},
            training={"schedule": "plateau", "plateau_patience": 1, "patience": 2, "learning_rate": 0.5},
        ),
        {"zoo": "zoo"},
    ),
    (
        "reconstruction alone",
        "crossmodal",
        codec(loss={"gamma": 0.1, "behavior": 0.0, "steering": 0.0, "direct": 0.0}),
        {"zoo": "zoo"},
    ),
    ("contrastive alone", "crossmodal", codec(loss={"gamma": 1.0, "reconstruction": 0.0}), {"zoo": "zoo"}),
    ("plain", "generation", {**ZOO, "training": {"steps": 12, "batch_size": 16}}, {}),
    (
        "signatures",
        "generation",
        {
            **ZOO,
            "training": {"steps": 4, "batch_size": 16},
            "signature": {"probes": 12, "methods": ["mean", "pca"], "activations": "post"},
            "counterfactual": {"steps": 4},
        },
        {},
    ),
    (
        "baseline",
        "generation",
        {**ZOO, "training": {"steps": 4, "batch_size": 16}, "signature": {"baseline": REF, "methods": ["entropy"]}},
        {"signature.baseline": "zoo"},
    ),
    ("staged", "generation", {**ZOO, "subjects": 4, "staged": STAGED, "format": {"style": "interwoven"}}, {}),
]

EXEMPT = {
    "wandb": "a copy of the metrics elsewhere",
    "hub": "a copy of the result elsewhere",
    "root": "where the store is kept",
    "shards": "jobs that make the same zoo",
    "part": "set by a job that divides its zoo",
    "format.tokenizer": "counts tokens: needs a tokenizer, and is tested with one in tests/generation/test_format.py",
    "training.compile": "the same model, compiled",
    "activations.batch_size": "instances at once: the same activations",
    "format.include_modification": "None means what False says without stages, and what True says with them",
    "codec.canonicalize": "None is one of the two, by the zoo",
    "language_model.model": "another model: tested in tests/clt/test_activations_language.py",
    "language_model.config": "of datasets on the Hub",
}
"""Fields that are not tried, or of one kind alone, and why."""

# Values to try where there is no rule for them, or where those of the rule change nothing by chance. Without any, the
# field is an input, which a base has or has not.
VALUES: dict[str, list[Any]] = {
    # A CPU has float32 for auto.
    "training.precision": ["bfloat16"],
    "hook": ["encoder_layer_0_mlp"],
    "sources": [["encoder_layer_0_mlp"]],
    "targets": [["encoder_layer_1_mlp"]],
    "pairs": [["mlp"], ["decoder"], ["encoder_layer_0_pre_mlp->encoder_layer_0_mlp"]],
    "hooks": [["encoder_layer_0_attention"]],
    "grid": [[{"option": "model.k", "values": ["2", "3"]}]],
    "model.dictionary": [],
    "training.dead_after": [100, 100_000],
    "training.validation_rows": [20],
    "training.revive_every": [3, 1000],
    "training.snapshots": [3, 1000],
    "training.snapshot_epochs": [0.1, 100.0],
    "training.epochs": [0.3],
    "model.k": [2],
    "model.k_ratio": [0.4],
    "training.decay": [0.9],
    "loss.l0": [0.1],
    "loss.auxk": [0.5],
    "loss.auxk_features": [2],
    "loss.group_size": [2],
    "loss.heads": [4],
    "nodes": [7],
    "model.heads": [2],
    "model.clipping": [3.0],
    "dtype": ["float32"],
    "validation": [0.3],
    "held_out": [0.4],
    "language_model.dataset": ["other texts"],
    "language_model.split": ["test"],
    "language_model.column": ["body"],
    "policy": [],
    "language_model": [],
    "activations": [],
    "zoo": [],
    "cities": [],
    "codec.signature_components": [4],
    "codec.chunk": [9],
    "codec.heads": [4],
    "training.queries": [32],
    "training.batch_size": [24],
    "training.accumulation": [2],
    "training.several": [1.0],
    "training.patience": [1],
    "training.plateau_patience": [2],
    "loss.gamma": [0.4],
    "loss.gamma_end": [0.4],
    "patterns": [[{"name": "ends_with", "token": "C"}, {"name": "starts_with", "token": "A"}, {"name": "palindrome"}]],
    "min_patterns_per_batch": [2],
    "max_patterns_per_batch": [1],
    "sequence_length": [5],
    "vocab_size": [6],
    "min_accuracy": [0.6],
    "subject.layers": [2],
    "subject.neurons": [5],
    "subject.activations": [["tanh"]],
    "subject.dropout": [0.3],
    "training.learning_rate": [3e-3, 2e-2],
    "signature.methods": [["std"]],
    "signature.baseline": [],
    "signature.probes": [10],
    "signature.components": [2],
    "signature.bins": [3],
    "counterfactual": [{"steps": 5}],
    "staged": [STAGED],
    "staged.learning_rate": [{"min": 2e-2, "max": 3e-2}],
    "staged.min_degradation_threshold": [0.3],
    "staged.min_specificity": [0.2],
    "staged.max_instability": [0.0],
    "format": [{"style": "separate"}],
    "format.digits": [2],
}


def flips(spec: Spec, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each field of ``spec``, at any depth, with other values."""
    for name, field in type(spec).model_fields.items():
        path, value = f"{prefix}{name}", getattr(spec, name)
        if isinstance(value, Spec) and name not in ("layers", "neurons", "dropout", "learning_rate"):
            yield from flips(value, f"{path}.")
        else:
            values = VALUES[path] if path in VALUES else others(field.annotation, value)
            yield from ((path, other) for other in values if other != value)


def others(annotation: Any, value: Any) -> list[Any]:
    """Values of a type that differ from ``value``."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Literal:
        return [other for other in get_args(annotation) if other != value]
    if annotation is bool:
        return [not value]
    if annotation is int:
        return [2 * value if value else 3]
    if annotation is float:
        return [value / 2 if value else 0.3]
    return []


def changed(spec: Spec, path: str, value: Any) -> dict[str, Any]:
    fields = spec.model_dump(mode="json")
    *parents, name = path.split(".")
    holder = fields
    for parent in parents:
        holder = holder[parent]
    holder[name] = value
    return fields


def digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()


class Kept(Recorder):
    """Keeps validations alone of the metrics: the loss has terms that no gradient comes from."""

    def metric(self, step: int, **values: float) -> None:
        super().metric(step, **{name: value for name, value in values.items() if name.startswith(("valid", "dead"))})

    def artifact(self, name: str, type: str, folder: Path) -> None:
        # Reports show what is here already.
        if name != "report":
            super().artifact(name, type, folder)


def of_job(kind: str, spec: Spec, inputs: Mapping[str, Path], folder: Path) -> Any:
    """Files, validations and result of a job."""
    run = Kept(folder, inputs=inputs)
    result = KINDS[kind].load_job()(spec, run)
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    tensors = {name: digest(load_file(path)) for name, path in files.items() if path.suffix == ".safetensors"}
    others = {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if path.suffix in (".parquet", ".jsonl")
    }
    manifest = [path.read_text() for name, path in files.items() if name.endswith("manifest.json")]
    pairs = [json.loads(text)["pairs"] for text in manifest]
    return [tensors, others, pairs, {step: values for step, values in run.metrics.items() if values}, result]


def of_codec(spec: Any, inputs: Mapping[str, Path]) -> Any:
    """The model, the validations that were made of it, and how they decide: the evaluation takes long."""
    zoo = Zoo.load(inputs["zoo"])
    trainer = CodecTrainer(spec, zoo)
    fit(trainer)
    model = trainer.codec().model
    validated = [row["step"] for row in trainer.progress.history if "validation_loss" in row]
    return [digest(model.state_dict()), validated, trainer.patience, trainer.optimization.plateau]


def of_sweep(spec: Any, inputs: Mapping[str, Path]) -> Any:
    """The runs, without the fields that have no effect on them: what those have is tried by themselves."""
    found = {}
    for name, run in run_specs(spec, ActivationStore.open(inputs["activations"])).items():
        fields = run.model_dump(mode="json")
        for path, _ in run.idle():
            section, _, field = path.partition(".")
            del fields[section][field]
        found[name] = fields
    return found


def outcome(kind: str, spec: Spec, inputs: Mapping[str, Path], folder: Path) -> Any:
    special: dict[str, Callable[[Any, Mapping[str, Path]], Any]] = {"crossmodal": of_codec, "sweep": of_sweep}
    found = special[kind](spec, inputs) if kind in special else of_job(kind, spec, inputs, folder)
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of inputs by name."""
    folder = tmp_path_factory.mktemp("inputs")
    found = {path.name: path for path in ARTIFACTS.iterdir() if path.is_dir()}
    (folder / "cities").mkdir()
    np.save(folder / "cities" / "mine.npy", instances(40, 6, generator(0, "mine")).numpy())
    for name, texts in (("texts", TEXTS), ("other texts", TEXTS[::-1])):
        rows = [json.dumps({"text": text, "body": " ".join(text.split()[1:])}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    return found | {"cities": folder / "cities", "gpt2": save_model(folder / "gpt2", "gpt2"), "inputs": folder}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("base", BASES, ids=[f"{kind}-{name}" for name, kind, *_ in BASES])
def test_a_field_has_an_effect_or_is_warned_of(
    base: tuple[str, str, dict[str, Any], dict[str, str]],
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, kind, given, inputs = base
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setenv("ETHOGRAM_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    folders = {path: places[place] for path, place in inputs.items()}

    def found(fields: dict[str, Any], number: int) -> tuple[Spec, Any]:
        spec = KINDS[kind].spec.model_validate(fields)
        language = fields.get("language_model")
        if language:
            here = {"model": str(places["gpt2"]), "dataset": str(places["inputs"] / f"{language['dataset']}.jsonl")}
            fields = fields | {"language_model": language | here}
        folder = tmp_path / str(number)
        folder.mkdir()
        result = outcome(kind, KINDS[kind].spec.model_validate(fields), folders, folder)
        return spec, result

    first, before = found(given, 0)
    # The same spec makes the same: otherwise everything would have an effect.
    assert found(given, 1)[1] == before
    tried, silent, wrong = set(), [], []
    for number, (path, value) in enumerate(flips(first), 2):
        if any(f"{path}.".startswith(f"{exempt}.") for exempt in EXEMPT) or f"{kind}.{path}" in EXEMPT:
            continue
        tried.add(path)
        try:
            spec, after = found(changed(first, path, value), number)
        except (ValidationError, InvalidInput):
            continue
        warned = any(text.startswith(f"{path}: has no effect") for text in spec.warnings())
        if after == before and not warned:
            silent.append(f"{path} = {value}")
        if after != before and warned:
            wrong.append(f"{path} = {value}")
    assert not silent, f"no effect, and no word of it: {silent}"
    assert not wrong, f"warned of, though they have an effect: {wrong}"
    assert len(tried) > 5


def test_what_is_exempt_exists() -> None:
    """A reason is of a field that there is."""

    def paths(spec: type[Spec], prefix: str = "") -> Iterator[str]:
        for name, field in spec.model_fields.items():
            yield f"{prefix}{name}"
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, Spec):
                    yield from paths(part, f"{prefix}{name}.")

    known = {f"{kind.name}.{path}" for kind in KINDS.values() for path in paths(kind.spec)}
    for path in [*EXEMPT, *VALUES]:
        assert path in known or any(field.partition(".")[2] == path for field in known), path
