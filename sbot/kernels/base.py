"""The one numerical contract: log-sum-exp and softmax means over the rows of ``bias_j - C_ij / eps``.

Everything that is linear in the mass of a plan is made of these two reductions: Sinkhorn's half-steps, the entropic map,
the drift, the density.  A backend says how the entries of ``C`` come to hand; the loop over row tiles is here, once.
Tiles are small enough to stay in cache and one buffer serves them all: on a CPU, fresh memory costs more than arithmetic.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import derivatives, linalg
from ..arrays import refuse_vmap, transformed
from ..linalg import Eps, along

#: Bytes of one tile: on a CPU small enough to stay in cache, on an accelerator large enough to fill it.
TILE_BYTES = 2**23
ACCELERATOR_TILE_BYTES = 2**27
#: Rows of a tile at least, where nothing limits its size: products with fewer take twice as long, in cache or not.
FEWEST = 8
#: Arrays that a caller makes of each tile where it works in float64 and out of place.
COPIES = 8
LN2 = math.log(2)
#: Exponents of two below which an entry of a row that sums to about one is nothing; denormal numbers are ten times slower.
FLOOR = {torch.float64: -900.0, torch.float32: -90.0}
#: Rows whose masses are added up in the dtype of a pass before they go into sums in double precision.
ADDED = 256
#: Rows of a tile that say what costs are on average, at least.
ROWS = 64
#: Entries from which on it pays to look whether exponentials can do without their largest.
MANY = 2**15

#: what a pass shows its tiles to: rows, and the conditional laws ``K_ij`` of these rows; answers whether to show more
Keep = Callable[[slice, Tensor], bool]


class Pass(NamedTuple):
    """What one pass over a plan finds: ``lse_i``, the masses of rows ``r_i`` and of columns ``c_j`` (in float64).

    Where problems share ``exp(-C / eps)``, ``(n, m)``, and it was all that was looked at, it is here too.
    """

    lse: Tensor
    rows: Tensor
    columns: Tensor
    shared: Tensor | None = None


class Base(NamedTuple):
    """The base of the powers in a pass: its logarithm, powers in place, and logarithms to it."""

    log: float
    power: Callable[[Tensor], Tensor]
    logarithm: Callable[[Tensor], Tensor]


NATURAL, BINARY = Base(1.0, torch.exp_, torch.log), Base(LN2, torch.exp2_, torch.log2)


class LogKernel(ABC):
    """``C_ij`` between ``n`` rows and ``m`` columns, ``(*b, n, m)``, and the reductions over it."""

    shape: tuple[int, int]
    batch_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    #: bytes of one tile; None picks by device
    tile_bytes: int | None = None
    #: how many arrays of its size a caller makes of each tile
    copies: int = 1
    #: whether tiles are laid out row by row
    by_rows = True
    #: the tile of `conditionals`, kept from one pass to the next: fresh memory costs more than small problems
    _scratch: Tensor | None = None
    #: how far apart any two entries are at most, and how large the largest is, where `scale` has looked at them
    _range = _largest = math.inf
    #: the least and the largest entry, where these are known
    ends: tuple[float, float] | None = None

    def _tiled_as(self, other: LogKernel) -> None:
        """Make no larger tiles than ``other``."""
        self.tile_bytes, self.copies = other.tile_bytes, other.copies

    @property
    @abstractmethod
    def T(self) -> LogKernel:
        """The same kernel with rows and columns exchanged; shares memory."""

    @abstractmethod
    def entries(self, rows: slice | Tensor) -> Tensor:
        """``C[rows]``, ``(*b, r, m)``, of a slice or of numbers of rows.

        It may be a view, so never write into it.  Differentiable where C is.
        """

    @abstractmethod
    def take(self, index: Tensor) -> LogKernel:
        """These problems of a batch, ``(k,)``."""

    def fill(self, rows: slice, out: Tensor) -> None:
        """``C[rows]`` into ``out``, as quickly as it goes; without gradients."""
        out.copy_(self.entries(rows))

    @abstractmethod
    def on(self, leaves: Sequence[Tensor]) -> LogKernel:
        """The same kernel over these `leaves`."""

    @property
    def size(self) -> int:
        """How many entries there are."""
        return math.prod((*self.batch_shape, *self.shape))

    @property
    @abstractmethod
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that C is computed from; `reduce` is differentiable in them."""

    @abstractmethod
    def pull_back(
        self, tiles: Iterator[tuple[slice, Tensor]], wanted: Sequence[bool] = (True, True)
    ) -> tuple[Tensor | None, ...]:
        """Gradients in the leaves that are ``wanted``, given the gradient in C as tiles of rows (consumed one at a time)."""

    def pulled(self, tiles: Iterator[tuple[slice, Tensor]], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """`pull_back`, and the tiles for what else they are made of where no leaf is wanted."""
        if any(wanted):
            return self.pull_back(tiles, wanted)
        for _ in tiles:
            pass
        return (None,) * len(wanted)

    @property
    def pulls_quickly(self) -> bool:
        """Whether `pull_back` adds little to a pass, and memory that is of no account, for each problem of a batch by itself."""
        return False

    def scale(self) -> tuple[Tensor, Tensor]:
        """Mean and largest of ``|C|`` over the finite entries, ``(*b,)``.

        The largest may be an upper bound, and the mean that of some rows where the ends are known.
        """
        total: Any = 0.0
        count: Any = 0
        tops: list[Tensor] = []
        least, most = math.inf, -math.inf
        with torch.no_grad():
            for rows in self.tiles():
                c = self.entries(rows)
                low, high = self.ends or (float(end) for end in torch.aminmax(c))
                least, most = min(least, low), max(most, high)
                plain = low >= 0 and math.isfinite(high)
                known = plain and not self.batch_shape
                if known and self.ends is not None:
                    c = c[:: max(1, len(c) // ROWS)]
                if plain:
                    count += c.shape[-2] * c.shape[-1]
                else:
                    finite = torch.isfinite(c)
                    c = c.masked_fill(~finite, 0).abs()
                    count += finite.sum((-2, -1))
                total += c.sum((-2, -1), dtype=torch.float64)
                tops.append(torch.full_like(total, high) if known else c.amax((-2, -1)).double())
        self._range, self._largest = most - least, max(most, -least)
        return total / count, functools.reduce(torch.maximum, tops)

    def column(self, bias: Tensor, eps: Eps) -> Tensor:
        """What each column contributes to the logits by itself, ``(*b, m)``; computed once for all tiles."""
        return bias

    def logits(self, rows: slice | Tensor, column: Tensor, eps: Eps, out: Tensor) -> Tensor:
        """``bias_j - C_ij / eps - offset_i`` for these rows, written into ``out``; see `column` and `offset`."""
        return weigh(self.entries(rows), column, eps, out)

    def offset(self, eps: Eps, rows: slice | Tensor = slice(None)) -> Tensor | None:
        """``offset_i``, ``(*b, r)``: what `logits` leaves out of each row because it is cheaper to add at the end."""
        return None

    def inner(self, rows: slice, tile: Tensor) -> Tensor:
        """``sum_ij W_ij C_ij`` over a tile W of these rows, ``(*b,)``; where W is 0 the cost may be infinite."""
        return torch.where(tile == 0, 0.0, tile * self.entries(rows)).sum((-2, -1))

    def buffer(self, rows: int) -> Tensor:
        """Scratch memory for one tile."""
        return torch.empty((*self.batch_shape, rows, self.shape[1]), dtype=self.dtype, device=self.device)

    def tiles(self) -> Iterator[slice]:
        """Row slices that cover the kernel."""
        n, m = self.shape
        batch = math.prod(self.batch_shape)
        size = self.tile_bytes or (TILE_BYTES if self.device.type == "cpu" else ACCELERATOR_TILE_BYTES) // self.copies
        least = FEWEST if self.tile_bytes is None and self.copies == batch == 1 else 1
        step = max(1, min(n, max(least, size // (batch * m * self.dtype.itemsize))))
        for start in range(0, n, step):
            yield slice(start, min(start + step, n))

    def reduce(self, bias: Tensor, eps: Eps, values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """``lse_i = log sum_j exp(bias_j - C_ij / eps)`` and ``avg_i``, the softmax-weighted mean of ``values_j``.

        ``bias`` is ``(*b, m)`` (``-inf`` drops a column), ``values`` ``(*b, m, p)``; the results are ``(*b, n)`` and
        ``(*b, n, p)``.  Memory is one tile, and that of the first derivative too; derivatives of it are dense.  ``eps`` is a
        number for all problems, or ``(*b,)``; where it wants a gradient it may be 0-dimensional.
        """
        inputs = (eps, bias, values, *self.leaves)
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs):
            lse, avg = _Reduction.apply(self, *inputs)  # type: ignore[no-untyped-call]
            return lse, None if values is None else avg
        with torch.no_grad(), linalg.full_precision():
            return self._reduce_in_place(bias, linalg.plain(eps), values)

    def _reduce_in_place(self, bias: Tensor, eps: Eps, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        n = self.shape[0]
        lse = torch.empty((*self.batch_shape, n), dtype=self.dtype, device=self.device)
        avg = (
            None if values is None else torch.empty((*lse.shape, values.shape[-1]), dtype=lse.dtype, device=lse.device)
        )
        scratch: Tensor | None = None
        # base 2: exp would take many times as long where it underflows
        unit = eps * LN2
        column = self.column(bias / LN2, unit)
        many = self.device.type == "cpu" and math.prod(self.batch_shape) * n * self.shape[1] >= MANY
        flat = many and not transformed() and self._flat(bias, eps)
        for rows in self.tiles():
            size = rows.stop - rows.start
            if scratch is None or scratch.shape[-2] < size:
                scratch = self.buffer(size)
            z = self.logits(rows, column, unit, scratch[..., :size, :])
            if flat:  # half of the sweeps over the tile
                total = z.exp2_().sum(-1)
                lse[..., rows] = total.log2()
            else:
                top = z.amax(-1, keepdim=True)
                top = top.masked_fill(top == -torch.inf, 0)  # an empty row: 2^-inf = 0, not NaN
                total = exp2(z.sub_(top)).sum(-1)
                lse[..., rows] = top.squeeze(-1) + total.log2()
            if avg is not None and values is not None:
                avg[..., rows, :] = (z @ values) / total[..., None]
        offset = self.offset(unit)
        return (lse if offset is None else lse.add_(offset)).mul_(LN2), avg

    def depth(self, bias: Tensor, eps: Eps) -> float:
        """How many powers of two lie between any two logits at most; atoms that have no part do not count."""
        span = self._range
        if not math.isfinite(span):
            low, high = self.ends or (-self.bound(), self.bound())
            span = high - low
        if not math.isfinite(span):
            return math.inf
        low, high = _ends(bias)
        least = float(eps.min()) if isinstance(eps, Tensor) else eps
        return (high - low + span / least) / LN2

    def bound(self) -> float:
        """No entry is larger, of either sign, as far as that is known, or quick to tell."""
        return self._largest

    def _flat(self, bias: Tensor, eps: Eps) -> bool:
        """Whether no logit is so large, of either sign, that exponentials of them need their largest taken away first."""
        largest = self.bound()
        if not math.isfinite(largest):
            return False
        low, high = _ends(bias)
        level = max(abs(low), abs(high))
        least = float(eps.min()) if isinstance(eps, Tensor) else eps
        return (level + largest / least) / LN2 <= -FLOOR[self.dtype] / 2

    def gibbs(self, bias: Tensor, eps: Eps) -> Tensor | None:
        """``exp(-C / eps)``, ``(n, m)``, where the problems of a batch share it and nothing in it is lost; None elsewhere."""
        return None

    @property
    def whole(self) -> bool:
        """Whether all rows are in one tile."""
        return next(self.tiles()).stop == self.shape[0]

    def conditionals(
        self,
        bias: Tensor,
        eps: Eps,
        weights: Tensor | Callable[[Tensor], Tensor],
        power: Eps,
        keep: Keep | None = None,
        room: Tensor | None = None,
    ) -> Pass:
        """One pass over the plan ``P_ij = r_i K_ij`` with ``K`` the softmax over j of ``bias_j - C_ij / eps``.

        The row masses are ``r_i = weights_i exp(power lse_i)``, with a power for all or ``(*b, 1)``: the number 0 prescribes
        them.  ``weights`` may be a function of the lse of all rows where they are in one tile.  What one pass can know of P is
        returned, and ``keep`` is shown the tiles of K, each gone when the next is made, or none where there is a `gibbs`
        kernel of which all that is returned is then made.  Memory is one tile; where there is
        ``room``, ``(*b, n, m)``, the tiles are made and left there.  Entries of K below ``2^FLOOR`` may be raised to it: a
        column mass of that size says only that the mass is smaller.
        """
        shared = None if keep is None else self.gibbs(bias, eps)
        if shared is not None:
            return _shared_pass(shared, bias, weights, power)
        lse = torch.empty((*self.batch_shape, self.shape[0]), dtype=self.dtype, device=self.device)
        mass = torch.empty_like(lse)
        # single precision sums of a hundred thousand rows would lose what the columns differ by
        columns = torch.zeros(bias.shape, dtype=torch.float64, device=self.device)
        part, added = (columns if self.dtype == columns.dtype else torch.zeros_like(bias)), 0
        # exp is quicker than exp2, but many times slower where something has no weight, or underflows
        base = BINARY if bool((bias == -torch.inf).any()) else NATURAL
        unit = eps * base.log
        column, offset = self.column(bias / base.log, unit), self.offset(unit)
        flat, floor = self._flat(bias, eps), FLOOR[self.dtype] * LN2 / base.log
        deep = not flat and self.depth(bias, eps) > -FLOOR[self.dtype]
        with torch.no_grad(), linalg.full_precision():
            for rows in self.tiles():
                size = rows.stop - rows.start
                if room is None and (self._scratch is None or self._scratch.shape[-2] < size):
                    self._scratch = self.buffer(size)
                out = room[..., rows, :] if room is not None else self._scratch[..., :size, :]  # type: ignore[index]
                z = self.logits(rows, column, unit, out)
                if not flat:  # else two sweeps over the tile less
                    top = z.amax(-1, keepdim=True)
                    top = top.masked_fill_(top == -torch.inf, 0)  # an empty row: e^-inf = 0, not NaN
                    z = z.sub_(top)
                total = base.power(z.clamp_(min=floor) if deep else z).sum(-1)
                level = base.logarithm(total) if flat else top.squeeze(-1) + base.logarithm(total)
                level = (level if offset is None else level + offset[..., rows]) * base.log
                share = _row_masses(weights[..., rows] if isinstance(weights, Tensor) else weights, power, level)
                lse[..., rows], mass[..., rows] = level, share
                total = total.clamp_(min=torch.finfo(self.dtype).tiny)
                linalg.add_product(part, z.mT, share / total)
                added += size
                if part is not columns and (added >= ADDED or rows.stop == self.shape[0]):
                    columns += part
                    part.zero_()
                    added = 0
                if keep is not None and not keep(rows, z.mul_(total.reciprocal_()[..., None])):
                    keep = None
        return Pass(lse, mass, columns)

    def softmax_tiles(self, bias: Tensor, eps: Eps, lse: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """``exp(bias_j - C_ij / eps - lse_i)`` by tiles of rows, all in one buffer: each is gone when the next is made."""
        unit = eps * LN2
        column, offset = self.column(bias / LN2, unit), self.offset(unit)
        level = (lse / LN2 if offset is None else lse / LN2 - offset).masked_fill(lse == -torch.inf, 0)
        scratch: Tensor | None = None
        for rows in self.tiles():
            size = rows.stop - rows.start
            if scratch is None or scratch.shape[-2] < size:
                scratch = self.buffer(size)
            z = self.logits(rows, column, unit, scratch[..., :size, :])
            yield rows, exp2(z.sub_(level[..., rows, None]))


def _row_masses(weights: Tensor | Callable[[Tensor], Tensor], power: Eps, lse: Tensor) -> Tensor:
    """``weights_i exp(power lse_i)``, or what the function makes of lse; see `LogKernel.conditionals`."""
    if not isinstance(weights, Tensor):
        return weights(lse)
    if not isinstance(power, Tensor) and power == 0:
        return weights
    # where nothing weighs, the exponential may overflow
    return torch.where(weights > 0, weights * torch.exp(power * lse), 0.0)


@torch.no_grad()
def _shared_pass(shared: Tensor, bias: Tensor, weights: Tensor | Callable[[Tensor], Tensor], power: Eps) -> Pass:
    """`LogKernel.conditionals` by products with the one ``exp(-C / eps)`` of all problems."""
    with linalg.full_precision():
        scaling = bias.exp()
        total = linalg.product(shared, scaling)
        lse = total.log()
        # not the weights themselves: masses of some problems are written over
        mass = torch.empty_like(lse).copy_(_row_masses(weights, power, lse))
        share, columns = mass / total, torch.zeros(bias.shape, dtype=torch.float64, device=bias.device)
        step = ADDED if bias.dtype == torch.float32 else len(shared)
        for start in range(0, len(shared), step):
            columns += linalg.product(shared[start : start + step].mT, share[..., start : start + step])
    return Pass(lse, mass, columns * scaling, shared)


def _ends(bias: Tensor) -> tuple[float, float]:
    """The least and the largest, of atoms that have a part."""
    low, high = (float(end) for end in torch.aminmax(bias))
    if low == -math.inf:
        low = float(torch.where(bias == -torch.inf, high, bias).min())
    return low, high


def exp2(z: Tensor) -> Tensor:
    """``2^z`` in place, and 0 below ``2^FLOOR`` in single precision.

    Denormal numbers, and those that make such in products, are nothing beside a sum of one, and cost some processors a hundred
    times as much.  In double precision there are few.
    """
    if z.dtype == torch.float64:
        return z.exp2_()
    floor = FLOOR[z.dtype]
    return torch.threshold_(z.clamp_(min=floor - 1).exp2_(), 2**floor, 0.0)


def weigh(cost: Tensor, bias: Tensor, eps: Eps, out: Tensor) -> Tensor:
    """``bias_j - C_ij / eps`` for a tile of costs, written into ``out``."""
    if isinstance(eps, Tensor):
        return torch.mul(cost, along(-1 / eps, 2), out=out).add_(bias[..., None, :])
    return torch.add(bias[..., None, :], cost, alpha=-1 / eps, out=out)


class _Reduction(torch.autograd.Function):
    """`LogKernel.reduce` with its adjoint: with the softmax weights p and the gradients l of lse and a of avg,

    ``d bias_j = sum_i w_ij``, ``d C_ij = -w_ij / eps``, ``d values_j = sum_i p_ij a_i``, ``d eps = sum_ij w_ij C_ij / eps^2``,
    ``w_ij = p_ij (l_i + <a_i, values_j - avg_i>)``.
    """

    @staticmethod
    def forward(
        kernel: LogKernel, eps: Eps, bias: Tensor, values: Tensor | None, *leaves: Tensor
    ) -> tuple[Tensor, Tensor]:
        with linalg.full_precision():
            lse, avg = kernel.on(leaves)._reduce_in_place(bias, linalg.plain(eps), values)
        return lse, lse.new_empty(0) if avg is None else avg

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kernel, eps, bias, values, *leaves = inputs
        ctx.eps = None if isinstance(eps, Tensor) else eps
        ctx.save_for_backward(eps if ctx.eps is None else None, bias, values, *output, *leaves)

    @staticmethod
    def backward(ctx: Any, grad_lse: Tensor, grad_avg: Tensor) -> tuple[Tensor | None, ...]:
        refuse_vmap(grad_lse, "the gradient")
        refuse_vmap(grad_avg, "the gradient")
        given, bias, values, lse, avg, *leaves = ctx.saved_tensors
        inputs = [ctx.eps if given is None else given, bias, values, *leaves]
        wanted = ctx.needs_input_grad[1:]

        def number(*moved: Tensor) -> Tensor:
            eps, bias, values, *leaves = derivatives.filled(inputs, wanted, moved)
            return _written_out(ctx.kernel.on(leaves), eps, bias, values, grad_lse, grad_avg)

        def stream() -> list[Tensor | None]:
            with linalg.full_precision():
                return _streamed(ctx.kernel.on(leaves), inputs, lse, avg, grad_lse, grad_avg, wanted)

        grads = derivatives.of_number(number, inputs, wanted, stream, (grad_lse, grad_avg), ctx.kernel.size)
        return None, *grads


def _streamed(
    kernel: LogKernel,
    inputs: Sequence[Any],
    lse: Tensor,
    avg: Tensor,
    grad_lse: Tensor,
    grad_avg: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of `_Reduction` by tiles."""
    given, bias, values = inputs[:3]
    eps = linalg.plain(given)
    # tiles of half the size fit where those of the solve were, though small tensors may lie there now
    kernel.copies = max(2, kernel.copies)
    to_eps, to_bias, to_values, *to_leaves = wanted
    d_bias = torch.zeros_like(bias) if to_bias else None
    d_values = torch.zeros_like(values) if to_values else None
    d_eps = torch.zeros(kernel.batch_shape, dtype=bias.dtype, device=bias.device) if to_eps else None
    base = grad_lse if values is None else grad_lse - (grad_avg * avg).sum(-1)

    def tiles() -> Iterator[tuple[slice, Tensor]]:
        for rows, p in kernel.softmax_tiles(bias, eps, lse):
            weight = base[..., rows, None]
            if d_values is not None:
                d_values.add_(p.mT @ grad_avg[..., rows, :])
            if values is not None:
                weight = weight + grad_avg[..., rows, :] @ values.mT
            w = p.mul_(weight)
            if d_bias is not None:
                d_bias.add_(w.sum(-2))
            w.mul_(along(-1 / eps, 2))
            if d_eps is not None:
                d_eps.sub_(kernel.inner(rows, w))
            yield rows, w

    grads = kernel.pulled(tiles(), to_leaves)
    return [share_of(given, d_eps, eps), d_bias, d_values, *grads]


def _written_out(
    kernel: LogKernel, eps: Eps, bias: Tensor, values: Tensor | None, grad_lse: Tensor, grad_avg: Tensor
) -> Tensor:
    """``<grad_lse, lse> + <grad_avg, avg>``, densely."""
    c, free = kernel.entries(slice(None)), bias > -torch.inf
    live = torch.isfinite(c) & free[..., None, :]
    some = live.any(-1, keepdim=True)
    z = torch.where(free, bias, 0.0)[..., None, :] - torch.where(live, c, 0.0) / along(eps, 2)
    z = torch.where(live, z, torch.where(some, -torch.inf, 0.0))
    total = torch.where(some[..., 0], grad_lse * z.logsumexp(-1), 0.0).sum()
    if values is not None:
        total = total + torch.where(some, grad_avg * (z.softmax(-1) @ values), 0.0).sum()
    return total


def share_of(given: Eps | None, slope: Tensor | None, eps: Eps) -> Tensor | None:
    """The gradient in eps from ``eps`` times that of each problem, ``(*b,)``: summed where one number is for all."""
    if not isinstance(given, Tensor) or slope is None:
        return None
    total = slope / eps
    return (total if given.ndim else total.sum()).to(given)
