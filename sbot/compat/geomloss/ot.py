"""GeomLoss's functions of 2026: ``solve``, ``solve_batch``, ``solve_sample``, and their result."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from ...arrays import as_count, as_number
from ...bridge import Bridge, Report
from ...errors import InvalidProblem, Unsupported
from ...measures import Discrete
from ...problem import INF
from ...solvers import Sinkhorn
from .transport import Transport

CITATION = """sbot: Sinkhorn's algorithm, solved to a tolerance. The divergence and its interface are GeomLoss's:

@inproceedings{feydy2019interpolating,
  title={Interpolating between Optimal Transport and MMD using Sinkhorn Divergences},
  author={Feydy, Jean and S{\\'e}journ{\\'e}, Thibault and Vialard, Fran{\\c{c}}ois-Xavier and Amari, Shun-ichi
          and Trouv{\\'e}, Alain and Peyr{\\'e}, Gabriel},
  booktitle={AISTATS},
  pages={2681--2690},
  year={2019}
}
"""


def solve(
    C: Any,
    *,
    reg: float,
    a: Any = None,
    b: Any = None,
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
) -> OTResult:
    r"""Optimal transport with a cost matrix ``C`` ``(N, M)``.

    .. math:: \min_P \langle P, C\rangle + reg\, KL(P \,|\, a\otimes b) + unbalanced\, (KL(P 1 | a) + KL(P' 1 | b))

    Parameters
    ----------
    C : NumPy array, tensor or nested lists; results come in the same library, dtype and device.
    reg : > 0, in the units of C.
    a, b : weights ``(N,)`` and ``(M,)``; None is uniform of mass 1.
    unbalanced : None for hard marginals, a number, or a pair of numbers (a pair is not in GeomLoss).
    unbalanced_type, method : "KL" and "auto".
    max_iter : most iterations, where more than the 10 000 that are allowed anyway.  In GeomLoss it is the length of a ladder
        of values of reg, and all there is to set the accuracy; here that is ``tol``.
    tol : relative L1 error of the marginals to stop at; None is the square root of the machine epsilon.

    Returns
    -------
    OTResult : `converged` says whether the tolerance was reached.

    Raises
    ------
    InvalidProblem : shapes, weights or numbers are wrong.
    Unsupported : ``reg=0``, another ``unbalanced_type`` or ``method``.

    Examples
    --------
    >>> from sbot.compat.geomloss import ot
    >>> solution = ot.solve([[0.0, 1.0, 4.0], [2.0, 1.0, 0.0]], a=[2, 2], b=[1, 1, 2], reg=0.001)
    >>> solution.plan.round(3)
    array([[1., 1., 0.],
           [0., 0., 2.]])
    """
    return _matrix(C, 2, a, b, reg, unbalanced, unbalanced_type, method, max_iter, tol)


def solve_batch(
    C: Any,
    *,
    reg: float,
    a: Any = None,
    b: Any = None,
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
) -> OTResult:
    """`solve` for ``C`` ``(B, N, M)`` and weights ``(B, N)``, ``(B, M)``.

    Examples
    --------
    >>> import torch
    >>> from sbot.compat.geomloss import ot
    >>> ot.solve_batch(torch.tensor([[[0.0, 1.0]], [[1.0, 3.0]]], dtype=torch.float64), reg=0.1).value
    tensor([0.5000, 2.0000], dtype=torch.float64)
    """
    return _matrix(C, 3, a, b, reg, unbalanced, unbalanced_type, method, max_iter, tol)


def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    cost: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
    debias: bool = False,
    reg: float | None = None,
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
    blur: float | None = None,
    reach: float | None = None,
) -> OTResult:
    r"""Optimal transport between weighted points ``(N, D)`` and ``(M, D)``, with ``C = |x - y|^2``.

    .. math:: \min_P \langle P, C\rangle + reg\, KL(P \,|\, a\otimes b) + unbalanced\, (KL(P 1 | a) + KL(P' 1 | b))

    Parameters
    ----------
    cost : "sqeuclidean" (without one half), or a function of two clouds of tensors that returns ``(N, M)``.
    debias : whether ``value`` is the Sinkhorn divergence, ``OT(a, b) - OT(a, a) / 2 - OT(b, b) / 2 + reg (m_a - m_b)^2 / 2``.
    blur, reach : ``reg = 2 blur^2`` and ``unbalanced = 2 reach^2``; for a function ``reg = blur``, ``unbalanced = reach``.

    The others are those of `solve`.

    Examples
    --------
    >>> from sbot.compat.geomloss import ot
    >>> solution = ot.solve_sample([[0, 0], [0, 2]], [[2, 1], [2, 2]], reg=0.001)
    >>> float(solution.value.round(3))
    4.501
    """
    return _samples(
        2, X_a, X_b, a, b, cost, debias, reg, unbalanced, unbalanced_type, method, max_iter, tol, blur, reach
    )


def solve_sample_batch(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    cost: str | Callable[[Tensor, Tensor], Tensor] = "sqeuclidean",
    debias: bool = False,
    reg: float | None = None,
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    method: str = "auto",
    max_iter: int | None = None,
    tol: float | None = None,
    blur: float | None = None,
    reach: float | None = None,
) -> OTResult:
    """`solve_sample` for points ``(B, N, D)`` and ``(B, M, D)``; GeomLoss announces it and has none yet.

    Examples
    --------
    >>> import torch
    >>> from sbot.compat.geomloss import ot
    >>> x = torch.zeros(2, 1, 3, dtype=torch.float64)
    >>> ot.solve_sample_batch(x, x + 1, reg=0.1).value
    tensor([3., 3.], dtype=torch.float64)
    """
    return _samples(
        3, X_a, X_b, a, b, cost, debias, reg, unbalanced, unbalanced_type, method, max_iter, tol, blur, reach
    )


def _matrix(
    C: Any, ndim: int, a: Any, b: Any, reg: Any, unbalanced: Any, kind: Any, method: Any, max_iter: Any, tol: Any
) -> OTResult:
    rho, solver = _settings(reg, unbalanced, kind, method, max_iter, tol)
    library = _Library({"C": C, "a": a, "b": b})
    cost = library.tensors["C"]
    if cost.ndim != ndim:
        want = "(N, M)" if ndim == 2 else "(B, N, M)"
        raise InvalidProblem(f"C has shape {tuple(cost.shape)}; give {want}")
    weights = tuple(library.weights(name, tuple(cost.sum(axis).shape)) for name, axis in (("a", -1), ("b", -2)))
    transport = Transport((None, weights[0]), (None, weights[1]), (cost, None, None), float(reg), rho, False, solver)
    return OTResult(transport, library, 1.0)


def _samples(
    ndim: int,
    X_a: Any,
    X_b: Any,
    a: Any,
    b: Any,
    cost: Any,
    debias: bool,
    reg: Any,
    unbalanced: Any,
    kind: Any,
    method: Any,
    max_iter: Any,
    tol: Any,
    blur: Any,
    reach: Any,
) -> OTResult:
    if not callable(cost) and cost != "sqeuclidean":
        raise Unsupported(f"cost is {cost!r}; give 'sqeuclidean' or a function of two clouds of points")
    # the core charges half the square: everything in the units of the cost is halved on the way in, doubled on the way out
    unit, power = (1.0, 1) if callable(cost) else (2.0, 2)
    reg = _one_of("reg", reg, "blur", blur, unit, power)
    unbalanced = _one_of("unbalanced", unbalanced, "reach", reach, unit, power)
    rho, solver = _settings(reg, unbalanced, kind, method, max_iter, tol)
    library = _Library({"X_a": X_a, "X_b": X_b, "a": a, "b": b})
    x, y = library.tensors["X_a"], library.tensors["X_b"]
    for name, points in (("X_a", x), ("X_b", y)):
        if points.ndim != ndim:
            want = "(N, D)" if ndim == 2 else "(B, N, D)"
            raise InvalidProblem(f"{name} has shape {tuple(points.shape)}; give {want}")
    weights = library.weights("a", tuple(x.shape[:-1])), library.weights("b", tuple(y.shape[:-1]))
    own = cost if callable(cost) else None
    relax = (rho[0] / unit, rho[1] / unit)
    transport = Transport(
        (x, weights[0]), (y, weights[1]), (own, own, own), float(reg) / unit, relax, bool(debias), solver
    )
    return OTResult(transport, library, unit)


def _one_of(name: str, value: Any, other: str, size: Any, unit: float, power: int) -> Any:
    if size is None:
        return value
    if value is not None:
        raise InvalidProblem(f"{name} and {other} say the same; give one of them")
    number = as_number(size, other)
    if not number > 0:
        raise InvalidProblem(f"{other} is {number}; give a number > 0")
    return unit * number**power


def _settings(
    reg: Any, unbalanced: Any, kind: Any, method: Any, max_iter: Any, tol: Any
) -> tuple[tuple[float, float], Sinkhorn]:
    if reg is None:
        raise InvalidProblem("reg is missing; give a number > 0 in the units of the cost")
    if as_number(reg, "reg") == 0:
        raise Unsupported("reg is 0, which is unregularised transport; give reg > 0, or use ot.emd from POT")
    for name, value, known in (("unbalanced_type", kind, "KL"), ("method", method, "auto")):
        if value != known:
            raise Unsupported(f"{name} is {value!r}; there is {known!r} only")
    pair = unbalanced if isinstance(unbalanced, (tuple, list)) else (unbalanced, unbalanced)
    if len(pair) != 2:
        raise InvalidProblem(f"unbalanced has {len(pair)} entries; give a number, or one for each side")
    rho = tuple(INF if part is None else as_number(part, "unbalanced") for part in pair)
    if min(rho) <= 0:
        raise InvalidProblem(f"unbalanced is {unbalanced}; give numbers > 0, or None for hard marginals")
    least = Sinkhorn().max_iter
    iterations = least if max_iter is None else max(least, as_count(max_iter, "max_iter"))
    return (rho[0], rho[1]), Sinkhorn(tol=tol, max_iter=iterations)


@final
class _Library:
    """The arrays of one call as tensors, and the way back to where they came from."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        given = {
            name: np.array(part, dtype=np.float64) if isinstance(part, (list, tuple)) else part
            for name, part in arrays.items()
            if part is not None
        }
        tensors = {name: isinstance(part, Tensor) for name, part in given.items()}
        for name, part in given.items():
            if not isinstance(part, (Tensor, np.ndarray)):
                raise InvalidProblem(f"{name} is {type(part).__name__}; give a NumPy array, a tensor or a list")
        if len(set(tensors.values())) > 1:
            raise InvalidProblem("some arguments are NumPy arrays and some are tensors; give all in one library")
        self.torch = all(tensors.values())
        self.tensors = {name: _floating(part, name) for name, part in given.items()}
        dtypes = {part.dtype for part in self.tensors.values()}
        if len(dtypes) > 1:
            listed = ", ".join(f"{name} {part.dtype}" for name, part in self.tensors.items())
            raise InvalidProblem(f"the arguments have several dtypes ({listed}); cast all to one")
        self.dtype = dtypes.pop()

    def weights(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.tensors:
            like = next(iter(self.tensors.values()))
            return torch.full(shape, 1 / max(shape[-1], 1), dtype=like.dtype, device=like.device)
        if tuple(self.tensors[name].shape) != shape:
            raise InvalidProblem(f"{name} has shape {tuple(self.tensors[name].shape)}; give {shape}")
        return self.tensors[name]

    def back(self, tensor: Tensor) -> Any:
        tensor = tensor.to(self.dtype)
        return tensor if self.torch else tensor.detach().cpu().numpy()

    def taken(self, v: Any) -> Tensor:
        return v if isinstance(v, Tensor) else torch.from_numpy(np.asarray(v, dtype=np.float64))


def _floating(part: Any, name: str) -> Tensor:
    tensor: Tensor = part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
    if tensor.is_complex() or tensor.dtype == torch.bool:
        raise InvalidProblem(f"{name} has dtype {tensor.dtype}; give real numbers")
    return tensor if tensor.is_floating_point() else tensor.double()


@final
class LinearOperator:
    """A matrix that is applied and not stored: ``operator @ v`` for v ``(M, ...)`` or ``(B, M, ...)``."""

    def __init__(
        self, apply: Callable[[Tensor, bool], Tensor], n: tuple[int, ...], m: tuple[int, ...], library: _Library
    ):
        self._apply, self._n, self._m, self._library = apply, n, m, library

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix, batches as blocks on its diagonal."""
        return math.prod(self._n), math.prod(self._m)

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return LinearOperator(lambda v, back: self._apply(v, not back), self._m, self._n, self._library)

    def transpose(self) -> LinearOperator:
        """The transpose."""
        return self.T

    def __matmul__(self, v: Any) -> Any:
        vector = self._library.taken(v)
        lead = len(self._m)
        if tuple(vector.shape[:lead]) != self._m:
            raise InvalidProblem(f"the vector has shape {tuple(vector.shape)}; give {(*self._m, '...')}")
        columns = vector.reshape(*self._m, -1)
        out = self._apply(columns.to(self._library.dtype), False)
        return self._library.back(out.reshape(*self._n, *vector.shape[lead:]))


@final
class OTResult:
    """The solution of a problem, with GeomLoss's attributes, each computed when it is asked for.

    Arrays are in the library, dtype and device of the input.  Those that GeomLoss leaves None where KeOps is missing,
    ``lazy_plan`` and ``lazy_density``, are the operators.

    Attributes
    ----------
    bridge : the `Bridge` of the problem, in the core's units.
    report : what the solver did, and how far it got; `converged` for short.
    """

    citation = CITATION

    def __init__(self, transport: Transport, library: _Library, unit: float) -> None:
        self._transport, self._library, self._unit = transport, library, unit
        self.bridge: Bridge = transport.xy
        self.report: Report = self.bridge.report

    @property
    def converged(self) -> bool:
        """Whether the tolerance was reached."""
        return self.report.converged

    # ---- potentials ------------------------------------------------------------------------------------------------

    @cached_property
    def potential_a(self) -> Any:
        """``f``, shaped as a, in the units of the cost; ``<a, f> = <b, g>`` where the marginals are hard."""
        return self._cast(self._potentials[0])

    @cached_property
    def potential_b(self) -> Any:
        """``g``, shaped as b."""
        return self._cast(self._potentials[1])

    @cached_property
    def potential_aa(self) -> Any:
        """The potential of a to itself; ValueError without ``debias=True``."""
        return self._own(0)

    @cached_property
    def potential_bb(self) -> Any:
        """The potential of b to itself; ValueError without ``debias=True``."""
        return self._own(1)

    # ---- plan ------------------------------------------------------------------------------------------------------

    @cached_property
    def density(self) -> Any:
        """``exp((f + g - C) / reg)``, ``(N, M)`` or ``(B, N, M)``."""
        return self._library.back(self._density())

    @cached_property
    def plan(self) -> Any:
        """``a_i b_j exp((f_i + g_j - C_ij) / reg)``, ``(N, M)`` or ``(B, N, M)``."""
        return self._library.back(self._transport.moving(self.bridge).plan())

    @property
    def density_operator(self) -> LinearOperator:
        """`density` as an operator; streamed where no weight is zero."""
        return self._operator(self._apply_density)

    @property
    def plan_operator(self) -> LinearOperator:
        """`plan` as an operator; streamed, without gradient."""
        return self._operator(lambda v, back: self.bridge.apply(v, transpose=back))

    @property
    def lazy_density(self) -> LinearOperator:
        """`density_operator`."""
        return self.density_operator

    @property
    def lazy_plan(self) -> LinearOperator:
        """`plan_operator`."""
        return self.plan_operator

    @cached_property
    def marginal_a(self) -> Any:
        """Row sums of the plan."""
        return self._marginal(0)

    @cached_property
    def marginal_b(self) -> Any:
        """Column sums of the plan."""
        return self._marginal(1)

    # ---- values ----------------------------------------------------------------------------------------------------

    @cached_property
    def value(self) -> Any:
        """The optimal value, or the divergence; differentiable in points, weights and cost matrix."""
        return self._cast(self._transport.value())

    @cached_property
    def value_linear(self) -> Any:
        """``<P, C>``; not in GeomLoss."""
        return self._cast(self._transport.moving(self.bridge).linear_cost())

    # ---- maps ------------------------------------------------------------------------------------------------------

    @cached_property
    def a_to_b(self) -> Any:
        """``E[y | x_i] - x_i`` under the plan, ``(N, D)``; None for a cost matrix, which has no points."""
        return self._displacement(0)

    @cached_property
    def b_to_a(self) -> Any:
        """``E[x | y_j] - y_j`` under the plan, ``(M, D)``; None for a cost matrix."""
        return self._displacement(1)

    # ---- parts -----------------------------------------------------------------------------------------------------

    @cached_property
    def _potentials(self) -> tuple[Tensor, Tensor]:
        return self._transport.potentials(self.bridge)

    @property
    def _sides(self) -> tuple[Discrete, Discrete]:
        mu, nu = self.bridge.problem.mu, self.bridge.problem.nu
        assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
        return mu, nu

    def _cast(self, tensor: Tensor) -> Any:
        return self._library.back(self._unit * tensor)

    def _own(self, side: int) -> Any:
        if not self._transport.debias:
            raise InvalidProblem("there is no potential of a measure to itself; solve with debias=True")
        return self._cast(self._transport.potentials(self._transport.own[side])[0])

    def _density(self) -> Tensor:
        (f, g), problem = self._potentials, self.bridge.problem
        return torch.exp((f[..., :, None] + g[..., None, :] - problem.cost.matrix(*problem.sites)) / problem.eps)

    def _operator(self, apply: Callable[[Tensor, bool], Tensor]) -> LinearOperator:
        mu, nu = self._sides
        return LinearOperator(apply, tuple(mu.weights.shape), tuple(nu.weights.shape), self._library)

    def _apply_density(self, v: Tensor, back: bool) -> Tensor:
        near, far = (side.weights.detach() for side in (self._sides[::-1] if back else self._sides))
        if bool((near > 0).all()) and bool((far > 0).all()):
            return self.bridge.apply(v / far[..., None], transpose=back) / near[..., None]
        dense = self._density().detach()
        return (dense.mT if back else dense) @ v

    def _marginal(self, side: int) -> Any:
        moving = self._transport.moving(self.bridge)
        if moving is not self.bridge:
            return self._library.back(moving.plan().sum(-1 - side))
        return self._library.back(
            self.bridge.apply(torch.ones_like(self._sides[1 - side].weights), transpose=bool(side))
        )

    def _displacement(self, side: int) -> Any:
        here, there = self._sides[side].points, self._sides[1 - side].points
        if here is None or there is None:
            return None
        plan = self._operator(lambda v, back: self.bridge.apply(v, transpose=back))
        forth = plan._apply(torch.cat([there, torch.ones_like(there[..., :1])], -1).detach(), bool(side))
        return self._library.back(forth[..., :-1] / forth[..., -1:] - here.detach())
