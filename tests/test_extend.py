"""Adding a cost, a reference or a solver takes one class and no change in sbot."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import sbot
from sbot.reference import Affine

from .conftest import clouds, half_squares


class Huber(sbot.Cost):
    def matrix(self, x, y):
        r = torch.cdist(x, y)
        return torch.where(r < 1, r**2 / 2, r - 0.5)


class TwoSpeeds(sbot.LinearReference):
    """Brownian motion that runs at half speed until t = 1/2 and at one and a half after."""

    @staticmethod
    def clock(t):
        return t / 2 if t < 0.5 else 0.25 + 1.5 * (t - 0.5)

    def transition(self, s, t):
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        return Affine(one, zero, one * (self.clock(t) - self.clock(s)))

    def coefficients(self, t):
        zero = torch.zeros((), dtype=torch.float64)
        return zero, zero, zero + (0.5 if t < 0.5 else 1.5)


@dataclass(frozen=True)
class Annealed(sbot.Solver):
    """Sinkhorn by way of twice the eps."""

    def accepts(self, problem):
        return sbot.Sinkhorn().accepts(problem)

    def solve(self, problem, *, init=None, progress=None):
        rough = sbot.solve_bridge(problem.mu, problem.nu, 2 * problem.eps, reference=problem.reference)
        return sbot.Sinkhorn(tol=1e-12).solve(problem, init=rough)


def test_a_cost(generator):
    x, y = clouds(12, 14, 2, generator)
    for options in ({}, {"memory": 0}):
        bridge = sbot.solve_bridge(x, y, 0.2, cost=Huber(), solver=sbot.Sinkhorn(tol=1e-12, **options))
        matrix = sbot.solve_bridge(
            [1 / 12] * 12, [1 / 14] * 14, 0.2, cost=Huber().matrix(x, y), solver=sbot.Sinkhorn(tol=1e-12)
        )
        torch.testing.assert_close(bridge.plan(), matrix.plan(), rtol=1e-6, atol=1e-9)
    assert bridge.transport(x + 1).shape == (12, 2)
    leaf = x.clone().requires_grad_()
    sbot.solve_bridge(leaf, y, 0.2, cost=Huber()).cost().backward()
    assert bool(torch.isfinite(leaf.grad).all())


def test_a_reference(generator):
    """A change of clock: the same plan, other times."""
    x, y = clouds(12, 14, 2, generator)
    brownian = sbot.solve_bridge(x, y, 0.2, solver=sbot.Sinkhorn(tol=1e-12))
    bridge = sbot.solve_bridge(x, y, 0.2, reference=TwoSpeeds(), solver=sbot.Sinkhorn(tol=1e-12))
    torch.testing.assert_close(bridge.plan(), brownian.plan())
    torch.testing.assert_close(bridge.log_prob(0.5, x), brownian.log_prob(0.25, x))
    torch.testing.assert_close(bridge.drift(0.5, x), 1.5 * brownian.drift(0.25, x))
    assert bridge.sample_paths(5, [0.0, 0.5, 1.0], generator=generator).shape == (5, 3, 2)
    g = sbot.Gaussian.from_samples(x), sbot.Gaussian.from_samples(y)
    closed = [sbot.solve_bridge(*g, 0.2, reference=r) for r in (TwoSpeeds(), sbot.Brownian())]
    torch.testing.assert_close(closed[0].marginal(0.5).cov, closed[1].marginal(0.25).cov)


def test_a_solver(generator):
    x, y = clouds(12, 14, 2, generator)
    bridge = sbot.solve_bridge(x, y, 0.2, solver=Annealed())
    want = sbot.solve_bridge(x, y, 0.2, solver=sbot.Sinkhorn(tol=1e-12))
    torch.testing.assert_close(bridge.plan(), want.plan(), rtol=1e-8, atol=1e-12)
    assert float(half_squares(x, y).mean()) > float(bridge.linear_cost())
