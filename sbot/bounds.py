r"""Bounds on unregularised transport from whatever a solver of the entropic problem reached.

From above, the cost of a plan with the right marginals (`rounding`).  From below, a pair of potentials that is feasible for the
unregularised dual: any g with its hard transform,

.. math:: f_i = \min_j C_{ij} - g_j, \qquad \langle a, f\rangle + \langle b, g\rangle \le OT_0.

Of a partial plan each side is the least ``<r, f>`` over ``r <= a`` of the prescribed mass instead (`partial.support`).
"""

from __future__ import annotations

import math
from typing import NamedTuple, final

import torch
from torch import Tensor

from .kernels import COPIES, LogKernel
from .partial import lowered, support


@final
class Bounds(NamedTuple):
    """``lower <= OT_0 <= upper``, each ``(*b,)`` in float64; `gap` is their difference.

    Examples
    --------
    >>> import torch, sbot
    >>> x = torch.linspace(0, 1, 20, dtype=torch.float64)[:, None]
    >>> bounds = sbot.solve_bridge(x, x + 3, 0.01).bounds()      # unregularised transport costs 4.5
    >>> bool(bounds.lower <= 4.5 + 1e-12), bool(bounds.upper >= 4.5 - 1e-12), bool(bounds.gap < 0.01)
    (True, True, True)
    """

    lower: Tensor
    upper: Tensor

    @property
    def gap(self) -> Tensor:
        """``upper - lower``, ``(*b,)``; infinite where no feasible plan was found beside forbidden pairs."""
        return self.upper - self.lower


@torch.no_grad()
def lower_bound(kernel: LogKernel, a: Tensor, b: Tensor, f: Tensor, g: Tensor, mass: Tensor | None = None) -> Tensor:
    """The better of the unregularised dual from g and from f, ``(*b,)``; two transforms each, after which nothing changes.

    ``mass`` ``(*b,)`` is that of a partial plan, for which a and b are bounds.
    """
    best = torch.full(a.shape[:-1], -math.inf, dtype=a.dtype, device=a.device)
    for side, here, there, start in ((kernel, a, b, g), (kernel.T, b, a, f)):
        near = _transform(side, start, there)
        near = near if mass is None else lowered(near, here, mass)
        far = _transform(side.T, near, here)
        best = torch.maximum(best, _paired(here, near, mass) + _paired(there, far, mass))
    return best


def _transform(kernel: LogKernel, g: Tensor, b: Tensor) -> Tensor:
    """``min_j C_ij - g_j`` over the atoms that have weight, ``(*b, n)``; streamed."""
    g = torch.where(b > 0, g, -torch.inf)[..., None, :]
    kernel.copies = COPIES
    # one tensor for all: small ones that stay between the tiles would keep their memory from being used again
    out = g.new_empty((*kernel.batch_shape, kernel.shape[0]))
    for rows in kernel.tiles():
        out[..., rows] = (kernel.entries(rows) - g).amin(-1)
    return out


def _paired(a: Tensor, f: Tensor, mass: Tensor | None) -> Tensor:
    return torch.where(a > 0, a * f, 0.0).sum(-1) if mass is None else support(lowered(f, a, mass), a, mass)
