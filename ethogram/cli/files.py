"""Specs from YAML files and ``--set``. YAML is read as YAML 1.2: ``1e-3`` is a number and ``on`` a string."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from ethogram.errors import InvalidInput, Violation
from ethogram.plain import plain

if TYPE_CHECKING:
    from ethogram.specs.base import Spec

S = TypeVar("S", bound="Spec")


def read_mapping(path: Path | None, what: str) -> dict[str, Any]:
    """The mapping in the YAML file ``path`` ("-": standard input); None: an empty one.

    Raises :class:`InvalidInput`, which names the file, for anything else and for a name that appears twice.
    """
    if path is None:
        return {}
    try:
        # Windows' editors put a byte order mark first.
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"{path} is not UTF-8 text") from None
    value = _load(text, str(path), f"this is not the YAML or JSON of a {what}")
    if not isinstance(value, dict):
        found = "is empty" if value is None else f"holds a {_name(value)}"
        raise InvalidInput(f"{path} {found}; a {what} is a mapping, lines of `name: value`")
    if what == "spec" and "jobs" in value:
        raise InvalidInput(f"{path} is a pipeline, not the spec of one job; submit it with `ethogram pipeline`")
    checked: dict[str, Any] = plain(value, what)
    return checked


def set_values(target: dict[str, Any], assignments: Iterable[str], what: str) -> dict[str, Any]:
    """Set each ``path=value`` of ``assignments`` in ``target``; a number in a path is an index into a list."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        names = path.strip().split(".")
        if not equals or not all(names):
            raise InvalidInput(f"--set {assignment}: write PATH=VALUE, e.g. training.steps=500")
        value = plain(_load(text, f"--set {assignment}"), f"{what}.{path}")
        holder: Any = target
        for depth, name in enumerate(names):
            here = ".".join([what, *names[:depth]])
            key: Any = name
            if isinstance(holder, list):
                if not name.isdecimal() or int(name) >= len(holder):
                    text = f"{here} is a list of {len(holder)}; number its items from 0"
                    raise InvalidInput.field(f"{here}.{name}", text)
                key = int(name)
            elif not isinstance(holder, dict):
                raise InvalidInput.field(here, f"is a {_name(holder)}, so {name!r} cannot be set in it")
            if depth == len(names) - 1:
                holder[key] = value
            elif isinstance(holder, dict) and holder.get(key) is None:
                holder[key] = {}
            holder = holder[key]
    return target


def _load(text: str, source: str, wrong: str = "this is not YAML") -> Any:
    from ruamel.yaml import YAML
    from ruamel.yaml.constructor import ConstructorError, DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        reason = error.problem or error.context
        if reason and isinstance(error, ConstructorError | DuplicateKeyError):
            # It is YAML, with a name twice say.
            raise InvalidInput(f"{source}{line}: {reason}") from None
        raise InvalidInput(f"{source}{line}: {wrong}{f' ({reason})' if reason else ''}") from None
    except (YAMLError, ValueError, RecursionError) as error:
        raise InvalidInput(f"{source}: {wrong} ({str(error).splitlines()[0]})") from None


def _name(value: object) -> str:
    names = {list: "list", dict: "mapping", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


def read_spec(
    spec: type[S], file: Path | None, values: Iterable[str] | None, flags: Mapping[str, str] = MappingProxyType({})
) -> S:
    """The spec in ``file`` with ``values`` (``PATH=VALUE``) set, or :class:`InvalidInput`. ``flags``: options that set
    one value, by its path."""
    from pydantic import ValidationError

    with in_options("spec.", flags):
        try:
            return spec.model_validate(set_values(read_mapping(file, "spec"), values or (), "spec"))
        except ValidationError as error:
            raise InvalidInput.from_pydantic(error, "spec", spec) from None


@contextmanager
def in_options(prefix: str, flags: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
    """Say how to give what is missing in the command line's words: by the option in ``flags``, or by ``--set``, whose
    paths do not have the ``prefix`` of the errors' fields."""

    def advised(violation: Violation) -> Violation:
        field, description = violation
        if not description.startswith("is missing") or not field.startswith(prefix):
            return violation
        path = field.removeprefix(prefix)
        how = f"--set {path}=VALUE"
        if path in flags:
            how = f"{flags[path]} or {how}"
        elif ArtifactRef.how_to_give in description:
            how = f"--set {path}.job=JOB --set {path}.artifact=NAME"
        return Violation(field, f"is missing; give it with {how}, or in the file of the spec")

    from ethogram.specs.base import ArtifactRef

    try:
        yield
    except InvalidInput as error:
        violations = [advised(violation) for violation in error.violations]
        message = error.message
        for old, new in zip(error.violations, violations, strict=True):
            message = message.replace(f"{old.field}: {old.description}", f"{new.field}: {new.description}")
        raise InvalidInput(message, violations) from None
