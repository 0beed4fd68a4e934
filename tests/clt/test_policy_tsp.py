"""Instances, lengths, solvers, and cities that are none."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from ethogram.errors import InvalidInput
from ethogram.specs.clt import Distribution
from services.clt.policy import tsp
from services.clt.policy.tsp import check_cities, gaps, instances, lengths, read_cities, reference, solve
from services.runtime.cache import cache_folder, writable_folder
from services.runtime.seeds import generator
from tests.clt.held_karp import solve_exactly


def test_length_of_a_square() -> None:
    cities = torch.tensor([[[0.0, 0], [0, 1], [1, 1], [1, 0]]])
    found = lengths(cities, torch.tensor([[[0, 1, 2, 3], [0, 2, 1, 3]]]))
    assert found.tolist()[0] == pytest.approx([4, 2 + 2 * 2**0.5])


def test_exact_solver_finds_the_shortest_of_all_tours() -> None:
    cities = instances(3, 7, generator(0, "test"))
    every = torch.tensor([[0, *rest] for rest in permutations(range(1, 7))]).expand(3, -1, -1)
    found = lengths(cities, solve_exactly(cities))[:, 0]
    assert torch.allclose(found, lengths(cities, every).amin(1))


@pytest.mark.parametrize("nodes", [4, 5, 9])
@pytest.mark.parametrize("distribution", ["uniform", "clustered"])
def test_solver_is_as_good_as_the_exact_one(nodes: int, distribution: Distribution) -> None:
    cities = check_cities(instances(5, nodes, generator(1, "test"), distribution))
    tours = solve(cities)
    assert tours.sort(-1).values.equal(torch.arange(nodes).expand(5, 1, nodes))
    gap = gaps(lengths(cities, tours), lengths(cities, solve_exactly(cities)))
    assert float(gap.abs().max()) < 1e-5


def test_clusters_are_clusters() -> None:
    spread, tight = (instances(50, 20, generator(0, "test"), distribution) for distribution in ("uniform", "clustered"))  # type: tuple[torch.Tensor, torch.Tensor]
    nearest = [(torch.cdist(cities, cities) + 9 * torch.eye(20)).amin(1).mean() for cities in (spread, tight)]
    assert nearest[1] < 0.7 * nearest[0]
    assert float(tight.min()) >= 0 and float(tight.max()) <= 1


def test_reference_is_solved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cities = instances(60, 5, generator(2, "test"))
    told: list[int] = []
    first = reference(cities, told.append)
    assert told == [50]
    monkeypatch.setattr(tsp, "solve", None)
    assert reference(cities).equal(first)


def without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is not in the password file."""
    for name in ("ETHOGRAM_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def unknown(uid: int) -> NoReturn:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.parametrize("state", ["a file", "below a file", "full", "no home"])
def test_a_cache_that_cannot_be_used_costs_only_time(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    if state == "no home":
        without_a_home(monkeypatch)
    else:
        monkeypatch.setenv("ETHOGRAM_CACHE", str(cache / "below" if state == "below a file" else cache))
    if state == "full":
        # The one file that is always full.
        (cache / "tours").mkdir(parents=True)

        def write_bytes(_: Path, data: bytes) -> None:
            with Path("/dev/full").open("wb", 0) as full:
                full.write(data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)
    else:
        cache.touch()
    cities = instances(2, 5, generator(2, "test"))
    assert reference(cities).equal(solve(cities))
    assert "nothing is cached. Name a folder in ETHOGRAM_CACHE" in caplog.text
    told: list[str] = []
    reference(cities, warn=told.append)
    assert len(told) == 1
    lasting = writable_folder("policies/mine")
    if state != "full":
        assert lasting.is_dir() and not lasting.is_relative_to(cache)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("ETHOGRAM_CACHE", "~/mine")
    assert cache_folder("tours") == tmp_path / "mine" / "tours"
    monkeypatch.delenv("ETHOGRAM_CACHE")
    assert cache_folder("tours") == tmp_path / "xdg" / "ethogram" / "tours"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder("tours") == tmp_path / ".cache" / "ethogram" / "tours"


def test_a_broken_cache_is_made_again(own_cache: Path) -> None:
    cities = instances(2, 5, generator(2, "test"))
    first = reference(cities)
    (file,) = (own_cache / "tours").iterdir()
    file.write_bytes(b"no tours")
    assert reference(cities).equal(first)
    assert file.read_bytes() != b"no tours"


@pytest.mark.parametrize(
    ("cities", "why"),
    [
        (torch.rand(3, 5), r"must be \[instances, cities, 2\], not \[3, 5\]"),
        (torch.rand(0, 5, 2), "must be"),
        (torch.rand(1, 3, 2), "at least 4"),
        (torch.ones(1, 5, 2, dtype=torch.int64), "floating-point"),
        (torch.rand(3, 5, 2).index_put_((torch.tensor(1),), torch.tensor(float("nan"))), "instance 1 has"),
        (torch.rand(3, 5, 2).index_put_((torch.tensor(2),), torch.tensor(0.5)), "instance 2 has two cities"),
        (torch.rand(2, 5, 2, dtype=torch.float64) * 1e300, "instance 0 has"),
        (torch.rand(2, 5, 2) * 1e30, "instance 0 has"),
        (torch.rand(2, 5, 2) + torch.tensor([0.0, 2.0])[:, None, None], "instance 1 leaves the unit square"),
    ],
)
def test_what_are_no_cities(cities: torch.Tensor, why: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=why):
        check_cities(cities)
    np.save(tmp_path / "cities.npy", cities.numpy())
    with pytest.raises(InvalidInput, match=rf"cities\.npy: .*{why}"):
        read_cities(tmp_path / "cities.npy")


def test_same_abscissa_is_no_same_place() -> None:
    grid = torch.cartesian_prod(torch.arange(3.0), torch.arange(3.0)).unsqueeze(0) / 2
    assert check_cities(grid).equal(grid)


def test_a_file_that_holds_no_cities(tmp_path: Path) -> None:
    for name in ("a.npy", "a.safetensors"):
        with pytest.raises(InvalidInput, match="no such file"):
            read_cities(tmp_path / name)
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(InvalidInput, match="that can be read"):
            read_cities(tmp_path / name)
