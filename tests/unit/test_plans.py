"""Feasible, sparse and pairwise plans against the dense plan, POT and brute force."""

from __future__ import annotations

import itertools
import math

import ot
import pytest
import torch

import sbot
from sbot.problem import Problem
from sbot.rounding import permutation

from ..conftest import clouds, half_squares, weights

INF = math.inf


def small(generator, batch=(), tol=1e-2, eps=0.05, relax=None, n=20, m=30, **options):
    x, y = clouds(n, m, 2, generator, batch)
    a, b = weights(*batch, n, generator=generator), weights(*batch, m, generator=generator)
    bridge = sbot.solve_bridge((x, a), (y, b), eps, relax=relax, solver=sbot.Sinkhorn(tol=tol, **options))
    return bridge, a, b, half_squares(x, y)


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-9])
def test_rounded_plans_have_their_marginals(batch, tol, generator):
    bridge, a, b, c = small(generator, batch, tol)
    rounded = bridge.round()
    plan = rounded.plan()
    assert float(plan.min()) >= 0
    torch.testing.assert_close(plan.sum(-1), a, rtol=5e-14, atol=1e-16)
    torch.testing.assert_close(plan.sum(-2), b, rtol=5e-14, atol=1e-16)
    for got, want in zip(rounded.marginals(), (a, b), strict=True):
        torch.testing.assert_close(got, want, rtol=5e-14, atol=1e-16)
    torch.testing.assert_close(rounded.linear_cost(), (plan * c).sum((-2, -1)))
    # Lemma 7 of the paper: no further from the plan than twice its errors
    error = (bridge.plan().sum(-1) - a).abs().sum(-1) + (bridge.plan().sum(-2) - b).abs().sum(-1)
    assert bool(((plan - bridge.plan()).abs().sum((-2, -1)) <= 2 * error + 1e-12).all())
    if not batch:
        torch.testing.assert_close(rounded.plan(rows=[3, -1]), plan[[3, -1]])


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("tol", [0.1, 1e-8])
def test_the_rounded_cost_bounds_unregularised_transport(eps, tol, generator):
    bridge, a, b, c = small(generator, tol=tol, eps=eps)
    exact = float(ot.emd2(a.numpy(), b.numpy(), c.numpy()))
    upper = float(bridge.round().linear_cost())
    assert upper >= exact - 1e-12
    # and the entropic optimum lies between the dual and the rounded plan's objective
    assert float(bridge.cost()) <= float(bridge.cost() + bridge.gap())
    if eps == 0.01:
        assert upper <= 1.05 * exact + 0.1 * bridge.report.error


def test_relaxed_marginals_are_not_rounded(generator):
    bridge, a, b, _ = small(generator, relax=(INF, 0.5), tol=1e-2)
    rows, columns = bridge.round().marginals()
    torch.testing.assert_close(rows, a, rtol=1e-13, atol=1e-16)
    assert float((columns - b).abs().sum()) > 1e-3


@pytest.mark.parametrize("mass", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("most", [None, 3])
def test_sparse_plans_keep_the_largest_entries(mass, most, generator):
    bridge, *_ = small(generator, tol=1e-10)
    plan, sparse = bridge.plan(), bridge.sparse_plan(mass, max_per_row=most)
    dense = sparse.to_torch().to_dense()
    kept = dense > 0
    torch.testing.assert_close(dense[kept], plan[kept])
    torch.testing.assert_close(torch.from_numpy(sparse.to_scipy().toarray()), dense)
    assert abs(sparse.dropped - float(plan.sum() - dense.sum())) < 1e-14
    for i in range(len(plan)):
        order = plan[i].sort(descending=True)
        need = (
            len(order.values)
            if mass == 1
            else int((order.values.cumsum(0) < mass * plan[i].sum() * (1 - 1e-14)).sum()) + 1
        )
        count = min(need, most or len(order.values), int((order.values > 0).sum()))
        assert set(kept[i].nonzero()[:, 0].tolist()) == set(order.indices[:count].tolist())


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_top_and_products(batch, generator):
    bridge, *_ = small(generator, batch)
    plan = bridge.plan()
    values, index = bridge.top(4)
    want = plan.topk(4, -1)
    torch.testing.assert_close(values, want.values)
    assert torch.equal(index, want.indices)
    v, u = (
        torch.randn(*batch, 30, generator=generator).double(),
        torch.randn(*batch, 20, 3, generator=generator).double(),
    )
    torch.testing.assert_close(bridge.apply(v), (plan @ v[..., None])[..., 0])
    torch.testing.assert_close(bridge.apply(u, transpose=True), plan.mT @ u)
    with pytest.raises(sbot.InvalidProblem, match="give"):
        bridge.apply(u)


def test_products_stream_over_tiles(generator, monkeypatch):
    monkeypatch.setattr("sbot.kernels.base.TILE_BYTES", 8 * 30 * 3)
    bridge, *_ = small(generator)
    plan = bridge.plan()
    torch.testing.assert_close(bridge.apply(torch.ones(30)), plan.sum(1))
    torch.testing.assert_close(bridge.apply(torch.ones(20), transpose=True), plan.sum(0))
    assert torch.equal(bridge.top(2)[1], plan.topk(2, -1).indices)
    torch.testing.assert_close(bridge.sparse_plan(1.0).to_torch().to_dense(), plan)


def test_assignments(generator):
    x, y = clouds(7, 7, 2, generator)
    c = half_squares(x, y)
    for eps in (1.0, 0.01):
        got = sbot.solve_bridge(x, y, eps).assignment().tolist()
        best = min(itertools.permutations(range(7)), key=lambda p: sum(float(c[i, j]) for i, j in enumerate(p)))
        assert tuple(got) == best
    x, y = clouds(200, 200, 2, generator)
    bridge = sbot.solve_bridge(x, y, 0.2)
    got = bridge.assignment()
    assert sorted(got.tolist()) == list(range(200))
    exact = ot.emd2([], [], half_squares(x, y).numpy()) * 200
    assert float(half_squares(x, y)[torch.arange(200), got].sum()) <= 1.02 * exact
    fewer = sbot.solve_bridge(x[:50], y, 0.2)
    assert torch.equal(fewer.assignment(), fewer.plan().argmax(1))


@pytest.mark.parametrize("m", [4, 5])
def test_no_assignment_for_an_atom_without_pairs(m, generator):
    c = torch.rand(4, m, generator=generator, dtype=torch.float64)
    c[2] = math.inf
    a, b = torch.full((4,), 1 / 4, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
    bridge = sbot.solve_bridge(a, b, 0.1, cost=c, relax=1.0)
    with pytest.raises(sbot.Unsupported, match=r"mu\[2\] has no allowed pair with an atom that has weight"):
        bridge.assignment()
    if m > 4:  # without weight it is nobody's concern
        a = torch.tensor([1 / 3, 1 / 3, 0, 1 / 3], dtype=torch.float64)
        bridge = sbot.solve_bridge(a, b, 0.1, cost=c)
        assert torch.equal(bridge.assignment()[a > 0], bridge.plan().argmax(1)[a > 0])


def test_a_permutation_needs_enough_entries():
    logits, columns = torch.zeros(3, 1), torch.tensor([[0], [0], [1]])
    assert permutation(logits, columns) is None
    got = permutation(torch.tensor([[0.0, -5.0], [0.0, -1.0], [0.0, -9.0]]), torch.tensor([[0, 1], [0, 2], [1, 2]]))
    assert got is not None
    assert got.tolist() == [0, 2, 1]


def test_bad_questions(generator):
    bridge, *_ = small(generator)
    for mass in (0, 1.5, -0.1):
        with pytest.raises(sbot.InvalidProblem, match="mass"):
            bridge.sparse_plan(mass)
    with pytest.raises(sbot.InvalidProblem, match="max_per_row"):
        bridge.sparse_plan(max_per_row=0)
    for k in (0, 31, 2.5):
        with pytest.raises(sbot.InvalidProblem, match="k"):
            bridge.top(k)
    batch, *_ = small(generator, (2,))
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    gaussian = sbot.solve_bridge(one, one, 0.5)
    for call in (batch.sparse_plan, batch.assignment, gaussian.round, gaussian.sparse_plan, gaussian.assignment):
        with pytest.raises(sbot.Unsupported, match=r"one by one|sample_pairs"):
            call()
    with pytest.raises(sbot.Unsupported, match="sample_pairs"):
        gaussian.top(2)


def test_zero_weights_forbidden_pairs_and_float32(generator):
    c = torch.rand(6, 6, generator=generator)
    c[torch.arange(6), torch.arange(6)] = INF
    a = torch.tensor([0.3, 0.0, 0.1, 0.2, 0.2, 0.2])
    bridge = sbot.solve_bridge(a, torch.full((6,), 1 / 6), 0.1, cost=c, solver=sbot.Sinkhorn(tol=1e-5))
    assert bool(torch.isfinite(bridge.apply(torch.ones(6))).all())
    assert float(bridge.apply(torch.ones(6))[1]) == 0
    assert (bridge.assignment() != torch.arange(6)).all()
    sparse = bridge.sparse_plan(1.0)
    assert not bool((sparse.rows == sparse.columns).any())
    assert sparse.values.dtype == torch.float32


@pytest.mark.parametrize("dead", [([0], [2]), ([0, 4], [1]), ([0], []), ([1, 2], []), ([], [])])
def test_assignment_beside_atoms_of_no_weight(dead, generator):
    """A permutation of the largest likelihood over atoms of weight, found by trying all."""
    cost = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    a, b = torch.ones(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    a[dead[0]], b[dead[1]] = 0, 0
    bridge = sbot.solve_bridge(a / a.sum(), b / b.sum(), 0.05, cost=cost)
    got = bridge.assignment()
    assert sorted(got.tolist()) == list(range(5))
    log_p, live = bridge.plan().log(), torch.nonzero(a)[:, 0]
    best = max(float(log_p[live, torch.tensor(s)].sum()) for s in itertools.permutations(range(5), len(live)))
    here = float(log_p[live, got[live]].sum())
    assert here == pytest.approx(best, abs=1e-9)


def test_assignment_of_more_atoms_of_weight_than_there_are(generator):
    cost = torch.rand(3, 3, generator=generator)
    bridge = sbot.solve_bridge([1 / 3] * 3, [0.5, 0.5, 0.0], 0.1, cost=cost)
    with pytest.raises(sbot.Unsupported, match="mu has 3 atoms of weight and nu has 2"):
        bridge.assignment()


def test_assignment_of_many_atoms_of_no_weight(generator):
    """More of them than each has candidates."""
    x = torch.rand(60, 2, generator=generator)
    a = torch.zeros(60)
    a[:20] = 1 / 20
    got = sbot.solve_bridge((x, a), (x.flip(0), a.flip(0)), 0.01).assignment()
    assert sorted(got.tolist()) == list(range(60))
    assert sorted(got[:20].tolist()) == list(range(40, 60))


def test_atoms_of_no_weight_make_way_beside_forbidden_pairs():
    """Only one of them may go to the last columns, and the others have to take what that leaves."""
    cost = torch.zeros(4, 4, dtype=torch.float64)
    cost[0, 2:], cost[2, 2:], cost[3, 3] = torch.inf, torch.inf, 1.0
    got = sbot.solve_bridge([0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.5, 0.5], 0.1, cost=cost).assignment().tolist()
    assert {got[1], got[3]} == {2, 3} and sorted(got) == [0, 1, 2, 3]


def test_atoms_of_no_weight_go_to_what_stays():
    """The last column has weight, and no atom that has some may go there."""
    cost = torch.zeros(3, 3, dtype=torch.float64)
    cost[1:, 2] = torch.inf
    bridge = sbot.solve_bridge([0.0, 0.5, 0.5], [0.5, 0.5, 0.5], 0.1, cost=cost, relax=1.0)
    assert sorted(bridge.assignment().tolist()) == [0, 1, 2]
    assert int(bridge.assignment()[0]) == 2


@pytest.mark.parametrize("kind", ["points", "matrix", "batch", "wide"])
def test_rows_may_repeat_and_outnumber_the_atoms(kind, generator):
    """Rows that are asked for are those of the plan, more of them than there are, and than there are in a tile, included."""
    n, m, count = (3, 2000, 1500) if kind == "wide" else (5, 4, 12)
    x, y = clouds(n, m, 2, generator, (2,) if kind == "batch" else ())
    if kind == "matrix":
        w = torch.full((n,), 1 / n, dtype=torch.float64), torch.full((m,), 1 / m, dtype=torch.float64)
        bridge = sbot.solve_bridge(*w, 0.3, cost=half_squares(x, y))
    else:
        bridge = sbot.solve_bridge(x, y, 0.3)
    rows = torch.randint(-n, n, (count,), generator=generator)
    torch.testing.assert_close(bridge.plan(rows=rows), bridge.plan()[..., rows % n, :], rtol=1e-12, atol=1e-300)


@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("mode", ["balanced", "relaxed", "partial", "zeros", "forbidden", "one matrix"])
@pytest.mark.parametrize("eps", [0.5, 0.1])
def test_a_plan_made_of_what_iterations_leave(mode, batch, eps, generator):
    """The same plan and cost, in the place of the laws, and once: a caller may write into it."""
    x, y = clouds(30, 40, 2, generator, batch)
    a, b = weights(*batch, 30, generator=generator), weights(*batch, 40, generator=generator)
    cost = half_squares(x, y)
    options = {"relaxed": {"relax": (1.0, 0.5)}, "partial": {"mass": 0.6}}.get(mode, {})
    if mode == "zeros":
        a[..., 2] = b[..., :3] = 0
        a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    if mode == "one matrix" and batch:
        cost = cost[0]
    if mode == "forbidden":
        cost[..., 0, 1:9] = cost[..., 4, 3:] = torch.inf
    problem = Problem.of(a, b, eps, cost=cost, **options)
    plain, lent = (sbot.Sinkhorn(tol=1e-12).solved(problem, lend=lend) for lend in (False, True))
    # of a partial plan the last pass may be in the way, of forbidden pairs what is raised above zero is
    assert mode == "partial" or (lent.coupling._lent is None) == (mode == "forbidden")
    torch.testing.assert_close(lent.linear_cost(), plain.linear_cost(), rtol=1e-11, atol=0)
    torch.testing.assert_close(lent.cost(), plain.cost(), rtol=1e-12, atol=0)
    want = plain.plan()
    torch.testing.assert_close(lent.plan(rows=[1, 3]), want[..., [1, 3], :], rtol=1e-11, atol=1e-300)
    first = lent.plan()
    torch.testing.assert_close(first, want, rtol=1e-11, atol=1e-300)
    first.zero_()
    torch.testing.assert_close(lent.plan(), want, rtol=1e-13, atol=1e-300)
    torch.testing.assert_close(lent.linear_cost(), plain.linear_cost(), rtol=1e-13, atol=0)
