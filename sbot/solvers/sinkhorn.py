"""Discrete Sinkhorn: balanced, unbalanced and semi-unbalanced, over any cost, stored or streamed."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor

from ..arrays import as_count, as_number
from ..bridge import Bridge, Report
from ..costs import MatrixCost
from ..diffusion import Intractable
from ..errors import InvalidProblem, NotConverged, NumericalError, PrecisionWarning
from ..kernels import DenseKernel, make_kernel
from ..measures import Discrete
from ..potential_bridge import PotentialBridge
from ..potentials import Atoms
from ..problem import Problem
from .base import Progress, Solver, reporting
from .halfsteps import State, log_iterations, scaled_iterations
from .newton import newton_iterations
from .schedule import Schedule

#: Iterations that a stage before the last may take: it only has to be near.
STAGE_LIMIT = 100
#: Checks without a new best error (by a thousandth) after which the last stage counts as stalled.
PATIENCE = 50
#: Newton takes over where the error is below NEAR and half-steps would take more than PAYS further iterations, at the rate of the
#: last LOOK_BACK checks.
NEAR, PAYS, LOOK_BACK = 0.03, 200, 5
#: Marginal error that rounding leaves, in units of ``machine epsilon * max|C| / eps``: a few times what was measured when
#: potentials are much smaller than the cost (docs/conventions.md), about what it is when they are as large.
REACH = 0.5
#: Above this a marginal error means nothing.
HOPELESS = 0.1


@final
@dataclass(frozen=True)
class Sinkhorn(Solver):
    """Alternating projections on the marginals of ``P = exp((f + g - C) / eps) mu nu``.

    Parameters
    ----------
    tol : relative L1 error of both marginals to stop at; None is the square root of the machine epsilon (1.5e-8 in
        float64, 3.5e-4 in float32), where the error of the value is about the machine epsilon.  Never below what the
        dtype can reach, ``machine epsilon * max|C| / (2 eps)``; the report has the tolerance that was used.
    max_iter : iterations in total; an iteration is one half-step on each side.
    anneal : how eps is lowered from the mean cost to its value; None starts at eps.
    memory : bytes of n x m storage allowed.  Within it the cost and the absorbed kernel are kept and an iteration is two
        matrix-vector products; beyond it tiles are streamed and memory is O(n + m).

    Raises
    ------
    InvalidProblem : an option out of range.
    NumericalError : numbers that are not finite in mid-iteration.

    Warns
    -----
    NotConverged : the tolerance was not reached; the bridge is returned and its report says how far it got.

    Examples
    --------
    >>> import torch, sbot
    >>> x, y = torch.rand(50, 2, dtype=torch.float64), torch.rand(60, 2, dtype=torch.float64)
    >>> bridge = sbot.solve_bridge(x, y, 0.05, solver=sbot.Sinkhorn(tol=1e-9))
    >>> bridge.report.error <= 1e-9
    True
    """

    tol: float | None = None
    max_iter: int = 10_000
    anneal: Schedule | None = field(default_factory=Schedule)
    memory: int = 2**30

    def __post_init__(self) -> None:
        if self.tol is not None and not 0 <= as_number(self.tol, "tol") < math.inf:
            raise InvalidProblem(f"tol is {self.tol}; give a finite number >= 0, or None")
        as_count(self.max_iter, "max_iter")
        as_count(self.memory, "memory", least=0)
        if self.anneal is not None and not isinstance(self.anneal, Schedule):
            raise InvalidProblem(f"anneal is {self.anneal!r}; give sbot.Schedule(...) or None")

    def accepts(self, problem: Problem) -> str | None:
        for name, measure in (("mu", problem.mu), ("nu", problem.nu)):
            if not isinstance(measure, Discrete):
                return f"{name} is {type(measure).__name__}, needs Discrete; try sbot.Discrete({name}.sample(4096))"
        if isinstance(problem.cost, Intractable):
            return f"the reference is {problem.reference!r}, whose cost is not known; try solver=sbot.DSB()"
        return None

    def solve(self, problem: Problem, *, init: Bridge | None = None, progress: Any = None) -> Bridge:
        """Solve ``problem``, from the potentials of the bridge ``init`` where one is given."""
        refusal = self.accepts(problem)
        if refusal is not None:
            raise InvalidProblem(f"Sinkhorn: {refusal}")
        start = time.perf_counter()
        with torch.no_grad(), reporting(progress, "Sinkhorn") as report:
            state, stages, goal = self._prepare(problem, init)
            history: list[tuple[int, float, float]] = []
            reason = "max_iter"
            for k, (eps, tolerance) in enumerate(stages):
                last = k == len(stages) - 1
                watch = _Watch(eps, tolerance, last, goal.reach, history, report)
                watch.foresee = last and state.absorbed is not None and problem.relax == (math.inf, math.inf)
                self._stage(state, eps, last, watch)
                reason = watch.reason
            state.centre()
            phi, psi = _potentials(problem, state)
        eps, tolerance = stages[-1]
        error = history[-1][2]
        resolved = goal.reach <= max(HOPELESS, tolerance)
        reason = "precision" if not resolved else "tolerance" if error <= tolerance else reason
        outcome = Report(
            solver=repr(self),
            converged=resolved and error <= tolerance,
            reason=reason,
            iterations=state.iterations,
            error=error,
            tolerance=tolerance,
            history=tuple(history),
            seconds=time.perf_counter() - start,
            notes=goal.notes,
        )
        if not outcome.converged:
            warnings.warn(
                f"Sinkhorn stopped ({reason}) after {outcome.iterations} iterations at marginal error {error:.1e} for a "
                f"tolerance of {tolerance:.1e}; raise max_iter or eps, loosen tol, use float64, or continue with init=bridge",
                NotConverged,
                stacklevel=3,
            )
        return PotentialBridge(problem, phi, psi, outcome)

    # ---- the parts -------------------------------------------------------------------------------------------------

    def _prepare(self, problem: Problem, init: Bridge | None) -> tuple[State, list[tuple[float, float]], _Goal]:
        mu, nu, eps = problem.mu, problem.nu, problem.eps
        assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
        kernel = make_kernel(problem.cost, *problem.sites, memory=self.memory)
        mean, largest = (float(part.max()) for part in kernel.scale())
        if not math.isfinite(largest):
            raise NumericalError("the cost overflows this dtype; rescale the points (and eps) or use float64")
        goal = self._goal(problem, largest)
        g = torch.zeros_like(nu.weights)
        if init is not None:
            g = _warm(problem, init)
            mean = min(mean, init.problem.eps)
        stages = [(eps, goal.tolerance)]
        if self.anneal is not None:
            stages = list(self.anneal.stages(mean, eps, goal.tolerance))
        storage = "stored" if isinstance(kernel, DenseKernel) else "streamed"
        goal = replace(goal, notes=(*problem.notes, *goal.notes, f"cost {storage}, {len(stages)} values of eps"))
        a, b = mu.weights.detach(), nu.weights.detach()
        fits = isinstance(kernel, DenseKernel) and kernel.matrix.numel() * kernel.dtype.itemsize <= self.memory
        absorbed = torch.empty_like(kernel.matrix) if isinstance(kernel, DenseKernel) and fits else None
        state = State(kernel, a, b, problem.relax, torch.zeros_like(a), g, absorbed)
        return state, stages, goal

    def _goal(self, problem: Problem, largest: float) -> _Goal:
        machine = torch.finfo(problem.dtype).eps
        wanted = math.sqrt(machine) if self.tol is None else float(self.tol)
        reach = machine * max(REACH * largest / problem.eps, 8.0)
        if reach <= wanted:
            return _Goal(wanted, reach)
        name, ratio = str(problem.dtype).removeprefix("torch."), problem.eps / max(largest, 1e-300)
        if reach > HOPELESS:
            # aim at what still means something, and report that it is not convergence
            note = f"{name} cannot resolve eps / max|C| = {ratio:.0e}; use float64 or a larger eps"
            return _Goal(max(wanted, HOPELESS), reach, (note,))
        note = f"tolerance raised from {wanted:.1e} to {reach:.1e}, about what {name} can reach at this eps"
        if self.tol is not None:
            warnings.warn(f"{note}; use float64, a larger eps or tol=None", PrecisionWarning, stacklevel=5)
        return _Goal(reach, reach, (note,))

    def _stage(self, state: State, eps: float, last: bool, watch: _Watch) -> None:
        """One eps: from safe log-domain half-steps to products where the kernel is stored."""
        limit = self.max_iter if last else min(self.max_iter, state.iterations + STAGE_LIMIT)
        state.eps = eps
        state.f_step()
        if state.absorbed is not None:
            log_iterations(state, min(limit, state.iterations + 1), 1, watch)
            before = state.f, state.g
            if not watch.stopped and state.iterations < limit:
                if scaled_iterations(state, limit, 5, watch):
                    if not last:
                        return
                    state.f_step()
                    if watch.slow:
                        watch.foresee = False
                        watch.newton = newton_iterations(state, limit, watch)
                else:
                    state.f, state.g = before
        # the last word, and the error that is reported, are the log domain's
        log_iterations(state, state.iterations if watch.stalled else max(limit, state.iterations), 1, watch)


def _warm(problem: Problem, init: Bridge) -> Tensor:
    """The potential g of another bridge at the atoms of nu."""
    if not isinstance(init, Bridge):
        raise InvalidProblem(f"init is {type(init).__name__}; give a bridge from an earlier solve")
    g = init.potentials().g
    points = problem.sites[1]
    theirs = init.problem.nu
    if isinstance(theirs, Discrete) and theirs.n == points.shape[-2 if points.ndim > 1 else 0]:
        same = isinstance(problem.cost, MatrixCost) or (
            theirs.points is not None and torch.equal(theirs.points.to(points), points)
        )
        if same and theirs.batch_shape == problem.batch_shape:
            return g.values.to(dtype=problem.dtype, device=problem.device)
    if isinstance(problem.cost, MatrixCost):
        raise InvalidProblem("init has other atoms, where a matrix cost says nothing; give a bridge of the same size")
    return g(points.to(dtype=init.problem.dtype, device=init.problem.device)).to(points)


def _potentials(problem: Problem, state: State) -> tuple[Atoms, Atoms]:
    eps, (x, y), (at_x, at_y) = problem.eps, problem.sites, problem.values
    numbered = isinstance(problem.cost, MatrixCost)
    log_phi = torch.where(state.a > 0, state.log_a + state.f / eps, -torch.inf)
    log_psi = torch.where(state.b > 0, state.log_b + state.g / eps, -torch.inf) + problem.log_normaliser()
    return (
        Atoms(x.detach(), log_phi, at_x.detach() if numbered and at_x is not None else None),
        Atoms(y.detach(), log_psi, at_y.detach() if numbered and at_y is not None else None),
    )


@dataclass(frozen=True)
class _Goal:
    """The tolerance to stop at, what rounding leaves at least, and what to say about it."""

    tolerance: float
    reach: float
    notes: tuple[str, ...] = ()


class _Watch:
    """Decides at each check whether a stage is over, and keeps the history."""

    def __init__(
        self,
        eps: float,
        tolerance: float,
        last: bool,
        reach: float,
        history: list[tuple[int, float, float]],
        report: Callable[[Progress], None],
    ) -> None:
        self.eps, self.tolerance, self.last, self.reach = eps, tolerance, last, reach
        self.history, self.report = history, report
        self.best, self.waited, self.stopped, self.stalled = math.inf, 0, False, False
        self.first = len(history)
        self.foresee, self.slow, self.newton = False, False, 0

    def __call__(self, iteration: int, error: float) -> bool:
        if math.isnan(error):
            raise NumericalError(
                f"the marginal error is {error} at iteration {iteration}; rescale the cost, raise eps or use float64"
            )
        self.history.append((iteration, self.eps, error))
        self.report(Progress(iteration, self.eps, error, self.tolerance))
        self.waited = 0 if error < 0.999 * self.best else self.waited + 1
        self.best = min(self.best, error)
        # once said it stays said: the closing check in the log domain must not turn it into another reason
        self.stalled |= self.last and self.waited >= PATIENCE and self.best <= 2 * self.reach
        self.slow = self.foresee and self._left() > PAYS
        self.stopped = error <= self.tolerance or self.stalled or self.slow
        return self.stopped

    def _left(self) -> float:
        """Iterations to the tolerance at the rate of the last ones; 0 where it is not known yet."""
        past = self.history[self.first :][-LOOK_BACK:]
        iterations, error = past[-1][0] - past[0][0], past[-1][2]
        if len(past) < LOOK_BACK or error > NEAR or error <= self.tolerance:
            return 0.0
        fall = math.log(past[0][2] / error) / iterations
        return math.log(error / max(self.tolerance, 1e-300)) / fall if fall > 0 else math.inf

    @property
    def reason(self) -> str:
        return "stalled" if self.stalled else "max_iter"
