"""The OpenAPI document is enough to make a whole client of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ethogram.platform.stack import Platform
from ethogram.specs.kinds import KINDS
from tests.gateway.running import Gateway

PROGRAMS = Path(__file__).parent / "generated"
GENERATOR = "openapi-python-client==0.29.1"
NODE_PACKAGES = ("openapi-typescript@7.13.0", "openapi-fetch@0.17.0", "typescript@5.9.3")


@pytest.fixture(scope="module")
def document(gateway: Gateway) -> dict[str, Any]:
    answer: dict[str, Any] = gateway.http.get("/openapi.json").json()
    return answer


def words(name: str) -> str:
    """A name as generators write classes."""
    return "".join(word[:1].upper() + word[1:] for word in re.split(r"[^A-Za-z0-9]+", name))


def inline(schema: Any, name: str) -> Iterator[str]:
    """The classes that generators make up for objects inside of a schema: by its name and the field's."""
    for field, inner in schema.get("properties", {}).items():
        if isinstance(inner.get("additionalProperties"), dict):
            yield words(name) + words(field)


def test_no_two_schemas_get_one_name(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    assert {name: schema["title"] for name, schema in schemas.items()} == {name: name for name in schemas}
    names = [words(name) for name in schemas] + [made for name in schemas for made in inline(schemas[name], name)]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    submissions = {f"{kind.title()}Submission" for kind in KINDS}
    assert submissions <= schemas.keys()


def test_every_default_is_one_that_a_generator_can_write(document: dict[str, Any]) -> None:
    def objects(value: Any, path: str = "") -> Iterator[str]:
        if isinstance(value, dict):
            if isinstance(value.get("default"), dict) and ("type" in value or "anyOf" in value or "$ref" in value):
                yield path
            for key, inner in value.items():
                yield from objects(inner, f"{path}.{key}")
        elif isinstance(value, list):
            for index, inner in enumerate(value):
                yield from objects(inner, f"{path}.{index}")

    assert list(objects(document["components"])) == []
    layers = document["components"]["schemas"]["SubjectSpec"]["properties"]["layers"]
    assert layers["description"].endswith('Default: `{"min": 2, "max": 2}`.')


def test_every_answer_says_what_it_is(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert operation["operationId"]
            for status, response in operation["responses"].items():
                where = (path, method, status)
                assert all(content.get("schema") for content in response.get("content", {}).values()), where
                if status in ("422", "default"):
                    problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
                    assert response["content"] == problem, where


def run(*command: str | Path, folder: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("ETHOGRAM_", "PYTHON"))}
    clean["PATH"] = f"{folder / 'venv' / 'bin'}{os.pathsep}{clean['PATH']}"
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_generated_python_client_does_all(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "openapi.json").write_text(httpx.get(f"{platform.url}/openapi.json", trust_env=False).text)
    # In an environment of its own: the generator needs other versions of libraries than we do.
    run(sys.executable, "-m", "venv", "venv", folder=tmp_path)
    run("venv/bin/python", "-m", "pip", "install", "--quiet", GENERATOR, folder=tmp_path)
    said = run(
        "venv/bin/openapi-python-client", "generate", "--path", "openapi.json", "--meta", "none", folder=tmp_path
    )
    assert not re.search("warning|unable|cannot", said, re.IGNORECASE), said
    shutil.copy(PROGRAMS / "use_client.py", tmp_path)
    run("venv/bin/python", "use_client.py", platform.url, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_generated_typescript_does_all(platform: Platform, tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm, which installs the generator, is not installed here")
    (tmp_path / "openapi.json").write_text(httpx.get(f"{platform.url}/openapi.json", trust_env=False).text)
    settings = {"strict": True, "module": "nodenext", "target": "es2022", "lib": ["es2022", "dom"], "types": []}
    (tmp_path / "package.json").write_text(json.dumps({"type": "module", "private": True}))
    (tmp_path / "tsconfig.json").write_text(json.dumps({"compilerOptions": settings, "files": ["use_types.ts"]}))
    program = (PROGRAMS / "use_types.ts").read_text()
    (tmp_path / "use_types.ts").write_text(f"declare const process: {{ argv: string[] }};\n{program}")
    run("npm", "install", "--silent", "--no-audit", "--no-fund", *NODE_PACKAGES, folder=tmp_path)
    # Otherwise the tool takes a field with a default for one that must be given.
    options = ["--default-non-nullable=false", "-o", "types.ts"]
    run("node_modules/.bin/openapi-typescript", "openapi.json", *options, folder=tmp_path)
    run("node_modules/.bin/tsc", "-p", ".", folder=tmp_path)
    run("node", "use_types.js", platform.url, folder=tmp_path)
