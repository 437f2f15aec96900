"""Where numbers are far apart: strong relaxation of unequal masses, and atoms that are far from all others."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sbot

from ..conftest import clouds, weights

INF = math.inf


@settings(max_examples=40, deadline=None)
@given(
    power=st.floats(-3, 8),
    ratio=st.floats(0.1, 10),
    eps=st.sampled_from([0.01, 0.1, 1.0]),
    side=st.sampled_from(["both", "mu", "nu"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 5),
)
def test_any_relaxation_of_unequal_masses_reaches_its_tolerance_or_says_why(power, ratio, eps, side, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = clouds(7, 9, 2, generator)
    a, b = weights(7, generator=generator), ratio * weights(9, generator=generator)
    rho = 10**power
    relax = {"both": (rho, rho), "mu": (rho, INF), "nu": (INF, rho)}[side]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = sbot.solve_bridge(*((p.to(dtype), w.to(dtype)) for p, w in ((x, a), (y, b))), eps, relax=relax)
    report = bridge.report
    assert report.converged or report.reason == "precision", report
    if report.reason == "precision":
        assert any("cannot resolve" in note for note in report.notes)
        return
    # the plan is that of potentials that only the masses make large: between a b and the ratio of the masses
    mass = float(bridge.plan().double().sum())
    held = {"both": None, "mu": ratio, "nu": 1.0}[side]
    if held is not None:
        assert mass == pytest.approx(held, rel=4 * report.tolerance + 1e-6)
    elif rho > 1e4:
        assert mass == pytest.approx(math.sqrt(ratio), rel=0.05)  # both sides give in by the same factor


def test_a_relaxation_beyond_the_dtype_says_so(generator):
    x, y = (part.float() for part in clouds(20, 25, 2, generator))
    a, b = weights(20, generator=generator).float(), 1.3 * weights(25, generator=generator).float()
    with pytest.warns(sbot.NotConverged, match="precision"):
        bridge = sbot.solve_bridge((x, a), (y, b), 0.01, relax=1e8)
    assert any("ratio of masses" in note and "equal masses" in note for note in bridge.report.notes)
    wide = sbot.solve_bridge((x.double(), a.double()), (y.double(), b.double()), 0.01, relax=1e8)
    assert wide.report.converged and wide.report.iterations < 1000
    equal = sbot.solve_bridge((x, a), (y, b / b.sum()), 0.01, relax=1e8)
    assert equal.report.converged


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("far", [1, 3])
@pytest.mark.parametrize("eps", [1.0, 0.1, 1e-2])
def test_partial_transport_leaves_far_atoms_behind(far, eps, dtype, generator):
    """They change nothing: their share of the reference measure aside, it is the problem without them."""
    x, y = clouds(20, 25, 2, generator)
    a, b = weights(20, generator=generator), weights(25, generator=generator)
    x[:far] = 1e6
    mass = 0.8 * float(a[far:].sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = sbot.solve_bridge(*((p.to(dtype), w.to(dtype)) for p, w in ((x, a), (y, b))), eps, mass=mass)
    rest = sbot.solve_bridge((x[far:], a[far:]), (y, b), eps, mass=mass)
    report = bridge.report
    assert report.converged or report.reason == "precision"
    plan = bridge.plan().double()
    assert float(plan[:far].sum()) == 0
    assert float(plan.sum()) == pytest.approx(mass, rel=2 * report.error + 1e-3)
    # the value lies between the dual and the dual and the gap
    expected, rounding = float(rest.cost()) + eps * float(a[:far].sum()), 1e-4 if dtype == torch.float32 else 1e-6
    assert float(bridge.cost()) <= expected + rounding
    assert expected <= float(bridge.cost() + bridge.gap()) + rounding
    assert float(bridge.cost()) == pytest.approx(expected, rel=5e-3)
    assert 0 <= float(bridge.gap()) < 0.1


@pytest.mark.parametrize("relax", [1e3, (1e3, INF), (INF, 1e3), (1e3, 10.0)], ids=str)
@pytest.mark.parametrize("n", [60, 600], ids=["exact laws", "rounded laws"])
def test_a_constant_between_the_potentials_costs_no_iterations(relax, n):
    """A strong relaxation of unequal masses takes about as many iterations as hard marginals: `rho / eps` does not count."""
    generator = torch.Generator().manual_seed(0)
    x, y = clouds(n, n + 1, 2, generator)
    a, b = weights(n, generator=generator), weights(n + 1, generator=generator)
    solver = sbot.Sinkhorn(tol=1e-9)
    hard = sbot.solve_bridge((x, a), (y, b), 0.5, solver=solver).report.iterations
    bridge = sbot.solve_bridge((x, a), (y, 1.5 * b), 0.5, relax=relax, solver=solver)
    assert bridge.report.converged
    assert bridge.report.iterations <= 2 * hard + 8, (bridge.report.iterations, hard)


@pytest.mark.parametrize("relax", [0.3, (0.3, INF), (INF, 5.0), (20.0, 0.3)], ids=str)
@pytest.mark.parametrize("eps", [0.5, 0.05])
def test_a_relaxed_solve_that_ends_without_a_pass_is_where_it_says(relax, eps):
    """``f = -rho log(r / a)`` for sums r of rows, and so for g: the error that is reported is that of the plan."""
    generator = torch.Generator().manual_seed(1)
    x, y = clouds(50, 60, 2, generator)
    a, b = weights(50, generator=generator), 1.3 * weights(60, generator=generator)
    if isinstance(relax, tuple) and INF in relax:
        b = b / 1.3
    a[3] = b[5] = 0.0
    if isinstance(relax, tuple) and INF in relax:
        a, b = a / a.sum(), b / b.sum()
    bridge = sbot.solve_bridge((x, a), (y, b), eps, relax=relax, solver=sbot.Sinkhorn(tol=1e-10))
    assert bridge.report.converged
    plan, (f, g) = bridge.plan(), (part.values for part in bridge.potentials())
    rho = relax if isinstance(relax, tuple) else (relax, relax)
    for sums, w, p, strength in ((plan.sum(1), a, f, rho[0]), (plan.sum(0), b, g, rho[1])):
        target = torch.where(w > 0, w * torch.exp(-p / strength), 0.0) if strength < INF else w
        assert float((sums - target).abs().sum() / target.sum()) <= 1.1e-10
