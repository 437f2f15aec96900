"""The one numerical contract: log-sum-exp and softmax means over the rows of ``bias_j - C_ij / eps``.

Everything that is linear in the mass of a plan is made of these two reductions: Sinkhorn's half-steps, the entropic map,
the drift, the density.  A backend says how the entries of ``C`` come to hand; the loop over row tiles is here, once.
Tiles are small enough to stay in cache and one buffer serves them all: on a CPU, fresh memory costs more than arithmetic.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import linalg

#: Bytes of one tile: on a CPU small enough to stay in cache, on an accelerator large enough to fill it.
TILE_BYTES = 2**22
ACCELERATOR_TILE_BYTES = 2**27
LN2 = math.log(2)


class LogKernel(ABC):
    """``C_ij`` between ``n`` rows and ``m`` columns, ``(*b, n, m)``, and the reductions over it."""

    shape: tuple[int, int]
    batch_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    #: bytes of one tile; None picks by device
    tile_bytes: int | None = None

    @property
    @abstractmethod
    def T(self) -> LogKernel:
        """The same kernel with rows and columns exchanged; shares memory."""

    @abstractmethod
    def entries(self, rows: slice) -> Tensor:
        """``C[rows]``, ``(*b, r, m)``; may be a view, so never write into it.  Differentiable where C is."""

    @property
    @abstractmethod
    def requires_grad(self) -> bool:
        """Whether C depends on something that wants a gradient."""

    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and largest of ``|C|`` over the finite entries (the largest may be an upper bound), ``(*b,)``."""
        total = torch.zeros(self.batch_shape, dtype=torch.float64, device=self.device)
        count, top = total.clone(), total.clone()
        with torch.no_grad():
            for rows in self.tiles():
                c = self.entries(rows)
                finite = torch.isfinite(c)
                c = c.masked_fill(~finite, 0).abs()
                total += c.sum((-2, -1), dtype=torch.float64)
                count += finite.sum((-2, -1))
                top = torch.maximum(top, c.amax((-2, -1)).double())
        return total / count, top

    def column(self, bias: Tensor, eps: float) -> Tensor:
        """What each column contributes to the logits by itself, ``(*b, m)``; computed once for all tiles."""
        return bias

    def logits(self, rows: slice, column: Tensor, eps: float, out: Tensor) -> Tensor:
        """``bias_j - C_ij / eps - offset_i`` for these rows, written into ``out``; see `column` and `offset`."""
        return torch.add(column[..., None, :], self.entries(rows), alpha=-1 / eps, out=out)

    def offset(self, eps: float) -> Tensor | None:
        """``offset_i``, ``(*b, n)``: what `logits` leaves out of each row because it is cheaper to add at the end."""
        return None

    def buffer(self, rows: int) -> Tensor:
        """Scratch memory for one tile."""
        return torch.empty((*self.batch_shape, rows, self.shape[1]), dtype=self.dtype, device=self.device)

    def tiles(self) -> Iterator[slice]:
        """Row slices that cover the kernel."""
        n, m = self.shape
        batch = math.prod(self.batch_shape)
        size = self.tile_bytes or (TILE_BYTES if self.device.type == "cpu" else ACCELERATOR_TILE_BYTES)
        step = max(1, min(n, size // (batch * m * self.dtype.itemsize)))
        for start in range(0, n, step):
            yield slice(start, min(start + step, n))

    def reduce(self, bias: Tensor, eps: float, values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``lse_i = log sum_j exp(bias_j - C_ij / eps)`` and ``avg_i``, the softmax-weighted mean of ``values_j``.

        ``bias`` is ``(*b, m)`` (``-inf`` drops a column), ``values`` ``(*b, m, p)``; the results are ``(*b, n)`` and
        ``(*b, n, p)``.  Memory is one tile.  Differentiable: the backward pass recomputes tile by tile.
        """
        wanted = self.requires_grad or bias.requires_grad or (values is not None and values.requires_grad)
        with linalg.full_precision():
            if torch.is_grad_enabled() and wanted:
                return self._reduce_differentiable(bias, eps, values)
            with torch.no_grad():
                return self._reduce_in_place(bias, eps, values)

    def _reduce_in_place(self, bias: Tensor, eps: float, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        n = self.shape[0]
        lse = torch.empty((*self.batch_shape, n), dtype=self.dtype, device=self.device)
        avg = (
            None if values is None else torch.empty((*lse.shape, values.shape[-1]), dtype=lse.dtype, device=lse.device)
        )
        scratch: Tensor | None = None
        # base 2: exp2 is three times as fast as exp here, and does not slow down where it underflows
        unit = eps * LN2
        column = self.column(bias / LN2, unit)
        for rows in self.tiles():
            size = rows.stop - rows.start
            if scratch is None or scratch.shape[-2] < size:
                scratch = self.buffer(size)
            z = self.logits(rows, column, unit, scratch[..., :size, :])
            top = z.amax(-1, keepdim=True)
            top = top.masked_fill(top == -torch.inf, 0)  # an empty row: 2^-inf = 0, not NaN
            total = z.sub_(top).exp2_().sum(-1)
            lse[..., rows] = top.squeeze(-1) + total.log2()
            if avg is not None and values is not None:
                avg[..., rows, :] = (z @ values) / total[..., None]
        offset = self.offset(unit)
        return (lse if offset is None else lse.add_(offset)).mul_(LN2), avg

    def _reduce_differentiable(self, bias: Tensor, eps: float, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        def tile(rows: slice, bias: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
            z = bias[..., None, :] - self.entries(rows) / eps
            return z.logsumexp(-1), None if values is None else z.softmax(-1) @ values

        parts = [
            checkpoint(tile, rows, bias, values, use_reentrant=False, preserve_rng_state=False) for rows in self.tiles()
        ]
        lse = torch.cat([part[0] for part in parts], -1)
        return lse, None if values is None else torch.cat([part[1] for part in parts], -2)
