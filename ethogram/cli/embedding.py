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

from ethogram.cli.options import Answer, ModelName, Output, Version, assignment, command, rename_fields
from ethogram.cli.output import number, pairs, say, visible
from ethogram.errors import InvalidInput, alternatives, did_you_mean

if TYPE_CHECKING:
    from ethogram.client import Client
    from ethogram.embedding import Configurations, Field
    from ethogram.specs.resource import DimensionSpec

    AnyField = Field | DimensionSpec

app = typer.Typer()
_WARNED_ROWS = 3
"""Most rows that a warning names."""
_OPTIONS = {name: f"--{name}" for name in ("confidence", "dimension", "embeddings", "template")}
_OPTIONS |= dict.fromkeys(("bound", "bounds"), "--latency/--bound")
"""Options that set the fields of a request beside those of its configurations."""

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
FixedValues = Annotated[
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
        # All calls ask one version, also where another one becomes the latest meanwhile.
        schema = embedding.fields(model, version=version)
        fields, version = schema.fields, schema.version
        configurations = _configurations(fields, file, tool, values)
        with rename_fields(configurations.location):
            answer = embedding.embed(model, configurations.rows, version=version)
    save(output, {"embeddings": answer.embeddings})
    _say_outside_rows(answer.outside, configurations.lines)
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

    configurations = ConfigurationInput({})
    fields: list[Field] = []
    with client.embedding() as embedding:
        if embeddings is None:
            schema = embedding.fields(model, version=version)
            fields, version = schema.fields, schema.version
            configurations = _configurations(fields, file, tool, values)
            with rename_fields(configurations.location):
                answer = embedding.describe(model, configurations.rows, template=template, version=version)
        elif file is not None or tool is not None or values:
            raise InvalidInput.field("--embeddings", "excludes configurations; give one of them")
        else:
            tensors = load(embeddings)
            if "embeddings" not in tensors:
                names = ", ".join(sorted(tensors)) or "none"
                raise InvalidInput.field("--embeddings", f"{embeddings} has no tensor `embeddings`; it has: {names}")
            with rename_fields(configurations.location):
                answer = embedding.describe_embeddings(model, tensors["embeddings"], template=template, version=version)
    _say_outside_rows(answer.outside, configurations.lines)
    say_rounded(fields, configurations.rows)
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
    values: FixedValues = None,
    bound: Bound,
    confidence: Confidence = 0.9,
    dimension: Dimension = None,
    version: Version = None,
) -> Answer:
    """Name the cheapest configuration of a tool whose latency stays below a bound; exit code 1 when none does.

    --set fixes fields; the others are chosen, also those that describe the work, such as the size of the input."""
    with client.embedding() as embedding:
        schema = embedding.fields(model, version=version)
        fields, version = schema.fields, schema.version
        given = option_configuration(fields, tool, values)
        with rename_fields(given.location):
            answer = embedding.recommend(
                model, given.row, bound, confidence=confidence, dimension=dimension, version=version
            )
    numbers = {name: float(getattr(answer, name)) for name in ("price", "predicted", "upper")}
    recommendation = Recommendation(
        answer.configurations,
        **numbers,
        fits=bool(answer.fits),
        outside=answer.outside,
        dimension=next(field for field in fields if field.name == answer.dimension),
        bound=bound,
        confidence=confidence,
        free=free_fields(fields, given.row),
    )
    recommendation.say_notes(fields)
    say_measurements(answer.measurements, answer.measurements + answer.measurements_left_out)
    value = answer._asdict() | recommendation.question()
    return Answer(value, lambda: recommendation.show(fields), ok=recommendation.fits)


class Recommendation(NamedTuple):
    """A recommended configuration, as :class:`ethogram.embedding.Recommended` has the one of a single row, and what was
    asked."""

    configuration: Mapping[str, Any]
    price: float
    predicted: float
    upper: float
    fits: bool
    outside: Sequence[str]
    dimension: AnyField
    """The measured number that has the bound."""
    bound: float
    confidence: float
    free: Sequence[AnyField]
    """The fields that were chosen."""

    def question(self) -> dict[str, Any]:
        """What was asked, and what that left to choose, for --json."""
        asked: dict[str, Any] = {"dimension": self.dimension.name, "unit": self.dimension.unit}
        asked |= {"bound": self.bound, "confidence": self.confidence}
        return asked | {"chosen": [field.name for field in self.free]}

    def show(self, fields: Sequence[AnyField]) -> None:
        """Print the configuration and its numbers."""
        chosen = [field for field in fields if not field.measured]
        pairs(
            {field.name: value_text(field, self.configuration[field.name]) for field in chosen},
            {
                "price": number(self.price),
                f"predicted {self.dimension.name}": self._measured(self.predicted),
                f"below, at {self.confidence:g}": self._measured(self.upper),
                "chosen": ", ".join(field.name for field in self.free),
            },
        )

    def say_notes(self, fields: Sequence[AnyField]) -> None:
        """Say whether nothing fits, what is outside of the range, and what was chosen without a price to tell why."""
        if not self.fits:
            bound = self._measured(self.bound, 10)
            say(f"no configuration stays below {bound} at {self.confidence:g}; this one comes closest")
        say_outside(*self.outside)
        unpriced = [field for field in self.free if not field.price]
        if not unpriced:
            return
        one = len(unpriced) == 1
        values = [f"{f.name}={value_text(f, self.configuration[f.name], unit=False)}" for f in unpriced]
        if not self.fits:
            why, best = "", "the closest"
        elif any(field.price for field in fields):
            why, best = f", and {'has' if one else 'have'} no price", "the cheapest"
        else:
            why, best = ", and no field has a price", f"the one with the lowest {self.dimension.name}"
        names, advice = _joined([f.name for f in unpriced]), " ".join(f"--set {f.name}=..." for f in unpriced)
        say(f"{names} {'is' if one else 'are'} not given{why}: this is {best} for {', '.join(values)}; give {advice}")

    def _measured(self, value: float, digits: int = 4) -> str:
        """A value of the measured number, with its unit."""
        return f"{number(value, digits)} {self.dimension.unit}".rstrip()


def _joined(names: Sequence[str]) -> str:
    """``a``, ``a and b``, or ``a, b and c``."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def free_fields(fields: Sequence[AnyField], values: Mapping[str, Any]) -> list[AnyField]:
    """The fields that a recommendation chooses: those that are not measured, and unknown in ``values``."""
    return [field for field in fields if not field.measured and values.get(field.name) is None]


def value_text(field: AnyField, value: Any, *, unit: bool = True) -> str:
    """The value of a field as descriptions write it, with its unit."""
    if field.labels:
        return str(value)
    return f"{value:.{field.decimals}f} {field.unit if unit else ''}".rstrip()


def say_outside(*names: str) -> None:
    """Say which numbers are outside the range of training, by their ``names``."""
    if names:
        say(f"outside the range of training, so less certain: {', '.join(names)}")


def _say_outside_rows(names: Sequence[Any], lines: Sequence[int]) -> None:
    """:func:`say_outside` of each row on these ``lines`` of a file; of the configuration of options without any."""
    if not lines:
        # Of embeddings there is an empty list each.
        say_outside(*filter(None, names))
        return
    rows = [f"line {line}: {', '.join(row)}" for line, row in zip(lines, names, strict=True) if row]
    more = f" and {len(rows) - _WARNED_ROWS} more lines" if len(rows) > _WARNED_ROWS else ""
    if rows:
        say_outside("; ".join(rows[:_WARNED_ROWS]) + more)


def say_rounded(fields: Sequence[AnyField], rows: Configurations) -> None:
    """Say which measured numbers of ``rows`` have more decimals than their descriptions."""
    from ethogram.specs.resource import has_more_decimals

    rows = [rows] if isinstance(rows, Mapping) else rows
    for field in fields:
        if field.labels or not field.measured:
            continue
        values = [row[field.name] for row in rows if row.get(field.name) is not None]
        finer = [value for value in values if has_more_decimals(value, field.decimals)]
        if finer and len(rows) == 1:
            say(f"{field.name}: descriptions round {number(finer[0], 10)} to {value_text(field, finer[0])}")
        elif finer:
            say(f"{field.name}: descriptions round {len(finer)} of {len(values)} numbers to {field.decimals} decimals")


def say_measurements(used: int, total: int) -> None:
    """Say how many of the measurements a prediction used, unless it was all."""
    if used < total:
        say(f"predicted from {used:,} of the {total:,} measurements, drawn at random")


class ConfigurationInput(NamedTuple):
    """Configurations from a file, or one from options, with the model's names of the fields."""

    rows: Configurations
    names: Sequence[Mapping[str, str]] = ()
    """What the user called the fields of each row: columns of a file, or options."""
    file: str = ""
    lines: Sequence[int] = ()
    """The line of each row of the file."""

    @property
    def row(self) -> Mapping[str, Any]:
        """The configuration of the options."""
        assert isinstance(self.rows, Mapping)
        return self.rows

    def location(self, field: str) -> str:
        """Where the user wrote a ``field`` of the request, e.g. ``rows.csv:4.input_size`` or ``--set input_size``."""
        match = re.fullmatch(r"(?:configurations|given)(?:\.([a-z]\w*))?(?:\.(\d+))?", field)
        if match is None:
            return _OPTIONS.get(field.partition(".")[0], field)
        name, row = match.groups()
        if not self.file:
            return self.names[0].get(name, f"--set {name}") if name else "--set"
        column = name and next((names[name] for names in self.names[int(row or 0) :] if name in names), name)
        line = f"{self.file}:{self.lines[int(row)]}" if row else self.file
        return f"{line}.{column}" if column else line


def _configurations(
    fields: Sequence[Field], file: Path | None, tool: str | None, values: Sequence[str] | None
) -> ConfigurationInput:
    """The configurations of a file, or the one of the options."""
    if file is not None:
        if tool is not None or values:
            raise InvalidInput.field("FILE", "excludes --tool and --set; give one of them")
        return _read(file, fields)
    if tool is None:
        raise InvalidInput("give a FILE of configurations, or one with --tool NAME and --set FIELD=VALUE")
    return option_configuration(fields, tool, values)


def option_configuration(fields: Sequence[AnyField], tool: str, values: Sequence[str] | None) -> ConfigurationInput:
    """The configuration of ``--tool`` and ``--set``; the first of the ``fields`` is the tool."""
    known = _known(fields)
    row: dict[str, Any] = {fields[0].name: tool}
    names = {fields[0].name: "--tool"}
    for text in values or ():
        name, value = assignment("--set", text, "FIELD=VALUE, e.g. cpu_cores=4")
        option = f"--set {name}"
        field = _field(known, fields, name, option)
        if field.name in row:
            raise InvalidInput.field(option, "use --tool" if field is fields[0] else "is given twice")
        row[field.name], names[field.name] = _value(field, value, option), option
    return ConfigurationInput(row, [names])


def _known(fields: Sequence[AnyField]) -> dict[str, AnyField]:
    """The fields by their names and by those of their columns."""
    return {field.column or field.name: field for field in fields} | {field.name: field for field in fields}


def _field(known: Mapping[str, AnyField], fields: Sequence[AnyField], name: str, where: str) -> AnyField:
    if name not in known:
        names = [field.name for field in fields]
        text = f"there is no such field{alternatives(names, did_you_mean(name, known))}"
        raise InvalidInput.field(where, text)
    return known[name]


def _read(file: Path, fields: Sequence[Field]) -> ConfigurationInput:
    """The configurations of a file."""
    known = _known(fields)
    rows, names, lines = [], [], []
    for line, raw in _raw_rows(file):
        row: dict[str, Any] = {}
        columns: dict[str, str] = {}
        for column, value in raw.items():
            location = f"{file.name}:{line}.{column}"
            field = _field(known, fields, column, location)
            if field.name in row:
                raise InvalidInput.field(location, f"is there twice, as {field.name} and as {field.column}")
            row[field.name], columns[field.name] = _value(field, value, location), column
        rows.append(row)
        names.append(columns)
        lines.append(line)
    if not rows:
        raise InvalidInput.field("FILE", f"{file} has no rows")
    return ConfigurationInput(rows, names, file.name, lines)


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
