"""The former name of :mod:`services.crossmodal.codec`, for one version."""

import warnings

from services.crossmodal.codec import Codec

__all__ = ["Codec"]

warnings.warn("services.crossmodal.bundle is now services.crossmodal.codec", DeprecationWarning, stacklevel=2)
