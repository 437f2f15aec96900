"""Iterative proportional fitting between Gaussians, exactly: every iterate is the joint Gaussian of ``(X_0, X_1)``.

Iterate 0 is the reference started at mu.  Odd iterates have the right end, ``nu(y) P(x | y)``; even ones the right start,
``mu(x) P(y | x)``.  Between the ends all of them are Brownian bridges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import sbot


@dataclass(frozen=True)
class Joint:
    """A Gaussian law of ``(X_0, X_1)``: ``mean (2d,)`` and ``cov (2d, 2d)``."""

    mean: Tensor
    cov: Tensor

    def marginal(self, t: float, eps: float) -> tuple[Tensor, Tensor]:
        """Mean and covariance of ``X_t``, a Brownian bridge of variance ``eps`` between the ends."""
        d = len(self.mean) // 2
        eye = torch.eye(d, dtype=self.mean.dtype)
        weigh = torch.cat([(1 - t) * eye, t * eye], 1)
        return weigh @ self.mean, weigh @ self.cov @ weigh.T + eps * t * (1 - t) * eye

    def kl(self, other: Joint) -> float:
        """``KL(self | other)``; by the Brownian bridges between, also that of the path laws."""
        inverse = torch.linalg.inv(other.cov)
        gap = self.mean - other.mean
        logdet = torch.linalg.slogdet(other.cov)[1] - torch.linalg.slogdet(self.cov)[1]
        return float((torch.trace(inverse @ self.cov) - len(gap) + logdet + gap @ inverse @ gap) / 2)


def started(mu: sbot.Gaussian, eps: float) -> Joint:
    """Brownian motion from mu."""
    mean, cov = mu.mean.double(), mu.cov.double()
    ahead = cov + eps * torch.eye(len(mean), dtype=torch.float64)
    return Joint(torch.cat([mean, mean]), _blocks(cov, cov, ahead))


def half_step(joint: Joint, law: sbot.Gaussian, end: bool) -> Joint:
    """Replace the law of ``X_1`` (``end``) or of ``X_0`` and keep the law of the other given it."""
    d = len(joint.mean) // 2
    here, there = (slice(d, None), slice(d)) if end else (slice(d), slice(d, None))
    gain = torch.linalg.solve(joint.cov[here, here], joint.cov[here, there]).T
    left = joint.cov[there, there] - gain @ joint.cov[here, there]
    mean, cov = law.mean.double(), law.cov.double()
    other = joint.mean[there] + gain @ (mean - joint.mean[here])
    spread, cross = left + gain @ cov @ gain.T, gain @ cov
    if end:
        return Joint(torch.cat([other, mean]), _blocks(spread, cross, cov))
    return Joint(torch.cat([mean, other]), _blocks(cov, cross.T, spread))


def iterates(mu: sbot.Gaussian, nu: sbot.Gaussian, eps: float, count: int) -> list[Joint]:
    """Iterates 0 to ``count``."""
    out = [started(mu, eps)]
    for k in range(1, count + 1):
        out.append(half_step(out[-1], nu if k % 2 else mu, end=bool(k % 2)))
    return out


def solution(mu: sbot.Gaussian, nu: sbot.Gaussian, eps: float) -> Joint:
    """The limit, from the closed form."""
    ends = [sbot.Gaussian(law.mean.double(), law.cov.double()) for law in (mu, nu)]
    plan = sbot.solve_bridge(ends[0], ends[1], eps, solver=sbot.ClosedForm()).plan()
    return Joint(plan.mean, plan.cov)


def _blocks(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.cat([torch.cat([a, b], 1), torch.cat([b.T, c], 1)], 0)
