"""Kernels: the reductions that every solver and every bridge is made of, over one contract (`LogKernel`)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import linalg
from ..arrays import refuse_forward_mode
from ..costs import Cost, MatrixCost
from .base import COPIES, FLOOR, LN2, TILE_BYTES, LogKernel, Pass, share_of, weigh
from .conditionals import Conditionals, Laws, same
from .dense import DenseKernel
from .tiled import TiledKernel

__all__ = [
    "COPIES",
    "FLOOR",
    "LN2",
    "TILE_BYTES",
    "Conditionals",
    "DenseKernel",
    "Laws",
    "LogKernel",
    "Pass",
    "TiledKernel",
    "given",
    "make_kernel",
    "room_beside",
    "same",
    "share_of",
    "store",
    "weigh",
]

#: Dimensions up to which a cost that embeds is computed anew each time.
CHEAP = 16


def make_kernel(cost: Cost, x: Tensor, y: Tensor, *, memory: int = 0) -> LogKernel:
    """The kernel between ``x`` ``(*b, n, d)`` and ``y`` ``(*b, m, d)``: stored within ``memory`` bytes, else tiled.

    A cost that embeds in a few dimensions is as quickly computed as read, and never stored.  The budget counts the matrix
    and the conditional laws that a solver keeps beside it.  A cost that was given as a matrix is stored already.
    """
    if isinstance(cost, MatrixCost):
        return given(cost, cost.matrix(x, y))
    refuse_forward_mode(x, y)
    tiled = TiledKernel(cost, x, y)
    pairs = math.prod(x.shape[:-1]) * y.shape[-2]
    if 2 * pairs * x.element_size() > memory or (tiled.rank is not None and tiled.rank <= CHEAP):
        return tiled
    shared = [points.ndim > 2 and all(step == 0 for step in points.stride()[:-2]) for points in (x, y)]
    if all(shared):  # points that all problems share have one matrix
        first = (0,) * (x.ndim - 2)
        return DenseKernel(store(TiledKernel(cost, x[first], y[first])).matrix, tiled.batch_shape)
    return store(tiled)


def given(cost: MatrixCost, values: Tensor) -> DenseKernel:
    """The kernel of a cost that was given as a matrix, on these of its ``values``."""
    refuse_forward_mode(values)
    kernel = DenseKernel(values, cost.batch_shape)
    kernel.ends = cost.ends
    return kernel


def room_beside(kernel: LogKernel, cost: Cost, memory: int) -> int:
    """What is left of ``memory`` bytes beside a stored kernel; a matrix that was given does not count."""
    if not isinstance(kernel, DenseKernel) or isinstance(cost, MatrixCost):
        return memory
    return max(0, memory - kernel.stored.numel() * kernel.dtype.itemsize)


def store(kernel: LogKernel) -> DenseKernel:
    """Compute and keep all entries, tile by tile into one allocation."""
    with torch.no_grad(), linalg.full_precision():
        matrix = torch.empty((*kernel.batch_shape, *kernel.shape), dtype=kernel.dtype, device=kernel.device)
        for rows in kernel.tiles():
            kernel.fill(rows, matrix[..., rows, :])
    return DenseKernel(matrix)
