"""Features together: what each does alone it does beside the others."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch

import sbot
from sbot.kernels import make_kernel
from sbot.solvers.halfsteps import State
from sbot.solvers.newton import Newton

from ..conftest import clouds, half_squares


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("mass", [0.2, 0.6, 1.0])
def test_partial_transport_lies_between_its_bounds(eps, mass):
    for seed in range(4):
        x, y = clouds(8, 9, 2, torch.Generator().manual_seed(seed))
        bounds = sbot.solve_bridge(x, y, eps, mass=mass).bounds()
        c = half_squares(x, y).numpy()
        plan = ot.partial.partial_wasserstein(np.full(8, 1 / 8), np.full(9, 1 / 9), c, m=mass)
        exact = float((plan * c).sum())
        assert float(bounds.lower) <= exact + 1e-9
        assert float(bounds.upper) >= exact - 1e-9
        assert float(bounds.gap) <= 4 * eps


def test_bounds_of_partial_batches_are_those_of_singles(generator):
    x, y = clouds(7, 9, 2, generator, (3,))
    mass = torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)
    bridge = sbot.solve_bridge(x, y, 0.05, mass=mass)
    whole = bridge.bounds()
    for k in range(3):
        for got, want in zip(whole, bridge[k].bounds(), strict=True):
            torch.testing.assert_close(got[k], want, rtol=1e-9, atol=1e-12)


def test_a_picked_problem_follows_eps(generator):
    x, y = clouds(5, 6, 2, generator, (3,))
    eps = torch.tensor([0.3, 0.5, 0.7], dtype=torch.float64, requires_grad=True)
    bridge = sbot.solve_bridge(x, y, eps).differentiable()
    (want,) = torch.autograd.grad(bridge.transport()[1].square().sum(), eps, retain_graph=True)
    (got,) = torch.autograd.grad(bridge[1].transport().square().sum(), eps)
    torch.testing.assert_close(got, want)
    assert float(want[1].abs()) > 0.1


def test_a_bridge_that_was_moved_follows_the_data(generator):
    x, y = clouds(5, 6, 2, generator)
    x.requires_grad_()
    bridge = sbot.solve_bridge(x, y, 0.5).differentiable()
    (want,) = torch.autograd.grad(bridge.transport().square().sum(), x, retain_graph=True)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        (got,) = torch.autograd.grad(bridge.to(dtype=dtype).transport().square().sum(), x, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"relax": 0.5}, {"mass": 0.5}], ids=str)
def test_a_start_may_have_atoms_that_nothing_reaches(options, generator):
    x, y = clouds(5, 6, 2, generator)
    c = half_squares(x, y)
    c[1:, 2] = torch.inf
    a, b = torch.full((5,), 0.25, dtype=torch.float64), torch.full((6,), 0.2, dtype=torch.float64)
    a[0] = b[2] = 0  # the pair of the two is all that is left to either
    first = sbot.solve_bridge(a, b, 0.1, cost=c, **options)
    again = sbot.solve_bridge(a, b, 0.1, cost=c, init=first, **options)
    torch.testing.assert_close(again.plan(), first.plan(), rtol=0, atol=1e-7)
    path = sbot.solve_path(a, b, [1.0, 0.1], cost=c, **options)
    torch.testing.assert_close(path[1].plan(), first.plan(), rtol=0, atol=1e-7)


def test_paths_of_partial_plans(generator):
    x, y = clouds(6, 8, 2, generator, (2,))
    tight = sbot.Sinkhorn(tol=1e-11)
    mass = torch.tensor([0.4, 0.8], dtype=torch.float64)
    path = sbot.solve_path(x, y, [0.05, 1.0, 0.2], mass=mass, solver=tight)
    for k, eps in enumerate([0.05, 1.0, 0.2]):
        want = sbot.solve_bridge(x, y, eps, mass=mass, solver=tight)
        torch.testing.assert_close(path[k].plan(), want.plan(), rtol=0, atol=1e-8)
        torch.testing.assert_close(path.cost[k], want.cost())


def test_a_start_of_another_form_is_refused_by_name(generator):
    x, y = clouds(5, 6, 2, generator, (3,))
    batch, one = sbot.solve_bridge(x, y, 0.5), sbot.solve_bridge(x[0], y[0], 0.5)
    matrix = sbot.solve_bridge([0.5, 0.5], [0.5, 0.5], 0.5, cost=torch.eye(2))
    with pytest.raises(sbot.InvalidProblem, match=r"init has batch \(3,\)"):
        sbot.solve_bridge(x[0], y[0], 0.5, init=batch)
    with pytest.raises(sbot.InvalidProblem, match=r"init has batch \(\)"):
        sbot.solve_bridge(x, y, 0.5, init=one)
    with pytest.raises(sbot.InvalidProblem, match="init has a cost matrix"):
        sbot.solve_bridge(x[0], y[0], 0.5, init=matrix)


def test_factors_are_not_taken_of_many_columns(generator):
    x, y = clouds(4, 60, 2, generator)
    kernel = make_kernel(sbot.Quadratic(), x, y)
    a, b = torch.full((4,), 1 / 4, dtype=torch.float64), torch.full((60,), 1 / 60, dtype=torch.float64)
    state = State(kernel, a, b, (math.inf, math.inf), torch.zeros_like(b), eps=50.0)
    state.settle()
    rest = state.goal() - state.columns
    assert Newton(direct=1000).solution(state, rest) is None  # S has 3600 entries
    assert Newton(direct=3600).solution(state, rest) is not None
