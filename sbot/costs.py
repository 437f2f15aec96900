"""Costs ``C(x, y)`` between points; in the units of eps."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from . import derivatives, linalg
from .arrays import as_number, as_tensor, compute_dtype, in_problem
from .errors import InvalidProblem


class Cost(ABC):
    """A cost between points; a subclass writes `matrix` and nothing else."""

    @abstractmethod
    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        """``C(x_i, y_j)`` for ``(*b, n, d)`` and ``(*b, m, d)``, as ``(*b, n, m)``."""

    def embed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """``(u, v)`` with ``C(x_i, y_j) = |u_i - v_j|^2 / 2`` where there is such a pair: it streams fastest."""
        return None

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raise `InvalidProblem` where the cost is not defined on these points, or leaves the dtype's range."""
        pair = self.embed(x, y)
        if pair is not None:
            spread = torch.cat(pair, -2).detach()
            spread = (spread.amax(-2) - spread.amin(-2)).norm(dim=-1).amax()
            _check_range(spread.square(), x.dtype)


def _check_range(bound: Tensor, dtype: torch.dtype) -> None:
    """An infinite cost would read as a forbidden pair."""
    if not float(bound) < torch.finfo(dtype).max:
        raise InvalidProblem(f"the cost overflows {dtype}; rescale the points (and eps with them) or use float64")


def _square_distances(u: Tensor, v: Tensor) -> Tensor:
    """``|u_i - v_j|^2 / 2``; float32 points are multiplied in float64, since the expansion cancels."""
    centre = v.detach().mean(-2, keepdim=True)
    u, v = (u - centre).double(), (v - centre).double()
    half = u.square().sum(-1)[..., :, None] / 2 + v.square().sum(-1)[..., None, :] / 2
    return (half - u @ v.mT).clamp(min=0)


def augmented(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``(-u, |u|^2 / 2, 1)`` and ``(v, 1, |v|^2 / 2)``, whose products are ``|u_i - v_j|^2 / 2``.

    One matrix product, and no sweep over the matrix for what rows and columns add.  It cancels: centre the points first.
    """
    near, far = (part.square().sum(-1, keepdim=True) / 2 for part in (u, v))
    return torch.cat([-u, near, torch.ones_like(near)], -1), torch.cat([v, torch.ones_like(far), far], -1)


@final
class Quadratic(Cost):
    """``C(x, y) = |x - y|^2 / 2``, what the Brownian reference charges.

    Examples
    --------
    >>> import torch, sbot
    >>> sbot.Quadratic().matrix(torch.zeros(1, 2), torch.ones(1, 2))
    tensor([[1.]])
    """

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        return _square_distances(x, y).to(x.dtype)

    def embed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y

    def __repr__(self) -> str:
        return "Quadratic()"


@final
class TransitionCost(Cost):
    """``C(x, y) = (y - Phi x - c)' Q^-1 (y - Phi x - c) / 2``: what a linear reference charges for going from x to y.

    The reference builds it: ``X_1 | X_0 = x`` is ``N(Phi x + c, eps Q)``.
    """

    def __init__(self, phi: Tensor, shift: Tensor, cov: Tensor) -> None:
        self.phi, self.shift, self.cov = phi, shift, cov

    @cached_property
    def whiten(self) -> Tensor:
        """``Q^-1/2``."""
        return linalg.inverse(linalg.root(self.cov))

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        return _square_distances(*self.embed(x, y)).to(x.dtype)

    def embed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        phi, shift, whiten = (t.to(x) for t in (self.phi, self.shift, self.whiten))
        return linalg.apply(whiten, linalg.apply(phi, x) + shift), linalg.apply(whiten, y)


@final
class Lp(Cost):
    """``C(x, y) = (sum_k |x_k - y_k|^p)^(power / p)``: the distance of order p, to a power.

    Parameters
    ----------
    p : order of the norm, >= 1 (or infinity).
    power : power of the distance, > 0.

    Raises
    ------
    InvalidProblem : p < 1 or power <= 0.

    Examples
    --------
    >>> import torch, sbot
    >>> sbot.Lp(1).matrix(torch.zeros(1, 2), torch.ones(1, 2))
    tensor([[2.]])
    """

    def __init__(self, p: float = 2.0, power: float = 1.0) -> None:
        self.p, self.power = as_number(p, "p"), as_number(power, "power")
        if self.p < 1 or not 0 < self.power < float("inf"):
            raise InvalidProblem(f"Lp(p={p}, power={power}) is not a cost; give p >= 1 and a finite power > 0")

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
            out: Tensor = _Powers.apply(self.p, self.power, x, y)  # type: ignore[no-untyped-call]
            return out
        return _powers(self.p, self.power, x, y)

    def check(self, x: Tensor, y: Tensor) -> None:
        spread = torch.cat([x, y], -2).detach()
        spread = (spread.amax(-2) - spread.amin(-2)).norm(p=self.p, dim=-1)
        _check_range(spread.amax() ** self.power, x.dtype)

    def __repr__(self) -> str:
        return f"Lp(p={self.p:g}, power={self.power:g})"


def _powers(p: float, power: float, x: Tensor, y: Tensor) -> Tensor:
    # the product form of cdist loses half the digits of small distances
    distance = torch.cdist(x, y, p=p, compute_mode="donot_use_mm_for_euclid_dist")
    return distance if power == 1 else distance.pow(power)


def _written_out(gaps: Tensor, p: float, power: float) -> Tensor:
    """``(sum_k |g_k|^p)^(power / p)`` of ``(..., d)``, with derivatives of any order.

    Where there are none of some order, at two points at one place or with one coordinate in common, the distance, or what this
    coordinate contributes, is held as a constant.
    """
    if p == 2:
        total = gaps.square().sum(-1)
    elif p < 2:
        total = _moving_power(gaps.abs(), p).sum(-1)
    elif math.isinf(p):
        total = gaps.abs().amax(-1)
    else:
        total = gaps.abs().pow(p).sum(-1)
    q = power if math.isinf(p) else power / p
    return total if q == 1 else _moving_power(total, q)


def _moving_power(base: Tensor, q: float) -> Tensor:
    """``base^q`` where it is positive; 0, and constant, where it is 0."""
    if q == 1:
        return base
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0).pow(q), 0.0)


class _Powers(torch.autograd.Function):
    """Powers of distances, with derivatives of any order; cdist has one.

    The distance of two points at one place has no slope: it is 0 as a constant.
    """

    @staticmethod
    def forward(p: float, power: float, x: Tensor, y: Tensor) -> Tensor:
        return _powers(p, power, x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.p, ctx.power, x, y = inputs
        ctx.within = x is y
        ctx.save_for_backward(x, y, output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, y, found), (grad,) = ctx.saved_tensors, grads
        p, power = ctx.p, ctx.power

        def number(*moved: Tensor) -> Tensor:
            at_x, at_y = derivatives.filled((x, y), wanted, moved)
            return (grad * _written_out(at_x[..., :, None, :] - at_y[..., None, :, :], p, power)).sum()

        def stream() -> list[Tensor | None]:
            distance, slope = found, grad
            if power != 1:
                distance = found.pow(1 / power)
                slope = torch.where(found > 0, grad * power * distance.pow(power - 1), 0.0)
            if ctx.within:  # distances are symmetric: all of the gradient is that of the rows
                return [torch.ops.aten._cdist_backward(slope + slope.mT, x, x, p, distance), None]
            sides = (x, y, slope, distance), (y, x, slope.mT, distance.mT)
            return [
                torch.ops.aten._cdist_backward(w.contiguous(), here, there, p, d.contiguous()) if asked else None
                for (here, there, w, d), asked in zip(sides, wanted, strict=True)
            ]

        wanted = ctx.needs_input_grad[2:]
        entries = found.numel() * (1 + x.shape[-1] // 3)
        return None, None, *derivatives.of_number(number, (x, y), wanted, stream, grads, entries)


@final
class Cosine(Cost):
    """``C(x, y) = 1 - <x, y> / (|x| |y|)``.

    Raises
    ------
    InvalidProblem : at the zero vector, which has no direction.

    Examples
    --------
    >>> import torch, sbot
    >>> sbot.Cosine().matrix(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
    tensor([[1.]])
    """

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        return _square_distances(*self.embed(x, y)).to(x.dtype)

    def embed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return _direction(x), _direction(y)

    def check(self, x: Tensor, y: Tensor) -> None:
        for name, points in (("mu", x), ("nu", y)):
            zero = (points == 0).all(-1)
            if bool(zero.any()):
                which = in_problem(torch.nonzero(zero)[0].tolist()[:-1])
                raise InvalidProblem(f"{name} has a point at the origin{which}, where Cosine() is not defined; drop it")

    def __repr__(self) -> str:
        return "Cosine()"


def _direction(x: Tensor) -> Tensor:
    # scaled first: the square of a large norm overflows, that of a small one underflows
    x = x / x.abs().amax(-1, keepdim=True).detach()
    return x / x.norm(dim=-1, keepdim=True)


@final
class MatrixCost(Cost):
    """A cost known only between the atoms: ``C[i, j]``, ``(*b, n, m)``; ``+inf`` forbids a pair.

    Its "points" are the numbers of the atoms: `matrix` takes integer tensors.

    Attributes
    ----------
    values : as given; ``(n, m)`` may serve a batch whose weights have batch dimensions, without copies.
    batch_shape : the problems it serves.

    Raises
    ------
    InvalidProblem : NaN or -inf, fewer than two dimensions.

    Examples
    --------
    >>> import torch, sbot
    >>> bridge = sbot.solve_bridge([0.5, 0.5], [0.5, 0.5], 1.0, cost=torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    >>> bridge.plan().sum(1)
    tensor([0.5000, 0.5000])
    """

    def __init__(self, values: Any) -> None:
        values = as_tensor(values, "cost")
        if values.ndim < 2 or 0 in values.shape:
            raise InvalidProblem(f"the cost matrix has shape {tuple(values.shape)}; give (n, m) with n, m >= 1")
        self.source_dtype = values.dtype
        self.values = values.to(compute_dtype(values.dtype))
        self.batch_shape = tuple(values.shape[:-2])
        low, _ = self.ends
        if math.isnan(low) or low == -math.inf:
            *which, _, _ = torch.nonzero(torch.isnan(self.values) | (self.values == -math.inf))[0].tolist()
            raise InvalidProblem(
                f"the cost matrix holds NaN or -inf{in_problem(which)}; +inf (a forbidden pair) is the only legal infinity"
            )

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The least and the largest entry."""
        low, high = torch.aminmax(self.values.detach())
        return float(low), float(high)

    @property
    def _known(self) -> tuple[float, float] | None:
        """`ends` where they have been looked for."""
        known: tuple[float, float] | None = self.__dict__.get("ends")
        return known

    def look_again(self) -> None:
        """Forget what was found in the entries: a matrix that is kept may have been written to."""
        self.__dict__.pop("ends", None)

    @property
    def forbids(self) -> bool:
        """Whether some pair is forbidden."""
        return self.ends[1] == math.inf

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        n, m = self.values.shape[-2:]
        if _in_order(x, n) and _in_order(y, m):
            return self.values  # no copy
        return self.values[..., x, :][..., y]

    @property
    def T(self) -> MatrixCost:
        """The cost of going back; shares memory."""
        return self._like(self.values.mT, self.batch_shape, self._known)

    def expand(self, batch_shape: tuple[int, ...]) -> MatrixCost:
        """The same cost for each problem of a larger batch; shares memory."""
        return self._like(self.values, batch_shape, self._known)

    def to(self, dtype: torch.dtype | None, device: torch.device | str | None) -> MatrixCost:
        """The same cost in a dtype and on a device; None leaves either as it is."""
        moved = self.values.to(dtype=dtype, device=device)
        return self._like(moved, self.batch_shape, self._known if moved.dtype == self.values.dtype else None)

    def pick(self, index: tuple[int, ...], n: int, m: int) -> MatrixCost:
        """The cost of one problem of a batch, between its first ``n`` and ``m`` atoms."""
        shared = len(self.batch_shape) - (self.values.ndim - 2)
        return self._like(self.values[index[shared:]][..., :n, :m], self.batch_shape[len(index) :])

    def _like(
        self, values: Tensor, batch_shape: tuple[int, ...], ends: tuple[float, float] | None = None
    ) -> MatrixCost:
        other = object.__new__(MatrixCost)
        other.source_dtype, other.values, other.batch_shape = self.source_dtype, values, batch_shape
        if ends is not None:
            other.ends = ends
        return other

    def __repr__(self) -> str:
        return f"MatrixCost{tuple(self.values.shape)}"


def _in_order(index: Tensor, n: int) -> bool:
    return len(index) == n and torch.equal(index, torch.arange(n, device=index.device))


@final
class CallableCost(Cost):
    """A function ``(x (n, d), y (m, d)) -> (n, m)`` as a cost; with batches it is called on ``(*b, n, d)``."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.function = function

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        try:
            values = self.function(x, y)
        except TypeError as fault:
            raise InvalidProblem(f"the cost function failed ({fault}); it is called as cost(x, y)") from fault
        want = (*x.shape[:-1], y.shape[-2])
        if not isinstance(values, Tensor) or tuple(values.shape) != want:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise InvalidProblem(f"the cost function returned {got}; return a tensor of shape {want}")
        if not values.dtype.is_floating_point:
            raise InvalidProblem(f"the cost function returned {values.dtype}; return floating numbers")
        return values.to(x.dtype)

    def check(self, x: Tensor, y: Tensor) -> None:
        # a small corner shows a wrong shape or NaN before the work starts; solvers check every number they reach
        wrong = torch.isnan(self.matrix(x[..., :64, :], y[..., :64, :]))
        if bool(wrong.any()):
            which = in_problem(torch.nonzero(wrong)[0].tolist()[:-2])
            raise InvalidProblem(
                f"the cost function returned NaN{which}; return finite numbers, or +inf for a forbidden pair"
            )

    def __repr__(self) -> str:
        return f"CallableCost({getattr(self.function, '__name__', 'function')})"


def as_cost(obj: Any) -> Cost:
    """A `Cost` as it is, a function as `CallableCost`, an array as `MatrixCost`; else `InvalidProblem`."""
    if isinstance(obj, Cost):
        return obj
    if isinstance(obj, type) and issubclass(obj, Cost):
        raise InvalidProblem(f"cost is the class {obj.__name__}; pass an object: cost={obj.__name__}()")
    if isinstance(obj, str):
        raise InvalidProblem(f"cost is the string {obj!r}; pass an object such as sbot.Quadratic() or sbot.Lp(1)")
    return CallableCost(obj) if callable(obj) else MatrixCost(obj)
