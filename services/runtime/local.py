"""Jobs of any kind in this process, without a platform."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ethogram.specs.base import Spec
from ethogram.specs.kinds import Kind
from services.runtime.console import ConsoleRun
from services.runtime.devices import chosen_device
from services.runtime.folders import RunFolder, artifact_in
from services.runtime.run import Run, warn
from services.runtime.tracking import ARTIFACT

CHECKPOINT_SECONDS = 30.0


def run(
    kind: Kind,
    spec: Spec,
    folder: RunFolder,
    inputs: Mapping[str, Path | Callable[[str], Path]],
    device: str | None = None,
) -> dict[str, Any] | None:
    """Run a job of ``kind`` into ``folder``, with a checkpoint every half minute and on Ctrl-C; its result.

    ``inputs``: by spec path, a file or folder, or what finds it, called with the device. ``device``: by default a GPU
    if there is one. Of several processes of torchrun the first reports and keeps; the others return None. Raises
    :class:`InvalidInput` for a device that cannot be used, as :meth:`Spec.refuse_new` does for a new run, and as
    :meth:`RunFolder.check` and :func:`artifact_in` do.
    """
    # What can be checked without torch and the job's code comes first: their import takes seconds.
    folder.check(spec)
    if not folder.resumes:
        spec.refuse_new()
    files = {path: artifact_in(given, kind.inputs[path]) for path, given in inputs.items() if isinstance(given, Path)}
    device = chosen_device(device)
    from services.runtime.parallel import join

    world, device = join(device)
    found = {path: given(device) for path, given in inputs.items() if not isinstance(given, Path)}
    files |= {path: artifact_in(source, kind.inputs[path]) for path, source in found.items()}
    job = kind.load_job()
    shared = {"world": world} if "world" in inspect.signature(job).parameters else {}
    if not world.first:
        silent = Run()
        silent.device, silent.inputs = device, files
        if shared:
            job(spec, silent, **shared)
        return None
    folder.begin(spec)
    run = ConsoleRun(folder.root, device, files, checkpoint_seconds=CHECKPOINT_SECONDS, id=folder.id)
    try:
        with run:
            warn(spec, run)
            result = job(spec, run, **shared)
            assert all(kind.makes(*artifact) for artifact in run.artifacts), f"{kind.name} made {run.artifacts}"
            folder.finish(result, {name for name, _ in run.artifacts}, run.log)
    except BaseException as error:
        artifacts = {name for name, _ in run.artifacts} - {ARTIFACT}
        if note := folder.leave(error, artifacts, run.unfinished, run.resume_note):
            run.log(note)
        raise
    return result
