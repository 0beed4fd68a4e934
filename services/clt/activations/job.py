"""The activations job: record a policy's or a language model's activations, and keep the store."""

from __future__ import annotations

from typing import Any

from ethogram.specs.clt import ActivationsSpec
from services.clt.activations.collect import collect
from services.clt.activations.store import SPLITS, ActivationStore
from services.clt.policy.model import AttentionPolicy
from services.clt.policy.tsp import cities_in
from services.runtime.run import Run


def run(spec: ActivationsSpec, run: Run) -> dict[str, Any]:
    """Artifact: ``activations``, the store or, if that is kept below a root, its path. Returns its :func:`figures`."""
    policy, name = None, ""
    if spec.policy is not None:
        policy, name = AttentionPolicy.load(run.inputs["policy"], run.device), spec.policy.artifact
    cities = None if spec.cities is None else cities_in(run.inputs["cities"])
    with run.output_folder("activations") as folder:
        collect(spec, folder, run, policy, name, cities=cities)
        # The lock is not part of the artifact.
        (folder / "lock").unlink(missing_ok=True)
        run.artifact("activations", "activations", folder)
        return {"figures": figures(ActivationStore.open(folder))}


def figures(store: ActivationStore) -> dict[str, Any]:
    """Size of a store, and at each hook point the width, the mean norm of the training rows and the share of zeros."""
    manifest, statistics = store.manifest, {name: store.statistics(name) for name in store.hooks}
    return {
        "instances": sum(manifest.rows(split) for split in SPLITS) // manifest.rows_per_instance,
        "rows": {split: store.rows(split) for split in SPLITS},
        "bytes": store.bytes,
        "hooks": {
            name: {"width": len(found.mean), "norm": found.norm, "sparsity": found.zeros}
            for name, found in statistics.items()
        },
    }
