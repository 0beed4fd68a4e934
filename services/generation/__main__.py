"""``python -m services.generation``: zoos from the command line, without a platform."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from ethogram.cli import output
from ethogram.cli.execute import execute
from ethogram.cli.files import read_mapping, set_values
from ethogram.cli.options import Json, Set, examples, show_help
from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec, HubSpec
from services.generation.card import CARD
from services.runtime.console import CHECKPOINT

app = typer.Typer(
    name="generation",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    callback=show_help,
    invoke_without_command=True,
    help="Make zoos, look at them, and bring them to and from other forms; no platform is needed.",
)

ZooFolder = Annotated[Path, typer.Argument(metavar="ZOO", help="Folder of a zoo.", exists=True, file_okay=False)]
Out = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write; it must not be there yet.")]
SpecFile = Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="YAML or JSON file of the spec.")]
Baseline = Annotated[
    Path | None, typer.Option(metavar="ZOO", help="Folder whose baseline_dataset.json has the probes to take.")
]
_MODULE = "python -m services.generation"
_CHECKPOINT_SECONDS = 30.0


@app.command(
    epilog=examples(
        f"{_MODULE} make -f examples/staged.yaml --set subjects=200 -o my-zoo",
        f"{_MODULE} make --set subjects=64 --set hub.repo=me/my-zoo -o my-zoo",
    )
)
def make(
    out: Out,
    file: SpecFile = None,
    values: Set = None,
    *,
    device: Annotated[str, typer.Option(help="cpu, cuda or mps.")] = "cpu",
    baseline: Baseline = None,
    as_json: Json = False,
) -> None:
    """Make a zoo: records, dataset card and report; beside it a folder with metrics, and with a checkpoint from which
    the same command goes on when it was interrupted."""
    from services.generation.pipeline import DatasetGenerationPipeline
    from services.generation.report import write_report
    from services.runtime.console import ConsoleRun

    if device not in ("cpu", "mps") and re.fullmatch(r"cuda(:\d+)?", device) is None:
        raise InvalidInput.field("--device", f"{device} is none of cpu, cuda, cuda:0, ..., mps")
    spec = _spec(file, values)
    pipeline = DatasetGenerationPipeline(spec, device, baseline)
    aside = out.with_name(f"{out.name}-run")
    _begin(out, aside, spec)
    with ConsoleRun(aside, device, checkpoint_seconds=_CHECKPOINT_SECONDS) as run:
        figures = pipeline.run(out, run)
        write_report(out, out / "report")
        figures |= pipeline.publish(out)
    output.result(figures, as_json, lambda: _show(figures))


@app.command(epilog=examples(f"{_MODULE} report my-zoo -o my-zoo-report"))
def report(zoo: ZooFolder, out: Out) -> None:
    """Draw a zoo: one picture, and a page with the numbers."""
    from services.generation.report import write_report

    _fresh(out)
    write_report(zoo, out)


@app.command(epilog=examples(f"{_MODULE} export my-zoo -o my-zoo-json"))
def export(zoo: ZooFolder, out: Out) -> None:
    """Write a zoo with JSON text in its columns, the form in which such datasets were first published."""
    from services.generation.json_form import export_json
    from services.runtime.console import ConsoleRun

    _fresh(out)
    with ConsoleRun() as run:
        export_json(zoo, out, run)


@app.command(
    "import",
    epilog=examples(
        f"{_MODULE} import dataset.parquet -o my-zoo",
        f"{_MODULE} import owner/name -f patterns.yaml --rename starts_with=starts_with_a -o my-zoo",
    ),
)
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="File, folder, or dataset owner/name on the Hub.")],
    out: Out,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", metavar="FILE", help="YAML file with `patterns` as in a spec."),
    ] = None,
    rename: Annotated[
        list[str] | None, typer.Option(metavar="THEIRS=OURS", help="Name in the records, and of the pattern.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read a dataset with JSON text in its columns as a zoo."""
    from services.generation.hub import download
    from services.generation.json_form import import_json, patterns_in
    from services.runtime.console import ConsoleRun

    given = read_mapping(file, "spec")
    patterns = None if given.get("patterns") is None else patterns_in(given, "patterns")
    names = {}
    for pair in rename or []:
        theirs, equals, ours = pair.partition("=")
        if not equals:
            raise InvalidInput(f"--rename {pair}: write THEIRS=OURS")
        names[theirs] = ours
    _fresh(out)
    folder = Path(source)
    if not folder.exists() and source.count("/") == 1 and folder.suffix not in (".parquet", ".jsonl"):
        folder = download(_repo(source, public=False).repo)
    with ConsoleRun() as run:
        figures = import_json(folder, out, patterns=patterns, rename=names, run=run)
    output.result(figures, as_json, lambda: _show(figures))


@app.command(epilog=examples(f"HF_TOKEN=... {_MODULE} upload my-zoo me/my-zoo"))
def upload(
    zoo: ZooFolder,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Dataset repository; made if there is none.")],
    public: Annotated[bool, typer.Option("--public", help="A repository that is made is for all to see.")] = False,
) -> None:
    """Upload a zoo to the Hugging Face Hub; what is there already is not sent again."""
    from services.generation.hub import HubUpload

    HubUpload(_repo(repo, public=public), lambda text, _: typer.echo(text, err=True)).whole(zoo)


@app.command(
    epilog=examples(
        f"{_MODULE} dataset benchmark -f examples/staged.yaml -o benchmark.parquet",
        f"{_MODULE} dataset training --index 3 -f examples/staged.yaml -o training.json",
    )
)
def dataset(
    which: Annotated[Literal["baseline", "benchmark", "training"], typer.Argument(help="Which sequences.")],
    out: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="A .json or .parquet file.")],
    file: SpecFile = None,
    values: Set = None,
    *,
    index: Annotated[int, typer.Option(min=0, help="Of training data: whose.")] = 0,
    per_pattern: Annotated[int, typer.Option(min=1, help="Of a benchmark: sequences for each pattern.")] = 128,
    baseline: Baseline = None,
) -> None:
    """Write sequences with pattern labels: the probes of the signatures, a held-out benchmark, or what one subject is
    trained on."""
    from services.generation.sampler import PatternDatasetSampler

    sampler = PatternDatasetSampler(_spec(file, values), baseline)
    if which == "training":
        sampler.save_training(index, out)
    else:
        sampler.save(sampler.baseline if which == "baseline" else sampler.benchmark(per_pattern), out)


@app.command(epilog=examples(f"{_MODULE} score my-zoo answers.jsonl"))
def score(
    zoo: ZooFolder,
    answers: Annotated[
        Path, typer.Argument(metavar="ANSWERS", help='Lines of {"index": ..., "task": ..., "completion": ...}.')
    ],
    as_json: Json = False,
) -> None:
    """Judge an interpreter's answers: parse each completion, run the networks that it writes."""
    from services.generation.score import score_answers

    try:
        rows = [json.loads(line) for line in answers.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InvalidInput.field(answers.name, f"cannot be read as lines of JSON: {error}") from None
    figures = score_answers(zoo, rows)
    output.result(figures, as_json, lambda: _show(figures))


def _repo(name: str, *, public: bool) -> HubSpec:
    try:
        return HubSpec(repo=name, private=not public)
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error) from None


def _spec(file: Path | None, values: list[str] | None) -> GenerationSpec:
    try:
        return GenerationSpec.model_validate(set_values(read_mapping(file, "spec"), values or [], "spec"))
    except ValidationError as error:
        raise InvalidInput.from_pydantic(error, "spec") from None


def _begin(out: Path, aside: Path, spec: GenerationSpec) -> None:
    """Make way for a zoo in ``out``: for a new one, or for one that was begun with the same spec."""
    about, text = aside / "spec.json", spec.model_dump_json(indent=2)
    if (out / CARD).exists() or (out.exists() and not about.exists()):
        _fresh(out)
    if out.exists() and about.read_text() != text:
        raise InvalidInput.field("--output", f"{out} was begun with another spec; name another folder, or delete it")
    if not out.exists():
        shutil.rmtree(aside / CHECKPOINT, ignore_errors=True)
    shutil.rmtree(out, ignore_errors=True)
    aside.mkdir(parents=True, exist_ok=True)
    about.write_text(text)


def _fresh(folder: Path) -> None:
    if folder.exists():
        raise InvalidInput.field("--output", f"{folder} is there already; name another folder")


def _show(figures: dict[str, Any]) -> None:
    flat = [(name, value) for name, value in figures.items() if not isinstance(value, dict)]
    flat += [
        (f"{name}: {key}", value)
        for name, row in figures.items()
        if isinstance(row, dict)
        for key, value in row.items()
    ]
    output.table(["figure", "value"], flat)


if __name__ == "__main__":
    execute(app, _MODULE)
