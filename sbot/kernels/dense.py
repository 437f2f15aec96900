"""The cost stored as a matrix: for problems that fit the memory budget, and for costs given as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from .base import LogKernel


@final
class DenseKernel(LogKernel):
    """``C`` itself, ``(*b, n, m)``."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = (matrix.shape[-2], matrix.shape[-1])
        self.batch_shape, self.dtype, self.device = tuple(matrix.shape[:-2]), matrix.dtype, matrix.device

    @property
    def T(self) -> DenseKernel:
        return DenseKernel(self.matrix.mT)

    def take(self, index: Tensor) -> DenseKernel:
        return DenseKernel(self.matrix[index])

    def on(self, leaves: Sequence[Tensor]) -> DenseKernel:
        return DenseKernel(leaves[0])

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.matrix,)

    def pull_back(self, tiles: Iterator[tuple[slice, Tensor]]) -> tuple[Tensor | None, ...]:
        out = torch.empty_like(self.matrix)
        for rows, tile in tiles:
            out[..., rows, :] = tile
        return (out,)

    def entries(self, rows: slice) -> Tensor:
        return self.matrix[..., rows, :]

    def buffer(self, rows: int) -> Tensor:
        if self.matrix.stride(-1) == 1 or self.shape[1] == 1:
            return super().buffer(rows)
        # a transposed view: lay the tile out as the matrix is, or every operation strides through memory
        shape = (*self.batch_shape, self.shape[1], rows)
        return torch.empty(shape, dtype=self.dtype, device=self.device).mT
