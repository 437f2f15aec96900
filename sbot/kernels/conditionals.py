"""The conditional laws of a plan, kept: what iterations between two passes over the kernel work on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from .. import linalg
from ..arrays import transformed
from ..linalg import Eps
from .base import FLOOR, LogKernel, Pass
from .dense import DenseKernel

#: Entries smaller than this, of a row that sums to one, are left out.
CUT = 1e-9
#: Entries smaller than this are 0 in single precision: products would be denormal numbers, see `base.exp2`.
LEAST = 2.0**-70
#: Share of entries up to which the sparse form is made: the dense one is quicker to fill, and not much slower beyond.
SPARSE = 0.05
#: Entries of a tile that say whether it is full.
SOME = 4096
#: Entries below which a matrix is so quickly multiplied that no other form is worth making.
SMALL = 2**16
#: Entries up to which a model is in double precision: nothing is rounded then, and passes are saved.  Products take longer, so
#: that where few iterations are expected there may be more entries.
DOUBLE, DOUBLE_WHERE_FEW = 2**18, 2**21
#: Entries of a sparse model, and of a vector, up to which products are those of arrays.
FEW, SHORT = 2**17, 2**12
#: Bytes of an entry of the sparse form: two values in double precision and two column numbers.
SPARSE_BYTES = 32


class Laws(NamedTuple):
    """Conditional laws ``K_ij = exp(bias_j - C_ij / eps - lse_i)`` that lack nothing, and what they were made with.

    Problems that share a cost may share K, ``(n, m)``, with 0 for bias and lse.
    """

    laws: Tensor
    bias: Tensor
    lse: Tensor

    def scales(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """``r, c`` with ``r_i K_ij c_j = exp(left_i + right_j - C_ij / eps)``."""
        rows, columns = torch.exp(left + self.lse), torch.exp(right - self.bias)
        # of columns without weight the bias is -inf as well
        return rows, torch.where(right == -torch.inf, 0.0, columns)

    def scaled(self, rows: Tensor, columns: Tensor) -> Tensor:
        """``r_i K_ij c_j``, in the place of a K that is not shared."""
        if self.laws.ndim <= rows.ndim:
            return rows[..., None] * self.laws * columns[..., None, :]
        return self.laws.mul_(rows[..., None]).mul_(columns[..., None, :])


@final
class Conditionals:
    """``K_ij = P_ij / r_i``, close to the plan it was filled from, ``(*b, n, m)``.

    Single precision where large, and sparse where nearly all entries are nothing: it is a model of the plan, which saves
    work, and never decides a result.  What it leaves out of each row and column is known to whoever fills it, from the same pass.

    Parameters
    ----------
    kernel : gives shape and device.
    memory : bytes allowed.  Where the matrix does not fit, only a sparse one is kept; where that does not fit, nothing is.
    few : whether few iterations are expected.
    """

    def __init__(self, kernel: LogKernel, memory: int, few: bool = False) -> None:
        self.memory, self.few = memory, few
        self.shape, self.batch_shape, self.device = kernel.shape, kernel.batch_shape, kernel.device
        self.pairs = math.prod(self.batch_shape) * kernel.shape[0] * kernel.shape[1]
        # products with sparse rows need MKL on a CPU
        usable = torch.backends.mkl.is_available() if self.device.type == "cpu" else self.device.type == "cuda"  # type: ignore[no-untyped-call]
        self.sparse_works = usable and not self.batch_shape
        self.most = int(min(SPARSE * self.pairs, memory / SPARSE_BYTES))
        small = self.pairs <= (DOUBLE_WHERE_FEW if few else DOUBLE)
        kept = torch.float64 if small and 8 * self.pairs <= memory else torch.float32
        fits = kept.itemsize * self.pairs <= memory
        one = kernel.stored if isinstance(kernel, DenseKernel) and kernel.shares else None
        self._may_share = one is not None and one.numel() * one.itemsize <= memory
        # what problems share may be all that is ever kept of them
        self._later = kept if fits and self._may_share else None
        self.dense = self._empty(kept) if fits and not self._may_share else None
        self._unrounded = kept == kernel.dtype == torch.float64
        self._cut = kept == torch.float32 and kernel.dtype == torch.float64
        # a pass may be made in place: where it is sure to stay, or so small that it is no loss where it does not
        whole = not self.batch_shape or kernel.whole
        self._in_place = (
            self.dense is not None
            and kept == kernel.dtype
            and whole
            and kernel.by_rows
            and (small or not self.sparse_works)
        )
        self._pieces: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._rows: Tensor | None = None
        self._columns: Tensor | None = None
        self._arrays: _Arrays | None = None
        self._shared: _Shared | None = None
        self._made_with: tuple[Tensor, ...] = ()
        self.share = 1.0

    def _empty(self, dtype: torch.dtype) -> Tensor:
        return torch.empty((*self.batch_shape, *self.shape), dtype=dtype, device=self.device)

    @property
    def cut(self) -> bool:
        """Whether entries below `LEAST` are missing, which may be all of a column."""
        return self._cut and self._shared is None

    def like(self, kernel: LogKernel) -> Conditionals:
        """An empty one for another kernel, with the same memory."""
        return Conditionals(kernel, self.memory, self.few)

    @property
    def possible(self) -> bool:
        """Whether there is room for anything at all."""
        return self.dense is not None or self._may_share or (self.sparse_works and self.most > 0)

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded or left out."""
        if self._shared is not None:
            return self._shared.kernel.dtype == torch.float64
        return self._unrounded and not self.sparse

    @property
    def sparse(self) -> bool:
        """Whether the sparse form is in use."""
        return self._rows is not None

    def resolves(self, spread: float, error: float) -> bool:
        """Whether an ``error`` of marginals that it shows, at potentials moved by ``spread`` in units of eps, is a pass's."""
        return self.exact or (not self.sparse and 4 * torch.finfo(torch.float32).eps * spread <= 0.01 * error)

    @property
    def room(self) -> Tensor | None:
        """Memory in which a pass may make its tiles: fresh memory, and a copy, cost more than small problems."""
        return self.dense if self._in_place else None

    def lent(self, kernel: LogKernel, eps: Eps) -> Laws | None:
        """The laws of ``kernel`` themselves, where nothing is missing or raised; what is done to them is done to this."""
        if self._shared is not None and self.exact:
            return Laws(
                self._shared.kernel, *(torch.zeros_like(part) for part in (self._shared.right, self._shared.left))
            )
        if not self.exact or self.dense is None or not self._made_with:
            return None
        laws = Laws(self.dense, *self._made_with)
        return laws if kernel.depth(laws.bias, eps) <= -FLOOR[kernel.dtype] else None

    def open(self) -> None:
        """Forget what is kept; `keep` may be called for the new tiles."""
        self._rows = self._columns = self._arrays = self._shared = None
        self._made_with = ()
        # where few iterations are expected nearly all entries are something
        sparse = self.sparse_works and (self.dense is None or self.pairs > (DOUBLE_WHERE_FEW if self.few else SMALL))
        self._pieces, self._kept = ([] if sparse else None), 0

    def keep(self, rows: slice, tile: Tensor) -> bool:
        """Take a tile of rows, which may be those of `room`; whether there is room for more.  See `LogKernel.conditionals`."""
        if self._later is not None:
            self.dense, self._later = self._empty(self._later), None
        placed = self.dense is not None and tile._base is self.dense
        if self._pieces is not None:
            flat = tile.reshape(-1)
            # counted first: to list all of a full tile takes longer than to copy it; and some before all
            some = _some(flat)
            full = int((some > CUT).count_nonzero()) * len(flat) > 2 * (self.most - self._kept) * len(some)
            if not full:
                large = flat > CUT
                self._kept += int(large.count_nonzero())
            if not full and self._kept <= self.most:
                index = large.nonzero()[:, 0]
                starts = torch.arange(rows.stop - rows.start, device=self.device) * self.shape[1]
                ends = self._kept - len(index) + torch.searchsorted(index, starts)
                self._pieces.append((ends, index % self.shape[1], flat[index]))
                return True
            self._recover(rows, placed)
        if self.dense is not None and not placed:
            if self.cut:
                tile = torch.threshold_(tile, LEAST, 0.0)
            self.dense[..., rows, :].copy_(tile)
        return self.dense is not None

    def _recover(self, rows: slice, placed: bool) -> None:
        """Too many entries for the sparse form: from here on dense, where there is room."""
        pieces, self._pieces = self._pieces, None
        if self.dense is None or placed or not pieces:
            return
        start = self.dense[: rows.start].zero_()
        begins, column, values = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        row = torch.searchsorted(begins, torch.arange(len(values), device=self.device), right=True) - 1
        start[row, column] = values.to(start.dtype)

    def close(self, seen: Pass | None = None, bias: Tensor | None = None) -> bool:
        """All tiles of a pass with this ``bias`` are in: whether there is anything to work with."""
        made_with: tuple[Tensor, ...] = ()
        if seen is not None and bias is not None:
            made_with = bias, seen.lse
            if seen.shared is not None:
                self.share = 1.0
                self._shared = _Shared(seen.shared, (-seen.lse).exp().double(), bias.exp().double())
                return True
        if self._pieces is None:
            self.share, self._made_with = 1.0, made_with
            return self.dense is not None
        begins, index, values = (torch.cat(parts) for parts in zip(*self._pieces, strict=True))
        self._pieces = None
        self.share = len(values) / self.pairs
        ends = torch.cat([begins, begins.new_full((1,), len(values))])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch calls its sparse rows a beta
            self._rows = torch.sparse_csr_tensor(ends, index, values.double(), self.shape, check_invariants=False)
            flipped = self._rows.to_sparse_csc()
            self._columns = torch.sparse_csr_tensor(
                flipped.ccol_indices(),
                flipped.row_indices(),
                flipped.values(),
                self.shape[::-1],
                check_invariants=False,
            )
        return True

    def products(self) -> tuple[Any, Callable[[Tensor], Any], Callable[[Any], Tensor]]:
        """Whose `times` and `transposed_times` are quickest, with the ways to its vectors and back, which share memory.

        They are those of arrays where few entries are in double precision on the CPU: an operation on few numbers costs a tensor
        several times what it costs an array.  Else the model itself.
        """
        if self.batch_shape or self.device.type != "cpu" or transformed():
            return self, same, same
        if self._rows is not None and self._columns is not None:
            if len(self._rows.values()) > FEW or max(self.shape) > SHORT:
                return self, same, same
            self._arrays = self._arrays or _Arrays(_as_scipy(self._rows), _as_scipy(self._columns))
        elif self.dense is not None and self.dense.dtype == torch.float64 and self.pairs <= DOUBLE:
            laws = self.dense.numpy()
            self._arrays = self._arrays or _Arrays(laws, laws.T)
        return (self, same, same) if self._arrays is None else (self._arrays, Tensor.numpy, torch.from_numpy)

    def times(self, v: Tensor) -> Tensor:
        """``K v``, ``(*b, n)``, in float64."""
        if self._shared is not None:
            return self._shared.times(v)
        if self._rows is not None:
            return self._rows @ v
        assert self.dense is not None
        return linalg.product(self.dense, v.to(self.dense.dtype)).double()

    def transposed_times(self, u: Tensor) -> Tensor:
        """``K' u``, ``(*b, m)``, in float64."""
        if self._shared is not None:
            return self._shared.T.times(u)
        if self._columns is not None:
            return self._columns @ u
        assert self.dense is not None
        return _scaled_product(self.dense.mT, u)

    def squares(self, w: Tensor) -> Tensor:
        """``sum_i w_i K_ij^2``, ``(*b, m)``."""
        if self._shared is not None:
            return self._shared.T.squared().times(w)
        if self._columns is not None:
            c = self._columns
            squared = torch.sparse_csr_tensor(
                c.crow_indices(), c.col_indices(), c.values().square(), c.shape, check_invariants=False
            )
            return squared @ w
        assert self.dense is not None
        out = torch.zeros((*self.batch_shape, self.shape[1]), dtype=torch.float64, device=self.device)
        step = max(1, 2**20 // max(1, self.pairs // self.shape[0]))
        for start in range(0, self.shape[0], step):
            part = self.dense[..., start : start + step, :]
            if part.dtype == torch.float32:
                # squares of smaller ones would be denormal
                part = torch.threshold(part, 2.0**-60, 0.0)
            part = part.square()
            out += linalg.product(part.mT, w[..., start : start + step].to(part.dtype))
        return out


def _some(entries: Tensor) -> Tensor:
    """`SOME` of them, spread evenly, and in step with no matrix: multiples of the golden ratio."""
    if len(entries) <= SOME:
        return entries
    place = torch.arange(SOME, dtype=torch.float64, device=entries.device) * ((math.sqrt(5) - 1) / 2) % 1
    return entries[(place * len(entries)).long()]


def same(vector: Tensor) -> Tensor:
    """The vector."""
    return vector


class _Shared(NamedTuple):
    """``K_ij = left_i G_ij right_j`` with one ``G = exp(-C / eps)``, ``(n, m)``, for all problems of a batch."""

    kernel: Tensor
    left: Tensor
    right: Tensor

    @property
    def T(self) -> _Shared:
        return _Shared(self.kernel.mT, self.right, self.left)

    def squared(self) -> _Shared:
        """Each entry squared."""
        return _Shared(self.kernel.square(), self.left.square(), self.right.square())

    def times(self, v: Tensor) -> Tensor:
        return self.left * _scaled_product(self.kernel, self.right * v)


def _scaled_product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Of a matrix in single precision with a vector that may have numbers which single precision has not; in float64."""
    if matrix.dtype == vector.dtype:
        return linalg.product(matrix, vector)
    top = vector.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny)
    return linalg.product(matrix, (vector / top).to(matrix.dtype)).double() * top


class _Arrays:
    """The products of `Conditionals` on arrays; the matrix and its transpose may be sparse."""

    def __init__(self, laws: Any, transposed: Any) -> None:
        self.laws, self.transposed = laws, transposed

    def times(self, v: Any) -> Any:
        return self.laws @ v

    def transposed_times(self, u: Any) -> Any:
        return self.transposed @ u


def _as_scipy(rows: Tensor) -> Any:
    """Sparse rows of torch as those of SciPy, which share memory."""
    from scipy.sparse import csr_array

    parts = (rows.values().numpy(), rows.col_indices().numpy(), rows.crow_indices().numpy())
    return csr_array(parts, shape=tuple(rows.shape))
