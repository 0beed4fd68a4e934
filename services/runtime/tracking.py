"""Weights & Biases, beside a run's own metrics. Whatever fails there is a warning, and the run continues."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ethogram.errors import InvalidInput, Unavailable
from ethogram.specs.base import WandbSpec
from services.runtime.run import Cancelled, Run, Stopped, Waiting

if TYPE_CHECKING:
    from torch import Tensor

ARTIFACT = "wandb"
NAME = "Weights & Biases"
START_SECONDS, FINISH_SECONDS = 10.0, 60.0
"""Waited at most for the service, before the run and after it."""
BINS = 64
MOST_SAID = 300
"""Characters of the library's errors that the log repeats."""
_MODES: dict[str, Literal["online", "offline", "disabled", "shared"]] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
    "shared": "shared",
}
"""Values of ``WANDB_MODE``, in any case."""
Histogram = tuple[list[int], list[float]]
"""Counts and edges of bins."""


def histogram(values: Tensor) -> Histogram:
    """Counts of the ``values`` that are finite, in bins between the smallest and the largest."""
    import numpy as np

    counts, edges = np.histogram(values[values.isfinite()].double().cpu().numpy(), BINS)
    return counts.tolist(), edges.tolist()


class Log:
    """Logs metrics of steps; does nothing without a ``session``."""

    def __init__(self, run: Run | None = None, session: Any = None) -> None:
        self._run, self._session = run or Run(), session
        self.id: str | None = session.id if session is not None else None
        """Id of the run at Weights & Biases, to continue it later."""
        # The service has the steps before, and refuses them.
        self._first = session.step if session is not None else 0

    def __call__(self, step: int, metrics: Mapping[str, float | Histogram]) -> None:
        """Log ``metrics``, unless the run at Weights & Biases has those of the step."""
        if self._session is None or step < self._first:
            return
        try:
            import wandb

            make: Any = wandb.Histogram
            values = {
                name: value if isinstance(value, float | int) else make(np_histogram=tuple(value))
                for name, value in metrics.items()
            }
            self._session.log(values, step=step)
        except Exception as error:  # Of whatever type, it concerns the service alone.
            self._run.log(f"{NAME} takes no more metrics ({_short(error)}); the run continues", "warning")
            self._session = None


@contextmanager
def tracked(spec: WandbSpec | None, config: Mapping[str, Any], run: Run, id: str | None = None) -> Iterator[Log]:
    """Log metrics to Weights & Biases; does nothing without a ``spec``. ``id``: of a run to continue, by default one
    that follows from the run's own.

    With ``WANDB_API_KEY`` in the environment it logs to the service, unless ``spec`` or ``WANDB_MODE`` says otherwise.
    Without, and where the service does not answer, it writes files for ``wandb sync`` and keeps them as the artifact
    ``wandb``, also if the run fails.
    """
    if spec is None:
        yield Log()
        return
    with ExitStack() as stack:
        log, session = Log(), None
        with run.side_output(NAME, "the run continues without it"), _translated():
            # The library itself calls the folder wandb.
            folder = stack.enter_context(run.output_folder(ARTIFACT))
            session = _start(spec, config, run, folder, id or run.id or None)
            log = Log(run, session)
        try:
            yield log
        finally:
            if session is not None:
                with run.side_output(NAME), _translated():
                    _finish(session, run, folder)


def _start(spec: WandbSpec, config: Mapping[str, Any], run: Run, folder: Path, id: str | None) -> Any:
    """A session, offline where the service cannot be used; None where ``WANDB_MODE`` is ``disabled``."""
    # Importing it takes seconds.
    import wandb

    given = spec.mode or os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
    mode = _MODES.get(given.strip().lower(), "offline")
    if given.strip().lower() not in _MODES:
        run.log(f"WANDB_MODE={given} is none of {', '.join(_MODES)}; taken as offline", "warning")
    if mode == "disabled":
        return None

    def begin(mode: str) -> Any:
        folder.mkdir(parents=True, exist_ok=True)
        # Those of an attempt that was killed: all that they hold is logged again.
        for earlier in folder.glob(f"*run-*-{id}") if id else ():
            shutil.rmtree(earlier, ignore_errors=True)
        settings = wandb.Settings(
            silent=True,
            console="off",
            x_disable_stats=True,
            disable_git=True,
            symlink=False,
            init_timeout=START_SECONDS,
            login_timeout=START_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        return wandb.init(
            project=spec.project,
            name=spec.name,
            id=id,
            resume="allow" if id else None,
            config=dict(config),
            dir=str(folder.parent.absolute()),
            mode=mode,  # type: ignore[arg-type]
            # A run of the user's in this process is another one.
            reinit="create_new",
            settings=settings,
        )

    try:
        # The library takes it in lower case alone.
        with _variables({"WANDB_MODE": mode}):
            return begin(mode)
    except Exception as error:
        text = f"{NAME} cannot be used ({_short(error)})"
        run.log(f"{text}; metrics are written for `wandb sync`, into the artifact {ARTIFACT}", "warning")
    _release()
    # None of its variables matters offline, and one of them may be what was wrong.
    with _variables({name: None for name in os.environ if name.startswith("WANDB_") and name != "WANDB_SERVICE"}):
        return begin("offline")


def _finish(session: Any, run: Run, folder: Path) -> None:
    """End the session; keep its files where the service does not have all that is in them."""
    sent = not session.offline
    try:
        session.finish()
    except TimeoutError:
        sent = False
        run.log(f"{NAME} did not take all metrics within {FINISH_SECONDS:.0f} s; they are kept", "warning")
    except Exception as error:
        sent = False
        run.log(f"the client of {NAME} ended early ({_short(error)}); what it wrote is kept", "warning")
    if not sent:
        _release()
        for path in folder.rglob("*"):
            if path.is_symlink():
                # To logs elsewhere on this machine.
                path.unlink()
        run.artifact(ARTIFACT, ARTIFACT, folder)


@contextmanager
def _variables(values: Mapping[str, str | None]) -> Iterator[None]:
    """The environment with other ``values``; None: without that variable."""
    before = {name: os.environ.get(name) for name in values}
    try:
        _set(values)
        yield
    finally:
        _set(before)


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _release() -> None:
    """Have the library's own process end: only then are its files complete, and ids free again."""
    import wandb

    # Unless it serves a run of the user's. It may be dead.
    if wandb.run is None:
        with suppress(Exception):
            wandb.teardown()


@contextmanager
def _translated() -> Iterator[None]:
    """Raise what the library raises as an error of ours."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from None
    except (OSError, InvalidInput, Unavailable, Cancelled, Stopped, Waiting):
        raise
    except Exception as error:
        raise Unavailable(_short(error)) from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:MOST_SAID] or type(error).__name__
