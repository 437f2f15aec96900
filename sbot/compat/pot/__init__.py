"""``import sbot.compat.pot as ot``: POT's functions for entropic transport, solved by sbot; the others are POT's.

Signatures, defaults, return types, log keys and warm starts are those of POT 0.9.7.  NumPy arrays and torch tensors go in
and come out, with dtype and device kept.  docs/compat/pot.md has the units, what differs and why.
"""

from __future__ import annotations

from . import batch, bregman, da, partial, solvers, unbalanced, utils
from ._arrays import forwarder
from ._solve import strict
from .batch import dist_batch, solve_batch, solve_sample_batch
from .bregman import sinkhorn, sinkhorn2
from .da import sinkhorn_lpl1_mm
from .solvers import solve, solve_sample
from .unbalanced import sinkhorn_unbalanced, sinkhorn_unbalanced2
from .utils import dist, unif

__all__ = [
    "batch",
    "bregman",
    "da",
    "dist",
    "dist_batch",
    "partial",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_lpl1_mm",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
    "solvers",
    "strict",
    "unbalanced",
    "unif",
    "utils",
]

__getattr__ = forwarder("")
