"""What the documents say about the command line is so."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer

from ethogram.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "docs", "examples"))]
APPS: dict[str, Any] = {"ethogram": typer.main.get_command(app)} | {
    f"services.{name}": typer.main.get_command(import_module(f"services.{name}.__main__").app)
    for name in ("clt", "crossmodal", "generation", "resource")
}
_COMMAND = re.compile(
    r"^ *(?:\$|#)\s+((?:.* )?(?:ethogram|-m services\.(?:clt|crossmodal|generation|resource)) [a-z].*)$", re.MULTILINE
)


def texts() -> Iterator[str]:
    """The documents, the heads of the examples, and the ends of all helps."""
    for page in PAGES:
        for file in [page] if page.is_file() else sorted([*page.glob("*.md"), *page.glob("*.yaml")]):
            yield file.read_text(encoding="utf-8")
    commands = [*APPS.values()]
    while commands:
        command = commands.pop()
        yield command.epilog or ""
        commands += getattr(command, "commands", {}).values()


COMMANDS = sorted({line for text in texts() for line in _COMMAND.findall(text.replace("\\\n", " "))})


def parse(line: str) -> None:
    """Parse ``line`` as the command line would; run nothing. Raises ``typer.TyperException``."""
    words = shlex.split(line, comments=True)
    start = next(number for number, word in enumerate(words) if word in APPS)
    end = next((number for number, word in enumerate(words) if word in ("|", ">", "&&") and number > start), None)
    program, *rest = words[start:end]
    command = APPS[program]
    context = command.make_context(program, list(rest))
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, list(rest), parent=context)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_commands(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in line.split():
        try:
            return parse(line)
        except typer.TyperException as error:
            # The file or folder of a reader.
            missing = re.search(r"'(.+)' does not exist", str(error))
            if missing is None:
                raise
            path = Path(missing[1])
            (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
            if path.suffix:
                path.touch()
    parse(line)


def test_what_is_no_command_would_be_found() -> None:
    assert len(COMMANDS) > 80
    for wrong in ("ethogram nothing", "ethogram jobs nothing", "ethogram models publish x --job JOB"):
        with pytest.raises(typer.TyperException):
            parse(wrong)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_valid(path: Path) -> None:
    from ethogram.cli.files import read_mapping
    from ethogram.specs.kinds import KINDS

    content = read_mapping(path, "example")
    if "jobs" in content:
        for job in content["jobs"].values():
            KINDS[job["kind"]].spec.model_validate(job["spec"])
        return
    # A spec alone: the comment at its head says which kind takes it, and options give its inputs.
    head = path.read_text().partition("\n\n")[0]
    (kind,) = [kind for kind in KINDS.values() if f"submit {kind.name} " in head or f"services.{kind.name} " in head]
    inputs = {name: {"artifact": type} for name, type in kind.inputs.items() if "." not in name}
    kind.spec.model_validate(inputs | content)


def test_the_example_of_the_demo_is_what_the_demo_runs() -> None:
    from ethogram.cli.files import read_mapping
    from ethogram.demo import FULL
    from ethogram.specs.kinds import KINDS

    jobs = read_mapping(ROOT / "examples" / "demo.yaml", "pipeline")["jobs"]
    zoo, codec = (KINDS[jobs[name]["kind"]].spec.model_validate(jobs[name]["spec"]) for name in ("zoo", "codec"))
    assert zoo == FULL.zoo
    assert codec.model_copy(update={"zoo": FULL.codec.zoo}) == FULL.codec


def test_every_file_that_a_document_names_in_examples_is_there() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.yaml")]
    named = {name for page in pages for name in re.findall(r"examples/[\w.-]+\w", page.read_text())}
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_zoos_of_the_examples_record_what_a_codec_needs() -> None:
    """Each neuron's activation, before the activation function, on more probes than it has weights and a bias."""
    from ethogram.cli.files import read_mapping
    from ethogram.specs.generation import GenerationSpec

    contents = {path.name: read_mapping(path, "example") for path in (ROOT / "examples").glob("*.yaml")}
    zoos = [(name, content) for name, content in contents.items() if "subjects" in content]
    zoos += [
        (name, job["spec"])
        for name, content in contents.items()
        for job in content.get("jobs", {}).values()
        if job["kind"] == "generation"
    ]
    assert {name for name, _ in zoos} >= {"main.yaml", "staged.yaml", "ten-behaviors.yaml"}
    for name, values in zoos:
        spec = GenerationSpec.model_validate(values)
        one_hot = spec.subject.input_encoding == "one_hot"
        inputs = spec.sequence_length * (spec.vocab_size if one_hot else 1)
        assert "raw" in (spec.signature.methods or ["raw"]) and spec.signature.activations == "pre", name
        assert spec.signature.probes > max(inputs, spec.subject.neurons.max) + 1, name
