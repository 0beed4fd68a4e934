"""The messages generated from specs: numbers are locked, never reused, and what cannot stay compatible is refused."""

from __future__ import annotations

from typing import Literal

import pytest

from ethogram.specs.base import Spec
from scripts.messages import Messages

LOCK = """clt DemoSpec.gone string 1
clt DemoSpec.size int32 2
clt DemoSpec.mode DemoMode 3
clt DemoMode.fast enum 1
clt DemoMode.old enum 2
"""


class DemoPartSpec(Spec):
    """A part."""

    names: dict[str, int] = {}
    """Names."""


class DemoSpec(Spec):
    """Demonstrates ``all``."""

    parts: list[DemoPartSpec] = []
    """Parts."""
    rate: float | None = None
    """Rate."""
    mode: Literal["exact", "fast"] = "fast"
    """Mode."""
    new_form: Literal["a"] = "a"
    """Form."""
    size: int = 1
    """Size."""


def test_numbers_are_kept_and_new_ones_follow() -> None:
    messages = Messages(LOCK)
    messages.add(DemoSpec)
    text = "".join(messages.blocks["clt"])
    assert "optional int32 size = 2;" in text, "a type stays as it was published"
    assert "optional DemoMode mode = 3;" in text
    assert "repeated DemoPartSpec parts = 4;" in text
    assert "  // Rate.\n  optional double rate = 5;" in text
    assert "optional DemoNewForm new_form = 6;" in text
    assert "// Demonstrates `all`.\nmessage DemoSpec {\n  reserved 1;\n" in text
    assert 'reserved "gone";' in text
    assert 'reserved 2;\n  reserved "DEMO_MODE_OLD";' in text
    assert "DEMO_MODE_FAST = 1;" in text and "DEMO_MODE_EXACT = 3;" in text
    (part,) = messages.blocks["test_messages"]
    assert "map<string,int64> names = 1;" in part, "a message lies in the file of its spec's module"
    again = Messages(messages.lock())
    again.add(DemoSpec)
    assert again.blocks == messages.blocks and again.lock() == messages.lock()
    assert set(LOCK.splitlines()) <= set(messages.lock().splitlines())


def test_another_type_under_the_same_name_is_refused() -> None:
    with pytest.raises(SystemExit, match=r"DemoSpec\.size was string and is int64"):
        Messages(LOCK.replace("size int32", "size string")).add(DemoSpec)


def test_two_specs_of_one_name_are_refused() -> None:
    messages = Messages("")
    messages.add(DemoPartSpec)
    other = type("DemoPartSpec", (Spec,), {"__module__": "elsewhere"})
    with pytest.raises(SystemExit, match="two specs define DemoPartSpec"):
        messages.add(other)
