"""Features together: what each does alone it does beside the others."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch

import sbot

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
