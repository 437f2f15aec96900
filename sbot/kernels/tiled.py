"""The cost computed from the points, a tile of rows at a time: O(n + m) memory whatever the cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import final

import torch
from torch import Tensor

from ..arrays import transformed
from ..costs import Cost, augmented
from ..derivatives import pulled_back
from ..linalg import Eps, along
from .base import LogKernel

#: Points, evenly spaced in their order, that say where the middle of a cloud is.
SHOWN = 64


@final
class TiledKernel(LogKernel):
    """``C(x_i, y_j)`` on the fly.

    Where the cost embeds, ``-C_ij / eps = (u_i . v_j - |u_i|^2 / 2 - |v_j|^2 / 2) / eps`` and a tile of logits is one
    matrix product into the buffer.  The points are centred first: the expansion loses digits to a common offset.  The centre
    is that of most points, so that a few which are far off do not cost the others their digits.
    """

    def __init__(self, cost: Cost, x: Tensor, y: Tensor, *, flipped: bool = False) -> None:
        self.cost, self.x, self.y, self.flipped = cost, x, y, flipped
        rows, columns = (y, x) if flipped else (x, y)
        self.shape = (rows.shape[-2], columns.shape[-2])
        self.batch_shape, self.dtype, self.device = tuple(x.shape[:-2]), x.dtype, x.device

    def _over(self, x: Tensor, y: Tensor, flipped: bool) -> TiledKernel:
        out = TiledKernel(self.cost, x, y, flipped=flipped)
        out._tiled_as(self)
        return out

    @cached_property
    @torch.no_grad()
    def _embedded(self) -> tuple[Tensor, Tensor] | None:
        """Both sides, rows first, about their centre."""
        pair = self.cost.embed(self.x, self.y)
        if pair is None:
            return None
        u, v = pair[::-1] if self.flipped else pair
        centre = (_middle(u) + _middle(v)) / 2
        return (u - centre).contiguous(), (v - centre).contiguous()

    @property
    def T(self) -> TiledKernel:
        out = self._over(self.x, self.y, not self.flipped)
        if "_embedded" in self.__dict__:
            out._embedded = None if self._embedded is None else self._embedded[::-1]
        return out

    def take(self, index: Tensor) -> TiledKernel:
        return self._over(self.x[index], self.y[index], self.flipped)

    def on(self, leaves: Sequence[Tensor]) -> TiledKernel:
        x, y = leaves
        return self if x is self.x and y is self.y else self._over(x, y, self.flipped)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return self.x, self.y

    def pull_back(
        self, tiles: Iterator[tuple[slice, Tensor]], wanted: Sequence[bool] = (True, True)
    ) -> tuple[Tensor | None, ...]:
        if self._embedded is None:
            return self._pull_back_entries(tiles, wanted)
        # d C = sum_j w_ij (u_i - v_j) for u_i and sum_i w_ij (v_j - u_i) for v_j, then once through the embedding
        u, v = self._embedded
        d_u, d_v = torch.zeros_like(u), torch.zeros_like(v)
        at_u, at_v = wanted[::-1] if self.flipped else wanted
        for rows, w in tiles:
            if at_u:
                d_u[..., rows, :] = w.sum(-1)[..., None] * u[..., rows, :] - w @ v
            if at_v:
                d_v += w.sum(-2)[..., None] * v - w.mT @ u[..., rows, :]
        if self.flipped:
            d_u, d_v = d_v, d_u
        found = pulled_back(self.cost.embed, self.leaves, (d_u, d_v))
        return tuple(grad if asked else None for grad, asked in zip(found, wanted, strict=True))

    def _pull_back_entries(
        self, tiles: Iterator[tuple[slice, Tensor]], wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Any cost: autograd through one tile of entries at a time."""
        x, y = (leaf.detach() for leaf in self.leaves)
        grads = [torch.zeros_like(leaf) if asked else None for leaf, asked in zip((x, y), wanted, strict=True)]
        free = [side for side, asked in enumerate(wanted) if asked]
        here = 1 if self.flipped else 0
        for rows, w in tiles:
            parts = [x, y]
            parts[here] = parts[here][..., rows, :]

            def entries(*moving: Tensor, at: list[Tensor] = parts) -> Tensor:
                pair = list(at)
                for side, points in zip(free, moving, strict=True):
                    pair[side] = points
                return self.cost.matrix(*pair)

            got = pulled_back(entries, [parts[side] for side in free], w.mT if self.flipped else w)
            for side, grad in zip(free, got, strict=True):
                out = grads[side]
                if grad is None or out is None:
                    continue
                if side == here:
                    out[..., rows, :] = grad
                else:
                    out.add_(grad)
        return tuple(grads)

    @property
    def pulls_quickly(self) -> bool:
        return self._embedded is not None

    def entries(self, rows: slice | Tensor) -> Tensor:
        if self.flipped:
            return self.cost.matrix(self.x, self.y[..., rows, :]).mT
        return self.cost.matrix(self.x[..., rows, :], self.y)

    @property
    def rank(self) -> int | None:
        """Dimension of the embedding, None where there is none."""
        return None if self._embedded is None else self._embedded[0].shape[-1]

    def fill(self, rows: slice, out: Tensor) -> None:
        if self._embedded is None:
            super().fill(rows, out)
            return
        left, right = self._augmented
        _multiplied(left[..., rows, :], right, out).clamp_(min=0)

    @cached_property
    def _augmented(self) -> tuple[Tensor, Tensor]:
        assert self._embedded is not None
        return augmented(*self._embedded)

    def column(self, bias: Tensor, eps: Eps) -> Tensor:
        return bias if self._embedded is None else bias - self._embedded[1].square().sum(-1) / along(2 * eps, 1)

    def logits(self, rows: slice | Tensor, column: Tensor, eps: Eps, out: Tensor) -> Tensor:
        if self._embedded is None:
            return super().logits(rows, column, eps, out)
        u, v = self._embedded
        if not self.batch_shape and not isinstance(eps, Tensor):
            return torch.addmm(column, u[rows], v.mT, alpha=1 / eps, out=out)
        return _multiplied(u[..., rows, :], v, out).mul_(along(1 / eps, 2)).add_(column[..., None, :])

    def offset(self, eps: Eps, rows: slice | Tensor = slice(None)) -> Tensor | None:
        if self._embedded is None:
            return None
        return self._embedded[0][..., rows, :].square().sum(-1) / along(-2 * eps, 1)

    def bound(self) -> float:
        if self._embedded is not None and self._largest == math.inf:
            self.scale()
        return self._largest

    def scale(self) -> tuple[Tensor, Tensor]:
        if self._embedded is not None:
            u, v = (t.double() for t in self._embedded)
            square_u, square_v = u.square().sum(-1), v.square().sum(-1)
            mean = (square_u.mean(-1) + square_v.mean(-1)) / 2 - (u.mean(-2) * v.mean(-2)).sum(-1)
            largest = (square_u.amax(-1).sqrt() + square_v.amax(-1).sqrt()).square() / 2
            self._range = self._largest = float(largest.max())
            return mean, largest
        return super().scale()


def _multiplied(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """``left right'`` in ``out``."""
    if transformed():  # they know no out= here
        return out.copy_(torch.matmul(left, right.mT))
    return torch.matmul(left, right.mT, out=out)


def _middle(points: Tensor) -> Tensor:
    """In each coordinate about the median, ``(*b, 1, d)``; of some of the points where they are many."""
    some = points[..., :: max(1, -(-points.shape[-2] // SHOWN)), :]
    half = some.shape[-2] // 2
    return some.sort(-2).values[..., half : half + 1, :]
