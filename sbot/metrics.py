r"""Scores of plans, samples and processes, and the score that chance alone gives.

Every score is 0 for the exact answer.  A score of ``n`` samples means something only beside its *statistical floor*, what
``n`` exact samples get: ``floor(metric, exact, n)``, for any metric that takes the samples.  `path_kl` is an integral over
a known law, so that its floor is 0, and carries a standard error instead.

Bures-Wasserstein, for means m, m' and covariances S, S', in the units of the cost ``|x - y|^2 / 2``:

.. math:: BW = |m - m'|^2 / 2 + tr(S + S' - 2 (S^{1/2} S' S^{1/2})^{1/2}) / 2
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, final

import torch
from torch import Tensor

from . import linalg
from .arrays import as_count, as_number, as_tensor, require_finite
from .errors import InvalidProblem, Unsupported
from .measures import Discrete, Gaussian, Mixture
from .problem import INF
from .reference import LinearReference
from .relaxed import target_weights

if TYPE_CHECKING:
    from .bridge import Bridge

#: Entries of one tile of a plan or of a matrix of distances.
TILE = 2**20


@final
class Floor(NamedTuple):
    """Mean and standard deviation of what exact samples score."""

    mean: float
    spread: float


@final
class Estimate(NamedTuple):
    """A Monte Carlo estimate and its standard error."""

    value: float
    standard_error: float


class Drawable(Protocol):
    """Whatever can be sampled: a `Measure`, a `Conditionals`, a class of your own."""

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor: ...


def floor(
    metric: Callable[[Tensor], Tensor | float],
    exact: Drawable,
    n: int,
    *,
    repeats: int = 10,
    generator: torch.Generator | None = None,
) -> Floor:
    """What ``n`` exact samples score: ``metric(exact.sample(n))``, drawn ``repeats`` times.

    Parameters
    ----------
    metric : from samples, ``(*b, n, *event)`` as ``exact`` draws them, to one number.
    exact : the law the samples should have.
    n, repeats : samples for each score, and scores; ``repeats >= 2``.

    Raises
    ------
    InvalidProblem : counts that are too small, a metric that is not one number.

    Examples
    --------
    >>> import torch, sbot
    >>> from sbot import metrics
    >>> target = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    >>> chance = metrics.floor(lambda x: metrics.bw2_uvp(x, target), target, 10_000)
    >>> 0 < chance.mean < 0.2
    True

    The floor of a marginal error, for a plan drawn as pairs of atom numbers:

    >>> a, b = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> pairs = sbot.Discrete(None, torch.outer(a, b).flatten())
    >>> def error(k):
    ...     return metrics.marginal_error(torch.bincount(k, minlength=4).view(2, 2) / len(k), a, b)
    >>> metrics.floor(error, pairs, 100).mean > metrics.floor(error, pairs, 10_000).mean
    True
    """
    n, repeats = as_count(n, "n"), as_count(repeats, "repeats", least=2)
    scores = [as_number(metric(exact.sample(n, generator=generator)), "the score") for _ in range(repeats)]
    column = torch.tensor(scores, dtype=torch.float64)
    return Floor(float(column.mean()), float(column.std()))


# ---- plans -----------------------------------------------------------------------------------------------------------


def marginal_error(plan: Any, mu: Any = None, nu: Any = None) -> Tensor:
    r"""Relative L1 error of both marginals, summed: ``|P 1 - a|_1 / |a|_1 + |P' 1 - b|_1 / |b|_1``.

    A bridge is measured against its own problem, whose relaxed marginals are ``a e^{-f / rho}`` at the solution; its plan is
    streamed by rows.

    Parameters
    ----------
    plan : ``(*b, n, m)``, or a bridge between discrete measures.
    mu, nu : for a tensor: the weights ``(*b, n)`` and ``(*b, m)``, or `Discrete` measures.

    Returns
    -------
    Tensor ``(*b,)`` in float64.

    Raises
    ------
    InvalidProblem : shapes that do not fit, NaN or infinity, marginals missing (or given beside a bridge).
    Unsupported : a bridge whose plan has no atoms.

    Examples
    --------
    >>> import torch
    >>> from sbot import metrics
    >>> a = torch.tensor([0.5, 0.5])
    >>> metrics.marginal_error(torch.tensor([[0.5, 0.0], [0.25, 0.25]]), a, a)
    tensor(0.5000, dtype=torch.float64)
    """
    if _is_bridge(plan):
        if mu is not None or nu is not None:
            raise InvalidProblem("a bridge knows its marginals; drop mu and nu, or pass the tensor bridge.plan()")
        a, b = _targets(plan)
    else:
        plan = _plan(plan, "plan")
        a, b = (_weights(w, name) for w, name in ((mu, "mu"), (nu, "nu")))
        if plan.shape != (*a.shape, b.shape[-1]) or a.shape[:-1] != b.shape[:-1]:
            raise InvalidProblem(
                f"the plan has shape {tuple(plan.shape)} for marginals of shape {tuple(a.shape)} and {tuple(b.shape)}; "
                "give (*b, n, m), (*b, n) and (*b, m)"
            )
    wrong, columns = torch.zeros_like(a.sum(-1)), torch.zeros_like(b)
    for rows, part in _row_tiles(plan):
        wrong += (part.sum(-1) - a[..., rows]).abs().sum(-1)
        columns += part.sum(-2)
    return wrong / a.sum(-1) + (columns - b).abs().sum(-1) / b.sum(-1)


def plan_error(plan: Any, exact: Any) -> Tensor:
    r"""Relative L1 distance of two plans, ``|P - Q|_1 / |Q|_1``: twice their total variation where both have mass one.

    Parameters
    ----------
    plan, exact : ``(*b, n, m)``, or bridges between discrete measures (streamed by rows).

    Returns
    -------
    Tensor ``(*b,)`` in float64; for plans with the right mass, at most 2.  Never below half of `marginal_error`.

    Raises
    ------
    InvalidProblem : shapes that differ, NaN or infinity, an exact plan without mass.
    Unsupported : a bridge whose plan has no atoms.

    Examples
    --------
    >>> import torch
    >>> from sbot import metrics
    >>> metrics.plan_error(torch.eye(2) / 2, torch.ones(2, 2) / 4)
    tensor(1., dtype=torch.float64)
    """
    p, q = (m if _is_bridge(m) else _plan(m, name) for m, name in ((plan, "plan"), (exact, "exact")))
    shapes = _plan_shape(p), _plan_shape(q)
    if shapes[0] != shapes[1]:
        raise InvalidProblem(f"the plans have shapes {shapes[0]} and {shapes[1]}; give two plans of one shape")
    wrong, mass = torch.zeros(shapes[0][:-2], dtype=torch.float64), torch.zeros(shapes[0][:-2], dtype=torch.float64)
    for (_, part), (_, other) in zip(_row_tiles(p), _row_tiles(q), strict=True):
        wrong = wrong.to(other.device) + (part.to(other.device) - other).abs().sum((-2, -1))
        mass = mass.to(other.device) + other.abs().sum((-2, -1))
    if bool((mass == 0).any()):
        raise InvalidProblem("the exact plan is zero everywhere; exchange the plans or drop that problem")
    return wrong / mass


def _is_bridge(obj: Any) -> bool:
    return hasattr(obj, "problem") and hasattr(obj, "plan")


def _plan(obj: Any, name: str) -> Tensor:
    plan = require_finite(as_tensor(obj, name), name).detach()
    if plan.ndim < 2 or 0 in plan.shape:
        raise InvalidProblem(f"{name} has shape {tuple(plan.shape)}; give (n, m) with n, m >= 1, or a bridge")
    return plan


def _weights(obj: Any, name: str) -> Tensor:
    if obj is None:
        raise InvalidProblem(f"{name} is missing: a plan is measured against weights; give {name}=, or pass a bridge")
    weights = obj.weights if isinstance(obj, Discrete) else Discrete(None, obj, name=name).weights
    return weights.detach().double()


def _ends(bridge: Bridge) -> tuple[Discrete, Discrete]:
    mu, nu = bridge.problem.mu, bridge.problem.nu
    if not isinstance(mu, Discrete) or not isinstance(nu, Discrete):
        raise Unsupported(
            "the plan of this bridge is not a matrix; compare samples: metrics.bw2_uvp or energy_distance"
        )
    return mu, nu


def _plan_shape(plan: Any) -> tuple[int, ...]:
    if isinstance(plan, Tensor):
        return tuple(plan.shape)
    mu, nu = _ends(plan)
    return (*mu.batch_shape, mu.n, nu.n)


def _targets(bridge: Bridge) -> tuple[Tensor, Tensor]:
    """The marginals that the exact plan has."""
    a, b = (_weights(end, "the marginal") for end in _ends(bridge))
    if bridge.problem.mass is not None:
        a, b = (_weights(bridge.marginal(t), "the marginal") for t in (0.0, 1.0))
        return a, b
    if bridge.problem.relax == (INF, INF):
        return a, b
    duals = (part.values.detach().double() for part in bridge.potentials())
    a, b = (target_weights(w, f, rho) for w, f, rho in zip((a, b), duals, bridge.problem.relax, strict=True))
    return a, b


def _row_tiles(plan: Any) -> Iterator[tuple[slice, Tensor]]:
    """Tiles of rows in float64, ``(*b, r, m)``; the same tiles for every plan of one shape."""
    *batch, n, m = _plan_shape(plan)
    step = max(1, TILE // max(1, math.prod(batch) * m))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        part = plan[..., rows, :] if isinstance(plan, Tensor) else plan.plan(rows=rows).detach()
        yield rows, part.double()


# ---- samples ---------------------------------------------------------------------------------------------------------


def bures_wasserstein(p: Gaussian, q: Gaussian) -> Tensor:
    """``BW(p, q)`` as in the head of this module, ``(*b,)``: half the squared 2-Wasserstein distance of two Gaussians.

    Raises `InvalidProblem` where the dimensions differ.

    Examples
    --------
    >>> import torch, sbot
    >>> from sbot import metrics
    >>> metrics.bures_wasserstein(sbot.Gaussian([0.0], [[1.0]]), sbot.Gaussian([3.0], [[4.0]]))    # 9/2 + (2 - 1)^2 / 2
    tensor(5., dtype=torch.float64)
    """
    if p.event_shape != q.event_shape:
        raise InvalidProblem(f"dimensions differ: {p.event_shape} and {q.event_shape}; compare laws on one space")
    (m, s), (mean, cov) = ((g.mean.double(), g.cov.double()) for g in (p, q))
    # tr (S^1/2 S' S^1/2)^1/2 is the sum of the singular values of S^1/2 S'^1/2: no square root of a rounding error
    cross = torch.linalg.svdvals(linalg.sqrtm(s) @ linalg.sqrtm(cov)).sum(-1)
    return ((m - mean).square().sum(-1) + _trace(s) + _trace(cov)).div(2).sub(cross).clamp(min=0)


def bw2_uvp(samples: Any, target: Any) -> Tensor:
    r"""Unexplained variance of a law's first two moments, in percent: ``100 BW(samples, target) / (tr Cov(target) / 2)``.

    0 for the right mean and covariance, 100 for the mean of the target as a single point.  (Korotin et al. 2021, "Do neural
    optimal transport solvers work?".)

    Parameters
    ----------
    samples : ``(*b, n, d)`` with n >= 2, or a measure with known moments (`Gaussian`, `Mixture`, `Discrete`).
    target : the same, of the same batch shape.

    Returns
    -------
    Tensor ``(*b,)`` in float64.

    Raises
    ------
    InvalidProblem : shapes that do not fit, NaN or infinity, a target without variance, a measure of unknown moments.

    Examples
    --------
    >>> import torch, sbot
    >>> from sbot import metrics
    >>> target = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    >>> float(metrics.bw2_uvp(sbot.Gaussian(torch.ones(2), torch.eye(2)), target))
    100.0
    """
    ours, exact = _moments(samples, "samples"), _moments(target, "target")
    if ours.batch_shape != exact.batch_shape:
        raise InvalidProblem(f"batch shapes differ: {ours.batch_shape} and {exact.batch_shape}; make them equal")
    return 200 * bures_wasserstein(ours, exact) / _spread(exact)


def cbw2_uvp(conditionals: Any, exact: Any, nu: Any) -> Tensor:
    r"""The same for a plan, law by law: ``100 E_x BW(pi(.|x), pi*(.|x)) / (tr Cov(nu) / 2)``.

    Zero only where every conditional has the right mean and covariance: it sees a wrong coupling of the right marginals.
    (Gushchin et al. 2023, "Building the bridge of Schrödinger".)  Its floor for ``k`` draws at each place is
    ``floor(lambda y: cbw2_uvp(y, exact, nu), exact, k)``.

    Parameters
    ----------
    conditionals : the laws of ``X_1`` given ``X_0 = x_i`` for ``n`` places ``x_i`` drawn from mu: a `Gaussian` of batch
        shape ``(n,)``, or draws ``(n, k, d)``, such as ``Conditionals(bridge, x).sample(k)``.
    exact : the same, at the same places.
    nu : the end marginal, whose variance sets the scale: samples ``(n, d)`` or a measure with known moments.

    Returns
    -------
    Tensor ``()`` in float64.

    Raises
    ------
    InvalidProblem : shapes that do not fit, NaN or infinity, a nu without variance.

    Examples
    --------
    >>> import torch, sbot
    >>> from sbot import metrics
    >>> nu = sbot.Gaussian(torch.zeros(1), torch.eye(1))
    >>> means, cov = torch.randn(100, 1), 0.5 * torch.eye(1).expand(100, 1, 1)
    >>> exact = sbot.Gaussian(means, cov)
    >>> round(float(metrics.cbw2_uvp(sbot.Gaussian(means + 0.1, cov), exact, nu)), 4)      # 100 * 0.1^2 / 1
    1.0
    """
    ours, theirs = _moments(conditionals, "conditionals"), _moments(exact, "exact")
    if len(ours.batch_shape) != 1 or ours.batch_shape != theirs.batch_shape:
        raise InvalidProblem(
            f"there are conditionals of batch shape {ours.batch_shape} and {theirs.batch_shape}; give one law for each of "
            "the same n places: a Gaussian with mean (n, d), or draws (n, k, d)"
        )
    whole = _moments(nu, "nu")
    if whole.batch_shape or whole.event_shape != theirs.event_shape:
        raise InvalidProblem(f"nu must be one law on {theirs.event_shape}; give samples (n, d) or a measure")
    return 200 * bures_wasserstein(ours, theirs).mean() / _spread(whole)


@final
class Conditionals:
    """The laws of ``X_1`` given ``X_0 = x_i``, one for each of ``n`` places, as something to draw from.

    Parameters
    ----------
    source : a bridge, or a function ``(x (n, d), generator) -> (n, d)`` that draws one end for each place, such as an SDE
        sampler.
    x : the places, ``(n, d)``.

    Raises
    ------
    InvalidProblem : places of the wrong shape, a source that is neither, draws of the wrong shape.

    Examples
    --------
    >>> import torch, sbot
    >>> from sbot import metrics
    >>> one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    >>> metrics.Conditionals(sbot.solve_bridge(one, one, 1.0), torch.zeros(5, 2)).sample(3).shape
    torch.Size([5, 3, 2])
    """

    def __init__(self, source: Any, x: Any) -> None:
        self.x = require_finite(as_tensor(x, "x"), "x")
        if self.x.ndim != 2 or 0 in self.x.shape:
            raise InvalidProblem(f"x has shape {tuple(self.x.shape)}; give places (n, d)")
        self._draw: Callable[[torch.Generator | None], Any]
        if hasattr(source, "condition"):
            law = source.condition(self.x)
            self._draw = lambda generator: law.sample(generator=generator)
        elif callable(source):
            self._draw = lambda generator: source(self.x, generator)
        else:
            raise InvalidProblem(f"source is {type(source).__name__}; give a bridge or a function (x, generator) -> y")

    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """``n`` draws for each place, ``(places, n, d)``."""
        with torch.no_grad():
            draws = [self._draw(generator) for _ in range(as_count(n, "n"))]
        if not isinstance(draws[0], Tensor) or draws[0].shape != self.x.shape:
            got = tuple(draws[0].shape) if isinstance(draws[0], Tensor) else type(draws[0]).__name__
            raise InvalidProblem(
                f"the source drew {got} at places {tuple(self.x.shape)}; return one end for each place"
            )
        return torch.stack(draws, 1)


def _moments(obj: Any, name: str) -> Gaussian:
    """The Gaussian of the same mean and covariance, in float64."""
    if isinstance(obj, Gaussian):
        return obj.to(dtype=torch.float64)
    if isinstance(obj, Mixture):
        share = obj.logits.double().softmax(0)
        return _of_parts(share, obj.components.mean.double(), obj.components.cov.double())
    if isinstance(obj, Discrete) and obj.points is not None:
        weights = obj.weights.double()
        return _of_parts(weights / weights.sum(-1, keepdim=True), obj.points.double(), None)
    if hasattr(obj, "sample"):
        raise InvalidProblem(f"the moments of {name} ({type(obj).__name__}) are not known; pass {name}.sample(n)")
    points = require_finite(as_tensor(obj, name), name).detach().double()
    return Gaussian.from_samples(points)


def _of_parts(share: Tensor, means: Tensor, covs: Tensor | None) -> Gaussian:
    mean = (share[..., None] * means).sum(-2)
    centred = means - mean[..., None, :]
    cov = (share[..., None] * centred).mT @ centred
    if covs is not None:
        cov = cov + (share[..., None, None] * covs).sum(-3)
    return Gaussian(mean.detach(), linalg.symmetrise(cov.detach()))


def _spread(target: Gaussian) -> Tensor:
    trace = _trace(target.cov)
    if bool((trace <= 0).any()):
        raise InvalidProblem("the target is a single point, which has no variance to explain; use an absolute distance")
    return trace


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)


def energy_distance(x: Any, y: Any) -> Tensor:
    r"""``E|X - Y| - E|X - X'| / 2 - E|Y - Y'| / 2``, unbiased: pairs of a sample with itself are left out.

    Zero exactly where the two laws are equal; the unbiased estimate of it may then be slightly negative.  Half of the
    quantity that some call by this name (Szekely and Rizzo 2013).  Streams over tiles: memory is O(n + m).

    Parameters
    ----------
    x, y : samples ``(n, d)`` and ``(m, d)``, n, m >= 2.

    Returns
    -------
    Tensor ``()`` in float64, where the sums are made.

    Raises
    ------
    InvalidProblem : fewer than two samples, dimensions that differ, NaN or infinity.

    Examples
    --------
    >>> import torch
    >>> from sbot import metrics
    >>> metrics.energy_distance(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [5.0]]))  # 2.5 - 2/2 - 4/2
    tensor(-0.5000, dtype=torch.float64)
    """
    points = [_samples(x, "x"), _samples(y, "y")]
    if points[0].shape[1] != points[1].shape[1] or points[0].device != points[1].device:
        raise InvalidProblem(
            f"x is {tuple(points[0].shape)} on {points[0].device} and y {tuple(points[1].shape)} on {points[1].device}; "
            "give samples of one dimension on one device"
        )
    n, m = len(points[0]), len(points[1])
    across = _sum_of_distances(points[0], points[1]) / (n * m)
    within = [_sum_of_distances(p, p) / (len(p) * (len(p) - 1)) for p in points]
    return across - (within[0] + within[1]) / 2


def _samples(obj: Any, name: str) -> Tensor:
    points = require_finite(as_tensor(obj, name), name).detach()
    if points.ndim != 2 or points.shape[0] < 2 or points.shape[1] < 1:
        raise InvalidProblem(f"{name} has shape {tuple(points.shape)}; give samples (n, d) with n >= 2 and d >= 1")
    return points.double()


def _sum_of_distances(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows in torch.split(x, max(1, TILE // len(y))):
        # the product form of cdist leaves 1e-8 where a point meets itself
        total += torch.cdist(rows, y, compute_mode="donot_use_mm_for_euclid_dist").sum()
    return total


# ---- processes -------------------------------------------------------------------------------------------------------


def path_kl(
    bridge: Bridge,
    drift: Any,
    *,
    n: int = 1000,
    strata: int = 100,
    interval: tuple[float, float] = (0.0, 1.0),
    generator: torch.Generator | None = None,
) -> Estimate:
    r"""Relative entropy of ``bridge`` with respect to the process of another drift from the same start.

    .. math:: \frac{1}{2\varepsilon}\int E\,|(BB')^{-1/2}(u - \hat u)(t, X_t)|^2\,dt, \qquad X \sim \text{bridge}

    The samples are exact and the times are drawn, two in each of ``strata`` equal parts of the interval, each with ``n``
    fresh samples: no time grid and no bias.  The two independent halves of each part give the standard error.  Where
    ``drift`` is the exact drift the estimate is 0: this is its floor.

    Parameters
    ----------
    bridge : the exact process, normalised where it is unbalanced; its reference must be linear.
    drift : a function ``(t, x (n, d)) -> (n, d)``, or another bridge.
    n, strata : samples at each time, and parts of the interval.
    interval : the times to integrate over.  Drifts to discrete measures grow like ``1 / (1 - t)``: stop short of 1.

    Raises
    ------
    InvalidProblem : an interval outside [0, 1], a drift of the wrong shape or with NaN or infinity.
    Unsupported : a bridge without drift (a static cost), or of several problems at once.

    Examples
    --------
    >>> import torch, sbot
    >>> from sbot import metrics
    >>> one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    >>> bridge = sbot.solve_bridge(one, one, 0.5)
    >>> estimate = metrics.path_kl(bridge, lambda t, x: bridge.drift(t, x) + 0.3, n=10)
    >>> round(estimate.value, 4)                                                        # 2 * 0.3^2 / (2 * 0.5)
    0.18
    """
    low, high = _interval(interval)
    n, strata = as_count(n, "n"), as_count(strata, "strata", least=2)
    if bridge.problem.batch_shape:
        raise Unsupported("path_kl takes one problem; call it for each problem of the batch")
    other = drift.drift if hasattr(drift, "drift") else drift
    if not callable(other):
        raise InvalidProblem(f"drift is {type(drift).__name__}; give a function drift(t, x) or a bridge")
    jitter = torch.rand(strata, 2, generator=generator, dtype=torch.float64, device=bridge.problem.device).cpu()
    times = low + (high - low) * (torch.arange(strata)[:, None] + jitter) / strata
    with torch.no_grad():
        rates = [[_rate(bridge, other, t, n, generator) for t in pair] for pair in times.tolist()]
    halves = (high - low) * torch.tensor(rates, dtype=torch.float64)
    # the variance of the mean of two independent estimates is estimated without bias by (their difference / 2)^2
    error = (halves[:, 0] - halves[:, 1]).div(2).square().sum().sqrt() / strata
    return Estimate(float(halves.mean()), float(error))


def _rate(bridge: Bridge, other: Callable[[float, Tensor], Any], t: float, n: int, generator: Any) -> float:
    """``E |(B B')^-1/2 (u - u^)|^2 / (2 eps)`` at one time."""
    x = bridge.interpolate(t, n, generator=generator)
    u, guess = bridge.drift(t, x), other(t, x)
    if not isinstance(guess, Tensor) or guess.shape != x.shape:
        got = tuple(guess.shape) if isinstance(guess, Tensor) else type(guess).__name__
        raise InvalidProblem(f"the drift returned {got} for points {tuple(x.shape)}; return a tensor of the same shape")
    gap = require_finite(u.double() - guess.double(), f"the drift at t = {t:.4g}")
    reference = bridge.problem.reference
    if not isinstance(reference, LinearReference):
        raise Unsupported(
            f"path_kl needs the noise of a linear reference, not {reference!r}; integrate its drifts yourself"
        )
    noise = reference.coefficients(t)[2].to(gap)
    return float((gap * linalg.apply(linalg.inverse(noise), gap)).sum(-1).mean() / (2 * bridge.problem.one_eps))


def _interval(interval: Any) -> tuple[float, float]:
    try:
        low, high = (as_number(end, "interval") for end in interval)
    except (TypeError, ValueError) as fault:
        raise InvalidProblem(f"interval is {interval!r} ({fault}); give two times, such as (0, 0.99)") from None
    if not 0 <= low < high <= 1:
        raise InvalidProblem(f"interval is ({low:g}, {high:g}); give 0 <= start < end <= 1")
    return low, high
