"""Policies of rl4co, and pickles that would do more than hold weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ethogram.errors import InvalidInput
from services.clt.policy.decode import greedy, multistart
from services.clt.policy.importing import import_rl4co
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import instances
from services.runtime.seeds import generator
from tests.clt.rl4co import HEADS, Module, policy_module, state_dict, tours
from tests.recorder import Recorder

CITIES = instances(20, 7, generator(0, "cities"))
AM: dict[str, Any] = {"policy_kwargs": {"num_heads": HEADS}, "baseline": "rollout"}
POMO: dict[str, Any] = {"policy_kwargs": {"num_heads": HEADS}, "baseline": "shared", "num_starts": None}


def checkpoint(normalization: str, settings: dict[str, Any], **names: Any) -> dict[str, Any]:
    """As Lightning writes it."""
    return {
        "epoch": 3,
        "state_dict": state_dict(normalization, **names),
        "hyper_parameters": {"env": Module(generator=Settings()), **settings},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}}],
        "callbacks": {Settings: Settings()},
    }


class Settings:
    """Of a class that the reader does not have."""

    def __init__(self) -> None:
        self.values, self.num_loc = [1, 2], 7


def kwargs(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**settings, "policy_kwargs": settings["policy_kwargs"] | more}


def module(settings: dict[str, Any], *given: Any, **options: Any) -> dict[str, Any]:
    return {**settings, "policy_kwargs": {}, "policy": policy_module(*given, **options)}


@pytest.mark.parametrize("other_names", [True, False])
@pytest.mark.parametrize(
    ("normalization", "settings", "graph_context", "starts"),
    [
        # The library's defaults of each model.
        ("batch", AM, True, False),
        ("instance", POMO, False, True),
        # Made otherwise by options.
        ("instance", kwargs(AM, normalization="instance"), True, False),
        ("batch", kwargs(POMO, normalization="batch"), False, True),
        ("layer", kwargs(POMO, normalization="layer", use_graph_context=True), True, True),
        ("layer", kwargs(AM, normalization="layer", use_graph_context=False), False, False),
        # Made by the user, as in the library's quick start: its settings are in the pickled policy alone.
        ("batch", module(POMO, "batch", graph_context=True), True, True),
        ("instance", module(POMO, "instance", graph_context=False, older=True), False, True),
        ("layer", module(AM, "layer", graph_context=True), True, False),
    ],
)
def test_an_imported_policy_builds_the_tours_of_the_library(
    normalization: str,
    settings: dict[str, Any],
    graph_context: bool,
    starts: bool,
    tmp_path: Path,
    *,
    other_names: bool,
) -> None:
    torch.save(checkpoint(normalization, settings, other_names=other_names), tmp_path / "last.ckpt")
    import_rl4co(tmp_path / "last.ckpt", tmp_path / "policy")
    policy = AttentionPolicy.load(tmp_path / "policy")
    assert policy.nodes == 7 and policy.chooses_start == (not starts)
    wanted = tours(state_dict(normalization), CITIES, normalization, graph_context=graph_context, starts=starts)
    assert (multistart if starts else greedy)(policy, CITIES).equal(wanted)
    # The control: the other reading is another policy.
    other = tours(state_dict(normalization), CITIES, normalization, graph_context=not graph_context, starts=starts)
    assert not other.equal(wanted)


def test_weights_alone_do_not_say_what_the_policy_is_like(tmp_path: Path) -> None:
    state = state_dict("instance")
    cases: list[dict[str, Any]] = [{}, {"heads": HEADS}, {"graph_context": False}]
    for options in cases:
        wanted = "give --graph-context or --no-graph-context" if "heads" in options else "give --heads"
        with pytest.raises(InvalidInput, match=f"checkpoint: it holds weights alone, and no settings.*{wanted}"):
            import_rl4co(state, tmp_path / "policy", **options)
    unreadable = {"state_dict": state, "hyper_parameters": {**POMO, "policy": Settings()}}
    torch.save(unreadable, tmp_path / "last.ckpt")
    with pytest.raises(InvalidInput, match="its settings do not say what the policy is like; give --heads"):
        import_rl4co(tmp_path / "last.ckpt", tmp_path / "policy")
    sources: list[Path | Mapping[str, Any]] = [state, tmp_path / "last.ckpt"]
    for number, source in enumerate(sources):
        policy = import_rl4co(source, tmp_path / str(number), heads=HEADS, graph_context=False)
        assert multistart(policy, CITIES).equal(tours(state, CITIES, "instance", graph_context=False, starts=True))


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.command = f"touch {file}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_nothing_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    evil = {**AM, "evil": Malicious(tmp_path / "hurt")}
    torch.save(checkpoint("batch", evil), tmp_path / "last.ckpt")
    import_rl4co(tmp_path / "last.ckpt", tmp_path / "policy")
    assert not (tmp_path / "hurt").exists()
    # Nor is a setting taken that is no number.
    settings = kwargs(AM, tanh_clipping=Malicious(tmp_path / "never"), num_heads=None)
    torch.save(checkpoint("batch", settings), tmp_path / "other.ckpt")
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
        (lambda state: without(state, "1.normalizer.running_var"), r"lacks encoder\.layers\.0\.norm1\.running_var"),
        (lambda state: without(state, "normalizer"), "batch, instance and layer can be imported"),
        (lambda state: without(state, "Wqkv.bias"), r"lacks encoder\.layers\.0\.attention\.qkv\.bias"),
        (lambda state: without(state, "init_embed.weight"), "no attention model"),
        (lambda state: state | {"policy.decoder.pointer.project_out.weight": torch.ones(2, 2)}, "has shape"),
        (
            lambda state: state | {"policy.decoder.logit_attention.project_out.weight": torch.ones(16, 16)},
            r"has weights twice.*decoder\.pointer\.project_out\.weight",
        ),
        (lambda state: state | {"policy.scale": 2.0, "policy.note": "x"}, r"no tensors: policy\.note, policy\.scale"),
        (lambda state: state | {"policy.decoder.project_node_embeddings.weight": [1.0]}, "no tensors: policy.decoder"),
        (lambda state: {"anything": 1}, "holds no weights"),
        (lambda state: [1], "holds no mapping"),
    ],
)
def test_what_is_no_attention_model(change: Any, why: str, tmp_path: Path) -> None:
    changed = change(state_dict("batch"))
    wrapped = {"state_dict": changed, "hyper_parameters": AM}
    torch.save(wrapped if isinstance(changed, dict) else changed, tmp_path / "last.ckpt")
    with pytest.raises(InvalidInput, match=why):
        import_rl4co(tmp_path / "last.ckpt", tmp_path / "policy")
    assert not (tmp_path / "policy").exists()


@pytest.mark.parametrize("off", ["mask_inner", "mask_logits"])
def test_a_policy_that_looks_at_visited_cities_is_refused(off: str, tmp_path: Path) -> None:
    settings = kwargs(AM, **{off: False})
    with pytest.raises(InvalidInput, match=off):
        import_rl4co(checkpoint("batch", settings), tmp_path / "policy")


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    run = Recorder(tmp_path)
    settings = kwargs(AM, temperature=0.5)
    import_rl4co(checkpoint("batch", settings), tmp_path / "policy", run=run)
    said = " ".join(run.logs)
    assert "left out, as they serve training alone: baseline.baseline.policy.encoder.init" in said
    assert "at temperature 1, not 0.5" in said


def test_heads_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="heads"):
        import_rl4co(checkpoint("batch", AM), tmp_path / "policy", heads=3)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    with pytest.raises(InvalidInput, match="No such file"):
        import_rl4co(file, tmp_path / "policy")
    torch.save(checkpoint("batch", AM), file)
    whole = file.read_bytes()
    for broken in (b"", b"nothing", whole[:-30], whole[: len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(InvalidInput, match=r"cannot be read as a file written by torch\.save"):
            import_rl4co(file, tmp_path / "policy")
