"""Sparse codes and models: the fast path is the plain one, and losses are what they say."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ethogram.errors import InvalidInput
from ethogram.specs.clt import SparseLossSpec, SparseModelSpec
from services.clt.sparse import kernels
from services.clt.sparse.code import CHUNK
from services.clt.sparse.losses import group_heads, orthogonality, terms
from services.clt.sparse.model import JUMP_WIDTH, Scale, SparseModel, Streams


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model_of(kind: Any = "pair", widths: Sequence[int] = (8,), words: bool = True, **form: Any) -> SparseModel:
    """A model with random decoders, in its own units."""
    names = [f"h{i}" for i in range(2 * len(widths))]
    ends = (names[:1], names[:1]) if kind == "sae" else (names[: len(widths)], names[len(widths) :])
    scales = [[Scale(torch.zeros(width), torch.tensor(1.0)) for width in widths] for _ in range(2)]
    spec = SparseModelSpec.model_validate({"expansion": 8.0, "k": 3, **form})
    made = SparseModel(spec, Streams(kind, *ends, list(widths), list(widths)), (scales[0], scales[1]), draws(0))
    if words:
        with torch.no_grad():
            for number, decoder in enumerate(made.decoders):
                decoder.copy_(0.2 * torch.randn(decoder.shape, generator=draws(number)))
    return made.train()


def rows(model: SparseModel, count: int = 60) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [torch.randn(count, w, generator=draws(i)) for i, w in enumerate(model.streams.source_widths)]
    return inputs, inputs if model.streams.kind == "sae" else [(2 * one).sin() for one in inputs]


def none_dead(model: SparseModel) -> list[Tensor]:
    return [torch.zeros(count, dtype=torch.bool) for count in model.features]


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
@pytest.mark.parametrize(("kind", "widths"), [("sae", (8,)), ("pair", (8,)), ("cross_layer", (8, 6, 8))])
def test_the_sparse_path_is_the_dense_one(
    activation: str, kind: str, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = SparseLossSpec(l1=0.1, alignment=0.2, energy=0.1, group_features=0.01, orthogonality=0.1, group_size=3)
    found = []
    for sparse in (True, False):
        monkeypatch.setattr(SparseModel, "sparse", lambda self, source, sparse=sparse: sparse)
        model = model_of(kind, widths, activation=activation, skip=kind != "sae")
        inputs, targets = rows(model)
        values, code, made = terms(model, inputs, targets, weight, none_dead(model))
        assert all((one.pattern is not None) == sparse for one in code)
        values["loss"].backward()  # type: ignore[no-untyped-call]
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((values, gradients, [one.dense() for one in code], made, [one.counts() for one in code]))
    for name, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][name], rtol=1e-5, atol=1e-6, msg=name)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(gradient, found[1][1][name], rtol=1e-4, atol=3e-6, msg=name)
    for part in (2, 3, 4):
        torch.testing.assert_close(found[0][part], found[1][part], rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from([-3.0, 0.0, 3.0]), st.data())
def test_the_largest_are_the_largest(count: int, features: int, seed: int, shift: float, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, features))
    pre = (torch.randn(count, features, generator=draws(seed)) + shift).round(decimals=1)
    cols, vals = np.empty((count, k), np.int32), np.empty((count, k), np.float32)
    kernels.largest(0, count, pre.numpy(), k, cols, vals)
    wanted = pre.relu().topk(k, dim=1).values
    assert np.array_equal(-np.sort(-vals, axis=1), wanted.numpy())
    # Each is where it says, and no feature is there twice.
    active = vals > 0
    assert np.array_equal(np.take_along_axis(pre.numpy(), cols.astype(np.int64), 1)[active], vals[active])
    for own, on in zip(cols, active, strict=True):
        assert len(set(own[on])) == on.sum()


def test_the_largest_are_found_among_numbers_that_are_not_finite() -> None:
    """In a process of its own: what runs out of an array may end it."""
    program = """
import numpy as np
from services.clt.sparse import kernels
draws = np.random.default_rng(0)
for k in (1, 7, 30):
    for share in (0.05, 0.5, 1.0):
        pre = draws.standard_normal((40, 200)).astype(np.float32)
        pre[draws.random(pre.shape) < share] = np.nan
        pre[0] = np.inf
        cols, vals = np.empty((40, k), np.int32), np.empty((40, k), np.float32)
        kernels.largest(0, 40, pre, k, cols, vals)
        wanted = -np.sort(-np.nan_to_num(pre, nan=0.0, posinf=np.inf).clip(0), axis=1)[:, :k]
        assert np.array_equal(-np.sort(-vals, axis=1), wanted)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_rows_with_a_nan_stay_so(activation: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for sparse in (True, False):
        monkeypatch.setattr(SparseModel, "sparse", lambda self, source, sparse=sparse: sparse)
        model = model_of(activation=activation).train(training)
        # Many chunks of rows; NaN in rows of three of them, and once an infinite sum of numbers.
        inputs, _ = rows(model, 3 * CHUNK)
        inputs[0][[0, CHUNK + 9, 3 * CHUNK - 1], 2] = float("nan")
        inputs[0][5] = 3e38
        made = model.decode(model.encode(inputs), inputs)[0]
        found.append(made.isnan().any(1).nonzero().flatten().tolist())
    assert found[0] == found[1] and {0, CHUNK + 9, 3 * CHUNK - 1} <= {*found[0]} and len(found[0]) <= 4


@pytest.mark.parametrize("damaged", ["the folder", "the index"])
def test_a_cache_of_kernels_that_cannot_be_used_costs_a_warning(
    damaged: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = f"plus_{tmp_path.name}"
    (tmp_path / f"{module}.py").write_text("def plus(value):\n    return value + 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    kernel = kernels._compile()(importlib.import_module(module).plus)
    assert kernel._cache.cache_path == str(tmp_path / "__pycache__")
    if damaged == "the folder":
        shutil.rmtree(tmp_path / "__pycache__")
        (tmp_path / "__pycache__").write_text("")
    else:
        Path(kernel._cache._cache_file._index_path).write_bytes(b"no index")
    assert kernel(2) == 3
    assert f"{tmp_path}/__pycache__ cannot be used" in caplog.text and "NUMBA_CACHE_DIR" in caplog.text


def test_kernels_need_no_folder_to_be_kept_in() -> None:
    program = """
from numba.core.caching import CacheImpl
CacheImpl._locator_classes = []
from services.clt.sparse import kernels
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_kernels_do_all_rows_whatever_the_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    seen = np.zeros(37, np.int64)

    def kernel(begin: int, end: int, out: Any) -> None:
        out[begin:end] += 1

    kernels.spread(kernel, 37, seen)
    assert (seen == 1).all()


def test_topk_keeps_k_features_and_their_values() -> None:
    """Not k - 1, and not shifted: a defect of earlier work."""
    model = model_of(k=3)
    inputs, _ = rows(model, 500)
    code = model.encode(inputs)[0].dense()
    pre = inputs[0] @ model.encoders[0].T + model.encoder_biases[0]
    assert ((code > 0).sum(1) == 3).all()
    torch.testing.assert_close(code[code > 0], pre[code > 0])


def test_batchtopk_has_k_on_average_and_goes_by_its_threshold_alone() -> None:
    model = model_of(activation="batchtopk", k=3)
    for seed in range(40):
        code = model.encode([torch.randn(64, 8, generator=draws(seed))])[0]
        assert code.values.numel() == 3 * 64
    counts = (code.dense() > 0).sum(1)
    assert counts.min() < 3 < counts.max()
    model.eval()
    inputs = [torch.randn(4000, 8, generator=draws(99))]
    alone = model.encode(inputs)[0].dense()
    assert 2.5 < float((alone > 0).sum()) / 4000 < 3.5
    # No row depends on the others that it is asked with.
    torch.testing.assert_close(model.encode([inputs[0][7:8]])[0].dense(), alone[7:8])


def test_jumprelu_learns_its_thresholds() -> None:
    model = model_of(activation="jumprelu")
    inputs, targets = rows(model, 4000)
    values, _, _ = terms(model, inputs, targets, SparseLossSpec(l0=0.1), none_dead(model))
    values["loss"].backward()  # type: ignore[no-untyped-call]
    gradient = model.log_thresholds[0].grad
    assert gradient is not None and float(gradient.abs().sum()) > 0
    with torch.no_grad():
        model.log_thresholds[0].fill_(1.0)
    fewer = model.encode(inputs)[0].dense()
    assert (fewer[fewer > 0] > np.e - 1e-4).all()


@pytest.mark.parametrize("threshold", [0.01, 0.2])
def test_the_gradient_of_a_threshold_is_that_of_the_pre_activations_near_it(threshold: float) -> None:
    """On both sides of it; features that are far below do not count, however low the threshold."""
    model = model_of(activation="jumprelu")
    with torch.no_grad():
        model.log_thresholds[0].fill_(threshold).log_()
    inputs, targets = rows(model, 4000)
    values, code, _ = terms(model, inputs, targets, SparseLossSpec(l0=1.0), none_dead(model))
    parameters = [model.log_thresholds[0], model.encoders[0]]
    found, none = torch.autograd.grad(values["l0"], parameters, retain_graph=True, allow_unused=True)
    pre = inputs[0] @ model.encoders[0].detach().T + model.encoder_biases[0].detach()
    near = (pre - threshold).abs() < JUMP_WIDTH / 2
    wanted = -threshold * near.sum(0) / JUMP_WIDTH / 4000
    assert none is None or not none.any()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2 * threshold / JUMP_WIDTH / 4000)
    # Of what is decoded: the same kernel, times what a value is worth (Rajamanoharan et al. 2024, equation 11).
    by_value = torch.autograd.grad(values["error"], code[0].values, retain_graph=True)[0]
    found, weights = torch.autograd.grad(values["error"], parameters)
    wanted = -threshold * threshold * (near * by_value).sum(0) / JUMP_WIDTH
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(weights, (by_value * (pre > threshold)).T @ inputs[0], rtol=1e-3, atol=1e-5)


def test_a_source_writes_its_own_and_later_targets_alone() -> None:
    model = model_of("cross_layer", (8, 6, 8))
    inputs, _ = rows(model)
    before = model.decode(model.encode(inputs), inputs)
    inputs[1] = inputs[1] + 1
    after = model.decode(model.encode(inputs), inputs)
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True]
    assert [tuple(w.shape) for w in model.decoders] == [(64, 22), (48, 14), (64, 8)]
    assert torch.equal(model.decoder_directions(1, 2), model.decoders[1][:, 6:])


def test_the_penalties_are_their_formulas() -> None:
    model = model_of("pair", (6,), expansion=2.0, k=2)
    words = model.decoders[0].detach()
    unit = words / words.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T)[~torch.eye(12, dtype=torch.bool)]
    torch.testing.assert_close(orthogonality(model), cosines.square().mean())
    by_head = words.view(12, 3, 2).norm(dim=2).sum(1).mean()
    torch.testing.assert_close(group_heads(model, 3), by_head, rtol=1e-4, atol=1e-5)
    inputs, targets = rows(model)
    values, code, found = terms(
        model, inputs, targets, SparseLossSpec(l1=1, dictionary_l1=1, dictionary_l2=1), none_dead(model)
    )
    torch.testing.assert_close(values["error"], (found[0] - targets[0]).square().mean())
    torch.testing.assert_close(values["l1"], (code[0].dense() * words.norm(dim=1)).sum(1).mean())
    torch.testing.assert_close(values["dictionary_l1"], words.abs().sum(1).mean())
    torch.testing.assert_close(values["dictionary_l2"], words.square().sum(1).mean())
    torch.testing.assert_close(values["loss"], sum(values[n] for n in values if n != "loss"))


def test_dead_features_alone_learn_from_auxk() -> None:
    model = model_of(words=False)
    inputs, targets = rows(model)
    dead = [torch.arange(64) < 10]
    values, _, _ = terms(model, inputs, targets, SparseLossSpec(auxk=1.0), dead)
    torch.autograd.backward(values["auxk"])
    gradient = model.decoders[0].grad
    assert gradient is not None
    assert (gradient[:10].abs().sum(1) > 0).any() and not gradient[10:].any()
    assert "auxk" not in terms(model, inputs, targets, SparseLossSpec(), none_dead(model))[0]
    # Half as many dead features as may take part in a row: all of them do, as before, and count for half.
    wider = terms(model, inputs, targets, SparseLossSpec(auxk=1.0, auxk_features=20), dead)[0]["auxk"]
    alone = terms(model, inputs, targets, SparseLossSpec(auxk=1.0, auxk_features=10), dead)[0]["auxk"]
    torch.testing.assert_close(wider, alone / 2)


def test_whitened_and_scaled_streams_come_back() -> None:
    stream = torch.randn(500, 5, generator=draws(0)) @ torch.randn(5, 5, generator=draws(1)) + 3
    mean, covariance = stream.mean(0), stream.T.cov(correction=0)
    values, vectors = torch.linalg.eigh(covariance.double())
    scale = Scale(mean, (vectors * values.rsqrt()) @ vectors.T)
    torch.testing.assert_close(scale(stream).T.cov(correction=0), torch.eye(5), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(scale.undo(scale(stream)), stream, atol=1e-3, rtol=1e-4)


def test_a_model_is_kept_whole(tmp_path: Path) -> None:
    model = model_of("cross_layer", (8, 6), skip=False, activation="batchtopk").eval()
    model.save(tmp_path, {"note": 1})
    again = SparseModel.load(tmp_path)
    inputs, _ = rows(model)
    for mine, theirs in zip(model(inputs), again(inputs), strict=True):
        assert torch.equal(mine, theirs)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:-10])
    with pytest.raises(InvalidInput, match=r"^model: .*model\.json cannot be read, or .*make the sparse model again"):
        SparseModel.load(tmp_path)
    with pytest.raises(InvalidInput, match=r"^model: .*nowhere does not exist$"):
        SparseModel.load(tmp_path / "nowhere")


def test_more_features_than_there_are_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"spec\.model\.k: 65 is more than the 64 features of h0"):
        model_of(k=65)


def test_a_tenth_of_active_features_is_dense() -> None:
    assert model_of(k=4).sparse(0) and not model_of(k=5).sparse(0)
    assert not model_of(activation="relu").sparse(0)
