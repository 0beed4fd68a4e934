"""The training loop, with every trainer: resuming, divergence, other specs, Weights & Biases, processes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from ethogram.errors import InvalidInput
from ethogram.specs.base import ArtifactRef, OptimizationSpec, TrainedSpec
from ethogram.specs.clt import ActivationsSpec, CltSpec
from services.clt.activations.collect import collect
from services.clt.activations.store import ActivationStore
from services.clt.policy.train import PolicyTrainer
from services.clt.sparse.train import SparseTrainer
from services.crossmodal.train import CodecTrainer
from services.language.models import LanguageModel, load_language_model
from services.resource import language_model
from services.resource.data import Table
from services.resource.decoder.tasks import TaskTexts
from services.resource.decoder.train import DecoderTrainer
from services.resource.describe import Describer
from services.resource.export import Export, export
from services.resource.language_model import LanguageModelTrainer
from services.resource.train import ResourceTrainer
from services.runtime.parallel import ALONE, World
from services.runtime.run import Run
from services.runtime.seeds import generator
from services.runtime.training import (
    Adam,
    Diverged,
    Optimization,
    Progress,
    Trainer,
    constant,
    cosine,
    fit,
    linear,
    steps_of_epochs,
)
from services.zoo.dataset import Zoo
from tests.clt.conftest import policy_spec, small_policy
from tests.conftest import Once
from tests.crossmodal.conftest import SMALL, small_zoo, tiny_spec
from tests.recorder import Interrupted, Recorder
from tests.resource.conftest import (
    small_table,
    small_trainer,
    tiny_decoder_spec,
    tiny_reader_spec,
    write_language_model,
    write_tables,
)
from tests.resource.conftest import tiny_spec as tiny_resource_spec

ROWS, BATCH = 40, 8


class ToyTrainer(Trainer):
    """Fits a line through a frozen backbone: the smallest trainer that has all that :func:`fit` offers."""

    monitor = "validation_loss"
    report_every = 2

    def __init__(
        self, spec: TrainedSpec, world: World = ALONE, *, backbone: float = 2.0, plateau: int | None = None
    ) -> None:
        self.spec, self.device, self.step, self.progress, self.world = spec, "cpu", 0, Progress(), world
        self.steps, self.validate_every = spec.training.steps, spec.training.validate_every
        self.backbone = torch.tensor(backbone)
        self.weight = torch.zeros(3, requires_grad=True)
        self.optimization = Optimization(
            [{"params": [self.weight]}], spec.training, cosine(self.steps), world, plateau=plateau
        )
        self.inputs = torch.randn(ROWS, 3, generator=generator(spec.seed, "rows"))
        self.targets = self.inputs @ torch.tensor([1.0, -2.0, 0.5])
        self.losses: list[float] = []
        """Validation losses to report instead of measuring them."""
        self.started = 0

    def start(self) -> None:
        self.started += 1
        with torch.no_grad():
            self.weight += 0.1

    def advance(self) -> dict[str, Tensor]:
        rows = torch.randperm(ROWS, generator=generator(self.spec.seed, "step", self.step))[:BATCH]
        rows = rows.chunk(self.world.size)[self.world.rank]
        self.optimization.optimizer.zero_grad()
        error = self.inputs[rows] @ (self.backbone * self.weight) - self.targets[rows]
        loss = error.square().sum() / BATCH
        loss.backward()  # type: ignore[no-untyped-call]
        metrics = {"loss": loss.detach()}
        self.optimization.update(self.step, metrics)
        self.step += 1
        return metrics

    def validate(self) -> dict[str, float]:
        error = self.inputs @ (self.backbone * self.weight.detach()) - self.targets
        loss = self.losses.pop(0) if self.losses else float(error.square().mean())
        return {"validation_loss": loss}

    def state(self) -> dict[str, Tensor]:
        moments = {f"optimization.{name}": tensor for name, tensor in self.optimization.state().items()}
        return {"weight": self.weight.detach(), **moments}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            self.weight.copy_(tensors["weight"])
        self.optimization.restore({n.partition(".")[2]: t for n, t in tensors.items() if n.startswith("optimization.")})

    def identity(self) -> dict[str, str]:
        return {"backbone": str(float(self.backbone))}


def toy_spec(**training: Any) -> TrainedSpec:
    given = {"steps": 9, "batch_size": BATCH, "learning_rate": 0.05, "warm_up": 1, "validate_every": 2, **training}
    return TrainedSpec(training=OptimizationSpec.model_validate(given))


@dataclass
class Case:
    """A trainer of a system, its spec, and where a NaN makes it diverge."""

    spec: TrainedSpec
    make: Callable[[TrainedSpec, World], Trainer]
    poison: Callable[[Any], Tensor]
    identity: tuple[str, ...] = ()
    """Names of the digests that tell its data and frozen models."""
    processes: bool = True
    """Whether several processes can train it."""

    def trainer(self, world: World = ALONE, **changes: Any) -> Trainer:
        """A new trainer of the spec with ``changes``."""
        return self.make(self.spec.model_copy(update=changes), world)


@dataclass
class Data:
    """What the systems train on."""

    zoo: Zoo
    store: ActivationStore
    table: Table
    language: LanguageModel
    export: Export


@pytest.fixture(scope="module")
def data(once: Once, tmp_path_factory: pytest.TempPathFactory) -> Data:
    spec = ActivationsSpec(policy=ArtifactRef(artifact="x"), instances=300, validation=0.2, shard_rows=700)
    store = collect(spec, tmp_path_factory.mktemp("store"), Run(), small_policy())
    table = small_table(once("resource-tables", write_tables))
    language = load_language_model(str(once("resource-language-model", write_language_model)))
    codec = small_trainer(table, language).codec()
    return Data(small_zoo(once), store, table, language, export(codec, table, tmp_path_factory.mktemp("export")))


@pytest.fixture(autouse=True)
def small_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of few texts a tokenizer is made at once."""
    monkeypatch.setattr(language_model, "_CORPUS", 10)


def codec_case(zoo: Zoo, **sections: Any) -> Case:
    training = {"steps": 9, "validate_every": 2, **sections.pop("training", {})}
    return Case(
        tiny_spec(training=training, **sections),
        lambda spec, world: CodecTrainer(spec, zoo, world=world),  # type: ignore[arg-type]
        lambda trainer: trainer.subjects.weights,
        ("zoo",),
    )


def sparse_case(store: ActivationStore, **sections: Any) -> Case:
    training = {"steps": 9, "batch_size": 128, "validate_every": 2, "warm_up": 5, "learning_rate": 5e-3}
    ends = {"sources": ["encoder_layer_0_pre_mlp"], "targets": ["encoder_layer_0_mlp"]}
    if "kind" in sections:
        ends = {}
    given = {
        "activations": ArtifactRef(artifact="x"),
        **ends,
        **sections,
        "model": {"expansion": 8.0, "k": 6, **sections.get("model", {})},
        "training": training | sections.get("training", {}),
    }
    return Case(
        CltSpec.model_validate(given),
        lambda spec, world: SparseTrainer(spec, store, world=world),  # type: ignore[arg-type]
        lambda trainer: trainer.model.decoders[0],
        ("store",),
    )


def policy_case(**training: Any) -> Case:
    return Case(
        policy_spec(training={"steps": 9, **training}),
        lambda spec, _: PolicyTrainer(spec),  # type: ignore[arg-type]
        lambda trainer: trainer.policy.decoder.out.weight,
        processes=False,
    )


def resource_case(data: Data, **sections: Any) -> Case:
    sections["training"] = {"steps": 9, "target_loss": 0, **sections.get("training", {})}
    return Case(
        tiny_resource_spec(**sections),
        lambda spec, world: ResourceTrainer(
            spec,  # type: ignore[arg-type]
            data.table,
            torch.arange(len(data.table)),
            Describer(data.language, data.table.schema),
            world,
        ),
        lambda trainer: trainer.model.gain,
        ("table", "language model", "tokenizer"),
    )


def decoder_case(data: Data) -> Case:
    return Case(
        tiny_decoder_spec(training={"steps": 9}),
        lambda spec, world: DecoderTrainer(spec, data.export, TaskTexts(data.export), world=world),  # type: ignore[arg-type]
        lambda trainer: trainer.model.position,
        ("export",),
    )


def language_model_case() -> Case:
    return Case(
        tiny_reader_spec(training={"copying": 3, "steps": 6, "validate_every": 5}),
        lambda spec, _: LanguageModelTrainer(spec),  # type: ignore[arg-type]
        lambda trainer: trainer.model.model.norm.weight,
        ("recipe",),
        processes=False,
    )


def toy_case(**training: Any) -> Case:
    return Case(toy_spec(**training), ToyTrainer, lambda trainer: trainer.inputs, ("backbone",))


SYSTEMS: dict[str, Callable[[Data], Case]] = {
    "toy": lambda data: toy_case(),
    "codec": lambda data: codec_case(data.zoo),
    "sparse": lambda data: sparse_case(data.store),
    "policy": lambda data: policy_case(),
    "resource": resource_case,
    "decoder": decoder_case,
    "language model": lambda data: language_model_case(),
}
FORMS: dict[str, Callable[[Data], Case]] = SYSTEMS | {
    "codec with early stopping": lambda data: codec_case(
        data.zoo,
        codec={**SMALL, "pooling": "cls", "inputs": "both"},
        loss={"projection": 8, "gamma": 0.3, "gamma_end": 0.1},
        training={
            "schedule": "plateau",
            "plateau_patience": 1,
            "patience": 5,
            "validate_every": 1,
            "accumulation": 3,
            "precision": "bfloat16",
        },
    ),
    "sparse with revival": lambda data: sparse_case(
        data.store, model={"activation": "batchtopk"}, training={"revive_every": 2, "dead_after": 200}
    ),
    "sparse across layers": lambda data: sparse_case(
        data.store, kind="cross_layer", model={"activation": "jumprelu"}, loss={"l0": 1e-3}
    ),
    "policy with rollouts": lambda data: policy_case(baseline="rollout", precision="bfloat16", learning_rate=0.01),
    "resource with accumulation": lambda data: resource_case(
        data,
        encoder={"fusion": "sum", "numbers": "zscore", "tokens": 2},
        augmentation={"mode": "jitter"},
        training={"accumulation": 3, "retrieval": 0, "schedule": "constant", "snapshot_epochs": 2},
    ),
}


@pytest.fixture(params=SYSTEMS)
def case(request: pytest.FixtureRequest, data: Data) -> Case:
    name: str = request.param
    return SYSTEMS[name](data)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, data: Data) -> Case:
    name: str = request.param
    return FORMS[name](data)


def same(one: Trainer, other: Trainer) -> None:
    """Both are in the same state, to the bit, and have the same history."""
    assert one.step == other.step and one.progress == other.progress
    mine, theirs = one.state(), other.state()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("stop", [1, 5])
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(form: Case, stop: int, tmp_path: Path) -> None:
    whole = form.trainer()
    fit(whole)
    assert whole.step == 9 and math.isfinite(whole.progress.history[-1]["loss"])
    first = Recorder(tmp_path, keep=stop, fall=stop + 2)
    with pytest.raises(Interrupted):
        fit(form.trainer(), first)
    assert [folder.name for folder in first.checkpoints] == [str(stop)]
    resumed, run = form.trainer(), Recorder(resume=first.checkpoints[0])
    fit(resumed, run)
    assert run.done == list(range(stop, 10)) and run.stages == [("train", 9, "steps")]
    same(resumed, whole)
    assert [row["step"] for row in resumed.progress.history if row["step"] > stop] == list(run.metrics)


def test_the_seed_decides_everything(case: Case) -> None:
    first, second, other = case.trainer(), case.trainer(), case.trainer(seed=1)
    for trainer in (first, second, other):
        fit(trainer)
    same(first, second)
    assert first.progress.history != other.progress.history


def test_a_finished_training_resumes_to_its_end(case: Case, tmp_path: Path) -> None:
    whole, run = case.trainer(), Recorder(tmp_path, keep=9)
    fit(whole, run)
    again = case.trainer()
    fit(again, Recorder(resume=run.checkpoints[0]))
    same(again, whole)


class Poisoned(Recorder):
    """Calls ``poison`` after the first step."""

    def __init__(self, poison: Callable[[], None], folder: Path, keep: int | None) -> None:
        super().__init__(folder, keep=keep)
        self._poison = poison

    def checkpoint_due(self) -> bool:
        due = super().checkpoint_due()
        if not due and self.done[-1] == 1:
            self._poison()
        return due

    def checkpoint(self, step: int, write: Callable[[Path], None]) -> None:
        super().checkpoint(step, write)
        self._poison()


@pytest.mark.parametrize(
    ("keep", "text"), [(None, "there is no checkpoint"), (1, "the last good checkpoint is of step 1")]
)
def test_divergence_changes_nothing_and_names_the_last_good_checkpoint(
    form: Case, keep: int | None, text: str, tmp_path: Path
) -> None:
    trainer, before = form.trainer(), dict[str, Tensor]()

    def poison() -> None:
        form.poison(trainer).detach().view(-1)[:] = math.nan
        before.update({name: tensor.clone() for name, tensor in trainer.state().items()})

    with pytest.raises(Diverged, match=rf"became nan at step 2; lower the learning rate \({text}\)$") as caught:
        fit(trainer, Poisoned(poison, tmp_path, keep))
    assert caught.value.violations[0].field == "spec.training.learning_rate"
    assert isinstance(caught.value, InvalidInput)
    assert trainer.step == 1 and before
    after = trainer.state()
    for name, tensor in before.items():
        assert torch.equal(tensor.nan_to_num(), after[name].nan_to_num()), name


def test_a_resumed_training_names_the_checkpoint_that_it_came_from(tmp_path: Path) -> None:
    run = Recorder(tmp_path, keep=3, fall=4)
    with pytest.raises(Interrupted):
        fit(toy_case().trainer(), run)
    trainer = ToyTrainer(toy_spec())
    trainer.inputs[:] = math.inf
    with pytest.raises(Diverged, match=r"at step 4; .*last good checkpoint is of step 3\)$"):
        fit(trainer, Recorder(resume=run.checkpoints[0]))


def test_an_infinite_gradient_is_named() -> None:
    trainer = ToyTrainer(toy_spec())
    trainer.weight.register_hook(lambda gradient: gradient / 0)  # type: ignore[no-untyped-call]
    with pytest.raises(Diverged, match=r"the gradient became (inf|nan) at step 1"):
        fit(trainer)
    assert not trainer.optimization.state().keys() - {"halvings"}


def test_a_validation_that_is_nan_stops_too() -> None:
    trainer = ToyTrainer(toy_spec())
    trainer.losses = [math.nan]
    with pytest.raises(Diverged, match=r"learning_rate: the validation loss became nan at step 2;"):
        fit(trainer)


def kept(case: Case, folder: Path) -> Path:
    """A checkpoint of step 3."""
    run = Recorder(folder, keep=3, fall=4)
    with pytest.raises(Interrupted):
        fit(case.trainer(), run)
    return run.checkpoints[0]


def test_the_checkpoint_of_another_spec_is_refused(case: Case, tmp_path: Path) -> None:
    checkpoint = kept(case, tmp_path)
    changed = case.spec.training.model_copy(update={"learning_rate": 0.5})
    for changes, names in (
        ({"seed": 5}, "seed"),
        ({"seed": 5, "training": changed}, r"(?=.*seed).*training\.learning"),
    ):
        with pytest.raises(InvalidInput, match=rf"was written with another spec \({names}.*start afresh") as caught:
            fit(case.trainer(**changes), Recorder(resume=checkpoint))
        assert caught.value.violations[0].field == "checkpoint"


def test_a_spec_field_that_is_new_has_its_default(case: Case, tmp_path: Path) -> None:
    """The checkpoint of a version that did not have the field yet."""
    checkpoint = kept(case, tmp_path)
    about = json.loads((checkpoint / "state.json").read_text())
    default = type(case.spec).model_fields["training"].annotation.model_fields["warm_up"].default  # type: ignore[union-attr]
    if case.spec.training.warm_up != default:
        del about["spec"]["wandb"]
    else:
        del about["spec"]["training"]["warm_up"]
    (checkpoint / "state.json").write_text(json.dumps(about))
    whole, resumed = case.trainer(), case.trainer()
    fit(whole)
    fit(resumed, Recorder(resume=checkpoint))
    same(resumed, whole)


def test_the_checkpoint_of_other_data_is_refused(case: Case, tmp_path: Path) -> None:
    if not case.identity:
        assert case.trainer().identity() == {}
        return
    checkpoint = kept(case, tmp_path)
    trainer = case.trainer()
    assert tuple(trainer.identity()) == case.identity
    trainer.identity = lambda: dict.fromkeys(case.identity, "other")  # type: ignore[method-assign]
    with pytest.raises(InvalidInput, match=f"was written with another {' and '.join(case.identity)}; start afresh"):
        fit(trainer, Recorder(resume=checkpoint))


def test_the_checkpoint_of_another_number_of_processes_is_refused(case: Case, tmp_path: Path) -> None:
    world = World(0, 2)
    with pytest.raises(InvalidInput, match="checkpoint: was written by a run of 1 processes; take as many"):
        fit(case.trainer(world), Recorder(resume=kept(case, tmp_path)), world)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_a_broken_checkpoint_is_said_to_be_one(case: Case, name: str, tmp_path: Path) -> None:
    checkpoint = kept(case, tmp_path)
    whole = (checkpoint / name).read_bytes()
    for broken in (whole[:-9], b"", b"[]", None):
        (checkpoint / name).unlink() if broken is None else (checkpoint / name).write_bytes(broken)
        with pytest.raises(InvalidInput, match=r"cannot be read \(\w+\); start afresh") as caught:
            fit(case.trainer(), Recorder(resume=checkpoint))
        assert caught.value.violations[0].field == "checkpoint"


def test_metrics_continue_in_the_same_run_of_wandb(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    spec = case.spec.model_validate({**case.spec.model_dump(), "wandb": {"project": "p"}})
    case = Case(spec, case.make, case.poison, case.identity)
    checkpoint = kept(case, tmp_path / "first")
    id = json.loads((checkpoint / "state.json").read_text())["progress"]["wandb"]
    assert id and list((tmp_path / "first" / "wandb").glob(f"offline-run-*-{id}"))
    resumed = case.trainer()
    fit(resumed, Recorder(tmp_path / "second", resume=checkpoint))
    assert resumed.progress.wandb == id
    assert list((tmp_path / "second" / "wandb").glob(f"offline-run-*-{id}"))
    assert math.isfinite(resumed.progress.history[-1]["loss"])


def apart(rank: int, case: Case, folder: Path) -> None:
    """One of two processes, the second with other weights at first; only the first has a checkpoint, and resumes."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    world = World(rank, 2)
    for name in ("whole", "again"):
        trainer = case.trainer(world)
        run: Run = Recorder(folder / name, keep=2) if rank == 0 else Run()
        run.resume = folder / "whole" / "checkpoints" / "2" if rank == 0 and name == "again" else None
        if rank:
            trainer.restore({key: tensor * 2 for key, tensor in trainer.state().items()})
        fit(trainer, run, world)
        torch.save({"state": trainer.state(), "history": trainer.progress.history}, folder / f"{name}-{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.timeout(120)
def test_processes_are_one_model_from_the_first_step_and_after_a_checkpoint(form: Case, tmp_path: Path) -> None:
    if not form.processes:
        pytest.skip("the batch normalisation of a policy is that of whole batches: one process trains it")
    start_processes(apart, (form, tmp_path), nprocs=2, start_method="fork")  # type: ignore[no-untyped-call]
    one, *others = (torch.load(path) for path in sorted(tmp_path.glob("*-?")))
    assert len(others) == 3
    for other in others:
        assert [row["step"] for row in other["history"]] == [row["step"] for row in one["history"]]
        for name, tensor in one["state"].items():
            assert torch.equal(tensor, other["state"][name]), name


def test_a_start_is_prepared_once_and_not_where_a_checkpoint_takes_its_place(tmp_path: Path) -> None:
    case = toy_case()
    checkpoint = kept(case, tmp_path)
    trainers = [ToyTrainer(toy_spec()) for _ in range(2)]
    fit(trainers[0])
    fit(trainers[1], Recorder(resume=checkpoint))
    assert [trainer.started for trainer in trainers] == [1, 0]
    same(*trainers)


def test_a_frozen_backbone_is_named_and_not_kept(tmp_path: Path) -> None:
    checkpoint = kept(toy_case(), tmp_path)
    assert json.loads((checkpoint / "state.json").read_text())["identity"] == {"backbone": "2.0"}
    with pytest.raises(InvalidInput, match="was written with another backbone; start afresh"):
        fit(ToyTrainer(toy_spec(), backbone=3.0), Recorder(resume=checkpoint))


def test_the_checkpoint_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """As of a version whose trainer had them in another order, which torch would take."""
    run = Recorder(tmp_path, keep=3, fall=4)
    with pytest.raises(Interrupted):
        fit(ToyTrainer(toy_spec()), run)
    other = ToyTrainer(toy_spec())
    other.optimization = Optimization(
        [{"params": [torch.zeros(5, requires_grad=True)]}], other.spec.training, cosine(other.steps)
    )
    with pytest.raises(InvalidInput, match="checkpoint: cannot be read"):
        fit(other, Recorder(resume=run.checkpoints[0]))


def test_a_group_has_its_share_of_the_learning_rate() -> None:
    trainer = ToyTrainer(toy_spec())
    apart = torch.zeros(3, requires_grad=True)
    trainer.optimization = Optimization(
        [{"params": [trainer.weight]}, {"params": [apart], "scale": 0.25}], trainer.spec.training, cosine(trainer.steps)
    )
    trainer.advance()
    whole, share = (group["lr"] for group in trainer.optimization.optimizer.param_groups)
    assert share == whole / 4 > 0


def by_epochs(losses: list[float], stop: int | None = None) -> ToyTrainer:
    """Three epochs, each validated, of which the best is kept."""
    trainer = ToyTrainer(toy_spec())
    trainer.validate_every = steps_of_epochs(1, ROWS, BATCH)
    trainer.steps = steps_of_epochs(3, ROWS, BATCH)
    trainer.keep_best, trainer.losses, trainer.patience = True, losses, stop
    return trainer


def test_fixed_epochs_keep_the_best(tmp_path: Path) -> None:
    trainer, run = by_epochs([3.0, 1.0, 2.0]), Recorder(tmp_path, keep=12)
    seen: dict[int, Tensor] = {}
    validate = trainer.validate

    def recorded() -> dict[str, float]:
        seen[trainer.step] = trainer.weight.detach().clone()
        return validate()

    trainer.validate = recorded  # type: ignore[method-assign]
    fit(trainer, run)
    assert list(seen) == [5, 10, 15] and trainer.step == 15
    assert trainer.progress.best_step == 10 and trainer.progress.lowest == 1.0
    assert torch.equal(trainer.weight.detach(), seen[10]) and not torch.equal(seen[10], seen[15])
    # A resumed training has the best weights from before its checkpoint.
    again = by_epochs([2.0])
    fit(again, Recorder(resume=run.checkpoints[0]))
    assert again.progress == trainer.progress
    assert torch.equal(again.weight.detach(), seen[10])


def test_early_stopping_ends_the_training(tmp_path: Path) -> None:
    trainer, run = by_epochs([1.0, 2.0, 3.0], stop=1), Recorder(tmp_path)
    fit(trainer, run)
    assert trainer.step == 10 and trainer.progress.best_step == 5
    assert run.logs == ["stopped at step 10: the validation loss has not fallen since step 5"]


def test_a_plateau_halves_the_learning_rate(tmp_path: Path) -> None:
    def made(losses: list[float]) -> ToyTrainer:
        trainer = ToyTrainer(toy_spec(validate_every=1, steps=7, warm_up=0), plateau=2)
        trainer.optimization.decay, trainer.losses = constant, losses
        return trainer

    losses = [3.0, 3.0, 4.0, 2.0, 2.0, 2.5, 2.1]
    trainer, run, rates = made(list(losses)), Recorder(tmp_path, keep=4), list[float]()
    advance = trainer.advance

    def recorded() -> dict[str, Tensor]:
        values = advance()
        rates.append(trainer.optimization.optimizer.param_groups[0]["lr"])
        return values

    trainer.advance = recorded  # type: ignore[method-assign]
    fit(trainer, run)
    assert rates == [0.05, 0.05, 0.05, 0.025, 0.025, 0.025, 0.0125]
    again = made(losses[4:])
    fit(again, Recorder(resume=run.checkpoints[0]))
    same(again, trainer)


def test_our_adam_is_torchs() -> None:
    trained = []
    options: Any = {"lr": 0.1, "weight_decay": 0.2, "fused": True}
    for kind in (partial(Adam, decoupled_weight_decay=True), torch.optim.AdamW):
        weight = torch.nn.Parameter(torch.randn(5, 3, generator=generator(0, "weight")))
        optimizer = kind([{"params": [weight]}], **options)
        for step in range(4):
            optimizer.zero_grad()
            assert weight.grad is None
            weight.grad = torch.randn(5, 3, generator=generator(step, "gradient"))
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        assert torch.is_grad_enabled() and weight.requires_grad
        trained.append([weight, *optimizer.state[weight].values()])
    assert all(torch.equal(one, other) for one, other in zip(*trained, strict=True)) and len(trained[0]) == 4


def test_schedules() -> None:
    training = toy_spec(steps=1000, warm_up=100, learning_rate=1.0).training
    weights = [{"params": [torch.zeros(1, requires_grad=True)]}]
    rates = [Optimization(weights, training, cosine(1000)).rate(step) for step in range(1000)]
    assert rates[0] < 0.02 and max(rates) > 0.95 and rates[100] > 0.95
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    rates = [Optimization(weights, training, linear(1000, 200)).rate(step) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 101) and rates[100:801] == [1.0] * 701
    assert rates[900] == pytest.approx(0.5) and rates[-1] == pytest.approx(1 / 200)
    assert Optimization(weights, training, constant).rate(999) == 1.0
