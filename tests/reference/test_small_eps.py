"""A small eps at which the kernel ``exp(-C / eps)`` loses whole rows: solved here, and where POT's default stops at once."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import sbot

from ..conftest import clouds, half_squares

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ot

EPS = 5e-4


def corner(dtype, generator, d=50):
    """n = 100, uniform weights, squared Euclidean cost, largest 1; in high dimension no pair is near."""
    x, y = clouds(100, 100, d, generator)
    c = half_squares(x, y)
    return torch.full((100,), 0.01, dtype=dtype), (c / c.max()).to(dtype)


def violation(plan, a):
    plan, a = plan.double(), a.double()
    return float((plan.sum(0) - a).abs().sum() + (plan.sum(1) - a).abs().sum())


@pytest.mark.parametrize("d", [2, 50])
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_it_converges_here(tol, d, dtype, generator):
    a, c = corner(dtype, generator, d)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bridge = sbot.solve_bridge(a, a, EPS, cost=c, solver=sbot.Sinkhorn(tol=tol))
    report = bridge.report
    assert report.converged and report.reason == "tolerance" and report.error <= report.tolerance
    # the error of the plan is that of the report, up to what rounding the potentials leaves (docs/conventions.md)
    assert violation(bridge.plan(), a) <= report.tolerance + torch.finfo(dtype).eps / EPS
    exact = ot.emd2(a.double().numpy(), a.double().numpy(), c.double().numpy())
    assert float(bridge.bounds().lower) <= exact + 1e-9 <= float(bridge.bounds().upper) + 2e-9
    assert float(bridge.linear_cost()) == pytest.approx(exact, rel=0.1)


def test_pot_stops_at_iteration_zero(dtype, generator):
    """So that it is known when this changes."""
    a, c = (t.numpy() for t in corner(dtype, generator))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan, log = ot.sinkhorn(a, a, c, EPS, log=True)
    said = [str(warning.message) for warning in caught]
    assert any("numerical errors at iteration 0" in text for text in said), said
    assert log["niter"] == 0
    assert not np.isfinite(plan).all() or abs(float(plan.sum()) - 1) > 0.5
