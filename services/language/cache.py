"""A cache of tensors, e.g. embeddings, by a model's digest and the text that they are of.

The folder of a model holds safetensors shards, each written in one step and named by the SHA-256 of its bytes; the name
of a tensor is the SHA-256 of its text. So a crash loses at most what was not written yet, processes that share a folder
see each other's shards, and a shard that was changed is recognised. In a folder that cannot be written, or on a full
disk, nothing is kept and everything is computed again.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from services.artifacts.backends import sha256_of
from services.runtime.cache import best_effort
from services.runtime.tensors import write_durably

_log = logging.getLogger(__name__)


class TensorCache:
    """Tensors of one model, by text."""

    def __init__(self, root: Path, model_digest: str) -> None:
        """Cache in the folder ``model_digest`` of ``root``. The digest must stand for all that a tensor depends on
        besides its text: the model, the layer, the pooling, the precision."""
        self.folder = root / model_digest
        self._warned = False
        with best_effort(self._warn):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.hits, self.misses = 0, 0
        self._shard_of: dict[str, Path] = {}
        """Shard of each tensor, by the hash of its text."""
        self._known: set[Path] = set()

    def get_many(self, texts: Sequence[str]) -> list[Tensor | None]:
        """The tensor of each text, or None; counts hits and misses."""
        keys = [_key(text) for text in texts]
        if any(key not in self._shard_of for key in keys):
            self._read_new_shards()
        shard_of = {key: self._shard_of[key] for key in keys if key in self._shard_of}
        tensors: dict[str, Tensor] = {}
        for shard, group in groupby(sorted(shard_of, key=shard_of.__getitem__), shard_of.__getitem__):
            try:
                with safe_open(shard, "pt") as file:
                    tensors |= {key: file.get_tensor(key) for key in group}
            except (OSError, SafetensorError) as error:
                self._forget(shard, str(error))
        hits = sum(key in tensors for key in keys)
        self.hits, self.misses = self.hits + hits, self.misses + len(keys) - hits
        return [tensors.get(key) for key in keys]

    def put_many(self, texts: Sequence[str], tensors: Sequence[Tensor]) -> None:
        """Add the tensor of each text, of any shape and type, as one shard. Write many at a time."""
        content = {
            _key(text): tensor.detach().cpu().contiguous().clone() for text, tensor in zip(texts, tensors, strict=True)
        }
        if not content:
            return
        data = save(content)
        shard = self.folder / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        with best_effort(self._warn), (self.folder / "lock").open("w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Nobody else writes now: files that are half written are those of processes that died.
            for unfinished in self.folder.glob("*.new"):
                unfinished.unlink()
            write_durably(shard, [data])
            self._known.add(shard)
            self._shard_of |= dict.fromkeys(content, shard)

    def get_or_compute(self, texts: Sequence[str], compute: Callable[[list[str]], Sequence[Tensor]]) -> list[Tensor]:
        """The tensor of each text; ``compute`` is called once with the distinct texts that are not in the cache, and
        what it returns is added. All are on the CPU."""
        tensors = dict(zip(texts, self.get_many(texts), strict=True))
        missing = [text for text, tensor in tensors.items() if tensor is None]
        if missing:
            computed = [tensor.detach().cpu() for tensor in compute(missing)]
            self.put_many(missing, computed)
            tensors |= dict(zip(missing, computed, strict=True))
        return [tensor for text in texts if (tensor := tensors[text]) is not None]

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            _log.warning(text)

    def _read_new_shards(self) -> None:
        for shard in sorted(set(self.folder.glob("*.safetensors")) - self._known):
            self._known.add(shard)
            try:
                if sha256_of(shard) != shard.stem:
                    raise ValueError("its bytes are not those that were written")
                with safe_open(shard, "pt") as file:
                    self._shard_of |= dict.fromkeys(file.keys(), shard)
            except (OSError, ValueError, SafetensorError) as error:
                self._forget(shard, str(error))

    def _forget(self, shard: Path, reason: str) -> None:
        _log.warning("%s is left out of the cache (%s); its tensors are computed again", shard, reason)
        with suppress(OSError):
            shard.unlink()
        self._known.discard(shard)
        self._shard_of = {key: other for key, other in self._shard_of.items() if other != shard}


def _key(text: str) -> str:
    # Text of JSON may hold surrogates that UTF-8 does not have.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
