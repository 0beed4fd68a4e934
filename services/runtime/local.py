"""Jobs of any kind in this process, without a platform."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ethogram.errors import InvalidInput
from ethogram.specs.base import Spec
from ethogram.specs.kinds import KINDS, Kind
from services.runtime.console import ConsoleRun
from services.runtime.devices import chosen_device
from services.runtime.folders import RunFolder
from services.runtime.parallel import join
from services.runtime.run import Run

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
    :class:`InvalidInput` for a device that cannot be used, and as :meth:`RunFolder.begin` does.
    """
    world, device = join(chosen_device(device))
    files = {path: given if isinstance(given, Path) else given(device) for path, given in inputs.items()}
    files = {path: artifact_in(source, kind.inputs[path]) for path, source in files.items()}
    job = kind.load_job()
    shared = {"world": world} if "world" in inspect.signature(job).parameters else {}
    if not world.first:
        silent = Run()
        silent.device, silent.inputs = device, files
        if shared:
            job(spec, silent, **shared)
        return None
    folder.begin(spec)
    run = ConsoleRun(folder.root, device, files, checkpoint_seconds=CHECKPOINT_SECONDS, places=folder.places)
    try:
        with run:
            result = job(spec, run, **shared)
            folder.finish(result)
    except BaseException as error:
        if note := folder.leave(error, kind.outputs, run.unfinished):
            run.log(note)
        raise
    return result


def artifact_in(source: Path, type: str) -> Path:
    """The artifact of ``type`` in ``source``, which is the artifact itself or the folder of the run that made it.
    Raises :class:`InvalidInput` where there is nothing."""
    if not source.exists():
        raise InvalidInput.field("--input", f"{source} is not a file or folder")
    names = {name for kind in KINDS.values() for name, made in kind.outputs.items() if made == type}
    return next((source / name for name in sorted(names) if (source / name).is_dir()), source)
