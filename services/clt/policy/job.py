"""The policy job: train, compare with a solver, and keep the policy and its report."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from ethogram.errors import InvalidInput
from ethogram.specs.clt import PolicySpec
from services.clt.policy.evaluate import evaluate, evaluation_instances
from services.clt.policy.model import FORMAT, AttentionPolicy
from services.clt.policy.report import write_report
from services.clt.policy.train import PolicyTrainer, train_policy
from services.clt.policy.tsp import cities_in
from services.runtime.folders import artifact_in
from services.runtime.run import Run
from services.runtime.trained import trained_once
from services.runtime.training import fit


def run(spec: PolicySpec, run: Run) -> dict[str, Any]:
    """Artifacts: ``policy`` (see :meth:`AttentionPolicy.save`), ``report`` and the snapshots. Returns the ``figures``:
    mean gaps to the solver, as shares, and mean lengths."""
    cities = None if spec.cities is None else cities_in(run.inputs["cities"])
    trainer = PolicyTrainer(spec, run.device, cities)
    fit(trainer, run)
    policy = trainer.finished()
    with tempfile.TemporaryDirectory() as scratch:
        policy.save(Path(scratch, "policy"), {"spec": spec.model_dump(mode="json")})
        # First, so that it is kept if the evaluation fails.
        run.artifact("policy", "policy", Path(scratch, "policy"))
        evaluation = None
        if spec.evaluation:
            evaluation = evaluate(policy, evaluation_instances(spec, cities), spec.samples, spec.seed, run)
        with run.side_output("the report"):
            write_report(Path(scratch, "report"), spec, trainer.nodes, trainer.progress.history, evaluation)
            run.artifact("report", "report", Path(scratch, "report"))
    return {"figures": evaluation.figures if evaluation else {}}


def default_policy(device: str = "cpu", spec: PolicySpec | None = None) -> AttentionPolicy:
    """The policy in :func:`default_folder`."""
    return AttentionPolicy.load(default_folder(device, spec), device)


def default_folder(device: str = "cpu", spec: PolicySpec | None = None) -> Path:
    """Folder of the policy of ``spec``, by default the default spec, without its evaluation.

    It is trained once, resuming from checkpoints where a call was interrupted, and kept in the cache.
    """
    spec = spec or PolicySpec()
    fields = spec.model_dump(mode="json", exclude={"evaluation": True, "samples": True, "wandb": True, "cities": True})
    del fields["training"]["snapshots"]
    # As of versions without these, whose policies stay in the cache.
    for section, name, default in ((fields, "distribution", "uniform"), (fields["model"], "normalization", "batch")):
        if section[name] == default:
            del section[name]
    trained = json.dumps(fields, sort_keys=True)
    name = f"policies/{hashlib.sha256(f'{FORMAT} {trained}'.encode()).hexdigest()[:32]}"

    def train(run: Run, folder: Path) -> None:
        train_policy(spec, run).save(folder, {"spec": spec.model_dump(mode="json")})

    return trained_once(name, "policy", train, device)


def named(name: str, device: str = "cpu") -> Path:
    """The folder of the policy that a user names: a policy's, that of its run, or ``default``. Raises
    :class:`InvalidInput` where there is none."""
    folder = Path(name)
    if name == "default" and not folder.exists():
        return default_folder(device)
    if not folder.is_dir():
        raise InvalidInput.field("POLICY", f"there is no folder {name}; name that of a policy, or `default`")
    return artifact_in(folder, "policy", "POLICY")
