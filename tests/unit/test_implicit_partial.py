"""Derivatives of partial plans, away from their kinks, against central differences of solves to rounding."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import sbot

from ..conftest import clouds, half_squares
from .test_implicit import data as balanced
from .test_implicit import quantities

TIGHT = sbot.Sinkhorn(tol=1e-14)
EPS, MASS = 0.3, 0.6


def data(generator, batch=()):
    """Points, weights of masses 1 and 1.3, and a mass."""
    x, y, a, b = balanced(generator, batch)
    return [x, y, a, 1.3 * b, torch.full(batch, MASS, dtype=torch.float64)]


def solve(x, y, a, b, s):
    return sbot.solve_bridge((x, a), (y, b), EPS, mass=s, solver=TIGHT)


def numbers(bridge):
    found = quantities(bridge, torch.Generator().manual_seed(1))
    if bridge.problem.values[0] is None:
        return found
    f, g = bridge.potentials()
    z = torch.full((*bridge.problem.batch_shape, 3, 2), 2.5, dtype=torch.float64)
    return {**found, "sum of the potentials elsewhere": (f(z) + g(z)).sum()}


NAMES = [
    "plan",
    "potentials",
    "linear cost",
    "map",
    "map elsewhere",
    "drift",
    "density",
    "sum of the potentials elsewhere",
]


def slopes(make, inputs, name, step=1e-5):
    """Along one direction for each input: autograd, and differences of the whole solve."""
    leaves = [part.clone().requires_grad_() for part in inputs]
    grads = torch.autograd.grad(numbers(make(*leaves).differentiable())[name], leaves, allow_unused=True)
    for k, grad in enumerate(grads):
        way = torch.rand(inputs[k].shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64) - 0.4
        ends = [
            float(numbers(make(*[part + move * way if j == k else part for j, part in enumerate(inputs)]))[name])
            for move in (step, -step)
        ]
        yield k, 0.0 if grad is None else float((grad * way).sum()), (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_points_weights_and_mass(name, batch, generator):
    for k, have, want in slopes(solve, data(generator, batch), name):
        assert abs(have - want) <= 1e-6 * max(1.0, abs(want)), (name, k, have, want)


def test_some_atoms_are_used_up_and_some_are_not(generator):
    """Or the tests here would be those of balanced plans."""
    x, y, a, b, s = data(generator)
    plan = solve(x, y, a, b, s).plan()
    for sums, w in ((plan.sum(1), a), (plan.sum(0), b)):
        full = (w - sums).abs() < 1e-9
        assert 0 < int(full.sum()) < len(w)


@pytest.mark.parametrize("name", ["plan", "potentials", "linear cost"])
@pytest.mark.parametrize("kept", [2**28, 0])
def test_a_cost_matrix_and_eps(name, kept, generator, monkeypatch):
    monkeypatch.setattr("sbot.implicit.KEPT_BYTES", kept)
    x, y, a, b, s = data(generator)

    def make(c, eps):
        level = eps if eps.requires_grad else float(eps)
        return sbot.solve_bridge(a, b, level, cost=c, mass=float(s), solver=TIGHT)

    for k, have, want in slopes(make, [half_squares(x, y), torch.tensor(EPS, dtype=torch.float64)], name):
        assert abs(have - want) <= 1e-6 * max(1.0, abs(want)), (name, k, have, want)


def test_a_side_that_is_carried_whole_is_hard(generator):
    """Its weights move within equal masses; the other side is bounded."""
    x, y, a, b, _ = data(generator)
    make = lambda x, y, b: sbot.solve_bridge((x, a), (y, b), EPS, mass=1.0, solver=TIGHT)  # noqa: E731
    for k, have, want in slopes(make, [x, y, b], "plan"):
        assert abs(have - want) <= 1e-6 * max(1.0, abs(want)), (k, have, want)
    # all of both: the balanced plan, and its derivatives
    grads = []
    for options in ({"mass": 1.0}, {}):
        leaf = x.clone().requires_grad_()
        plan = sbot.solve_bridge((leaf, a), (y, b / 1.3), EPS, solver=TIGHT, **options).differentiable().plan()
        grads.append(torch.autograd.grad(plan.square().sum(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-9)


def test_first_and_second_derivatives_of_the_value(generator):
    inputs = data(generator)
    leaves = [part.clone().requires_grad_() for part in inputs]
    bridge = solve(*leaves)
    plain = torch.autograd.grad(bridge.cost(), leaves)
    first = torch.autograd.grad(bridge.differentiable().cost(), leaves, create_graph=True)
    for one, two in zip(first, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)
    ways = [torch.rand(part.shape, generator=generator, dtype=torch.float64) - 0.5 for part in inputs]
    product = torch.autograd.grad(sum((g * w).sum() for g, w in zip(first, ways, strict=True)), leaves)

    def gradient(sign, step=1e-5):
        moved = [(part + sign * step * way).requires_grad_() for part, way in zip(inputs, ways, strict=True)]
        return torch.autograd.grad(solve(*moved).cost(), moved)

    for have, plus, minus in zip(product, gradient(1), gradient(-1), strict=True):
        torch.testing.assert_close(have, (plus - minus) / 2e-5, rtol=1e-5, atol=1e-6)


def test_single_precision_is_near(generator):
    grads = []
    for dtype in (torch.float64, torch.float32):
        x, y, a, b, _ = (part.to(dtype) for part in data(generator.manual_seed(0)))
        leaf = x.requires_grad_()
        bridge = sbot.solve_bridge((leaf, a), (y, b), EPS, mass=MASS, solver=sbot.Sinkhorn(tol=1e-5)).differentiable()
        grads.append(torch.autograd.grad(bridge.plan().square().sum() + bridge.transport().sum(), leaf)[0].double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-2, atol=1e-3)
    assert math.isfinite(float(grads[1].sum()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_where_no_atom_of_a_side_is_full(dtype, generator):
    """All multipliers of that side are one constant: nothing is left to solve for, and nothing is warned of."""
    x, y = (part.to(dtype) for part in clouds(6, 5, 2, generator))
    a, b = torch.full((6,), 0.1, dtype=dtype), torch.full((5,), 9.0, dtype=dtype)
    leaf = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error", sbot.NotConverged)
        bridge = sbot.solve_bridge((leaf, a), (y, b), EPS, mass=0.3).differentiable()
        grad = torch.autograd.grad(bridge.plan().square().sum(), leaf)[0]

    def value(points):
        sides = (points.double(), a.double()), (y.double(), b.double())
        return sbot.solve_bridge(*sides, EPS, mass=0.3, solver=TIGHT).plan().square().sum()

    for i, k in ((0, 0), (3, 1)):
        step = torch.zeros(6, 2, dtype=torch.float64)
        step[i, k] = 1e-5
        want = (value(x.double() + step) - value(x.double() - step)) / 2e-5
        rel, least = (1e-5, 1e-8) if dtype == torch.float64 else (1e-2, 1e-4)
        assert float(grad[i, k]) == pytest.approx(float(want), rel=rel, abs=least)


def test_iterations_are_not_unrolled(generator):
    with pytest.raises(sbot.Unsupported, match="drop unroll="):
        solve(*data(generator)).differentiable(unroll=3)
