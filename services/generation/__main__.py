"""``python -m services.generation``: zoos from the command line, without a platform."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from ethogram.cli import output
from ethogram.cli.files import read_mapping, read_spec
from ethogram.cli.options import (
    Answer,
    NewFolder,
    Public,
    Set,
    SpecFile,
    assignment,
    command,
    examples,
    hub_spec,
    new_path,
    system_app,
)
from ethogram.cli.run import Request, run_command
from ethogram.errors import InvalidInput
from ethogram.specs.generation import GenerationSpec
from ethogram.specs.kinds import KINDS
from services.generation.hub import HubUpload
from services.generation.json_form import export_json, import_json
from services.generation.sampler import PatternDatasetSampler
from services.generation.score import means, score_answers
from services.language.tables import Malformed, read_rows
from services.runtime.console import ConsoleRun
from services.runtime.folders import artifact_in
from services.zoo.dataset import BASELINE
from services.zoo.meanings import patterns_in
from services.zoo.source import locate

_MODULE = "python -m services.generation"
app = system_app(
    "generation",
    "Make zoos, report on them, and convert them from and to other forms; no platform is needed.",
    f"{_MODULE} make --set subjects=64 -o my-zoo",
)


def _zoo(folder: Path) -> Path:
    """Callback of an argument: the zoo in ``folder``, which may also be the folder of the run that made it."""
    return artifact_in(folder, "zoo", "ZOO")


def _probes(folder: Path | None) -> Path | None:
    """Callback of --baseline: as :func:`_zoo`, where there are probes."""
    if folder is not None and not ((folder := artifact_in(folder, "zoo", "--baseline")) / BASELINE).is_file():
        raise InvalidInput.field("--baseline", f"{folder} has no {BASELINE}")
    return folder


Zoo = Annotated[
    Path,
    typer.Argument(
        metavar="ZOO", help="Folder of a zoo, or of a run that made one.", exists=True, file_okay=False, callback=_zoo
    ),
]
Baseline = Annotated[
    Path | None,
    typer.Option(
        metavar="ZOO",
        help="Zoo whose probes (baseline_dataset.json) to use.",
        exists=True,
        file_okay=False,
        callback=_probes,
    ),
]


@run_command(
    app,
    KINDS["generation"],
    f"{_MODULE} make -f examples/staged.yaml --set subjects=200 -o my-zoo",
    f"{_MODULE} make --set subjects=64 --set hub.repo=me/my-zoo -o my-zoo",
)
def make(
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the zoo: a new one, or an interrupted one.")
    ],
    baseline: Baseline = None,
) -> Request:
    """Make a zoo in the folder --output: records, a dataset card, and a report in its folder `report`. The run is kept
    beside it, in a folder of the same name with -run at its end. The same command resumes an interrupted run and gives
    the same zoo. A run that fails before its first checkpoint leaves neither folder."""
    return Request(
        {} if baseline is None else {"signature.baseline": baseline},
        check=_check_baseline,
        refer=False,
        folder=out.with_name(f"{out.name}-run"),
        places={"zoo": out, "report": out / "report"},
    )


@app.command(epilog=examples(f"{_MODULE} report my-zoo -o my-zoo-report"))
def report(zoo: Zoo, out: NewFolder) -> None:
    """Write a report on a zoo."""
    # It takes a while to import.
    from services.generation.report import write_report

    with _new(out):
        write_report(zoo, out)


@app.command(epilog=examples(f"{_MODULE} export my-zoo -o my-zoo-json"))
def export(zoo: Zoo, out: NewFolder) -> None:
    """Write a zoo with JSON text in its columns, the form in which such datasets were first published."""
    with _new(out), ConsoleRun() as run:
        export_json(zoo, out, run)


@command(
    app,
    f"{_MODULE} import dataset.parquet -o my-zoo",
    f"{_MODULE} import owner/name -f patterns.yaml --rename starts_with=starts_with_a -o my-zoo",
    name="import",
)
def import_(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="File, folder, or dataset owner/name on the Hub.")],
    out: NewFolder,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="YAML file with `patterns` as in a spec.")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="THEIRS=OURS", help="A pattern's name in the records, and in the zoo. Repeatable."),
    ] = None,
) -> Answer:
    """Convert a dataset with JSON text in its columns to a zoo. docs/generation.md says what is kept."""
    given = read_mapping(file, "spec")
    patterns = None if given.get("patterns") is None else patterns_in(given, "patterns")
    names = dict(assignment("--rename", pair, "THEIRS=OURS") for pair in rename or ())
    with _new(out), ConsoleRun() as run:
        figures = import_json(locate(source, "SOURCE"), out, patterns=patterns, rename=names, run=run)
    return Answer(figures, lambda: output.figures(figures))


@app.command(epilog=examples(f"HF_TOKEN=... {_MODULE} upload my-zoo me/my-zoo"))
def upload(
    zoo: Zoo,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Dataset repository; created if it is missing.")],
    public: Public = False,
) -> None:
    """Upload a zoo to the Hugging Face Hub; files that are there already are not sent again."""
    field = "OWNER/NAME"
    HubUpload(hub_spec(repo, public, field), lambda text, _: output.say(text), field).whole(zoo)


@app.command(
    epilog=examples(
        f"{_MODULE} dataset benchmark -f examples/staged.yaml -o benchmark.parquet",
        f"{_MODULE} dataset training --index 3 -f examples/staged.yaml -o training.json",
    )
)
def dataset(
    which: Annotated[
        Literal["baseline", "benchmark", "training"],
        typer.Argument(metavar="WHICH", help="baseline, benchmark or training."),
    ],
    out: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="New .json or .parquet file.", callback=new_path)
    ],
    file: SpecFile = None,
    values: Set = None,
    *,
    index: Annotated[int, typer.Option(min=0, help="Index of the subject, for training data.")] = 0,
    per_pattern: Annotated[int, typer.Option(min=1, help="Sequences per pattern, for a benchmark.")] = 128,
    baseline: Baseline = None,
) -> None:
    """Write sequences with pattern labels: the probes of the signatures, a held-out benchmark, or a subject's training
    data."""
    spec = read_spec(GenerationSpec, file, values)
    _check_baseline(spec)
    sampler = PatternDatasetSampler(spec, baseline)
    if which == "training":
        sampler.check_trainable()
        sequences, right, first = sampler.training(index)
        sampler.save(sequences, out, label=right, first_stage_label=first)
    else:
        sampler.save(sampler.baseline if which == "baseline" else sampler.benchmark(per_pattern), out)


@command(app, f"{_MODULE} score my-zoo answers.jsonl")
def score(
    zoo: Zoo,
    answers: Annotated[
        Path,
        typer.Argument(
            metavar="ANSWERS",
            help='Lines of {"index": ..., "task": ..., "completion": ...}.',
            exists=True,
            dir_okay=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="New file for the figures of each answer.", callback=new_path
        ),
    ] = None,
) -> Answer:
    """Score an interpreter's answers: parse each completion and run the networks in it.

    Figures are means over the answers of a task. Modification: parsed, the share of answers that are a network of the
    right shape; gain, the accuracy of that network minus that of the degraded one on held-out sequences of the target
    pattern; others, the mean change on all other kinds of sequences; reference_gain, the gain of the record's improved
    network. An answer that cannot be parsed counts 0 in gain and others.

    Classification: precision, the share of the named patterns that the network was measured to classify as positive;
    recall, the share of these that are named; exact, the share of answers that name exactly these, or say none where
    there are none. Any other answer without a pattern counts 0.
    """
    given = []
    for number, answer in read_rows(answers, form=".jsonl"):
        if isinstance(answer, Malformed):
            raise InvalidInput.field(f"{answers.name}:{number}", answer)
        given.append(answer)
    if not given:
        raise InvalidInput.field(answers.name, "holds no answers")
    rows = score_answers(zoo, given)
    if out is not None:
        out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    figures = means(rows)
    return Answer(figures, lambda: output.figures(figures))


def _check_baseline(spec: GenerationSpec) -> None:
    """Raise :class:`InvalidInput` where the spec names probes: here --baseline does."""
    if spec.signature.baseline is not None:
        text = "names an artifact of a platform; leave it out here, and give its folder with --baseline"
        raise InvalidInput.field("spec.signature.baseline", text)


@contextmanager
def _new(folder: Path) -> Iterator[None]:
    """Remove ``folder`` again if what writes it fails."""
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


if __name__ == "__main__":
    output.execute(app, _MODULE)
