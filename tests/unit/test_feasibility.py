"""Forbidden pairs that leave no plan: found, named, and told apart from patterns that are merely tight."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

import sbot
from sbot.costs import MatrixCost
from sbot.feasibility import by_pattern, by_potentials, limit
from sbot.kernels import make_kernel

from ..conftest import clouds, half_squares

INF = float("inf")
F64 = torch.float64


def matrix(*rows: str) -> torch.Tensor:
    """A cost of zeros where there is a dot, ``+inf`` where there is an x."""
    return torch.tensor([[0.0 if c == "." else INF for c in row] for row in rows], dtype=F64)


def uniform(n: int) -> torch.Tensor:
    return torch.full((n,), 1 / n, dtype=F64)


def most(pattern, a, b) -> float:
    """The maximal flow, by linear programming."""
    pairs = np.argwhere(pattern)
    if len(pairs) == 0:
        return 0.0
    sums = np.zeros((len(a) + len(b), len(pairs)))
    for k, (i, j) in enumerate(pairs):
        sums[i, k] = sums[len(a) + j, k] = 1
    return -float(linprog(-np.ones(len(pairs)), A_ub=sums, b_ub=np.r_[a, b]).fun)


@pytest.mark.parametrize("partial", [False, True])
def test_the_verdict_is_that_of_a_linear_program(partial):
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(80):
        n, m = rng.integers(1, 7, 2)
        pattern = rng.random((n, m)) < rng.choice([0.3, 0.5, 0.8])
        a, b = rng.integers(0, 5, n).astype(float), rng.integers(0, 5, m).astype(float)
        if a.sum() == 0 or b.sum() == 0:
            continue
        if not partial:
            b *= a.sum() / b.sum()
        mass = min(a.sum(), b.sum()) * (rng.choice([0.3, 0.7, 1.0]) if partial else 1)
        wanted = torch.tensor(mass) if partial else None
        found = by_pattern(torch.from_numpy(pattern), torch.from_numpy(a), torch.from_numpy(b), wanted, 1e-9)
        assert (found is None) == (most(pattern, a, b) >= mass - 1e-7)
        verdicts.append(found is None)
        if found is not None:  # the set is a proof
            here, there = list(found.here), list(found.there)
            grid, own, other = (pattern.T, b, a) if found.flipped else (pattern, a, b)
            assert set(np.flatnonzero(grid[here].any(0) & (other > 0))) == set(there)
            assert own[here].sum() == pytest.approx(found.mass) and other[there].sum() == pytest.approx(found.room)
            assert found.mass > found.room + (found.spare or 0)
    assert 10 < sum(verdicts) < len(verdicts) - 10


def test_the_message_names_the_atoms_and_the_way_out():
    a, b = torch.tensor([0.4, 0.2, 0.4], dtype=F64), torch.tensor([0.4, 0.6], dtype=F64)
    with pytest.raises(sbot.InvalidProblem) as caught:
        sbot.solve_bridge(a, b, 0.1, cost=matrix(".x", ".x", ".."))
    assert (
        "atoms [0, 1] of mu hold 0.6 and may only go to atoms [0] of nu, whose mass is 0.4; found by a maximal flow "
        "through the allowed pairs; allow a pair, or relax"
    ) in str(caught.value)
    with pytest.raises(
        sbot.InvalidProblem, match=r"atoms \[1\] of nu hold 0.6 and may only come from atoms \[2\] of mu"
    ):
        sbot.solve_bridge(a, b, 0.1, cost=matrix(".x", ".x", "x."))
    with pytest.raises(sbot.InvalidProblem, match=r"connected parts"):
        sbot.solve_bridge(a, b, 0.1, cost=matrix(".x", ".x", "x."))
    cost = torch.zeros(21, 21, dtype=F64)
    cost[:20, 1:] = INF
    with pytest.raises(sbot.InvalidProblem, match=r"atoms \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\] \(20 of them\)"):
        sbot.solve_bridge(uniform(21), uniform(21), 0.1, cost=cost)


def test_one_of_a_batch_is_named():
    cost = torch.stack([matrix("..", "..", ".."), matrix(".x", ".x", "..")])
    a, b = torch.tensor([[0.4, 0.2, 0.4]] * 2, dtype=F64), torch.tensor([[0.4, 0.6]] * 2, dtype=F64)
    with pytest.raises(sbot.InvalidProblem, match=r"no plan in problem 1 of the batch: atoms \[0, 1\] of mu"):
        sbot.solve_bridge(a, b, 0.1, cost=cost)


def test_relaxed_marginals_are_always_feasible():
    a, b = torch.tensor([0.4, 0.2, 0.4], dtype=F64), torch.tensor([0.4, 0.6], dtype=F64)
    for relax in (1.0, (1.0, INF), (INF, 1.0)):
        bridge = sbot.solve_bridge(a, b, 0.1, cost=matrix(".x", ".x", ".."), relax=relax)
        assert bridge.report.converged
        assert float(bridge.plan()[:2, 1].sum()) == 0


def test_partial_plans_carry_what_the_pairs_allow():
    a, b = torch.tensor([0.4, 0.2, 0.4], dtype=F64), torch.tensor([0.4, 0.6], dtype=F64)
    cost = matrix(".x", ".x", "..")
    for mass in (0.5, 0.79, 0.8):
        bridge = sbot.solve_bridge(a, b, 0.1, cost=cost, mass=mass, solver=sbot.Sinkhorn(tol=1e-9))
        assert bridge.report.converged and float(bridge.plan().sum()) == pytest.approx(mass)
    with pytest.raises(
        sbot.InvalidProblem, match=r"hold 0.6 and may only go to .* 0.4 \(and 0.1 may stay behind\).*mass="
    ):
        sbot.solve_bridge(a, b, 0.1, cost=cost, mass=0.9)


@pytest.mark.parametrize("n", [3, 12])
def test_a_tight_pattern_is_not_refused_and_reported_as_it_is(n):
    """Below the diagonal nothing may be in a plan with equal marginals: the allowed pairs there tend to zero, slowly."""
    cost = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=F64)
    cost[torch.ones(n, n).triu(1) > 0] = INF
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bridge = sbot.solve_bridge(uniform(n), uniform(n), 0.1, cost=cost, solver=sbot.Sinkhorn(max_iter=2000))
    report, plan = bridge.report, bridge.plan()
    error = float((plan.sum(0) - 1 / n).abs().sum() + (plan.sum(1) - 1 / n).abs().sum())
    assert error == pytest.approx(report.error, rel=1e-3, abs=1e-9)
    assert report.converged == (report.error <= report.tolerance) == (not caught)
    assert float((plan - torch.eye(n, dtype=F64) / n).abs().max()) < 0.01
    off = sbot.solve_bridge(uniform(4), uniform(4), 0.1, cost=matrix("..xx", "..xx", "....", "....")).plan()
    assert float(off[2:, :2].max()) < 1e-2  # two blocks, and a corner that has to empty


# ---- in the solve ------------------------------------------------------------------------------------------------------


def walled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """From the left of a wall only to its left."""
    left, right = x[..., :, None, 0] < 0, y[..., None, :, 0] > 0
    return torch.where(left & right, INF, half_squares(x, y))


def line(left: int, n: int) -> torch.Tensor:
    x = torch.linspace(0.1, 1, n, dtype=F64)[:, None]
    x[:left] = -x[:left]
    return x


@pytest.mark.parametrize("memory", [2**30, 320])
def test_forbidden_pairs_of_a_function_are_found_in_the_solve(memory):
    solver = sbot.Sinkhorn(memory=memory, max_iter=2000)
    x, y = line(12, 20), line(9, 20)
    with pytest.raises(sbot.InvalidProblem) as caught:
        sbot.solve_bridge(x, y, 0.1, cost=walled, solver=solver)
    said = str(caught.value)
    assert "hold 0.6 and may only go to" in said and "whose mass is 0.45" in said
    assert "found by the potentials, which grow without bound" in said
    fine = sbot.solve_bridge(x, line(13, 20), 0.1, cost=walled, solver=solver)
    assert fine.report.converged
    assert float(fine.plan()[:12, 13:].sum()) == 0
    with pytest.raises(sbot.InvalidProblem, match="problem 1 of the batch"):
        sbot.solve_bridge(torch.stack([x, x]), torch.stack([line(13, 20), y]), 0.1, cost=walled, solver=solver)
    with pytest.raises(sbot.InvalidProblem, match="may stay behind"):
        sbot.solve_bridge(x, y, 0.1, cost=walled, mass=0.95, solver=solver)
    assert sbot.solve_bridge(x, y, 0.1, cost=walled, mass=0.8, solver=solver).report.converged
    with pytest.raises(sbot.InvalidProblem, match=r"atom \[0\] of mu has weight but every pair"):
        sbot.solve_bridge(x, y.abs(), 0.1, cost=walled, solver=solver)


def test_patterns_too_large_for_a_flow_are_found_in_the_solve(monkeypatch):
    monkeypatch.setattr("sbot.feasibility.PAIRS", 0)
    a, b = torch.tensor([0.4, 0.2, 0.4], dtype=F64), torch.tensor([0.4, 0.6], dtype=F64)
    for dtype in (F64, torch.float32):
        with pytest.raises(sbot.InvalidProblem, match=r"atoms \[0, 1\] of mu hold 0.6 .* found by the potentials"):
            sbot.solve_bridge(a.to(dtype), b.to(dtype), 0.1, cost=matrix(".x", ".x", "..").to(dtype))


def test_potentials_prove_nothing_where_there_is_room(generator):
    """A set found by any potentials is a proof: on a feasible pattern there is none."""
    x, y = clouds(6, 6, 2, generator)
    cost = half_squares(x, y)
    cost[:3, 3:] = INF
    kernel = make_kernel(MatrixCost(cost), torch.arange(6), torch.arange(6))
    a = uniform(6)
    for _ in range(20):
        f = 100 * torch.randn(6, generator=generator, dtype=F64)
        assert by_potentials(kernel, f, a, a, None, 1e-8) is None
    heavy = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.1, 0.1], dtype=F64)
    f = torch.tensor([5.0, 6.0, 7.0, 1.0, 2.0, 3.0], dtype=F64)
    found = by_potentials(kernel, f, heavy, a, None, 1e-8)
    assert found is not None and found.here == (0, 1, 2) and found.there == (0, 1, 2)


def test_where_half_steps_end():
    """Four atoms fill two columns to twice their weight; the other two send nothing there, though they may."""
    allowed = torch.ones(6, 6, dtype=torch.bool)
    allowed[:4, 2:] = allowed[4:, 0] = False
    w = torch.full((6,), 1 / 6, dtype=torch.float64)
    found = limit(allowed, w, w)
    torch.testing.assert_close(found.factor, torch.tensor([2, 2, 0.5, 0.5, 0.5, 0.5], dtype=torch.float64))
    kept = allowed.clone()
    kept[4:, 1] = False
    assert torch.equal(found.kept, kept)
    allowed[:, 3] = False
    assert limit(allowed, w, w) is None
