"""The language model that an encoder was trained with, found again to describe what it embeds."""

from __future__ import annotations

from pathlib import Path

from ethogram.errors import InvalidInput
from services.language.models import LanguageModel, load_language_model
from services.resource.codec import ResourceCodec
from services.resource.language_model import default_folder
from services.runtime.cache import cache_folder

DEFAULT = "default"
"""What a spec calls the language model that is trained here once."""
FIELD = "language_model"


def load_reader(
    codec: ResourceCodec, device: str = "cpu", folder: Path | None = None, *, make: bool = False
) -> LanguageModel:
    """The language model of ``codec``: in ``folder``, else where it was found in training. ``make``: train the default
    one where it is in no cache.

    Raises :class:`InvalidInput` of ``language_model`` for one that cannot be found, and for another one than the
    encoder was trained with.
    """
    about = codec.about
    name, default = str(folder or about.get("language_model")), codec.spec.llm_model == DEFAULT
    if folder is None and default and codec.spec.language_model is None and not Path(name).exists():
        # Caches differ from machine to machine, and the name in them does not.
        kept = cache_folder(f"language-models/{Path(name).parent.name}") / Path(name).name
        if not kept.exists() and not make:
            advice = "`python -m services.resource describe` on this machine trains it again"
            raise InvalidInput.field(FIELD, f"the default one is not in the cache, {kept.parent}; {advice}")
        name = str(kept if kept.exists() else default_folder(device))
    language = load_language_model(name, device, about.get("language_model_dtype", "auto"), field=FIELD)
    if language.digest != about.get("language_model_digest"):
        text = f"{name} is not the language model that the encoder was trained with"
        raise InvalidInput.field(FIELD, f"{text}; give that one, or train the encoder again")
    return language
