"""The protobuf messages of the specs, made from the pydantic models of the table of kinds.

Each ``protos/ethogram/v1/SYSTEM.proto`` is written by hand down to a marker line; what follows is generated. Numbers,
types and files come from ``protos/numbers.lock``, to which new fields and enum members are added as lines
``FILE OWNER.MEMBER TYPE NUMBER``. No line is ever removed, so no number is used twice: a field that left its spec
becomes ``reserved``.
"""

from __future__ import annotations

import textwrap
import types
import typing
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ethogram.convert import RANGE, enum_prefix
from ethogram.specs.base import Spec
from ethogram.specs.kinds import KINDS

PROTOS = Path(__file__).resolve().parent.parent / "protos"
LOCK = PROTOS / "numbers.lock"
MARKER = "// Generated from the specs by `make protos`: do not edit below this line.\n"
WIDTH = 120
SCALARS = {str: "string", int: "int64", float: "double", bool: "bool"}
ENUM = "enum"
"""Type of an enum's members in the lock file."""


def generate() -> dict[Path, str | None]:
    """The text of each proto file that carries specs, and of the lock file."""
    messages = Messages(LOCK.read_text(encoding="utf-8"))
    for kind in KINDS.values():
        messages.add(kind.spec)
    texts: dict[Path, str | None] = {LOCK: messages.lock()}
    for file, blocks in messages.blocks.items():
        path = PROTOS / "ethogram" / "v1" / f"{file}.proto"
        texts[path] = "\n".join(
            [path.read_text(encoding="utf-8").partition("\n" + MARKER)[0].rstrip() + "\n", MARKER, *blocks]
        )
    return texts


class Messages:
    """Definitions of messages and enums by file, in an order in which each follows what it uses."""

    def __init__(self, lock: str) -> None:
        self.blocks: dict[str, list[str]] = defaultdict(list)
        self._files: dict[str, str] = {}
        self._members: dict[str, dict[str, tuple[str, int]]] = defaultdict(dict)
        self._added: dict[str, object] = {}
        for line in lock.splitlines():
            file, name, type_name, number = line.split()
            owner, _, member = name.partition(".")
            self._files[owner] = file
            self._members[owner][member] = type_name, int(number)

    def lock(self) -> str:
        """The lock file, with what was added."""
        return "".join(
            f"{self._files[owner]} {owner}.{member} {type_name} {number}\n"
            for owner, members in sorted(self._members.items(), key=lambda item: (self._files[item[0]], item[0]))
            for member, (type_name, number) in sorted(members.items(), key=lambda item: item[1][1])
        )

    def add(self, spec: type[Spec]) -> str:
        """Define the message of ``spec`` and all that it uses; its name."""
        name = spec.__name__
        if not self._begin(name, spec):
            return name
        module = spec.__module__.rpartition(".")[2]
        file = self._files.setdefault(name, "common" if module == "base" else module)
        lines = {}
        fields = {
            field: (annotation, info.description or "")
            for of_spec, info in spec.model_fields.items()
            for field, annotation in _fields(of_spec, info.annotation).items()
        }
        for field, (annotation, meaning) in fields.items():
            label, type_name = self._type(annotation, file, name, field, meaning)
            locked, number = self._number(name, field, type_name)
            if locked.replace("int32", "int64") != type_name:
                raise SystemExit(f"{name}.{field} was {locked} and is {type_name}: give the new field another name")
            lines[number] = f"{_comment(meaning, '  ')}  {label}{locked} {field} = {number};\n"
        reserved = self._reserved(name, fields)
        body = "".join(lines[number] for number in sorted(lines))
        self.blocks[file].append(f"{_comment(spec.__doc__ or '')}message {name} {{\n{reserved}{body}}}\n")
        return name

    def _begin(self, name: str, definition: object) -> bool:
        """Whether ``name`` is to be defined now: it is new."""
        if name not in self._added:
            self._added[name] = definition
            return True
        if self._added[name] != definition:
            raise SystemExit(f"two specs define {name} in different ways; rename one")
        return False

    def _number(self, owner: str, member: str, type_name: str) -> tuple[str, int]:
        members = self._members[owner]
        following = max((number for _, number in members.values()), default=0) + 1
        return members.setdefault(member, (type_name, following))

    def _type(self, annotation: Any, file: str, owner: str, field: str, meaning: str) -> tuple[str, str]:
        """Label and type of a field, e.g. ``("repeated ", "string")``."""
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin in (typing.Union, types.UnionType):
            (annotation,) = (argument for argument in arguments if argument is not type(None))
            return self._type(annotation, file, owner, field, meaning)
        if origin is typing.Annotated:
            return self._type(arguments[0], file, owner, field, meaning)
        if origin is list:
            return "repeated ", self._type(arguments[0], file, owner, field, meaning)[1]
        if origin is dict:
            return "", f"map<string,{self._type(arguments[1], file, owner, field, meaning)[1]}>"
        if origin is typing.Literal:
            return "optional ", self._enum(arguments, file, owner, field, meaning)
        if issubclass(annotation, Spec):
            return "", self.add(annotation)
        return "optional ", SCALARS[annotation]

    def _enum(self, values: tuple[str, ...], file: str, owner: str, field: str, meaning: str) -> str:
        new = owner.removesuffix("Spec") + field.title().replace("_", "")
        name = self._members[owner].get(field, (new, 0))[0]
        if self._begin(name, values):
            self._files.setdefault(name, file)
            prefix = enum_prefix(name)
            numbers = sorted((self._number(name, value, ENUM)[1], value) for value in values)
            lines = [f'  // "{value}".\n  {prefix}{value.upper()} = {number};\n' for number, value in numbers]
            unset = f"  // Not set.\n  {prefix}UNSPECIFIED = 0;\n"
            reserved = self._reserved(name, values, prefix)
            body = "".join([reserved, unset, *lines])
            self.blocks[file].append(f"{_comment(meaning)}enum {name} {{\n{body}}}\n")
        return name

    def _reserved(self, owner: str, members: Iterable[str], prefix: str = "") -> str:
        gone = {number: name for name, (_, number) in self._members[owner].items() if name not in set(members)}
        if not gone:
            return ""
        names = (f'"{prefix}{name.upper() if prefix else name}"' for name in gone.values())
        return f"  reserved {', '.join(map(str, gone))};\n  reserved {', '.join(names)};\n"


def _fields(field: str, annotation: Any) -> dict[str, Any]:
    """Fields of the message, with their annotations, for a spec's: two for a number or a range, else one."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = [option for option in typing.get_args(annotation) if union and option is not type(None)]
    if len(options) < 2:
        return {field: annotation}
    return {field if option is float else field + RANGE: option for option in options}


def _comment(text: str, indent: str = "") -> str:
    words, start = " ".join(text.replace("``", "`").split()), f"{indent}// "
    return textwrap.fill(words, WIDTH, initial_indent=start, subsequent_indent=start) + "\n"
