"""Policies of rl4co, and pickles that would do more than hold weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.clt.policy.decode import greedy
from services.clt.policy.importing import import_rl4co
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import instances
from services.runtime.seeds import generator
from tests.clt.conftest import small_policy

NAMES = {
    "encoder.embed.": "encoder.init_embedding.init_embed.",
    "encoder.layers.": "encoder.net.layers.",
    ".attention.qkv.": ".0.module.Wqkv.",
    ".attention.out.": ".0.module.out_proj.",
    ".norm1.": ".1.normalizer.",
    ".mlp.0.": ".2.module.lins.0.",
    ".mlp.2.": ".2.module.lins.1.",
    ".norm2.": ".3.normalizer.",
    "decoder.placeholder": "decoder.context_embedding.W_placeholder",
    "decoder.context.": "decoder.context_embedding.project_context.",
    "decoder.project.": "decoder.project_node_embeddings.",
    "decoder.fixed.": "decoder.project_fixed_context.",
    "decoder.out.": "decoder.pointer.project_out.",
}


def theirs(policy: AttentionPolicy, older: bool = False) -> dict[str, Tensor]:
    """The weights as rl4co names them."""
    state = {}
    for name, value in policy.state_dict().items():
        for own, other in NAMES.items():
            name = name.replace(own, other)
        if older:
            name = name.replace("lins.0", "0").replace("lins.1", "2").replace("pointer", "logit_attention")
        state[f"policy.{name}"] = value
    return state | {"baseline.baseline.policy.anything": torch.zeros(2)}


class Settings:
    """Of a class that the reader does not have."""

    def __init__(self) -> None:
        self.values = [1, 2]


@pytest.mark.parametrize("older", [True, False])
def test_an_imported_policy_builds_the_same_tours(older: bool, tmp_path: Path) -> None:
    policy = small_policy()
    policy.chooses_start = True
    checkpoint = {
        "epoch": 3,
        "state_dict": theirs(policy, older),
        "hyper_parameters": {"env": Settings(), "policy_kwargs": {"num_heads": 4}, "baseline": "rollout"},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
        "callbacks": {Settings: Settings()},
    }
    torch.save(checkpoint, tmp_path / "last.ckpt")
    import_rl4co(tmp_path / "last.ckpt", tmp_path / "policy", nodes=7)
    again = AttentionPolicy.load(tmp_path / "policy")
    cities = instances(20, 7, generator(0, "cities"))
    assert again.chooses_start
    assert greedy(again, cities).equal(greedy(policy, cities))


def test_pomo_is_given_its_first_city(tmp_path: Path) -> None:
    policy = small_policy(graph_context=False)
    state = {name: value for name, value in theirs(policy).items() if "W_placeholder" not in name}
    settings = {"num_starts": None, "policy_kwargs": {"num_heads": 4, "use_graph_context": False}}
    again = import_rl4co({"state_dict": state, "hyper_parameters": settings}, tmp_path / "policy", nodes=7)
    cities = instances(20, 7, generator(0, "cities"))
    assert not again.chooses_start
    assert greedy(again, cities).equal(greedy(policy, cities))


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.command = f"touch {file}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    policy = small_policy()
    checkpoint = {"state_dict": theirs(policy), "hyper_parameters": {"evil": Malicious(tmp_path / "hurt")}}
    torch.save(checkpoint, tmp_path / "last.ckpt")
    import_rl4co(tmp_path / "last.ckpt", tmp_path / "policy", heads=4)
    assert not (tmp_path / "hurt").exists()
    # Nor is a setting taken that is no number.
    evil = {"tanh_clipping": Malicious(tmp_path / "never"), "num_heads": None}
    torch.save({**checkpoint, "hyper_parameters": {"policy_kwargs": evil}}, tmp_path / "other.ckpt")
    assert import_rl4co(tmp_path / "other.ckpt", tmp_path / "other", heads=4).spec.clipping == 10
    # The control: torch itself would run it.
    torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert (tmp_path / "hurt").exists()


def without(state: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda state: state | {"policy.encoder.extra": torch.ones(1)}, "no attention model.*policy.encoder.extra"),
        (lambda state: without(state, "running_"), "instance normalisation"),
        (lambda state: without(state, "Wqkv.bias"), r"lacks encoder\.layers\.0\.attention\.qkv\.bias"),
        (lambda state: without(state, "init_embed.weight"), "no attention model"),
        (lambda state: state | {"policy.decoder.pointer.project_out.weight": torch.ones(2, 2)}, "has shape"),
        (lambda state: {"anything": 1}, "holds no weights"),
        (lambda state: [1], "holds no mapping"),
    ],
)
def test_what_is_no_attention_model(change: Any, why: str, tmp_path: Path) -> None:
    torch.save(change(theirs(small_policy())), tmp_path / "last.ckpt")
    with pytest.raises(InvalidInput, match=why):
        import_rl4co(tmp_path / "last.ckpt", tmp_path / "policy", heads=4)
    assert not (tmp_path / "policy").exists()


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="heads"):
        import_rl4co(theirs(small_policy()), tmp_path / "policy", heads=3)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    with pytest.raises(InvalidInput, match="No such file"):
        import_rl4co(file, tmp_path / "policy")
    torch.save({"state_dict": theirs(small_policy())}, file)
    whole = file.read_bytes()
    for broken in (b"", b"nothing", whole[:-30], whole[: len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(InvalidInput, match=r"cannot be read as a file written by torch\.save"):
            import_rl4co(file, tmp_path / "policy")
