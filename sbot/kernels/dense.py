"""The cost stored as a matrix: for problems that fit the memory budget, and for costs given as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from ..linalg import Eps
from .base import LogKernel

#: Entries up to which a gradient in the matrix is of no account.
LIGHT = 2**20


@final
class DenseKernel(LogKernel):
    """``C`` itself, ``(*b, n, m)``.

    Parameters
    ----------
    stored : ``C``, or what problems share of it: leading dimensions of ``batch_shape`` that it lacks are not copied.
    batch_shape : ``*b``; None is that of ``stored``.
    """

    #: eps and ``exp(-C / eps)``, once it was asked for
    _gibbs: tuple[float, Tensor] | None = None

    def __init__(self, stored: Tensor, batch_shape: tuple[int, ...] | None = None) -> None:
        self.batch_shape = tuple(stored.shape[:-2]) if batch_shape is None else batch_shape
        self.shape = (stored.shape[-2], stored.shape[-1])
        whole = (*self.batch_shape, *self.shape)
        self.stored, self.matrix = stored, stored if stored.shape == whole else stored.expand(whole)
        self.dtype, self.device = stored.dtype, stored.device
        self.by_rows = stored.stride(-1) == 1 or self.shape[1] == 1

    def _over(self, stored: Tensor, batch_shape: tuple[int, ...]) -> DenseKernel:
        out = DenseKernel(stored, batch_shape)
        out._tiled_as(self)
        out.ends = self.ends  # of all problems of a batch, and so of each
        return out

    @property
    def T(self) -> DenseKernel:
        return self._over(self.stored.mT, self.batch_shape)

    def take(self, index: Tensor) -> DenseKernel:
        own = self.stored.ndim == self.matrix.ndim
        return self._over(self.stored[index] if own else self.stored, (len(index), *self.batch_shape[1:]))

    def on(self, leaves: Sequence[Tensor]) -> DenseKernel:
        return self._over(leaves[0], self.batch_shape)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.stored,)

    def pull_back(
        self, tiles: Iterator[tuple[slice, Tensor]], wanted: Sequence[bool] = (True,)
    ) -> tuple[Tensor | None, ...]:
        out = torch.empty_like(self.stored)
        for rows, tile in tiles:
            if tile.shape == out.shape:  # all of it, in memory of its own
                out = tile
                continue
            out[..., rows, :] = tile.sum_to_size(out[..., rows, :].shape)
        return (out,)

    @property
    def shares(self) -> bool:
        """Whether the problems of a batch have one matrix."""
        return bool(self.batch_shape) and self.stored.ndim == 2

    def gibbs(self, bias: Tensor, eps: Eps) -> Tensor | None:
        if not self.shares or isinstance(eps, Tensor) or not self._flat(bias, eps):
            return None
        if self._gibbs is None or self._gibbs[0] != eps:
            self._gibbs = eps, torch.mul(self.stored.detach(), -1 / eps).exp_()
        return self._gibbs[1]

    @property
    def pulls_quickly(self) -> bool:
        return self.stored.ndim == self.matrix.ndim and self.size <= LIGHT

    def bound(self) -> float:
        return self._largest if self.ends is None else max(map(abs, self.ends))

    def entries(self, rows: slice | Tensor) -> Tensor:
        return self.matrix[..., rows, :]

    def buffer(self, rows: int) -> Tensor:
        if self.by_rows:
            return super().buffer(rows)
        # a transposed view: lay the tile out as the matrix is, or every operation strides through memory
        shape = (*self.batch_shape, self.shape[1], rows)
        return torch.empty(shape, dtype=self.dtype, device=self.device).mT
