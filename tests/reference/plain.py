"""What is to be believed: Sinkhorn in float64 and in the log domain, with nothing clever about it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..conftest import kl


class Plain(NamedTuple):
    """The plan and the entropic value."""

    plan: Tensor
    value: float


def plain(c: Tensor, a: Tensor, b: Tensor, eps: float, rho: tuple[float, float], most: int = 100_000) -> Plain:
    """Half-steps until no potential changes by more than 1e-12 eps (or the rounding of the potentials)."""
    lam = [1.0 if math.isinf(r) else r / (r + eps) for r in rho]
    log_a, log_b, cost = a.log(), b.log(), c / eps
    g = torch.zeros_like(b)
    for _ in range(most):
        f = -lam[0] * (g - cost + log_b).logsumexp(1)
        new = -lam[1] * (f[:, None] - cost + log_a[:, None]).logsumexp(0)
        change, g = float((new - g)[b > 0].abs().max()), new
        if change <= 1e-12 * max(1.0, 1e-2 * float(cost.max())):
            break
    else:
        raise AssertionError(f"the plain solve is not done: {change:.1e}")
    plan = torch.exp(log_a[:, None] + log_b + f[:, None] + g - cost)
    primal, dual = (plan * c).sum() + eps * kl(plan, a[:, None] * b), eps * (a.sum() * b.sum() - plan.sum())
    for r, marginal, weights, log in ((rho[0], plan.sum(1), a, f), (rho[1], plan.sum(0), b, g)):
        hard = math.isinf(r)
        primal = primal + (0.0 if hard else r * kl(marginal, weights))
        dual = (
            dual
            + (weights * torch.where(weights > 0, eps * log if hard else -r * torch.expm1(-eps * log / r), 0)).sum()
        )
    assert abs(float(primal - dual)) <= 1e-9 * float(c.max() + eps)
    return Plain(plan, float(dual))  # the one whose error is quadratic
