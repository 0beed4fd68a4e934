"""``python -m services.resource``: encoders of configurations from the command line, without a platform."""

from __future__ import annotations

import shutil
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ethogram.cli import output
from ethogram.cli.embedding import (
    Bound,
    Confidence,
    ConfigurationInput,
    Dimension,
    FixedValues,
    Recommendation,
    Values,
    free_fields,
    option_configuration,
    say_measurements,
    say_outside,
    say_rounded,
    value_text,
)
from ethogram.cli.files import read_mapping
from ethogram.cli.options import (
    Answer,
    Device,
    NewFolder,
    Public,
    command,
    group,
    hub_spec,
    new_path,
    rename_fields,
    system_app,
)
from ethogram.cli.run import Request, flag, run_command
from ethogram.errors import InvalidInput
from ethogram.specs.kinds import KINDS

if TYPE_CHECKING:
    from services.resource.codec import ResourceCodec
    from services.resource.data import Table

_MODULE = "python -m services.resource"
WANDB_PROJECT = "resource-encoder"
app = system_app(
    "resource",
    "Turn measured configurations into vectors that a frozen language model reads; no platform is needed.",
    f"{_MODULE} train -o my-run",
    f"{_MODULE} describe my-run --tool image_classification --set cpu_cores=4 --set latency_ms=unknown",
    f"{_MODULE} recommend my-run --tool image_classification --set input_size=large --latency 400",
)
language_models = group("Language models that read vectors.", f"{_MODULE} language-model train -o my-lm")
app.add_typer(language_models, name="language-model")
decoders = group(
    "Decoders from the text of a task to a configuration.", f"{_MODULE} decoder train my-run -o my-decoder"
)
app.add_typer(decoders, name="decoder")

Encoder = Annotated[
    Path,
    typer.Argument(
        metavar="ENCODER", help="Folder of an encoder or of the run that made it, or file encoder*.pt.", exists=True
    ),
]
Tool = Annotated[str, typer.Option("--tool", metavar="NAME", help="The tool, e.g. image_classification.")]
LanguageModelName = Annotated[
    str | None,
    typer.Option(
        "--llm-model",
        metavar="MODEL",
        help="The language model, folder or name on the Hub; by default where it was in training.",
    ),
]
Registry = Annotated[
    Path | None,
    typer.Option(
        "--tool-registry",
        metavar="FILE",
        help="Registry of tools, tools.json: a list of objects with `name`. By default the tools of the table.",
        exists=True,
        dir_okay=False,
    ),
]
Profiling = Annotated[
    Path | None,
    typer.Option(
        "--profiling-data",
        metavar="FILE",
        help="Table of measurements: CSV, JSON lines or parquet; by default the one of training.",
        exists=True,
        dir_okay=False,
    ),
]
Calibration = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Share of the measured configurations that is kept apart to see how large errors are. Intervals then "
        "cover as often as asked, which is guaranteed for configurations like these, and are wider. 0: none.",
    ),
]
Raw = Annotated[bool, typer.Option("--raw", help="Predict from the raw numbers, too, not from the vector alone.")]

FLAGS = {
    "augmentation.copies": flag(int, "--num-augmented-copies", help="Variants of each row per epoch."),
    "augmentation.mode": flag(str, "--augmentation-mode", help="none, jitter, variation or both."),
    "training.batch_size": flag(int, "--batch-size", help="Rows per step."),
    "training.epochs": flag(
        float, "--num-epochs", help="Most passes over all copies of all rows; by default there are training.steps."
    ),
    "training.learning_rate": flag(float, "--lr", "--learning-rate", help="Peak learning rate."),
    "training.target_loss": flag(float, "--target-loss", help="Cross-entropy at which training ends."),
    "training.snapshot_epochs": flag(
        float, "--checkpoint-freq", help="Epochs between snapshots of the encoder; by default none."
    ),
}


@run_command(
    app,
    KINDS["resource"],
    f"{_MODULE} train -o my-run",
    f"{_MODULE} train -f examples/resource-production.yaml --llm_model Qwen/Qwen2.5-7B --device cuda -o big",
    f"{_MODULE} train --tool_registry tools.json --profiling_data profiling.csv -o my-run",
    f"{_MODULE} train -f examples/resource-table.yaml --profiling_data examples/resource-table.csv -o my-run",
    flags=FLAGS,
)
def train(
    tool_registry: Registry = None,
    profiling_data: Annotated[
        Path | None,
        typer.Option(
            "--profiling-data",
            metavar="FILE",
            help="Table of measurements: CSV, JSON lines or parquet, with the columns of the schema; by default the "
            "generator's.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    llm_model: Annotated[
        str | None,
        typer.Option(
            "--llm-model",
            metavar="MODEL",
            help="Causal language model: folder or name on the Hub; by default a small one that the first run trains, "
            "in about a quarter of an hour.",
        ),
    ] = None,
    *,
    fp16: Annotated[bool, typer.Option("--fp16", help="Compute in bfloat16, wherever it runs.")] = False,
    log_wandb: Annotated[
        bool,
        typer.Option(
            "--log-wandb",
            help=f"Log metrics to Weights & Biases, to the project {WANDB_PROJECT} unless the file names one.",
        ),
    ] = False,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", "--config", metavar="FILE", help="YAML or JSON file of the spec.")
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            "--output-dir",
            metavar="DIR",
            help="Folder of the run: artifacts, report, metrics, checkpoint.",
        ),
    ],
) -> Request:
    """Train an encoder on a table, by default the generator's, evaluate it on unseen configurations, and export its
    vectors. The same command resumes an interrupted run.

    A table with other columns than the generator's takes a schema, in the file of the spec: see
    examples/resource-table.yaml, and Tables and schemas in docs/resource.md."""
    values: dict[str, Any] = {"llm_model": llm_model}
    if fp16:
        values["training.precision"] = "bfloat16"
    if log_wandb and (str(file) == "-" or not read_mapping(file, "spec").get("wandb")):
        values["wandb.project"] = WANDB_PROJECT
    files = {"tools": tool_registry, "profiling": profiling_data}
    return Request({name: path for name, path in files.items() if path is not None}, values)


@command(
    app,
    f"{_MODULE} export my-run -o my-export",
    f"{_MODULE} export --encoder_checkpoint my-run/snapshot-2658/encoder_checkpoint_epoch10.pt -o my-export",
)
def export(
    encoder: Annotated[
        Path | None,
        typer.Argument(
            metavar="ENCODER", help="Folder of an encoder or of the run that made it, or file encoder*.pt.", exists=True
        ),
    ] = None,
    *,
    encoder_checkpoint: Annotated[
        Path | None,
        typer.Option("--encoder-checkpoint", metavar="FILE", help="Another way to name the encoder.", exists=True),
    ] = None,
    tool_registry: Annotated[
        Path | None,
        typer.Option(
            "--tool-registry",
            metavar="FILE",
            help="Check that this is the registry of training.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    profiling_data: Profiling = None,
    llm_model: Annotated[
        str | None,
        typer.Option("--llm-model", metavar="MODEL", help="Check that this is the language model of training."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Configurations that pass through the encoder at once.")
    ] = 4096,
    out: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            "--output-dir",
            metavar="DIR",
            help="Folder to write; it must not exist.",
            callback=new_path,
        ),
    ],
    device: Device = None,
) -> Answer:
    """Write a vector of each configuration, for a classifier head, with what they stand for: config_weights.pt,
    config_lookup.json, tool_mask_map.json, and the encoder with its snapshots as .pt files."""
    if (encoder is None) == (encoder_checkpoint is None):
        raise InvalidInput.field("ENCODER", "name one encoder, as the argument or with --encoder-checkpoint")
    source = encoder or encoder_checkpoint
    assert source is not None
    from services.resource.export import CHECKPOINTS
    from services.resource.export import export as write
    from services.resource.sources import language_model_for, table_for
    from services.runtime.devices import chosen_device

    device = chosen_device(device)
    with _named_by_options():
        codec = _codec(source, device)
        if llm_model is not None:
            language_model_for(codec, llm_model, device)
        table = table_for(codec, profiling_data, tool_registry)
        written = write(codec, table, out, sorted(source.glob(CHECKPOINTS)), batch_size=batch_size)
    output.say(f"export: {out}")
    _say_outside_rows(codec, table)
    return _export_answer(written)


@command(app, f"{_MODULE} validate my-export", f"{_MODULE} validate my-run --json")
def validate(
    folder: Annotated[
        Path, typer.Argument(metavar="EXPORT", help="Folder of an export, or of the run that made it.", exists=True)
    ],
) -> Answer:
    """Check that the files of an export are unchanged and fit together, and show what they hold."""
    from services.resource.export import validate as read
    from services.runtime.folders import artifact_in

    found = read(artifact_in(folder, "resource-export", "EXPORT"))
    output.say("every file is as it was exported")
    return _export_answer(found)


@command(
    app,
    f"{_MODULE} describe my-run --tool image_classification --set cpu_cores=4 --set latency_ms=unknown",
    f"{_MODULE} describe my-run --tool image_classification --set input_size=large --set latency_ms=400 "
    "--template concise",
)
def describe(
    encoder: Encoder,
    tool: Tool,
    values: Values = None,
    *,
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Form of description; by default the first.")
    ] = None,
    llm_model: LanguageModelName = None,
    device: Device = None,
) -> Answer:
    """Show what the language model says of the vector of a configuration, and the values that can be read back.

    Fields that are not given are unknown to the encoder."""
    from services.resource.describe import Describer
    from services.resource.export import named
    from services.resource.sources import language_model_for
    from services.runtime.devices import chosen_device

    device = chosen_device(device)
    codec = _codec(encoder, device)
    schema = codec.schema
    known = {form.name: form for form in schema.templates}
    form = known.get(template) if template is not None else schema.templates[0]
    if form is None:
        raise InvalidInput.field("--template", f"there is no {template!r}; there are {', '.join(known)}")
    given = option_configuration(schema.dimensions, tool, values)
    with _named_by_options(given):
        vectors, unknown = (part.unsqueeze(0) for part in codec.vector(given.row))
        describer = Describer(language_model_for(codec, llm_model, device, run=_run_of(encoder)), schema)
    (text,) = describer.write(codec.soft(codec.embed(vectors, unknown)).to(describer.device), form)
    read = form.read(text)
    (outside,) = codec.outside(vectors, unknown)
    found = None if read is None else named(schema, read)
    result = {
        "text": text,
        "template": form.name,
        "values": found,
        "unknown": [name for name, hidden in zip(schema.names, unknown[0].tolist(), strict=True) if hidden],
        "outside": outside,
    }

    def show() -> None:
        # A model that was not trained for it may write anything.
        output.console().print(output.visible(text))
        if found is not None:
            output.pairs({field.name: value_text(field, found[field.name]) for field in schema.dimensions})

    if found is None:
        output.say(f"this is no description by {form.name}: no values can be read")
    say_outside(*outside)
    say_rounded(schema.dimensions, given.row)
    return Answer(result, show)


@command(
    app,
    f"{_MODULE} predict my-run --tool image_classification --set input_size=large --set cpu_cores=4 "
    "--set memory_gb=8 --set gpu_sm=40 --set gpu_memory_gb=4 --level .9",
)
def predict(
    encoder: Encoder,
    tool: Tool,
    values: Values = None,
    *,
    dimension: Annotated[
        str | None, typer.Option(metavar="FIELD", help="The number to predict; by default the first measured one.")
    ] = None,
    level: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Probability with which the interval covers the measured number, between 0 and 1."
        ),
    ] = 0.9,
    raw: Raw = False,
    calibration: Calibration = 0.0,
    profiling_data: Profiling = None,
    device: Device = None,
) -> Answer:
    """Predict a number of a configuration, by default the latency, from its vector, with an interval.

    Fields that are not given are unknown."""
    from services.resource.predict import NumberPredictor
    from services.resource.sources import table_for
    from services.runtime.devices import chosen_device

    codec = _codec(encoder, chosen_device(device))
    given = option_configuration(codec.schema.dimensions, tool, values)
    with _named_by_options(given):
        table = table_for(codec, profiling_data, partial=True)
        predictor = NumberPredictor(codec, table, dimension, raw=raw, calibration=calibration)
        found = predictor.predict(given.row, level)
    unit = codec.schema.dimensions[codec.schema.index(found.dimension)].unit

    def show() -> None:
        value, low, high = (f"{output.number(end, 4)} {unit}".rstrip() for end in (found.value, found.low, found.high))
        output.pairs({found.dimension: value, f"interval at {level:g}": f"{low} to {high}"})

    say_outside(*found.outside)
    say_measurements(found.measurements, len(table))
    _say_outside_rows(codec, table)
    return Answer({**found._asdict(), "level": level, "unit": unit}, show)


@command(
    app,
    f"{_MODULE} recommend my-run --tool image_classification --set input_size=large --latency 400 --confidence .9",
    f"{_MODULE} recommend my-run --tool image_classification --set input_size=small --latency 400 "
    "--profiling_data measured-so-far.csv",
)
def recommend(
    encoder: Encoder,
    tool: Tool,
    values: FixedValues = None,
    *,
    bound: Bound,
    confidence: Confidence = 0.9,
    dimension: Dimension = None,
    raw: Raw = False,
    calibration: Calibration = 0.0,
    profiling_data: Profiling = None,
    device: Device = None,
) -> Answer:
    """Name the cheapest configuration of a tool whose latency stays below a bound; exit code 1 when none does.

    --set fixes fields; the others are chosen, also those that describe the work, such as the size of the input. It
    chooses among all configurations, of which some have to be measured."""
    from services.resource.recommend import Recommender
    from services.resource.sources import table_for
    from services.runtime.devices import chosen_device

    codec = _codec(encoder, chosen_device(device))
    fields = codec.schema.dimensions
    given = option_configuration(fields, tool, values)
    with _named_by_options(given):
        table = table_for(codec, profiling_data, partial=True)
        recommender = Recommender(codec, table, dimension, raw=raw, calibration=calibration)
        found = recommender.recommend(given.row, bound, confidence)
    recommendation = Recommendation(
        **found._asdict(),
        dimension=fields[recommender.dimension],
        bound=bound,
        confidence=confidence,
        free=free_fields(fields, given.row),
    )
    measurements = recommender.predictor.measurements
    recommendation.say_notes(fields)
    say_measurements(measurements, len(table))
    _say_outside_rows(codec, table)
    value = found._asdict() | recommendation.question() | {"measurements": measurements}
    return Answer(value, lambda: recommendation.show(fields), found.fits)


@run_command(
    decoders,
    KINDS["decoder"],
    f"{_MODULE} decoder train my-run -o my-decoder",
    f"{_MODULE} decoder train my-export --set model.initialization=random -o my-decoder",
    name="train",
)
def train_decoder(
    export: Annotated[
        Path, typer.Argument(metavar="EXPORT", help="Folder of an export, or of the run that made it.", exists=True)
    ],
) -> Request:
    """Train a decoder on generated texts of tasks, and evaluate it on others. The same command resumes an interrupted
    run."""
    return Request({"export": export})


@command(app, f'{_MODULE} decode my-decoder "Image classification for large inputs, with 8 CPU cores"')
def decode(
    decoder: Annotated[
        Path, typer.Argument(metavar="DECODER", help="Folder of a decoder, or of the run that made it.", exists=True)
    ],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What is to be done, in words.")],
) -> Answer:
    """Choose a tool, and one of its configurations, for the text of a task, and say how probable both are.

    The probability of the tool is among all tools, that of the configuration among the tool's."""
    from services.resource.decoder.job import load
    from services.runtime.folders import artifact_in

    model, config = load(artifact_in(decoder, "decoder", "DECODER"))
    with _named_by_options():
        decision = model.decide([text])
    chosen = int(decision.configurations)
    configuration = config["lookup"][str(chosen)]
    probability = {"tool": float(decision.tool_probability), "configuration": float(decision.probability)}

    def show() -> None:
        shares = {f"probability of the {name}": f"{share:.3f}" for name, share in probability.items()}
        output.pairs({"config_id": chosen}, configuration, shares)

    return Answer({"config_id": chosen, "configuration": configuration, "probability": probability}, show)


@run_command(
    language_models,
    KINDS["language_model"],
    f"{_MODULE} language-model train -o my-lm",
    f"{_MODULE} language-model train --set model.hidden_dim=192 --set training.steps=6000 -o my-lm",
    name="train",
)
def train_language_model() -> Request:
    """Train a small language model that reads vectors of any schema; `train --llm_model my-lm` uses it. The same
    command resumes an interrupted run."""
    return Request()


@command(language_models, f"{_MODULE} language-model import SmolLM2-135M.gguf -o my-lm", name="import")
def import_language_model(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="GGUF file of a causal language model.")],
    out: NewFolder,
) -> Answer:
    """Convert a GGUF file, as llama.cpp has them, to a folder for `train --llm_model`."""
    from services.language.gguf import import_gguf

    figures = import_gguf(file, out)
    output.say(f"language model: {out}")
    return Answer(figures, lambda: output.pairs(figures))


@command(app, f"{_MODULE} push my-run me/my-encoder --public", f"{_MODULE} push my-encoder me/my-encoder")
def push(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder of a run, of which encoder, export and default language model are uploaded, or of an encoder.",
            exists=True,
            file_okay=False,
        ),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Model repository, owner/name; created if it does not exist.")
    ],
    *,
    public: Public = False,
) -> None:
    """Upload an encoder, with the table it was trained on, its export and the default language model to the Hugging
    Face Hub, with the token in HF_TOKEN."""
    from services.resource import hub
    from services.resource.sources import OUTPUT
    from services.runtime.folders import artifact_in

    export = source / hub.EXPORT
    encoder = artifact_in(source, "resource-encoder", "RUN")
    language_model = source / OUTPUT
    hub.push(
        encoder,
        export if export.is_dir() else None,
        hub_spec(repo, public, "REPO"),
        "REPO",
        language_model=language_model if language_model.is_dir() else None,
    )
    output.say(f"uploaded {source} to {repo}")


@command(app, f"{_MODULE} pull me/my-encoder -o my-encoder")
def pull(
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Model repository, owner/name.")], *, out: NewFolder
) -> None:
    """Download an encoder, its export and its language model from the Hugging Face Hub; the folder is used as that of a
    run is."""
    from services.resource import hub

    shutil.copytree(hub.pull(repo), out, ignore=shutil.ignore_patterns(".*"))
    output.say(f"encoder and export: {out}")


def _codec(source: Path, device: str) -> ResourceCodec:
    from services.resource.codec import ResourceCodec
    from services.resource.export import read_checkpoint
    from services.runtime.folders import artifact_in

    if source.is_file():
        return read_checkpoint(source, device, "ENCODER")
    return ResourceCodec.load(artifact_in(source, "resource-encoder", "ENCODER"), device)


def _run_of(source: Path) -> Path:
    """The folder of the run that made an encoder, if there is one."""
    from services.runtime.folders import artifact_in

    # A file is in a folder of its own there, as an encoder's files are.
    folder = source.resolve().parent if source.is_file() else artifact_in(source, "resource-encoder", "ENCODER")
    return folder.resolve().parent


def _named_by_options(given: ConfigurationInput | None = None) -> AbstractContextManager[None]:
    """Name the options in errors of the fields that they set, those of ``given`` as the user wrote them."""
    options = {
        "texts.0": "TEXT",
        "table": "--profiling-data",
        **{name: f"--{name}" for name in ("level", "calibration")},
        **{name: f"--{name.replace('_', '-')}" for name in ("llm_model", "profiling_data", "tool_registry")},
    }

    def location(field: str) -> str:
        return options.get(field) or (field if given is None else given.location(field))

    return rename_fields(location)


def _say_outside_rows(codec: ResourceCodec, table: Table) -> None:
    """Say how many rows of a table are outside the range of training, which nobody declared."""
    counts = codec.outside_mask(table.values).sum(0).tolist()
    shown = ", ".join(f"{count:,} of {name}" for name, count in zip(codec.schema.names, counts, strict=True) if count)
    if shown:
        output.say(f"values in the table that are outside the range of training: {shown}")


def _export_answer(found: Any) -> Answer:
    """What the files of an export hold."""
    configs, hidden = found.weights.shape
    counts = {tool: len(ids) for tool, ids in found.masks.items()}
    result = {
        "weights": [configs, hidden],
        "num_configs": configs,
        "hidden_dim": hidden,
        "lookup_entries": len(found.lookup),
        "tools": counts,
        "files": found.files,
        "digest": found.digest,
    }

    def show() -> None:
        output.pairs({"weights": f"{configs} x {hidden}", "lookup entries": len(found.lookup), "tools": len(counts)})
        output.table(["tool", "configurations"], list(counts.items()))
        output.table(["file", "sha256"], list(found.files.items()))

    return Answer(result, show)


if __name__ == "__main__":
    output.execute(app, _MODULE)
