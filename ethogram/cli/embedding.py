"""Commands about configurations: embed, describe, recommend, by a published encoder.

A file of configurations is a CSV file with a header, or JSON lines. Fields have their names in the model, or those of
the columns in the table of measurements. Empty cells, null and ``unknown`` stand for what is not known,
as do fields that are left out; the tool must be known.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ethogram.cli.options import Answer, ModelName, Output, Version, assignment, command, in_words
from ethogram.cli.output import number, pairs, say, visible
from ethogram.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from ethogram.client import Client
    from ethogram.embedding import Configurations, Field
    from ethogram.specs.resource import DimensionSpec

    AnyField = Field | DimensionSpec

app = typer.Typer()
_NAMED = 3
"""Rows that a warning names."""
_OPTIONS = {name: f"--{name}" for name in ("confidence", "dimension", "embeddings", "template")}
_OPTIONS |= {"bound": "--latency", "bounds": "--latency"}
"""What sets a field of a request that is not a configuration's."""

ConfigurationsFile = Annotated[
    Path | None,
    typer.Argument(metavar="FILE", help="Configurations: CSV with a header, or JSON lines; a column of each field."),
]
Tool = Annotated[str | None, typer.Option(metavar="NAME", help="Tool of a single configuration, instead of a file.")]
Values = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Value of a field, or of its column in the table, e.g. cpu_cores=4; else it is unknown. Repeatable.",
    ),
]
Given = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Value of a field, or of its column in the table, e.g. input_size=large; else it is chosen. Repeatable.",
    ),
]
Bound = Annotated[
    float,
    typer.Option(
        "--latency", "--bound", metavar="NUMBER", help="What the measured number must stay below, in the schema's unit."
    ),
]
Confidence = Annotated[float, typer.Option(metavar="SHARE", help="Probability with which it must, between 0 and 1.")]
Dimension = Annotated[
    str | None, typer.Option(metavar="FIELD", help="The measured number that has the bound; by default the first.")
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
        fields = embedding.fields(model, version=version).fields
        typed = _configurations(fields, file, tool, values)
        with in_words(typed.words):
            answer = embedding.embed(model, typed.rows, version=version)
    save(output, {"embeddings": answer.embeddings})
    _warn(answer.outside, typed.lines)
    say_rounded(fields, typed.rows)
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
    template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Form of description; by default the first.")
    ] = None,
    version: Version = None,
) -> Answer:
    """Print what the language model writes of configurations, or of embeddings."""
    from ethogram.networks import load

    typed = _Typed({})
    fields: list[Field] = []
    with client.embedding() as embedding:
        if embeddings is None:
            fields = embedding.fields(model, version=version).fields
            typed = _configurations(fields, file, tool, values)
            with in_words(typed.words):
                answer = embedding.describe(model, typed.rows, template=template, version=version)
        elif file is not None or tool is not None or values:
            raise InvalidInput.field("--embeddings", "excludes configurations; give one of them")
        else:
            tensors = load(embeddings)
            if "embeddings" not in tensors:
                names = ", ".join(sorted(tensors)) or "none"
                raise InvalidInput.field("--embeddings", f"{embeddings} has no tensor `embeddings`; it has: {names}")
            with in_words(typed.words):
                answer = embedding.describe_embeddings(model, tensors["embeddings"], template=template, version=version)
    _warn(answer.outside, typed.lines)
    say_rounded(fields, typed.rows)
    texts = [answer.texts] if isinstance(answer.texts, str) else answer.texts
    read = [answer.configurations] if isinstance(answer.texts, str) else answer.configurations
    if unread := sum(configuration is None for configuration in read):
        typer.echo(f"{unread} of {len(read)} texts are no descriptions: the encoder is hardly trained", err=True)
    return Answer(answer._asdict(), lambda: typer.echo("\n".join(map(visible, texts))))


@command(
    app,
    "ethogram recommend my-encoder --tool image_classification --set input_size=large --latency 400",
    "ethogram recommend my-encoder --tool image_classification --set input_size=small --bound 400 --confidence 0.99 "
    "--json",
)
def recommend(
    client: Client,
    model: ModelName,
    *,
    tool: Annotated[str, typer.Option(metavar="NAME", help="The tool.")],
    values: Given = None,
    bound: Bound,
    confidence: Confidence = 0.9,
    dimension: Dimension = None,
    version: Version = None,
) -> Answer:
    """Name the cheapest configuration of a tool whose latency stays below a bound; exit code 1 when none does.

    --set fixes fields; the others are chosen, also those that describe the work, such as the size of the input."""
    with client.embedding() as embedding:
        fields = embedding.fields(model, version=version).fields
        typed = _configurations(fields, None, tool, values)
        with in_words(typed.words):
            answer = embedding.recommend(
                model, typed.rows, bound, confidence=confidence, dimension=dimension, version=version
            )
    given = typed.rows
    assert isinstance(given, Mapping)
    bounded = next(field for field in fields if field.name == answer.dimension)
    numbers = {name: float(getattr(answer, name)) for name in ("price", "predicted", "upper")}
    found = Found(answer.configurations, **numbers, fits=bool(answer.fits), outside=answer.outside)
    chosen = [field.name for field in free_fields(fields, given)]
    value = answer._asdict() | {"unit": bounded.unit, "bound": bound, "confidence": confidence, "chosen": chosen}

    def show() -> None:
        show_recommendation(fields, given, found, bounded=bounded, bound=bound, confidence=confidence)
        say_measurements(answer.measurements, answer.measurements + answer.measurements_left_out)

    return Answer(value, show, ok=found.fits)


class Found(NamedTuple):
    """A recommended configuration, as :class:`ethogram.embedding.Recommended` has the one of a single row."""

    configuration: Mapping[str, Any]
    price: float
    predicted: float
    upper: float
    fits: bool
    outside: Sequence[str]


def free_fields(fields: Sequence[AnyField], given: Mapping[str, Any]) -> list[AnyField]:
    """The fields that a recommendation chooses: those that are neither measured nor ``given``."""
    return [field for field in fields if not field.measured and given.get(field.name) is None]


def show_recommendation(
    fields: Sequence[AnyField],
    given: Mapping[str, Any],
    found: Found,
    *,
    bounded: AnyField,
    bound: float,
    confidence: float,
) -> None:
    """Print a recommendation for the ``given`` values with the number ``bounded`` below ``bound``, and say what was
    chosen without a price that would tell why."""

    def measured(value: float, digits: int = 4) -> str:
        return f"{number(value, digits)} {bounded.unit}".rstrip()

    free = free_fields(fields, given)
    chosen = {field.name: found.configuration[field.name] for field in fields if not field.measured}
    texts = {field.name: value_text(field, chosen[field.name]) for field in fields if field.name in chosen}
    pairs(
        {
            **texts,
            "price": number(found.price),
            f"predicted {bounded.name}": measured(found.predicted),
            f"below, at {confidence:g}": measured(found.upper),
            "chosen": ", ".join(field.name for field in free),
        }
    )
    if not found.fits:
        say(f"no configuration stays below {measured(bound, 10)} at {confidence:g}; this one comes closest")
    say_outside(found.outside)
    unpriced = [field for field in free if not field.price]
    if free and not any(field.price for field in fields):
        say(f"no field has a price, so the one with the lowest {bounded.name} was chosen")
    elif unpriced:
        names = " and ".join(field.name for field in unpriced)
        values = [f"{field.name}={value_text(field, chosen[field.name], unit=False)}" for field in unpriced]
        are, have = ("is", "has") if len(unpriced) == 1 else ("are", "have")
        advice = " ".join(f"--set {field.name}=..." for field in unpriced)
        say(
            f"{names} {are} not given, and {have} no price: this is the cheapest for {', '.join(values)}; give {advice}"
        )


def value_text(field: AnyField, value: Any, *, unit: bool = True) -> str:
    """The value of a field as descriptions write it, with its unit."""
    if field.labels:
        return str(value)
    return f"{value:.{field.decimals}f} {field.unit if unit else ''}".rstrip()


def say_outside(names: Sequence[str]) -> None:
    """Say which numbers of a configuration, ``names``, are outside the range of training."""
    if names:
        verb = "is" if len(names) == 1 else "are"
        say(f"{', '.join(names)} {verb} outside the range of training, so this is less certain")


def say_rounded(fields: Sequence[AnyField], rows: Configurations) -> None:
    """Say which measured numbers of ``rows`` have more decimals than descriptions."""
    rows = [rows] if isinstance(rows, Mapping) else rows
    for field in fields:
        values = [row.get(field.name) for row in rows] if field.measured and not field.labels else []
        finer = [value for value in values if value is not None and round(value, field.decimals) != value]
        if finer and len(rows) == 1:
            say(f"{field.name}: descriptions round {number(finer[0], 10)} to {value_text(field, finer[0])}")
        elif finer:
            say(f"{field.name}: descriptions round {len(finer)} of {len(rows)} numbers to {field.decimals} decimals")


def say_measurements(used: int, there: int) -> None:
    """Say how many of the measurements a prediction used, unless it was all."""
    if used < there:
        say(f"predicted from {used:,} of the {there:,} measurements, drawn at random")


class _Typed(NamedTuple):
    """Configurations that a user gave, in a file or by options."""

    rows: Configurations
    file: str = ""
    lines: Sequence[int] = ()
    """The line of each row of the file."""
    tool: str = ""
    """Name of the field of ``--tool``."""

    def words(self, field: str) -> str:
        """Where the user wrote a ``field`` of the request."""
        found = re.fullmatch(r"configurations\.(\w+)(?:\.(\d+))?", field)
        if found is None:
            return _OPTIONS.get(field.partition(".")[0], field)
        name, row = found.groups()
        if self.file:
            return f"{self.file}:{self.lines[int(row)]}.{name}" if row else f"{self.file}.{name}"
        return "--tool" if name == self.tool else f"--set {name}"


def _configurations(
    fields: Sequence[Field], file: Path | None, tool: str | None, values: Sequence[str] | None
) -> _Typed:
    """The configurations of a file, or the one of the options."""
    if file is not None:
        if tool is not None or values:
            raise InvalidInput.field("FILE", "excludes --tool and --set; give one of them")
        return _read(file, fields)
    if tool is None:
        raise InvalidInput("give a FILE of configurations, or one with --tool NAME and --set FIELD=VALUE")
    return _Typed(given_values(fields, tool, values), tool=fields[0].name)


def given_values(fields: Sequence[AnyField], tool: str, values: Sequence[str] | None) -> dict[str, Any]:
    """The values of ``--tool`` and ``--set``, by the names of the ``fields``, of which the first is the tool."""
    known = _known(fields)
    row: dict[str, Any] = {fields[0].name: tool}
    for text in values or ():
        name, value = assignment("--set", text, "FIELD=VALUE, e.g. cpu_cores=4")
        field = _field(known, fields, name, f"--set {name}")
        if field.name in row:
            raise InvalidInput.field(f"--set {name}", "use --tool" if field is fields[0] else "is given twice")
        row[field.name] = _value(field, value, f"--set {name}")
    return row


def _known(fields: Sequence[AnyField]) -> dict[str, AnyField]:
    """The fields by their names and by those of their columns."""
    return {field.column or field.name: field for field in fields} | {field.name: field for field in fields}


def _field(known: Mapping[str, AnyField], fields: Sequence[AnyField], name: str, where: str) -> AnyField:
    if name not in known:
        names = [field.name for field in fields]
        text = f"there is no such field; there are {', '.join(names)}{did_you_mean(name, known)}"
        raise InvalidInput.field(where, text)
    return known[name]


def _read(file: Path, fields: Sequence[Field]) -> _Typed:
    """The configurations of a file, with the model's names of the fields."""
    known = _known(fields)
    rows, lines = [], []
    for line, raw in _raw_rows(file):
        row: dict[str, Any] = {}
        for name, value in raw.items():
            where = f"{file.name}:{line}.{name}"
            field = _field(known, fields, name, where)
            if field.name in row:
                raise InvalidInput.field(where, f"is there twice, as {field.name} and as {field.column}")
            row[field.name] = _value(field, value, where)
        rows.append(row)
        lines.append(line)
    if not rows:
        raise InvalidInput.field("FILE", f"{file} has no rows")
    return _Typed(rows, file.name, lines)


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


def _value(field: AnyField, value: Any, where: str) -> Any:
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
        say_outside(outside)
        return
    marked = [(line, names) for line, names in zip(lines, outside, strict=False) if names]
    if marked:
        shown = "; ".join(f"line {line}: {', '.join(names)}" for line, names in marked[:_NAMED])
        more = f" and {len(marked) - _NAMED} more" if len(marked) > _NAMED else ""
        say(f"Outside the range of training, so less exact: {shown}{more}")
