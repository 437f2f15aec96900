"""The bridge that two drifts make: everything by simulation, in both directions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor

from . import linalg
from .arrays import DTYPES, as_count, compute_dtype
from .bridge import Bridge, Potentials, Report, in_result_dtype
from .drift_pack import pack_drifts
from .errors import InvalidProblem, NumericalError, Unsupported
from .measures import Gaussian, Mixture
from .metrics import Estimate
from .potentials import Tilted
from .problem import Problem
from .reference import LinearReference, Process
from .rounding import ATOMS_ONLY
from .sde import Chain, TimeGrid, as_grid, drift_of, grid_times, walk
from .steering import Steering

#: Up to this dimension the divergence of the probability flow is summed exactly.
EXACT_TRACE = 64
#: Simulated ends averaged for a conditional mean.
DRAWS = 64


@final
class SimulatedTilt(Tilted):
    """The law of ``X_1`` given ``X_s``, known by simulation."""

    def __init__(self, bridge: DriftBridge, x: Tensor, s: float) -> None:
        self._bridge, self._x, self._s = bridge, x, s

    @property
    def log_mass(self) -> Tensor:
        raise Unsupported("a bridge of drifts knows no potential; solve with sbot.LightSB() or sbot.PlugIn() for one")

    @property
    def score(self) -> Tensor:
        raise Unsupported("a bridge of drifts knows no potential; use drift(t, x)")

    @property
    def mean(self) -> Tensor:
        """The average of 64 simulated ends, always with the same noise, so that it is a function of the place."""
        generator = torch.Generator("cpu").manual_seed(0)
        total = torch.zeros_like(self._x)
        flat = self._x.flatten(1)
        for _ in range(DRAWS // 2):
            # the same noise at every place, and its mirror image
            rows = [
                torch.randn(flat.shape[1], generator=generator).to(flat)
                for _ in range(len(self._bridge.chain(self._s)))
            ]
            for sign in (1, -1):
                ends = self._bridge.run(flat, self._s, noise=lambda k, s=sign, r=rows: (s * r[k]).expand_as(flat))
                total += ends.reshape(total.shape)
        return total / DRAWS

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        return self._bridge.run(self._x.flatten(1), self._s, generator=generator).reshape(self._x.shape)


@final
class DriftBridge(Bridge):
    """``dX = (b + R u) dt + sqrt(eps) B dW`` with learned controls ``u`` in both directions, ``R = (B B')^1/2``.

    What is asked is answered by simulation on the grid of the solver, and carries a Monte Carlo error.

    Attributes
    ----------
    forward, backward : the controls.
    grid : where the chain stands, a `TimeGrid` or times.
    order : 1 for Euler-Maruyama, 2 for Heun's scheme, which takes two evaluations a step and needs fewer steps.

    Examples
    --------
    >>> import torch, sbot
    >>> mu, nu = sbot.Gaussian([0.0], [[1.0]]), sbot.Gaussian([1.0], [[1.0]])
    >>> solver = sbot.DSBM(pairs=16, tol=10.0, fit=sbot.FitConfig(steps=2, batch=8))
    >>> bridge = sbot.solve_bridge(mu, nu, 1.0, solver=solver)
    >>> bridge.using(50, order=1).sample_pairs(3)[1].shape
    torch.Size([3, 1])
    """

    def __init__(
        self,
        problem: Problem,
        forward: Steering,
        backward: Steering,
        report: Report,
        grid: TimeGrid | Sequence[float],
        order: int = 1,
    ) -> None:
        self.problem, self.forward, self.backward, self.report = problem, forward, backward, report
        self.grid, self.order = grid, order

    # ---- drifts ----------------------------------------------------------------------------------------------------

    @property
    def process(self) -> Process:
        """The reference."""
        reference = self.problem.reference
        assert isinstance(reference, Process)
        return reference

    @in_result_dtype
    def drift(self, t: float, x: Any) -> Tensor:
        """``b(t, x) + R u(t, x)``; differentiable in ``x``."""
        return self._steered(self.forward, self._time(t), self._points(x))

    @in_result_dtype
    def reverse_drift(self, t: float, x: Any) -> Tensor:
        """``-b(t, x) + R u(t, x)`` of the backward control, in forward time t."""
        return self._steered(self.backward, self._time(t), self._points(x))

    def _steered(self, control: Steering, t: float, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        root = linalg.root(self.process.spread(t)).to(flat)
        own = drift_of(self.process, t, flat, self.problem.mu.event_shape)
        return (control.direction * own + linalg.apply(root, control(t, flat))).reshape(x.shape)

    def flow(self, t: float, x: Any) -> Tensor:
        """Velocity of the probability flow, ``(drift - reverse_drift) / 2``: the ODE with the same marginals."""
        return (self.drift(t, x) - self.reverse_drift(t, x)) / 2

    # ---- simulation ------------------------------------------------------------------------------------------------

    def chain(self, start: float = 0.0, end: float = 1.0, also: Sequence[float] = ()) -> Chain:
        """The steps from ``start`` to ``end`` that also stop at the given times."""
        inner = {t for t in (*grid_times(self.grid, self.problem.one_eps), *also) if start < t < end}
        like = torch.empty((), dtype=self.problem.dtype, device=self.problem.device)
        kept: list[float] = [start]
        for t in [*sorted(inner), end]:
            # times given by the caller may fall on those of the grid, up to rounding
            if t - kept[-1] > 1e-9 or t in also:
                kept.append(t)
        return Chain(self.process, kept, self.problem.one_eps, like, self.problem.mu.event_shape)

    def run(self, x: Tensor, start: float = 0.0, *, direction: int = 1, **options: Any) -> Tensor:
        """Simulate flat points from ``start`` to the end in ``direction``."""
        chain = self.chain(start) if direction > 0 else self.chain(0.0, start)
        control = self.forward if direction > 0 else self.backward
        with torch.no_grad():
            for *_, after in walk(chain, control, x, direction, order=self.order, **options):
                x = after
        return x

    @in_result_dtype
    def sample_paths(
        self, n: int, times: Any, *, generator: torch.Generator | None = None, reverse: bool = False
    ) -> Tensor:
        """Simulate ``n`` paths, ``(n, len(times), *event)``: forward from mu, or with ``reverse`` backwards from nu."""
        listed = self._times(times)
        direction = -1 if reverse else 1
        source = self.problem.nu if reverse else self.problem.mu
        x = source.sample(self._count(n), generator=generator).detach()
        shape, x = x.shape, x.flatten(1)
        chain = self.chain(also=listed)
        control = self.backward if reverse else self.forward
        seen = {1.0 if reverse else 0.0: x}
        wanted = set(listed)
        with torch.no_grad():
            for k, _, _, after in walk(chain, control, x, direction, order=self.order, generator=generator):
                if (t := chain.time(k, -direction)) in wanted:
                    seen[t] = after
        return torch.stack([seen[t].reshape(shape) for t in listed], 1)

    @in_result_dtype
    def sample_pairs(
        self, n: int, *, generator: torch.Generator | None = None, replace: bool = True, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs ``(X_0, X_1)``, each ``(n, *event)``: forward from mu, or with ``reverse`` from nu."""
        if not replace:
            raise Unsupported(ATOMS_ONLY)
        ends = self.sample_paths(n, [0.0, 1.0], generator=generator, reverse=reverse)
        return ends[:, 0], ends[:, 1]

    def condition(self, x: Any = None, s: float = 0.0) -> SimulatedTilt:
        """The law of ``X_1`` given ``X_s = x``: a sampler, and a mean over simulations."""
        time = self._time(s, "s")
        if x is None:
            raise Unsupported("a bridge of drifts is not tied to atoms; give points x, such as mu.sample(1000)")
        if time == 1:
            raise Unsupported("given X_1 = x there is nothing left to know; ask at s < 1")
        return SimulatedTilt(self, self._points(x), time)

    # ---- density ---------------------------------------------------------------------------------------------------

    @in_result_dtype
    def log_prob(self, t: float, x: Any, *, steps: int = 50, probes: int = 16) -> Tensor:
        """Log-density along the probability flow, ``d log p / dt = -div v``, by the classical Runge-Kutta method.

        The flow runs to an end whose density is known.  The divergence is exact up to dimension 64, beyond it is
        Hutchinson's estimate with ``probes`` random signs for each point and time, from a generator of its own: unbiased,
        with an error that falls as the root of ``probes * steps``.  ``steps`` cover the whole of [0, 1].
        """
        time, points = self._time(t), self._points(x)
        ends = [end for end in (0, 1) if self._has_density(end)]
        if not ends:
            raise Unsupported(
                "neither marginal has a density to start from; give one as sbot.Gaussian or sbot.Mixture, or use interpolate"
            )
        end = min(ends, key=lambda e: abs(e - time))
        source = self.problem.mu if end == 0 else self.problem.nu
        assert isinstance(source, (Gaussian, Mixture))
        count = max(1, math.ceil(abs(end - time) * as_count(steps, "steps")))
        gained = torch.zeros(len(points), dtype=points.dtype, device=points.device)
        place, dt = points.detach(), (end - time) / count
        generator = torch.Generator("cpu").manual_seed(0)
        for k in range(count):
            near, far = (time + j * dt if j < count else float(end) for j in (k, k + 1))
            try:
                place, gained = self._flow_step(near, far, place, gained, as_count(probes, "probes"), generator)
            except Unsupported:
                raise Unsupported(
                    "the bridge that these drifts start from (init=) stands on atoms, where they are infinite and no density "
                    "is known; start from a closed form or a Gaussian fit, or use interpolate"
                ) from None
        if not bool(torch.isfinite(place).all()):
            raise NumericalError("the probability flow left the finite numbers; give points nearer to the marginals")
        return source.log_prob(place.reshape(points.shape)) + gained

    def _has_density(self, end: int) -> bool:
        measure = self.problem.mu if end == 0 else self.problem.nu
        covs = measure.cov if isinstance(measure, Gaussian) else None
        covs = measure.components.cov if isinstance(measure, Mixture) else covs
        return covs is not None and linalg.cholesky(covs) is not None

    def _flow_step(
        self, near: float, far: float, x: Tensor, gained: Tensor, probes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        slopes: list[tuple[Tensor, Tensor]] = []
        dt = far - near
        for share, t in ((0.0, near), (0.5, (near + far) / 2), (0.5, (near + far) / 2), (1.0, far)):
            there = x + share * dt * slopes[-1][0] if slopes else x
            slopes.append(self._velocity_and_divergence(t, there, probes, generator))
        weights = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
        for weight, (velocity, divergence) in zip(weights, slopes, strict=True):
            x = x + weight * dt * velocity
            gained = gained + weight * dt * divergence
        return x, gained

    def _velocity_and_divergence(
        self, t: float, x: Tensor, probes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            place = x.detach().requires_grad_()
            velocity = (self._steered(self.forward, t, place) - self._steered(self.backward, t, place)) / 2
            flat = velocity.flatten(1)
            d = flat.shape[1]
            divergence = torch.zeros_like(flat[:, 0])
            if d <= EXACT_TRACE:
                for i in range(d):
                    (row,) = torch.autograd.grad(flat[:, i].sum(), place, retain_graph=i < d - 1)
                    divergence = divergence + row.flatten(1)[:, i]
            else:
                for i in range(probes):
                    signs = torch.randint(0, 2, flat.shape, generator=generator).to(flat) * 2 - 1
                    (row,) = torch.autograd.grad((flat * signs).sum(), place, retain_graph=i < probes - 1)
                    divergence = divergence + (row.flatten(1) * signs).sum(1) / probes
        return flat.detach().reshape(x.shape), divergence.detach()

    # ---- values ----------------------------------------------------------------------------------------------------

    def energy(self, n: int = 4096, *, generator: torch.Generator | None = None, reverse: bool = False) -> Estimate:
        """``E int |u|^2 dt / 2``: eps times the relative entropy of the paths against the reference from the same end.

        With order 1 the sum over the steps is that of the chain itself, exactly; with order 2 the trapezoidal rule.  The error
        stated is of the draws, and of the rule as far as leaving out every other time tells it.  Paths in coarse steps have an
        error of their own that it does not hold: compare ``bridge.using(2 * steps)``.
        """
        control, direction = (self.backward, -1) if reverse else (self.forward, 1)
        source = self.problem.nu if reverse else self.problem.mu
        x = source.sample(self._count(n), generator=self._own(generator)).detach().flatten(1)
        chain = self.chain()
        times, sizes = [], []
        options: dict[str, Any] = {"order": self.order, "generator": self._own(generator)}
        with torch.no_grad():
            for k, before, _, _ in walk(chain, control, x, direction, **options):
                times.append(chain.time(k, direction))
                sizes.append(control(times[-1], before).double().square().sum(1) / 2)
        end = 0.0 if reverse else 1.0
        if self.order == 1:
            steps = [abs(b - a) for a, b in itertools.pairwise([*times, end])]
            total, rule = torch.stack([dt * size for dt, size in zip(steps, sizes, strict=True)]).sum(0), 0.0
        else:
            total = _trapezoid(times, sizes, end)
            rule = float((total - _trapezoid(times[::2], sizes[::2], end)).mean())
        return Estimate(float(total.mean()), math.hypot(float(total.std()) / math.sqrt(len(total)), rule))

    def _own(self, generator: torch.Generator | None) -> torch.Generator:
        return torch.Generator(self.problem.device).manual_seed(0) if generator is None else generator

    def cost_estimate(self, n: int = 4096, *, generator: torch.Generator | None = None) -> Estimate:
        """`cost` with its standard error.

        The energy of the paths, minus ``eps log Z`` of the reference, plus ``eps`` times the entropy of a marginal whose
        density is known.  An upper bound up to that error and that of the steps, see `energy`, where the drifts reach the
        marginals; exact where, besides, the paths between two ends are bridges of the reference.
        """
        reference, eps, d = self.problem.reference, self.problem.one_eps, math.prod(self.problem.mu.event_shape)
        known = [end for end in (1, 0) if self._has_density(end)]
        if not isinstance(reference, LinearReference) or not known:
            raise Unsupported(
                "the entropic cost needs a linear reference and the density of a marginal; give one as sbot.Gaussian or "
                "sbot.Mixture, or use energy() or linear_cost()"
            )
        reverse = known[0] == 0  # forward paths start at mu and need the entropy of nu
        source = self.problem.mu if reverse else self.problem.nu
        assert isinstance(source, (Gaussian, Mixture))
        own = self._own(generator)
        value, error = self.energy(n, generator=own, reverse=reverse)
        information = -source.log_prob(source.sample(n, generator=own)).double()
        if isinstance(source, Gaussian):  # in closed form
            entropy, entropy_error = float(linalg.log_gaussian_constant(source.cov.double(), d)) + d / 2, 0.0
        else:
            entropy, entropy_error = float(information.mean()), float(information.std() / math.sqrt(n))
        constant = float(linalg.log_gaussian_constant(eps * reference.transition(0.0, 1.0).cov, d))
        if reverse:
            constant -= float(linalg.logdet(reference.transition(0.0, 1.0).phi, d))
        return Estimate(value + eps * (entropy - constant), math.hypot(error, eps * entropy_error))

    @in_result_dtype
    def cost(self) -> Tensor:
        """The entropic objective by simulation; `cost_estimate` has its error."""
        return torch.tensor(self.cost_estimate().value, dtype=self.problem.dtype, device=self.problem.device)

    @in_result_dtype
    def linear_cost(self) -> Tensor:
        """``<P, C>`` over 4096 simulated pairs."""
        x, y = self.sample_pairs(4096, generator=self._own(None))
        pair = self.problem.cost.embed(x.flatten(1).to(self.problem.dtype), y.flatten(1).to(self.problem.dtype))
        if pair is None:
            raise Unsupported("the reference has no cost in closed form; use energy()")
        return (pair[0] - pair[1]).square().sum(1).mean() / 2

    def gap(self) -> Tensor:
        raise Unsupported(
            "a bridge of drifts has no dual value to bracket; compare its samples with nu, see sbot.metrics"
        )

    def plan(self, rows: Any = None) -> Any:
        raise Unsupported("a bridge of drifts has no plan matrix; draw from it with sample_pairs(n)")

    def potentials(self) -> Potentials:
        raise Unsupported("a bridge of drifts knows no potentials; solve with sbot.LightSB() or sbot.PlugIn() for them")

    # ---- keeping ---------------------------------------------------------------------------------------------------

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> DriftBridge:
        if dtype is not None and dtype not in DTYPES:
            raise InvalidProblem(f"dtype is {dtype!r}; give torch.float64, float32, float16 or bfloat16")
        inner = None if dtype is None else compute_dtype(dtype)
        problem = replace(
            self.problem.to(dtype=inner, device=device),
            result_dtype=self.problem.result_dtype if dtype is None else dtype,
        )
        like = torch.empty((), dtype=problem.dtype, device=problem.device)
        forward, backward = self.forward.to(like), self.backward.to(like)
        if self.forward.net is self.backward.net:
            backward.net = forward.net
        return DriftBridge(problem, forward, backward, self.report, self.grid, self.order)

    def using(self, steps: Any = None, order: int | None = None) -> DriftBridge:
        """The same drifts simulated on another grid or by another scheme."""
        grid = self.grid if steps is None else as_grid(steps)
        chosen = self.order if order is None else as_count(order, "order")
        if chosen > 2:
            raise InvalidProblem(f"order is {order}; give 1 (Euler-Maruyama) or 2 (Heun)")
        grid_times(grid, self.problem.one_eps)
        return DriftBridge(self.problem, self.forward, self.backward, self.report, grid, chosen)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return pack_drifts(self.problem, self.report, self.forward, self.backward, self.grid, self.order)


def _trapezoid(times: Sequence[float], values: Sequence[Tensor], end: float) -> Tensor:
    """Integral by the trapezoidal rule, on to ``end`` along the last slope: a control may be infinite there."""
    rates = list(values)
    if len(times) > 1:
        slope = (values[-1] - values[-2]) / (times[-1] - times[-2])
        rates.append(values[-1] + (end - times[-1]) * slope)
    else:
        rates.append(values[-1])
    pairs = zip(itertools.pairwise([*times, end]), itertools.pairwise(rates), strict=True)
    return torch.stack([abs(b - a) * (u + v) / 2 for (a, b), (u, v) in pairs]).sum(0)
