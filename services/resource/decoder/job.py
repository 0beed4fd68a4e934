"""The decoder job: train on an export, evaluate on held-out texts, and keep the decoder and its report."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

from ethogram.specs.resource import DecoderModelSpec, DecoderSpec
from services.resource.decoder.model import HierarchicalDecoder
from services.resource.decoder.tasks import TaskTexts
from services.resource.decoder.train import DecoderTrainer
from services.resource.export import TOOL_NAME, Export, validate
from services.runtime.parallel import ALONE, World
from services.runtime.reading import reading
from services.runtime.report import Panel, Report, history_plot
from services.runtime.run import Run
from services.runtime.tensors import write_tensors
from services.runtime.training import fit

CONFIG, WEIGHTS = "decoder.json", "decoder.safetensors"
FORMAT = 1
EXAMPLES = 10


def run(spec: DecoderSpec, run: Run, world: World = ALONE) -> dict[str, Any]:
    """Artifacts: ``decoder`` and ``report``. Returns the ``figures``: accuracy of tools and of configurations on
    held-out texts, the share of valid choices, and the accuracy of a choice by chance."""
    export = validate(run.inputs["export"])
    trainer = DecoderTrainer(spec, export, TaskTexts(export), run.device, world)
    fit(trainer, run, world)
    if not world.first:
        return {}
    with tempfile.TemporaryDirectory() as scratch:
        save(trainer.model, export, Path(scratch, "decoder"))
        run.artifact("decoder", "decoder", Path(scratch, "decoder"))
        figures, rows = evaluate(trainer, spec.evaluation)
        with run.side_output("the report"):
            write_report(Path(scratch, "report"), spec, figures, rows, trainer.progress.history)
            run.artifact("report", "report", Path(scratch, "report"))
    return {"figures": figures}


def evaluate(trainer: DecoderTrainer, count: int) -> tuple[dict[str, float], list[list[str]]]:
    """Figures on ``count`` held-out texts, and rows of some texts with the choices. The tool of a configuration is that
    of the export's lookup, not that of the mask by which the decoder chooses."""
    texts, wanted = trainer.draw(count, "evaluation")
    tools, chosen = trainer.model.choose(texts)
    owner = [row[TOOL_NAME] for row in trainer.texts.rows]
    sizes = Counter(owner)
    named = [trainer.texts.tools[tool] for tool in tools.tolist()]
    figures = {
        "accuracy": float((chosen == wanted).float().mean()),
        "tool_accuracy": fmean(owner[row] == name for row, name in zip(wanted.tolist(), named, strict=True)),
        "valid": fmean(owner[row] == name for row, name in zip(chosen.tolist(), named, strict=True)),
        # Of a choice at random among the configurations of the right tool.
        "chance": fmean(1 / sizes[owner[row]] for row in wanted.tolist()),
        "steps": float(trainer.step),
    }
    listed = zip(texts[:EXAMPLES], wanted.tolist(), chosen.tolist(), strict=False)
    return figures, [[text, str(right), str(choice)] for text, right, choice in listed]


def save(model: HierarchicalDecoder, export: Export, folder: Path) -> None:
    """Write ``decoder.json`` and ``decoder.safetensors`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, model.state_dict())
    config = {
        "format": FORMAT,
        "model": model.spec.model_dump(mode="json"),
        "words": list(model.words),
        "export": export.digest,
        "lookup": export.lookup,
        "tools": list(export.schema.tools),
    }
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def load(folder: Path) -> tuple[HierarchicalDecoder, dict[str, Any]]:
    """The decoder that :func:`save` wrote, and its ``config``, with the fields of each configuration in ``lookup``.
    Raises :class:`InvalidInput`."""
    with reading(folder, CONFIG, "decoder") as path:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        spec = DecoderModelSpec.model_validate(config["model"])
    with reading(folder, WEIGHTS, "decoder") as path:
        state = load_file(path)
        tools = state["mask"].int().argmax(0)
        model = HierarchicalDecoder(spec, state["config_head.weight"], tools, config["words"], torch.Generator())
        model.load_state_dict(state)
    return model.eval(), config


def write_report(
    folder: Path,
    spec: DecoderSpec,
    figures: Mapping[str, float],
    rows: Sequence[Sequence[str]],
    history: Sequence[Mapping[str, float]],
) -> None:
    """Write ``report.html``, its picture, and ``report.json``."""
    report = Report("From the text of a task to a tool and its configuration")
    names = {
        "accuracy": "tool and configuration",
        "tool_accuracy": "tool",
        "valid": "configuration is one of the tool's",
        "chance": "control: a random configuration of the right tool",
    }
    report.section("Held-out texts").table(["right", "share"], [[text, figures[name]] for name, text in names.items()])
    panels = [
        Panel("cross-entropy", {"loss": "training", "validation_loss": "validation"}, log=True),
        Panel("accuracy", {"validation_accuracy": "validation"}, level=("chance", figures["chance"])),
    ]
    report.section("Training").figure("history", history_plot(history, panels), "Loss and accuracy over the steps")
    report.section("Some texts").table(["text", "configuration", "chosen"], rows).figures(figures).spec(spec)
    report.write(folder, {"figures": dict(figures), "history": list(history)})
