r"""Light Schrödinger bridges: a mixture potential, fitted to samples by a loss without simulation or inner problem.

Korotin, Gushchin, Burnaev, "Light Schrödinger Bridge", ICLR 2024, arXiv 2310.01174; the loss on given pairs is that of
Gushchin, Kholkin, Burnaev, Korotin, "Light and Optimal Schrödinger Bridge Matching", ICML 2024, arXiv 2402.03207.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from ..arrays import as_count, as_number, as_tensor, require_finite
from ..bridge import Bridge, Report
from ..distributed import Group
from ..errors import InvalidProblem, NotConverged
from ..measures import Discrete
from ..metrics import energy_distance
from ..neural.fit import FitConfig, Trainer
from ..potential_bridge import PotentialBridge
from ..potentials import Atoms, Quadratics
from ..problem import Problem
from ..reference import LinearReference
from .base import Progress, Solver, reporting
from .mixture import AdjustedMixture, as_operator, start

#: Gradient steps where none are given, and the share of them in which the temperature falls.
STEPS, COOLING = 2000, 0.6
#: Samples of each end behind the units and the start, behind the looks at the objective, and behind the residual.
LOOK, HELD_OUT, COMPARED = 8192, 2048, 2048
#: The start stops at the temperature ``d / COLD``; below it, it would gather all mass in few components.
COLD = 32
#: Looks at the held-out objective.
LOOKS = 20
#: Times in a batch of the matching loss, and the latest of them: at 1 its target has infinite variance.
GROUPS, LATEST = 16, 0.99


@final
@dataclass(frozen=True)
class LightSB(Solver):
    r"""The potential ``psi = sum_k w_k N(r_k, S_k) e^{quadratic}``, learned from samples of any two measures.

    For such a potential the plan, the drift and the map are in closed form, and with ``c`` its integral against the
    reference and ``v`` its density against the cost,

    .. math:: E_\mu \log c - E_\nu \log v = KL(P^* \,|\, P) + const

    for the true plan P* (Korotin et al. 2024, prop. 3.1): samples of both ends are all it needs.  Every reference with
    scalar coefficients has the plan of a Brownian one, and is served by the same fit; ``psi`` belongs to the reference given.

    It starts from k-means on nu and some rounds of expectation-maximisation at a high temperature (large eps), and goes on
    by Adam while the temperature falls to eps; see `FitConfig` for the moving average it returns.  ``phi`` is
    ``mu / psi_0`` on the atoms of mu, exact where it is `Discrete`, else on ``atoms`` draws: these serve `log_prob`,
    `reverse_drift` and `cost`, and nothing else depends on them.  Away from their draws, at a scale below
    ``sqrt(eps t)``, these three are as poor as any estimate from so many points.

    Parameters
    ----------
    components : number of components, K.
    covariance : "diagonal" or "full", of each component.
    loss : "dual", from independent samples of mu and nu; or "matching", on the pairs of ``teacher``: the drift is
        regressed on that of the reference tied to both ends.  Both have the same minimiser (Gushchin et al. 2024, thm. 3.2).
    teacher : for the matching loss: a bridge, whose pairs are drawn, or tensors ``(x0, x1)``, ``(n, d)`` each.
    atoms : draws of mu behind ``phi``.
    fit : how it is trained; by default 2000 steps of 512 samples at a rate of 0.01.  No checkpoints are written.
    tol : residual that counts as converged: the energy distance between samples of ``X_1`` and of nu, over
        ``E|Y - Y'| / 2`` of nu.  Its noise is about 1e-3.

    Returns
    -------
    A `PotentialBridge`.  ``report.history`` has ``(step, eps, objective)`` with the dual loss above, in nats, at the eps of
    that step, on samples drawn apart (from the same atoms where a measure is discrete).

    Raises
    ------
    InvalidProblem : an option out of range, samples with NaN or of the wrong shape, pairs that do not fit.
    NumericalError : a loss that is not finite.

    Warns
    -----
    NotConverged : the residual is above ``tol``.

    Examples
    --------
    >>> import torch, sbot
    >>> two = sbot.Mixture(torch.zeros(2), torch.tensor([[-2.0], [2.0]]), 0.1 * torch.ones(2, 1, 1))
    >>> solver = sbot.LightSB(components=4, atoms=256, fit=sbot.FitConfig(steps=100, lr=0.01, ema=0.9))
    >>> bridge = sbot.solve_bridge(sbot.Gaussian([0.0], [[1.0]]), two, 1.0, solver=solver)
    >>> bridge.transport(torch.tensor([[-1.0], [1.0]])).sign().flatten().tolist()
    [-1.0, 1.0]
    """

    components: int = 20
    covariance: str = "diagonal"
    loss: str = "dual"
    teacher: Any = field(default=None, repr=False, compare=False)
    atoms: int = 4096
    fit: FitConfig = field(default_factory=lambda: FitConfig(lr=1e-2, ema=0.99, clip=None))
    tol: float = 5e-3

    def __post_init__(self) -> None:
        as_count(self.components, "components")
        as_count(self.atoms, "atoms")
        if self.covariance not in ("diagonal", "full"):
            raise InvalidProblem(f"covariance is {self.covariance!r}; give 'diagonal' or 'full'")
        if self.loss not in ("dual", "matching"):
            raise InvalidProblem(f"loss is {self.loss!r}; give 'dual' or 'matching'")
        if (self.loss == "matching") != (self.teacher is not None):
            raise InvalidProblem(
                "the matching loss regresses on pairs, and only it does; give loss='matching' together with teacher=, a "
                "bridge or a pair of tensors (x0, x1)"
            )
        if not isinstance(self.fit, FitConfig):
            raise InvalidProblem(f"fit is {self.fit!r}; give sbot.FitConfig(...)")
        if self.fit.folder is not None or self.fit.autocast or self.fit.compile:
            raise InvalidProblem(
                "LightSB trains for seconds, in full precision; drop folder=, autocast= and compile= from fit"
            )
        if not 0 < as_number(self.tol, "tol") < math.inf:
            raise InvalidProblem(f"tol is {self.tol}; give a finite number > 0")

    def accepts(self, problem: Problem) -> str | None:
        refusal = refuse_unlike_points(problem)
        if refusal is not None:
            return refusal
        reference = problem.reference
        if not isinstance(reference, LinearReference):
            return f"the reference is {reference!r}, needs a linear one; try reference=sbot.Brownian()"
        step = reference.transition(0.0, 1.0)
        if step.phi.ndim or step.cov.ndim:
            return "the reference mixes coordinates (its coefficients are matrices); try sbot.PlugIn(), which takes any"
        return None

    def solve(self, problem: Problem, *, init: Bridge | None = None, progress: Any = None) -> Bridge:
        """Fit the potential; ``init`` is refused, the start is made from samples."""
        refusal = self.accepts(problem)
        if refusal is not None:
            raise InvalidProblem(f"LightSB: {refusal}")
        if init is not None:
            raise InvalidProblem("LightSB makes its own start; drop init=, or learn from its pairs: teacher=bridge")
        begun = time.perf_counter()
        with reporting(progress, "LightSB") as report:
            fitting = _Fitting(self, problem, report)
            mixture, history, steps = fitting.run()
        with torch.no_grad():
            psi = fitting.potential(mixture)
            phi, psi = _normalised(problem, psi, self.atoms, fitting.generator)
            outcome = Report(repr(self), True, "tolerance", steps, 0.0, self.tol, history, 0.0, problem.notes)
            error = _residual(PotentialBridge(problem, phi, psi, outcome), fitting.generator)
        converged = error <= self.tol
        reason = "tolerance" if converged else "max_iter"
        seconds = time.perf_counter() - begun
        outcome = replace(outcome, converged=converged, reason=reason, error=error, seconds=seconds)
        if not converged:
            warnings.warn(
                f"LightSB stopped after {steps} steps at a marginal residual of {error:.1e} for a tolerance of "
                f"{self.tol:.1e}; give more components=, covariance='full', or more steps: fit=FitConfig(steps=...)",
                NotConverged,
                stacklevel=3,
            )
        return PotentialBridge(problem, phi, psi, outcome)


def refuse_unlike_points(problem: Problem) -> str | None:
    """Why a solver on samples cannot take the problem: no points, a batch, relaxed marginals or other masses."""
    for name, measure in (("mu", problem.mu), ("nu", problem.nu)):
        if len(measure.event_shape) != 1:
            return f"{name} has samples of shape {measure.event_shape}, needs points (d,); flatten them"
        if measure.batch_shape:
            return f"{name} has batch dimensions {measure.batch_shape}; solve the problems one by one"
    if problem.eps_leaf is not None:
        return "eps wants a gradient, which exists for Sinkhorn and ClosedForm only; pass float(eps)"
    if not problem.hard:
        return (
            "the marginals are relaxed or the plan is partial; try Sinkhorn on samples: sbot.Discrete(mu.sample(4096))"
        )
    ends = (problem.mu, problem.nu)
    if not all(isinstance(end, Discrete) for end in ends):
        for name, end in zip(("mu", "nu"), ends, strict=True):
            if isinstance(end, Discrete) and abs(float(end.mass) - 1) > 1e-4:
                return f"{name} has mass {float(end.mass):.6g} and the other end has mass one; normalise the weights"
    return None


class _Fitting:
    """One fit: samples in units of the data, the loop, and the way back."""

    def __init__(self, solver: LightSB, problem: Problem, report: Callable[[Progress], None]) -> None:
        self.solver, self.problem, self.report = solver, problem, report
        self.generator = torch.Generator(problem.device).manual_seed(solver.fit.seed)
        reference = problem.reference
        assert isinstance(reference, LinearReference)
        self.like = torch.empty((), dtype=problem.dtype, device=problem.device)
        self.step = reference.transition(0.0, 1.0).to(self.like)
        self.noise = problem.one_eps * self.step.cov  # eps Q
        self.pairs = self._pairs(solver.teacher)
        x, y = self._raw(LOOK)
        self.centres = x.mean(0), y.mean(0)
        # a point mass has no scale of its own: that of the noise
        self.scales = tuple(
            scale if float(scale) > 0 else self.noise.sqrt()
            for scale in ((part - part.mean(0)).square().mean().sqrt() for part in (x, y))
        )
        self.tau = float(self.noise / (self.scales[0] * self.scales[1]))
        self.look = self._scaled(x, y)

    def _pairs(self, teacher: Any) -> tuple[Tensor, Tensor] | None:
        if teacher is None or isinstance(teacher, Bridge):
            return None
        if not isinstance(teacher, (tuple, list)) or len(teacher) != 2:
            raise InvalidProblem(f"teacher is {type(teacher).__name__}; give a bridge or a pair of tensors (x0, x1)")
        x, y = (
            require_finite(as_tensor(part, name, like=self.like), name).detach().to(self.like)
            for part, name in zip(teacher, ("x0", "x1"), strict=True)
        )
        if x.ndim != 2 or x.shape != y.shape or (x.shape[1],) != self.problem.mu.event_shape or len(x) == 0:
            raise InvalidProblem(
                f"the pairs have shapes {tuple(x.shape)} and {tuple(y.shape)}; give (n, {self.problem.mu.event_shape[0]}) each"
            )
        return x, y

    # ---- samples -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _raw(self, n: int) -> tuple[Tensor, Tensor]:
        """Where the reference takes samples of mu, and samples of nu; pairs of the teacher where there is one."""
        teacher, problem = self.solver.teacher, self.problem
        if self.pairs is not None:
            index = torch.randint(len(self.pairs[0]), (n,), generator=self.generator, device=self.like.device)
            x, y = (part[index] for part in self.pairs)
        elif teacher is not None:
            x, y = (part.to(self.like) for part in teacher.sample_pairs(n, generator=self.generator))
        else:
            x, y = (
                require_finite(end.sample(n, generator=self.generator), f"a draw of {name}").detach()
                for name, end in (("mu", problem.mu), ("nu", problem.nu))
            )
        return self.step.mean(x), y

    def _scaled(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.centres[0]) / self.scales[0], (y - self.centres[1]) / self.scales[1]

    def _batches(self, n: int) -> Any:
        """Endless batches; several are drawn at once, which is cheaper, but not more than a mixture has memory for."""
        many = max(1, min(16, 2**22 // (n * self.problem.mu.event_shape[0] ** 2)))
        while True:
            x, y = self._scaled(*self._raw(many * n))
            yield from zip(torch.split(x, n), torch.split(y, n), strict=True)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def run(self) -> tuple[AdjustedMixture, tuple[tuple[int, float, float], ...], int]:
        """Start, cool, converge: the averaged mixture, the history and the number of steps."""
        solver, fit = self.solver, self.solver.fit
        total = STEPS if fit.steps is None else fit.steps
        u, w = self.look
        hot = max(self.tau, u.shape[1] / COLD)
        first = start(u, w, solver.components, hot, solver.covariance == "full", self.generator)
        trainer = Trainer("the potential", first, fit, Group())
        held_out, batches = self._scaled(*self._raw(HELD_OUT)), self._batches(fit.batch)
        history: list[tuple[int, float, float]] = []
        every, done, asked = max(1, total // LOOKS), 0, False
        while done < total and not asked:
            cooled = min(1.0, done / (COOLING * total))
            tau = self.tau if cooled == 1 else math.exp((1 - cooled) * math.log(hot) + cooled * math.log(self.tau))
            loss, _ = trainer.step(self._data(next(batches)), self._loss(tau), done, total)
            done += 1
            state = Progress(done, self.problem.one_eps * tau / self.tau, math.nan, solver.tol, loss, total)
            said = [call(state) for call in fit.callbacks]  # all of them are called
            asked = any(answer is True for answer in said)
            if done % every == 0 or done == total or asked:
                with torch.no_grad():
                    objective = float(_mixture(trainer.average).dual(*held_out, tau).double().mean())
                history.append((done, state.eps, objective))
                self.report(state)
        return _mixture(trainer.average), tuple(history), done

    def _data(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        if self.solver.loss == "dual":
            return batch
        # stratified times, one for each group of rows
        groups = min(GROUPS, len(batch[0]))
        size, d = len(batch[0]) // groups, batch[0].shape[1]
        u, w = (part[: groups * size].view(groups, size, d) for part in batch)
        jitter = torch.rand(groups, generator=self.generator, dtype=u.dtype, device=u.device)
        t = LATEST * (torch.arange(groups, device=u.device) + jitter) / groups
        return u, w, t, torch.randn(u.shape, generator=self.generator, dtype=u.dtype, device=u.device)

    def _loss(self, tau: float) -> Callable[..., Tensor]:
        def dual(module: nn.Module, u: Tensor, w: Tensor) -> Tensor:
            return _mixture(module).dual(u, w, tau)

        def matching(module: nn.Module, u: Tensor, w: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            # the projection on bridges does not depend on the process that joins the pairs, only on its kernel between the
            # ends: Brownian motion in these units serves every reference (Gushchin et al. 2024, eq. 10 and 14)
            s = t[:, None, None]
            x = (1 - s) * u + s * w + (tau * s * (1 - s)).sqrt() * noise
            miss = (w - x) / (1 - s) - _mixture(module).bridge_drift(t, x, tau)
            return miss.square().sum(-1).mean(-1) / (2 * tau)

        return dual if self.solver.loss == "dual" else matching

    # ---- the way back ------------------------------------------------------------------------------------------------

    def potential(self, mixture: AdjustedMixture) -> Quadratics:
        """``psi`` in the units of the problem, around the mean of ``E[X_1 | X_0]`` under the reference."""
        (origin, centre), (near, far) = self.centres, self.scales
        logit, mean, factors = mixture.pieces(self.tau)
        d = mean.shape[1]
        growth = torch.eye(d, dtype=mean.dtype, device=mean.device) / self.noise
        means = centre + far * mean
        covs = as_operator(self.noise * far / near, factors)
        return Quadratics(logit, means, covs, growth, origin)


def _mixture(module: nn.Module) -> AdjustedMixture:
    assert isinstance(module, AdjustedMixture)
    return module


def _normalised(problem: Problem, psi: Quadratics, atoms: int, generator: torch.Generator) -> tuple[Atoms, Quadratics]:
    """``phi = mu / psi_0`` on atoms of mu, with a constant moved so that ``E_mu f = E_nu g``."""
    mu, eps = problem.mu, problem.one_eps
    if isinstance(mu, Discrete):
        assert mu.points is not None
        x, share = mu.points.detach(), mu.weights.detach()
    else:
        x = mu.sample(atoms, generator=generator).detach()
        share = torch.full((len(x),), 1 / len(x), dtype=x.dtype, device=x.device)
    pulled = torch.cat([problem.reference.pull_back(psi, 0.0, part, eps).log_mass for part in torch.split(x, 4096)])
    live = share > 0
    log_phi = torch.where(live, share.log() - pulled, -torch.inf)
    y = problem.nu.sample(min(atoms, 2048), generator=generator)
    pushed, jacobian = problem.reference.push_forward(Atoms(x, log_phi), 1.0, y, eps)
    mean_f = -(share[live].double() * pulled[live].double()).sum() / share.double().sum()
    mean_g = -(pushed.log_mass + jacobian.to(y.device) + problem.log_normaliser()).double().mean()
    shift = ((mean_f - mean_g) / 2).to(x)
    return Atoms(x, log_phi - shift), Quadratics(psi.logits + shift, psi.means, psi.covs, psi.growth, psi.origin)


def _residual(bridge: PotentialBridge, generator: torch.Generator) -> float:
    """Energy distance of ``X_1`` to nu, over ``E|Y - Y'| / 2``; never negative."""
    x, y = (end.sample(COMPARED, generator=generator) for end in (bridge.problem.mu, bridge.problem.nu))
    ends = torch.cat([bridge.condition(part).sample(generator=generator) for part in torch.split(x, 512)])
    spread = float(torch.pdist(y[:512].double()).mean()) / 2
    unit = spread if spread > 0 else bridge.problem.one_eps**0.5
    return max(0.0, float(energy_distance(ends, y))) / unit
