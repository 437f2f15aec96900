"""Plans that are exactly feasible beside forbidden pairs, and what they bracket."""

from __future__ import annotations

import math

import ot
import pytest
import torch

import sbot
from sbot import rounding

INF, F64 = math.inf, torch.float64


def uniform(n, dtype=F64):
    return torch.full((n,), 1 / n, dtype=dtype)


def random_pattern(generator, density, n=18, m=25, dtype=F64):
    """Costs, of which some are forbidden, and marginals of a plan on the others."""
    allowed = torch.rand(n, m, generator=generator) < density
    allowed |= torch.eye(n, m, dtype=torch.bool) | torch.eye(m, n, dtype=torch.bool).mT
    allowed[0] |= ~allowed.any(0)
    plan = torch.rand(n, m, generator=generator, dtype=dtype) * allowed
    plan = plan / plan.sum()
    return torch.rand(n, m, generator=generator, dtype=dtype).masked_fill(~allowed, INF), plan.sum(1), plan.sum(0)


def labels(generator, dtype=F64):
    """Three classes of ten, each to its own."""
    label = torch.arange(30) // 10
    cost = torch.rand(30, 30, generator=generator, dtype=dtype).masked_fill(label[:, None] != label, INF)
    return cost, uniform(30, dtype), uniform(30, dtype)


def triangular(generator, dtype=F64):
    """Only the diagonal can carry the masses: what goes below it is lacking above."""
    cost = torch.rand(6, 6, generator=generator, dtype=dtype).masked_fill(torch.ones(6, 6).triu(1) > 0, INF)
    return cost, uniform(6, dtype), uniform(6, dtype)


def neighbours(generator, dtype=F64):
    """A hundred points to themselves, over their nearest neighbours: filling up has to go from one to the next."""
    x = torch.rand(100, 2, generator=generator, dtype=dtype)
    cost = torch.cdist(x, x).square()
    reach = cost.topk(8, 1, largest=False).values[:, -1:]
    return cost.masked_fill((cost > reach) & (cost > reach.mT), INF), uniform(100, dtype), uniform(100, dtype)


def objective(plan, cost, a, b, eps):
    return float(torch.where(plan > 0, plan * ((plan / (a[:, None] * b)).log() * eps + cost), 0.0).sum())


SPECIAL = {"labels": labels, "triangular": triangular, "neighbours": neighbours}


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("eps", [1.0, 0.1, 0.01, 1e-3])
@pytest.mark.parametrize(("tolerance", "bound"), [(1e-3, 1e-2), (1e-8, 1e-6)])
def test_rounded_beside_forbidden_pairs(density, eps, tolerance, bound, generator):
    """Feasible, on allowed pairs only, and bracketing both the entropic value and unregularised transport."""
    cost, a, b = random_pattern(generator, density)
    bridge = sbot.solve_bridge(a, b, eps, cost=cost, solver=sbot.Sinkhorn(tol=tolerance))
    rounded, gap = bridge.round(), float(bridge.gap())
    plan, closed = rounded.plan(), torch.isinf(cost)
    assert float(plan.min()) >= 0
    assert float(plan[closed].abs().sum()) == 0
    for got, want in zip((plan.sum(1), plan.sum(0), *rounded.marginals()), (a, b, a, b), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    assert objective(plan, cost, a, b, eps) - float(bridge.cost()) == pytest.approx(gap, abs=1e-11)
    best = sbot.solve_bridge(a, b, eps, cost=cost, solver=sbot.Sinkhorn(tol=1e-12)).cost()
    assert float(bridge.cost()) <= float(best) + 1e-12
    assert 0 <= gap < bound
    exact = ot.emd2(a.numpy(), b.numpy(), cost.masked_fill(closed, 1e3).numpy())
    assert float(bridge.bounds().lower) - 1e-12 <= exact <= float(bridge.bounds().upper) + 1e-12


@pytest.mark.parametrize("pattern", SPECIAL)
@pytest.mark.parametrize("eps", [0.1, 0.01])
def test_patterns_that_leave_little_choice(pattern, eps, dtype, generator):
    cost, a, b = SPECIAL[pattern](generator, dtype)
    bridge = sbot.solve_bridge(a, b, eps, cost=cost)
    plan = bridge.round().plan()
    rounding_of = torch.finfo(dtype).eps
    assert float(plan[torch.isinf(cost)].abs().sum()) == 0
    for got, want in ((plan.sum(1), a), (plan.sum(0), b)):
        torch.testing.assert_close(
            got, want.double(), rtol=10 * rounding_of if dtype == torch.float32 else 0, atol=1e-14
        )
    assert 0 <= float(bridge.gap()) < (1e-6 if dtype == F64 else 1e-2)
    if dtype == F64:
        assert objective(plan, cost, a, b, eps) - float(bridge.cost()) == pytest.approx(float(bridge.gap()), abs=1e-13)
    assert math.isfinite(float(bridge.bounds().upper))
    if pattern == "triangular":
        torch.testing.assert_close(plan, torch.eye(6, dtype=F64) / 6, rtol=100 * rounding_of, atol=0)


def test_a_batch_is_rounded_one_by_one(generator):
    """A problem without forbidden pairs, one with some, and one where pairs that are allowed are of no use."""
    tight, _, _ = triangular(generator)
    some = torch.rand(6, 6, generator=generator, dtype=F64)
    cost = torch.stack([some, some.masked_fill(torch.eye(6) > 0, INF), tight])
    batch = sbot.solve_bridge(uniform(6).expand(3, 6), uniform(6).expand(3, 6), 0.1, cost=cost)
    gap, rounded = batch.gap(), batch.round()
    for k in range(3):
        alone = sbot.solve_bridge(uniform(6), uniform(6), 0.1, cost=cost[k])
        torch.testing.assert_close(gap[k], alone.gap(), rtol=1e-3, atol=1e-9)
        torch.testing.assert_close(rounded.plan()[k], alone.round().plan(), rtol=1e-7, atol=1e-9)
        assert float(rounded.plan()[k][torch.isinf(cost[k])].sum()) == 0
        assert float(gap[k]) < 1e-8


def test_one_problem_of_a_batch_does_not_spoil_another(generator):
    """Each is scaled down by no more than it needs, whatever the others do."""
    parts = [random_pattern(generator, density, 12, 12) for density in (0.9, 0.6, 0.4, 0.25, 0.15)]
    cost, a, b = (torch.stack(part) for part in zip(*parts, strict=True))
    solver = sbot.Sinkhorn(tol=1e-3)
    batch = sbot.solve_bridge(a, b, 0.01, cost=cost, solver=solver)
    assert len(set(rounding_shares(batch))) > 1
    for k, gap in enumerate(batch.gap()):
        torch.testing.assert_close(batch[k].gap(), gap, rtol=1e-6, atol=0)


def rounding_shares(bridge):
    """By how many times what is lacking each plan of a batch was scaled down, in powers of what that grows by."""
    left = bridge.round().left - bridge.coupling._logs[0].double()
    return [round(math.log(-math.expm1(float(part.max()))) / math.log(rounding.GROWTH)) for part in left]


def test_a_partial_plan_beside_forbidden_pairs(generator):
    cost, a, b = random_pattern(generator, 0.5)
    bridge = sbot.solve_bridge(a, b, 0.02, cost=cost, mass=0.6)
    plan = bridge.round().plan()
    assert float(plan.sum()) == pytest.approx(0.6, abs=1e-12)
    assert bool((plan.sum(1) <= a + 1e-14).all()) and bool((plan.sum(0) <= b + 1e-14).all())
    assert float(plan[torch.isinf(cost)].sum()) == 0
    assert 0 <= float(bridge.gap()) < 1e-7


@pytest.mark.parametrize("pattern", SPECIAL)
def test_where_no_way_is_found_nothing_is_promised(pattern, generator, monkeypatch):
    """The plan has its marginals all the same, and says that it is of no use."""
    monkeypatch.setattr(rounding, "KEPT", 0)
    cost, a, b = SPECIAL[pattern](generator)
    for tol in (0.1, 1e-8):
        bridge = sbot.solve_bridge(a, b, 0.05, cost=cost, solver=sbot.Sinkhorn(tol=tol))
        assert float(bridge.gap()) == float(bridge.bounds().upper) == INF
        plan = bridge.round().plan()
        torch.testing.assert_close(plan.sum(1), a, rtol=1e-9, atol=0)
        torch.testing.assert_close(plan.sum(0), b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", range(40))
def test_marginals_hold_whatever_was_found(seed):
    """Tight patterns of a few atoms at loose tolerances, where the parts that are looked for may be the wrong ones."""
    generator = torch.Generator().manual_seed(seed)
    n = 3 + seed % 4
    allowed = torch.ones(n, n).tril() + (torch.rand(n, n, generator=generator) < 0.2) > 0
    mass = torch.rand(n, n, generator=generator, dtype=F64) ** 4 * allowed
    a, b = (mass / mass.sum()).sum(1), (mass / mass.sum()).sum(0)
    cost = torch.rand(n, n, generator=generator, dtype=F64).masked_fill(~allowed, INF)
    for tol in (0.1, 1e-2, 1e-4):
        bridge = sbot.solve_bridge(a, b, 0.1, cost=cost, solver=sbot.Sinkhorn(tol=tol))
        plan = bridge.round().plan()
        torch.testing.assert_close(plan.sum(1), a, rtol=0, atol=2e-13)
        torch.testing.assert_close(plan.sum(0), b, rtol=0, atol=2e-13)
        if math.isfinite(float(bridge.gap())):
            assert float(plan[~allowed].sum()) == 0


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("mass", [None, 0.6])
def test_masses_that_differ_by_rounding_are_no_obstacle(seed, mass, dtype):
    """Of both sides of a partial plan, and of weights that were normalised in single precision."""
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(20, 20, generator=generator, dtype=dtype).masked_fill(
        torch.rand(20, 20, generator=generator) < 0.4, INF
    )
    a, b = (torch.rand(20, generator=generator, dtype=dtype) + 0.5 for _ in range(2))
    bridge = sbot.solve_bridge(a / a.sum(), b / b.sum(), 0.05, cost=cost, mass=mass)
    assert 0 <= float(bridge.gap()) < (1e-6 if dtype == F64 else 1e-2)


def test_a_pattern_may_stream(generator, monkeypatch):
    cost, a, b = random_pattern(generator, 0.5)
    kept = sbot.solve_bridge(a, b, 0.05, cost=cost).gap()
    monkeypatch.setattr(rounding, "PAIRS", 0)
    torch.testing.assert_close(sbot.solve_bridge(a, b, 0.05, cost=cost).gap(), kept, rtol=1e-6, atol=1e-15)


def test_a_semi_relaxed_plan_needs_no_filling(generator):
    cost = torch.rand(6, 6, generator=generator, dtype=F64)
    cost[0, 1] = INF
    gap = sbot.solve_bridge(
        uniform(6), uniform(6), 0.1, cost=cost, relax=(1.0, INF), solver=sbot.Sinkhorn(tol=1e-10)
    ).gap()
    assert 0 <= float(gap) < 1e-8


def test_no_rows_of_a_rounded_plan():
    rounded = sbot.solve_bridge(torch.rand(4, 2), torch.rand(5, 2), 0.1).round()
    assert rounded.plan(rows=[]).shape == (0, 5)
    torch.testing.assert_close(rounded.plan(rows=[2, 0]), rounded.plan()[[2, 0]])
