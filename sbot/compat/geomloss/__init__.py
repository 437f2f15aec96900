"""GeomLoss's interface: ``import sbot.compat.geomloss as geomloss``, or ``from sbot.compat.geomloss import SamplesLoss, ot``."""

from __future__ import annotations

from typing import Any

from . import ot
from .loss import SamplesLoss

__all__ = ["SamplesLoss", "ot"]


def __getattr__(name: str) -> Any:
    """What is not here is GeomLoss's own, where it is installed."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import geomloss
    except ImportError:
        raise AttributeError(
            f"{name} is not among what sbot.compat.geomloss has ({', '.join(__all__)}); for GeomLoss's own: "
            "pip install geomloss"
        ) from None
    return getattr(geomloss, name)
