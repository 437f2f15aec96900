r"""The Sinkhorn divergence: the entropic cost without its bias.

With ``OT`` the entropic cost, entropies included, and ``m`` the masses,

.. math:: S(\mu, \nu) = OT(\mu, \nu) - \tfrac12 OT(\mu, \mu) - \tfrac12 OT(\nu, \nu) + \tfrac\varepsilon2 (m_\mu - m_\nu)^2.

Let p and q be the potentials of the two self terms, where both potentials are equal by symmetry.  The dual at ``(p, q)`` is no
more than ``OT(mu, nu)``, and put in its place it leaves

.. math:: S \ge \tfrac\varepsilon2 \langle \sigma, e^{-C/\varepsilon} \sigma\rangle, \qquad
    \sigma = e^{p/\varepsilon} \mu - e^{q/\varepsilon} \nu,

the last term of S being what remains of the constants ``eps m m`` of the three duals (Feydy et al. 2019, Sejourne et al.
2019).  This holds for any p and q, so that S is no less than 0 however far the solves got.  It needs no more of the three duals
than that f and g enter them apart, which with a prescribed mass they do as well (`partial.support`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .api import choose_solver
from .arrays import wider
from .bridge import narrow
from .costs import Cosine, Lp, MatrixCost, Quadratic
from .coupling import DiscreteCoupling
from .errors import InvalidProblem, NotConverged, NumericalError, Unsupported
from .kernels import Conditionals, LogKernel, make_kernel, room_beside
from .linalg import Eps, along, full_precision
from .measures import Discrete
from .pace import TINY
from .potential_bridge import PotentialBridge
from .potentials import Atoms
from .problem import Problem, fitted
from .progress import Progress, reporting
from .reference import Reference, Static
from .relaxed import damping, target_weights
from .solvers import ClosedForm, Sinkhorn, Solver
from .solvers.halfsteps import TRUST
from .solvers.sinkhorn import REACH

#: Shares of a half-step that a self term takes in turn.  Half-steps multiply an error by minus an eigenvalue of the plan, which
#: is in [0, 1] where exp(-C / eps) is positive definite: these steps undo the eigenvalues 1, 1/2 and 0, and leave at most a
#: fourth of any other per step, whatever eps is.
SHARES = (1 / 2, 2 / 3, 1.0)
#: Passes after which, and passes without gain after which, a self term is solved like any other problem.
MOST, PATIENCE = 100, 6
#: Rounding of a value in float64, relative to its terms.
ROUNDING = 128 * torch.finfo(torch.float64).eps
#: Entries up to which costs that are dear are computed once, for the solves, the value and its derivative.
ONCE = 2**20
#: Points of each side that a cost is tried on.
PROBES = 32


def sinkhorn_divergence(
    mu: Any,
    nu: Any,
    eps: Any,
    *,
    reference: Reference | None = None,
    cost: Any = None,
    relax: Any = None,
    mass: Any = None,
    solver: str | Solver = "auto",
    progress: Any = None,
) -> Tensor:
    r"""The debiased entropic cost: zero where ``mu`` and ``nu`` are equal, positive elsewhere.

    .. math:: S(\mu, \nu) = OT(\mu, \nu) - \tfrac12 OT(\mu, \mu) - \tfrac12 OT(\nu, \nu)
        + \tfrac\varepsilon2 (m_\mu - m_\nu)^2

    with ``OT`` the entropic cost, `Bridge.cost`, and ``m`` the masses, equal unless ``relax`` or ``mass`` is given.  It
    interpolates between unregularised transport (small eps) and a squared kernel distance (large eps).  It is at least 0 where
    ``exp(-C / eps)`` is positive definite, as for `Quadratic`, `Cosine`, and `Lp` with ``power <= p <= 2``.

    Differentiable in points, weights and cost matrices, through all three terms; for atoms the gradient streams, and memory
    is O(n + m).  Potentials are found in the dtype of the input, and the value is worked out at them in float64, since its
    terms cancel.

    Parameters
    ----------
    mu, nu : as for `solve_bridge`, points ``(*b, n, d)`` and ``(*b, m, d)`` for instance; or two Gaussians.
    eps : variance of the reference path over [0, 1], in the units of the cost; > 0.
    reference : `Brownian` (the default), or another one with a symmetric cost.
    cost : a symmetric `Cost` or function, or three matrices ``(C_xy, C_xx, C_yy)``: between mu and nu, and within each.
    relax : one number: marginals are only encouraged, by ``rho KL``, and masses may differ.
    mass : what the plans of all three terms carry within their marginals, which are then bounds: at most the mass of either
        side; one number, or ``(*b,)``.  Measures that differ only in what they leave behind may then be at 0 too.
    solver : "auto", or ``Sinkhorn(...)`` with its options; its tolerance is that of all three terms.
    progress : None, True for a progress bar, or a function of `Progress`.

    Returns
    -------
    Tensor : ``(*b,)``.

    Raises
    ------
    InvalidProblem : an argument is wrong: a cost that is not symmetric, one matrix only, another relaxation on each side.
    Unsupported : measures that are neither both atoms nor both Gaussian.

    Warns
    -----
    NotConverged : once, where a term did not reach its tolerance; it says which.

    Examples
    --------
    >>> import torch, sbot
    >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64, requires_grad=True)
    >>> value = sbot.sinkhorn_divergence(x, x.detach() + 2, eps=0.1)
    >>> round(float(value.detach()), 6)                         # for a translation |shift|^2 / 2, at any eps
    2.0
    >>> torch.autograd.grad(value, x)[0].flatten()              # shift times the weight of each point
    tensor([-1.0000, -1.0000], dtype=torch.float64)
    """
    with full_precision():
        problem, within = _problems(mu, nu, eps, reference, cost, relax, mass)
        chosen = choose_solver(problem, solver)
        if isinstance(chosen, ClosedForm):
            across, *ends = (chosen.solve(part.to(dtype=torch.float64)).cost() for part in (problem, *within))
            value = across - sum(ends) / 2
        elif isinstance(chosen, Sinkhorn):
            value = _between_atoms(problem, within, chosen, progress)
        else:
            raise Unsupported(
                f"{type(chosen).__name__} does not give the values of the three terms; use samples of both sides, "
                "mu.sample(4096), with solver='auto', or two Gaussians"
            )
        return narrow(value, problem.result_dtype)


def _between_atoms(problem: Problem, within: list[Problem], solver: Sinkhorn, progress: Any) -> Tensor:
    assert isinstance(problem.mu, Discrete) and isinstance(problem.nu, Discrete)
    # one set of weights for the three terms: masses that float32 took for equal are made equal in float64
    wide = problem.to(dtype=torch.float64)
    ends = wide.mu, wide.nu
    inner = [replace(part.to(dtype=torch.float64), mu=end, nu=end) for part, end in zip(within, ends, strict=True)]
    if isinstance(problem.cost, Lp) and math.prod(wide.batch_shape) * max(problem.mu.n, problem.nu.n) ** 2 <= ONCE:
        # they are as quickly solved in float64, where a pass need not be made twice
        if solver.tol is None:
            solver = replace(solver, tol=math.sqrt(torch.finfo(problem.dtype).eps))
        wide, *inner = (
            replace(part, reference=Static(MatrixCost(part.cost.matrix(*part.sites)))) for part in (wide, *inner)
        )
        problem, within = wide, inner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        bridge = solver.solve(problem, progress=progress)
    assert isinstance(bridge, PotentialBridge) and isinstance(bridge.coupling, DiscreteCoupling)
    report = bridge.report
    with reporting(progress, "Sinkhorn divergence") as show:
        selves = [
            _alone(part, solver, report.tolerance, show) if part.mass is None else _as_any_other(part, solver)
            for part in within
        ]
    late = [] if report.converged else [f"(mu, nu) at {report.error:.1e}"]
    for name, own in zip(("mu", "nu"), selves, strict=True):
        late += [] if own.converged else [f"({name}, {name}) at {own.error:.1e}"]
    if late:
        warnings.warn(
            f"the Sinkhorn divergence has terms that did not converge: {', '.join(late)}, marginal errors for a tolerance "
            f"of {report.tolerance:.1e}; raise max_iter or eps, or loosen tol{wider(problem.dtype, ', or use float64')}",
            NotConverged,
            stacklevel=3,
        )
    log_z = wide.log_normaliser()
    selves_logs = [_logs(end, part.values, wide.eps) for end, part in zip(ends, selves, strict=True)]
    logs = [_logs(end, part, wide.eps) for end, part in zip(ends, bridge.coupling.dual_values(), strict=True)]

    def dual(asked: Problem, left: Tensor, right: Tensor) -> Tensor:
        x, y = (site.detach() for site in asked.sites)
        return DiscreteCoupling(asked, Atoms(x, left), Atoms(y, right + log_z)).cost()

    halves = torch.zeros((), dtype=torch.float64, device=problem.device)
    for part, log in zip(inner, selves_logs, strict=True):
        halves = halves + dual(part, log, log) / 2
    a, b = (end.weights.sum(-1) for end in ends if isinstance(end, Discrete))
    rest = wide.free_eps * (a - b).square() / 2 - halves
    value = dual(wide, *logs) + rest
    if bool((value < 0).any()):
        # the potentials of the self terms are a start that is never below zero
        start = dual(wide, *selves_logs) + rest
        value = torch.where(start > value, start, value)
        # what is left is rounding of the terms, unless the kernel is not positive definite
        noise = ROUNDING * (rest.detach().abs() + (value - rest).detach().abs() + (wide.free_eps * a * b).detach())
        value = torch.where((value < 0) & (value >= -noise), value - value.detach(), value)
    return value


# ---- the self terms ------------------------------------------------------------------------------------------------


class _Self(NamedTuple):
    """A symmetric problem: its one potential at the atoms, ``(*b, n)``, and how near it is to the solution."""

    values: Tensor
    error: float
    converged: bool


@torch.no_grad()
def _alone(problem: Problem, solver: Sinkhorn, tolerance: float, show: Callable[[Progress], None]) -> _Self:
    """``OT(mu, mu)``: the fixed point ``p = T p`` of the half-step, by parts of half-steps (see `SHARES`).

    ``T`` is nonexpansive, its fixed point is the solution by symmetry, and it is near 0: neither annealing nor Newton is needed.
    """
    mu, eps, unit, rho = problem.mu, problem.eps, along(problem.eps, 1), problem.relax[0]
    assert isinstance(mu, Discrete)
    a = mu.weights.detach()
    live, log_a, damp = a > 0, a.log(), damping(rho, unit)
    kernel = make_kernel(problem.cost, *(site.detach() for site in problem.sites), memory=solver.memory)
    machine = torch.finfo(problem.dtype).eps
    most = kernel.bound()  # quick to tell, where it is known
    top = kernel.scale()[1] if isinstance(eps, Tensor) or most == math.inf else torch.tensor(most)
    tolerance = max(tolerance, machine * max(REACH * float((top / eps).max()), 8.0))
    largest = float(eps.max()) if isinstance(eps, Tensor) else eps
    laws = Conditionals(kernel, room_beside(kernel, problem.cost, solver.memory), few=True)

    def part_of(half: Tensor, p: Tensor) -> tuple[Tensor, float]:
        """What a half-step adds to ``p``, and the error of both marginals there."""
        change, goal = half - p, a if rho == math.inf else target_weights(a, p, rho)
        if gaps:
            change, goal = torch.where(live, change, 0.0), torch.where(live, goal, 0.0)
        goal, off = goal.double(), (change / (-damp * unit)).double().expm1_().abs_()
        error = 2 * float((torch.linalg.vecdot(goal, off) / goal.sum(-1).clamp(min=TINY)).max())
        _require_number(error, problem.dtype)
        show(Progress(k, largest, error, tolerance))
        return change, error

    p, best, waited, k = torch.zeros_like(a), _Self(torch.zeros_like(a), math.inf, False), 0, 0
    for _ in range(MOST):
        lse, known = _pass(kernel, laws, log_a + p / unit, eps)
        half = -damp * unit * lse
        # an atom that forbidden pairs leave where it is takes no part, and keeps the infinite potential that it has
        live = live & (half != torch.inf)
        gaps = not bool(live.all())
        change, error = part_of(half, p)
        waited = 0 if error < 0.9 * best.error else waited + 1
        if error < best.error:
            best = _Self(torch.where(half == torch.inf, half, p), error, error <= tolerance)
        if best.converged or waited >= PATIENCE or k >= solver.max_iter:
            break
        here, p = p, p + SHARES[k % len(SHARES)] * change
        k += 1
        # between two passes on the laws that the last one found, until what they round or leave out is all that is left
        least, idle = error, 0
        while known and k < solver.max_iter:
            move = (p - here) / unit
            if (spread := float(move.abs().max())) > TRUST:
                break
            sums = (1 + laws.times(move.double().expm1_())).clamp_(min=TINY)
            change, error = part_of(-damp * unit * (lse + sums.log().to(lse)), p)
            idle = 0 if error < 0.9 * least else idle + 1
            least = min(least, error)
            if error <= tolerance / 2 and laws.resolves(spread, tolerance):
                return _Self(torch.where(half == torch.inf, half, p), error, True)
            if error <= tolerance / 2 or idle >= len(SHARES):
                break
            p = p + SHARES[k % len(SHARES)] * change
            k += 1
    return best if best.converged else min(best, _as_any_other(problem, solver), key=lambda way: way.error)


def _require_number(error: float, dtype: torch.dtype) -> None:
    if math.isnan(error):
        remedy = f"rescale the cost{wider(dtype, ' or use float64')}"
        raise NumericalError(f"a self term of the divergence left the finite numbers; {remedy}")


def _pass(kernel: LogKernel, laws: Conditionals, bias: Tensor, eps: Eps) -> tuple[Tensor, bool]:
    """``lse`` of the rows, and whether their laws are kept."""
    if not laws.possible:
        return kernel.reduce(bias, eps)[0], False
    laws.open()
    seen = kernel.conditionals(bias, eps, torch.ones_like(bias), 0, laws.keep, laws.room)
    return seen.lse, laws.close(seen, bias)


def _as_any_other(problem: Problem, solver: Sinkhorn) -> _Self:
    """The self term by the solver: half the sum of its two potentials, which the dual, being concave, prefers to both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = solver.solve(problem)
    assert isinstance(bridge, PotentialBridge) and isinstance(bridge.coupling, DiscreteCoupling)
    f, g = bridge.coupling.dual_values()
    return _Self((f + g) / 2, bridge.report.error, bridge.report.converged)


def _logs(end: Any, potential: Tensor, eps: Eps) -> Tensor:
    """``log a + p / eps`` in float64."""
    weights = end.weights.detach()
    # the potential of an atom that forbidden pairs leave where it is is infinite, and the plan has no mass there
    part = (weights > 0) & torch.isfinite(potential)
    return torch.where(part, weights.log() + potential.double() / along(eps, 1), -torch.inf)


# ---- the door ------------------------------------------------------------------------------------------------------


def _problems(
    mu: Any, nu: Any, eps: Any, reference: Any, cost: Any, relax: Any, mass: Any
) -> tuple[Problem, list[Problem]]:
    """The problem from mu to nu, and those from each to itself."""
    three = cost if isinstance(cost, tuple) and len(cost) == 3 else None
    problem = Problem.of(mu, nu, eps, reference, cost if three is None else three[0], relax, mass)
    if problem.relax[0] != problem.relax[1]:
        raise InvalidProblem(
            f"relax is {problem.relax}: with another strength on each side the divergence of a measure from itself is "
            "not zero; give one number"
        )
    if three is not None:
        return problem, [_itself(problem, three[k], k) for k in (1, 2)]
    if isinstance(problem.cost, MatrixCost):
        raise InvalidProblem(
            "a cost matrix between mu and nu does not know the costs within each; give cost=(C_xy, C_xx, C_yy), "
            "or (C, C, C) for two histograms over the same bins"
        )
    _require_symmetric(problem)
    return problem, [replace(problem, mu=end, nu=end) for end in (problem.mu, problem.nu)]


def _itself(problem: Problem, matrix: Any, k: int) -> Problem:
    """The self term of one side, with the cost matrix of that side."""
    end, name = (problem.mu, "mu") if k == 1 else (problem.nu, "nu")
    what = f"cost[{k}], the matrix within {name},"
    try:
        charge = MatrixCost(matrix)
        if charge.values.device != problem.device:
            raise InvalidProblem(f"it is on {charge.values.device} and {name} on {problem.device}; move one of them")
        charge = fitted(charge, problem.batch_shape, dtype=problem.dtype)
        whole = replace(problem, mu=end, nu=end, reference=Static(charge))
        whole._check_shapes()
        whole._check_feasible()
    except InvalidProblem as fault:
        raise InvalidProblem(f"{what} is wrong: {fault}") from None
    values = charge.values
    if not _symmetric(values.detach()):
        raise InvalidProblem(f"{what} is not symmetric; pass (C + C.T) / 2 if that is meant")
    even = MatrixCost((values + values.mT) / 2)
    return replace(whole, reference=Static(fitted(even, problem.batch_shape)))


def _require_symmetric(problem: Problem) -> None:
    cost = problem.cost
    if isinstance(cost, (Quadratic, Lp, Cosine)):
        return
    generator = torch.Generator(problem.device).manual_seed(0)
    ends = (problem.mu, problem.nu)
    if any(isinstance(end, Discrete) for end in ends):
        if not all(isinstance(end, Discrete) for end in ends):
            return  # the solver says what to do
        probes = [site.detach()[..., :PROBES, :] for site in problem.sites]
    else:
        probes = [end.sample(PROBES, generator=generator) for end in ends]
    z = torch.cat(probes, -2)
    with torch.no_grad():
        if not _symmetric(cost.matrix(z, z)):
            raise InvalidProblem(
                f"{problem.reference!r} does not charge the same from x to y as from y to x: its divergence could be negative; "
                "use reference=sbot.Brownian(), or a symmetric cost"
            )


def _symmetric(values: Tensor) -> bool:
    """Up to what rounding leaves of small distances."""
    forbidden = torch.isinf(values)
    if not torch.equal(forbidden, forbidden.mT):
        return False
    values = values.masked_fill(forbidden, 0.0)
    return bool(((values - values.mT).abs() <= math.sqrt(torch.finfo(values.dtype).eps) * values.abs().amax()).all())
