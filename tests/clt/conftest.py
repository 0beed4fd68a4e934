"""Small policies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ethogram.specs.clt import PolicyModelSpec, PolicySpec
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.train import initialize
from services.runtime.seeds import generator

SMALL = {"hidden_dim": 16, "layers": 2, "heads": 4, "feed_forward": 32}


def policy_spec(**sections: Any) -> PolicySpec:
    """A spec of a policy that trains in a moment."""
    training = {"steps": 6, "batch_size": 4, "validate_every": 2, "validation": 16, "warm_up": 1}
    training |= sections.pop("training", {})
    given = {"model": SMALL, "evaluation": 5, "samples": 3, **sections, "training": training}
    if "cities" not in given:
        given.setdefault("nodes", 6)
    return PolicySpec.model_validate(given)


def small_policy(nodes: int = 7, seed: int = 0, **model: Any) -> AttentionPolicy:
    """One with random weights and running means, ready for evaluation."""
    policy = AttentionPolicy(PolicyModelSpec.model_validate({**SMALL, **model}), nodes)
    draws = generator(seed, "test")
    initialize(policy, draws)
    for name, value in policy.state_dict().items():
        if "running_" in name or name.endswith(("norm1.bias", "norm2.bias")):
            value.uniform_(0.5, 1.5, generator=draws)
    return policy.eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is kept in the developer's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ETHOGRAM_CACHE", str(folder))
    return folder
