"""Atoms whose every pair is forbidden: left where they are by relaxed marginals and partial plans, refused by hard ones."""

from __future__ import annotations

import math

import pytest
import torch

import sbot

from ..conftest import clouds, half_squares, weights

INF = math.inf
TIGHT = sbot.Sinkhorn(tol=1e-12)
ROWS, COLUMNS = [0, 3], [4]


@pytest.fixture
def data(generator):
    """Weights of masses 1 and 1.3, and a cost that closes two rows and a column."""
    x, y = clouds(8, 9, 2, generator)
    cost = half_squares(x, y)
    cost[ROWS], cost[:, COLUMNS] = INF, INF
    return weights(8, generator=generator), 1.3 * weights(9, generator=generator), cost


def parts(a, b, cost):
    """Without the atoms that stay, and these."""
    rows = torch.tensor([i not in ROWS for i in range(8)])
    columns = torch.tensor([j not in COLUMNS for j in range(9)])
    return rows, columns, (a[rows], b[columns], cost[rows][:, columns]), (a[~rows].sum(), b[~columns].sum())


@pytest.mark.parametrize("rho", [(1.0, 0.5), (30.0, 2.0), (1e-2, 1e-2)], ids=str)
@pytest.mark.parametrize("eps", [0.3, 0.01])
@pytest.mark.parametrize("memory", [2**30, 0])
def test_a_relaxed_problem_is_that_without_them_and_their_penalty(data, rho, eps, memory):
    a, b, cost = data
    rows, columns, rest, stay = parts(*data)
    solver = sbot.Sinkhorn(tol=1e-12, memory=memory)
    bridge = sbot.solve_bridge(a, b, eps, cost=cost, relax=rho, solver=solver)
    reduced = sbot.solve_bridge(*rest[:2], eps, cost=rest[2], relax=rho, solver=solver)
    assert bridge.report.converged
    plan = bridge.plan()
    torch.testing.assert_close(plan[rows][:, columns], reduced.plan(), rtol=1e-8, atol=1e-14)
    assert float(plan[~rows].sum()) == float(plan[:, ~columns].sum()) == 0
    # rho KL(0 | a) = rho a, and the reference measure that they are part of: eps (sum a sum b)
    extra = rho[0] * stay[0] + rho[1] * stay[1] + eps * (a.sum() * b.sum() - rest[0].sum() * rest[1].sum())
    torch.testing.assert_close(bridge.cost(), reduced.cost() + extra, rtol=1e-9, atol=1e-12)
    assert float(bridge.gap()) < 1e-8
    f, g = (part.values for part in bridge.potentials())
    assert bool((f[ROWS] == INF).all()) and bool((g[COLUMNS] == INF).all())
    assert bool(torch.isfinite(f[rows]).all()) and bool(torch.isfinite(g[columns]).all())
    assert float(bridge.marginal(0.0).weights[ROWS].sum()) == 0


def test_one_relaxed_side_excuses_its_own_atoms_only(data):
    a, b, cost = data
    cost[:, COLUMNS] = 1.0
    cost[ROWS] = INF
    bridge = sbot.solve_bridge(a, b, 0.1, cost=cost, relax=(1.0, INF), solver=TIGHT)
    torch.testing.assert_close(bridge.plan().sum(0), b)
    for relax in (None, (INF, 1.0)):
        with pytest.raises(sbot.InvalidProblem, match=r"no finite entry in row 0.*relax="):
            sbot.solve_bridge(a, b / 1.3, 0.1, cost=cost, relax=relax)
    closed = torch.full_like(cost, INF)
    for options in ({"relax": 1.0}, {"mass": 0.5}):
        with pytest.raises(sbot.InvalidProblem, match="every pair of atoms that have weight is forbidden"):
            sbot.solve_bridge(a, b, 0.1, cost=closed, **options)


def test_a_cost_that_is_a_function(data, generator):
    x, y = clouds(8, 9, 2, generator)
    x[ROWS] += 100
    near = lambda u, v: torch.where((c := half_squares(u, v)) < 500, c, INF)  # noqa: E731
    a, b, _ = data
    for options in ({"relax": 1.0}, {"mass": 0.4}):
        bridge = sbot.solve_bridge((x, a), (y, b), 0.1, cost=near, solver=TIGHT, **options)
        assert bridge.report.converged and float(bridge.plan()[ROWS].sum()) == 0
    with pytest.raises(sbot.InvalidProblem, match="atom \\[0\\] of mu has weight but every pair"):
        sbot.solve_bridge((x, a), (y, b), 0.1, cost=near, relax=(INF, 1.0))


def test_batches_are_singles_and_single_precision_is_double(data):
    a, b, cost = data
    costs = torch.stack([cost, torch.where(torch.isinf(cost), 1.0, cost)])
    batch = sbot.solve_bridge(a.expand(2, -1), b.expand(2, -1), 0.1, cost=costs, relax=1.0, solver=TIGHT)
    for k in range(2):
        one = sbot.solve_bridge(a, b, 0.1, cost=costs[k], relax=1.0, solver=TIGHT)
        torch.testing.assert_close(batch.plan()[k], one.plan(), rtol=0, atol=1e-10)
        torch.testing.assert_close(batch.cost()[k], one.cost())
        torch.testing.assert_close(batch[k].cost(), one.cost())
    single = sbot.solve_bridge(a.float(), b.float(), 0.1, cost=cost.float(), relax=1.0)
    torch.testing.assert_close(single.plan().double(), batch.plan()[0], rtol=0, atol=1e-4)
    with pytest.raises(sbot.InvalidProblem, match="no finite entry in row 0 in problem 0"):
        sbot.solve_bridge(a.expand(2, -1), b.expand(2, -1) / 1.3, 0.1, cost=costs)


@pytest.mark.parametrize("attached", [False, True])
def test_gradients_are_those_without_them(data, attached):
    a, b, cost = data
    rows, columns, rest, _ = parts(*data)

    def look(bridge):
        bridge = bridge.differentiable() if attached else bridge
        return bridge.cost() + (bridge.plan().square().sum() if attached else 0.0)

    full, small = [[part.clone().requires_grad_() for part in side] for side in ((a, b, cost), rest)]
    got = torch.autograd.grad(look(sbot.solve_bridge(*full[:2], 0.1, cost=full[2], relax=1.0, solver=TIGHT)), full)
    want = torch.autograd.grad(look(sbot.solve_bridge(*small[:2], 0.1, cost=small[2], relax=1.0, solver=TIGHT)), small)
    # the reference measure has more mass in the full problem
    shift = 0.1 * b[COLUMNS].sum(), 0.1 * a[ROWS].sum()
    torch.testing.assert_close(got[0][rows], want[0] + shift[0], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got[1][columns], want[1] + shift[1], rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(got[2][rows][:, columns], want[2], rtol=1e-7, atol=1e-9)
    assert float(got[2][ROWS].abs().sum()) == 0
    torch.testing.assert_close(got[0][ROWS], (1.0 + 0.1 * b.sum()).expand(2))  # rho, and the reference measure


# ---- atoms of no weight ------------------------------------------------------------------------------------------------

DEAD = {
    # cost, a, b, eps, relax: the first row has no weight in any
    "alone reaches an atom that stays": ([[2, 3, 0], [0, 1, INF]], [0, 1], [0.3, 0.3, 0.3], 1e-3, 1.0),
    "near, and the mass is far": ([[2], [20]], [0, 1], [0.1], 0.01, (0.01, 5.0)),
    "near, and the other side is hard": ([[0, 1000], [1000, 2000]], [0, 1], [0.4, 0.6], 0.01, (1.0, INF)),
    "near, and the first side is hard": ([[0, 1000], [1000, 2000]], [0, 1], [0.4, 0.6], 0.01, (INF, 1.0)),
}


@pytest.mark.parametrize("case", DEAD)
@pytest.mark.parametrize("flipped", [False, True])
def test_an_atom_of_no_weight_changes_nothing(case, flipped, dtype):
    cost, a, b, eps, relax = DEAD[case]
    cost, a, b = (torch.tensor(part, dtype=dtype) for part in (cost, a, b))
    both = relax if isinstance(relax, tuple) else (relax, relax)

    def solved(cost, a):
        cost = cost.clone().requires_grad_()
        given = (b, a, eps) if flipped else (a, b, eps)
        bridge = sbot.solve_bridge(*given, cost=cost.mT if flipped else cost, relax=both[::-1] if flipped else both)
        return bridge, cost

    bridge, matrix = solved(cost, a)
    alone, part = solved(cost[1:], a[1:])
    assert bridge.report.converged
    # what rounding of potentials as large as the cost makes of the plan
    rounding = 4 * torch.finfo(dtype).eps * float(cost[1][torch.isfinite(cost[1])].max()) / eps
    close = {"rtol": max(1e-9, rounding), "atol": max(1e-9, rounding)}
    for got, want in (
        (bridge.cost(), alone.cost()),
        (bridge.gap(), alone.gap()),
        (bridge.linear_cost(), alone.linear_cost()),
    ):
        torch.testing.assert_close(got, want, **close)
    (slope,), (want,) = (torch.autograd.grad(one.cost(), leaf) for one, leaf in ((bridge, matrix), (alone, part)))
    torch.testing.assert_close(slope, torch.cat([torch.zeros_like(cost[:1]), want]), **close)
    moving = bridge.differentiable()
    (first,) = torch.autograd.grad(moving.cost(), matrix, create_graph=True)
    torch.testing.assert_close(first, slope, **close)
    (second,) = torch.autograd.grad(torch.where(first != 0, first.square(), 0.0).sum(), matrix)
    assert bool(torch.isfinite(second).all())
    assert float(sbot.metrics.marginal_error(bridge)) < 1e-3 + rounding


@pytest.mark.parametrize("case", [name for name in DEAD if "first side" not in name])
@pytest.mark.parametrize("flipped", [False, True])
def test_an_infinite_derivative_in_a_weight_is_refused(case, flipped):
    """What the atom would take along, or up, at the least weight; a finite one is right, see the test of partial plans."""
    cost, a, b, eps, relax = DEAD[case]
    a, b = torch.tensor(a, dtype=torch.float64, requires_grad=True), torch.tensor(b, dtype=torch.float64)
    both = relax if isinstance(relax, tuple) else (relax, relax)
    cost = torch.tensor(cost, dtype=torch.float64)
    if flipped:
        bridge = sbot.solve_bridge(b, a, eps, cost=cost.mT, relax=both[::-1])
    else:
        bridge = sbot.solve_bridge(a, b, eps, cost=cost, relax=both)
    with pytest.raises(
        sbot.InvalidProblem, match=f"{'nu' if flipped else 'mu'} has zero weight at atom 0, and the deriv"
    ):
        bridge.cost()


def test_the_atom_of_a_batch_is_named():
    cost, a, b, eps, _ = DEAD["alone reaches an atom that stays"]
    a = torch.tensor([[0.5, 0.5], a], dtype=torch.float64, requires_grad=True)
    b, cost = torch.tensor([b, b], dtype=torch.float64), torch.tensor([cost, cost], dtype=torch.float64)
    with pytest.raises(sbot.InvalidProblem, match="atom 0 of problem 1"):
        sbot.solve_bridge(a, b, eps, cost=cost, relax=1.0).cost()


@pytest.mark.parametrize("cost", [[[1, -0.5], [0.1, INF]], [[0.3, 0], [0.1, INF]], [[0.3, 0.2], [0.1, 0.5]]])
def test_derivative_in_a_weight_of_zero_of_a_partial_plan(cost):
    """A one-sided difference, also where the atom alone reaches one that no other does."""
    cost, b = torch.tensor(cost, dtype=torch.float64), torch.tensor([0.5, 0.5], dtype=torch.float64)

    def value(first, grad=False):
        a = torch.tensor([first, 1.0], dtype=torch.float64, requires_grad=grad)
        solver = sbot.Sinkhorn(tol=1e-13)
        return a, sbot.solve_bridge(a, b, 0.1, cost=cost, mass=0.3, solver=solver).cost()

    a, at = value(0.0, grad=True)
    slope = torch.autograd.grad(at, a)[0][0]
    h = 1e-6
    at, ahead, further = float(at.detach()), float(value(h)[1]), float(value(2 * h)[1])
    assert float(slope) == pytest.approx((4 * ahead - further - 3 * at) / (2 * h), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("flipped", [False, True])
def test_derivative_in_eps_beside_an_atom_that_stays(flipped):
    cost = torch.tensor([[INF, INF, INF], [0.2, 0.5, 0.1], [0.3, 0.1, 0.9]], dtype=torch.float64)
    a, b = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)

    def value(eps):
        given = (b, a, eps) if flipped else (a, b, eps)
        return sbot.solve_bridge(*given, cost=cost.mT if flipped else cost, relax=1.0, solver=TIGHT).cost()

    eps = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(value(eps), eps)
    assert float(slope) == pytest.approx(float(value(0.1001) - value(0.0999)) / 2e-4, rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"relax": 1.0}, {"mass": 0.5}], ids=str)
def test_no_weight_and_no_pair(options, generator):
    """Such an atom changes nothing: not the value, nor any derivative of it, nor of the potentials of others."""
    matrix = torch.rand(4, 5, generator=generator, dtype=torch.float64)
    a, b = weights(4, generator=generator), weights(5, generator=generator)
    a[2] = 0
    a = a / a.sum()
    kept = [0, 1, 3]
    closed = matrix.clone()
    closed[2] = torch.inf
    found = []
    for c, w in ((closed, a), (matrix[kept], a[kept])):
        leaf = c.clone().requires_grad_()
        bridge = sbot.solve_bridge(w, b, 0.3, cost=leaf, solver=sbot.Sinkhorn(tol=1e-13), **options)
        numbers = [bridge.cost(), bridge.differentiable().cost(), bridge.differentiable().linear_cost()]
        f = bridge.differentiable().potentials()[0].values
        numbers.append((f if c is not closed else f[kept]).square().sum())
        row = []
        for number in numbers:
            (first,) = torch.autograd.grad(number, leaf, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), leaf)
            row += [number.detach()] + [
                part.detach() if c is not closed else part.detach()[kept] for part in (first, second)
            ]
        found.append(row)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11)
