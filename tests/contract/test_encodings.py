"""Text files are UTF-8 on every machine, whatever its locale."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("ethogram", "gateway", "services", "workers", "scripts", "benchmarks", "examples")
# Arguments without an encoding.
METHODS = {"read_text": 0, "write_text": 1}


def without_encoding(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    if any(keyword.arg == "encoding" for keyword in node.keywords):
        return False
    if node.func.attr == "open":
        modes = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        return len(node.args) == 1 and modes in [[mode] for mode in ("r", "w", "a", "x", "r+", "w+", "a+")]
    return METHODS.get(node.func.attr) == len(node.args)


def test_every_text_file_is_opened_with_its_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and without_encoding(node)
    ]
    assert found == []
    assert without_encoding(ast.parse("file.open('w')", mode="eval").body)
