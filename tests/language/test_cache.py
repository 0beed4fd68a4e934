"""The cache of tensors: what it gives is what was put in, whatever happens to its files."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.language.cache import TensorCache

TEXTS = ["a", "b", "", "a long text\n" * 100, "\ud800"]


def embed(texts: list[str]) -> list[Tensor]:
    """As many numbers as the text has letters, so that each differs."""
    return [torch.full((2, len(text)), float(sum(map(ord, text)))) for text in texts]


def same(found: list[Tensor], texts: list[str]) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found, embed(texts), strict=True))


def test_what_is_computed_once_is_had_again(tmp_path: Path) -> None:
    calls: list[list[str]] = []

    def compute(texts: list[str]) -> list[Tensor]:
        calls.append(texts)
        return embed(texts)

    cache = TensorCache(tmp_path, "model")
    assert same(cache.get_or_compute([*TEXTS, "a"], compute), [*TEXTS, "a"]) and calls == [TEXTS]
    again = TensorCache(tmp_path, "model")
    assert same(again.get_or_compute([*TEXTS[::-1], "new"], compute), [*TEXTS[::-1], "new"])
    assert calls == [TEXTS, ["new"]] and (again.hits, again.misses) == (5, 1)
    assert TensorCache(tmp_path, "other").get_many(["a"]) == [None]


@pytest.mark.parametrize("root", ["file", "/proc/none"])
def test_a_folder_that_cannot_be_written_costs_only_time(
    root: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / root, "model")
    for _ in range(2):
        assert same(cache.get_or_compute(TEXTS, embed), TEXTS)
    assert cache.misses == 2 * len(TEXTS) and "nothing is cached" in caplog.text


def test_types_and_shapes_stay(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 4).T.bfloat16(), torch.tensor(5), torch.zeros(0, 7, dtype=torch.float16)]
    TensorCache(tmp_path, "m").put_many(["x", "y", "z"], tensors)
    for mine, theirs in zip(TensorCache(tmp_path, "m").get_many(["x", "y", "z"]), tensors, strict=True):
        assert mine is not None and mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_a_cache_that_cannot_be_written_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    cache = TensorCache(tmp_path / "file", "m")
    for text in ("a", "b"):
        assert same(cache.get_or_compute([text], embed), [text])
    assert caplog.text.count("cannot be used") == 1


@pytest.mark.parametrize("change", ["cut", "flip", "rename"])
def test_a_shard_that_was_changed_is_computed_again_with_a_warning(
    change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path, "m")
    cache.put_many(["a"], embed(["a"]))
    (shard,) = cache.folder.glob("*.safetensors")
    cache.put_many(["b"], embed(["b"]))
    data = shard.read_bytes()
    if change == "rename":
        shard.rename(shard.with_name(f"{'0' * 64}.safetensors"))
    else:
        shard.write_bytes(data[:-3] if change == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    again = TensorCache(tmp_path, "m")
    assert same(again.get_or_compute(["a", "b"], embed), ["a", "b"])
    assert (again.hits, again.misses) == (1, 1) and "computed again" in caplog.text
    assert same(TensorCache(tmp_path, "m").get_or_compute(["a"], lambda _: pytest.fail("it is there")), ["a"])


def test_what_a_crash_leaves_does_no_harm(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, "m")
    half = cache.folder / "abc.safetensors.new"
    half.write_bytes(b"half of a shard")
    assert cache.get_many(["a"]) == [None]
    cache.put_many(["a"], embed(["a"]))
    assert not half.exists() and same([t for t in cache.get_many(["a"]) if t is not None], ["a"])


def _fill(root: Path, which: int) -> None:
    cache = TensorCache(root, "m")
    for start in range(0, 40, 4):
        texts = [f"{which if i % 2 else 'both'} {i}" for i in range(start, start + 4)]
        assert same(cache.get_or_compute(texts, embed), texts)


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_fill, args=(tmp_path, which)) for which in range(2)]
    for process in processes:
        process.start()
    cache = TensorCache(tmp_path, "m")
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    texts = [f"{which if i % 2 else 'both'} {i}" for which in range(2) for i in range(40)]
    assert same(cache.get_or_compute(texts, lambda _: pytest.fail("all are there")), texts)
