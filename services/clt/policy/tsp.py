"""The travelling salesman problem: random instances, lengths of tours, and solvers.

Instances are cities ``[batch, nodes, 2]``, tours are permutations of them ``[batch, tours, nodes]``, closed: the last
city is followed by the first.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.clt import Distribution
from services.runtime.cache import best_effort, cache_folder

logger = logging.getLogger(__name__)

MIN_CITIES = 4
_SCALE = 10**6
"""The solver takes distances as integers; this is an instance's extent."""
_CLUSTERS, _SPREAD = 3, 0.07
_SLACK = 1e-5
_PROGRESS_EVERY = 50


def instances(
    count: int, nodes: int, generator: torch.Generator, distribution: Distribution = "uniform", device: str = "cpu"
) -> Tensor:
    """Random cities in the unit square, ``[count, nodes, 2]``; ``clustered``: Gaussian around three random centres."""
    if distribution == "uniform":
        return torch.rand(count, nodes, 2, generator=generator).to(device)
    centres = 0.2 + 0.6 * torch.rand(count, _CLUSTERS, 2, generator=generator)
    chosen = torch.randint(_CLUSTERS, (count, nodes), generator=generator)
    offsets = _SPREAD * torch.randn(count, nodes, 2, generator=generator)
    return (centres[torch.arange(count).unsqueeze(1), chosen] + offsets).clamp(0, 1).to(device)


def drawn(given: Tensor, count: int, generator: torch.Generator, device: str = "cpu") -> Tensor:
    """``count`` of the ``given`` instances, with repetitions."""
    return given[torch.randint(len(given), (count,), generator=generator)].to(device)


def lengths(cities: Tensor, tours: Tensor) -> Tensor:
    """Length of each closed tour, ``[batch, tours]``."""
    batch, count, nodes = tours.shape
    path = cities.gather(1, tours.reshape(batch, -1, 1).expand(-1, -1, 2)).view(batch, count, nodes, 2)
    return (path - path.roll(-1, 2)).square().sum(-1).sqrt().sum(-1)


def check_cities(cities: Tensor, field: str = "cities") -> Tensor:
    """The cities in float32. Raises :class:`InvalidInput` unless they are ``[batch, nodes, 2]`` with at least 4 cities,
    finite and in the unit square, and no two at the same place."""
    if cities.ndim != 3 or cities.shape[-1] != 2 or not len(cities):
        raise InvalidInput.field(field, f"must be [instances, cities, 2], not {list(cities.shape)}")
    if cities.shape[1] < MIN_CITIES:
        raise InvalidInput.field(field, f"has instances of {cities.shape[1]} cities; give at least {MIN_CITIES}")
    if not cities.is_floating_point():
        dtype = str(cities.dtype).removeprefix("torch.")
        raise InvalidInput.field(field, f"must be floating-point numbers, not {dtype}")
    cities = cities.float()
    # Lengths are sums of squares, which overflow before coordinates do.
    finite = cities.square().sum((1, 2)).isfinite()
    if not bool(finite.all()):
        raise InvalidInput.field(field, f"instance {_first(~finite)} has a coordinate that is NaN or infinite")
    inside = ((cities >= -_SLACK) & (cities <= 1 + _SLACK)).all(2).all(1)
    if not bool(inside.all()):
        text = "leaves the unit square, where policies are trained; scale the cities into it"
        raise InvalidInput.field(field, f"instance {_first(~inside)} {text}")
    # Few instances have two cities with the same x, so few are compared pair by pair.
    by_x = cities[..., 0].sort(1).values
    for index in (by_x[:, 1:] == by_x[:, :-1]).any(1).nonzero().flatten().tolist():
        if len(torch.unique(cities[index], dim=0)) < cities.shape[1]:
            raise InvalidInput.field(field, f"instance {index} has two cities at the same place; move or remove one")
    return cities


def read_cities(file: Path) -> Tensor:
    """Read cities from a ``.npy`` file, or a ``.safetensors`` file with the tensor ``cities``. Raises
    :class:`InvalidInput` that names the file."""
    try:
        # Never pickled objects, which numpy refuses by default.
        cities = load_file(file)["cities"] if file.suffix == ".safetensors" else torch.from_numpy(np.load(file))
    except FileNotFoundError:
        raise InvalidInput.field(str(file), "there is no such file") from None
    except KeyError:
        raise InvalidInput.field(str(file), "has no tensor `cities`") from None
    except (OSError, ValueError, TypeError, EOFError, AttributeError, SafetensorError) as error:
        text = "is not a .npy or .safetensors file of numbers that can be read"
        raise InvalidInput.field(str(file), f"{text} ({type(error).__name__})") from None
    return check_cities(cities, str(file))


def cities_in(source: Path) -> Tensor:
    """The instances of an artifact: a file that :func:`read_cities` reads, or a folder with one such file. Raises
    :class:`InvalidInput`."""
    if source.is_file():
        return read_cities(source)
    files = [path for path in sorted(source.glob("[!.]*")) if path.suffix in (".npy", ".safetensors")]
    if len(files) != 1:
        raise InvalidInput.field("cities", f"{source} has {len(files)} .npy and .safetensors files; give one of them")
    return read_cities(files[0])


def digest(cities: Tensor) -> str:
    """SHA-256 of instances."""
    return hashlib.sha256(repr(tuple(cities.shape)).encode() + cities.cpu().contiguous().numpy().tobytes()).hexdigest()


def _first(wrong: Tensor) -> int:
    return int(wrong.nonzero()[0, 0])


def solve(cities: Tensor, progress: Callable[[int], None] | None = None) -> Tensor:
    """A tour of each instance by LKH (Helsgaun 2000), ``[batch, 1, nodes]``: for few cities almost always the shortest.
    ``progress`` gets the number of instances done."""
    import elkai

    tours = []
    for number, points in enumerate(cities.detach().cpu().double().numpy()):
        extent = float(np.ptp(points, axis=0).max())
        distances = np.linalg.norm(points[:, None] - points[None], axis=-1) / extent * _SCALE
        tours.append(elkai.DistanceMatrix(np.rint(distances).astype(int).tolist()).solve_tsp()[:-1])
        if progress is not None and (number + 1) % _PROGRESS_EVERY == 0:
            progress(number + 1)
    return torch.tensor(tours, device=cities.device).unsqueeze(1)


def reference(
    cities: Tensor, progress: Callable[[int], None] | None = None, warn: Callable[[str], None] = logger.warning
) -> Tensor:
    """The tours of :func:`solve`, kept in the cache; ``warn`` is told where that is not possible."""
    digest = hashlib.sha256(repr((1, cities.shape)).encode() + cities.cpu().contiguous().numpy().tobytes()).hexdigest()
    name = f"{digest}.safetensors"
    with suppress(OSError, KeyError, SafetensorError):
        tours = load_file(cache_folder("tours") / name)["tours"]
        if tours.shape == (len(cities), 1, cities.shape[1]):
            return tours.to(cities.device)
    tours = solve(cities, progress)
    with best_effort(warn):
        folder = cache_folder("tours")
        folder.mkdir(parents=True, exist_ok=True)
        # Two runs may solve the same instances: each writes its own file, and a rename is atomic.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            Path(scratch, "tours").write_bytes(save({"tours": tours.cpu()}))
            Path(scratch, "tours").replace(folder / name)
    return tours


def gaps(length: Tensor, shortest: Tensor) -> Tensor:
    """How much longer tours are than the shortest, as a share of the shortest length; float64."""
    return length.double() / shortest.double() - 1
