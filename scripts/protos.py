"""Generate ``ethogram/v1`` from ``protos``; with ``--check``, fail if what is committed differs."""

from __future__ import annotations

import filecmp
import shutil
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "protos"
TARGET = ROOT / "ethogram" / "v1"


def generate(target: Path) -> None:
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
    (target / "ethogram" / "v1" / "__init__.py").touch()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        made = Path(folder) / "ethogram" / "v1"
        # A file without services needs no gRPC module.
        for path in made.glob("*_pb2_grpc.py"):
            if "Stub" not in path.read_text():
                path.unlink()
                path.with_suffix(".pyi").unlink(missing_ok=True)
        names = {path.name for path in made.iterdir() if path.is_file()}
        if "--check" in sys.argv:
            have = {path.name for path in TARGET.iterdir() if path.is_file()}
            _, different, missing = filecmp.cmpfiles(made, TARGET, names & have, shallow=False)
            stale = sorted({*different, *missing, *(names ^ have)})
            if stale:
                raise SystemExit(f"generated code is stale, run 'make protos': {', '.join(stale)}")
            return
        shutil.rmtree(TARGET, ignore_errors=True)
        shutil.copytree(made, TARGET)


if __name__ == "__main__":
    main()
