"""The resource job: train the encoder on a table, evaluate it on configurations it has not seen, and export vectors."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.resource import ReaderSpec, ResourceSpec
from services.artifacts.hub import Repository
from services.language.models import LanguageModel, load_language_model
from services.resource.codec import ResourceCodec
from services.resource.data import Table, read_measurements, read_tools
from services.resource.describe import Describer
from services.resource.evaluate import control_figures, describe_figures, retrieval_figures
from services.resource.evaluate_prediction import Predictions, prediction_figures
from services.resource.export import CHECKPOINTS, export
from services.resource.generator import write_table
from services.resource.hub import push
from services.resource.language_model import default_folder
from services.resource.report import write_report
from services.resource.schema import default_schema
from services.resource.sources import DEFAULT, OUTPUT, located
from services.resource.train import ResourceTrainer, check
from services.runtime.devices import uses_bfloat16
from services.runtime.parallel import ALONE, World
from services.runtime.parts import Parts
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.training import fit

_SCHEMA_ADVICE = (
    "; a table with other columns takes a schema of its own: see examples/resource-table.yaml, and Tables and schemas "
    "in docs/resource.md"
)
ALL, UNSEEN = "all", "unseen"
"""Parts of the job: the encoder that is kept, and one of which the figures of unseen configurations are."""
ENCODER = "encoder"
"""Folder of the encoder in the folder of its part."""
MIN_EVALUATION = 64
"""Least rows that the evaluation describes, however short the training was."""
TRAINING_RATIO = 10
"""Rows that training passes over in the time of one description, about."""


def run(spec: ResourceSpec, run: Run, world: World = ALONE) -> dict[str, Any]:
    """Artifacts: ``encoder``, ``export``, ``report`` and, where it is the default one, ``language_model``; with
    ``spec.hub`` all but the report are uploaded at the end. Returns the ``figures`` and, by template, field and place
    of digits, what they are means of."""
    if spec.hub is not None and world.first and run.resume is None:
        # Fail before training, not after it, without a network or permission.
        Repository(spec.hub, "model").open()
    table = table_of(spec, run)
    if world.first and run.resume is None:
        for text in table.warnings():
            run.log(text, "warning")
    rows: Tensor | None = None
    if spec.held_out:
        rows, held_out = table.hold_out(spec.held_out, spec.seed)
    is_default = spec.language_model is None and spec.llm_model == DEFAULT
    if is_default:
        # Before it is trained, which takes a quarter of an hour.
        table.schema.check_labels("the default language model")
        check(spec, table.schema, ReaderSpec().model.hidden_dim, reads_slots=True, world=world)
    language = language_model_of(spec, run)
    # Other machines may not have it, and would not train the same one to the last bit.
    default = Path(language.name) if is_default else None
    if default is not None and world.first:
        run.source_artifact(OUTPUT, "language-model", default)
    training = spec.training
    # A row that is only described takes about a quarter of the memory of one that is trained on.
    batch = 4 * math.ceil(training.batch_size / (training.accumulation * world.size))

    def describer_of(table: Table) -> Describer:
        return Describer(language, table.schema, checkpointing=training.gradient_checkpointing, batch=batch)

    describer = describer_of(table)
    with tempfile.TemporaryDirectory() as scratch:
        parts = Parts(run, Path(scratch), world)
        everything = parts.part(ALL, lambda _: _train(spec, table, None, describer, parts=parts, world=world))
        encoder = parts.folder / ALL / ENCODER
        if world.first:
            codec = ResourceCodec.load(encoder, run.device)
            # Before the evaluation, so that they are kept if a later step fails.
            run.artifact("encoder", "resource-encoder", encoder)
            export(codec, table, Path(scratch, "export"), sorted((parts.folder / ALL).glob(CHECKPOINTS)))
            run.artifact("export", "resource-export", Path(scratch, "export"))
        unseen = None
        if rows is not None:
            # The ranges that were not declared are those of these rows: what is held out must not be known.
            narrow = table.within(rows)
            judge = describer_of(narrow)
            unseen = parts.part(UNSEEN, lambda _: _train(spec, narrow, rows, judge, parts=parts, world=world))
        if not world.first:
            return {}

        # By default the evaluation takes no longer than the training.
        most = max(MIN_EVALUATION, everything["steps"] * training.batch_size // TRAINING_RATIO)
        most = most if spec.evaluation is None else spec.evaluation
        if most < len(table):
            run.log(f"The evaluation describes {most:,} of the {len(table):,} rows, drawn at random.")

        def sample(rows: Tensor) -> Tensor:
            order = torch.randperm(len(rows), generator=generator(spec.seed, "evaluation"))
            return rows if most >= len(rows) else rows[order[:most]]

        details = {"seen": describe_figures(codec, describer, sample(table.values), run, "evaluation/seen")}
        if rows is not None:
            other = ResourceCodec.load(parts.folder / UNSEEN / ENCODER, run.device)
            values = narrow.values[sample(held_out)]
            details["unseen"] = describe_figures(other, judge, values, run, "evaluation/unseen")
        controls = control_figures(codec, describer, sample(table.values), spec.seed, run)
        control = {name: part["exact_match"] for name, part in controls.items()}
        figures = _figures(details, control, retrieval_figures(codec, table.values, spec.seed))
        with run.side_output("the report"):
            predictions: Predictions | str = "No rows were held out, which they are scored on; set held_out."
            if rows is not None:
                try:
                    predictions = prediction_figures(
                        other,
                        judge,
                        narrow,
                        train=rows,
                        held_out=held_out,
                        described=sample(held_out),
                        seed=spec.seed,
                        run=run,
                    )
                except InvalidInput as error:
                    predictions = f"There are none: {error}"
            histories = {ALL: everything["history"]} | ({UNSEEN: unseen["history"]} if unseen else {})
            write_report(
                Path(scratch, "report"),
                codec,
                table,
                figures=figures,
                details=details,
                controls=controls,
                histories=histories,
                predictions=predictions,
            )
            run.artifact("report", "report", Path(scratch, "report"))
        if spec.hub is not None:
            again = f"`python -m services.resource push RUN {spec.hub.repo}` tries again"
            with run.side_output("the upload of the encoder", f"it is kept; {again}"):
                push(encoder, Path(scratch, "export"), spec.hub, language_model=default)
    return {"figures": figures, "controls": control, "details": details}


class _Trainer(ResourceTrainer):
    """Keeps the checkpoint file of each snapshot, which the export has too."""

    kept: Path
    """Folder of these files, each in a folder of its snapshot."""

    def snapshot(self, folder: Path) -> str:
        kind = super().snapshot(folder)
        copy = self.kept / f"snapshot-{self.step}"
        copy.mkdir(parents=True, exist_ok=True)
        for file in folder.glob(Path(CHECKPOINTS).name):
            shutil.copy2(file, copy)
        return kind


def _train(
    spec: ResourceSpec, table: Table, rows: Tensor | None, describer: Describer, *, parts: Parts, world: World
) -> dict[str, Any]:
    """Train on ``rows`` (None: all) and save the encoder into the folder of the present part."""
    chosen = torch.arange(len(table)) if rows is None else rows
    folder = parts.folder / parts.present
    trainer = _Trainer(spec, table, chosen, describer, world)
    trainer.kept = folder
    if rows is not None:
        # Snapshots are of the encoder that is kept.
        trainer.snapshots = None
    fit(trainer, parts, world)
    if world.first:
        trainer.codec().save(folder / ENCODER)
    return {"steps": trainer.step, "history": trainer.progress.history}


def _figures(
    details: Mapping[str, Mapping[str, Any]], control: Mapping[str, float], retrieval: Mapping[str, float]
) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, figure in details.items():
        figures[f"exact_match_{name}"] = figure["exact_match"]
        figures[f"field_accuracy_{name}"] = min(figure["field_accuracy"].values())
    figures["cross_entropy"] = details["seen"]["cross_entropy"]
    return figures | {"control_exact_match": max(control.values())} | dict(retrieval)


def table_of(spec: ResourceSpec, run: Run) -> Table:
    """The table of a spec: the user's, or the generator's. Raises :class:`InvalidInput`."""
    schema = spec.table or default_schema()
    if spec.profiling is not None:
        tools = read_tools(_file(run.inputs["tools"], "tools.json"), "tools") if spec.tools is not None else None
        advice = _SCHEMA_ADVICE if spec.table is None else ""
        return read_measurements(_file(run.inputs["profiling"], "profiling.csv"), schema, tools, advice=advice)
    spec.check_complete()
    with tempfile.TemporaryDirectory() as scratch:
        tools_file, profiling = write_table(Path(scratch), spec.seed)
        return read_measurements(profiling, schema, read_tools(tools_file))


def _file(source: Path, name: str) -> Path:
    """The file of an artifact: itself, or in a folder the one of that name, else the only one."""
    if source.is_file():
        return source
    if (source / name).is_file():
        return source / name
    files = [path for path in sorted(source.glob("[!.]*")) if path.is_file()]
    if len(files) != 1:
        raise InvalidInput.field(name, f"{source} has {len(files)} files and none is {name}; give the file itself")
    return files[0]


def language_model_of(spec: ResourceSpec, run: Run) -> LanguageModel:
    """The language model of a spec. Raises :class:`InvalidInput`."""
    precision = spec.training.precision
    dtype = torch.bfloat16 if uses_bfloat16(precision, run.device) else torch.float32
    # Those that are trained here are small, and stay as they were saved unless the spec says otherwise.
    own = "auto" if precision == "auto" else dtype
    if spec.language_model is not None:
        return load_language_model(str(run.inputs["language_model"]), run.device, own, field="language_model")
    if spec.llm_model == DEFAULT:
        return load_language_model(str(default_folder(run=run)), run.device, own)
    name = located(spec.llm_model, "spec.llm_model")
    return load_language_model(name, run.device, dtype, field="spec.llm_model")
