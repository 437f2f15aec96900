"""Positive measures that stay in their family when tilted: all that a bridge is made of.

A bridge's end is a positive measure ``psi``.  Looked at from an earlier time it is tilted by a Gaussian in the place where
one stands, ``psi(dy) N(obs; y, V)``: its log-mass is the log of the h-transform, its mean the entropic map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from . import linalg
from .costs import Cost, TransitionCost
from .errors import Unsupported
from .kernels import COPIES, LogKernel, make_kernel
from .measures import Discrete, Measure, categorical


class Tilted(ABC):
    """A law of the far end for each of ``n`` places: ``psi(dy) k(obs_i, y) / mass_i``."""

    @property
    @abstractmethod
    def log_mass(self) -> Tensor:
        """``log of the integral of psi(dy) k(obs_i, y)``, ``(*b, n)``."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """Mean of the law, ``(*b, n, d)``."""

    @property
    @abstractmethod
    def score(self) -> Tensor:
        """Gradient of `log_mass` in ``obs``, ``(*b, n, d)``."""

    @abstractmethod
    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        """One draw for each place, ``(*b, n, d)``."""


class Potential(ABC):
    """A positive measure on the far end, closed under tilting."""

    @abstractmethod
    def tilt(self, obs: Tensor, cov: Tensor) -> Tilted:
        """Times ``N(obs_i; y, cov)`` with ``obs`` ``(*b, n, d)`` and ``cov`` an operator (see `linalg`)."""

    @abstractmethod
    def log_density(self, y: Tensor) -> Tensor:
        """Log-density at ``y`` ``(*b, n, d)``, where there is one."""

    @abstractmethod
    def score(self, y: Tensor) -> Tensor:
        """Gradient of `log_density`."""

    @abstractmethod
    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Potential:
        """The same potential in another dtype or on another device."""

    def pick(self, index: tuple[int, ...], n: int) -> Potential:
        """That of one problem of a batch, of its first ``n`` atoms where it has atoms."""
        raise Unsupported(f"a {type(self).__name__} has no parts; solve the problems one by one")


@final
class Atoms(Potential):
    """``sum_j exp(log_weights_j) delta(points_j)``.

    Parameters
    ----------
    points : ``(*b, m, d)``, or integer numbers ``(m,)`` where the cost is a matrix.
    log_weights : ``(*b, m)``; ``-inf`` drops an atom.
    values : ``(*b, m, d)``, what a numbered atom stands for; None where it stands for nothing but its number.
    """

    def __init__(self, points: Tensor, log_weights: Tensor, values: Tensor | None = None) -> None:
        self.points, self.log_weights = points, log_weights
        self.values = points if values is None and points.dtype.is_floating_point else values

    def tilt(self, obs: Tensor, cov: Tensor) -> TiltedAtoms:
        # the Gaussian is the kernel of a cost: exp(-|obs - y|^2_V / 2) up to its normaliser
        one, zero = (
            torch.ones((), dtype=obs.dtype, device=obs.device),
            torch.zeros((), dtype=obs.dtype, device=obs.device),
        )
        cost = TransitionCost(one, zero, cov)
        constant = linalg.log_gaussian_constant(cov, obs.shape[-1])
        return TiltedAtoms(self, make_kernel(cost, obs, self.points), 1.0, -constant, obs, cov)

    def lies_on(self, measure: Measure) -> bool:
        """Whether the atoms are those of ``measure``, in its order; numbered ones are told by their count."""
        if not isinstance(measure, Discrete) or self.log_weights.shape != measure.weights.shape:
            return False
        numbered = not self.points.dtype.is_floating_point
        return numbered or (measure.points is not None and torch.equal(self.points, measure.points.detach()))

    def weigh(self, obs: Tensor, cost: Cost, eps: float) -> TiltedAtoms:
        """Times ``exp(-C(obs_i, y) / eps)``, for a reference that knows only its cost."""
        return TiltedAtoms(self, make_kernel(cost, obs, self.points), eps, None, obs, None)

    def log_density(self, y: Tensor) -> Tensor:
        raise Unsupported("a discrete measure has no density at its own time; ask at 0 < t < 1, or use plan()")

    def score(self, y: Tensor) -> Tensor:
        raise Unsupported(
            "the drift towards a discrete measure is infinite at its own time; ask at a time before it, 0 < t < 1"
        )

    def pick(self, index: tuple[int, ...], n: int) -> Atoms:
        numbered = not self.points.dtype.is_floating_point
        points = self.points[:n] if numbered else self.points[index][..., :n, :]
        values = None if self.values is None or not numbered else self.values[index][..., :n, :]
        return Atoms(points, self.log_weights[index][..., :n], values)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Atoms:
        numbered = not self.points.dtype.is_floating_point
        points = self.points.to(device=device) if numbered else self.points.to(dtype=dtype, device=device)
        values = None if self.values is None else self.values.to(dtype=dtype, device=device)
        return Atoms(points, self.log_weights.to(dtype=dtype, device=device), values)


@final
class TiltedAtoms(Tilted):
    """Atoms seen through a kernel; the reductions run when they are asked for and stream over tiles."""

    def __init__(
        self, psi: Atoms, kernel: LogKernel, eps: float, constant: Tensor | None, obs: Tensor, cov: Tensor | None
    ) -> None:
        self._psi, self._kernel, self._eps = psi, kernel, eps
        self._constant, self._obs, self._cov = constant, obs, cov

    @property
    def log_mass(self) -> Tensor:
        lse = self._kernel.reduce(self._psi.log_weights, self._eps)[0]
        return lse if self._constant is None else lse + self._constant

    @property
    def mean(self) -> Tensor:
        if self._psi.values is None:
            raise Unsupported("the bins of a histogram have no mean; give points with the cost matrix, or use plan()")
        lse, mean = self._kernel.reduce(self._psi.log_weights, self._eps, self._psi.values)
        assert mean is not None
        self._require_reach(lse)
        return mean

    @staticmethod
    def _require_reach(lse: Tensor) -> None:
        if bool((lse == -torch.inf).any()):
            where = torch.nonzero(lse == -torch.inf)[0].tolist()
            raise Unsupported(f"from place {where} every pair is forbidden (+inf); ask at places that reach an atom")

    @property
    def score(self) -> Tensor:
        if self._cov is None:
            raise Unsupported("a static cost has no drift; give reference=sbot.Brownian()")
        return linalg.apply(linalg.inverse(self._cov), self.mean - self._obs)

    @property
    def weights(self) -> Tensor:
        """The probabilities of the atoms for each place, ``(*b, n, m)``: dense."""
        n = self._kernel.shape[0]
        logits = self._psi.log_weights[..., None, :] - self._kernel.entries(slice(0, n)) / self._eps
        return logits.softmax(-1)

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        self._require_reach(self.log_mass)
        self._kernel.copies = COPIES
        with torch.no_grad():
            draws = [
                categorical(self._psi.log_weights[..., None, :] - self._kernel.entries(rows) / self._eps, 1, generator)
                for rows in self._kernel.tiles()
            ]
        index = torch.cat(draws, -2)[..., 0]
        if self._psi.values is None:
            return index
        return torch.take_along_dim(self._psi.values, index[..., None], dim=-2)


@final
class Quadratics(Potential):
    """``sum_k exp(logits_k) N(y; means_k, covs_k) exp((y - o)' W (y - o) / 2)``: mixtures of exponentials of quadratics.

    The precision ``covs_k^-1 - W`` may be indefinite (the end is wider than the reference spreads) and ``covs_k`` may be
    singular (a degenerate end): the form keeps both bounded, where the information form has an infinite precision.

    Parameters
    ----------
    logits : ``(*b, K)``.  means : ``(*b, K, d)``.  covs : ``(*b, K, d, d)``.
    growth : the matrix ``W``, ``(*b, d, d)``: the precision of the reference's transition.
    origin : the point ``o``, ``(*b, d)``; None is zero.  Near the places it will be seen from, weights of components far
        from zero keep their digits.
    """

    def __init__(
        self, logits: Tensor, means: Tensor, covs: Tensor, growth: Tensor, origin: Tensor | None = None
    ) -> None:
        self.logits, self.means, self.covs, self.growth, self.origin = logits, means, covs, growth, origin

    def centred(self, y: Tensor) -> Tensor:
        """``y - o`` for ``(*b, n, d)``."""
        return y if self.origin is None else y - self.origin[..., None, :]

    def tilt(self, obs: Tensor, cov: Tensor) -> TiltedQuadratics:
        return TiltedQuadratics(self, obs, linalg.matrix(cov, obs.shape[-1]))

    def log_density(self, y: Tensor) -> Tensor:
        each = self._component_log_density(y)
        return each.logsumexp(-1)

    def _component_log_density(self, y: Tensor) -> Tensor:
        factor = linalg.cholesky(self.covs)
        if factor is None:
            raise Unsupported("a singular marginal has no density at its own time; ask at 0 < t < 1")
        r = (y[..., None, :, :] - self.means[..., :, None, :]).mT
        white = torch.linalg.solve_triangular(factor, r, upper=False)
        constant = linalg.log_gaussian_constant(self.covs, y.shape[-1])
        from_origin = self.centred(y)
        grown = ((from_origin @ self.growth) * from_origin).sum(-1)
        each = self.logits[..., None] - constant[..., None] - white.square().sum(-2) / 2 + grown[..., None, :] / 2
        return each.mT

    def score(self, y: Tensor) -> Tensor:
        share = self._component_log_density(y).softmax(-1)
        r = y[..., None, :, :] - self.means[..., :, None, :]
        each = -torch.linalg.solve(self.covs, r.mT).mT
        return torch.einsum("...nk,...knd->...nd", share, each) + self.centred(y) @ self.growth

    def pick(self, index: tuple[int, ...], n: int) -> Quadratics:
        origin = None if self.origin is None else self.origin[index]
        return Quadratics(self.logits[index], self.means[index], self.covs[index], self.growth[index], origin)

    def to(self, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Quadratics:
        def move(part: Tensor) -> Tensor:
            return part.to(dtype=dtype, device=device)

        origin = None if self.origin is None else move(self.origin)
        return Quadratics(move(self.logits), move(self.means), move(self.covs), move(self.growth), origin)


@final
class TiltedQuadratics(Tilted):
    r"""A Gaussian mixture for each place: one Kalman update per component, without the inverse of a covariance.

    With ``R = K^1/2``, ``F = I + R (V^-1 - W) R`` and ``r = obs - m``, component k is the Gaussian of covariance
    ``S = R F^-1 R`` and mean ``m + S (V^-1 r + W m)``.  Its log-mass is quadratic in obs with gradient
    ``g(r) = (K + V - K W V)^-1 (K W m - (I - K W) r)``, so it is its value at ``r = 0`` plus ``(g(0) + g(r))' r / 2``;
    in this form nothing cancels as ``V -> 0``.
    """

    def __init__(self, psi: Quadratics, obs: Tensor, cov: Tensor) -> None:
        d = obs.shape[-1]
        covs, growth = psi.covs, psi.growth[..., None, :, :]  # (*b, K, d, d), (*b, 1, d, d)
        cov = cov[..., None, :, :] if cov.ndim > 2 else cov
        precision = torch.linalg.inv(cov)
        r = obs[..., None, :, :] - psi.means[..., :, None, :]  # (*b, K, n, d)
        means = psi.centred(psi.means)[..., None, :]
        pull = means @ growth  # (*b, K, 1, d): (W (m - o))', and below m stands for m - o

        roots = linalg.sqrtm(covs)
        eye = torch.eye(d, dtype=obs.dtype, device=obs.device)
        factor = eye + roots @ (precision - growth) @ roots
        self.component_covs = linalg.symmetrise(roots @ torch.linalg.solve(factor, roots))  # (*b, K, d, d)
        solved = torch.linalg.solve(factor, ((r @ precision + pull) @ roots).mT).mT
        self.component_means = psi.means[..., None, :] + solved @ roots  # (*b, K, n, d)

        left = covs + cov - covs @ growth @ cov
        rest = torch.linalg.solve(left, (pull @ covs).mT).mT  # g(0)
        slope = (r @ growth) @ covs - r
        self._component_score = rest + torch.linalg.solve(left, slope.mT).mT  # (*b, K, n, d)
        start = (pull * (means + pull @ self.component_covs)).sum(-1) / 2
        self._component_log_mass = (
            psi.logits[..., None]
            + start
            + ((rest + self._component_score) * r).sum(-1) / 2
            - linalg.log_gaussian_constant(left, d)[..., None]
        )  # (*b, K, n)

    @property
    def log_mass(self) -> Tensor:
        return self._component_log_mass.logsumexp(-2)

    @property
    def component_weights(self) -> Tensor:
        """Probability of each component, ``(*b, K, n)``."""
        return self._component_log_mass.softmax(-2)

    @property
    def mean(self) -> Tensor:
        return (self.component_weights[..., None] * self.component_means).sum(-3)

    @property
    def score(self) -> Tensor:
        return (self.component_weights[..., None] * self._component_score).sum(-3)

    def sample(self, *, generator: torch.Generator | None = None) -> Tensor:
        means = self.component_means
        noise = torch.randn(means.shape, generator=generator, dtype=means.dtype, device=means.device)
        draws = means + noise @ linalg.sqrtm(self.component_covs)
        if means.shape[-3] == 1:
            return draws[..., 0, :, :]
        chosen = categorical(self._component_log_mass.mT, 1, generator)  # (*b, n, 1)
        return torch.take_along_dim(draws, chosen.mT[..., None], dim=-3)[..., 0, :, :]
