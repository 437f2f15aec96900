"""Pairs from a plan: the permutation of least cost, and cells of a dense plan drawn in proportion to their mass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidProblem


@torch.no_grad()
def match(cost: Tensor, prices: Tensor | None = None) -> Tensor:
    """The permutation ``s`` of least ``sum_i C[i, s(i)]`` for a finite cost ``(n, n)``, as ``(n,)`` on its device.

    Shortest augmenting paths (Jonker and Volgenant 1987) in float64, on the CPU: exact whatever ``prices`` is.  Each row takes
    its best column after prices, and a path is searched for each row that came too late.  With the potential g of an entropic
    plan of small eps as prices few rows are left, and their paths are short.

    Examples
    --------
    >>> import torch
    >>> from sbot.pairing import match
    >>> match(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([1, 0])
    """
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1]:
        raise InvalidProblem(f"the cost has shape {tuple(cost.shape)}; a permutation needs (n, n)")
    c = cost.double().cpu().numpy()
    if not np.isfinite(c).all():
        raise InvalidProblem("the cost has entries that are NaN or infinite; give finite costs")
    v = c.min(0) if prices is None else prices.double().cpu().numpy().copy()
    reduced = c - v
    first = reduced.argmin(1)
    u = np.take_along_axis(reduced, first[:, None], 1)[:, 0]
    owner = [-1] * len(c)  # of a column
    late = []
    for i, j in enumerate(first.tolist()):
        if owner[j] < 0:
            owner[j] = i
        else:
            late.append(i)
    for i in late:
        _augment(c, u, v, owner, i)
    out = torch.empty(len(c), dtype=torch.int64)
    out[torch.tensor(owner)] = torch.arange(len(c))
    return out.to(cost.device)


def _augment(c: np.ndarray, u: np.ndarray, v: np.ndarray, owner: list[int], i: int) -> None:
    """Dijkstra's path in reduced costs ``c - u - v >= 0`` from row i to a column without owner; then along it all move on."""
    ahead = c[i] - v - u[i]
    before = np.full(len(v), i)  # the row from which a column was reached
    seen: list[int] = []
    lengths: list[float] = []
    while True:
        j = int(ahead.argmin())
        length = float(ahead[j])
        row = owner[j]
        if row < 0:
            break
        seen.append(j)
        lengths.append(length)
        reach = c[row] - v
        reach += length - u[row]
        nearer = reach < ahead
        nearer[seen] = False
        ahead[nearer] = reach[nearer]
        before[nearer] = row
        ahead[j] = np.inf
    rest = length - np.array(lengths)
    v[seen] -= rest
    u[[owner[k] for k in seen]] += rest
    u[i] += length
    back = {owner[k]: k for k in seen}
    while True:
        row = int(before[j])
        owner[j] = row
        if row == i:
            return
        j = back[row]


@torch.no_grad()
def quantile(mass: Tensor, level: Tensor) -> Tensor:
    """Of cells of this mass ``(*b, k)`` the first up to which more than the share ``level (*b, n)`` in [0, 1) lies, ``(*b, n)``.

    At uniform levels this is a draw with replacement; cells without mass are never drawn.
    """
    ladder = mass.double().cumsum(-1)
    top = ladder[..., -1:]
    cell = torch.searchsorted(ladder, level.double() * top, right=True)
    # a product that rounds up to the total is in the last cell that has mass
    return torch.minimum(cell, torch.searchsorted(ladder, top.contiguous()))


@torch.no_grad()
def distinct(mass: Tensor, n: int, *, generator: torch.Generator | None = None) -> Tensor:
    """``n`` cells of ``(*b, k)`` drawn one after the other, each from what is left, ``(*b, n)``: no cell comes twice.

    Raises `InvalidProblem` where fewer than ``n`` cells have mass.
    """
    fewest = int((mass > 0).sum(-1).min())
    if fewest < n:
        raise InvalidProblem(f"the plan has {fewest} entries > 0; draw at most {fewest} without replacement")
    uniform = torch.rand(mass.shape, dtype=torch.float64, device=mass.device, generator=generator).clamp_(min=1e-300)
    # the first of independent exponential clocks with these rates to ring, the second, ...
    clock = torch.log(-torch.log1p(-uniform)) - mass.double().log()
    return clock.topk(n, -1, largest=False).indices
