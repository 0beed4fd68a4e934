"""No field of any spec is ignored in silence: set to another value, it changes what the job makes, or it is refused, or
the job warns of it; and what is refused does change nothing.

Each field of each base is set to other values, and the core of the job runs with both: a few steps of its trainer, one
bucket of a zoo, a small store. A new field is tried without further ado; one that cannot have an effect here is in
:data:`EXEMPT`, with the reason.
"""

from __future__ import annotations

import hashlib
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from ethogram.cli.files import read_mapping
from ethogram.demo import FULL, QUICK
from ethogram.errors import InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.clt import CltSpec
from ethogram.specs.kinds import KINDS, Kind
from services.clt.activations.store import ActivationStore
from services.clt.policy.evaluate import evaluate, evaluation_instances
from services.clt.policy.train import PolicyTrainer
from services.clt.policy.tsp import cities_in, instances
from services.clt.sparse.model import SparseModel
from services.clt.sparse.sweep import run_specs
from services.clt.sparse.train import SparseTrainer, train
from services.crossmodal.train import CodecTrainer
from services.generation.buckets import BucketTrainer
from services.language.models import load_language_model
from services.resource import language_model
from services.resource.decoder.job import evaluate as evaluate_decoder
from services.resource.decoder.tasks import TaskTexts
from services.resource.decoder.train import DecoderTrainer
from services.resource.describe import Describer
from services.resource.export import export, validate
from services.resource.job import language_model_of, table_of
from services.resource.language_model import LanguageModelTrainer
from services.resource.train import ResourceTrainer
from services.runtime.run import warn
from services.runtime.seeds import generator
from services.runtime.training import Trainer, fit
from services.zoo.dataset import Zoo
from services.zoo.pools import Evaluation, Pools
from services.zoo.universe import Universe
from tests.conftest import Once
from tests.golden.compute import ARTIFACTS
from tests.recorder import Recorder
from tests.resource.conftest import SCHEMA as RESOURCE_SCHEMA
from tests.resource.conftest import (
    small_table,
    small_trainer,
    tiny_decoder_spec,
    tiny_reader_spec,
    write_language_model,
    write_tables,
)
from tests.resource.conftest import tiny_spec as tiny_resource_spec
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
    **{"steps": 2, "batch_size": 16, "queries": 16, "learning_rate": 2e-3, "warm_up": 1, "validate_every": 1},
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
    **{"examples": 64, "batch_size": 32, "epochs": 6, "improvement_epochs": 6, "patience": 1, "learning_rate": 0.1},
    **{"min_degradation_threshold": 0.0, "max_instability": 1.0, "max_other_degradation": 1.0, "min_specificity": -1.0},
}

RESOURCE = tiny_resource_spec(
    **{"tools": REF, "profiling": REF, "llm_model": "tiny"},
    training={"steps": 6, "validate_every": 2, "target_loss": 100.0},
).model_dump(mode="json")
TABLES = {"tools": "tables", "profiling": "tables"}


def sparse(**sections: Any) -> dict[str, Any]:
    training = TRAINING | sections.pop("training", {})
    if "epochs" in training:
        del training["steps"]
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
    ("cities", "policy", {**POLICY, "nodes": None, "cities": REF}, {"cities": "cities"}),
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
    (
        "tiny",
        "language_model",
        tiny_reader_spec(training={"copying": 1, "steps": 2, "validate_every": 3}).model_dump(mode="json"),
        {},
    ),
    ("attention", "resource", RESOURCE, TABLES),
    (
        "sum",
        "resource",
        {**RESOURCE, "encoder": {"fusion": "sum", "numbers": "xval"}, "augmentation": {"mode": "none", "mask": 0.0}},
        TABLES,
    ),
    (
        "heads",
        "decoder",
        tiny_decoder_spec(model={"heads": 4}, training={"steps": 4, "validation": 64}).model_dump(mode="json"),
        {"export": "export"},
    ),
]

ONLY = {
    "relu": ("model.", "loss."),
    "jumprelu": ("model.", "loss."),
    "dense relu": ("model.", "loss."),
    "dictionary": ("model.", "loss."),
    "batchtopk": ("model.", "loss.", "kind", "sources", "targets"),
    "epochs": ("training.steps", "training.epochs", "training.snapshot"),
    "short": ("training.revive_every", "training.dead_after", "loss.auxk"),
    "rollout": ("training.", "evaluation", "samples"),
    "cities": ("nodes", "distribution", "training.", "evaluation", "instances", "seed"),
    "mlp of tokens": ("codec.",),
    "mlp of signatures": ("codec.", "loss."),
    "transformer": ("codec.", "training.", "loss.gamma", "loss.temperature", "loss.projection"),
    "reconstruction alone": ("training.queries", "training.several", "loss."),
    "contrastive alone": ("training.queries", "training.several", "loss."),
    "signatures": ("signature.", "counterfactual", "training."),
    "baseline": ("signature.",),
    "staged": ("staged.", "format", "min_accuracy"),
    "sum": ("encoder.", "augmentation."),
}
"""Fields that are tried with a base, where others have the same neighbours as in another base."""
GRID_K = {"option": "model.k", "values": ["2", "3"]}

EXEMPT = {
    "wandb": "a copy of the metrics elsewhere",
    "hub": "a copy of the result elsewhere",
    "root": "where the store is kept",
    "generation.subjects": "how many there are of the same",
    "shards": "jobs that make the same zoo",
    "part": "set by a job that divides its zoo",
    "format.tokenizer": "counts tokens: needs a tokenizer, and is tested with one in tests/generation/test_format.py",
    "training.compile": "the same model, compiled",
    "activations.batch_size": "instances at once: the same activations",
    "format.include_modification": "None means what False says without stages, and what True says with them",
    "codec.canonicalize": "None is one of the two, by the zoo",
    "language_model.model": "another model: tested in tests/clt/test_activations_language.py",
    "language_model.config": "of datasets on the Hub",
    "language_model.fields": "random schemas have as many once the model has learned of fewer",
    "resource.llm_model": "another model: tested in tests/resource/test_job.py",
    "resource.evaluation": "rows that are described: tested in tests/resource/test_job.py",
    "encoder.initialization": "the language model here has no code: tested in tests/resource/test_describe.py",
    "table.repeated": "refuses what is there twice: tested in tests/resource/test_data.py",
    "training.gradient_checkpointing": "the same gradients in less memory",
}
"""Fields that are not tried, or of one kind alone, and why."""

SAID = {"training.snapshots": "no snapshot is taken", "training.snapshot_epochs": "no snapshot is taken"}
"""What else is said of a field that has no effect."""

REFUSED_AS = {"loss.group_heads": "heads", "sources": "targets"}
"""Fields whose refusal names the other field of a pair that does not go together."""

# Values to try where there is no rule for them, or where those of the rule change nothing by chance. Without any, the
# field is an input, which a base has or has not.
VALUES: dict[str, list[Any]] = {
    # A CPU has float32 for auto.
    "training.precision": ["bfloat16"],
    "hook": ["encoder_layer_0_mlp"],
    "sources": [["encoder_layer_0_mlp"]],
    "targets": [["encoder_layer_1_mlp"]],
    "pairs": [["decoder"], ["encoder_layer_0_pre_mlp->encoder_layer_0_mlp"]],
    "hooks": [["encoder_layer_0_attention"]],
    "grid": [[{"option": "model.k", "values": ["2", "3"]}]],
    "model.dictionary": [],
    "training.dead_after": [100, 100_000],
    "training.validation_rows": [20],
    "training.revive_every": [1, 1000],
    "training.snapshots": [2, 1000],
    "training.snapshot_epochs": [0.1, 100.0],
    "training.weight_decay": [0.3],
    "training.validate_every": [2],
    "training.ema": [0.05],
    "shard_rows": [16],
    "staged.patience": [2],
    "training.epochs": [0.3],
    "model.k": [5],
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
    "staged.max_other_degradation": [0.0],
    "format": [{"style": "separate"}],
    "format.digits": [2],
    "language_model": [],
    "table.dimensions": [[*RESOURCE_SCHEMA["dimensions"][:2], {**RESOURCE_SCHEMA["dimensions"][2], "high": 5000}]],
    "table.templates": [RESOURCE_SCHEMA["templates"][::-1]],
    "training.target_loss": [1e-3],
    "training.target_exact_match": [0.5],
    "training.target_accuracy": [1e-9],
    "augmentation.copies": [3],
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


def names(error: ValidationError | InvalidInput, path: str) -> bool:
    """Whether a refusal names the field at ``path``: as its field, or in its text."""
    name = REFUSED_AS.get(path, path.rpartition(".")[2])
    if isinstance(error, InvalidInput):
        said = [(violation.field, violation.description) for violation in error.violations]
    else:
        said = [(".".join(map(str, row["loc"])), row["msg"]) for row in error.errors()]
    return any(name in field.split(".") or re.search(rf"\b{name}\b", text) for field, text in said)


def digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        plain = tensor.detach().cpu().contiguous()
        found.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return found.hexdigest()


def trained(trainer: Trainer, run: Recorder) -> list[Any]:
    """The snapshots, validations and learning rates of a training: losses have terms without gradient."""
    fit(trainer, run)
    validated = {
        step: {name: value for name, value in values.items() if name.startswith(("validation_fvu", "dead"))}
        for step, values in run.metrics.items()
        if trainer.monitor in values
    }
    return [run.artifacts, validated, [trainer.optimization.rate(i) for i in range(9)]]


def of_sparse(spec: Any, run: Recorder, folder: Path) -> Any:
    dictionary = SparseModel.load(run.inputs["model.dictionary"]) if "model.dictionary" in run.inputs else None
    store = ActivationStore.open(run.inputs["activations"])
    with SparseTrainer(spec, store, dictionary=dictionary) as trainer:
        for text in trainer.too_short():
            run.log(text, "warning")
        if (trainer.steps - 1) * spec.training.batch_size >= spec.training.dead_after:
            # Half of the features have not fired for a while, and half of these never will.
            for rows, bias in zip(trainer.rows_since_fired, trainer.model.encoder_biases, strict=True):
                rows[::2] = 90
                bias.data[::4] = -100
        dead = [mask.tolist() for mask in trainer.dead]
        return [*trained(trainer, run), digest(trainer.state()), dead, trainer.figures, repr(trainer.streams)]


def of_sweep(spec: Any, run: Recorder, folder: Path) -> Any:
    """The different runs, without the fields that have no effect on them: what those have is tried by themselves."""
    found = set()
    for child in run_specs(spec, ActivationStore.open(run.inputs["activations"])).values():
        fields = child.model_dump(mode="json")
        for path in dict(child.unused()):
            section, _, field = path.partition(".")
            del fields[section][field]
        found.add(json.dumps(fields))
    return sorted(found)


def of_policy(spec: Any, run: Recorder, folder: Path) -> Any:
    cities = cities_in(run.inputs["cities"]) if spec.cities is not None else None
    trainer = PolicyTrainer(spec, cities=cities)
    found = [*trained(trainer, run), digest(trainer.state())]
    if spec.evaluation:
        compared = evaluation_instances(spec, cities)
        found += [evaluate(trainer.finished(), compared, spec.samples, spec.seed, run).figures]
    return [*found, [row["validation_length"] for row in trainer.progress.history]]


def of_activations(spec: Any, run: Recorder, folder: Path) -> Any:
    KINDS["activations"].load_job()(spec, run)
    tensors = {path.name: digest(load_file(path)) for path in sorted(folder.rglob("*.safetensors"))}
    return [tensors, ActivationStore.open(folder / "activations").manifest.pairs]


def of_codec(spec: Any, run: Recorder, folder: Path) -> Any:
    trainer = CodecTrainer(spec, Zoo.load(run.inputs["zoo"]))
    found, model = trained(trainer, run), trainer.model
    # The projection is no part of the codec.
    count = sum(1 for part in (model.encoder, model.decoder) for _ in part.parameters())
    mean = {str(i): tensor for i, tensor in enumerate([*trainer.mean[:count], trainer.mean[-1]])}
    return [*found, digest(mean), digest(model.state_dict()), trainer.patience, trainer.optimization.plateau]


def of_generation(spec: Any, run: Recorder, folder: Path) -> Any:
    """What a bucket of a few candidates becomes."""
    trainer = BucketTrainer(spec, baseline=run.inputs.get("signature.baseline"))
    candidates = trainer.buckets(0)[0]
    block = trainer.train(candidates.select(torch.arange(6)))
    return [block.table.to_pylist(), block.causes]


def of_language_model(spec: Any, run: Recorder, folder: Path) -> Any:
    trainer = LanguageModelTrainer(spec)
    return [*trained(trainer, run), digest(trainer.state())]


def of_resource(spec: Any, run: Recorder, folder: Path) -> Any:
    table = table_of(spec, run)
    describer = Describer(language_model_of(spec, run), table.schema)
    trainer = ResourceTrainer(spec, table, table.hold_out(spec.held_out, spec.seed)[0], describer)
    return [*trained(trainer, run), digest(trainer.state())]


def of_decoder(spec: Any, run: Recorder, folder: Path) -> Any:
    made = validate(run.inputs["export"])
    trainer = DecoderTrainer(spec, made, TaskTexts(made))
    found = [*trained(trainer, run), digest(trainer.state()), *evaluate_decoder(trainer, spec.evaluation)]
    return [*found, [row["validation_loss"] for row in trainer.progress.history]]


OUTCOMES: dict[str, Callable[[Any, Recorder, Path], Any]] = {
    "language_model": of_language_model,
    "resource": of_resource,
    "decoder": of_decoder,
    "sae": of_sparse,
    "clt": of_sparse,
    "sweep": of_sweep,
    "policy": of_policy,
    "activations": of_activations,
    "crossmodal": of_codec,
    "generation": of_generation,
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, once: Once) -> dict[str, Path]:
    """Folders of inputs by name."""
    folder = tmp_path_factory.mktemp("inputs")
    tables, language = once("resource-tables", write_tables), once("resource-language-model", write_language_model)
    table = small_table(tables)
    export(small_trainer(table, load_language_model(str(language))).codec(), table, folder / "export")
    found = {path.name: path for path in ARTIFACTS.iterdir() if path.is_dir()}
    (folder / "cities").mkdir()
    np.save(folder / "cities" / "mine.npy", instances(40, 6, generator(0, "mine")).numpy())
    for name, texts in (("texts", TEXTS), ("other texts", TEXTS[::-1])):
        rows = [json.dumps({"text": text, "body": " ".join(text.split()[1:])}) for text in texts]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    found |= {"tables": tables, "language model": language, "export": folder / "export"}
    return found | {"cities": folder / "cities", "gpt2": save_model(folder / "gpt2", "gpt2"), "inputs": folder}


def cached(build: Callable[..., Any]) -> Callable[..., Any]:
    """``build`` of a universe and more, once for the same: drawing pools takes most of the time. Should they depend on
    another field, it would seem to have no effect."""
    made: dict[str, Any] = {}

    def found(universe: Universe, *args: Any, **options: Any) -> Any:
        assert not any(isinstance(value, Tensor) for value in (*args, *options.values()))
        names = [(pattern.name, pattern.regex) for pattern in universe.patterns]
        key = repr((universe.vocab_size, universe.length, names, args, options))
        if key not in made:
            made[key] = build(universe, *args, **options)
        return made[key]

    return found


@pytest.fixture(autouse=True, scope="module")
def pools() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for made in (Pools, Evaluation):
            patch.setattr(made, "build", cached(made.build))
        patch.setattr(language_model, "_CORPUS", 10)
        yield


@pytest.mark.parametrize("base", BASES, ids=[f"{kind}-{name}" for name, kind, *_ in BASES])
def test_a_field_has_an_effect_or_is_refused_or_warned_of(
    base: tuple[str, str, dict[str, Any], dict[str, str]], places: dict[str, Path], tmp_path: Path
) -> None:
    name, kind, given, inputs = base
    folders = {path: places[place] for path, place in inputs.items()}

    def found(fields: dict[str, Any], number: int) -> tuple[list[str], list[str], str]:
        """What is said of the fields, what the job logs, and the outcome."""
        said = KINDS[kind].spec.model_validate(fields).warnings()
        if "llm_model" in fields:
            fields = fields | {"llm_model": str(places["language model"])}
        elif language := fields.get("language_model"):
            here = {"model": str(places["gpt2"]), "dataset": str(places["inputs"] / f"{language['dataset']}.jsonl")}
            fields = fields | {"language_model": language | here}
        run = Recorder(tmp_path / str(number), inputs=folders)
        outcome = OUTCOMES[kind](KINDS[kind].spec.model_validate(fields), run, tmp_path / str(number))
        return said, run.logs, json.dumps(outcome)

    first = KINDS[kind].spec.model_validate(given)
    *_, before = found(given, 0)
    # The same spec makes the same: otherwise everything would have an effect.
    assert found(given, 1)[2] == before
    tried, silent, wrong, unnamed = set(), [], [], []
    for number, (path, value) in enumerate(flips(first), 2):
        if any(f"{path}.".startswith(f"{exempt}.") for exempt in EXEMPT) or f"{kind}.{path}" in EXEMPT:
            continue
        if not path.startswith(ONLY.get(name, "")):
            continue
        tried.add(path)
        try:
            said, logged, after = found(changed(first, path, value), number)
        except (ValidationError, InvalidInput) as error:
            if not names(error, path):
                unnamed.append(f"{path} = {value}: {error}")
            continue
        named = (f"spec.{path}: has no effect", f"spec.{path}.0: has no effect")
        refused = any(text.startswith(named) for text in said)
        # What is too short for one value need not be for another.
        warned = any(text.startswith((*named, SAID.get(path, "has no"))) for text in logged)
        if after == before and not refused and not warned:
            silent.append(f"{path} = {value}")
        if after != before and refused:
            wrong.append(f"{path} = {value}")
    assert not silent, f"no effect, and no word of it: {silent}"
    assert not wrong, f"refused, though they have an effect: {wrong}"
    assert not unnamed, f"refused, but not by name: {unnamed}"
    assert tried


SPARSE = {"activations": REF, **PAIR}


@pytest.mark.parametrize(
    ("kind", "fields", "ignored"),
    [
        ("clt", SPARSE | {"loss": {"l0": 1e-3}}, ["loss.l0"]),
        ("clt", SPARSE | {"loss": {"l1": 1e-3}, "model": {"activation": "relu", "k": 8}}, ["model.k"]),
        (
            "sae",
            {"activations": REF, "hook": "h", "model": {"activation": "jumprelu", "k_ratio": 0.1}},
            ["model.k_ratio"],
        ),
        ("clt", SPARSE | {"model": {"dictionary": REF, "expansion": 4.0}}, ["model.expansion"]),
        ("clt", SPARSE | {"training": {"epochs": 1.0, "steps": 5}}, ["training.steps"]),
        ("sweep", {"activations": REF, "loss": {"l0": 1.0, "heads": 4}}, ["loss.l0", "loss.heads"]),
        ("sweep", {"activations": REF, "grid": [{"option": "loss.l0", "values": ["1e-3", "1e-2"]}]}, ["grid.0"]),
        ("sweep", {"activations": REF, "wandb": {"project": "p", "name": "n"}}, ["wandb.name"]),
        ("policy", {"evaluation": 0, "samples": 4}, ["samples"]),
        ("crossmodal", {"zoo": REF, "codec": {"heads": 4}}, ["codec.heads"]),
        ("crossmodal", {"zoo": REF, "loss": {"gamma": 0.0, "temperature": 1.0}}, ["loss.temperature"]),
        ("generation", {"signature": {"bins": 4, "components": 2}}, ["signature.components", "signature.bins"]),
        ("language_model", {"training": {"precision": "bfloat16"}}, ["training.precision"]),
        ("resource", {"language_model": REF, "llm_model": "gpt2"}, ["llm_model"]),
        ("resource", {"augmentation": {"mode": "none", "share": 0.1}}, ["augmentation.share"]),
        ("resource", {"encoder": {"fusion": "sum", "heads": 4}}, ["encoder.heads"]),
        ("resource", {"training": {"epochs": 1.0, "steps": 5}}, ["training.steps"]),
        ("resource", {"training": {"retrieval": 0, "temperature": 1.0}}, ["training.temperature"]),
        (
            "resource",
            {"training": {"target_loss": 0, "target_exact_match": 0.9}},
            ["training.target_exact_match"],
        ),
    ],
)
def test_what_has_no_effect_is_refused_by_name(kind: str, fields: dict[str, Any], ignored: list[str]) -> None:
    # Specs of earlier versions can be read.
    spec = KINDS[kind].spec.model_validate(fields)
    with pytest.raises(InvalidInput, match=r"has no effect, because .*; leave it out") as refused:
        spec.refuse_new("jobs.a.spec.")
    assert [violation.field for violation in refused.value.violations] == [f"jobs.a.spec.{path}" for path in ignored]
    assert str(refused.value).startswith(f"jobs.a.spec.{ignored[0]}: ")


@pytest.mark.parametrize("own", [{"table": RESOURCE["table"]}, {"tools": REF}])
def test_what_others_need_is_asked_for_before_a_job_begins(own: dict[str, Any]) -> None:
    spec = KINDS["resource"].spec.model_validate(own)
    with pytest.raises(InvalidInput, match=r"of your own needs your own measurements; .*--profiling-data") as refused:
        spec.refuse_new()
    assert [violation.field for violation in refused.value.violations] == ["spec.profiling"]
    KINDS["resource"].spec.model_validate(own | {"profiling": REF}).refuse_new()


def test_what_parts_of_a_spec_need_is_asked_for_too() -> None:
    class Part(Spec):
        """Needs a size."""

        size: int | None = None
        """The size."""

        def lacking(self) -> Iterator[tuple[str, str]]:
            if self.size is None:
                yield "size", "must be given"

    class Whole(Spec):
        """Has a part."""

        part: Part = Part()
        """The part."""

    for check in (Whole().refuse_new, Whole().check_complete):
        with pytest.raises(InvalidInput, match=r"^spec\.part\.size: must be given$"):
            check()
    Whole(part=Part(size=1)).refuse_new()


@pytest.mark.parametrize(
    ("kind", "fields", "warnings"),
    [
        ("clt", SPARSE | {"model": {"activation": "relu"}}, ["spec.loss.l1: is 0"]),
        ("clt", SPARSE | {"model": {"activation": "jumprelu"}}, ["spec.loss.l0: is 0"]),
        ("clt", SPARSE | {"model": {"activation": "relu"}, "loss": {"group_features": 1e-3}}, []),
        (
            "sweep",
            {"activations": REF, "grid": [{"option": "model.activation", "values": ["topk", "relu"]}, GRID_K]},
            ["spec.loss.l1: is 0", "spec.grid: 1 of its 4 points are the same as others"],
        ),
        (
            "sweep",
            {"activations": REF, "model": {"k_ratio": 0.1}, "grid": [GRID_K]},
            ["spec.model.k_ratio: has no effect, because the grid varies model.k"],
        ),
    ],
)
def test_what_is_hardly_meant_is_warned_of(kind: str, fields: dict[str, Any], warnings: list[str]) -> None:
    spec = KINDS[kind].spec.model_validate(fields)
    spec.refuse_new()
    said = spec.warnings()
    assert len(said) == len(warnings)
    assert all(text.startswith(start) for text, start in zip(said, warnings, strict=True))
    run = Recorder()
    warn(spec, run)
    assert run.logs == said
    run = Recorder(resume=Path())
    warn(spec, run)
    assert not run.logs


def test_a_training_that_is_too_short_says_for_what() -> None:
    fields = sparse(**PAIR, loss={"auxk": 0.1}, training={"revive_every": 5, "snapshots": 7, "dead_after": 1000})
    run = Recorder()
    with SparseTrainer(CltSpec.model_validate(fields), ActivationStore.open(ARTIFACTS / "activations")) as trainer:
        train(trainer, run)
    warned = [text.partition(":")[0] for text, level in zip(run.logs, run.levels, strict=True) if level == "warning"]
    assert warned == ["spec.loss.auxk", "spec.training.revive_every", "no snapshot is taken"]


def kind_of(fields: Mapping[str, Any]) -> str:
    """The kind of a spec in a file, by a field that it alone has."""
    return next(
        (
            kind
            for field, kind in (("codec", "crossmodal"), ("augmentation", "resource"), ("table", "resource"))
            if field in fields
        ),
        "generation",
    )


def test_examples_have_no_field_without_effect() -> None:
    specs: list[tuple[Kind, Mapping[str, Any]]] = [(kind, kind.example) for kind in KINDS.values()]
    for file in Path("examples").glob("*.yaml"):
        fields = read_mapping(file, "file")
        jobs = fields.get("jobs", {"x": {"kind": kind_of(fields), "spec": fields}})
        specs += [
            (KINDS[job["kind"]], {"zoo": REF, **job["spec"]} if job["kind"] == "crossmodal" else job["spec"])
            for job in jobs.values()
        ]
    assert len(specs) > len(KINDS) + 5
    for size in (FULL, QUICK):
        assert not size.zoo.warnings() and not size.codec.warnings()
    for kind, example in specs:
        assert not kind.spec.model_validate(example).warnings(), example


def test_what_is_exempt_exists() -> None:
    """A reason is of a field that there is."""

    def paths(spec: type[Spec], prefix: str = "") -> Iterator[str]:
        for name, field in spec.model_fields.items():
            yield f"{prefix}{name}"
            for part in (field.annotation, *get_args(field.annotation)):
                if isinstance(part, type) and issubclass(part, Spec):
                    yield from paths(part, f"{prefix}{name}.")

    known = {f"{kind.name}.{path}" for kind in KINDS.values() for path in paths(kind.spec)}
    for path in [*EXEMPT, *VALUES, *REFUSED_AS]:
        assert path in known or any(field.partition(".")[2] == path for field in known), path
