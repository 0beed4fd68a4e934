"""An exact solver of the travelling salesman problem, to compare with."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor


def solve_exactly(cities: Tensor) -> Tensor:
    """The shortest tours of few cities, ``[batch, 1, nodes]``, by dynamic programming (Held and Karp 1962)."""
    nodes = cities.shape[1]
    tours = []
    for points in cities.detach().cpu().double():
        distance = torch.cdist(points, points).tolist()
        # By the set of cities passed (bits, without city 0) and the last of them: the length, and the city before.
        best = {(1 << last, last): (distance[0][last], 0) for last in range(1, nodes)}
        for size in range(2, nodes):
            for subset in combinations(range(1, nodes), size):
                passed = sum(1 << city for city in subset)
                for last in subset:
                    rest = passed ^ 1 << last
                    best[passed, last] = min((best[rest, k][0] + distance[k][last], k) for k in subset if k != last)
        passed = (1 << nodes) - 2
        last = min(range(1, nodes), key=lambda city: best[passed, city][0] + distance[city][0])
        tour = []
        while last:
            tour.append(last)
            passed, last = passed ^ 1 << last, best[passed, last][1]
        tours.append([0, *reversed(tour)])
    return torch.tensor(tours, device=cities.device).unsqueeze(1)
