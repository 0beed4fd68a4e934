"""What the platform costs: how soon it is up, how soon a job speaks, and its price over a plain script.

``overhead``: a crossmodal job's time from submission to its end, over the time of the same function called by a script
in a fresh process with as many threads, minus 1; and whether both made the same bytes. The median of three rounds,
which take turns at what comes first.
"""

from __future__ import annotations

import os
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
        with Platform(StateDir(folder / "state"), say=say) as platform, Client(platform.url) as client:
            say(f"up: {platform.seconds}")
            first = statistics.median(first_event(client) for _ in range(3))
            say(f"first event after {first:.2f} s")
            figures = {
                "up_s": Figure(platform.seconds["platform"], "<=", 8.0),
                "gateway_s": Figure(platform.seconds["gateway"], "<=", 2.0),
                "first_event_s": Figure(first, "<=", 4.0),
            }
            return figures | overhead(client, folder)


def first_event(client: Client) -> float:
    """Seconds from the submission of a job to the first event of its process."""
    began = time.monotonic()
    job = client.submit("generation", GenerationSpec(subjects=8, training=SubjectTrainingSpec(steps=5), min_accuracy=0))
    seconds = next(time.monotonic() - began for event in client.events(job.id) if event.type in ("log", "progress"))
    client.wait(job.id).check()
    return seconds


def overhead(client: Client, folder: Path) -> Figures:
    """The same training on the platform and by a script."""
    zoo = client.wait(client.submit("generation", ZOO).id).check()
    client.get(client.output(zoo.id, "zoo").id, folder / "zoo")
    spec = CrossmodalSpec(zoo=ArtifactRef(job=zoo.id, artifact="zoo"), codec=CODEC, training=TRAINING)
    (folder / "spec.json").write_text(spec.model_dump_json(), encoding="utf-8")
    threads = dict.fromkeys(THREAD_VARIABLES, os.environ["ETHOGRAM_THREADS"]) | {"GOMP_SPINCOUNT": SPIN_COUNT}
    jobs, scripts, identical = [], [], True
    for number in range(ROUNDS):
        # The machine's speed drifts, so a round compares its own two, and rounds take turns at which is first.
        for platform_now in (True, False) if number % 2 else (False, True):
            began = time.monotonic()
            if platform_now:
                job = client.wait(client.submit("crossmodal", spec).id).check()
                jobs.append(time.monotonic() - began)
            else:
                _kit.call("_direct", folder / "zoo", folder / "spec.json", folder / f"direct-{number}", env=threads)
                scripts.append(time.monotonic() - began)
        manifest = client.artifact(client.output(job.id, "codec").id).manifest
        if manifest is None:
            raise NotFound("the codec has no manifest")
        made = {name: file.sha256 for name, file in manifest.files.items()}
        identical &= made == digests(folder / f"direct-{number}" / "codec")
        say(f"platform {jobs[-1]:.1f} s, script {scripts[-1]:.1f} s, {'same' if identical else 'other'} bytes")
    return {
        "overhead": Figure(statistics.median(j / s for j, s in zip(jobs, scripts, strict=True)) - 1, "<=", 0.03),
        "job_s": Figure(statistics.median(jobs), ">=", 60.0, peer=statistics.median(scripts)),
        "identical": Figure(float(identical), "==", 1.0),
    }


def digests(folder: Path) -> dict[str, str]:
    """Path below ``folder`` to sha256."""
    return {file.relative_to(folder).as_posix(): sha256_of(file) for file in folder.rglob("*") if file.is_file()}


if __name__ == "__main__":
    _kit.finish("platform", measure())
