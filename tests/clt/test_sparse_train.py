"""Training of sparse models on real stores: what resumes is what went on, and dead features come back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ethogram.errors import InvalidInput
from ethogram.specs.base import ArtifactRef
from ethogram.specs.clt import ActivationsSpec, CltSpec, GridAxis, SaeSpec, SweepSpec
from services.clt.activations.collect import collect
from services.clt.activations.hooks import mlp_pairs
from services.clt.activations.store import ActivationStore
from services.clt.sparse import job, sweep
from services.clt.sparse.evaluate import evaluate
from services.clt.sparse.model import SparseModel
from services.clt.sparse.train import SparseTrainer, train
from services.runtime.console import ConsoleRun
from services.runtime.run import Run
from services.runtime.training import Diverged
from tests.clt.conftest import small_policy
from tests.recorder import Interrupted, Recorder

ANY = ArtifactRef(artifact="x")
MLP = {"sources": ["encoder_layer_0_pre_mlp"], "targets": ["encoder_layer_0_mlp"]}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Of what enters and leaves the MLPs of a policy of two layers of 16 channels: 7,000 rows."""
    spec = ActivationsSpec(policy=ANY, instances=1000, validation=0.2, shard_rows=700)
    return collect(spec, tmp_path_factory.mktemp("store"), Run(), small_policy())


def clt(**sections: Any) -> CltSpec:
    training = {"steps": 40, "batch_size": 128, "validate_every": 20, "warm_up": 5, "learning_rate": 5e-3}
    training |= sections.pop("training", {})
    model = {"expansion": 8.0, "k": 6} | sections.pop("model", {})
    given = {"activations": ANY, **sections, "model": model, "training": training}
    return CltSpec.model_validate(given if "kind" in sections else MLP | given)


def sae(**sections: Any) -> SaeSpec:
    given = clt(**sections).model_dump(exclude={"kind", "sources", "targets"})
    return SaeSpec.model_validate({**given, "hook": "encoder_layer_1_mlp"})


def started(spec: CltSpec | SaeSpec, store: ActivationStore) -> SparseTrainer:
    """A trainer that takes steps without :func:`train`."""
    trainer = SparseTrainer(spec, store)
    trainer.start()
    return trainer


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("kind", ["sae", "pair", "per_layer", "cross_layer"])
def test_every_form_learns(store: ActivationStore, activation: str, kind: str) -> None:
    loss = {"relu": {"l1": 1e-3}, "jumprelu": {"l0": 1e-4}}.get(activation, {})
    sections: dict[str, Any] = {"model": {"activation": activation}, "loss": loss, "training": {"steps": 150}}
    if kind not in ("sae", "pair"):
        sections["kind"] = kind
    spec = sae(**sections) if kind == "sae" else clt(**sections)
    with started(spec, store) as trainer:
        before, _ = evaluate(trainer.finished(), store, 2000)
    with SparseTrainer(spec, store) as trainer:
        model = train(trainer)
    after, density = evaluate(model, store, 2000)
    assert after["fvu"] < 0.6 and after["fvu"] < 0.7 * before["fvu"]
    assert after["explained_variance"] == pytest.approx(1 - after["fvu"])
    assert density.shape == (sum(model.features),) and after["l0"] > 0
    if activation == "topk":
        # A row has fewer where fewer features are above 0.
        assert 5.9 < after["l0"] <= 6


@pytest.mark.parametrize("normalize", ["center", "none"])
def test_figures_are_numpys(store: ActivationStore, normalize: str) -> None:
    spec = clt(training={"steps": 60, "normalize": normalize})
    with SparseTrainer(spec, store) as trainer:
        model = train(trainer)
    figures, density = evaluate(model, store, 10**6)
    count = len(store.shards("validation"))
    rows = [store.read("validation", number, [*MLP["sources"], *MLP["targets"]]) for number in range(count)]
    source, target = (torch.cat([part[i].float() for part in rows]) for i in (0, 1))
    found = model([source])[0]
    left = (found - target).square().sum() / (target - target.mean(0)).square().sum()
    assert figures["fvu"] == pytest.approx(float(left), rel=1e-4)
    mean = store.statistics(MLP["targets"][0]).mean.float()
    near = torch.nn.functional.cosine_similarity(found - mean, target - mean, dim=1)
    assert figures["cosine"] == pytest.approx(float(near.mean()), rel=1e-4)
    active = model.encode(model.scaled([source], "read"))[0].dense() > 0
    assert figures["l0"] == pytest.approx(float(active.sum(1).float().mean()))
    torch.testing.assert_close(density, active.double().mean(0))
    assert figures["silent"] == pytest.approx(float((~active.any(0)).float().mean()))


def test_features_begin_on_training_rows(store: ActivationStore) -> None:
    with started(clt(), store) as trainer, started(sae(seed=1), store) as other:
        rows = trainer._sides(trainer._batches.at(0))[0][0]
        torch.testing.assert_close(trainer.model.encoders[0].detach(), torch.nn.functional.normalize(rows, dim=1))
        read = torch.nn.functional.normalize(other.model.encoders[0].detach(), dim=1)
        torch.testing.assert_close(other.model.decoders[0].detach(), read)
        # So that all have something to say: of random directions in such a stream most never do.
        fired = trainer.model.encode([torch.cat([rows, -rows])])[0].counts()
        assert int((fired > 0).sum()) >= 120


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu"])
def test_autoencoders_begin_better_than_the_mean(store: ActivationStore, activation: str) -> None:
    """Rows are alike, and so are features that read them: at unit size many together would write far too much."""
    with started(sae(model={"activation": activation, "k": 16, "expansion": 64.0}), store) as trainer:
        assert float(trainer.advance()["error"]) < 1
        assert float(trainer.model.batches.sum()) <= 1  # What was tried before is not remembered.


@pytest.mark.parametrize(
    ("make", "model"),
    [
        (clt, {"activation": "topk"}),
        (clt, {"activation": "batchtopk"}),
        (clt, {"activation": "relu"}),
        (clt, {"activation": "jumprelu", "k": 1000}),
        (sae, {"activation": "topk"}),
        (sae, {"activation": "jumprelu"}),
    ],
)
def test_dead_features_are_revived(store: ActivationStore, make: Any, model: dict[str, Any]) -> None:
    """In the model itself, not in a copy: a defect of earlier work. A few at a time, and at little cost."""
    training = {"steps": 80, "dead_after": 1000, "revive_every": 30, "learning_rate": 2e-3}
    with started(make(model=model, training=training | {"revive_every": None}), store) as other:
        with torch.no_grad():
            other.model.encoder_biases[0][:40] = -100.0
        without = [float(other.advance()["error"]) for _ in range(58)]
    with started(make(model=model, training=training), store) as trainer:
        own = trainer.model
        with torch.no_grad():
            own.encoder_biases[0][:40] = -100.0
        while trainer.step < 29:
            trainer.advance()
        assert trainer.dead[0][:40].all()
        kept = own.encoders[0].detach().clone()
        trainer.advance()
        again = ~trainer.dead[0][:40]
        assert 1 <= int(again.sum()) <= max(1, own.k[0] // 2)
        assert (own.encoders[0] != kept).any(1)[:40].equal(again)
        moments = trainer.optimization.optimizer.state[own.encoders[0]]["exp_avg"]
        assert not moments[:40][again].any()
        while trainer.step < 45:
            trainer.advance()
        assert (trainer.rows_since_fired[0][:40][again] < 15 * 128).float().mean() > 0.6
        alike = torch.nn.functional.normalize(own.encoders[0][:40][again].detach(), dim=1)
        assert float((alike @ alike.T).fill_diagonal_(0).max()) < 0.9999
        errors = [float(trainer.advance()["error"]) for _ in range(13)]
        assert sum(errors[-5:]) < 1.25 * sum(without[-5:])


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_nothing_is_revived_that_would_not_learn(store: ActivationStore, decay: float) -> None:
    training = {"steps": 20, "dead_after": 128, "revive_every": 20 if decay == 0 else 18, "decay": decay}
    with started(clt(training=training), store) as trainer:
        with torch.no_grad():
            trainer.model.encoder_biases[0][:40] = -100.0
        while trainer.step < trainer.steps:
            trainer.advance()
        assert (trainer.model.encoder_biases[0][:40] < -90).all()


def test_a_tied_decoder_is_the_dictionary_of_its_target(store: ActivationStore, tmp_path: Path) -> None:
    with SparseTrainer(sae(training={"steps": 30}), store) as trainer:
        train(trainer).save(tmp_path / "sae", trainer.about)
    dictionary = SparseModel.load(tmp_path / "sae")
    asked = {"model": {"dictionary": {"artifact": "x"}}, "sources": ["encoder_layer_1_pre_mlp"]}
    training = {"revive_every": 10, "dead_after": 500}
    spec = clt(**asked, targets=["encoder_layer_1_mlp"], training=training)
    with SparseTrainer(spec, store, dictionary=dictionary) as trainer:
        trainer.start()
        with torch.no_grad():
            trainer.model.encoder_biases[0][:20] = -100.0
        assert float(trainer.advance()["error"]) < 1
        model = train(trainer)
        # Some come back, though what they write is given.
        assert (trainer.model.encoder_biases[0][:20] > -50).any()
    assert torch.equal(model.decoders[0], dictionary.decoders[0]) and model.features == dictionary.features
    model.save(tmp_path / "tied")
    assert torch.equal(SparseModel.load(tmp_path / "tied").decoders[0], dictionary.decoders[0])
    with pytest.raises(InvalidInput, match=r"spec\.model\.dictionary: is a sae of encoder_layer_1_mlp"):
        SparseTrainer(clt(model={"dictionary": {"artifact": "x"}}), store, dictionary=dictionary)
    with pytest.raises(InvalidInput, match=r"spec\.model\.dictionary: is not set, but one was given"):
        SparseTrainer(clt(), store, dictionary=dictionary)
    dictionary.about = {"source": {"digest": "0" * 64}}
    with pytest.raises(InvalidInput, match=r"spec\.model\.dictionary: the store has activations of policy"):
        SparseTrainer(spec, store, dictionary=dictionary)


def test_a_store_without_validation_rows_is_refused(store: ActivationStore) -> None:
    """As an interruption leaves it."""
    splits = {**store.manifest.splits, "validation": []}
    begun = ActivationStore(store.folder, store.manifest.model_copy(update={"splits": splits}))
    with pytest.raises(InvalidInput, match="activations: the store has no validation rows"):
        SparseTrainer(clt(), begun)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        (
            {"sources": ["encoder_layer_9"]},
            r"spec\.sources\.0: the store has no encoder_layer_9; did you mean encoder_layer",
        ),
        ({"sources": MLP["targets"], "targets": MLP["sources"]}, r"spec\.targets\.0: .* comes after the target"),
        ({"sources": MLP["sources"], "targets": MLP["sources"]}, r"spec\.targets\.0: .* is both source and target"),
        ({"model": {"k": 1000}}, r"spec\.model\.k: 1000 is more than the 128 features"),
        (
            {"loss": {"group_heads": 0.1, "heads": 3}},
            r"spec\.loss\.heads: the 16 channels of encoder_layer_0_mlp",
        ),
        ({"model": {"dictionary": {"artifact": "x"}}}, r"spec\.model\.dictionary: is set, but none was given"),
        (
            {"training": {"learning_rate": 1.0, "warm_up": 0, "normalize": "none"}, "loss": {"energy": 1e30}},
            "the (loss|gradient) became (inf|nan) at step",
        ),
    ],
)
def test_what_is_wrong_is_said_of_its_field(store: ActivationStore, sections: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says), SparseTrainer(clt(**sections), store) as trainer:
        train(trainer)


@pytest.mark.parametrize("normalize", ["center", "standardize", "whiten", "none"])
def test_streams_of_any_unit(store: ActivationStore, normalize: str) -> None:
    spec = clt(training={"steps": 80, "normalize": normalize}, model={"skip": True})
    with SparseTrainer(spec, store) as trainer:
        inputs, targets = trainer._sides(trainer._batches.at(0))
        assert all(0.5 < float(one.square().mean()) < 2 for one in (*inputs, *targets))
        assert evaluate(train(trainer), store, 2000)[0]["fvu"] < 0.7


def test_mlps_are_told_from_blocks() -> None:
    points = ["h.0:input", "h.0.mlp:input", "h.0.mlp", "h.0", "h.1:input", "h.1.mlp:input", "h.1.mlp", "h.1"]
    assert mlp_pairs("language_model", points) == [("h.0.mlp:input", "h.0.mlp"), ("h.1.mlp:input", "h.1.mlp")]
    assert mlp_pairs("policy", ["a_pre_mlp", "a_mlp", "a"]) == [("a_pre_mlp", "a_mlp")]


@pytest.mark.pictures
def test_the_job_keeps_model_and_report(store: ActivationStore, tmp_path: Path) -> None:
    run = Recorder(tmp_path, inputs={"activations": store.folder})
    result = job.run(clt(kind="per_layer", training={"snapshots": 20}), run)
    model = SparseModel.load(tmp_path / "model")
    assert model.streams.sources == ["encoder_layer_0_pre_mlp", "encoder_layer_1_pre_mlp"]
    assert evaluate(model, store, 65_536)[0]["fvu"] == result["figures"]["fvu"]
    assert SparseModel.load(tmp_path / "snapshot-20").features == model.features
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["figures"]["fvu"] == result["figures"]["fvu"] and report["course"][-1]["step"] == 40
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("<img ") == 2 and "Per-layer transcoders" in page
    for name in ("history", "features"):
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((tmp_path / "model" / "model.json").read_text())["about"]
    assert about["source"]["digest"] == store.manifest.source.digest


def test_a_sweep_is_every_pair_at_every_point(store: ActivationStore, tmp_path: Path) -> None:
    pairs = ["encoder_layer_0_pre_mlp->encoder_layer_0_mlp", "encoder_layer_0_mlp->encoder_layer_1_mlp"]
    base = clt().model_dump(include={"activations", "model", "training"})
    grid = [{"option": "model.k", "values": ["2", "12"]}, {"option": "model.activation", "values": ["topk", "relu"]}]
    spec = SweepSpec.model_validate({**base, "pairs": pairs, "grid": grid})
    run = Recorder(tmp_path, inputs={"activations": store.folder})
    result = sweep.run(spec, run)
    assert len(result["runs"]) == 8 and not result["failed"]
    models = {path.name: SparseModel.load(path / "model") for path in (tmp_path / "models").iterdir()}
    assert set(models) == set(result["runs"])
    assert {model.spec.k for model in models.values()} == {2, 12}
    table = (tmp_path / "report" / "sweep.csv").read_text().splitlines()
    assert len(table) == 9 and table[0].startswith("run,model.k,model.activation,fvu")
    best = {name: row["fvu"] for name, row in result["runs"].items() if "topk" in name}
    assert best[next(n for n in best if "k_12" in n)] < best[next(n for n in best if "k_2-" in n)]
    # A line is what differs in k alone: one for each pair and activation.
    rows = {name: {"figures": figures} for name, figures in result["runs"].items()}
    (plot,) = sweep.tradeoff(sweep.run_specs(spec, store), rows, ["model.k", "model.activation"]).axes
    assert [np.size(line.get_xdata()) for line in plot.lines] == [2, 2, 2, 2]
    # What is varied takes the place of what says the same.
    shares = spec.model_copy(update={"grid": [GridAxis(option="model.k_ratio", values=["0.1"])]})
    assert {part.model.k for part in sweep.run_specs(shares, store).values()} == {None}
    # What one run cannot do costs none of the others.
    some = SweepSpec.model_validate(
        {**base, "pairs": pairs[:1], "grid": [{"option": "model.k", "values": ["2", "900"]}]}
    )
    run = Recorder(tmp_path / "some", inputs={"activations": store.folder})
    result = sweep.run(some, run)
    assert len(result["runs"]) == 1 and "900 is more than" in next(iter(result["failed"].values()))
    wrong = SweepSpec.model_validate({**base, "pairs": pairs, "grid": [{"option": "model.nothing", "values": ["1"]}]})
    with pytest.raises(InvalidInput, match=r"spec\.grid\.0\.option: there is no option model\.nothing"):
        sweep.run(wrong, run)
    with pytest.raises(InvalidInput, match=r"spec\.grid\.0\.option: there is no option model\.nothing"):
        list(wrong.doubts())


DYING = {"dead_after": 200, "batch_size": 127, "steps": 24}
"""Of an odd number of rows, so that the processes' shares differ."""
TOGETHER: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"model": {"activation": "batchtopk"}},
    "batchtopk, dense": {"model": {"activation": "batchtopk", "k": 40}},
    "batchtopk, more than there are": {"model": {"activation": "batchtopk", "k": 120}},
    "auxk": {"loss": {"auxk": 1.0}},
    "revival": {"training": {"revive_every": 5, "decay": 0.1}},
    "cross_layer": {"kind": "cross_layer", "model": {"activation": "batchtopk"}, "loss": {"l1": 1e-3, "energy": 0.1}},
}


def test_two_processes_train_the_model_of_one(store: ActivationStore, tmp_path: Path) -> None:
    """Whatever goes over a whole batch goes over that of both: real processes, which meet over gloo."""
    specs = {
        name: clt(**{**sections, "training": DYING | sections.get("training", {})})
        for name, sections in TOGETHER.items()
    }
    dumped = {name: spec.model_dump(mode="json") for name, spec in specs.items()}
    (tmp_path / "specs.json").write_text(json.dumps(dumped))
    program = [sys.executable, "-m", "tests.clt.together", str(store.folder), str(tmp_path / "specs.json")]
    both = [
        subprocess.Popen([*program, str(tmp_path), rank, "2"], stderr=subprocess.PIPE, text=True) for rank in ("0", "1")
    ]
    alone = {}
    for name, spec in specs.items():
        with SparseTrainer(spec, store) as trainer:
            alone[name] = train(trainer).state_dict()
            # What is to be the same is there at all.
            assert name not in ("auxk", "revival") or trainer.dead_figure["dead"] > 0
    for process in both:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said[-3000:]
    for name, mine in alone.items():
        theirs = load_file(tmp_path / f"{name}.safetensors")
        for key, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[key], rtol=1e-3, atol=1e-4, msg=f"{name}: {key}")


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "relu", "jumprelu"])
@pytest.mark.parametrize("k", [2, 40])
def test_a_nan_stops_the_training_whatever_the_form(store: ActivationStore, activation: str, k: int) -> None:
    """Codes of few features have kernels of their own, in which a NaN was no number above 0, and so nothing."""
    with started(clt(model={"activation": activation, "k": k}), store) as trainer:
        trainer.advance()
        kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
        kept["encoders.0"][3, 5] = kept["encoder_biases.0"][100] = float("nan")
        trainer.model.load_state_dict(kept)
        with pytest.raises(Diverged, match=r"spec\.training\.learning_rate: the loss became nan at step 2"):
            trainer.advance()
        # As before the step, a threshold too.
        torch.testing.assert_close(trainer.model.state_dict(), kept, equal_nan=True, rtol=0, atol=0)


def test_an_interrupted_sweep_goes_on(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = clt().model_dump(include={"activations", "model", "training"})
    grid = [{"option": "model.k", "values": ["2", "4", "1000", "6"]}]
    spec = SweepSpec.model_validate({**base, "pairs": ["->".join([*MLP["sources"], *MLP["targets"]])], "grid": grid})

    def swept(folder: Path) -> dict[str, Any]:
        with ConsoleRun(folder, "cpu", {"activations": store.folder}, checkpoint_seconds=0.0) as run:
            return sweep.run(spec, run)

    whole, trained = swept(tmp_path / "whole"), list[int]()
    learn = SparseTrainer.learn

    def falls(trainer: SparseTrainer, *given: Any) -> Any:
        if trainer.spec.model.k == 6 and trainer.step == 23:
            raise Interrupted
        return learn(trainer, *given)

    monkeypatch.setattr(SparseTrainer, "learn", falls)
    with pytest.raises(Interrupted):
        swept(tmp_path / "parts")

    def counts(trainer: SparseTrainer, *given: Any) -> Any:
        trained.append(trainer.step)
        return learn(trainer, *given)

    monkeypatch.setattr(SparseTrainer, "learn", counts)
    assert swept(tmp_path / "parts") == whole and len(whole["runs"]) == 3 and len(whole["failed"]) == 1
    # Only what was left of the last run is done.
    assert trained == list(range(23, 40))
    # Metrics of each run are in the sweep's, once.
    metrics = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert {row["stage"] for row in metrics} == {f"{name}/train" for name in whole["runs"]}
    assert (tmp_path / "parts" / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    for name in whole["runs"]:
        mine, theirs = (
            load_file(tmp_path / run / "models" / name / "model" / "model.safetensors") for run in ("whole", "parts")
        )
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


def constant_store(folder: Path, value: float, channels: int = 16) -> ActivationStore:
    """A store in which ``channels`` of the MLP's 16 outputs in layer 0 are the same in all rows."""
    policy = small_policy()
    layers: Any = policy.encoder.layers
    last = layers[0].mlp[-1]
    last.weight[:channels], last.bias[:channels] = 0, value
    spec = ActivationsSpec(policy=ANY, instances=300, validation=0.2, shard_rows=700)
    return collect(spec, folder, Run(), policy)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_stream_that_never_changes_is_refused_by_its_field(value: float, tmp_path: Path) -> None:
    constant = constant_store(tmp_path, value)
    text = r"encoder_layer_0_mlp is the same in all 1680 training rows, so there is nothing to learn; name other"
    read = {"sources": ["encoder_layer_0_mlp"], "targets": ["encoder_layer_1_mlp"]}
    for normalize in ("center", "standardize", "whiten", "none"):
        training = {"normalize": normalize}
        given = sae(training=training).model_dump()
        faults: list[tuple[CltSpec | SaeSpec, str]] = [
            (SaeSpec.model_validate({**given, "hook": "encoder_layer_0_mlp"}), r"spec\.hook"),
            (clt(training=training), r"spec\.targets\.0"),
            (CltSpec.model_validate({**clt(training=training).model_dump(), **read}), r"spec\.sources\.0"),
            (clt(kind="cross_layer", training=training), r"spec\.targets"),
        ]
        for spec, field in faults:
            with pytest.raises(InvalidInput, match=rf"^{field}: {text}"):
                SparseTrainer(spec, constant)


def test_validation_rows_that_are_all_the_same_cannot_judge(store: ActivationStore) -> None:
    for spec in (clt(training={"validation_rows": 1}), sae(training={"validation_rows": 1})):
        with pytest.raises(InvalidInput, match=r"^spec\.training\.validation_rows: .*same in all 1 validation rows"):
            SparseTrainer(spec, store)
    with SparseTrainer(clt(training={"validation_rows": 2}), store) as trainer:
        assert trainer.validate()["validation_fvu"] > 0


@pytest.mark.parametrize("value", [0.0, 0.3])
@pytest.mark.parametrize("normalize", ["center", "standardize", "whiten", "none"])
def test_channels_that_never_change_are_no_harm(value: float, normalize: str, tmp_path: Path) -> None:
    constant = constant_store(tmp_path, value, channels=8)
    given = sae(training={"steps": 150, "normalize": normalize}).model_dump()
    with SparseTrainer(SaeSpec.model_validate({**given, "hook": "encoder_layer_0_mlp"}), constant) as trainer:
        model = train(trainer)
    figures, _ = evaluate(model, constant, 2000)
    assert figures["fvu"] < 0.6
    (rows,) = constant.read("validation", 0, ["encoder_layer_0_mlp"])
    torch.testing.assert_close(model([rows.float()])[0][:, :8], rows[:, :8].float(), rtol=0, atol=0.05)


def test_runs_of_a_sweep_have_the_same_names_at_weights_and_biases_in_every_attempt(tmp_path: Path) -> None:
    def ids(run_id: str) -> list[str]:
        run = Run()
        run.id = run_id
        made = sweep.Sweep(run, tmp_path / "models")
        found = []
        for name in ("one", "two"):
            made.begin(name)
            found.append(made.id)
        return found

    assert ids("a") == ids("a") and len({*ids("a"), *ids("b")}) == 4 and ids("") == ["", ""]
