"""Small and large eps, far supports, extreme scales, duplicates: converged, or honestly not, and never NaN."""

from __future__ import annotations

import warnings

import pytest
import torch

import sbot

from .conftest import clouds


def setting(kind, generator):
    x, y = clouds(60, 70, 3, generator)
    if kind == "far apart":
        y = y + 1e4
    if kind == "far from the origin":
        x, y = x + 1e6, y + 1e6
    if kind == "tiny":
        x, y = 1e-12 * x, 1e-12 * y
    if kind == "huge":
        x, y = 1e12 * x, 1e12 * y
    if kind == "duplicates":
        x, y = x[torch.arange(60) % 7], y[torch.arange(70) % 5]
    if kind == "identical":
        x, y = torch.ones(60, 3).double(), torch.ones(70, 3).double()
    return x, y


KINDS = ["near", "far apart", "far from the origin", "tiny", "huge", "duplicates", "identical"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rel", [1e-4, 1e-2, 1.0, 1e3])
@pytest.mark.parametrize("memory", [0, 2**30], ids=["streamed", "stored"])
def test_extremes(kind, rel, memory, dtype, generator):
    x, y = setting(kind, generator)
    mean = float(((x[:, None] - y) ** 2).sum(-1).mean() / 2) or 1.0
    if kind == "far from the origin" and dtype == torch.float32:
        x, y = x - 1e6 + 1e3, y - 1e6 + 1e3  # 1e6 leaves float32 points themselves two digits
    x, y = x.to(dtype), y.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sbot.NotConverged)
        bridge = sbot.solve_bridge(x, y, rel * mean, solver=sbot.Sinkhorn(memory=memory, max_iter=600))
    report = bridge.report
    assert report.converged == (report.error <= report.tolerance)
    plan = bridge.plan().double()
    error = float((plan.sum(1) - 1 / 60).abs().sum() + (plan.sum(0) - 1 / 70).abs().sum())
    # the plan is recomputed from potentials of size max|C| / eps: what rounding them leaves
    slack = 4 * torch.finfo(dtype).eps * mean / bridge.problem.eps + (1e-9 if dtype == torch.float64 else 1e-4)
    assert abs(error - report.error) <= 0.1 * report.error + slack
    values = [bridge.cost(), bridge.linear_cost(), bridge.gap(), plan, bridge.transport(x), bridge.drift(0.5, x)]
    values += [bridge.log_prob(0.5, x), bridge.potentials().f.values, bridge.interpolate(0.5, 9, generator=generator)]
    assert all(bool(torch.isfinite(v).all()) for v in values)
    if rel >= 1e-2:
        assert report.converged


def test_where_pot_stops_at_iteration_zero(dtype, generator):
    """n = 100, uniform, eps = 5e-4 of the largest cost: ot.sinkhorn returns a plan of mass 0.001 here."""
    x, y = clouds(100, 100, 2, generator)
    c = ((x[:, None] - y) ** 2).sum(-1) / 2
    uniform = torch.full((100,), 0.01, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sbot.NotConverged)
        solver = sbot.Sinkhorn(tol=1e-3)
        bridge = sbot.solve_bridge(uniform, uniform, 5e-4, cost=(c / c.max()).to(dtype), solver=solver)
    assert bridge.report.converged
    assert float(bridge.plan().sum()) == pytest.approx(1, abs=1e-3)


def test_overflowing_costs_are_an_error_not_a_nan():
    x = torch.tensor([[0.0], [1e30]])
    for cost in (None, sbot.Lp(1, power=2), sbot.Quadratic()):
        with pytest.raises(sbot.InvalidProblem, match=r"cost overflows torch\.float32; rescale"):
            sbot.solve_bridge(x, x, 1.0, cost=cost)
    assert sbot.solve_bridge(x.double(), x.double(), 1e50).report.converged
    bad = torch.full((3, 3), 1.0)
    calls = []

    def late_nan(x, y):
        calls.append(1)
        return bad[: len(x), : len(y)] * (float("nan") if len(calls) > 1 else 1.0)

    with pytest.raises((sbot.NumericalError, sbot.InvalidProblem)):
        sbot.solve_bridge(torch.zeros(3, 1), torch.zeros(3, 1), 1.0, cost=late_nan)


def test_padded_batches_converge_as_soon_as_their_problems(generator):
    """An atom without weight has a column of nothing: Newton's steps must not take it for one of little."""
    generator.manual_seed(1)
    sides = []
    for _ in range(2):
        sizes = torch.randint(1, 30, (9,), generator=generator).tolist()
        each = [torch.randn(k, 2, generator=generator, dtype=torch.float64) for k in sizes]
        sides.append(sbot.Discrete.from_list(each))
    bridge = sbot.solve_bridge(*sides, 0.1)
    assert bridge.report.converged and bridge.report.iterations < 1000


@pytest.mark.parametrize("shift", [-3.0, 0.0, 30.0])
def test_atoms_without_weight_do_not_matter_wherever_the_cost_has_its_zero(shift, generator):
    generator.manual_seed(30)
    x, y = (torch.rand(n, 2, generator=generator, dtype=torch.float64) for n in (30, 40))
    a, b = (0.05 + torch.rand(n, generator=generator, dtype=torch.float64) for n in (30, 40))
    a[::3], b[1::2] = 0, 0
    a, b, cost = a / a.sum(), b / b.sum(), torch.cdist(x, y).square()
    solver = sbot.Sinkhorn(tol=1e-12)
    bridge = sbot.solve_bridge(a, b, 0.03, cost=cost + shift, solver=solver)
    alone = sbot.solve_bridge(a[a > 0], b[b > 0], 0.03, cost=cost[a > 0][:, b > 0], solver=solver)
    assert bridge.report.converged and bridge.report.iterations <= 1.5 * alone.report.iterations
    torch.testing.assert_close(bridge.plan()[a > 0][:, b > 0], alone.plan(), rtol=1e-8, atol=1e-12)
    assert float(bridge.plan().sum()) == pytest.approx(float(alone.plan().sum()), rel=1e-12)


def test_small_clusters_far_away_take_no_longer(generator):
    """They move far between two looks at an error that does not see them."""
    x, y = (0.3 * torch.randn(300, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    x[:10] += 3
    y[:4] += 3
    for eps, most in ((0.3, 100), (0.02, 300)):
        assert sbot.solve_bridge(x, y, eps, solver=sbot.Sinkhorn(tol=1e-9)).report.iterations <= most


@pytest.mark.parametrize("mass", [1e-40, 1e40])
def test_masses_beyond_single_precision_take_no_longer(mass, generator):
    x, y = (torch.randn(300, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    w = torch.full((300,), mass / 300, dtype=torch.float64)
    one, two = (sbot.solve_bridge((x, v), (y, v), 0.05) for v in (w, w / mass))
    assert one.report.converged and one.report.iterations <= 1.2 * two.report.iterations
