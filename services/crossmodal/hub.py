"""Upload codecs to the Hugging Face Hub and download them: a model repository each, encoder and decoder in separate
files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ethogram.specs.base import HubSpec
from services.artifacts.hub import Repository, fetch
from services.crossmodal.codec import Codec
from services.crossmodal.codec_files import PARTS, Part

CARD = """---
library_name: ethogram
tags:
- weight-space
- model-steering
---

# {repo}

An encoder-decoder of small networks: it encodes a network's {inputs} into a latent of {latent} numbers, and decodes
latents into weights. It has a steering direction for each of {count} behaviours: {behaviors}.

```python
from services.crossmodal.codec import Codec
from services.crossmodal.hub import pull

codec = Codec.load(pull("{repo}"))
steered, latents = codec.steer(networks, [("add", "{first}")])
```
"""


def push(folder: Path, spec: HubSpec, field: str = "spec.hub.repo") -> None:
    """Upload the codec in ``folder`` with a model card, in one commit. ``field``: where the repository was named, for
    error messages.

    Raises :class:`InvalidInput` for a folder that is not a codec and without permission, and :class:`Unavailable`
    if the Hub cannot be reached.
    """
    codec = Codec.load(folder, parts=())
    names = [behavior.name for behavior in codec.behaviors]
    card = CARD.format(
        repo=spec.repo,
        inputs=codec.spec.codec.inputs.replace("both", "signature and weights"),
        latent=codec.latent_dim,
        count=len(names),
        behaviors=", ".join(names),
        first=names[0],
    )
    repository = Repository(spec, "model", field)
    repository.open()
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    repository.upload({**files, "README.md": card.encode()}, "A codec")


def pull(repo: str, parts: Sequence[Part] = PARTS, field: str = "REPO") -> Path:
    """Download a codec, of encoder and decoder only ``parts``. Returns its folder in the Hub's cache."""
    exclude = [f"{part}.safetensors" for part in PARTS if part not in parts]
    return fetch(repo, "model", ["*.safetensors", "config.json"], exclude, field=field)
