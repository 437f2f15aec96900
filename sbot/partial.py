r"""Partial transport: marginals that are bounds, and a mass that is prescribed.

Over plans with ``P 1 <= a``, ``P' 1 <= b`` and ``sum P = s`` the dual of ``<P, C> + eps KL(P | a b)`` has multipliers
``f <= 0``, ``g <= 0`` of the bounds and ``lambda`` of the mass, ``P = a b exp((f + g + lambda - C) / eps)``.  Complementary
slackness makes the largest f and the largest g zero, so that with lambda shared between them, and written f and g again,

.. math:: D = \langle a, f\rangle - (\Sigma a - s) \max f + \langle b, g\rangle - (\Sigma b - s) \max g
    - \varepsilon (\Sigma P - \Sigma a \Sigma b), \qquad \lambda = \max f + \max g.

This is a lower bound for any f and g, since ``<r, f> >= <a, f> - (sum a - s) max f`` for sums r of rows that are allowed.  Its
half-step is that of a hard marginal, capped where the masses ``min(a_i, t a_i e^{lse_i})`` sum to s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


def capped(log_w: Tensor, lse: Tensor, mass: Tensor, near: Tensor | None = None) -> Tensor:
    """``min(-lse_i, log t)`` with ``sum_i min(w_i, t w_i e^{lse_i}) = mass``: the half-step in units of eps, ``(*b, n)``.

    ``log_w`` and ``lse`` are ``(*b, n)``, ``mass`` is ``(*b,)``; the result is float64.  Atoms of no weight, or that nothing
    reaches, are at the cap.  Where the same atoms are at the cap as for log t ``near``, ``(*b, 1)``, nothing is sorted.
    """
    log_w, lse, s = log_w.double(), lse.double(), mass.double()[..., None]
    reached = (log_w > -torch.inf) & (lse > -torch.inf)
    key = torch.where(reached, -lse, torch.inf)
    if near is not None:
        loose = key > near
        rest = s - torch.where(loose, 0.0, log_w.exp()).sum(-1, keepdim=True)
        level = rest.log() - torch.where(loose, log_w - key, -torch.inf).logsumexp(-1, keepdim=True)
        # a level that is not finite is of no atoms, or of a mass that is used up
        if bool(((loose == (key > level)) & level.isfinite()).all()):
            return torch.minimum(key, level)
    order = key.sort(-1)
    keys = order.values
    w = torch.where(reached, log_w, -torch.inf).gather(-1, order.indices)
    full = w.exp().cumsum(-1)
    # log of sum_{i > k} w_i e^{lse_i}, for the k smallest keys full
    loose = torch.where(keys < torch.inf, w - keys, -torch.inf).flip(-1).logcumsumexp(-1).flip(-1)
    rest = torch.cat([loose[..., 1:], torch.full_like(s, -torch.inf)], -1)
    sums = full + torch.where(rest > -torch.inf, keys + rest, -torch.inf).exp()
    count = ((sums <= s) & (keys < torch.inf)).sum(-1, keepdim=True)
    # between the last key that is full and the first that is not
    low = torch.where(count > 0, keys.gather(-1, (count - 1).clamp(min=0)), -torch.inf)
    high = torch.where(count < keys.shape[-1], keys.gather(-1, count.clamp(max=keys.shape[-1] - 1)), torch.inf)
    used = torch.where(count > 0, full.gather(-1, (count - 1).clamp(min=0)), 0.0)
    tail = loose.gather(-1, count.clamp(max=keys.shape[-1] - 1))
    open_ = (tail > -torch.inf) & (count < keys.shape[-1])
    level = torch.where(open_, (s - used).clamp(min=torch.finfo(torch.float64).tiny).log() - tail, low)
    return torch.minimum(key, torch.maximum(torch.minimum(level, high), low))


def masses(log_w: Tensor, lse: Tensor, mass: Tensor, height: Tensor | None = None) -> Tensor:
    """``min(w_i, t w_i e^{lse_i})``, which sum to ``mass``; float64.  ``height`` is what `capped` made of the same, if known."""
    reached = (log_w > -torch.inf) & (lse > -torch.inf)
    exponent = log_w.double() + lse.double() + (capped(log_w, lse, mass) if height is None else height)
    return torch.where(reached, exponent, -torch.inf).exp()


def ceiling(potential: Tensor, weights: Tensor) -> Tensor:
    """``max f`` over the atoms that have weight, ``(*b, 1)``."""
    return torch.where(weights > 0, potential, -torch.inf).amax(-1, keepdim=True)


def support(potential: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """``<w, f> - (sum w - s) max f``: what one side contributes to the dual, ``(*b,)``."""
    top = ceiling(potential, weights)
    below = torch.where(weights > 0, potential - top, 0.0)
    return (weights * below).sum(-1) + mass.to(below) * top[..., 0]


def lowered(potential: Tensor, weights: Tensor, mass: Tensor) -> Tensor:
    """``min(f, t)`` for the t at which `support` is largest: that of the dearest atom of the cheapest ``mass``, ``(*b, n)``."""
    height = torch.where(weights > 0, potential, torch.inf)
    order = height.sort(-1)
    held = weights.gather(-1, order.indices).cumsum(-1)
    last = torch.searchsorted(held, mass.to(held)[..., None]).clamp(max=weights.shape[-1] - 1)
    # rounding of the sums leads to no atom without weight
    last = torch.minimum(last, (weights > 0).sum(-1, keepdim=True) - 1)
    return torch.minimum(potential, order.values.gather(-1, last))


def violation(sums: Tensor, weights: Tensor, height: Tensor, mass: Tensor) -> Tensor:
    """How far sums ``c`` are from optimal for potentials ``eps height``, relative to the mass, ``(*b,)``:

    ``sum_j max(c_j - w_j, 0) + max(w_j - c_j, 0) min(1, max height - height_j) + |sum c - s|``, over s: what exceeds the
    bounds, what is left of atoms whose multiplier says that nothing should be, and the mass itself.
    """
    below = (ceiling(height, weights) - height).clamp(max=1.0)
    each = (sums - weights).clamp(min=0) + (weights - sums).clamp(min=0) * torch.where(weights > 0, below, 0.0)
    return (each.sum(-1) + (sums.sum(-1) - mass).abs()) / mass


@final
@dataclass(frozen=True)
class Merged:
    """Atoms that share one multiplier, taken as one: their sum, shared out in proportion to ``weights``.

    Atoms at the cap move together, and only their common mass is prescribed: Newton's equations are those of a problem in
    which they are one atom.
    """

    which: Tensor
    weights: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        kept, share = (torch.where(self.which, part, 0.0) for part in (v, self.weights))
        whole = share.sum(-1, keepdim=True).clamp(min=torch.finfo(v.dtype).tiny)
        return torch.where(self.which, share * (kept.sum(-1, keepdim=True) / whole), v)
