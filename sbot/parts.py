"""Parts of a plan that exchange next to no mass, and the constants between them, which a marginal error does not see.

Where sums of some weights are nearly equal on both sides and eps is small, a plan falls into parts, and a constant moved from g
to f in one of them changes no digit of it.  What settles these constants ``c`` (in units of eps) is the little that is exchanged:
with ``M_kl`` the mass that goes from part k of mu to part l of nu, and ``d_k`` what mu has more in part k than nu,

    sum_l M_kl exp(c_k - c_l) - sum_l M_lk exp(c_l - c_k) = d_k    for each k.

It is solved one part at a time, as matrices are balanced (Osborne 1960), in logarithms.  Where sums are equal to rounding d is 0,
and the solution is the limit of those of exact numbers.  Swapping mu and nu turns c into -c.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .arrays import as_array

#: Sweeps over the parts at most, and the largest move that ends them.
SWEEPS, STILL = 100, 1e-9
ROUNDING = float(np.finfo(np.float64).eps)


def joined(log_plan: Tensor, a: Tensor, b: Tensor, least: float) -> Tensor | None:
    """What to add to ``f / eps`` and to subtract from ``g / eps``, ``(n + m,)``; None for one piece, or an atom without partner.

    ``log_plan`` is ``(n, m)`` for weights ``(n,)`` and ``(m,)``, which may be zero.  Atoms are in one part where more than the
    fraction ``least`` of the smaller one goes between them.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    entries, left, right = (as_array(part.double()) for part in (log_plan, a, b))
    n, live = len(left), np.concatenate([left, right]) > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        heavy = entries > np.log(np.minimum(left[:, None], right)) + np.log(max(least, ROUNDING))
    i, j = np.nonzero(heavy)
    links = coo_array((np.ones(len(i)), (i, j + n)), shape=(len(live), len(live)))
    label = connected_components(links, directed=False)[1]
    names, numbered = np.unique(label[live], return_inverse=True)
    if len(names) == 1:
        return None
    part = np.zeros(len(live), dtype=np.int64)
    part[live] = numbered
    masses = [np.bincount(part[side], w, len(names)) for side, w in ((slice(n), left), (slice(n, None), right))]
    if not ((masses[0] > 0) & (masses[1] > 0)).all():
        return None  # so rough a plan that nothing is settled by it
    excess = masses[0] - masses[1]
    excess[np.abs(excess) <= len(live) * ROUNDING * masses[0]] = 0.0
    flow = _summed(_summed(entries, part[:n], len(names)).T, part[n:], len(names)).T
    np.fill_diagonal(flow, -np.inf)
    move = _settled(flow, excess, np.log(max(least, ROUNDING)) + np.log(np.minimum.outer(masses[0], masses[0])))
    return torch.from_numpy(np.where(live, move[part], 0.0)).to(a.device)


def _summed(rows: np.ndarray, part: np.ndarray, count: int) -> np.ndarray:
    """Logarithms of the sums of the rows of each part, ``(count, m)``."""
    out = np.full((count, rows.shape[1]), -np.inf)
    for k in range(count):
        out[k] = np.logaddexp.reduce(rows[part == k], axis=0, initial=-np.inf)
    return out


def _settled(flow: np.ndarray, excess: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The constants for logarithms of masses ``flow`` ``(k, k)``, of which none is above ``most``."""
    count = len(flow)
    # where each may go while nothing more than `most` is exchanged, ways through others included; the start is its middle
    reach = np.maximum(most - flow, 0.0)
    np.fill_diagonal(reach, 0.0)
    for k in range(count):
        reach = np.minimum(reach, reach[:, k, None] + reach[k])
    reach = np.where(np.isfinite(reach) & np.isfinite(reach.T), reach, 0.0)
    move = (reach - reach.T).mean(1) / 2
    flow = flow + move[:, None] - move
    for _ in range(SWEEPS):
        largest = 0.0
        for k in range(count):
            out, back = np.logaddexp.reduce(flow[k]), np.logaddexp.reduce(flow[:, k])
            if not np.isfinite(out + back):
                continue
            step = (back - out) / 2 + np.sign(excess[k]) * _asinh(excess[k], (out + back) / 2)
            flow[k] += step
            flow[:, k] -= step
            move[k] += step
            largest = max(largest, abs(step))
        if largest <= STILL:
            break
    return move


def _asinh(excess: float, level: float) -> float:
    """``asinh(|excess| / 2 exp(level))``, which may be huge."""
    if excess == 0:
        return 0.0
    z = np.log(abs(excess) / 2) - level
    return float(z + np.log1p(np.sqrt(1 + np.exp(-2 * z)))) if z > 0 else float(np.arcsinh(np.exp(z)))
