"""Generate the spec messages in ``protos``, and ``ethogram/v1`` from all of ``protos``; with ``--check``, fail if what
is committed differs."""

from __future__ import annotations

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

from scripts import messages
from scripts.generated import write

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "protos"
TARGET = ROOT / "ethogram" / "v1"


def compile_protos(target: Path) -> None:
    """Write the generated modules and their stubs below ``target``."""
    plugins = Path(sys.executable).parent
    arguments = [
        "protoc",
        f"-I{SOURCE}",
        f"-I{files('grpc_tools') / '_proto'}",
        f"--plugin=protoc-gen-mypy={plugins / 'protoc-gen-mypy'}",
        f"--plugin=protoc-gen-mypy_grpc={plugins / 'protoc-gen-mypy_grpc'}",
        *(f"--{kind}_out={target}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *sorted(str(path) for path in SOURCE.rglob("*.proto")),
    ]
    if protoc.main(arguments) != 0:
        raise SystemExit("protoc failed; its message is above")


def main() -> None:
    command = "make protos"
    write(messages.generate(), command)
    with tempfile.TemporaryDirectory() as folder:
        compile_protos(Path(folder))
        made = {path.name: path.read_text() for path in Path(folder, "ethogram", "v1").iterdir()}
    # A file without services needs no gRPC module.
    useless = {name for name, text in made.items() if name.endswith("_pb2_grpc.py") and "Stub" not in text}
    wanted = {name: text for name, text in made.items() if name.removesuffix("i") not in useless}
    old = {path: None for path in TARGET.iterdir() if path.is_file()}
    write({**old, TARGET / "__init__.py": "", **{TARGET / name: text for name, text in wanted.items()}}, command)


if __name__ == "__main__":
    main()
