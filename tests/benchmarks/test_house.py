"""What the benchmark of the house counts, on small trees."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from benchmarks import house


def tree(root: Path, **files: str) -> dict[str, house.Module]:
    """Modules of ``files``: dotted names with ``__`` for the dot."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text))
    return house.modules(root)


def numbered(count: int, indent: int = 0) -> str:
    return "".join(f"{' ' * indent}call({i})\n" for i in range(count))


def test_lines_are_of_all_but_tests_and_generated_code(tmp_path: Path) -> None:
    found = tree(
        tmp_path,
        services__a="x = 1\n\n# why\n",
        ethogram__v1__b="y = 2\n",
        tests__c="z = 3\n",
        ethogram__client="w = 4\n",
    )
    assert set(found) == {"services.a", "ethogram.v1.b", "ethogram.client"}
    assert house.lines(found) == 3


def test_duplicates_are_maximal_and_counted_once(tmp_path: Path) -> None:
    block = numbered(12)
    found = tree(
        tmp_path,
        a__one="import os\n" + block + "end()\n",
        # Deeper, with a comment, a blank line and a docstring between.
        a__two='def f():\n    """What."""\n'
        + numbered(6, 4)
        + "\n    # why\n"
        + numbered(12, 4)[6 * 12 :]
        + "last()\n",
        a__three=numbered(9),
    )
    assert house.duplicates(found) == [(house.Place("a/one.py", 2, 13), house.Place("a/two.py", 3, 16))]
    assert len(house.duplicates(found, equal=9)) == 3
    again = tree(tmp_path / "again", a__one=block + "between()\n" + block)
    assert house.duplicates(again) == [(house.Place("a/one.py", 1, 12), house.Place("a/one.py", 14, 25))]


def test_declarations_are_no_duplicates(tmp_path: Path) -> None:
    imports = "".join(f"from os import x{i}\n" for i in range(12))
    fields = "class C(Spec):\n" + "".join(f'    a{i}: int = {i}\n    """Docs."""\n' for i in range(12))
    generated = numbered(12)
    text = imports + fields
    assert house.duplicates(tree(tmp_path, a__one=text, a__two=text)) == []
    assert house.duplicates(tree(tmp_path / "g", ethogram__v1__a=generated, ethogram__client=generated)) == []


def test_imports_and_cycles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(
        tmp_path,
        small_house__a="",
        small_house__b="from small_house import c\nimport json\n",
        small_house__c="def f():\n    from .d import g\n",
        small_house__d="from typing import TYPE_CHECKING\nimport small_house.e\n"
        "if TYPE_CHECKING:\n    import small_house.f\n",
        small_house__e="from small_house.b import name\n",
        small_house__f="from small_house import d\n",
    )
    (tmp_path / "small_house" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    edges = house.imports("small_house")
    assert edges["small_house.c"] == edges["small_house.f"] == {"small_house.d"}
    assert house.cycles(edges) == [[f"small_house.{name}" for name in "bcde"]]
    assert house.cycles({"x": {"y"}, "y": {"z"}, "z": set(), "w": {"x", "z"}}) == []


def test_upward_imports() -> None:
    edges = {
        "services.runtime.run": {"ethogram.cli.output", "ethogram.specs.base"},
        "services.crossmodal.job": {"services.clt.job", "services.runtime.run"},
        "services.clt.job": {"services.zoo.data"},
        "services.zoo.data": {"services.clt.job"},
        "services.runtimes": {"ethogram.cli.output"},
        "ethogram.cli.output": {"services.zoo.data"},
    }
    assert house.upward(edges) == [
        "ethogram.cli.output imports services.zoo.data",
        "services.crossmodal.job imports services.clt.job",
        "services.runtime.run imports ethogram.cli.output",
        "services.zoo.data imports services.clt.job",
    ]


LOOPS = {
    "while_over_a_trainer": """
        def f(trainer):
            for epoch in range(2):
                while trainer.more:
                    trainer.advance()
    """,
    "for_over_an_optimizer": """
        for x in y:
            loss.backward()
            self.optimizer.step()
    """,
    "by_a_function": """
        def step():
            optimizer.step()
        def f():
            for x in y:
                step()
    """,
    "by_a_method": """
        class T:
            def g(self):
                self.optimizer.step()
            def f(self):
                while True:
                    self.g()
    """,
    "comprehension": "[trainer.advance() for _ in y]",
}
NO_LOOPS = {
    "progress": "for x in y:\n    run.advance(x)\n",
    "one_step": "optimizer.step()\n",
    "another_step": "for x in y:\n    game.step()\n",
    "several_trainings": "def train(x):\n    for s in x:\n        optimizer.step()\n",
    "a_function_that_is_not_called": "def step():\n    optimizer.step()\nfor x in y:\n    other.walk()\n",
}


@pytest.mark.parametrize("name", LOOPS)
def test_training_loops(name: str, tmp_path: Path) -> None:
    assert len(house.loops(tree(tmp_path, services__clt__x=LOOPS[name]))) == 1
    assert house.loops(tree(tmp_path / "g", services__generation__x=LOOPS[name])) == []


@pytest.mark.parametrize("name", NO_LOOPS)
def test_other_loops(name: str, tmp_path: Path) -> None:
    text = NO_LOOPS[name] + "\ndef whole(z):\n    for x in z:\n        train(x)\n"
    count = len(house.loops(tree(tmp_path, services__clt__x=text)))
    # Of several trainings the loop within is one, not the one around it.
    assert count == (1 if name == "several_trainings" else 0)
