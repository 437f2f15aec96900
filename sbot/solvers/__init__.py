"""Solvers: each finds two potentials (or two drifts) and hands them to a bridge."""

from __future__ import annotations

from .base import Progress, Solver
from .closed_form import ClosedForm
from .dsb import DSB
from .dsbm import DSBM
from .lightsb import LightSB
from .plugin import PlugIn
from .schedule import Schedule
from .sinkhorn import Sinkhorn

__all__ = ["DSB", "DSBM", "ClosedForm", "LightSB", "PlugIn", "Progress", "Schedule", "Sinkhorn", "Solver"]
