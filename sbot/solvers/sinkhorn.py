"""Discrete Sinkhorn: balanced, unbalanced and semi-unbalanced, over any cost, stored or streamed."""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from ..arrays import as_count, as_number, in_problem, refuse_forward_mode, wider
from ..bridge import Bridge, Report
from ..costs import MatrixCost
from ..coupling import DiscreteCoupling
from ..diffusion import Intractable
from ..errors import InvalidProblem, NotConverged, NumericalError, PrecisionWarning
from ..feasibility import by_potentials, reached
from ..kernels import TILE_BYTES, Conditionals, DenseKernel, LogKernel, given, make_kernel, room_beside
from ..linalg import Eps, as_eps
from ..measures import Discrete
from ..memory import require_memory
from ..potential_bridge import PotentialBridge
from ..potentials import Atoms
from ..problem import NO_PAIR, Problem, lost_atom
from .base import Progress, Solver, reporting
from .cells import Correction, coarsened, levels
from .halfsteps import TRUST, Exact, HalfSteps, State, Step
from .newton import Newton
from .schedule import Schedule

#: Iterations that a stage before the last may take: it only has to be near.
STAGE_LIMIT = 100
#: First eps of the annealing, in units of the mean cost: above it half-steps need no help.  And from which on few are needed.
START, MILD = 0.1, 0.05
#: Atoms on a side of the coarsest problem that starts a streamed one, and the marginal error it is left at.
COARSEST, COARSE = 4096, 1e-2
#: Atoms in a cell of the problem just before a streamed one, at least, and the marginal error that it is left at.
FINE, FINER = 3, 3e-4
#: Looks at the error without a new best (by a thousandth) after which the last stage counts as stalled.
PATIENCE = 10
#: Plain half-steps, after which the potentials of a problem without a plan have parted.
PROBE = 20
#: Half-steps in a row; where more would be needed at the rate of the last ones, Newton takes over.
RUN = 32
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
    memory : bytes of n x m storage allowed.  Within it a model of the plan is kept, and an iteration is two matrix-vector
        products with it; beyond it tiles are streamed, of no more than this, and memory is O(n + m).  0 keeps nothing.

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
        bridge = self.solved(problem, init, progress)
        said = bridge.report
        if not said.converged:
            warnings.warn(
                f"Sinkhorn stopped ({said.reason}) after {said.iterations} iterations at marginal error {said.error:.1e}"
                f"{_worst(said, problem)} for a tolerance of {said.tolerance:.1e}; raise max_iter or eps, loosen tol, "
                f"{wider(problem.dtype, 'use float64, ')}or continue with init=bridge",
                NotConverged,
                stacklevel=3,
            )
        return bridge

    def solved(
        self, problem: Problem, init: Bridge | None = None, progress: Any = None, *, lend: bool = False
    ) -> PotentialBridge:
        """`solve` without its warning; with ``lend``, the whole plan, or its cost, is made of what the iterations leave."""
        refusal = self.accepts(problem)
        if refusal is not None:
            raise InvalidProblem(f"Sinkhorn: {refusal}")
        assert isinstance(problem.mu, Discrete) and isinstance(problem.nu, Discrete)
        refuse_forward_mode(problem.mu.weights, problem.nu.weights)
        start = time.perf_counter()
        with torch.no_grad(), reporting(progress, "Sinkhorn") as report:
            coarse = self._coarse(problem) if init is None else None
            return self._solve(problem, init, coarse, report, start, lend)

    def _solve(
        self,
        problem: Problem,
        init: Bridge | None,
        coarse: _Coarse | None,
        report: Callable[[Progress], None],
        start: float,
        lend: bool = False,
    ) -> PotentialBridge:
        with torch.no_grad():
            state, stages, goal = self._prepare(problem, init if coarse is None else coarse.bridge)
            state.correct = None if coarse is None else coarse.correction
            history: list[tuple[int, float, float]] = []
            reason, counts = "max_iter", dict.fromkeys((Exact.name, HalfSteps.name, Newton.name), 0)
            for k, (eps, tolerance) in enumerate(stages):
                last = k == len(stages) - 1
                state.eps, state.slack, state.tolerance = eps, goal.slack_at(tolerance), tolerance
                watch = _Watch(state.largest, tolerance, last, goal.reach, problem.dtype, history, report)
                self._stage(state, last, watch, counts, problem if _may_leave_no_plan(problem) else None)
                reason = watch.reason
            state.centre()
            phi, psi = _potentials(problem, state)
        errors, (error, tolerance) = state.errors(), state.worst(goal.tolerance)
        reason = "precision" if not goal.resolved else "tolerance" if error <= tolerance else reason
        outcome = Report(
            solver=repr(self),
            converged=goal.resolved and error <= tolerance,
            reason=reason,
            iterations=state.iterations,
            error=error,
            tolerance=tolerance,
            history=tuple(history),
            seconds=time.perf_counter() - start,
            notes=(*goal.notes, *_started(coarse, state.correct is not None), _account(counts, state)),
            errors=tuple((errors * goal.slack).flatten().tolist()) if problem.batch_shape else (),
            tolerances=tuple((torch.ones_like(errors) * goal.slack * goal.tolerance).flatten().tolist())
            if problem.batch_shape
            else (),
        )
        bridge = PotentialBridge(problem, phi, psi, outcome)
        if lend and state.model is not None and isinstance(bridge.coupling, DiscreteCoupling):
            bridge.coupling.lend(state.model.lent(state.kernel, state.eps))
        return bridge

    # ---- the parts -------------------------------------------------------------------------------------------------

    def _coarse(self, problem: Problem) -> _Coarse | None:
        """Where passes over all pairs are dear: a solution between cells of atoms or a few of them, near and nearly free."""
        mu, nu = problem.mu, problem.nu
        assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
        small = max(mu.n, nu.n) < 2 * COARSEST or 4 * mu.n * nu.n <= self.memory
        if small or self.anneal is None or problem.batch_shape or isinstance(problem.cost, MatrixCost):
            return None
        inner = replace(self, memory=self.memory // 2)
        # a model of the plan between cells, of four bytes an entry, in a fourth of the memory
        most = math.isqrt(self.memory) // 4
        finest = max(mu.n, nu.n) // FINE
        pairs = 2 ** sum(levels(n, finest) for n in (mu.n, nu.n))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # streamed as well, but an eighth of the pairs or fewer: a pass here saves one there
            streamed = most > 1 and self.memory < 4 * pairs and 8 * pairs <= mu.n * nu.n
            if streamed and (found := coarsened(problem, finest)) is not None:
                parts, label = found
                below = self._coarse(parts)
                least = math.sqrt(torch.finfo(problem.dtype).eps) if self.tol is None else self.tol
                finer = replace(self, tol=max(least, FINER))
                with reporting(None, "Sinkhorn") as report:
                    near = finer._solve(parts, None, below, report, time.perf_counter())
                slow = None if below is None or below.correction is None else below.correction.under(problem, label)
                return _Coarse(near, CELLS, slow, below)
            found = coarsened(problem, most)
            if found is None:
                parts = replace(problem, mu=_thinned(mu), nu=_thinned(nu), notes=())
                return _Coarse(replace(self, tol=max(self.tol or 0.0, COARSE)).solve(parts), SOME)
            parts, cells = found
            bridge = inner.solve(parts)
            state, stages, _ = inner._prepare(parts, bridge)
        state.eps = stages[-1][0]
        state.settle()
        across = make_kernel(problem.cost, parts.sites[0], problem.sites[1].detach()).T
        whole = state.known and problem.mass is None
        return _Coarse(bridge, CELLS, Correction(state, cells, across) if whole else None)

    def _prepare(self, problem: Problem, init: Bridge | None) -> tuple[State, list[tuple[Eps, float]], _Goal]:
        mu, nu, eps = problem.mu, problem.nu, problem.eps
        assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
        kernel: LogKernel
        if isinstance(problem.cost, MatrixCost):  # all atoms take part, and need no numbers
            kernel = given(problem.cost, problem.cost.values)
        else:
            kernel = make_kernel(problem.cost, *problem.sites, memory=self.memory)
        self._require_tile(kernel)
        a, b = _taking_part(problem, kernel)
        mean, largest = self._scale(problem, kernel)
        mild = float((mean / problem.eps).max()) <= 1 / MILD
        if not float(largest.max()) < math.inf:
            remedy = f"rescale the points (and eps){wider(problem.dtype, ' or use float64')}"
            raise NumericalError(f"the cost overflows this dtype; {remedy}")
        goal = self._goal(problem, largest)
        g = torch.zeros_like(nu.weights)
        if init is not None:
            g = _warm(problem, init)
            # an atom that nothing reaches has none
            g = torch.where(torch.isfinite(g), g, 0.0)
            mean = mean.clamp(max=as_eps(init.problem.eps, mean))
        start = START * mean.to(problem.dtype) if isinstance(eps, Tensor) else START * float(mean.max())
        stages = [(eps, goal.tolerance)]
        if self.anneal is not None:
            stages = list(self.anneal.stages(start, eps, goal.tolerance))
        model = Conditionals(kernel, room_beside(kernel, problem.cost, self.memory), few=mild)
        state = State(kernel, a, b, problem.relax, g, model if model.possible else None, slack=goal.slack)
        state.mass = None if problem.mass is None else problem.mass.detach()
        where = "stored" if isinstance(kernel, DenseKernel) else "computed by tiles"
        values = f"{len(stages)} value{'s' if len(stages) > 1 else ''} of eps"
        said = f"cost {where}, {values}"
        return state, stages, replace(goal, notes=(*problem.notes, *goal.notes, said))

    @staticmethod
    def _scale(problem: Problem, kernel: LogKernel) -> tuple[Tensor, Tensor]:
        """Mean and largest cost, ``(*b,)``; where the largest says that eps is large it stands for both."""
        bound = kernel.bound()
        if problem.batch_shape or bound * max(START, MILD) > problem.one_eps:
            return kernel.scale()
        largest = torch.tensor(bound, dtype=torch.float64, device=problem.device)
        return largest, largest

    def _require_tile(self, kernel: LogKernel) -> None:
        """A tile is at least one row of costs, of each problem of a batch; memory=0 stores nothing, and sets no limit to it."""
        row = math.prod(kernel.batch_shape) * max(kernel.shape) * kernel.dtype.itemsize
        what = f"one row of costs of {math.prod(kernel.batch_shape)} x {max(kernel.shape)} entries"
        if isinstance(kernel, DenseKernel):
            return
        if 0 < self.memory < row:
            raise InvalidProblem(
                f"memory is {self.memory} and {what}, the least that can be looked at, takes {row} bytes; give memory >= {row}, "
                "or memory=0 to keep nothing and choose the tiles by the device"
            )
        if row > TILE_BYTES:
            require_memory(row, kernel.device, what, "use float32, fewer atoms, or a smaller batch")
        if 0 < self.memory < TILE_BYTES:
            kernel.tile_bytes = self.memory

    def _goal(self, problem: Problem, largest: Tensor) -> _Goal:
        machine = torch.finfo(problem.dtype).eps
        wanted = math.sqrt(machine) if self.tol is None else float(self.tol)
        reach = machine * ((REACH * largest + _constant(problem)) / problem.eps).clamp(min=8.0)
        most = float(reach.max())
        if most <= wanted:
            return _Goal(wanted, most)
        # where it means nothing, aim at what still does, and report that it is not convergence
        aim = torch.where(reach > HOPELESS, max(wanted, HOPELESS), reach).clamp(min=wanted)
        least = float(aim.min())
        slack: Eps = aim / least if bool((aim > least).any()) else 1.0
        name = str(problem.dtype).removeprefix("torch.")
        double = wider(problem.dtype, "float64 or ")
        where = f" (problem {int(reach.argmax())} of the batch)" if problem.batch_shape else ""
        resolved = not bool((reach > aim.clamp(min=HOPELESS)).any())
        if not resolved:
            size, what = largest, "max|C|"
            if float(_constant(problem).max()) > float(largest.max()):
                size, what = _constant(problem), "(relax * |log of the ratio of masses|)"
            ratio = float((problem.eps / size.clamp(min=1e-300)).min())
            note = f"{name} cannot resolve eps / {what} = {ratio:.0e}{where}; use {double}a larger eps"
            if what != "max|C|":
                note += ", or equal masses without relax="
        else:
            note = f"tolerance raised from {wanted:.1e} to {most:.1e}{where}, about what {name} can reach at this eps"
            if self.tol is not None:
                warnings.warn(f"{note}; use {double}a larger eps, or tol=None", PrecisionWarning, stacklevel=7)
        return _Goal(least, float((reach / slack).max()), slack, resolved, (note,))

    def _stage(self, state: State, last: bool, watch: _Watch, counts: dict[str, int], doubtful: Problem | None) -> None:
        """One eps: half-steps while they gain enough, then Newton; every step ends in the log domain, which alone is believed.

        Where it takes long, whether ``doubtful`` forbidden pairs leave any plan is looked at now and then.
        """
        limit = self.max_iter if last else min(self.max_iter, state.iterations + STAGE_LIMIT)
        state.settle()
        span = STAGE_LIMIT
        while True:
            until = limit if doubtful is None else min(limit, state.iterations + span)
            self._iterate(state, until, last, watch, counts)
            if doubtful is None or state.iterations < until or watch.stalled or state.error() <= watch.tolerance:
                return
            _require_room(doubtful, state)
            if state.iterations >= limit:
                return
            span *= 2

    def _iterate(self, state: State, limit: int, last: bool, watch: _Watch, counts: dict[str, int]) -> None:
        step: Step = HalfSteps()
        while not watch(state.iterations, error := state.error()) and state.iterations < limit:
            begun = state.iterations
            step = _fitting(step, state)
            most = limit - begun
            hopeful = step.advance(state, min(RUN, most) if isinstance(step, HalfSteps) else most, watch.peek)
            took = state.iterations - begun
            counts[step.name] += took if isinstance(step, HalfSteps) else 1
            if hopeful and not last:
                return  # the next value of eps looks at it
            if not state.fresh:
                state.settle(keep_model=not hopeful)
            busy = _few(state, watch.tolerance)
            if busy is not None:
                part = state.take(busy)
                self._iterate(part, limit, last, watch, counts)
                state.put(busy, part)
                return
            step = _next(step, error, state.error(), watch.tolerance)


def _constant(problem: Problem) -> Tensor:
    """About the constant between f and g where marginals are relaxed, ``(*b,)``: what holds unequal masses apart."""
    mu, nu = problem.mu, problem.nu
    assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
    if problem.relax == (math.inf, math.inf):
        return torch.zeros(problem.batch_shape, dtype=torch.float64, device=problem.device)
    mass_a, mass_b = (measure.weights.detach().sum(-1, dtype=torch.float64) for measure in (mu, nu))
    return (mass_a / mass_b).log().abs() / sum(1 / rho for rho in problem.relax)


def _may_leave_no_plan(problem: Problem) -> bool:
    """Whether pairs may be forbidden so that no plan is left."""
    return problem.relax == (math.inf, math.inf) and problem.may_forbid


def _taking_part(problem: Problem, kernel: LogKernel) -> tuple[Tensor, Tensor]:
    """The weights, without those of atoms that forbidden pairs leave where they are: these have no part in a relaxed solve."""
    mu, nu, cost = problem.mu, problem.nu, problem.cost
    assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
    a, b = mu.weights.detach(), nu.weights.detach()
    known = isinstance(cost, MatrixCost)
    relaxed = problem.relax != (math.inf, math.inf)
    # what is wrong with a matrix has been said
    if not problem.may_forbid or (known and not relaxed):
        return a, b
    sides = reached(kernel, a, b)
    for name, weights, found, rho in zip(("mu", "nu"), (a, b), sides, problem.relax, strict=True):
        lost = ~found & (weights > 0)
        if rho == math.inf and problem.mass is None and bool(lost.any()):
            raise InvalidProblem(lost_atom(name, torch.nonzero(lost)[0].tolist()))
        if len(closed := torch.nonzero(~found.any(-1))):
            raise InvalidProblem(NO_PAIR.format(in_problem(closed[0].tolist())))
    if not relaxed:
        return a, b  # a partial plan leaves them at its cap
    return torch.where(sides[0], a, 0.0), torch.where(sides[1], b, 0.0)


def _require_room(problem: Problem, state: State) -> None:
    """`InvalidProblem` where the potentials, after some plain half-steps, show that forbidden pairs leave no plan."""
    probe = copy.copy(state)
    probe.model = None  # which a pass of the probe would overwrite
    for steps in (0, PROBE):
        for _ in range(steps):
            Exact(memory=0).advance(probe, 1, lambda *_: False)
            probe.settle(keep_model=False)
        short = by_potentials(probe.kernel, probe.f, probe.a, probe.b, probe.mass, problem.slack)
        if short is not None:
            raise InvalidProblem(str(short))


def _few(state: State, tolerance: float) -> Tensor | None:
    """The problems of a batch that are not done, where they are so few that they are better solved by themselves."""
    if len(state.kernel.batch_shape) != 1:
        return None
    busy = torch.nonzero(state.errors() > tolerance)[:, 0]
    return busy if 0 < len(busy) <= state.kernel.batch_shape[0] / 2 else None


def _fitting(step: Step, state: State) -> Step:
    """``step``, where the state allows it: a model and masses that are not too far off, else the exact half-step."""
    if not state.known and state.model is not None and state.largest <= state.roomless / 2:
        state.settle()
    exact = step if isinstance(step, Exact) else Exact()
    if not state.known:
        return exact
    off = (state.goal() / state.columns).log()
    if state.zeros:
        off = torch.where(state.live[1], off, 0.0)
    return exact if bool((off.abs() > TRUST).any()) else HalfSteps() if isinstance(step, Exact) else step


def _next(step: Step, before: float, after: float, tolerance: float) -> Step:
    """Half-steps as long as another run of them will do, Newton as long as it gains."""
    if isinstance(step, Newton):
        return step if after < 0.9 * before else HalfSteps()
    if not isinstance(step, HalfSteps):
        return step
    left = math.log(max(after, 1e-300) / max(tolerance, 1e-300))
    return step if left <= RUN * step.fall else Newton()


def _thinned(measure: Discrete) -> Discrete:
    """A fourth of the atoms, each of the same weight: systematic sampling in a random order of the atoms."""
    assert measure.points is not None
    keep = max(COARSEST, measure.n // 4)
    if keep >= measure.n:
        return Discrete(measure.points.detach(), measure.weights.detach())
    # an order of its own: the points may be sorted, and nobody's generator is touched
    order = torch.randperm(measure.n, generator=torch.Generator().manual_seed(0)).to(measure.device)
    weights = measure.weights.detach()[order].double()
    ladder = weights.cumsum(-1)
    marks = (torch.arange(keep, device=measure.device, dtype=torch.float64) + 0.5) / keep * ladder[-1]
    picked = order[torch.searchsorted(ladder, marks).clamp(max=measure.n - 1)]
    share = (ladder[-1] / keep).to(weights.dtype).expand(keep)
    return Discrete(measure.points.detach()[picked], share.to(measure.weights))


CELLS, SOME = "cells of atoms", "of the atoms"


class _Coarse(NamedTuple):
    """A solution of a smaller problem, between what, what is known of slow directions, and what that solution started from."""

    bridge: Bridge
    what: str
    correction: Correction | None = None
    below: _Coarse | None = None

    @property
    def sizes(self) -> str:
        mu, nu = self.bridge.problem.mu, self.bridge.problem.nu
        assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
        return f"between {mu.n} and {nu.n} {self.what}"


def _started(coarse: _Coarse | None, corrected: bool) -> tuple[str, ...]:
    if coarse is None:
        return ()
    said, below = f"started from a solution {coarse.sizes}", coarse.below
    while below is not None:
        said, below = f"{said}, that from one {below.sizes}", below.below
    if coarse.correction is None:
        return (said,)
    return (f"{said}, whose Newton steps correct the passes{'' if corrected else ' at first'}",)


def _worst(report: Report, problem: Problem) -> str:
    """Which problem of a batch is furthest from its tolerance, as `Bridge` is indexed."""
    if not problem.batch_shape:
        return ""
    behind = np.array(report.errors) / np.array(report.tolerances)
    index = tuple(int(k) for k in np.unravel_index(int(behind.argmax()), problem.batch_shape))
    return f" in problem {index[0] if len(index) == 1 else index} of the batch"


def _account(counts: dict[str, int], state: State) -> str:
    done = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    if state.known and state.model is not None and state.model.sparse:
        done += f"; {state.model.share:.1%} of the plan's entries kept at the end"
    work = "on a kept model of the plan" if counts[HalfSteps.name] or counts[Newton.name] else "streamed"
    return f"iterations {work}: {done or 'none'}; {state.passes} passes over the cost"


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
    ours = problem.mu
    numbered = isinstance(init.problem.cost, MatrixCost)
    if numbered or (theirs.batch_shape, theirs.event_shape) != (ours.batch_shape, ours.event_shape):
        what = "has a cost matrix" if numbered else f"has batch {theirs.batch_shape} and points {theirs.event_shape}"
        raise InvalidProblem(
            f"init {what}, and the problem has batch {ours.batch_shape} and points {ours.event_shape}; give a bridge of the "
            "same form, or init=None"
        )
    return g(points.to(dtype=init.problem.dtype, device=init.problem.device)).to(points)


def _potentials(problem: Problem, state: State) -> tuple[Atoms, Atoms]:
    eps, (x, y), (at_x, at_y) = state.unit, problem.sites, problem.values
    numbered = isinstance(problem.cost, MatrixCost)
    log_phi, log_psi = state.log_a + state.f / eps, state.log_b + state.g / eps
    if state.zeros:
        log_phi, log_psi = (
            torch.where(state.live[0], log_phi, -torch.inf),
            torch.where(state.live[1], log_psi, -torch.inf),
        )
    log_psi = log_psi + problem.log_normaliser()
    return (
        Atoms(x.detach(), log_phi, at_x.detach() if numbered and at_x is not None else None),
        Atoms(y.detach(), log_psi, at_y.detach() if numbered and at_y is not None else None),
    )


@dataclass(frozen=True)
class _Goal:
    """The tolerance to stop at, what rounding leaves at least, and what to say about it.

    Both are those of the problem of a batch that can do best; the others are measured in their ``slack``.
    """

    tolerance: float
    reach: float
    slack: Eps = 1.0
    resolved: bool = True
    notes: tuple[str, ...] = ()

    def slack_at(self, tolerance: float) -> Eps:
        """The slack of a stage that is left at ``tolerance``: looser only for problems that have to be."""
        if not isinstance(self.slack, Tensor):
            return self.slack
        return (self.slack * self.tolerance / tolerance).clamp(min=1.0)


class _Watch:
    """Decides at each check whether a stage is over, and keeps the history."""

    def __init__(
        self,
        eps: float,
        tolerance: float,
        last: bool,
        reach: float,
        dtype: torch.dtype,
        history: list[tuple[int, float, float]],
        report: Callable[[Progress], None],
    ) -> None:
        self.eps, self.tolerance, self.last, self.reach, self.dtype = eps, tolerance, last, reach, dtype
        self.history, self.report = history, report
        self.best, self.waited, self.stalled = math.inf, 0, False

    def __call__(self, iteration: int, error: float) -> bool:
        if math.isnan(error):
            remedy = f"rescale the cost or raise eps{wider(self.dtype, ' or use float64')}"
            raise NumericalError(f"the marginal error is {error} at iteration {iteration}; {remedy}")
        self._note(iteration, error)
        self.waited = 0 if error < 0.999 * self.best else self.waited + 1
        self.best = min(self.best, error)
        self.stalled = self.last and self.waited >= PATIENCE and self.best <= 2 * self.reach
        return error <= self.tolerance or self.stalled

    def peek(self, iteration: int, error: float) -> bool:
        """Between passes: whether the model says that a pass would find the goal reached."""
        self._note(iteration, error)
        return error <= 0.5 * self.tolerance

    def _note(self, iteration: int, error: float) -> None:
        self.history.append((iteration, self.eps, error))
        self.report(Progress(iteration, self.eps, error, self.tolerance))

    @property
    def reason(self) -> str:
        return "stalled" if self.stalled else "max_iter"
