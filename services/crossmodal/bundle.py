"""The former name of :mod:`services.crossmodal.codec`, for one version."""

import warnings

from services.crossmodal.codec import AUTO, PARTS, Behavior, Codec, Effect, Part, Strength

__all__ = ["AUTO", "PARTS", "Behavior", "Codec", "Effect", "Part", "Strength"]

warnings.warn("services.crossmodal.bundle is now services.crossmodal.codec", DeprecationWarning, stacklevel=2)
