"""``ethogram run``: a job in this process, without a platform. The commands of the systems are named forms of it."""

from __future__ import annotations

import importlib
import inspect
import json
import traceback
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import wraps
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

import ethogram
from ethogram.cli.files import read_spec
from ethogram.cli.options import Device, Json, KindName, Out, Set, SpecFile, assignment, declare
from ethogram.errors import InvalidInput, Unavailable, did_you_mean
from ethogram.paths import user_path

if TYPE_CHECKING:
    from ethogram.specs.base import Spec
    from ethogram.specs.kinds import Kind

app = typer.Typer()

_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_EMPTY: Mapping[str, Any] = MappingProxyType({})
_INSTALL = (
    "in a clone of the repository, pip install -c constraints.txt -e '.[server]'; or submit the job to a platform"
)


class Request(NamedTuple):
    """What a command asks for, beside the options that all of them have."""

    inputs: Mapping[str, Path | Callable[[str], Path]] = _EMPTY
    """By spec path: a file or folder, or what finds it, called with the device."""
    values: Mapping[str, Any] = _EMPTY
    """Values of the spec, by path; None leaves the default."""
    check: Callable[[Any], None] | None = None
    """Raises for a spec that the command cannot run."""
    folder: Path | None = None
    """Folder of the run, where that is not ``--output``."""
    refer: bool = True
    """Whether the spec gets a reference to each input."""
    places: Mapping[str, Path] = _EMPTY
    """Where artifacts go that are not in the run's folder, by name."""
    kind: Kind | None = None
    """Kind of the job, if the command does not have one."""
    flags: Mapping[str, str] = _EMPTY
    """The command's options that set one value of the spec, by its path."""


@dataclass(frozen=True, kw_only=True)
class _Options:
    """Options of every command that runs a job."""

    file: SpecFile = None
    values: Set = None
    out: Out
    device: Device = None
    as_json: Json = False


def flag(type: Any, *names: str, help: str, metavar: str | None = None) -> Any:
    """Annotation of an option that sets one value of a spec; see :func:`run_command`."""
    return Annotated[type | None, typer.Option(*names, help=help, metavar=metavar)]


def _with_default(annotation: Any, kind: Kind | None, path: str) -> Any:
    """The annotation of a :func:`flag`, whose help shows what the spec of ``kind`` has at ``path`` by default."""
    name, _, rest = path.partition(".")
    if kind is None or (field := kind.spec.model_fields[name]).is_required():
        return annotation
    default = field.get_default(call_default_factory=True)
    default = attrgetter(rest)(default) if rest and default is not None else default
    if default is None:
        return annotation
    type, option = annotation.__origin__, copy(annotation.__metadata__[0])
    option.help = f"{option.help} [default: {default}]"
    return Annotated[type, option]


def run_command(
    app: typer.Typer,
    kind: Kind | None,
    *lines: str,
    flags: Mapping[str, Any] = _EMPTY,
    show: Callable[[dict[str, Any]], None] | None = None,
    name: str | None = None,
) -> Callable[[Callable[..., Request]], Callable[..., Request]]:
    """Decorator: a command of ``app`` that runs a ``kind`` (None: the request's), documented as the function, which
    makes a :class:`Request` of its own parameters. ``name``: by default the function's. ``flags``: annotations of
    options that set one value of the spec, by its path. ``lines``: examples. ``show``: prints the result."""

    def decorate(function: Callable[..., Request]) -> Callable[..., Request]:
        parameters = inspect.signature(function, eval_str=True).parameters
        shared = inspect.signature(_Options, eval_str=True).parameters
        paths = {path.replace(".", "_"): path for path in flags}
        # Typer keeps the first name as the default.
        option_names = {path: annotation.__metadata__[0].default for path, annotation in flags.items()}
        annotations = {name: _with_default(flags[path], kind, path) for name, path in paths.items()}
        flagged = [inspect.Parameter(name, _KEYWORD, default=None, annotation=annotations[name]) for name in paths]

        @wraps(function)
        def command(**given: Any) -> None:
            request = function(**{name: given[name] for name in parameters})
            values = {path: given[name] for name, path in paths.items()} | dict(request.values)
            options = _Options(**{name: given[name] for name in shared})
            known = kind or request.kind
            assert known is not None
            _run(known, request._replace(values=values, flags=option_names), options, show)

        rest = [shared[name] for name in shared if name not in parameters]
        declare(app, command, [*parameters.values(), *flagged, *rest], lines, name)
        return function

    return decorate


@run_command(
    app,
    None,
    "ethogram run generation --set subjects=200 -o my-run",
    "ethogram run crossmodal --input zoo=my-run -f examples/plain.yaml -o my-codec",
    "ethogram run activations --input policy=my-policy --set instances=5000 -o my-activations --device cuda",
    "torchrun --nproc-per-node 2 --no-python ethogram run clt --input activations=my-activations "
    "--set kind=cross_layer -o my-clt",
)
def run(
    kind: KindName,
    input: Annotated[
        list[str] | None,
        typer.Option(
            "--input", "-i", metavar="NAME=PATH", help="File or folder of an input, by spec path. Repeatable."
        ),
    ] = None,
) -> Request:
    """Run a job of any kind in this process, without a platform.

    This needs a server install. Once the work itself has begun, a checkpoint is kept every half minute and on Ctrl-C,
    and the same command resumes from it. A finished run and a run of another spec are never overwritten. An input is an
    artifact's file or folder, or the folder of the run that made it. Under torchrun, each process trains on its share
    of every batch.
    """
    from ethogram.specs.kinds import KINDS

    if kind not in KINDS:
        text = f"there is no kind {kind!r}; there are: {', '.join(KINDS)}{did_you_mean(kind, KINDS)}"
        raise InvalidInput.field("KIND", text)
    inputs: dict[str, Path] = {}
    for given in input or ():
        name, path = assignment("--input", given, "NAME=PATH, e.g. zoo=my-zoo")
        if name not in KINDS[kind].inputs:
            names = ", ".join(KINDS[kind].inputs) or "none"
            raise InvalidInput.field("--input", f"{kind} has no input {name!r}; its inputs: {names}")
        inputs[name] = user_path(path, "--input")
    return Request(inputs, kind=KINDS[kind])


def _run(kind: Kind, request: Request, options: _Options, show: Callable[[dict[str, Any]], None] | None) -> None:
    from ethogram.cli import output

    spec = _spec(kind, request, options.file, options.values or [])
    output.say("Preparing: loading the libraries.")
    try:
        folders, local = (importlib.import_module(f"services.runtime.{name}") for name in ("folders", "local"))
        folder = folders.RunFolder(request.folder or options.out, request.places)
        result = local.run(kind, spec, folder, request.inputs, options.device)
    except ModuleNotFoundError as error:
        importer, root = _importer(error), Path(ethogram.__file__).parents[1]
        if any(importer.is_relative_to(root / package) for package in ("ethogram", "services", "workers")):
            raise Unavailable(f"running jobs here needs {error.name}, which is not installed: {_INSTALL}") from None
        # A package of the user's, or one that is not complete.
        raise Unavailable(f"{importer} imports {error.name}, which is not installed here: install it") from None
    if result is None:
        return
    figures = result.get("figures", result)
    headline = {name: figures[name] for name in kind.headline if name in figures}
    output.result(result, options.as_json, lambda: show(result) if show else output.figures(headline or figures))
    for sentence in result.get("summary", ()):
        output.say(f"- {sentence}")
    for name in kind.outputs:
        if (place := folder.place(name)).exists():
            page = place / "report.html"
            output.say(f"{name}: {page if page.exists() else place}")
    if (folder.root / folders.METRICS).exists():
        output.say(f"metrics: {folder.root}")


def _importer(error: ModuleNotFoundError) -> Path:
    """The file whose import failed."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return Path(
        next(file for file in reversed(files) if not file.startswith("<frozen ") and file != importlib.__file__)
    )


def _spec(kind: Kind, request: Request, file: Path | None, values: list[str]) -> Spec:
    """The spec, with a reference to each input."""
    given = {path: value for path, value in request.values.items() if value is not None}
    if request.refer:
        given |= {path: {"artifact": path.rpartition(".")[2]} for path in request.inputs}
    for path in kind.inputs:
        field = kind.spec.model_fields.get(path)
        if field is not None and field.is_required() and path not in request.inputs:
            raise InvalidInput.field("--input", f"{kind.name} needs a file or folder for {path}, as {path}=PATH")
    assigned = [f"{path}={json.dumps(value)}" for path, value in given.items()]
    spec = read_spec(kind.spec, file, [*assigned, *values], request.flags)
    if request.check is not None:
        request.check(spec)
    for path in kind.inputs:
        if attrgetter(path)(spec) is not None and path not in request.inputs:
            text = "names an artifact of a platform; name its file or folder on the command line"
            raise InvalidInput.field(f"spec.{path}", text)
    return spec
