"""Whatever is wrong with a file or a variable of the user's is an error that names it, whoever reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ethogram import networks
from ethogram.cli.files import read_mapping
from ethogram.errors import EthogramError, InvalidInput
from ethogram.platform.state import StateDir
from ethogram.specs.base import ArtifactRef
from ethogram.specs.clt import ActivationsSpec, PolicyModelSpec
from gateway.settings import GatewaySettings
from services.artifacts.store import ArtifactStore
from services.clt.activations.collect import collect
from services.clt.activations.store import ActivationStore
from services.clt.policy.importing import read_checkpoint
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import read_cities
from services.clt.sparse.model import SparseModel
from services.crossmodal.codec import Codec
from services.generation.progress import Progress
from services.inference.settings import InferenceSettings
from services.jobs.registry import JobRegistry
from services.language.tables import read_rows
from services.runtime.cache import best_effort, cache_folder, writable_folder
from services.runtime.run import Run
from services.zoo.dataset import read_about
from services.zoo.source import open_zoo
from workers.settings import WorkerSettings

_DEEP = b"[" * 1_500
ODD: dict[str, bytes | None] = {
    "a folder": None,
    "empty": b"",
    "not UTF-8": b"\xff\xfe{\x00}\x00",
    "broken": b'{"format": ',
    "null": b"null",
    "a list": b"[1, 2]",
    "a large number": b'{"format": 1' + b"0" * 400 + b', "spec": {"seed": 1' + b"0" * 400 + b"}}",
    "too many digits": b'{"format": 1' + b"0" * 5000 + b"}",
    "infinite": b'{"format": Infinity, "spec": {"subjects": Infinity}, "model": {}, "nodes": Infinity, "path": 1}',
    "too deep": _DEEP,
    "other types": b'{"format": [], "spec": 3, "model": "x", "path": {}, "next_block": {}, "rejected": 3}',
}


def last(rows: object) -> None:
    """Read all rows."""
    for _ in rows:  # type: ignore[attr-defined]
        pass


READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a spec": ("spec.yaml", lambda folder: read_mapping(folder / "spec.yaml", "spec")),
    "networks": ("networks.safetensors", lambda folder: networks.load(folder / "networks.safetensors")),
    "a zoo": ("zoo.json", read_about),
    "a zoo to train on": ("zoo.json", open_zoo),
    "records": ("zoo.jsonl", lambda folder: open_zoo(folder / "zoo.jsonl")),
    "a policy": ("policy.json", AttentionPolicy.load),
    "a policy's weights": ("policy.ckpt", lambda folder: read_checkpoint(folder / "policy.ckpt")),
    "a sparse model": ("model.json", SparseModel.load),
    "a codec": ("config.json", Codec.load),
    "a store": ("manifest.json", ActivationStore.open),
    "a store elsewhere": ("activation_store.json", ActivationStore.open),
    "cities": ("cities.npy", lambda folder: read_cities(folder / "cities.npy")),
    "more cities": ("cities.safetensors", lambda folder: read_cities(folder / "cities.safetensors")),
    "a table": ("a.csv", lambda folder: last(read_rows(folder / "a.csv"))),
    "a parquet table": ("a.parquet", lambda folder: last(read_rows(folder / "a.parquet"))),
    "a checkpoint": ("progress.json", Progress.load),
}


@pytest.mark.parametrize(
    ("odd", "reader"),
    # YAML is read slowly.
    [(odd, reader) for odd in ODD for reader in READERS if (odd, reader) != ("too deep", "a spec")],
)
def test_a_file_that_is_not_what_it_should_be_is_named(odd: str, reader: str, tmp_path: Path) -> None:
    file, read = READERS[reader]
    folder, content = tmp_path / "a\nb", ODD[odd]
    folder.mkdir()
    if content is None:
        (folder / file).mkdir()
    else:
        (folder / file).write_bytes(content)
    try:
        read(folder)
    except EthogramError as error:
        assert isinstance(error, InvalidInput), error
        named = file in f"{error.message} {error.violations}" or str(folder) in error.message
        assert named or (reader == "a checkpoint" and error.message.startswith("checkpoint: ")), error
        assert len(error.message) < 700
    else:
        # CSV and YAML take much.
        assert reader in ("a table", "a spec"), "was read"


def _policy() -> AttentionPolicy:
    return AttentionPolicy(PolicyModelSpec(hidden_dim=16, heads=2), 5)


_ACTIVATIONS = ActivationsSpec(policy=ArtifactRef(artifact="policy"), instances=4)
NOWHERE = "~nosuchuser/folder"
VARIABLES: list[tuple[str, str, Callable[[Path], object]]] = [
    ("ETHOGRAM_STATE", NOWHERE, lambda _: StateDir.find()),
    ("ETHOGRAM_STATE", NOWHERE, lambda _: GatewaySettings.read()),
    ("ETHOGRAM_STATE", NOWHERE, lambda _: WorkerSettings.read()),
    ("ETHOGRAM_STORE", NOWHERE, lambda _: WorkerSettings.read()),
    ("ETHOGRAM_STORE", NOWHERE, lambda _: InferenceSettings.read()),
    ("ETHOGRAM_PORT", "9" * 5000, lambda _: GatewaySettings.read()),
    ("ETHOGRAM_PORT", "80\n81", lambda _: GatewaySettings.read()),
    ("ETHOGRAM_LEASE_SECONDS", "nan", lambda _: WorkerSettings.read()),
    ("ETHOGRAM_LEASE_SECONDS", "inf", lambda _: WorkerSettings.read()),
    ("ETHOGRAM_GRACE_SECONDS", "1" + "0" * 400, lambda _: WorkerSettings.read()),
    ("ETHOGRAM_THREADS", "9" * 40, lambda _: WorkerSettings.read()),
    ("ETHOGRAM_THREADS", "9" * 40, lambda _: InferenceSettings.read()),
    ("ETHOGRAM_MAX_BATCH", "9" * 40, lambda _: InferenceSettings.read()),
    ("ETHOGRAM_LOG_LEVEL", "loud", lambda _: WorkerSettings.read()),
    (
        "ACTIVATIONS_ROOT",
        NOWHERE,
        lambda folder: collect(
            ActivationsSpec(policy=ArtifactRef(artifact="policy"), instances=4), folder / "new", Run(), _policy()
        ),
    ),
    ("ETHOGRAM_DATABASE_URL", "registry.db", lambda _: JobRegistry.open(WorkerSettings.read().database)),
    ("ETHOGRAM_DATABASE_URL", "sqlite:////proc/no/r.db", lambda _: JobRegistry.open(WorkerSettings.read().database)),
    ("ETHOGRAM_DATABASE_URL", "mysql://host/x", lambda _: JobRegistry.open(WorkerSettings.read().database)),
    ("ETHOGRAM_DATABASE_URL", "a\nb", lambda _: JobRegistry.open(WorkerSettings.read().database)),
    ("ETHOGRAM_STORE", "/dev/null/store", lambda _: ArtifactStore(WorkerSettings.read().store_url)),
    ("ETHOGRAM_STORE", "nosuch://bucket", lambda _: ArtifactStore(WorkerSettings.read().store_url)),
]


@pytest.mark.parametrize(("variable", "value", "use"), VARIABLES)
def test_a_variable_that_cannot_be_used_is_named(
    variable: str, value: str, use: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(EthogramError) as caught:
        use(tmp_path)
    names = (variable, variable.removeprefix("ETHOGRAM_").lower(), value.partition(":")[0])
    assert any(name in caught.value.message for name in names), caught.value.message
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("variable", ["ETHOGRAM_CACHE", "XDG_CACHE_HOME"])
@pytest.mark.parametrize("value", [NOWHERE, "/dev/null/cache", "/proc/nowhere"])
def test_a_cache_that_cannot_be_used_costs_a_warning(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ETHOGRAM_CACHE", raising=False)
    monkeypatch.setenv(variable, value)
    said: list[str] = []
    with best_effort(said.append):
        (cache_folder("x") / "y").mkdir(parents=True)
    assert len(said) == 1 and value in said[0]
    assert writable_folder("x").is_dir()


def test_a_home_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert StateDir.find("~/zoos").root == Path.home() / "zoos"
    with pytest.raises(InvalidInput, match=r"^--state: ~nosuchuser/folder begins with ~"):
        StateDir.find(NOWHERE)
    monkeypatch.setenv("ETHOGRAM_STORE", "~/store")
    assert WorkerSettings.read().store_url == str((Path.home() / "store").resolve())
