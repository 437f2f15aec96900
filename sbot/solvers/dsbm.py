r"""Diffusion Schrödinger bridge matching: both drifts from bridges of the reference between pairs that the drifts make.

Shi, De Bortoli, Campbell, Doucet, "Diffusion Schrödinger Bridge Matching", NeurIPS 2023, arXiv 2303.16852; in the online
form of De Bortoli et al. 2024 (arXiv 2409.09347) and Peluchetti 2024 (BM2): one network for both directions, both losses
in one step, pairs refreshed from its moving average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from ..arrays import as_count, as_number
from ..bridge import Bridge, Report
from ..distributed import current
from ..drift_bridge import DriftBridge
from ..errors import InvalidProblem
from ..neural.controls import both_ways, draw, networks, refusal
from ..neural.fit import FitConfig, Trainer
from ..neural.residual import marginal_residual
from ..neural.training import Training, identity
from ..problem import Problem
from ..progress import reporting
from ..reference import LinearReference
from ..sde import TABLE, Chain, PinnedTable, as_grid, grid_times, walk
from ..steering import BridgeBase, Steering
from .base import Solver, brief
from .dsb import check_base, control_loss, warn_unless_converged

#: Gradient steps where none are given.
STEPS = 10_000
#: Distinct times in a batch where a base bridge has to be evaluated at each of them.
GROUPS = 16
#: Fewest gradient steps between two looks at the residual.
LOOK = 100


@final
@dataclass(frozen=True)
class DSBM(Solver):
    r"""Diffusion Schrödinger bridge matching (Shi et al. 2023), both directions at once.

    Between a pair ``(x0, x1)`` the reference is a known Gaussian bridge.  At a random time on it, the forward control
    is regressed on the one that leads to ``x1``, the backward control on the one that leads to ``x0``; for Brownian motion

    .. math:: \frac{x_1 - x_t}{1 - t}, \qquad \frac{x_0 - x_t}{t}.

    The forward control learns from pairs that end in true samples of nu, the backward from pairs that start in true samples
    of mu; the other ends are simulated by the moving average of the network.

    Parameters
    ----------
    net : a module ``net(x, t, direction)``, a module ``net(x, t)`` (two copies), a pair (forward, backward), or None for a
        `TimeMLP` (a `UNet` for images); copies are trained, and see points in units of the data.
    init : the pairs it starts from: "zero", those of the reference (then this is proportional fitting, as `DSB`);
        "independent" (iterative Markovian fitting); a solver, whose bridge between the same marginals then teaches, such as
        ``Sinkhorn()`` on all data or ``PlugIn(samples=256)`` on fresh mini-batches; or any bridge.
    hold : share of the training that uses the pairs of ``init``; 1 never simulates, and a bridge has then to be of the
        same reference and eps.  It is 0 for "zero".
    steps : of simulation: a number, a `TimeGrid`, or times from 0 to 1.
    order : 2 for Heun's scheme, two evaluations a step; 1 for Euler-Maruyama, which needs many times the steps.
    pairs : simulated at a time, in each direction.
    refresh : gradient steps between simulations.
    fit : how the network is trained; ``fit.steps`` is 10,000 by default.
    tol : the marginal residual that counts as converged, see `DSB`.

    Raises
    ------
    InvalidProblem : an option out of range, a network or a sampler with the wrong output, a folder of another run.
    NumericalError : a loss that is not finite; the last checkpoint is kept.

    Warns
    -----
    NotConverged : the residual is above ``tol``.

    Examples
    --------
    >>> import torch, sbot
    >>> mu, nu = sbot.Gaussian([0.0], [[1.0]]), sbot.Gaussian([1.0], [[1.0]])
    >>> solver = sbot.DSBM(steps=5, tol=10.0, fit=sbot.FitConfig(steps=5))
    >>> sbot.solve_bridge(mu, nu, 1.0, solver=solver).sample_paths(3, [0.0, 0.5, 1.0]).shape
    torch.Size([3, 3, 1])
    """

    net: nn.Module | tuple[nn.Module, nn.Module] | None = None
    init: str | Solver | Bridge = "zero"
    hold: float = 0.3
    steps: Any = 12
    order: int = 2
    pairs: int = 4096
    refresh: int = 300
    fit: FitConfig = field(default_factory=FitConfig)
    tol: float = 0.005

    def __post_init__(self) -> None:
        as_grid(self.steps)
        as_count(self.pairs, "pairs")
        as_count(self.refresh, "refresh")
        if as_count(self.order, "order") > 2:
            raise InvalidProblem(f"order is {self.order}; give 1 (Euler-Maruyama) or 2 (Heun)")
        if not isinstance(self.init, (Solver, Bridge)) and self.init not in ("zero", "independent"):
            raise InvalidProblem(f"init is {self.init!r}; give 'zero', 'independent', a solver or a bridge")
        if not 0 <= as_number(self.hold, "hold") <= 1:
            raise InvalidProblem(f"hold is {self.hold}; give a share of the training in [0, 1]")
        if not 0 < as_number(self.tol, "tol") < math.inf:
            raise InvalidProblem(f"tol is {self.tol}; give a finite number > 0")
        if not isinstance(self.fit, FitConfig):
            raise InvalidProblem(f"fit is {self.fit!r}; give sbot.FitConfig(...)")

    def accepts(self, problem: Problem) -> str | None:
        said = refusal(problem)
        if said is None and not isinstance(problem.reference, LinearReference):
            return f"the reference is {problem.reference!r}, whose bridges are not known; try DSB()"
        return said

    def solve(self, problem: Problem, *, init: Bridge | None = None, progress: Any = None) -> Bridge:
        """Solve ``problem``; with ``init`` the network learns what its drifts lack."""
        said = self.accepts(problem)
        if said is not None:
            raise InvalidProblem(f"DSBM: {said}")
        with reporting(progress, "DSBM") as report:
            fitting = _Fitting(self, problem, init, report)
            with fitting.training:
                reason = fitting.run()
        return fitting.bridge(reason)


class _Fitting:
    """One run of `DSBM`."""

    def __init__(self, solver: DSBM, problem: Problem, base: Bridge | None, report: Any) -> None:
        self.solver, self.problem, self.config = solver, problem, solver.fit
        self.group = current()
        process = problem.reference
        assert isinstance(process, LinearReference)
        like = torch.empty((), dtype=problem.dtype, device=problem.device)
        self.grid = as_grid(solver.steps)
        self.chain = Chain(
            process, grid_times(self.grid, problem.one_eps), problem.one_eps, like, problem.mu.event_shape
        )
        self.table = PinnedTable(process, problem.one_eps, like)
        self.generator = torch.Generator(problem.device).manual_seed(self.config.seed)
        nets = networks(problem, solver.net, 1, self.generator)
        self.trainer = Trainer("both", both_ways(problem, nets, self.generator), self.config, self.group)
        self.bases: dict[int, BridgeBase | None] = {1: None, -1: None}
        if base is not None:
            check_base(base, problem)
            self.bases = {way: BridgeBase(base, process, way) for way in (1, -1)}
        self.teacher = self._teacher()
        self.count = self.config.steps or STEPS
        self.held = 0 if solver.init == "zero" else round(solver.hold * self.count)
        self.training = Training(
            problem,
            self.config,
            (self.trainer,),
            self.generator,
            identity(problem, solver, nets, base),
            report,
            self.group,
            self.count,
        )
        self.training.cursor = {"step": 0, "refill": 0}
        self.training.tolerance = solver.tol

    def _teacher(self) -> Any:
        """What gives the first pairs: a bridge, something that draws pairs itself, or None."""
        init, problem = self.solver.init, self.problem
        if isinstance(init, Solver):
            said = init.accepts(problem)
            if said is not None:
                raise InvalidProblem(f"DSBM: init={type(init).__name__}: {said}")
            return init  # it solves when its pairs are wanted: after the folder is found fit to write
        if isinstance(init, Bridge):
            if init.problem.mu.event_shape != problem.mu.event_shape or init.problem.device != problem.device:
                raise InvalidProblem(
                    "the bridge given as init is of another space or device; give one of these marginals"
                )
            if self.solver.hold == 1:  # nothing else would mend its reference
                check_base(init, problem)
            return init
        return None

    # ---- the iteration ---------------------------------------------------------------------------------------------

    def run(self) -> str:
        """All steps; the reason to stop."""
        training, cursor = self.training, self.training.cursor
        look = max(LOOK, self.count // 10)
        while cursor["step"] < self.count and not training.stopped:
            # before the step, for a run that goes on from a checkpoint of just then
            looks = sum(row[0] % look == 0 for row in training.history)  # others are where a callback stopped it
            if cursor["step"] and cursor["step"] % look == 0 and looks < cursor["step"] // look:
                self._look()
            self._step()
        if not training.history or training.history[-1][0] != cursor["step"]:
            self._look()
        training.save()
        return "callback" if training.stopped else "steps"

    def _step(self) -> None:
        training, cursor = self.training, self.training.cursor
        step = cursor["step"]
        if step == cursor["refill"]:
            self._refresh()
            cursor["refill"] = step + self.solver.refresh
            if step < self.held:  # the last pairs of init end where its share does
                cursor["refill"] = min(cursor["refill"], self.held)
        parts = self._rows()
        cursor["step"] = step + 1
        training.step(self.trainer, parts, control_loss, step, self.count)

    @torch.no_grad()
    def _rows(self) -> tuple[Tensor, ...]:
        """A batch: half of it for each direction, the same pairs under mirrored noise."""
        kept, table, generator = self.training.kept, self.table, self.generator
        device, half = self.problem.device, max(1, self.config.batch // 2)
        n = len(kept["x0"]) // 2
        times = GROUPS if self.bases[1] is not None else half
        # one time in each equal part of [0, 1]
        strata = (torch.arange(times, device=device) + torch.rand(times, generator=generator, device=device)) / times
        k = (strata * TABLE).long().clamp(max=TABLE - 1).repeat_interleave(-(-half // times))[:half]
        parts = []
        for way in (1, -1):
            # forward learns from pairs with a true end, the second half of the pool; backward from those with a true start
            pick = torch.randint(n, (half,), generator=generator, device=device) + (n if way > 0 else 0)
            x0, x1 = kept["x0"][pick], kept["x1"][pick]
            x = table.place(k, x0, x1, torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=device))
            target, noise = table.target(k, x, x1 if way > 0 else x0, way)
            target = target - self._underlying(way, k, x)
            unit = self.trainer.averaged.unit
            assert isinstance(unit, Tensor)
            # a target's noise grows without bound at its far end: weigh by what is left to learn
            weight = 1 / (unit.square() + noise)
            parts.append((x, table.times[k], torch.full_like(weight, float(way)), target, weight))
        return tuple(torch.cat(pair) for pair in zip(*parts, strict=True))

    def _underlying(self, way: int, k: Tensor, x: Tensor) -> Tensor:
        base = self.bases[way]
        if base is None:
            return torch.zeros_like(x)
        out = torch.empty_like(x)
        for index in sorted(set(k.tolist())):
            rows = k == index
            out[rows] = base((index + 0.5) / TABLE, x[rows])
        return out

    def steering(self, way: int) -> Steering:
        """The control of one direction as it stands, without a network that has not been trained yet: it may be the caller's."""
        return Steering(way, self.bases[way], self.trainer.average if self.trainer.steps else None)  # type: ignore[arg-type]

    @torch.no_grad()
    def _refresh(self) -> None:
        """New pairs: in the first half the start is true, in the second the end."""
        kept, n, step = self.training.kept, self.solver.pairs, self.training.cursor["step"]
        if step < self.held:
            kept["x0"], kept["x1"] = self._taught(2 * n)
            return
        ends = {1: draw(self.problem, "mu", n, self.generator), -1: draw(self.problem, "nu", n, self.generator)}
        mine = self.group.rows(n)
        far = {}
        for way, start in ends.items():

            def noise(k: int, like: Tensor = start) -> Tensor:
                return torch.randn(like.shape, generator=self.generator, dtype=like.dtype, device=like.device)[mine]

            x = start[mine]
            for *_, after in walk(self.chain, self.steering(way), x, way, order=self.solver.order, noise=noise):
                x = after
            far[way] = self.group.gather(x, n)
            ends[way] = self.group.gather(start[mine], n)  # draws of processes differ where a sampler has its own seed
        kept["x0"], kept["x1"] = torch.cat([ends[1], far[-1]]), torch.cat([far[1], ends[-1]])

    def _taught(self, n: int) -> tuple[Tensor, Tensor]:
        if self.teacher is None:
            return draw(self.problem, "mu", n, self.generator), draw(self.problem, "nu", n, self.generator)
        if isinstance(self.teacher, Solver) and not hasattr(self.teacher, "pairs"):
            self.teacher = self.teacher.solve(self.problem)
        if isinstance(self.teacher, Solver):
            x0, x1 = self.teacher.pairs(self.problem, n, generator=self.generator)  # type: ignore[attr-defined]
        else:
            x0, x1 = self.teacher.sample_pairs(n, generator=self.generator)
        like = self.trainer.parameters[0]
        return x0.to(like.dtype).flatten(1), x1.to(like.dtype).flatten(1)

    # ---- how far it got --------------------------------------------------------------------------------------------

    def _look(self) -> None:
        training = self.training
        step = training.cursor["step"]
        seed = self.config.seed * 1009 + step
        residual = max(
            marginal_residual(self.problem, self.chain, self.steering(way), way, seed, self.solver.order)
            for way in (1, -1)
        )
        training.residual = self.group.agree(residual, self.problem.device)
        training.history.append((step, self.problem.one_eps, training.residual))

    def bridge(self, reason: str) -> DriftBridge:
        """The result."""
        training = self.training
        error = training.history[-1][2]
        report = Report(
            solver=brief(self.solver),
            converged=error <= self.solver.tol,
            reason=reason if error > self.solver.tol else "tolerance",
            iterations=training.done,
            error=error,
            tolerance=self.solver.tol,
            history=tuple(training.history),
            seconds=training.elapsed,
            notes=self.problem.notes,
        )
        warn_unless_converged("DSBM", report)
        return DriftBridge(self.problem, self.steering(1), self.steering(-1), report, self.grid, self.solver.order)
