"""Partial transport: the plan of prescribed mass within two bounds, against POT, a convex solver and its own limits."""

from __future__ import annotations

import math
import warnings

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import minimize

import sbot
from sbot import metrics
from sbot.partial import capped, masses, support

from ..conftest import clouds, half_squares, kl, weights

INF = math.inf
TIGHT = sbot.Sinkhorn(tol=1e-12)


@pytest.fixture
def data(generator):
    """Points and weights of masses 1 and 1.3."""
    x, y = clouds(20, 25, 2, generator)
    return x, y, weights(20, generator=generator), 1.3 * weights(25, generator=generator)


def objective(plan, cost, a, b, eps):
    return (plan * torch.where(torch.isfinite(cost), cost, 0.0)).sum() + eps * kl(plan, a[:, None] * b)


# ---- the half-step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_a_capped_half_step_fills_up_to_the_mass(seed):
    generator = torch.Generator().manual_seed(seed)
    n = seed % 7 + 1
    w = torch.rand(3, n, generator=generator, dtype=torch.float64) + 1e-3
    if n > 2:
        w[0, 1] = 0
    lse = 50 * torch.randn(3, n, generator=generator, dtype=torch.float64)
    if n > 3:
        lse[1, 2] = -INF
    reached = torch.where(torch.isfinite(lse), w, 0.0).sum(-1)
    share = torch.tensor([0.3, 0.9, 1.0], dtype=torch.float64)
    mass = share * reached
    rows = masses(w.log(), lse, mass)
    torch.testing.assert_close(rows.sum(-1), mass, rtol=1e-12, atol=0)
    assert bool((rows <= w * (1 + 1e-12)).all())
    # one factor for all that are not full
    height = capped(w.log(), lse, mass)
    loose = (rows < w * (1 - 1e-9)) & (w > 0)
    # from a cap near by, or a wrong one, the same
    top = torch.where(torch.isfinite(lse) & (w > 0), height, -INF).amax(-1, keepdim=True)
    for near in (top, top - 1e-3, top + 30, top - 30, top * torch.inf):
        found = capped(w.log(), lse, mass, near)
        torch.testing.assert_close(masses(w.log(), lse, mass, found), rows, rtol=1e-9, atol=1e-15)
    assert bool((height[loose] == height.amax(-1, keepdim=True).expand_as(height)[loose]).all())


def test_the_support_function_is_met_by_what_is_filled_up(generator):
    """``<r, f>`` is at most ``<w, f> - (sum w - s) max f``, with equality where all below the cap is full."""
    w = weights(9, generator=generator)
    f = torch.randn(9, generator=generator, dtype=torch.float64)
    mass = torch.tensor(0.4, dtype=torch.float64)
    for _ in range(20):
        rows = masses(w.log(), torch.randn(9, generator=generator, dtype=torch.float64), mass)
        assert float(rows @ f) >= float(support(f, w, mass)) - 1e-12
    f = torch.where(w > 0.1, 1.0, -1.0).double()
    mass = w[w <= 0.1].sum() + 0.05
    rows = torch.where(w > 0.1, 0.05 * w / w[w > 0.1].sum(), w)
    assert float(rows @ f) == pytest.approx(float(support(f, w, mass)))


# ---- the solution ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("eps", "mass"), [(1.0, 0.2), (0.1, 0.7), (0.1, 1.0)])
def test_plans_are_those_of_pot(data, eps, mass):
    x, y, a, b = data
    cost, mass = half_squares(x, y), min(mass, float(a.sum()))
    plan = sbot.solve_bridge((x, a), (y, b), eps, mass=mass, solver=TIGHT).plan()
    # their entropy is relative to a constant: with general weights the cost takes up the difference
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ot.partial.entropic_partial_wasserstein(
            a.numpy(),
            b.numpy(),
            (cost - eps * (a[:, None] * b).log()).numpy(),
            eps,
            m=mass,
            numItermax=10_000,
            stopThr=1e-14,
        )
    torch.testing.assert_close(plan, torch.from_numpy(theirs), rtol=0, atol=1e-9)
    even = torch.full_like(a, 0.0501), torch.full_like(b, 0.06)
    plan = sbot.solve_bridge((x, even[0]), (y, even[1]), eps, mass=mass, solver=TIGHT).plan()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = ot.partial.entropic_partial_wasserstein(
            even[0].numpy(), even[1].numpy(), cost.numpy(), eps, m=mass, numItermax=10_000, stopThr=1e-14
        )
    torch.testing.assert_close(plan, torch.from_numpy(theirs), rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_a_convex_solver_finds_no_better(seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = clouds(3, 4, 2, generator)
    a, b, eps, mass = weights(3, generator=generator), weights(4, generator=generator), 0.2, 0.6
    cost = half_squares(x, y)
    bridge = sbot.solve_bridge((x, a), (y, b), eps, mass=mass, solver=TIGHT)
    reference = (a[:, None] * b).numpy()

    def value(flat):
        p = flat.reshape(3, 4)
        return float((p * cost.numpy()).sum() + eps * (p * np.log(p / reference) - p + reference).sum())

    def slope(flat):
        p = flat.reshape(3, 4)
        return (cost.numpy() + eps * np.log(p / reference)).ravel()

    best = minimize(
        value,
        (mass * reference / reference.sum()).ravel(),
        jac=slope,
        bounds=[(1e-12, None)] * 12,
        constraints=[
            {"type": "ineq", "fun": lambda p: a.numpy() - p.reshape(3, 4).sum(1)},
            {"type": "ineq", "fun": lambda p: b.numpy() - p.reshape(3, 4).sum(0)},
            {"type": "eq", "fun": lambda p: p.sum() - mass},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert float(bridge.cost()) == pytest.approx(best.fun, abs=1e-7)
    assert np.abs(bridge.plan().numpy() - best.x.reshape(3, 4)).max() < 1e-4


@pytest.mark.parametrize(("eps", "mass"), [(0.3, 0.6), (1e-2, 0.1), (1e-2, 0.95), (2e-3, 0.6)])
def test_optimality_bounds_and_values(data, eps, mass):
    x, y, a, b = data
    bridge = sbot.solve_bridge((x, a), (y, b), eps, mass=mass, solver=sbot.Sinkhorn(tol=1e-10))
    plan, cost = bridge.plan(), half_squares(x, y)
    assert bridge.report.converged
    assert float(plan.sum()) == pytest.approx(mass, rel=1e-9)
    assert bool((plan.sum(1) <= a + 1e-9).all()) and bool((plan.sum(0) <= b + 1e-9).all())
    f, g = (part.values for part in bridge.potentials())
    torch.testing.assert_close(plan, a[:, None] * b * torch.exp((f[:, None] + g - cost) / eps))
    # complementary slackness: below the cap an atom is used up
    for potential, sums, w in ((f, plan.sum(1), a), (g, plan.sum(0), b)):
        below = potential < potential.max() - 1e-6 * eps
        torch.testing.assert_close(sums[below], w[below], rtol=1e-5, atol=1e-8)
        rest = (w - sums).clamp(min=0)
        assert float((rest * (potential.max() - potential)).sum()) < 1e-8
    dual = a @ (f - f.max()) + b @ (g - g.max()) + mass * (f.max() + g.max()) - eps * (plan.sum() - a.sum() * b.sum())
    torch.testing.assert_close(bridge.cost(), dual)
    torch.testing.assert_close(bridge.cost(), objective(plan, cost, a, b, eps), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(bridge.linear_cost(), (plan * cost).sum())
    assert 0 <= float(bridge.gap()) < 1e-8


def test_very_small_eps_is_near_unregularised_partial_transport(data):
    x, y, a, b = data
    cost = half_squares(x, y)
    exact = ot.partial.partial_wasserstein2(a.numpy(), b.numpy(), cost.numpy(), m=0.7)
    bridge = sbot.solve_bridge((x, a), (y, b), 1e-3, mass=0.7)
    assert bridge.report.converged
    rounded = bridge.round()
    assert float(exact) - 1e-9 <= float(rounded.linear_cost()) <= float(exact) + 5e-3
    rows, columns = rounded.marginals()
    assert float(rows.sum()) == pytest.approx(0.7) and bool((rows <= a * (1 + 1e-12)).all())
    assert bool((columns <= b * (1 + 1e-12)).all())


def test_all_of_the_smaller_side_is_one_hard_marginal(data):
    """All of mu: the row sums are mu, and nu is a bound; all of both: the balanced problem, with its potentials."""
    x, y, a, b = data
    full = sbot.solve_bridge((x, a), (y, b), 0.1, mass=1.0, solver=TIGHT)
    torch.testing.assert_close(full.plan().sum(1), a)
    wide = sbot.solve_bridge((x, a), (y, 100 * b), 0.1, mass=1.0, solver=TIGHT)
    free = sbot.solve_bridge((x, a), (y, 100 * b), 0.1, relax=(INF, 1e-9), solver=TIGHT)
    torch.testing.assert_close(wide.plan(), free.plan(), rtol=0, atol=1e-6)  # bounds that do not bind
    equal = b / 1.3
    both = sbot.solve_bridge((x, a), (y, equal), 0.1, mass=1.0, solver=TIGHT)
    balanced = sbot.solve_bridge((x, a), (y, equal), 0.1, solver=TIGHT)
    torch.testing.assert_close(both.plan(), balanced.plan(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(both.cost(), balanced.cost())
    torch.testing.assert_close(both.potentials().f.values, balanced.potentials().f.values, atol=1e-8, rtol=0)


def test_swapping_the_sides_transposes(data):
    x, y, a, b = data
    there = sbot.solve_bridge((x, a), (y, b), 0.05, mass=0.6, solver=TIGHT)
    back = sbot.solve_bridge((y, b), (x, a), 0.05, mass=0.6, solver=TIGHT)
    torch.testing.assert_close(there.plan(), back.plan().T, rtol=0, atol=1e-10)
    torch.testing.assert_close(there.potentials().f.values, back.potentials().g.values, rtol=0, atol=1e-8)
    torch.testing.assert_close(there.cost(), back.cost())


def test_more_mass_costs_more_at_the_multiplier(data):
    """``d cost / d mass = max f + max g``, which grows with the mass."""
    x, y, a, b = data
    slopes = []
    for mass in (0.3, 0.6, 0.9):
        s = torch.tensor(mass, dtype=torch.float64, requires_grad=True)
        bridge = sbot.solve_bridge((x, a), (y, b), 0.1, mass=s, solver=TIGHT)
        (slope,) = torch.autograd.grad(bridge.cost(), s)
        h = 1e-4
        ends = [sbot.solve_bridge((x, a), (y, b), 0.1, mass=mass + k * h, solver=TIGHT).cost() for k in (1, -1)]
        assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-5)
        slopes.append(float(slope))
    assert slopes == sorted(slopes)


def test_gradients_of_the_value(data):
    x, y, a, b = data

    def cost(x, y, a, b):
        return sbot.solve_bridge((x, a), (y, b), 0.1, mass=0.6, solver=TIGHT).cost()

    leaves = [part.clone().requires_grad_() for part in data]
    grads = torch.autograd.grad(cost(*leaves), leaves)
    generator = torch.Generator().manual_seed(3)
    for k, grad in enumerate(grads):
        way = torch.randn(data[k].shape, generator=generator, dtype=torch.float64) * (0.01 if k > 1 else 1)
        h = 1e-5
        ends = []
        for sign in (1, -1):
            moved = list(data)
            moved[k] = data[k] + sign * h * way
            ends.append(cost(*moved))
        assert float((grad * way).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-4, abs=1e-9)
    matrix = half_squares(x, y).requires_grad_()
    bridge = sbot.solve_bridge(a, b, 0.1, cost=matrix, mass=0.6, solver=TIGHT)
    torch.testing.assert_close(torch.autograd.grad(bridge.cost(), matrix)[0], bridge.plan(), rtol=1e-6, atol=1e-10)


# ---- with everything else ----------------------------------------------------------------------------------------------


def test_a_rough_solve_is_bracketed_and_says_so(data):
    x, y, a, b = data
    exact = sbot.solve_bridge((x, a), (y, b), 0.01, mass=0.8, solver=TIGHT).cost()
    with pytest.warns(sbot.NotConverged):
        rough = sbot.solve_bridge((x, a), (y, b), 0.01, mass=0.8, solver=sbot.Sinkhorn(max_iter=3, anneal=None))
    assert not rough.report.converged and rough.report.reason == "max_iter"
    assert float(rough.cost()) < float(exact) < float(rough.cost() + rough.gap())
    on = sbot.solve_bridge((x, a), (y, b), 0.01, mass=0.8, init=rough)
    assert on.report.converged


def test_streamed_is_stored_and_float32_is_float64(data):
    x, y, a, b = data
    stored = sbot.solve_bridge((x, a), (y, b), 0.05, mass=0.6, solver=TIGHT)
    streamed = sbot.solve_bridge((x, a), (y, b), 0.05, mass=0.6, solver=sbot.Sinkhorn(tol=1e-12, memory=2**9))
    assert "streamed" in streamed.report.notes[-1]
    torch.testing.assert_close(stored.plan(), streamed.plan(), rtol=0, atol=1e-10)
    single = sbot.solve_bridge(*((p.float(), w.float()) for p, w in ((x, a), (y, b))), 0.05, mass=0.6)
    assert single.report.converged and single.plan().dtype == torch.float32
    torch.testing.assert_close(single.plan().double(), stored.plan(), rtol=0, atol=1e-4)
    assert float(single.plan().double().sum()) == pytest.approx(0.6, rel=1e-4)


@pytest.mark.parametrize("memory", [2**30, 2**9])
def test_batches_are_singles(generator, memory):
    x, y = clouds(12, 15, 2, generator, (3,))
    a, b = weights(3, 12, generator=generator), weights(3, 15, generator=generator)
    a[1, 2] = 0
    solver = sbot.Sinkhorn(tol=1e-11, memory=memory)
    mass = torch.tensor([0.2, 0.8, 0.5], dtype=torch.float64)
    batch = sbot.solve_bridge((x, a), (y, b), 0.05, mass=mass, solver=solver)
    assert batch.problem.mass.shape == (3,)
    for k in range(3):
        one = sbot.solve_bridge((x[k], a[k]), (y[k], b[k]), 0.05, mass=float(mass[k]), solver=solver)
        torch.testing.assert_close(batch.plan()[k], one.plan(), rtol=0, atol=1e-9)
        torch.testing.assert_close(batch.cost()[k], one.cost(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(batch.gap()[k], one.gap(), rtol=0, atol=1e-8)
    same = sbot.solve_bridge((x, a), (y, b), 0.05, mass=0.5, solver=solver)
    torch.testing.assert_close(same.plan().sum((1, 2)), torch.full((3,), 0.5, dtype=torch.float64))


def test_everything_a_bridge_offers(data, tmp_path):
    x, y, a, b = data
    bridge = sbot.solve_bridge((x, a), (y, b), 0.05, mass=0.6, solver=TIGHT)
    plan, f = bridge.plan(), bridge.potentials().f
    torch.testing.assert_close(f(x), f.values, rtol=0, atol=1e-8)
    torch.testing.assert_close(bridge.potentials().g(y), bridge.potentials().g.values, rtol=0, atol=1e-8)
    assert float(f(x + 100).max()) <= float(f.values.max())  # what is far is left where it is
    torch.testing.assert_close(bridge.transport(), plan @ y / plan.sum(1, keepdim=True))
    torch.testing.assert_close(bridge.apply(y), plan @ y)
    torch.testing.assert_close(bridge.marginal(0.0).weights, plan.sum(1), rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(bridge.marginal(1.0).weights, plan.sum(0), rtol=1e-7, atol=1e-12)
    assert float(metrics.marginal_error(bridge)) < 1e-9
    generator = torch.Generator().manual_seed(0)
    x0, x1 = bridge.sample_pairs(4000, generator=generator)
    torch.testing.assert_close(x0.mean(0), (plan.sum(1) @ x) / 0.6, rtol=0, atol=0.06)
    torch.testing.assert_close(x1.mean(0), (plan.sum(0) @ y) / 0.6, rtol=0, atol=0.06)
    assert bridge.sample_paths(5, [0.0, 0.5, 1.0], generator=generator).shape == (5, 3, 2)
    grid = torch.linspace(-8, 10, 181, dtype=torch.float64)
    square = torch.cartesian_prod(grid, grid)
    inside = float(bridge.log_prob(0.5, square).exp().sum()) * 0.1**2
    assert inside == pytest.approx(0.6, rel=1e-3)  # the process has the mass of its plan
    assert bool(torch.isfinite(bridge.drift(0.5, x)).all())
    assert float(bridge.sparse_plan(mass=1.0).values.sum()) == pytest.approx(0.6)
    bridge.save(tmp_path / "partial.safetensors")
    again = sbot.load(tmp_path / "partial.safetensors")
    assert torch.equal(again.plan(), plan) and torch.equal(again.cost(), bridge.cost())
    assert torch.equal(again.problem.mass, bridge.problem.mass) and again.report == bridge.report
    assert bridge.to(dtype=torch.float32).plan().sum().item() == pytest.approx(0.6, rel=1e-4)


def test_forbidden_pairs_and_far_atoms(data):
    x, y, a, b = data
    cost = half_squares(x, y)
    cost[:5] = INF  # atoms that may go nowhere stay where they are
    stay = sbot.solve_bridge(a, b, 0.1, cost=cost, mass=0.5, solver=TIGHT)
    assert stay.report.converged and float(stay.plan()[:5].sum()) == 0
    rest = sbot.solve_bridge(a[5:], b, 0.1, cost=cost[5:], mass=0.5, solver=TIGHT)
    torch.testing.assert_close(stay.plan()[5:], rest.plan(), rtol=0, atol=1e-10)
    # what is left behind is in the reference measure only: eps (sum a sum b), which is linear in a
    torch.testing.assert_close(stay.cost(), rest.cost() + 0.1 * a[:5].sum() * b.sum())
    torch.testing.assert_close(stay.potentials().f.values[:5], stay.potentials().f.values.max().expand(5))
    with pytest.raises(sbot.InvalidProblem, match="may stay behind"):
        sbot.solve_bridge(a, b, 0.1, cost=cost, mass=float(a[5:].sum()) + 1e-3)
    cost[:5, :2] = 1.0
    cost[:, 7] = 1e5  # exp(-1e6): nothing that a number can hold
    cost[3, 7] = 1e4
    for memory in (2**30, 2**9):
        solver = sbot.Sinkhorn(tol=1e-9, memory=memory)
        bridge = sbot.solve_bridge(a, b, 0.1, cost=cost, mass=0.5, solver=solver)
        plan = bridge.plan()
        assert bridge.report.converged and float(plan[:, 7].sum()) == 0
        assert bool((plan[torch.isinf(cost)] == 0).all())
        torch.testing.assert_close(bridge.cost(), objective(plan, cost, a, b, 0.1), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("mass", "said"),
    [
        (0.0, r"mass is 0, and mu and nu hold 1 and 1\.3; give 0 < mass <= 1"),
        (-1.0, "mass is -1"),
        (1.1, "mass is 1.1, and mu and nu hold"),
        (float("nan"), "mass has 1 entries that are NaN"),
        (INF, "mass has 1 entries that are NaN or infinite"),
        ([0.5, 0.5], r"mass has shape \(2,\).*give a number, or one for each problem: \(\)"),
        ("half", "mass must be an array"),
    ],
)
def test_bad_masses(data, mass, said):
    x, y, a, b = data
    with pytest.raises(sbot.InvalidProblem, match=said):
        sbot.solve_bridge((x, a), (y, b), 0.1, mass=mass)


def test_where_partial_plans_are_not_known(data):
    x, y, a, b = data
    with pytest.raises(sbot.InvalidProblem, match="drop one of them"):
        sbot.solve_bridge((x, a), (y, b), 0.1, mass=0.5, relax=1.0)
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(sbot.InvalidProblem, match="needs atoms on both sides"):
        sbot.solve_bridge(one, one, 0.1, mass=0.5)
    for solver in ("lightsb", "dsb", "dsbm"):
        with pytest.raises(sbot.Unsupported, match="partial"):
            sbot.solve_bridge((x, a), (y, b / 1.3), 0.1, mass=0.5, solver=solver)
    batch = torch.stack([x, x]), torch.stack([a, a])
    with pytest.raises(sbot.InvalidProblem, match="mass is 2 in problem 1 of the batch"):
        sbot.solve_bridge(batch, batch, 0.1, mass=torch.tensor([0.5, 2.0]))
