"""Reference processes: ``dX = b(t, X) dt + sqrt(eps) B dW`` on [0, 1], and the cost each charges.

A linear reference moves Gaussians to Gaussians, ``X_t | X_s = x ~ N(Phi x + c, eps Q)``, and that is all a bridge needs:
its cost, its tilts, its pinned paths.  A static reference knows only the cost of going from one end to the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from . import linalg, magnus
from .arrays import as_number, as_tensor, require_finite
from .costs import Cost, MatrixCost, Quadratic, TransitionCost, as_cost
from .errors import InvalidProblem, Unsupported
from .linalg import Eps
from .potentials import Atoms, Potential, Tilted

#: Parts of [0, 1] over which time-dependent transitions are kept.
PANELS = 32

Coefficient = Any  # a number, an array, or a function of t that returns one


@final
@dataclass(frozen=True)
class Affine:
    """The law ``N(phi x + shift, eps * cov)`` of a later time given ``x``: what a linear reference has to say.

    Parameters
    ----------
    phi, cov : 0-dimensional for a multiple of the identity, or ``(d, d)``.
    shift : 0-dimensional, or ``(d,)``.

    Examples
    --------
    >>> import torch, sbot
    >>> half = sbot.Affine(torch.tensor(0.5), torch.tensor(1.0), torch.tensor(2.0))
    >>> float(half.then(half).phi), float(half.then(half).shift), float(half.then(half).cov)
    (0.25, 1.5, 2.5)
    """

    phi: Tensor
    shift: Tensor
    cov: Tensor

    def to(self, like: Tensor) -> Affine:
        """On the dtype and device of ``like``."""
        return Affine(self.phi.to(like), self.shift.to(like), self.cov.to(like))

    def then(self, later: Affine) -> Affine:
        """This transition followed by ``later``."""
        spread = linalg.compose(linalg.compose(later.phi, self.cov), linalg.transpose(later.phi))
        return Affine(
            linalg.compose(later.phi, self.phi),
            _shifted(later.phi, self.shift) + later.shift,
            linalg.add(later.cov, spread),
        )

    def mean(self, x: Tensor) -> Tensor:
        """``phi x + shift`` for ``(..., n, d)``."""
        return linalg.apply(self.phi, x) + _row(self.shift)


@final
@dataclass(frozen=True)
class Pinned:
    """The law ``N(near x_s + far x_1 + shift, eps * cov)`` of the reference between two places it is tied to."""

    near: Tensor
    far: Tensor
    shift: Tensor
    cov: Tensor

    def sample(self, x: Tensor, end: Tensor, eps: Eps, *, generator: torch.Generator | None = None) -> Tensor:
        """One draw for each pair of places, all ``(..., n, d)``."""
        near, far, shift, cov = (part.to(x) for part in (self.near, self.far, self.shift, self.cov))
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        mean = linalg.apply(near, x) + linalg.apply(far, end) + _row(shift)
        return mean + linalg.apply(linalg.root(linalg.scaled(eps, cov)), noise)


def _row(shift: Tensor) -> Tensor:
    return shift if shift.ndim == 0 else shift[..., None, :]


def _shifted(phi: Tensor, shift: Tensor) -> Tensor:
    """``phi @ shift`` where either may be a scalar."""
    if phi.ndim == 0:
        return phi * shift
    vector = shift.expand(phi.shape[:-1]) if shift.ndim == 0 else shift
    return (phi @ vector[..., None])[..., 0]


class Reference(ABC):
    """What a bridge is compared with; a cost is a reference that knows only its two ends."""

    @abstractmethod
    def cost(self) -> Cost:
        """``C(x, y) = -eps log p(X_1 = y | X_0 = x)`` up to a constant."""

    @abstractmethod
    def pull_back(self, psi: Potential, s: float, x: Tensor, eps: Eps) -> Tilted:
        """The law of ``X_1`` given ``X_s = x``, weighted by ``psi``."""

    @abstractmethod
    def push_forward(self, phi: Potential, t: float, y: Tensor, eps: Eps) -> tuple[Tilted, Tensor]:
        """The law of ``X_0`` given ``X_t = y``, weighted by ``phi``, and the log-Jacobian to add to its log-mass."""

    def log_normaliser(self, d: int, eps: Eps, like: Tensor) -> Tensor:
        """``log Z`` with ``p(X_1 = y | X_0 = x) = exp(-C(x, y) / eps) / Z``; 0 where nothing is normalised.

        0-dimensional, or ``(*b, 1)`` where each problem has its own eps.
        """
        return torch.zeros((), dtype=like.dtype, device=like.device)

    def check(self, d: int | None) -> None:
        """Raise `InvalidProblem` where the reference does not live in dimension ``d``."""


@final
class Static(Reference):
    """A cost and nothing else: plans, potentials and transports exist, drifts and paths do not.

    Examples
    --------
    >>> import torch, sbot
    >>> x = torch.randn(5, 2)
    >>> sbot.solve_bridge(x, x + 1, 0.5, reference=sbot.Static(sbot.Lp(1))).report.converged
    True
    """

    def __init__(self, cost: Any) -> None:
        self._cost = as_cost(cost)

    def cost(self) -> Cost:
        return self._cost

    def pull_back(self, psi: Potential, s: float, x: Tensor, eps: Eps) -> Tilted:
        return self._weigh(psi, s == 0, x, self._cost, eps)

    def push_forward(self, phi: Potential, t: float, y: Tensor, eps: Eps) -> tuple[Tilted, Tensor]:
        back = self._cost.T if isinstance(self._cost, MatrixCost) else _Reversed(self._cost)
        tilted = self._weigh(phi, t == 1, y, back, eps)
        return tilted, _scalar(0.0)

    @staticmethod
    def _weigh(potential: Potential, at_end: bool, x: Tensor, cost: Cost, eps: Eps) -> Tilted:
        if not at_end:
            raise Unsupported("a static cost has no process between its ends; give reference=sbot.Brownian()")
        if not isinstance(potential, Atoms):
            raise Unsupported("a static cost works on discrete measures; pass points, such as mu.sample(4096)")
        return potential.weigh(x, cost, eps)

    def __repr__(self) -> str:
        return f"Static({self._cost!r})"


@final
class _Reversed(Cost):
    """``C(y, x)``."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        return self._cost.matrix(y, x).mT

    def embed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        pair = self._cost.embed(y, x)
        return None if pair is None else pair[::-1]


class Process(Reference):
    """``dX = b(t, X) dt + sqrt(eps) B(t) dW``: a reference with something between its ends."""

    @abstractmethod
    def drift(self, t: float, x: Tensor) -> Tensor:
        """``b(t, x)`` for ``(n, d)``."""

    @abstractmethod
    def spread(self, t: float) -> Tensor:
        """``B(t) B(t)'`` as an operator: 0-dimensional or ``(d, d)``."""


class LinearReference(Process):
    """``dX = (A(t) X + b(t)) dt + sqrt(eps) B(t) dW``; a subclass writes `transition` and `coefficients`."""

    @abstractmethod
    def transition(self, s: float, t: float) -> Affine:
        """``X_t | X_s = x ~ N(phi x + shift, eps cov)`` for ``0 <= s <= t <= 1``, in float64 on the CPU."""

    @abstractmethod
    def coefficients(self, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """``A(t)``, ``b(t)`` and ``B(t) B(t)'``: operator, shift, operator."""

    def cost(self) -> Cost:
        step = self.transition(0.0, 1.0)
        return TransitionCost(step.phi, step.shift, step.cov)

    def pull_back(self, psi: Potential, s: float, x: Tensor, eps: Eps) -> Tilted:
        step = self.transition(s, 1.0).to(x)
        return psi.tilt(step.mean(x), linalg.scaled(eps, step.cov))

    def push_forward(self, phi: Potential, t: float, y: Tensor, eps: Eps) -> tuple[Tilted, Tensor]:
        # N(y; Phi x + c, V) as a function of x is N(Phi^-1 (y - c); x, Phi^-1 V Phi^-T) / |det Phi|
        step = self.transition(0.0, t).to(y)
        back = linalg.inverse(step.phi)
        spread = linalg.compose(linalg.compose(back, linalg.scaled(eps, step.cov)), linalg.transpose(back))
        if spread.ndim:
            spread = linalg.symmetrise(spread)
        return phi.tilt(linalg.apply(back, y - _row(step.shift)), spread), -linalg.logdet(step.phi, y.shape[-1])

    def log_normaliser(self, d: int, eps: Eps, like: Tensor) -> Tensor:
        cov = self.transition(0.0, 1.0).cov.to(like.device)
        constant = linalg.log_gaussian_constant(linalg.scaled(eps, cov), d).to(like)
        return constant if constant.ndim == 0 else constant[..., None]

    def drift(self, t: float, x: Tensor) -> Tensor:
        """``A(t) x + b(t)``."""
        a, b, _ = (part.to(x) for part in self.coefficients(t))
        return linalg.apply(a, x) + _row(b)

    def spread(self, t: float) -> Tensor:
        """``B(t) B(t)'``."""
        return self.coefficients(t)[2]

    def pin(self, s: float, t: float) -> Pinned:
        """The law of ``X_t`` given ``X_s`` and ``X_1``, for ``s <= t <= 1``."""
        near, far = self.transition(s, t), self.transition(t, 1.0)
        across = linalg.compose(near.cov, linalg.transpose(far.phi))
        total = linalg.add(linalg.compose(far.phi, across), far.cov)
        gain = linalg.compose(across, linalg.inverse(total)) if s < 1 else linalg.inverse(far.phi)
        spread = linalg.add(near.cov, -linalg.compose(gain, linalg.transpose(across)))
        whole = near.then(far)
        return Pinned(
            linalg.add(near.phi, -linalg.compose(gain, whole.phi)),
            gain,
            near.shift - _shifted(gain, whole.shift),
            linalg.symmetrise(spread) if spread.ndim else spread.clamp(min=0),
        )

    def check(self, d: int | None) -> None:
        if d is None:
            raise InvalidProblem("a process needs points; give the cost matrix (cost=M) of the two histograms instead")
        step = self.transition(0.0, 1.0)
        if not bool(torch.isfinite(step.phi).all() and torch.isfinite(step.cov).all()):
            raise InvalidProblem("the reference overflows on [0, 1]; give smaller coefficients")
        if not float(linalg.logdet(step.phi, d)) > -200 * d:
            raise InvalidProblem("the reference forgets where it started by t = 1; give it less drift")
        for part in (step.phi, step.cov):
            if part.ndim and part.shape[-1] != d:
                raise InvalidProblem(
                    f"the reference lives in dimension {part.shape[-1]} and the points in dimension {d}; make them equal"
                )
        if step.shift.ndim and step.shift.shape[-1] != d:
            raise InvalidProblem(f"the reference has a shift of {step.shift.shape[-1]} entries for points of {d}")
        low = step.cov if step.cov.ndim == 0 else torch.linalg.eigvalsh(step.cov)[0]
        if float(low) <= 1e-14 * float(step.cov.abs().max()):
            raise InvalidProblem("the reference's noise does not reach every direction by t = 1; give it more noise")


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device="cpu")


@final
class Brownian(LinearReference):
    """``dX = sqrt(eps) dW``; it charges ``|x - y|^2 / 2``.

    Examples
    --------
    >>> import sbot
    >>> float(sbot.Brownian().transition(0.25, 1.0).cov)
    0.75
    """

    def transition(self, s: float, t: float) -> Affine:
        return Affine(_scalar(1.0), _scalar(0.0), _scalar(t - s))

    def coefficients(self, t: float) -> tuple[Tensor, Tensor, Tensor]:
        return _scalar(0.0), _scalar(0.0), _scalar(1.0)

    def cost(self) -> Cost:
        return Quadratic()

    def log_normaliser(self, d: int, eps: Eps, like: Tensor) -> Tensor:
        if isinstance(eps, Tensor):
            return super().log_normaliser(d, eps, like)
        # asked for with every solve, and known without a tensor
        return torch.tensor(d / 2 * math.log(2 * math.pi * eps), dtype=like.dtype, device=like.device)

    def __repr__(self) -> str:
        return "Brownian()"


@final
class OrnsteinUhlenbeck(LinearReference):
    """``dX = -rate (X - mean) dt + sqrt(eps) dW``.

    Parameters
    ----------
    rate : any real number; negative repels.
    mean : a number or ``(d,)``.

    Raises
    ------
    InvalidProblem : rate or mean that is not finite.

    Examples
    --------
    >>> import sbot
    >>> round(float(sbot.OrnsteinUhlenbeck(1.5).transition(0.0, 1.0).phi), 4)
    0.2231
    """

    def __init__(self, rate: float, mean: Any = 0.0) -> None:
        self.rate = as_number(rate, "rate")
        if not abs(self.rate) <= 100:
            raise InvalidProblem(f"rate is {self.rate}; beyond 100 the two ends forget each other: give a smaller one")
        self.mean = require_finite(as_tensor(mean, "mean", like=_scalar(0.0)).detach().double().cpu(), "mean")
        if self.mean.ndim > 1:
            raise InvalidProblem(f"mean has shape {tuple(self.mean.shape)}; give a number or (d,)")

    def transition(self, s: float, t: float) -> Affine:
        exponent = self.rate * (t - s)
        spread = t - s if exponent == 0 else -math.expm1(-2 * exponent) / (2 * self.rate)
        return Affine(_scalar(math.exp(-exponent)), -math.expm1(-exponent) * self.mean, _scalar(spread))

    def coefficients(self, t: float) -> tuple[Tensor, Tensor, Tensor]:
        return _scalar(-self.rate), self.rate * self.mean, _scalar(1.0)

    def __repr__(self) -> str:
        return f"OrnsteinUhlenbeck(rate={self.rate:g}, mean={self.mean.tolist()})"


@final
class LinearSDE(LinearReference):
    r"""``dX = (A(t) X + b(t)) dt + sqrt(eps) B(t) dW``.

    Parameters
    ----------
    drift : ``A``, a number, ``(d, d)``, or a smooth function of t that returns one.
    shift : ``b``, a number, ``(d,)``, or such a function.
    diffusion : ``B``, a number, ``(d, d)``, or such a function.

    Transitions with time-dependent coefficients are integrated to rounding, see `sbot.magnus`.

    Raises
    ------
    InvalidProblem : wrong shapes, NaN or infinity, or coefficients too rough to integrate.

    Examples
    --------
    >>> import math, sbot
    >>> vp = sbot.LinearSDE.vp(0.1, 20.0)                       # variance preserving
    >>> abs(float(vp.transition(0.0, 1.0).phi) - math.exp(-10.05 / 2)) < 1e-12
    True
    """

    def __init__(self, drift: Coefficient = 0.0, shift: Coefficient = 0.0, diffusion: Coefficient = 1.0) -> None:
        self._drift, self._shift = _coefficient(drift, "drift", 2), _coefficient(shift, "shift", 1)
        self._diffusion = _coefficient(diffusion, "diffusion", 2)
        self._cache: dict[tuple[float, float], Affine] = {}
        #: name and arguments of the schedule it was made from; None where it was made from functions
        self.recipe: tuple[str, tuple[float, ...]] | None = None

    @classmethod
    def vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> LinearSDE:
        """Variance preserving: ``A = -beta/2, B = sqrt(beta)`` with ``beta`` linear in t from beta_min to beta_max."""
        low, high = _positive(beta_min, "beta_min"), _positive(beta_max, "beta_max")

        def beta(t: float) -> float:
            return low + t * (high - low)

        sde = cls(lambda t: -beta(t) / 2, 0.0, lambda t: math.sqrt(beta(t)))
        sde.recipe = ("vp", (low, high))
        return sde

    @classmethod
    def ve(cls, sigma_min: float = 0.01, sigma_max: float = 1.0) -> LinearSDE:
        """Variance exploding: ``A = 0, B = sigma``, geometric in t from sigma_min to sigma_max."""
        low, high = _positive(sigma_min, "sigma_min"), _positive(sigma_max, "sigma_max")
        sde = cls(0.0, 0.0, lambda t: low * (high / low) ** t)
        sde.recipe = ("ve", (low, high))
        return sde

    @property
    def constants(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """``A, b, B`` where none depends on time, else None."""
        parts = (self._drift, self._shift, self._diffusion)
        return None if any(callable(part) for part in parts) else parts  # type: ignore[return-value]

    def coefficients(self, t: float) -> tuple[Tensor, Tensor, Tensor]:
        a, b, noise = (
            _coefficient(part(t), name, ndim) if callable(part) else part
            for part, name, ndim in (
                (self._drift, "drift", 2),
                (self._shift, "shift", 1),
                (self._diffusion, "diffusion", 2),
            )
        )
        assert isinstance(a, Tensor) and isinstance(b, Tensor) and isinstance(noise, Tensor)
        return a, b, linalg.compose(noise, linalg.transpose(noise))

    def transition(self, s: float, t: float) -> Affine:
        known = self._cache.get((s, t))
        if known is not None:
            return known
        parts = self._transition(s, t)
        phi, shift, cov = parts.phi[0], parts.shift[0], parts.cov[0]
        scalar = all(part.ndim == 0 for part in self.coefficients(t))
        step = Affine(phi[0, 0], shift[0], cov[0, 0]) if scalar else Affine(phi, shift, cov)
        if len(self._cache) >= 256:
            self._cache = {}  # a new one: other threads may be reading the old
        self._cache[s, t] = step
        return step

    def _transition(self, s: float, t: float) -> magnus.Transitions:
        if self.constants is not None or s == t:
            return magnus.exact(self._generator(s), t - s)
        first, last = math.ceil(s * PANELS), math.floor(t * PANELS)
        if first >= last:
            return magnus.integrate(self._generator, s, t, 1)
        parts = [self._panels.part(slice(first, last))]
        if s * PANELS < first:
            parts.insert(0, magnus.integrate(self._generator, s, first / PANELS, 1))
        if last < t * PANELS:
            parts.append(magnus.integrate(self._generator, last / PANELS, t, 1))
        return magnus.joined(parts).merged()

    @cached_property
    def _panels(self) -> magnus.Transitions:
        """Transitions over equal parts of [0, 1], so that any other is a short step at each end."""
        return magnus.integrate(self._generator, 0.0, 1.0, PANELS)

    def _generator(self, t: float) -> Tensor:
        return magnus.block(*self.coefficients(t))

    def __repr__(self) -> str:
        if self.recipe is not None:
            return f"LinearSDE.{self.recipe[0]}({', '.join(f'{v:g}' for v in self.recipe[1])})"
        return "LinearSDE(constant)" if self.constants is not None else "LinearSDE(functions of t)"


def _positive(value: float, name: str) -> float:
    number = as_number(value, name)
    if not 0 < number < math.inf:
        raise InvalidProblem(f"{name} is {number}; give a finite number > 0")
    return number


def _coefficient(value: Coefficient, name: str, ndim: int) -> Tensor | Callable[[float], Any]:
    if callable(value):
        return value
    tensor = require_finite(as_tensor(value, name, like=_scalar(0.0)).detach().double().cpu(), name)
    if tensor.ndim not in (0, ndim) or (ndim == 2 and tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]):
        want = "(d, d)" if ndim == 2 else "(d,)"
        raise InvalidProblem(f"{name} of the reference has shape {tuple(tensor.shape)}; give a number or {want}")
    return tensor


def as_reference(reference: Any, cost: Any) -> Reference:
    """One of the two, or Brownian motion where neither is given; `InvalidProblem` for both or for anything else."""
    if reference is not None and cost is not None:
        raise InvalidProblem("both reference and cost are given; a reference has its own cost, so drop one of them")
    if cost is not None:
        return Static(cost)
    if reference is None:
        return Brownian()
    if not isinstance(reference, Reference):
        hint = f"{reference.__name__}()" if isinstance(reference, type) else "sbot.Brownian()"
        raise InvalidProblem(f"reference must be a Reference, not {reference!r}; pass an object such as {hint}")
    return reference
