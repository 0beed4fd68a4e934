"""What the platform costs: how soon it is up, how soon a job speaks, and its price over a plain script.

A crossmodal job's time from submission to its end is compared with a script that calls the same function in a fresh
process with as many threads; both must make the same bytes. All are medians of three rounds, which take turns at what
comes first. The platform has just started, so the job of the first round has a cold slot: libraries are imported for
it. The others have a warm slot, and so the medians are those of warm jobs, while each script imports.

- ``fixed_s``: what any job takes apart from its work: ``start_s``, from submission until its process is there,
  ``imports_s``, and ``commit_s``, which fetches inputs, keeps outputs and says that it ended. ``cold_fixed_s`` is that
  of the first round, and ``cold_overhead`` its overhead.
- ``rest``: the job's time without those, over the time of the function in the script, minus 1; ``checkpoints_s`` are
  part of it.
- ``overhead``: the job's time over that of the script's whole process, with its imports, minus 1.
- ``job_s``: the job's time, a size and no bar.
"""

from __future__ import annotations

import os
import re
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import _kit
from benchmarks._kit import Figures, say
from ethogram.bench import Figure
from ethogram.client import Client
from ethogram.errors import NotFound
from ethogram.platform.stack import Platform
from ethogram.platform.state import StateDir
from ethogram.specs.base import ArtifactRef
from ethogram.specs.crossmodal import CodecSpec, CodecTrainingSpec, CrossmodalSpec
from ethogram.specs.generation import GenerationSpec, SubjectTrainingSpec
from services.artifacts.backends import sha256_of
from workers.process import SPIN_COUNT, THREAD_VARIABLES

ZOO = GenerationSpec(subjects=256, training=SubjectTrainingSpec(steps=300), min_accuracy=0.0)
# Sized so that a run takes a bit more than a minute on two cores.
TRAINING = CodecTrainingSpec(steps=1400, batch_size=64, queries=128)
CODEC = CodecSpec(latent_dim=128, hidden_dim=1024)
ROUNDS = 3


def measure() -> Figures:
    """All figures, on a platform of its own."""
    os.environ["ETHOGRAM_THREADS"] = str(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        state = StateDir(folder / "state")
        with Platform(state, say=say) as platform, Client(platform.url) as client:
            say(f"up: {platform.seconds}")
            first = statistics.median(first_event(client) for _ in range(3))
            say(f"first event after {first:.2f} s")
            figures = {
                "up_s": Figure(platform.seconds["platform"], "<=", 8.0),
                "gateway_s": Figure(platform.seconds["gateway"], "<=", 2.0),
                "first_event_s": Figure(first, "<=", 4.0),
            }
            zoo = client.wait(client.submit("generation", ZOO).id).check()
        # With cold slots.
        with Platform(state, say=say) as platform, Client(platform.url) as client:
            return figures | overhead(client, folder, zoo.id)


def first_event(client: Client) -> float:
    """Seconds from the submission of a job to the first event of its process."""
    began = time.monotonic()
    job = client.submit("generation", GenerationSpec(subjects=8, training=SubjectTrainingSpec(steps=5), min_accuracy=0))
    seconds = next(time.monotonic() - began for event in client.events(job.id) if event.type in ("log", "progress"))
    client.wait(job.id).check()
    return seconds


def overhead(client: Client, folder: Path, zoo: str) -> Figures:
    """The same training on the platform and by a script. ``zoo``: id of the job that made the zoo."""
    client.get(client.output(zoo, "zoo").id, folder / "zoo")
    spec = CrossmodalSpec(zoo=ArtifactRef(job=zoo, artifact="zoo"), codec=CODEC, training=TRAINING)
    (folder / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    threads = dict.fromkeys(THREAD_VARIABLES, os.environ["ETHOGRAM_THREADS"]) | {"GOMP_SPINCOUNT": SPIN_COUNT}
    rounds, identical = [], True
    for number in range(ROUNDS):
        # The machine's speed drifts, so a round compares its own two, and rounds take turns at which is first.
        for platform_now in (True, False) if number % 2 else (False, True):
            if platform_now:
                job, took = timed(client, spec)
            else:
                began = time.monotonic()
                output = folder / f"direct-{number}"
                function_s = float(_kit.call("_direct", folder / "zoo", folder / "spec.json", output, env=threads))
                script_s = time.monotonic() - began
        manifest = client.artifact(client.output(job, "codec").id).manifest
        if manifest is None:
            raise NotFound("the codec has no manifest")
        made = {name: file.sha256 for name, file in manifest.files.items()}
        identical &= made == digests(output / "codec")
        took |= {"script_s": script_s, "overhead": took["job_s"] / script_s - 1}
        took["rest"] = (took["job_s"] - took["fixed_s"]) / function_s - 1
        rounds.append(took)
        parts = ", ".join(f"{name} {value:.3f}" for name, value in took.items())
        say(f"{parts}, {'same' if identical else 'other'} bytes")
    medians = {name: statistics.median(took[name] for took in rounds) for name in rounds[0]}
    bars = {"fixed_s": 1.5, "rest": 0.01, "overhead": 0.03}
    figures = {
        name: Figure(value, "<=", bars[name]) if name in bars else Figure(value) for name, value in medians.items()
    }
    cold = {f"cold_{name}": Figure(rounds[0][name]) for name in ("fixed_s", "overhead")}
    return figures | cold | {"identical": Figure(float(identical), "==", 1.0)}


def timed(client: Client, spec: CrossmodalSpec) -> tuple[str, dict[str, float]]:
    """A job's id, and its seconds by part: when it began and ended here, and what it says in its last log line."""
    began = time.monotonic()
    job = client.submit("crossmodal", spec).id
    started = said = 0.0
    parts: dict[str, float] = {}
    for event in client.events(job):
        if event.type == "log":
            said = time.monotonic()
            started = started or said - began
            parts = {name: float(seconds) for name, seconds in re.findall(r"(\w+) ([\d.]+) s", event.data["message"])}
    ended = time.monotonic()
    client.wait(job).check()
    took = {
        "job_s": ended - began,
        "start_s": started - parts["imports"] - parts["inputs"],
        "imports_s": parts["imports"],
        "checkpoints_s": parts["checkpoints"],
        "commit_s": parts["inputs"] + parts["outputs"] + ended - said,
    }
    return job, took | {"fixed_s": took["start_s"] + took["imports_s"] + took["commit_s"]}


def digests(folder: Path) -> dict[str, str]:
    """Path below ``folder`` to sha256."""
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in folder.rglob("*") if file.is_file()}


if __name__ == "__main__":
    _kit.parser(__doc__).parse_args()
    _kit.finish("platform", measure())
