"""Every kind's spec survives the way to protobuf and back, falsy values included."""

from __future__ import annotations

import types
import typing
from typing import Any

import annotated_types
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from ethogram.convert import RANGE, from_proto, to_proto
from ethogram.errors import InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.generation import FloatRange, GenerationSpec, SubjectTrainingSpec
from ethogram.specs.kinds import KINDS, Kind
from services.kinds import spec_message

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))


def values_of(annotation: Any, field: FieldInfo | None = None) -> st.SearchStrategy[Any]:
    """Values for one annotation; falsy and extreme ones often, bounds kept."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return values_of(arguments[0], field)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(st.text("ab", min_size=1), values_of(arguments[1]), max_size=3)
    if origin in (typing.Union, types.UnionType):
        options: list[st.SearchStrategy[Any]] = [
            st.none() if option is type(None) else values_of(option, field) for option in arguments
        ]
        return st.one_of(options)
    if isinstance(annotation, type) and issubclass(annotation, Spec):
        return specs_of(annotation)
    low: Any = None
    high: Any = None
    pattern = None
    for mark in field.metadata if field else ():
        low = mark.ge if isinstance(mark, annotated_types.Ge) else low
        low = mark.gt if isinstance(mark, annotated_types.Gt) else low
        high = mark.le if isinstance(mark, annotated_types.Le) else high
        high = mark.lt if isinstance(mark, annotated_types.Lt) else high
        pattern = getattr(mark, "pattern", None) or pattern
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        return st.integers(low if low is not None else -(2**31), high if high is not None else 2**31 - 1)
    if annotation is float:
        return st.floats(low, high, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, 1.0])
    if annotation is str:
        return st.from_regex(pattern, fullmatch=True) if pattern else st.text(max_size=8)
    raise NotImplementedError(annotation)


def specs_of(spec: type[Spec]) -> st.SearchStrategy[Any]:
    """Valid specs: fields at random, some left at their default."""

    def build(values: dict[str, Any]) -> Spec | None:
        try:
            return spec(**values)
        except ValidationError:  # a rule between fields
            return None

    required = {n: values_of(f.annotation, f) for n, f in spec.model_fields.items() if f.is_required()}
    optional = {n: values_of(f.annotation, f) for n, f in spec.model_fields.items() if not f.is_required()}
    return st.fixed_dictionaries(required, optional=optional).map(build).filter(lambda made: made is not None)


def spec_field(field: Any) -> str:
    """The spec's field that a message's carries: two carry a number or a range."""
    number = str(field.name.removesuffix(RANGE))
    return number if number in field.containing_type.fields_by_name else str(field.name)


@kinds
def test_round_trip(kind: Kind) -> None:
    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(specs_of(kind.spec))
    def check(spec: Spec) -> None:
        wire = to_proto(spec, spec_message(kind)).SerializeToString()
        message = spec_message(kind)()
        message.ParseFromString(wire)
        assert from_proto(message, kind.spec) == spec

    check()


@kinds
def test_message_and_spec_have_the_same_fields(kind: Kind) -> None:
    compared = 0

    def compare(spec: type[Spec], message: Any) -> None:
        nonlocal compared
        assert {spec_field(f) for f in message.fields} == set(spec.model_fields), message.full_name
        for field in message.fields:
            info = spec.model_fields[spec_field(field)]
            inner = [a for a in (info.annotation, *typing.get_args(info.annotation)) if isinstance(a, type)]
            nested = next((a for a in inner if issubclass(a, Spec)), None)
            compared += 1
            if nested is not None and field.message_type is not None:
                compare(nested, field.message_type)
            elif not field.is_repeated:
                assert field.has_presence, f"{field.full_name} must be optional, or falsy values are lost"
            if field.is_repeated:
                assert not info.get_default(call_default_factory=True), f"{field.full_name}: a list defaults to empty"

    compare(kind.spec, spec_message(kind).DESCRIPTOR)
    assert compared > 5


@kinds
def test_every_enum_member_is_a_literal(kind: Kind) -> None:
    def literals(spec: type[Spec], message: Any) -> None:
        for field in message.fields:
            info = spec.model_fields[spec_field(field)]
            candidates = (info.annotation, *typing.get_args(info.annotation))
            if field.type == FieldDescriptor.TYPE_ENUM:
                literal = next(a for a in candidates if typing.get_origin(a) is typing.Literal)
                assert len(field.enum_type.values) == 1 + len(typing.get_args(literal)), field.full_name
            for nested in candidates:
                if field.message_type is not None and isinstance(nested, type) and issubclass(nested, Spec):
                    literals(nested, field.message_type)

    literals(kind.spec, spec_message(kind).DESCRIPTOR)


def generation_message(**fields: Any) -> Message:
    message = spec_message(KINDS["generation"])()
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def test_an_unset_message_is_the_default_spec() -> None:
    assert from_proto(generation_message(), GenerationSpec) == GenerationSpec()


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (generation_message(vocab_size=99), "spec.vocab_size"),
        (generation_message(min_accuracy=float("nan")), "spec.min_accuracy"),
        (generation_message(subjects=-1), "spec.subjects"),
    ],
)
def test_wrong_values_name_their_field(message: Message, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_proto(message, GenerationSpec)
    assert field in [violation.field for violation in caught.value.violations]


def test_fields_and_members_of_a_newer_client_are_refused() -> None:
    newer = generation_message(seed=1)
    newer.MergeFromString(b"\xf8\x3f\x01")  # field 1023, varint 1
    with pytest.raises(InvalidInput, match="newer"):
        from_proto(newer, GenerationSpec)
    member = generation_message()
    member.subject.activations.append(99)  # type: ignore[attr-defined]
    with pytest.raises(InvalidInput) as caught:
        from_proto(member, GenerationSpec)
    assert caught.value.violations[0].field == "spec.subject.activations.0"


@pytest.mark.parametrize("rate", [0.02, 1e-8, FloatRange(min=1e-3, max=1e-2), FloatRange(min=1e-3, max=1e-3)])
def test_a_number_or_a_range_stays_what_it_is(rate: float | FloatRange) -> None:
    spec = GenerationSpec(training=SubjectTrainingSpec(learning_rate=rate))
    message = to_proto(spec, spec_message(KINDS["generation"]))
    assert from_proto(message, GenerationSpec) == spec
    assert GenerationSpec.model_validate(spec.model_dump(mode="json")) == spec
    assert type(spec.training.learning_rate) is type(rate)


def test_a_number_and_a_range_are_refused() -> None:
    message: Any = generation_message()
    message.training.learning_rate, message.training.learning_rate_range.min = 0.1, 0.2
    with pytest.raises(InvalidInput) as caught:
        from_proto(message, GenerationSpec)
    assert caught.value.violations[0].field == "spec.training.learning_rate"
