"""Commands about configurations: embed, describe, recommend, by a published encoder.

A file of configurations is a CSV file with a header, or JSON lines. Fields have their names in the model, or those of
the columns in the table of measurements. Empty cells, null and ``unknown`` stand for what is not known,
as do fields that are left out; the tool must be known.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ethogram.cli.options import Answer, ModelName, Output, Version, assignment, command
from ethogram.cli.output import pairs, say, visible
from ethogram.errors import InvalidInput

if TYPE_CHECKING:
    from ethogram.client import Client
    from ethogram.embedding import Configurations, Field

app = typer.Typer()
_NAMED = 3
"""Rows that a warning names."""

ConfigurationsFile = Annotated[
    Path | None, typer.Argument(metavar="FILE", help="A CSV or JSON lines file of configurations.")
]
Tool = Annotated[str | None, typer.Option(metavar="NAME", help="Tool of a single configuration.")]
Values = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Value of a field, e.g. cpu_cores=4, or unknown. Repeatable."),
]


@command(
    app,
    "ethogram embed my-encoder configurations.csv -o embeddings.safetensors",
    "ethogram embed my-encoder --tool image_classification --set cpu_cores=4 --set input_size=large",
)
def embed(
    client: Client,
    model: ModelName,
    file: ConfigurationsFile = None,
    *,
    tool: Tool = None,
    values: Values = None,
    output: Output = Path("embeddings.safetensors"),
    version: Version = None,
) -> Answer:
    """Embed configurations: vectors that the model's language model reads."""
    from ethogram.networks import save

    with client.embedding() as embedding:
        given, lines = _configurations(embedding.fields(model, version=version).fields, file, tool, values)
        answer = embedding.embed(model, given, version=version)
    save(output, {"embeddings": answer.embeddings})
    _warn(answer.outside, lines)
    shape = list(answer.embeddings.shape)
    value = {"file": str(output), "tensors": {"embeddings": shape}, "outside": answer.outside}
    return Answer(
        value | {"model": answer.model, "version": answer.version}, lambda: say(f"{output}: embeddings {shape}")
    )


@command(
    app,
    "ethogram describe my-encoder --tool image_classification --set cpu_cores=4 --set latency_ms=unknown",
    "ethogram describe my-encoder configurations.csv --template concise",
    "ethogram describe my-encoder --embeddings embeddings.safetensors",
)
def describe(
    client: Client,
    model: ModelName,
    file: ConfigurationsFile = None,
    *,
    tool: Tool = None,
    values: Values = None,
    embeddings: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A safetensors file with the tensor `embeddings`.")
    ] = None,
    template: Annotated[str | None, typer.Option(metavar="NAME", help="Form of description.")] = None,
    version: Version = None,
) -> Answer:
    """Print what the language model writes of configurations, or of embeddings."""
    from ethogram.networks import load

    lines: Sequence[int] = ()
    with client.embedding() as embedding:
        if embeddings is None:
            given, lines = _configurations(embedding.fields(model, version=version).fields, file, tool, values)
            answer = embedding.describe(model, given, template=template, version=version)
        elif file is not None or tool is not None or values:
            raise InvalidInput.field("--embeddings", "excludes configurations; give one of them")
        else:
            tensors = load(embeddings)
            if "embeddings" not in tensors:
                names = ", ".join(sorted(tensors)) or "none"
                raise InvalidInput.field("--embeddings", f"{embeddings} has no tensor `embeddings`; it has: {names}")
            answer = embedding.describe_embeddings(model, tensors["embeddings"], template=template, version=version)
    _warn(answer.outside, lines)
    texts = [answer.texts] if isinstance(answer.texts, str) else answer.texts
    read = [answer.configurations] if isinstance(answer.texts, str) else answer.configurations
    if unread := sum(configuration is None for configuration in read):
        typer.echo(f"{unread} of {len(read)} texts are no descriptions: the encoder is hardly trained", err=True)
    return Answer(answer._asdict(), lambda: typer.echo("\n".join(map(visible, texts))))


@command(
    app,
    "ethogram recommend my-encoder --tool image_classification --set input_size=large --latency 400",
    "ethogram recommend my-encoder --tool image_classification --bound 400 --confidence 0.99 --json",
)
def recommend(
    client: Client,
    model: ModelName,
    *,
    tool: Annotated[str, typer.Option(metavar="NAME", help="The tool.")],
    bound: Annotated[
        float, typer.Option("--bound", "--latency", help="What the measured dimension must stay below, e.g. 400 ms.")
    ],
    confidence: Annotated[float, typer.Option(help="Confidence with which it does, between 0 and 1.")] = 0.9,
    values: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Value of a field that is not free. Repeatable."),
    ] = None,
    dimension: Annotated[
        str | None, typer.Option(metavar="NAME", help="The measured dimension; by default the first.")
    ] = None,
    version: Version = None,
) -> Answer:
    """Print the cheapest configuration of a tool that stays below a bound. Where none does, it is the closest one, and
    the exit code is 1."""
    with client.embedding() as embedding:
        fields = embedding.fields(model, version=version).fields
        given, _ = _configurations(fields, None, tool, values)
        answer = embedding.recommend(model, given, bound, confidence=confidence, dimension=dimension, version=version)
    value = answer._asdict()

    def show() -> None:
        found = {field.name: answer.configurations[field.name] for field in fields if not field.measured}
        pairs({**found, "price": float(answer.price)})
        say(f"{answer.dimension}: {answer.predicted:g} expected, below {answer.upper:g} at confidence {confidence:g}")
        if not answer.fits:
            say(f"Nothing stays below {bound:g}; this comes closest.")
        if answer.measurements_left_out:
            total = answer.measurements + answer.measurements_left_out
            say(f"Predicted from {answer.measurements:,} of the {total:,} measurements, drawn at random.")

    return Answer(value, show, ok=bool(answer.fits))


def _configurations(
    fields: Sequence[Field], file: Path | None, tool: str | None, values: Sequence[str] | None
) -> tuple[Configurations, list[int]]:
    """The configurations of a file and their lines, or the one of the options."""
    if file is not None:
        if tool is not None or values:
            raise InvalidInput.field("FILE", "excludes --tool and --set; give one of them")
        return _read(file, fields)
    if tool is None:
        raise InvalidInput("give a FILE of configurations, or one with --tool NAME and --set FIELD=VALUE")
    known = {field.name: field for field in fields}
    row: dict[str, Any] = {fields[0].name: tool}
    for text in values or ():
        name, value = assignment("--set", text, "FIELD=VALUE, e.g. cpu_cores=4")
        if name not in known:
            raise InvalidInput.field(f"--set {name}", f"there is no such field; there are {', '.join(known)}")
        row[name] = _value(known[name], value, f"--set {name}")
    return row, []


def _read(file: Path, fields: Sequence[Field]) -> tuple[list[dict[str, Any]], list[int]]:
    """The configurations of a file, with the model's names of the fields, and the line of each."""
    known = {field.column: field for field in fields} | {field.name: field for field in fields}
    rows, lines = [], []
    for number, raw in _raw_rows(file):
        row: dict[str, Any] = {}
        for name, value in raw.items():
            where = f"{file.name}:{number}.{name}"
            if name not in known:
                names = ", ".join(field.name for field in fields)
                raise InvalidInput.field(where, f"the model has no such field; it has {names}")
            field = known[name]
            if field.name in row:
                raise InvalidInput.field(where, f"is there twice, as {field.name} and as {field.column}")
            row[field.name] = _value(field, value, where)
        rows.append(row)
        lines.append(number)
    if not rows:
        raise InvalidInput.field("FILE", f"{file} has no rows")
    return rows, lines


def _raw_rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The rows of a file, with the lines on which they end."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InvalidInput.field("FILE", f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput.field("FILE", f"{file} is not UTF-8 text") from None
    if text.lstrip()[:1] == "{":
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line, object_pairs_hook=partial(_once, f"{file.name}:{number}"))
            except ValueError:
                row = None
            if not isinstance(row, dict) or not row:
                raise InvalidInput.field(f"{file.name}:{number}", "is not a JSON object of values by field")
            yield number, row
        return
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [(name, None) for name in reader.fieldnames or ()]
    _once(f"{file.name}:{reader.line_num}", header)
    for cells in reader:
        if None in cells or None in cells.values():
            raise InvalidInput.field(f"{file.name}:{reader.line_num}", "has not as many cells as the header")
        yield reader.line_num, cells


def _once(where: str, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Names and values as a dictionary. Raises :class:`InvalidInput` of ``where``.NAME for a name that is there
    twice."""
    row: dict[str, Any] = {}
    for name, value in pairs:
        if name in row:
            raise InvalidInput.field(f"{where}.{name}", "is there twice")
        row[name] = value
    return row


def _value(field: Field, value: Any, where: str) -> Any:
    """A value as the model has it: text of a category, and a number of a number; None if it is not known."""
    if value is None or value == "" or (value == "unknown" and "unknown" not in field.labels):
        return None
    if isinstance(value, bool):
        raise InvalidInput.field(where, f"{json.dumps(value)} is not {'a label' if field.labels else 'a number'}")
    if field.labels:
        return value if isinstance(value, str) else str(value)
    try:
        return float(value)
    except OverflowError:
        raise InvalidInput.field(where, "is too large") from None
    except (TypeError, ValueError):
        raise InvalidInput.field(where, f"{value!r} is not a number") from None


def _warn(outside: Sequence[Any], lines: Sequence[int]) -> None:
    """Say which rows, on these ``lines`` of a file, have numbers outside the range of training."""
    if outside and isinstance(outside[0], str):
        say(f"Outside the range of training, so less exact: {', '.join(outside)}")
        return
    marked = [(line, names) for line, names in zip(lines, outside, strict=False) if names]
    if marked:
        shown = "; ".join(f"line {line}: {', '.join(names)}" for line, names in marked[:_NAMED])
        more = f" and {len(marked) - _NAMED} more" if len(marked) > _NAMED else ""
        say(f"Outside the range of training, so less exact: {shown}{more}")
