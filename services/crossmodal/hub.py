"""Codecs on the Hugging Face Hub: one model repository each, encoder and decoder as files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ethogram.specs.base import HubSpec
from services.artifacts.hub import fetch, told
from services.crossmodal.codec import Codec
from services.crossmodal.codec_files import PARTS, Part

CARD = """---
library_name: ethogram
tags:
- weight-space
- model-steering
---

# {repo}

An encoder-decoder from what small networks do ({inputs}) through a latent of {latent} numbers to their weights, with a
direction for each of {count} behaviours: {behaviors}.

```python
from services.crossmodal.codec import Codec
from services.crossmodal.hub import pull

codec = Codec.load(pull("{repo}"))
steered, latents = codec.steer(networks, [("add", "{first}")])
```
"""


def open_repository(spec: HubSpec, field: str = "spec.hub.repo") -> None:
    """Make the model repository, unless it is there. Raises :class:`InvalidInput` without permission and
    :class:`Unavailable` without a Hub."""
    from huggingface_hub import HfApi

    with told(spec.repo, field):
        HfApi().create_repo(spec.repo, repo_type="model", private=spec.private, exist_ok=True)


def push(folder: Path, spec: HubSpec, field: str = "spec.hub.repo") -> None:
    """Upload the codec in ``folder``, in one commit. Raises as :func:`open_repository` does, and
    :class:`InvalidInput` for a folder that is no codec."""
    from huggingface_hub import CommitOperationAdd, HfApi

    codec = Codec.load(folder, parts=())
    names = [behavior.name for behavior in codec.behaviors]
    card = CARD.format(
        repo=spec.repo,
        inputs=codec.spec.codec.inputs,
        latent=codec.latent_dim,
        count=len(names),
        behaviors=", ".join(names),
        first=names[0],
    )
    open_repository(spec, field)
    with told(spec.repo, field):
        files = [CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir()) if file.is_file()]
        operations = [*files, CommitOperationAdd("README.md", card.encode())]
        HfApi().create_commit(spec.repo, operations, commit_message="A codec", repo_type="model")


def pull(repo: str, parts: Sequence[Part] = PARTS, field: str = "REPO") -> Path:
    """Download a codec, of encoder and decoder only ``parts``: its folder in the Hub's cache."""
    left_out = [f"{part}.safetensors" for part in PARTS if part not in parts]
    with told(repo, field, "read"):
        return fetch(repo, "model", ["*.safetensors", "config.json"], left_out)
