"""The former name of :mod:`services.crossmodal.codec`, for one version."""

import warnings

from ethogram.specs.edits import Behavior, Strength
from services.crossmodal.codec import AUTO, Codec, Effect
from services.crossmodal.codec_files import PARTS, Part

__all__ = ["AUTO", "PARTS", "Behavior", "Codec", "Effect", "Part", "Strength"]

warnings.warn("services.crossmodal.bundle is now services.crossmodal.codec", DeprecationWarning, stacklevel=2)
