"""A different eps for each problem of a batch: every answer is that of the problems one by one."""

from __future__ import annotations

import math

import pytest
import torch

import sbot

from ..conftest import clouds, half_squares, spd, weights

INF = math.inf
RELAX = [(INF, INF), (1.0, 0.7), (INF, 0.5)]
EPS = torch.tensor([1.0, 0.2, 0.03], dtype=torch.float64)
SHEAR = sbot.LinearSDE(torch.tensor([[0.1, 0.3], [-0.2, 0.2]]), 0.0, torch.tensor([[1.0, 0.2], [0.0, 0.8]]))
#: name: what `solve_bridge` is given beside points, and the options of the solver
KINDS = {
    "stored": ({}, {}),
    "streamed": ({}, {"memory": 0}),
    "no annealing": ({}, {"anneal": None}),
    "ou": ({"reference": sbot.OrnsteinUhlenbeck(0.7, 0.3)}, {}),
    "shear": ({"reference": SHEAR}, {}),
    "l1": ({"cost": sbot.Lp(1)}, {}),
    "matrix": ({}, {}),
}


def both(kind, relax, generator, tol=1e-12):
    """The bridge of the batch, and those of its problems."""
    x, y = clouds(9, 11, 2, generator, (3,))
    a, b = weights(3, 9, generator=generator), weights(3, 11, generator=generator)
    given, options = KINDS[kind]
    solver = sbot.Sinkhorn(tol=tol, **options)

    def solve(k, eps):
        if kind == "matrix":
            return sbot.solve_bridge(a[k], b[k], eps, cost=half_squares(x, y)[k], relax=relax, solver=solver)
        return sbot.solve_bridge((x[k], a[k]), (y[k], b[k]), eps, relax=relax, solver=solver, **given)

    return solve(slice(None), EPS), [solve(k, float(EPS[k])) for k in range(3)]


def same(batch, ones, ask, **tolerance):
    """Hold ``ask(bridge, k)`` of the batch, k a slice, against those of its problems."""
    got, want = ask(batch, slice(None)), [ask(one, k) for k, one in enumerate(ones)]
    torch.testing.assert_close(got, torch.stack(want), **({"rtol": 1e-7, "atol": 1e-9} | tolerance))


@pytest.mark.parametrize("relax", RELAX, ids=str)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_batch_is_its_problems(kind, relax, generator, tmp_path):
    batch, ones = both(kind, relax, generator)
    assert batch.report.converged
    v = torch.rand(3, 11, 2, generator=generator, dtype=torch.float64)
    same(batch, ones, lambda bridge, k: bridge.plan())
    same(batch, ones, lambda bridge, k: bridge.plan(rows=[1, 4]))
    same(batch, ones, lambda bridge, k: bridge.cost())
    same(batch, ones, lambda bridge, k: bridge.linear_cost())
    same(batch, ones, lambda bridge, k: bridge.gap())
    same(batch, ones, lambda bridge, k: bridge.potentials().f.values)
    same(batch, ones, lambda bridge, k: bridge.potentials().g.values)
    same(batch, ones, lambda bridge, k: bridge.round().plan())
    same(batch, ones, lambda bridge, k: bridge.top(3)[0])
    same(batch, ones, lambda bridge, k: bridge.apply(v[k]))
    if kind != "matrix":
        z = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
        same(batch, ones, lambda bridge, k: bridge.potentials().f(z[k]))
        same(batch, ones, lambda bridge, k: bridge.potentials().g(z[k]))
        same(batch, ones, lambda bridge, k: bridge.transport(z[k]))
        if isinstance(batch.problem.reference, sbot.LinearReference):
            same(batch, ones, lambda bridge, k: bridge.drift(0.4, z[k]))
            same(batch, ones, lambda bridge, k: bridge.reverse_drift(0.4, z[k]))
            same(batch, ones, lambda bridge, k: bridge.log_prob(0.4, z[k]))
            same(batch, ones, lambda bridge, k: bridge.condition(z[k], 0.3).mean)
    batch.save(tmp_path / "batch.safetensors")
    again = sbot.load(tmp_path / "batch.safetensors")
    assert torch.equal(again.problem.eps, EPS)
    torch.testing.assert_close(again.plan(), batch.plan(), rtol=0, atol=0)
    torch.testing.assert_close(batch.to(dtype=torch.float32).plan().double(), batch.plan(), rtol=1e-3, atol=1e-5)


def test_draws_spread_as_each_eps_says(generator):
    x = torch.zeros(2, 1, 1, dtype=torch.float64)
    bridge = sbot.solve_bridge(x, x, torch.tensor([4.0, 0.25], dtype=torch.float64))
    paths = bridge.sample_paths(20_000, [0.0, 0.5, 1.0], generator=generator)
    torch.testing.assert_close(paths[:, :, 1, 0].var(1), torch.tensor([1.0, 0.0625]).double(), rtol=0.05, atol=0)
    start, _ = bridge.sample_pairs(5, generator=generator)
    assert start.shape == (2, 5, 1)


def test_two_batch_dimensions_and_equal_eps(generator):
    x, y = clouds(5, 6, 2, generator, (2, 2))
    eps = torch.tensor([[0.5, 0.1], [0.3, 1.0]])
    bridge = sbot.solve_bridge(x, y, eps, relax=2.0, solver=sbot.Sinkhorn(tol=1e-12))
    one = sbot.solve_bridge(x[1, 0], y[1, 0], float(eps[1, 0]), relax=2.0, solver=sbot.Sinkhorn(tol=1e-12))
    torch.testing.assert_close(bridge.plan()[1, 0], one.plan(), rtol=1e-8, atol=1e-10)
    level = sbot.solve_bridge(x, y, torch.full((2, 2), 0.2), solver=sbot.Sinkhorn(tol=1e-12))
    scalar = sbot.solve_bridge(x, y, float(torch.tensor(0.2)), solver=sbot.Sinkhorn(tol=1e-12))
    torch.testing.assert_close(level.plan(), scalar.plan(), rtol=1e-8, atol=1e-10)


def test_each_problem_has_a_ladder_of_its_own():
    start, eps = torch.tensor([4.0, 1.0, 0.5]), torch.tensor([1.0, 1.0, 2.0])
    stages = list(sbot.Schedule(factor=0.5).stages(start, eps, 1e-9))
    assert [level.tolist() for level, _ in stages] == [[4, 1, 2], [2, 1, 2], [1, 1, 2]]
    assert stages[-1][1] == 1e-9


def test_float32_reaches_what_each_problem_can(generator):
    x, y = (part.float() for part in clouds(30, 30, 2, generator, (2,)))
    eps = torch.tensor([1.0, 1e-4])
    batch = sbot.solve_bridge(x, y, eps)
    easy, hard = (sbot.solve_bridge(x[k], y[k], float(eps[k])) for k in range(2))
    assert batch.report.converged
    assert hard.report.tolerance > easy.report.tolerance
    off = (batch.plan().sum(-2) - 1 / 30).abs().sum(-1)
    assert float(off[0]) <= 2 * easy.report.tolerance
    assert bool(torch.isfinite(batch.plan()).all())
    assert batch.plan().dtype == torch.float32
    assert batch.report.history[-1][1] == pytest.approx(1.0)  # the largest


def test_a_warm_start_from_a_batch(generator):
    x, y = clouds(9, 11, 2, generator, (3,))
    first = sbot.solve_bridge(x, y, EPS, solver=sbot.Sinkhorn(tol=1e-10))
    again = sbot.solve_bridge(x, y, EPS, init=first, solver=sbot.Sinkhorn(tol=1e-9))
    assert again.report.iterations <= 2
    lower = sbot.solve_bridge(x, y, EPS / 2, init=first, solver=sbot.Sinkhorn(tol=1e-12))
    want = sbot.solve_bridge(x[2], y[2], float(EPS[2]) / 2, solver=sbot.Sinkhorn(tol=1e-12))
    torch.testing.assert_close(lower.plan()[2], want.plan(), rtol=1e-7, atol=1e-9)


def test_gaussians(generator):
    means = torch.randn(2, 3, 2, generator=generator, dtype=torch.float64)
    covs = torch.stack([torch.stack([spd(2, generator) for _ in range(3)]) for _ in range(2)])
    z = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    for reference in (sbot.Brownian(), SHEAR):

        def solve(k, eps, reference=reference):
            ends = (sbot.Gaussian(means[side][k], covs[side][k]) for side in range(2))
            return sbot.solve_bridge(*ends, eps, reference=reference)

        batch, ones = solve(slice(None), EPS), [solve(k, float(EPS[k])) for k in range(3)]
        same(batch, ones, lambda bridge, k: bridge.cost())
        same(batch, ones, lambda bridge, k: bridge.plan().cov)
        same(batch, ones, lambda bridge, k: bridge.potentials().g(z[k]))
        same(batch, ones, lambda bridge, k: bridge.drift(0.4, z[k]))
        same(batch, ones, lambda bridge, k: bridge.log_prob(0.4, z[k]))
        same(batch, ones, lambda bridge, k: bridge.marginal(0.3).cov)


X = torch.zeros(2, 3, 2)
BAD = [
    (lambda: sbot.solve_bridge(X, X, [1.0, 0.0]), "eps is 0 in problem 1"),
    (lambda: sbot.solve_bridge(X, X, [math.nan, 1.0]), "eps is nan in problem 0"),
    (lambda: sbot.solve_bridge(X, X, torch.tensor([1.0, INF])), "eps is inf in problem 1"),
    (lambda: sbot.solve_bridge(X[None], X[None], [[1.0, -2.0]]), r"eps is -2 in problem \(0, 1\)"),
    (lambda: sbot.solve_bridge(X, X, [1.0, 1.0, 1.0]), r"eps has shape \(3,\) for the batch \(2,\)"),
    (lambda: sbot.solve_bridge(X, X, [[1.0], [1.0]]), r"eps has shape \(2, 1\)"),
    (lambda: sbot.solve_bridge(X[0], X[0], [1.0]), "single problem; give a number"),
    (lambda: sbot.solve_bridge(X, X, [1.0, 1e-39]), "in problem 1 of the batch, outside the range of torch.float32"),
]


@pytest.mark.parametrize(("call", "match"), BAD, ids=[match for _, match in BAD])
def test_bad_eps(call, match):
    with pytest.raises(sbot.InvalidProblem, match=match):
        call()


def test_the_repr_and_the_callers_tensor(generator):
    x, y = clouds(4, 5, 2, generator, (2,))
    eps = torch.tensor([0.5, 0.1], dtype=torch.float64)
    bridge = sbot.solve_bridge(x, y, eps)
    eps.fill_(7.0)
    assert bridge.problem.eps.tolist() == [0.5, 0.1]
    assert "eps=0.1..0.5" in repr(bridge)
