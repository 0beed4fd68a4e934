"""The activations job: record a policy's or a language model's activations, and keep the store."""

from __future__ import annotations

from typing import Any

from ethogram.specs.clt import ActivationsSpec
from services.clt.activations.collect import collect
from services.clt.activations.store import SPLITS, ActivationStore
from services.clt.policy.model import AttentionPolicy
from services.runtime.run import Run


def run(spec: ActivationsSpec, run: Run) -> dict[str, Any]:
    """Artifact: ``activations``, the store or, where that is kept below a root, its path. Returns its
    :func:`figures`."""
    policy = None
    if spec.policy is not None:
        policy = AttentionPolicy.load(run.inputs["policy"], run.device)
    with run.output_folder("activations") as folder:
        collect(spec, folder, run, policy, spec.policy.artifact if spec.policy is not None else "")
        # The lock is no part of the artifact.
        (folder / "lock").unlink(missing_ok=True)
        run.artifact("activations", "activations", folder)
        return {"figures": figures(ActivationStore.open(folder))}


def figures(store: ActivationStore) -> dict[str, Any]:
    """Numbers of a store: of the training rows at each hook point the width, the mean norm and the share of zeros."""
    hooks = {}
    for name, width in store.widths.items():
        found = store.statistics(name)
        hooks[name] = {"width": width, "norm": found.norm, "sparsity": found.zeros}
    manifest = store.manifest
    return {
        "instances": sum(manifest.rows(split) for split in SPLITS) // manifest.rows_per_instance,
        "rows": {split: store.rows(split) for split in SPLITS},
        "bytes": store.bytes,
        "hooks": hooks,
    }
