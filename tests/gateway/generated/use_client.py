"""All that a user does, with the generated client alone: ``python use_client.py URL``. It runs where Ethogram is not
installed."""

from __future__ import annotations

import sys
import time
from io import BytesIO

from ethogram_client import Client
from ethogram_client.api.artifacts import download, get_artifact, list_artifacts, upload
from ethogram_client.api.jobs import cancel, events, get_job, submit, submit_pipeline
from ethogram_client.models import (
    GenerationSpec,
    GenerationSubmission,
    Job,
    Pipeline,
    PolicySubmission,
    Problem,
    SubjectTrainingSpec,
    UploadBody,
)
from ethogram_client.types import File

client = Client(base_url=sys.argv[1])
spec = GenerationSpec(subjects=4, seed=7, min_accuracy=0.0, training=SubjectTrainingSpec(steps=5))
job = submit.sync(client=client, body=GenerationSubmission(kind="generation", spec=spec))
assert isinstance(job, Job), job
deadline = time.monotonic() + 60
while job.state not in ("SUCCEEDED", "FAILED", "CANCELLED"):
    assert time.monotonic() < deadline
    time.sleep(0.1)
    job = get_job.sync(job.id, client=client)
    assert isinstance(job, Job), job
assert job.state == "SUCCEEDED", job
stream = events.sync(job.id, client=client)
assert isinstance(stream, str) and "event: artifact" in stream and "event: end" in stream

made = {item.name: item.id for item in list_artifacts.sync(client=client, job=job.id).items}
files = get_artifact.sync(made["zoo"], client=client).manifest.files.additional_properties
name, file = next((name, file) for name, file in files.items() if "/" in name or file.size)
content = download.sync(made["zoo"], name, client=client)
assert isinstance(content, File) and len(content.payload.read()) == file.size

body = UploadBody(name="mine", type_="mine", files=[File(payload=BytesIO(b"text"), file_name="folder/a.txt")])
kept = upload.sync(client=client, body=body)
assert list(kept.manifest.files.additional_properties) == ["folder/a.txt"]

jobs = {
    "zoo": {"kind": "generation", "spec": {"subjects": 4}, "queue": "nobody"},
    "codec": {"kind": "crossmodal", "spec": {"zoo": {"job": "zoo", "artifact": "zoo"}}, "queue": "nobody"},
}
queued = submit_pipeline.sync(client=client, body=Pipeline.from_dict({"jobs": jobs}))
# A job whose input is cancelled fails, so the one that waits comes first.
for job_name in ("codec", "zoo"):
    assert cancel.sync(queued.jobs.additional_properties[job_name].id, client=client).state == "CANCELLED"
wrong = submit.sync(client=client, body=PolicySubmission.from_dict({"kind": "policy", "spec": {"nodes": 1}}))
assert isinstance(wrong, Problem) and wrong.violations[0].field == "spec.nodes"
