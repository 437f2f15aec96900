"""Gradients of the value and Hessian-vector products against central differences: every mode, cost and dtype in one table."""

from __future__ import annotations

import math

import pytest
import torch

import sbot
from sbot.kernels import DenseKernel, TiledKernel

from ..conftest import clouds, half_squares, weights

INF = math.inf
EPS = 0.4
#: float64 solves to rounding, float32 ones to about what the dtype can reach
SOLVERS = {torch.float64: sbot.Sinkhorn(tol=1e-14), torch.float32: sbot.Sinkhorn(tol=2e-6)}
MODES = {"balanced": None, "relaxed": (1.0, 0.7), "mu relaxed": (0.8, INF), "nu relaxed": (INF, 0.8)}
COSTS = {
    "quadratic": None,
    "l1": sbot.Lp(1),
    "l2^1.5": sbot.Lp(2, power=1.5),
    "cosine": sbot.Cosine(),
    "callable": lambda x, y: ((x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) + 0.5).log(),
    "matrix": half_squares,
}


def data(cost, generator):
    """What the value depends on: points or a matrix, and weights; and a direction for each, that keeps the masses."""
    x, y = clouds(5, 6, 2, generator)
    places = [half_squares(x, y)] if cost == "matrix" else [x + 2, y + 2]
    inputs = [*places, weights(5, generator=generator), weights(6, generator=generator)]
    ways = [torch.rand(part.shape, generator=generator, dtype=torch.float64) - 0.5 for part in inputs]
    return inputs, [way if k < len(places) else way - way.mean() for k, way in enumerate(ways)]


def solve(cost, mode, inputs):
    *places, a, b = inputs
    options = {"relax": MODES[mode], "solver": SOLVERS[a.dtype]}
    if cost == "matrix":
        return sbot.solve_bridge(a, b, EPS, cost=places[0], **options)
    return sbot.solve_bridge((places[0], a), (places[1], b), EPS, cost=COSTS[cost], **options)


def gradient(cost, mode, inputs, graph=False):
    leaves = [part.clone().requires_grad_() for part in inputs]
    bridge = solve(cost, mode, leaves)
    value = bridge.differentiable().cost() if graph else bridge.cost()
    return leaves, torch.autograd.grad(value, leaves, create_graph=graph)


def differences(cost, mode, inputs, ways, of, step=1e-5):
    """Of a function of the inputs, along all of ``ways`` at once."""
    ends = [of([part + sign * step * way for part, way in zip(inputs, ways, strict=True)]) for sign in (1, -1)]
    return [(plus - minus) / (2 * step) for plus, minus in zip(*ends, strict=True)]


table = [
    pytest.mark.parametrize("cost", COSTS),
    pytest.mark.parametrize("mode", MODES),
    pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"]),
]


def tabled(test):
    for mark in table:
        test = mark(test)
    return test


@tabled
def test_gradients(cost, mode, dtype, generator):
    """Input by input, against differences of float64 solves."""
    inputs, ways = data(cost, generator)
    grads = gradient(cost, mode, [part.to(dtype) for part in inputs])[1]
    for k, grad in enumerate(grads):
        assert grad.dtype == dtype
        only = [way if i == k else torch.zeros_like(way) for i, way in enumerate(ways)]
        (want,) = differences(cost, mode, inputs, only, lambda parts: [solve(cost, mode, parts).cost()])
        have, scale = float((grad.double() * ways[k]).sum()), float((grad.abs().double() * ways[k].abs()).sum())
        assert abs(have - float(want)) <= (1e-8 if dtype == torch.float64 else 1e-5) * max(scale, 1e-2), k


@tabled
def test_hessian_vector_products(cost, mode, dtype, generator):
    """Along all inputs at once, against differences of the gradient."""
    inputs, ways = data(cost, generator)
    leaves, grads = gradient(cost, mode, [part.to(dtype) for part in inputs], graph=True)
    product = torch.autograd.grad(sum((g * w.to(dtype)).sum() for g, w in zip(grads, ways, strict=True)), leaves)
    want = differences(cost, mode, inputs, ways, lambda parts: gradient(cost, mode, parts)[1])
    for k, (have, expected) in enumerate(zip(product, want, strict=True)):
        assert have.dtype == dtype
        have = have.double()
        if mode == "balanced" and k >= len(inputs) - 2:  # weights move within equal masses
            have, expected = have - have.mean(), expected - expected.mean()
        error, scale = float((have - expected).abs().max()), float(expected.abs().max())
        assert error <= (1e-7 if dtype == torch.float64 else 1e-4) * max(scale, 1e-1), k


def passes(monkeypatch):
    """Counts tiles of logits as they are made."""
    made = []
    for kind in (TiledKernel, DenseKernel):
        whole = kind.logits
        monkeypatch.setattr(kind, "logits", lambda *args, whole=whole: made.append(1) or whole(*args))
    return made


@pytest.mark.parametrize(
    ("cost", "own"),
    [(None, 0), (sbot.Lp(1), 1), ("matrix", 0), ("one matrix", 1)],
    ids=["points", "L1", "matrix", "shared"],
)
def test_a_value_and_its_slopes_take_one_pass_where_slopes_are_cheap(cost, own, generator, monkeypatch):
    """Elsewhere the backward pass makes one of its own; a batch gets what each problem gets alone, weighted."""
    x = torch.randn(3, 11, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.randn(3, 13, 2, generator=generator, dtype=torch.float64)
    weights, eps = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)
    eps.requires_grad_()
    leaf, posed = x, lambda part, k: (part[k], y[k], cost)
    if isinstance(cost, str):
        leaf = torch.rand(*(() if "one" in cost else (3,)), 11, 13, generator=generator, dtype=torch.float64)
        leaf.requires_grad_()
        uniform = torch.full((3, 11), 1 / 11, dtype=torch.float64), torch.full((3, 13), 1 / 13, dtype=torch.float64)
        posed = lambda part, k: (uniform[0][k], uniform[1][k], part if "one" in cost else part[k])  # noqa: E731

    def value(part, k):
        mu, nu, charge = posed(part, k)
        return sbot.solve_bridge(mu, nu, eps, cost=charge, solver=sbot.Sinkhorn(tol=1e-12)).cost()

    loss = (weights * value(leaf, slice(None))).sum()
    made = passes(monkeypatch)
    got = torch.autograd.grad(loss, (leaf, eps), retain_graph=True)
    assert len(made) == own
    again = torch.autograd.grad(loss, (leaf, eps))
    want = torch.autograd.grad(sum(w * value(leaf, k) for k, w in enumerate(weights)), (leaf, eps))
    for one, two, three in zip(got, again, want, strict=True):
        torch.testing.assert_close(one, three, rtol=1e-9, atol=1e-11)
        assert torch.equal(one, two)


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, math.inf])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_distances_within_a_cloud_have_the_slopes_of_two(p, power, generator):
    x = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    at = torch.randn(2, 7, 7, generator=generator, dtype=torch.float64)
    cost = sbot.Lp(p, power)
    within = torch.autograd.grad((at * cost.matrix(x, x)).sum(), x)[0]
    one, two = torch.autograd.grad((at * cost.matrix(x, y)).sum(), (x, y))
    torch.testing.assert_close(within, one + two, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("batch", [(2, 2), (3, 3), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_matrix_that_some_problems_of_a_batch_share(batch, n, generator):
    """Its gradient is the sum of theirs, each with the weight of its problem."""
    a, b = (sbot.Discrete(None, weights(*batch, k, generator=generator)) for k in (n, 5))
    matrix = torch.rand(batch[1], n, 5, generator=generator, dtype=torch.float64).requires_grad_()
    share = torch.randn(batch, generator=generator, dtype=torch.float64)

    def value(cost):
        bridge = sbot.solve_bridge(a, b, 0.5, cost=cost, solver=sbot.Sinkhorn(tol=1e-12))
        return (share * bridge.cost()).sum()

    got = torch.autograd.grad(value(matrix), matrix)[0]
    own = matrix.detach().expand(*batch, n, 5).clone().requires_grad_()
    torch.testing.assert_close(got, torch.autograd.grad(value(own), own)[0].sum(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cost", [None, sbot.Lp(1)], ids=["points", "L1"])
def test_transforms_weight_the_problems_of_a_batch(cost, generator):
    x, y = (torch.randn(3, n, 2, generator=generator, dtype=torch.float64) for n in (6, 7))
    a, b = weights(3, 6, generator=generator), weights(3, 7, generator=generator)
    share, eps = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64)

    def value(x, a, b, eps):
        return (
            share * sbot.solve_bridge((x, a), (y, b), eps, cost=cost, relax=1.0, solver=SOLVERS[x.dtype]).cost()
        ).sum()

    inputs = x, a, b, eps
    got = torch.func.grad(value, argnums=(0, 1, 2, 3))(*inputs)
    leaves = [part.clone().requires_grad_() for part in inputs]
    for one, two in zip(got, torch.autograd.grad(value(*leaves), leaves), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_slopes_are_let_go_with_the_graph(generator):
    matrix = torch.rand(30, 40, generator=generator, dtype=torch.float64).requires_grad_()
    value = sbot.solve_bridge(torch.ones(30).double() / 30, torch.ones(40).double() / 40, 0.5, cost=matrix).cost()
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
