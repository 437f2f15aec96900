"""``ot.partial``: POT's, all of it."""

from __future__ import annotations

from ._arrays import forwarder

__getattr__ = forwarder("partial")
