"""Second derivatives of everything against central differences of the first ones, and refusals where there are none."""

from __future__ import annotations

import math

import pytest
import torch

import sbot
from sbot import derivatives, ops

from ..conftest import clouds, half_squares, weights

INF = math.inf
EPS = 0.4
TIGHT = sbot.Sinkhorn(tol=1e-13)
RELAX = {"balanced": None, "relaxed": (1.0, 0.7), "one relaxed": (INF, 0.8)}
COSTS = {
    "quadratic": None,
    "l1": sbot.Lp(1),
    "l2": sbot.Lp(2),
    "l3": sbot.Lp(3, power=3),
    "max": sbot.Lp(INF),
    "cosine": sbot.Cosine(),
    "callable": lambda x, y: ((x[..., :, None, :] - y[..., None, :, :]).square().sum(-1) + 0.5).log(),
    "matrix": half_squares,
}


def data(cost, generator, batch=()):
    """What answers depend on: points or a matrix, weights, and eps; and directions, that keep the masses."""
    x, y = clouds(5, 6, 2, generator, batch)
    places = [half_squares(x, y)] if cost == "matrix" else [x + 2, y + 2]
    inputs = [*places, *(weights(*batch, n, generator=generator) for n in (5, 6)), torch.tensor(EPS).double()]
    ways = [torch.rand(part.shape, generator=generator, dtype=torch.float64) - 0.5 for part in inputs]
    ways[-3:-1] = [way - way.mean(-1, keepdim=True) for way in ways[-3:-1]]
    return inputs, ways


def solve(cost, inputs, **options):
    *places, a, b, eps = inputs
    if cost == "matrix":
        return sbot.solve_bridge(a, b, eps, cost=places[0], solver=TIGHT, **options)
    return sbot.solve_bridge((places[0], a), (places[1], b), eps, cost=COSTS[cost], solver=TIGHT, **options)


def answers(bridge):
    """Numbers made of each kind of answer, curved in it."""
    moving = bridge.differentiable()
    f, g = moving.potentials()
    plan = moving.plan()
    u = torch.rand(plan.shape, generator=torch.Generator().manual_seed(3), dtype=plan.dtype)
    out = {
        "plan": (u * plan).sum() + plan.square().sum(),
        "potentials": (u[..., 0] * f.values).sin().sum() + (u[..., 0, :] * g.values).sum(),
        "linear cost": moving.linear_cost().square().sum(),
        "cost": bridge.cost().square().sum(),
        "moving cost": moving.cost().square().sum(),
    }
    if bridge.problem.values[0] is not None:
        out["map"] = moving.transport().sin().sum()
        z = torch.full((*bridge.problem.batch_shape, 3, 2), 1.7, dtype=plan.dtype)
        if isinstance(bridge.problem.reference, sbot.LinearReference):
            out["drift"] = moving.drift(0.4, z).sin().sum()
            out["density"] = moving.log_prob(0.4, z).square().sum()
    return out


def gradient(function, inputs, graph=False):
    leaves = [part.clone().requires_grad_() for part in inputs]
    grads = torch.autograd.grad(function(*leaves), leaves, create_graph=graph, materialize_grads=True)
    return leaves, grads


def check(function, inputs, ways, tolerance=2e-7, step=1e-5, level=()):
    """Hessian times ``ways`` by two backward passes, against differences of first derivatives; those do not change by a graph.

    The weights ``level`` move within equal masses.
    """
    leaves, grads = gradient(function, inputs, graph=True)

    def compared(k, *parts):
        return [part - part.mean(-1, keepdim=True) if k in level else part for part in parts]

    for k, (one, two) in enumerate(zip(grads, gradient(function, inputs)[1], strict=True)):
        torch.testing.assert_close(*compared(k, one, two), rtol=1e-8, atol=1e-10)
    number = sum((grad * way).sum() for grad, way in zip(grads, ways, strict=True))
    have = torch.autograd.grad(number, leaves, materialize_grads=True)
    ends = [
        gradient(function, [part + sign * step * way for part, way in zip(inputs, ways, strict=True)])[1]
        for sign in (1, -1)
    ]
    for k, (product, plus, minus) in enumerate(zip(have, *ends, strict=True)):
        product, want = compared(k, product, (plus - minus) / (2 * step))
        error, scale = float((product - want).abs().max()), float(want.abs().max())
        assert error <= tolerance * max(scale, 1.0), (k, product, want)


NAMES = ["plan", "potentials", "linear cost", "cost", "moving cost", "map", "drift", "density"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", RELAX)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_points_weights_and_eps(name, mode, batch, generator):
    inputs, ways = data("quadratic", generator, batch)
    check(
        lambda *parts: answers(solve("quadratic", parts, relax=RELAX[mode]))[name],
        inputs,
        ways,
        level=(2, 3) if mode == "balanced" else (),
    )


MORE = [(cost, name) for cost in COSTS for name in ("plan", "linear cost", "cost", "map")]


@pytest.mark.parametrize(("cost", "name"), [pair for pair in MORE if pair != ("matrix", "map")])
def test_every_cost(cost, name, generator):
    inputs, ways = data(cost, generator)
    places = len(inputs) - 3
    check(lambda *parts: answers(solve(cost, parts))[name], inputs, ways, level=(places, places + 1))


GRID = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
SMOOTH = {
    "l2": (sbot.Lp(2), False),
    "l2 squared": (sbot.Lp(2, power=2), True),
    "l2^4": (sbot.Lp(2, power=4), True),
    "l3 cubed": (sbot.Lp(3, power=3), True),
    "l4": (sbot.Lp(4), False),
    "quadratic": (sbot.Quadratic(), True),
    "cosine": (sbot.Cosine(), True),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_points_on_a_grid(name, generator):
    """Coordinates in common, and points in common where the cost is smooth there."""
    cost, meets = SMOOTH[name]
    x, y = GRID + 1, GRID[:4] + torch.tensor([1.0, 1.0 if meets else 1.5], dtype=torch.float64)
    ways = [torch.rand(part.shape, generator=generator, dtype=torch.float64) - 0.5 for part in (x, y)]

    def value(x, y):
        bridge = sbot.solve_bridge(x, y, EPS, cost=cost, solver=TIGHT)
        return bridge.cost() + bridge.differentiable().plan().square().sum()

    check(value, [x, y], ways, tolerance=1e-5, step=1e-5)


@pytest.mark.parametrize(
    "cost", [sbot.Lp(1), sbot.Lp(1.5), sbot.Lp(2), sbot.Lp(math.inf, power=1.5), sbot.Lp(3, power=1.2)]
)
def test_kinks_are_held_and_finite(cost):
    leaf = (GRID + 1).requires_grad_()
    value = sbot.sinkhorn_divergence(leaf, GRID[:4] + 1, EPS, cost=cost)
    (first,) = torch.autograd.grad(value, leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert bool(torch.isfinite(second).all())


def test_potentials_where_there_is_no_weight(generator):
    """They are c-transforms of what moves."""
    (x, y, _, b, _), ways = data("quadratic", generator)
    a = torch.tensor([0.3, 0.0, 0.3, 0.4, 0.0], dtype=torch.float64)
    for options in ({}, {"relax": (1.0, 0.5)}, {"mass": 0.6}):

        def value(x, y, options=options):
            bridge = sbot.solve_bridge((x, a), (y, b), EPS, solver=TIGHT, **options)
            f = bridge.differentiable().potentials()[0].values
            return f.square().sum() + f[1]

        check(value, [x, y], ways[:2], tolerance=1e-5)
        leaf = x.clone().requires_grad_()
        moved = float(torch.autograd.grad(value(leaf, y), leaf)[0][1].abs().max())
        assert moved > 1e-3 or "mass" in options  # at the cap it moves with the others only


@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_the_linear_cost_streams(batch, generator, monkeypatch):
    """Tile by tile the same derivatives as at once."""
    inputs, _ = data("quadratic", generator, batch)
    found = []
    for size in (None, 200):
        if size is not None:
            monkeypatch.setattr("sbot.kernels.base.TILE_BYTES", size)
        found.append(gradient(lambda *parts: answers(solve("quadratic", parts))["linear cost"], inputs)[1])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_matrices_computed_once_or_by_tiles_are_the_same(generator, monkeypatch):
    (x, y, a, b, _), _ = data("l1", generator)

    def found():
        leaf = x.clone().requires_grad_()
        value = sbot.sinkhorn_divergence((leaf, a), (y, b), EPS, cost=sbot.Lp(1), solver=TIGHT)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    once = found()
    monkeypatch.setattr("sbot.divergence.ONCE", 0)
    torch.testing.assert_close(found(), once, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["plan", "potentials", "linear cost", "cost", "map"])
def test_partial_plans(name, generator):
    inputs, ways = data("quadratic", generator)
    mass, way = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    check(
        lambda *parts: answers(solve("quadratic", parts[:-1], mass=parts[-1]))[name],
        [*inputs, mass],
        [*ways, way],
        tolerance=1e-5,
    )


def test_forbidden_pairs_and_small_eps(generator):
    inputs, ways = data("matrix", generator)
    inputs[0][0, 1:3] = INF
    ways[0][0, 1:3] = 0
    inputs[-1] = torch.tensor(0.05, dtype=torch.float64)
    for name in ("plan", "cost", "linear cost"):
        check(
            lambda *parts, name=name: answers(solve("matrix", parts))[name],
            inputs,
            ways,
            tolerance=1e-5,
            step=1e-6,
            level=(1, 2),
        )


@pytest.mark.parametrize("mode", RELAX)
def test_the_divergence(mode, generator):
    inputs, ways = data("quadratic", generator)
    relax = None if mode == "balanced" else 0.7

    def value(x, y, a, b, eps):
        return sbot.sinkhorn_divergence((x, a), (y, b), eps, relax=relax, solver=TIGHT).square()

    check(value, inputs, ways, tolerance=1e-6, level=(2, 3) if relax is None else ())


def test_third_derivatives(generator):
    inputs, _ = data("quadratic", generator)
    x, y, a, b, _ = inputs
    function = lambda x: sbot.solve_bridge((x, a), (y, b), EPS, solver=TIGHT).differentiable().plan()[0, 0]  # noqa: E731
    way = torch.rand(x.shape, generator=generator, dtype=torch.float64)

    def along(x, times, graph=False):
        leaf = x.clone().requires_grad_()
        number = function(leaf)
        for k in range(times):
            (slope,) = torch.autograd.grad(number, leaf, create_graph=graph or k < times - 1)
            number = (slope * way).sum()
        return number.detach()

    want = (along(x + 1e-5 * way, 2) - along(x - 1e-5 * way, 2)) / 2e-5
    torch.testing.assert_close(along(x, 3), want, rtol=1e-6, atol=1e-9)


def test_unrolling_tends_to_the_implicit_one(generator):
    (x, y, a, b, _), _ = data("quadratic", generator)
    leaf, found = x.clone().requires_grad_(), {}
    bridge = sbot.solve_bridge((leaf, a), (y, b), EPS, solver=TIGHT)
    for unroll in (None, 2, 8, 40):
        number = bridge.differentiable(unroll=unroll).plan().square().sum()
        (first,) = torch.autograd.grad(number, leaf, create_graph=True)
        found[unroll] = torch.autograd.grad(first.square().sum(), leaf)[0]
    errors = [float((found[k] - found[None]).abs().max()) for k in (2, 8, 40)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9


def test_single_precision(generator):
    inputs, ways = data("quadratic", generator)
    products = []
    for dtype in (torch.float64, torch.float32):
        x, way = inputs[0].to(dtype).requires_grad_(), ways[0].to(dtype)
        y, a, b = (part.to(dtype) for part in inputs[1:4])
        solver = TIGHT if dtype == torch.float64 else sbot.Sinkhorn(tol=2e-6)
        plan = sbot.solve_bridge((x, a), (y, b), EPS, solver=solver).differentiable().plan()
        (first,) = torch.autograd.grad(plan.square().sum(), x, create_graph=True)
        products.append(torch.autograd.grad((first * way).sum(), x)[0])
        assert products[-1].dtype == dtype
    torch.testing.assert_close(products[0], products[1].double(), rtol=1e-3, atol=1e-4)


def test_hessians_of_torch_agree(generator):
    (x, y, a, b, _), _ = data("quadratic", generator)

    def value(x):
        return sbot.solve_bridge((x, a), (y, b), EPS, solver=TIGHT).differentiable().linear_cost()

    want = torch.autograd.functional.hessian(value, x)
    assert float(want.abs().max()) > 1e-2
    torch.testing.assert_close(torch.func.jacrev(torch.func.grad(value), chunk_size=1)(x), want)


def test_layers(generator):
    z = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    way = torch.rand(z.shape, generator=generator, dtype=torch.float64)
    for layer in (
        lambda z: ops.sinkhorn_normalize(z),
        lambda z: ops.sinkhorn_normalize(z, iterations=5),
        lambda z: ops.log_optimal_transport(z, z.mean()).exp(),
    ):
        check(lambda z, layer=layer: layer(z).square().sum(), [z], [way], tolerance=1e-6)


# ---- where there are none ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan", "cost", "linear cost", "drift", "map"])
def test_what_does_not_fit_is_refused(name, generator, monkeypatch):
    inputs, _ = data("quadratic", generator)
    monkeypatch.setattr(derivatives, "lacking", lambda needed, device: "needs 9 GiB and 1 GiB are free")
    leaves, grads = gradient(lambda *parts: answers(solve("quadratic", parts))[name], inputs, graph=True)
    plain = gradient(lambda *parts: answers(solve("quadratic", parts))[name], inputs)[1]
    torch.testing.assert_close(grads, plain, rtol=1e-9, atol=1e-11)
    for leaf in leaves[:2]:
        with pytest.raises(sbot.Unsupported, match="needs 9 GiB"):
            torch.autograd.grad(sum(grad.sum() for grad in grads), leaf, retain_graph=True)


def test_weights_that_are_zero_are_refused(generator):
    (x, y, a, b, _), _ = data("quadratic", generator)
    a[2] = 0
    a = a / a.sum()
    x, a = x.requires_grad_(), a.requires_grad_()
    first = torch.autograd.grad(sbot.solve_bridge((x, a), (y, b), EPS).cost(), (x, a), create_graph=True)
    for leaf in (x, a):
        with pytest.raises(sbot.Unsupported, match="mu has weights that are zero"):
            torch.autograd.grad(first[0].sum(), leaf, retain_graph=True)
    # constant weights may be zero
    leaf = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(sbot.solve_bridge((leaf, a.detach()), (y, b), EPS).cost(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    assert bool(torch.isfinite(second).all()) and float(second.abs().max()) > 0


def test_a_value_may_be_differentiated_twice_over(generator):
    """Backward through one graph several times, in any order of first and second derivatives."""
    (x, y, a, b, _), _ = data("quadratic", generator)
    x.requires_grad_()
    value = sbot.solve_bridge((x, a), (y, b), EPS, solver=TIGHT).cost()
    first = [torch.autograd.grad(value, x, retain_graph=True)[0] for _ in range(3)]
    curved = torch.autograd.grad(value, x, create_graph=True)[0]
    first.append(torch.autograd.grad(value, x)[0])
    for part in (*first, curved):
        torch.testing.assert_close(part, first[0], rtol=1e-12, atol=1e-14)


def test_first_derivatives_of_values_solve_nothing(generator, monkeypatch):
    (x, y, a, b, _), _ = data("quadratic", generator)
    monkeypatch.setattr("sbot.implicit._streamed", None)
    monkeypatch.setattr("sbot.implicit._written_out", None)
    for value in (
        lambda x: sbot.solve_bridge((x, a), (y, b), EPS).cost(),
        lambda x: sbot.solve_bridge((x, a), (y, b), EPS).differentiable().cost(),
        lambda x: sbot.sinkhorn_divergence((x, a), (y, b), EPS),
    ):
        assert float(torch.func.grad(value)(x).abs().max()) > 0
        leaf = x.clone().requires_grad_()
        assert float(torch.autograd.grad(value(leaf), leaf)[0].abs().max()) > 0
