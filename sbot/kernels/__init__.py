"""Kernels: the reductions that every solver and every bridge is made of, over one contract (`LogKernel`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..costs import Cost, MatrixCost
from .base import LogKernel, Pass
from .conditionals import Conditionals
from .dense import DenseKernel
from .memory import require_memory
from .tiled import TiledKernel

__all__ = ["Conditionals", "DenseKernel", "LogKernel", "Pass", "TiledKernel", "make_kernel", "require_memory", "store"]


def make_kernel(cost: Cost, x: Tensor, y: Tensor, *, memory: int = 0) -> LogKernel:
    """The kernel between ``x`` ``(*b, n, d)`` and ``y`` ``(*b, m, d)``: stored within ``memory`` bytes, else tiled.

    The budget counts the matrix and the conditional laws that a solver keeps beside it.  A cost that was given as a
    matrix is stored already.
    """
    if isinstance(cost, MatrixCost):
        return DenseKernel(cost.matrix(x, y))
    pairs = math.prod(x.shape[:-1]) * y.shape[-2]
    if 2 * pairs * x.element_size() <= memory:
        return store(TiledKernel(cost, x, y))
    return TiledKernel(cost, x, y)


def store(kernel: LogKernel) -> DenseKernel:
    """Compute and keep all entries, tile by tile into one allocation."""
    with torch.no_grad():
        matrix = torch.empty((*kernel.batch_shape, *kernel.shape), dtype=kernel.dtype, device=kernel.device)
        for rows in kernel.tiles():
            matrix[..., rows, :] = kernel.entries(rows)
    return DenseKernel(matrix)
