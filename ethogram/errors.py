"""Every error that users see, and its mapping to HTTP and gRPC.

Code anywhere in the platform raises one of these; the gateway turns it into ``application/problem+json``, a gRPC
servicer into ``google.rpc.Status`` (see :mod:`ethogram.rpc`), and the client back into the same class.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

# A status detail larger than 16 KiB turns a gRPC answer into RESOURCE_EXHAUSTED, so long lists are cut.
MAX_VIOLATIONS = 20
MAX_DESCRIPTION = 300
# Pydantic's words, and ours.
_WORDS = {
    r"^Value error, ": "",
    r"^(Input|String|List|Dictionary) should ": "must ",
    r"^Field required$": "is missing",
    r"^Extra inputs are not permitted$": "there is no such field",
    r"a valid dictionary( or instance of \w+)?": "a mapping",
    r" after validation": "",
}


class Violation(NamedTuple):
    """A wrong field: its dotted path, e.g. ``spec.training.steps``, and what is wrong with it."""

    field: str
    description: str


class EthogramError(Exception):
    """Base of all errors with a meaning for the user. The message is one sentence that says what to do."""

    reason: ClassVar[str] = "INTERNAL"
    http_status: ClassVar[int] = 500
    grpc_code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, violations: Iterable[Violation] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.violations: tuple[Violation, ...] = tuple(violations)[:MAX_VIOLATIONS]

    @classmethod
    def field(cls, field: str, description: str) -> Self:
        """The error of one field, named in the message and as a violation."""
        return cls(f"{field}: {description}", [Violation(field, description)])


class InvalidInput(EthogramError):
    """The request is wrong; sending it again does not help."""

    reason, http_status, grpc_code = "INVALID_INPUT", 422, "INVALID_ARGUMENT"

    @classmethod
    def from_pydantic(
        cls, error: ValidationError, prefix: str = "", model: type[BaseModel] | None = None
    ) -> InvalidInput:
        """Pydantic's errors as violations; ``prefix`` is put before each path. ``model``: what was validated, for
        advice about names that are missing or unknown."""
        details = error.errors(include_url=False, include_context=False, include_input=False)
        return cls.from_details([detail | {"advice": advice(model, detail)} for detail in details], prefix)

    @classmethod
    def from_details(cls, details: Sequence[object], prefix: str = "", more: int = 0) -> InvalidInput:
        """The same from pydantic's list of error dictionaries, which ``more`` errors are missing from. One may have
        ``advice``, which follows its text."""
        violations = []
        for detail in details:
            assert isinstance(detail, dict)
            path = ".".join(str(part) for part in (*filter(None, [prefix]), *detail["loc"]))
            text = printable(str(detail["msg"]))
            for theirs, ours in _WORDS.items():
                text = re.sub(theirs, ours, text)
            text += detail.get("advice", "")
            violations.append(Violation(path or "(root)", text[:MAX_DESCRIPTION]))
        first = violations[0]
        rest = len(violations) - 1 + more
        return cls(f"{first.field}: {first.description}{f' (and {rest} more)' if rest else ''}", violations)


class Forbidden(EthogramError):
    """The gateway does not take this request from where it comes."""

    reason, http_status, grpc_code = "FORBIDDEN", 403, "PERMISSION_DENIED"


class NotFound(EthogramError):
    """A job, artifact, model or behaviour that does not exist."""

    reason, http_status, grpc_code = "NOT_FOUND", 404, "NOT_FOUND"


class Conflict(EthogramError):
    """The same idempotency key with another body, a version that exists, a name that is taken."""

    reason, http_status, grpc_code = "CONFLICT", 409, "ALREADY_EXISTS"


class IllegalState(EthogramError):
    """The operation does not fit the state, e.g. a retry of a running job."""

    reason, http_status, grpc_code = "ILLEGAL_STATE", 409, "FAILED_PRECONDITION"


class StaleAttempt(EthogramError):
    """The writer's attempt no longer owns the job; nothing that it sends is kept."""

    reason, http_status, grpc_code = "STALE_ATTEMPT", 409, "ABORTED"


class TimeLimit(EthogramError):
    """A job exceeded its time limit."""

    reason, http_status, grpc_code = "TIME_LIMIT", 504, "DEADLINE_EXCEEDED"


class TooLarge(EthogramError):
    """A body, message or queue over its limit."""

    reason, http_status, grpc_code = "RESOURCE_EXHAUSTED", 413, "RESOURCE_EXHAUSTED"


class Unavailable(EthogramError):
    """A part of the platform cannot be reached or is overloaded; try again."""

    reason, http_status, grpc_code = "UNAVAILABLE", 503, "UNAVAILABLE"


class Internal(EthogramError):
    """A defect. The message never contains an exception's text, which is in the log under the request's id."""


ERRORS: dict[str, type[EthogramError]] = {cls.reason: cls for cls in EthogramError.__subclasses__()}


def did_you_mean(name: str, known: Iterable[str], likeness: float = 0.7) -> str:
    """``; did you mean X?`` where ``name`` is like one or more of the names ``known``, else nothing."""
    near = difflib.get_close_matches(name, list(known), 3, likeness)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def alternatives(names: Iterable[str], suggestion: str = "") -> str:
    """``; there are A, B``, behind a ``suggestion`` as :func:`did_you_mean` makes it: long texts are cut at their
    end."""
    listed = ", ".join(names)
    return f"{suggestion} There are {listed}" if suggestion else f"; there are {listed}"


def advice(model: type[BaseModel] | None, detail: Mapping[str, Any]) -> str:
    """What to add to pydantic's error ``detail`` about a value of ``model``: names like an unknown one, or how to give
    what is missing, if its model says so (``how_to_give``)."""
    *parents, name = detail["loc"] or ("",)
    for parent in parents:
        # Numbers and keys are those of lists and mappings.
        if model is not None and parent in model.model_fields:
            model = _model_in(model.model_fields[parent].annotation)
    if model is None:
        return ""
    if detail["type"] == "extra_forbidden":
        return did_you_mean(str(name), model.model_fields)
    if detail["type"] == "missing" and name in model.model_fields:
        how: str = getattr(_model_in(model.model_fields[name].annotation), "how_to_give", "")
        return how and f"; {how}"
    return ""


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The pydantic model in a field's annotation, which may be optional, a list or a mapping."""
    if hasattr(annotation, "model_fields"):
        model: type[BaseModel] = annotation
        return model
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def printable(text: str) -> str:
    """``text`` without lone surrogates, which no JSON or protobuf encoder accepts."""
    return text.encode("utf-8", "replace").decode("utf-8")
