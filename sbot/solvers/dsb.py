r"""Diffusion Schrödinger bridge: iterative proportional fitting with learned drifts.

De Bortoli, Thornton, Heng, Doucet, "Diffusion Schrödinger Bridge with Applications to Score-Based Generative Modeling",
NeurIPS 2021, arXiv 2106.01357.  Half-step by half-step the process of one direction is simulated from its own true end and
the other direction learns to run it backwards (their algorithm 1).  Half-step 1 simulates the reference: what it learns is
a score-based generative model of mu.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from ..arrays import as_count, as_number
from ..bridge import Bridge, Report
from ..distributed import current
from ..drift_bridge import DriftBridge
from ..errors import InvalidProblem, NotConverged
from ..neural.cache import Cache, shuffled
from ..neural.controls import controls, draw, networks, refusal
from ..neural.fit import FitConfig, Trainer
from ..neural.nets import check_net, own_copy
from ..neural.residual import marginal_residual
from ..neural.training import Training, identity, same_reference
from ..problem import Problem
from ..progress import reporting
from ..reference import LinearReference, Process
from ..sde import Chain, Pull, as_grid, grid_times, walk
from ..steering import Base, BridgeBase, EquilibriumBase, ScoreBase, Steering
from .base import Solver, brief

TARGETS = ("bridge", "simplified", "drift", "mean")
#: Gradient steps of a half-step where none are given.
STEPS = 2000


@final
@dataclass(frozen=True)
class DSB(Solver):
    r"""Diffusion Schrödinger bridge (De Bortoli et al. 2021).

    With ``F_k`` the mean of a step of the process simulated, the other direction is regressed, from ``X_{k+1}``, on

    - "bridge": the control of the reference tied to the end ``X_0`` that the path came from, ``(X_0 - X_t) / t`` for Brownian
      motion.  Iterates of proportional fitting keep the bridges of their reference, so its mean is the control sought; its
      noise is smaller by about ``1 / N`` than that of a single step, and the time is continuous: paths take Heun's scheme.
      In half-step 1 it is denoising score matching.  Only for a linear reference.
    - "mean": ``X_{k+1} + F_k(X_k) - F_k(X_{k+1})``, in units of position (mean matching, their proposition 3);
    - "drift": the same as a drift, the noise scaled to unit size, so that every step weighs the same;
    - "simplified": ``X_k``, in the scale of "drift".  It is the mean of the reversed step itself, of which the other two
      are first-order approximations, and takes one evaluation less.

    Parameters
    ----------
    net : a module ``net(x, t)``, a pair (forward, backward), or None for a `TimeMLP` (a `UNet` for images); copies are
        trained, and see points in units of the data.
    steps : a number of steps, a `TimeGrid`, or times from 0 to 1.
    rounds : of two half-steps each.
    half_steps : so many half-steps in place of ``2 rounds``; 1 is score-based generative modelling of mu.
    target : "bridge", "simplified", "drift" or "mean"; None is "bridge" for a linear reference and "simplified" for others.
    fit : how the networks are trained; ``fit.steps`` counts for each half-step and is 2000 by default.
    cache : how simulated paths are kept.
    score : a pretrained score network ``score(x, t)`` of the reference started at mu, in place of half-step 1; a copy is
        taken, which is not trained.
    tol : the marginal residual that counts as converged: the energy distance between simulated and true ends, relative to
        the spread of the truth.  It is quadratic in the error: 0.005 is that of a shift by a tenth of a standard deviation.
    patience : rounds without a better residual after which it stops.

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
    >>> solver = sbot.DSB(steps=5, rounds=1, tol=10.0, fit=sbot.FitConfig(steps=5))
    >>> sbot.solve_bridge(mu, nu, 1.0, solver=solver).sample_paths(3, [0.0, 0.5, 1.0]).shape
    torch.Size([3, 3, 1])
    """

    net: nn.Module | tuple[nn.Module, nn.Module] | None = None
    steps: Any = 20
    rounds: int = 5
    half_steps: int | None = None
    target: str | None = None
    fit: FitConfig = field(default_factory=FitConfig)
    cache: Cache = field(default_factory=Cache)
    score: nn.Module | None = None
    tol: float = 0.005
    patience: int = 3

    def __post_init__(self) -> None:
        as_grid(self.steps)
        as_count(self.rounds, "rounds")
        as_count(self.patience, "patience")
        if self.half_steps is not None:
            as_count(self.half_steps, "half_steps")
        if self.target is not None and self.target not in TARGETS:
            raise InvalidProblem(f"target is {self.target!r}; give 'bridge', 'simplified', 'drift', 'mean' or None")
        if not 0 < as_number(self.tol, "tol") < math.inf:
            raise InvalidProblem(f"tol is {self.tol}; give a finite number > 0")
        for name, kind in (("fit", FitConfig), ("cache", Cache)):
            if not isinstance(getattr(self, name), kind):
                raise InvalidProblem(f"{name} is {getattr(self, name)!r}; give sbot.{kind.__name__}(...)")
        if self.score is not None and not isinstance(self.score, nn.Module):
            raise InvalidProblem(f"score is {type(self.score).__name__}; give a torch.nn.Module score(x, t), or None")

    def accepts(self, problem: Problem) -> str | None:
        said = refusal(problem)
        if said is None and self.target == "bridge" and not isinstance(problem.reference, LinearReference):
            return f"the bridges of {problem.reference!r} are not known; try target='simplified'"
        return said

    def solve(self, problem: Problem, *, init: Bridge | None = None, progress: Any = None) -> Bridge:
        """Solve ``problem``; with ``init`` the networks learn what its drifts lack."""
        said = self.accepts(problem)
        if said is not None:
            raise InvalidProblem(f"DSB: {said}")
        with reporting(progress, "DSB") as report:
            fitting = _Fitting(self, problem, init, report)
            with fitting.training:
                reason = fitting.run()
        return fitting.bridge(reason)


class _Fitting:
    """One run of `DSB`."""

    def __init__(self, solver: DSB, problem: Problem, init: Bridge | None, report: Any) -> None:
        self.solver, self.problem, self.config = solver, problem, solver.fit
        self.group = current()
        process = problem.reference
        assert isinstance(process, Process)
        like = torch.empty((), dtype=problem.dtype, device=problem.device)
        self.grid = as_grid(solver.steps)
        self.chain = Chain(
            process, grid_times(self.grid, problem.one_eps), problem.one_eps, like, problem.mu.event_shape
        )
        self.generator = torch.Generator(problem.device).manual_seed(self.config.seed)
        nets = networks(problem, solver.net, 2, self.generator)
        forward, backward = controls(problem, nets, self.generator)
        self.trainers = {
            1: Trainer("forward", forward, self.config, self.group),
            -1: Trainer("backward", backward, self.config, self.group),
        }
        self.target = solver.target or ("bridge" if isinstance(process, LinearReference) else "simplified")
        # the other targets learn the mean of a step of Euler's scheme
        self.order = 2 if self.target == "bridge" else 1
        self.bases = self._bases(init, process)
        self.count = self.config.steps or STEPS
        self.half_steps = solver.half_steps or 2 * solver.rounds
        self.first = 0 if solver.score is None else 1
        # the time stored with a row is the time at which its control is asked
        self.times = {
            way: torch.tensor([self.chain.time(k, way) for k in range(len(self.chain))]).to(like) for way in (1, -1)
        }
        self.pulls = {way: self._pulls(way, like) for way in (1, -1)}
        self.weights = {way: self._weights(way, like) for way in (1, -1)}
        self.training = Training(
            problem,
            self.config,
            (self.trainers[1], self.trainers[-1]),
            self.generator,
            identity(problem, solver, nets, init),
            report,
            self.group,
            (self.half_steps - self.first) * self.count,
        )
        self.training.cursor = {"half_step": self.first, "step": 0, "filled": 0, "refill": 0}
        self.training.tolerance = solver.tol

    def _bases(self, init: Bridge | None, process: Process) -> dict[int, Base | None]:
        event = self.problem.mu.event_shape
        bases: dict[int, Base | None] = {1: None, -1: None}
        if not isinstance(process, LinearReference):
            bases[-1] = EquilibriumBase(process, event)
        if init is not None:
            check_base(init, self.problem)
            bases = {way: BridgeBase(init, process, way) for way in (1, -1)}
        if self.solver.score is not None:
            if init is not None:
                raise InvalidProblem("both score= and init= say what to start from; drop one of them")
            bases[-1] = ScoreBase(self._score(self.solver.score), process, self.problem.one_eps, event)
        return bases

    def _score(self, given: nn.Module) -> nn.Module:
        """A copy of the caller's score network that does not change, in the dtype of the problem."""
        like = torch.empty((), dtype=self.problem.dtype, device=self.problem.device)
        score = own_copy(given, "score").to(like).eval().requires_grad_(False)
        check_net(score, self.problem.mu.event_shape, like, False)
        return score

    def _pulls(self, way: int, like: Tensor) -> list[Pull]:
        process = self.problem.reference
        if self.target != "bridge":
            return []
        assert isinstance(process, LinearReference)
        times = [self.chain.time(k, way) for k in range(len(self.chain))]
        return [Pull.at(process, self.problem.one_eps, t, way).to(like) for t in times]

    def _weights(self, way: int, like: Tensor) -> Tensor:
        """Weight of each step in the loss, with targets in units of the control."""
        chain, eps = self.chain, self.problem.one_eps
        if self.target == "bridge":  # the noise grows without bound at the far end: weigh by what is left to learn
            unit = self.trainers[way].averaged.unit
            assert isinstance(unit, Tensor)
            return 1 / (unit.square() + torch.stack([pull.size for pull in self.pulls[way]]))
        steps = torch.tensor([chain.dt(k) / eps for k in range(len(chain))], dtype=like.dtype, device=like.device)
        if self.target != "mean":
            return steps  # the noise of a target has variance eps / dt: this makes it 1
        probe = torch.ones((1, math.prod(self.problem.mu.event_shape)), dtype=like.dtype, device=like.device)
        sizes = torch.stack([chain.noise(k, probe).square().mean() for k in range(len(chain))])
        return steps * sizes / sizes.mean()  # a move in units of position

    # ---- the iteration ---------------------------------------------------------------------------------------------

    def run(self) -> str:
        """All half-steps; the reason to stop."""
        training, cursor = self.training, self.training.cursor
        while cursor["half_step"] < self.half_steps:
            if cursor["step"] == 0 and self._stalled():
                return "stalled"
            learn = -1 if cursor["half_step"] % 2 == 0 else 1
            while cursor["step"] < self.count and not training.stopped:
                self._step(learn)
            if training.stopped:
                training.save()
                return "callback"
            residual = self._residual(learn)
            best = min([row[2] for row in training.history], default=math.inf)
            training.history.append((cursor["half_step"] + 1, self.problem.one_eps, residual))
            training.residual = residual
            cursor.update(half_step=cursor["half_step"] + 1, step=0, filled=0, refill=0)
            if residual < best:
                training.save(best=True)
            training.save()
        if not training.history:  # a given score and nothing to train
            training.history.append((1, self.problem.one_eps, self._residual(-1)))
        return "half_steps" if self.solver.half_steps else "rounds"

    def _step(self, learn: int) -> None:
        training, cursor, batch = self.training, self.training.cursor, self.config.batch
        step = cursor["step"]
        if step == cursor["refill"]:
            self._fill(learn)
            steps = self.solver.cache.steps(batch, len(training.kept["x"]))
            steps = min(steps, self.count - step)
            order = shuffled(len(training.kept["x"]), steps * batch, self.generator, self.problem.device)
            training.kept["order"] = order
            cursor.update(filled=step, refill=step + steps)
        at = (step - cursor["filled"]) * batch
        rows = training.kept["order"][at : at + batch]
        k = training.kept["k"][rows].long()
        x = training.kept["x"][rows]
        ways = torch.full_like(self.times[learn][k], float(learn))
        parts = (x, self.times[learn][k], ways, training.kept["target"][rows], self.weights[learn][k])
        cursor["step"] = step + 1
        training.step(self.trainers[learn], parts, control_loss, step, self.count)

    def steering(self, way: int) -> Steering:
        """The control of one direction as it stands, without a network that has not been trained yet: it may be the caller's."""
        trainer = self.trainers[way]
        return Steering(way, self.bases[way], trainer.average if trainer.steps else None)  # type: ignore[arg-type]

    @torch.no_grad()
    def _fill(self, learn: int) -> None:
        """Simulate the other direction from its own end, and keep a row for every step of every path."""
        problem, chain, kept = self.problem, self.chain, self.training.kept
        drive = -learn
        control, own = self.steering(drive), Steering(learn, self.bases[learn], None)
        d, size = math.prod(problem.mu.event_shape), self.problem.dtype.itemsize
        needed = -(-(self.count - self.training.cursor["step"]) * self.config.batch // len(chain))
        row_bytes = 2 * d * size + 4 * (1 + self.solver.cache.reuse)  # point, target, step, and its places in the order
        n = min(needed, self.solver.cache.paths_for(len(chain), row_bytes))
        start = draw(problem, "mu" if drive > 0 else "nu", n, self.generator)
        mine = self.group.rows(n)

        def noise(k: int) -> Tensor:
            return torch.randn(start.shape, generator=self.generator, dtype=start.dtype, device=start.device)[mine]

        rows: list[tuple[int, Tensor, Tensor]] = []
        order, own_start = self.order, start[mine]
        for k, before, mean, after in walk(chain, control, own_start, drive, order=order, noise=noise):
            if self.target == "bridge":
                target = self.pulls[learn][k](after, own_start)
            else:
                back = before
                if self.target != "simplified":  # X_{k+1} + F_k(X_k) - F_k(X_{k+1})
                    there = chain.base(k, after, drive) + chain.push(k, control(chain.time(k, drive), after))
                    back = after + mean - there
                target = chain.unpush(k, back - chain.base(k, after, learn))
            rows.append((k, after, target - own.underlying(chain.time(k, learn), after)))
        kept["x"] = torch.cat([self.group.gather(x, n) for _, x, _ in rows])
        kept["target"] = torch.cat([self.group.gather(target, n) for _, _, target in rows])
        kept["k"] = torch.cat([torch.full((n,), k, dtype=torch.int32, device=start.device) for k, _, _ in rows])

    # ---- how far it got --------------------------------------------------------------------------------------------

    def _residual(self, way: int) -> float:
        """How far the direction just learned ends from its marginal."""
        seed = self.config.seed * 1009 + self.training.cursor["half_step"] + 1
        residual = marginal_residual(self.problem, self.chain, self.steering(way), way, seed, self.order)
        return self.group.agree(residual, self.problem.device)

    def _stalled(self) -> bool:
        """No better residual in the last ``patience`` rounds."""
        history = [row[2] for row in self.training.history]
        window = 2 * self.solver.patience
        return len(history) > window and min(history[-window:]) >= 0.999 * min(history[:-window])

    def bridge(self, reason: str) -> DriftBridge:
        """The result."""
        training = self.training
        last = [row[2] for row in training.history[-2:]]
        error = max(last, default=math.inf)
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
        warn_unless_converged("DSB", report)
        return DriftBridge(self.problem, self.steering(1), self.steering(-1), report, self.grid, self.order)


def control_loss(net: nn.Module, x: Tensor, t: Tensor, way: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean square over the dimensions of a control's error, for each row."""
    return weight * (net(x, t, way) - target).square().mean(1)


def check_base(init: Bridge, problem: Problem) -> None:
    """A bridge to start from has to be of the same space and the same reference."""
    if not isinstance(init, Bridge):
        raise InvalidProblem(f"init is {type(init).__name__}; give a bridge that solve_bridge returned")
    old = init.problem
    if old.mu.event_shape != problem.mu.event_shape or old.batch_shape:
        raise InvalidProblem(
            f"init has points {old.mu.event_shape} and the problem {problem.mu.event_shape}; give a bridge of this space"
        )
    if old.dtype != problem.dtype or old.device != problem.device:
        raise InvalidProblem(
            f"init is {old.dtype} on {old.device} and the problem {problem.dtype} on {problem.device}; use init.to(...)"
        )
    if old.one_eps != problem.one_eps or not same_reference(old, problem):
        raise InvalidProblem(
            f"init has eps = {old.one_eps:g} and {old.reference!r}, the problem eps = {problem.one_eps:g} and "
            f"{problem.reference!r}, with other numbers where the names agree; start from a bridge of the same reference"
        )


def warn_unless_converged(name: str, report: Report) -> None:
    """One warning that says what to do."""
    if report.converged:
        return
    warnings.warn(
        f"{name} stopped ({report.reason}) at a marginal residual of {report.error:.1e} for a tolerance of "
        f"{report.tolerance:.1e}; train longer (fit=FitConfig(steps=...)), take more steps or rounds, or start from init=",
        NotConverged,
        stacklevel=4,
    )
