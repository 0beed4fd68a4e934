"""The demo, from nothing to a report: make a zoo, train a codec, serve it, steer held-out networks.

Everything goes through a platform and its public interfaces, as for any user. The output of an earlier run of the same
specs with the same code is found by its idempotency key and reused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import ethogram
from ethogram.bench import Figure, PeakMemory, form, versions
from ethogram.cli.output import say, table
from ethogram.client import Client
from ethogram.errors import InvalidInput, NotFound, Unavailable
from ethogram.platform.stack import Platform
from ethogram.platform.state import StateDir
from ethogram.progress import Watch
from ethogram.resources import Event, Job, Model
from ethogram.specs.base import ArtifactRef, Spec
from ethogram.specs.crossmodal import CodecSpec, CodecTrainingSpec, CrossmodalSpec
from ethogram.specs.edits import LOOKUPS, Operation, comparable_lookups
from ethogram.specs.generation import GenerationSpec, PatternSpec, SignatureSpec, SubjectTrainingSpec
from ethogram.specs.kinds import KINDS

if TYPE_CHECKING:
    from ethogram.inference import Inference

_OPERATIONS: tuple[Operation, ...] = ("add", "remove")
_SERVED_SECONDS = 30.0
_CONTROLS = ("null", "random", "reverse")
# Measured only by a run that does the work; a later run repeats its values.
_COSTS = ("seconds", "peak_rss_mib", "first_event_s")
_BARS = {
    "agreement": (">=", 0.85),
    "add.target_mean": (">=", 0.88),
    "add.all_gate": (">=", 0.50),
    "remove.target_mean": (">=", 0.85),
    "remove.all_gate": (">=", 0.60),
    "controls.max_all_gate": ("<=", 0.05),
}


_REPORT, _EVALUATION = "report.json", "evaluation"
_FILES = ("latent_map.png", "steering.png", "steered.safetensors")
"""Moved from the report of the codec's job."""


class Sizes(NamedTuple):
    """One size of the demo."""

    name: str
    zoo: GenerationSpec
    codec: CrossmodalSpec


_ANY_ZOO = ArtifactRef(artifact="zoo")
# As in examples/demo.yaml.
FULL = Sizes("demo", GenerationSpec(), CrossmodalSpec(zoo=_ANY_ZOO))
QUICK = Sizes(
    "demo-quick",
    GenerationSpec(
        subjects=160,
        vocab_size=5,
        sequence_length=5,
        patterns=[
            PatternSpec(name="starts_with", token="A"),
            PatternSpec(name="ends_with", token="B"),
            PatternSpec(name="first_last_match"),
            PatternSpec(name="no_repeats"),
        ],
        max_patterns_per_batch=3,
        training=SubjectTrainingSpec(steps=300, learning_rate=2e-2),
        signature=SignatureSpec(probes=64),
    ),
    CrossmodalSpec(
        zoo=_ANY_ZOO,
        codec=CodecSpec(latent_dim=32, hidden_dim=128),
        training=CodecTrainingSpec(steps=400, batch_size=32, queries=96),
    ),
)


class Served(NamedTuple):
    """What the inference service did with the held-out networks: mean recall of the behaviour, before and after."""

    networks: int
    before: float
    after: float


@dataclass
class _Run:
    """State of one run of the demo."""

    client: Client
    sizes: Sizes
    fresh: bool
    reused: list[str] = field(default_factory=list)
    first_event_s: float | None = None


def run(
    output: Path, *, quick: bool = False, fresh: bool = False, state: str | None = None, quiet: bool = False
) -> dict[str, Any]:
    """Do it all and return the report that lies in ``output``. ``quiet``: print nothing on standard output.

    Raises an :class:`~ethogram.errors.EthogramError` when a part of it fails, and :class:`InvalidInput` where
    ``output`` has files of other making that the demo would replace.
    """
    began = time.monotonic()
    sizes = QUICK if quick else FULL
    _check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    with _platform(StateDir.find(state)) as (client, up_s, pid), PeakMemory(os.getpid(), pid) as memory:
        this = _Run(client, sizes, fresh)
        zoo = _job(this, "zoo", "generation", sizes.zoo)
        codec = _job(
            this, "codec", "crossmodal", sizes.codec.model_copy(update={"zoo": ArtifactRef(job=zoo.id, artifact="zoo")})
        )
        model = _publish(this, codec)
        evaluation = _fetch_report(client, codec, output)
        with client.inference() as inference:
            _until_served(inference, model)
            served = _steer_served(inference, model, output)
    # Only the full size has bars.
    measured = evaluation["figures"]
    figures = {name: Figure(measured.get(name), *(() if quick else bar)) for name, bar in _BARS.items()}
    for operation in _OPERATIONS:
        figures[f"{operation}.kept_mean"] = Figure(measured.get(f"{operation}.kept_mean"))
        for name in (f"{operation}.{way}.{figure}" for way in LOOKUPS for figure in ("all_gate", "kept_mean")):
            figures[name] = Figure(measured.get(name))
    figures["nearest_train.agreement"] = Figure(measured.get("nearest_train.agreement"))
    figures |= {
        "seconds": Figure(time.monotonic() - began, "<=", 600.0),
        "peak_rss_mib": Figure(memory.mib, "<=", 4096.0),
        "first_event_s": Figure(this.first_event_s, "<=", 4.0),
        "up_s": Figure(up_s, "<=", 8.0) if up_s is not None else Figure(None),
    }
    jobs = {"zoo": zoo.id, "codec": codec.id}
    figures |= _earlier_costs(output, jobs) if this.reused else {}
    report = form("demo", figures) | {
        "size": sizes.name,
        "jobs": jobs,
        "reused": this.reused,
        "model": {"name": model.name, "version": model.version, "artifact": model.artifact},
        "subjects": evaluation["subjects"],
        "summary": evaluation["summary"],
        "steering": evaluation["steering"],
        "others": evaluation["others"],
        "served": {f"{operation} {name}": value._asdict() for (operation, name), value in served.items()},
    }
    (output / _REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        _show(report, served, output)
    return report


@contextmanager
def _platform(state: StateDir) -> Iterator[tuple[Client, float | None, int]]:
    """A client of the platform that runs in ``state``, else of one started for this block.

    Beside it the seconds until that one was up (None for one that ran already) and the platform's process.
    """
    record = state.read_record()
    if os.environ.get("ETHOGRAM_URL") or record is not None:
        with Client(state=state.root) as client:
            say(f"using the platform at {client.url}")
            yield client, None, int(record["pid"]) if record else os.getpid()
        return
    say("starting a platform")
    with Platform(state, say=say) as platform, Client(platform.url) as client:
        seconds = platform.seconds["platform"]
        say(f"platform up in {seconds:.1f} s: {platform.url}")
        yield client, seconds, os.getpid()
        say("stopping the platform")


def _job(this: _Run, name: str, kind: str, spec: Spec) -> Job:
    """The finished job of ``spec``: an earlier one whose output is still there, else a new one, followed to its end."""
    key = f"{this.sizes.name}-{name}-{_digest(spec, kind)}"
    labels = {"name": name, "demo": this.sizes.name}
    new_key = f"{key}-{uuid.uuid4().hex}"
    submitted = time.monotonic()
    job = this.client.submit(kind, spec, labels=labels, idempotency_key=new_key if this.fresh else key)
    if job.terminal and not _valid(this.client, job, name):
        # A job that failed, or whose output was deleted, keeps its key.
        submitted = time.monotonic()
        job = this.client.submit(kind, spec, labels=labels, idempotency_key=new_key)
    if job.terminal:
        this.reused.append(name)
        say(f"{name}: reusing the output of {job.id}; --fresh runs it again")
        return job
    say(f"{name}: {'resuming' if job.attempts else 'started'} {job.id}")

    with Watch(name) as shown:

        def see(event: Event) -> None:
            # The supervisor's own events come first; this is the first of the job's process.
            if this.first_event_s is None and event.type in ("progress", "log"):
                this.first_event_s = time.monotonic() - submitted
            shown.event(event)

        return this.client.wait(job.id, on_event=see).check()


def _valid(client: Client, job: Job, output: str) -> bool:
    with suppress(NotFound):
        return job.state == "SUCCEEDED" and bool(client.artifact(client.output(job.id, output).id))
    return False


def _digest(spec: Spec, kind: str) -> str:
    """What the outcome depends on: the spec, the code that runs, and the libraries that it computes with."""
    digest = hashlib.sha256(json.dumps([spec.model_dump(mode="json"), versions()], sort_keys=True).encode())
    root = Path(ethogram.__file__).parents[1]
    for folder in ("ethogram/specs", "services/zoo", f"services/{KINDS[kind].system}", "services/runtime"):
        for file in sorted((root / folder).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:24]


def _publish(this: _Run, job: Job) -> Model:
    name, artifact = this.sizes.name, this.client.output(job.id, "codec").id
    published = [m for m in this.client.models() if (m.name, m.artifact, m.retired) == (name, artifact, False)]
    model = published[0] if published else this.client.publish(name, artifact)
    say(f"model: {'already' if published else 'now'} published as {model.name} version {model.version}")
    return model


def _check_output(output: Path) -> None:
    """Raise :class:`InvalidInput` where ``output`` has what a demo would replace, and is not a demo's."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads((output / _REPORT).read_text(encoding="utf-8"))["bench"] == "demo":
            return
    there = [name for name in (_REPORT, _EVALUATION, *_FILES) if os.path.lexists(output / name)]
    if there:
        raise InvalidInput.field("--output", f"{output} has a {there[0]} that no demo made; name another folder")


def _fetch_report(client: Client, job: Job, output: Path) -> dict[str, Any]:
    """Download the job's report into ``output``; its figures."""
    with TemporaryDirectory(prefix="evaluation-", dir=output) as scratch:
        fresh, folder = client.get(client.output(job.id, "report").id, Path(scratch, "report")), output / _EVALUATION
        evaluation: dict[str, Any] = json.loads((fresh / _REPORT).read_text(encoding="utf-8"))
        if not (output / _REPORT).exists():
            # From now on the folder is a demo's, also if this process ends before it writes the rest.
            (output / _REPORT).write_text(json.dumps({"bench": "demo"}), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        for file in _FILES:
            (fresh / file).replace(output / file)
        fresh.replace(folder)
    return evaluation


def _until_served(inference: Inference, model: Model) -> None:
    """Return when the inference service answers for ``model``."""
    deadline = time.monotonic() + _SERVED_SECONDS
    while True:
        try:
            inference.behaviors(model.name, version=model.version)
            return
        except (NotFound, Unavailable):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def _steer_served(inference: Inference, model: Model, output: Path) -> dict[tuple[Operation, str], Served]:
    """Steer every held-out network that can gain or lose a behaviour, by the service, and run the results there."""
    from ethogram import networks as files

    tensors = files.load(output / "evaluation" / "held_out.safetensors")
    labels = files.load(output / "evaluation" / "held_out_labels.safetensors")["labels"].astype(bool)
    names = [behavior.name for behavior in inference.behaviors(model.name, version=model.version).behaviors]
    latents = inference.encode(model.name, tensors, version=model.version).latents
    decoded = inference.decode(model.name, latents, version=model.version).networks
    source = inference.evaluate(model.name, tensors, version=model.version).recall
    again = inference.evaluate(model.name, decoded, version=model.version).recall
    say(
        f"served: {len(labels)} held-out networks encoded and decoded; recall of their own behaviours "
        f"{source[labels].mean():.2f} before, {again[labels].mean():.2f} after"
    )
    measured: dict[tuple[Operation, str], Served] = {}
    for (column, name), operation in product(enumerate(names), _OPERATIONS):
        has = labels[:, column]
        # Those without the behaviour can gain it; those with another one as well can lose it.
        subjects = ~has if operation == "add" else has & (labels.sum(axis=1) >= 2)
        if not subjects.any():
            continue
        chosen = {parameter: value[subjects] for parameter, value in tensors.items()}
        steered = inference.steer(model.name, chosen, [(operation, name)], version=model.version).networks
        recall = inference.evaluate(model.name, steered, version=model.version).recall[:, column]
        before = float(source[subjects, column].mean())
        measured[operation, name] = Served(int(subjects.sum()), before, float(recall.mean()))
    return measured


def _earlier_costs(output: Path, jobs: Mapping[str, str]) -> dict[str, Figure]:
    """The costs that the run which did the work measured, if its report is still here; else no values."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        earlier = json.loads((output / _REPORT).read_text(encoding="utf-8"))
        if earlier["jobs"] == dict(jobs):
            figures = {name: earlier["figures"][name] for name in _COSTS}
            return {name: Figure(old["value"], old["op"], old["bar"], kept=True) for name, old in figures.items()}
    return {name: Figure(None) for name in _COSTS}


def _show(report: Mapping[str, Any], served: Mapping[tuple[Operation, str], Served], output: Path) -> None:
    """The table for people."""
    rows = [row for row in report["steering"] if row["edits"] and row["mode"] == "residual"]
    passed = {(row["operation"], row["pattern"], row["variant"]): row["all_gate"] for row in rows}
    comparable = comparable_lookups(report)
    columns = ("pattern", "edits", "target_mean", "local_mean", "kept_mean", "all_gate")
    for operation in _OPERATIONS:
        cells = []
        for row in rows:
            if row["operation"] == operation and row["variant"] == "edit":
                lookups = (comparable.get((operation, row["pattern"], way)) for way in LOOKUPS)
                control = max(passed[operation, row["pattern"], name] for name in _CONTROLS)
                cells.append([*map(row.get, columns), *lookups, control])
        head = ["Pattern", "Edits", "Target", "Local", "Kept", "Both gates"]
        title = f"{operation.upper()} a behaviour: held-out networks, residual edits"
        table([*head, "Same label", "Nearest train", "Centroid", "Best control"], cells, title=title)
    say(
        "Target: accuracy where the edit decides. Local: change of accuracy elsewhere. Kept: share of the answers\n"
        "elsewhere that are still the source's. Both gates: share of edits with target >= 0.85 and local >= -0.02.\n"
        "Beside it that of lookups: of the edits for which there is a network (empty: for fewer than half). They are\n"
        "the training network nearest to the steered latent of those with the requested labels, the nearest of all,\n"
        "and the decoded centroid. Then the best control: no edit, a random direction, the reverse direction."
    )
    for sentence in report["summary"]:
        say(f"- {sentence}")
    table(
        ["Edit", "Networks", "Recall before", "After"],
        [(f"{operation} {name}", *value) for (operation, name), value in served.items()],
        title="Recall of the behaviour, measured by the inference service before and after it steered the networks",
    )
    table(
        ["Figure", "Value", "Bar", ""],
        [
            (name, f["value"], f"{f['op']} {f['bar']:g}" if f["op"] else "", "" if f["ok"] else "missed")
            for name, f in report["figures"].items()
        ],
    )
    if report["reused"]:
        say(f"Reused from an earlier run: {', '.join(report['reused'])}; seconds and memory are of that run.")
    if report["size"] == FULL.name:
        say("The same zoo and codec as a pipeline: ethogram pipeline examples/demo.yaml --wait")
    say(f"In {output}/: report.json, latent_map.png, steering.png, steered.safetensors, and evaluation/ with the rest")
