"""Derivatives of everything in the data, against central differences of solves to rounding."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import sbot
from sbot import implicit

from ..conftest import clouds, half_squares, weights

INF = math.inf
TIGHT = sbot.Sinkhorn(tol=1e-14)
RELAX = [(INF, INF), (1.0, 0.7), (INF, 0.5)]
COSTS = {"quadratic": None, "l1.5": sbot.Lp(2, power=1.5), "cosine": sbot.Cosine()}


def data(generator, batch=()):
    x, y = clouds(6, 7, 2, generator, batch)
    a, b = weights(*batch, 6, generator=generator), weights(*batch, 7, generator=generator)
    return [x + 2, y + 2, a, b]


def quantities(bridge, generator):
    """One number for each kind of answer, so that one backward pass meets each formula."""
    f, g = bridge.potentials()
    plan = bridge.plan()
    u = torch.rand(plan.shape, generator=generator, dtype=plan.dtype)
    out = {
        "plan": (u * plan).sum(),
        "potentials": (u[..., 0] * f.values).sum() + (u[..., 0, :] * g.values).sum(),
        "linear cost": bridge.linear_cost().sum(),
    }
    if bridge.problem.values[0] is not None:
        out["map"] = (u[..., :2] * bridge.transport()).sum()
        z = torch.full((*bridge.problem.batch_shape, 3, 2), 1.7, dtype=plan.dtype)
        out["map elsewhere"] = bridge.transport(z).square().sum()
        if isinstance(bridge.problem.reference, sbot.LinearReference):
            out["drift"] = bridge.drift(0.4, z).sin().sum()
            out["density"] = bridge.log_prob(0.4, z).sum()
    return out


def check(solve, inputs, name, steps, atol, **options):
    """Along one direction for each input: autograd against differences of the whole solve."""
    draw = lambda: torch.Generator().manual_seed(1)  # noqa: E731
    leaves = [part.clone().requires_grad_() for part in inputs]
    got = quantities(solve(*leaves).differentiable(**options), draw())[name]
    grads = torch.autograd.grad(got, leaves, allow_unused=True)
    for k, grad in enumerate(grads):
        way = torch.rand(inputs[k].shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64) - 0.5
        if k >= 2:
            way = way - way.mean(-1, keepdim=True)
        ends = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[k] = moved[k] + sign * steps * way
            ends.append(float(quantities(solve(*moved), draw())[name]))
        want = (ends[0] - ends[1]) / (2 * steps)
        have = 0.0 if grad is None else float((grad * way).sum())
        assert abs(have - want) <= atol * max(1.0, abs(want)), (name, k, have, want)


NAMES = ["plan", "potentials", "linear cost", "map", "map elsewhere", "drift", "density"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relax", RELAX, ids=str)
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_points_and_weights(name, relax, batch, generator):
    solve = lambda x, y, a, b: sbot.solve_bridge((x, a), (y, b), 0.3, relax=relax, solver=TIGHT)  # noqa: E731
    check(solve, data(generator, batch), name, 1e-5, 2e-7)


@pytest.mark.parametrize("name", ["plan", "potentials", "linear cost", "map"])
@pytest.mark.parametrize("cost", ["l1.5", "cosine"])
def test_other_costs(name, cost, generator):
    solve = lambda x, y, a, b: sbot.solve_bridge((x, a), (y, b), 0.1, cost=COSTS[cost], solver=TIGHT)  # noqa: E731
    check(solve, data(generator), name, 1e-5, 2e-7)


@pytest.mark.parametrize("relax", RELAX, ids=str)
@pytest.mark.parametrize("kept", [2**28, 0])
def test_a_cost_matrix_in_and_out_of_memory(relax, kept, generator, monkeypatch):
    monkeypatch.setattr("sbot.implicit.KEPT_BYTES", kept)
    x, y, a, b = data(generator)
    c = half_squares(x, y)
    for name in ("plan", "potentials", "linear cost"):
        draw = lambda: torch.Generator().manual_seed(1)  # noqa: E731
        solve = lambda c: sbot.solve_bridge(a, b, 0.3, cost=c, relax=relax, solver=TIGHT)  # noqa: E731
        leaf = c.clone().requires_grad_()
        grad = torch.autograd.grad(quantities(solve(leaf).differentiable(), draw())[name], leaf)[0]
        way = torch.rand(c.shape, generator=generator, dtype=torch.float64) - 0.5
        ends = [float(quantities(solve(c + s * 1e-5 * way), draw())[name]) for s in (1, -1)]
        want = (ends[0] - ends[1]) / 2e-5
        assert abs(float((grad * way).sum()) - want) <= 2e-7 * max(1.0, abs(want)), name


@pytest.mark.parametrize("relax", RELAX, ids=str)
@pytest.mark.parametrize("cost", ["quadratic", "l1.5"])
def test_hessian_vector_products_of_the_value(relax, cost, generator):
    x, y, a, b = data(generator)

    def gradient(parts, graph=False):
        leaves = [part.clone().requires_grad_() for part in parts]
        bridge = sbot.solve_bridge(
            (leaves[0], leaves[2]), (leaves[1], leaves[3]), 0.3, cost=COSTS[cost], relax=relax, solver=TIGHT
        )
        value = bridge.differentiable().cost()
        return leaves, torch.autograd.grad(value, leaves, create_graph=graph)

    ways = [torch.rand(part.shape, generator=generator, dtype=torch.float64) - 0.5 for part in (x, y, a, b)]
    ways[2:] = [way - way.mean() for way in ways[2:]]
    leaves, first = gradient([x, y, a, b], graph=True)
    plain = gradient([x, y, a, b])[1]
    for one, two in zip(first, plain, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)
    product = torch.autograd.grad(sum((g * w).sum() for g, w in zip(first, ways, strict=True)), leaves)
    step = 1e-5
    ends = [
        gradient([part + sign * step * way for part, way in zip((x, y, a, b), ways, strict=True)])[1]
        for sign in (1, -1)
    ]
    for k, (have, plus, minus) in enumerate(zip(product, *ends, strict=True)):
        want = (plus - minus) / (2 * step)
        if k >= 2 and relax == (INF, INF):
            have, want = have - have.mean(), want - want.mean()  # weights move within equal masses
        torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_unrolling_tends_to_the_implicit_derivative(generator):
    x, y, a, b = data(generator)
    leaf = x.clone().requires_grad_()
    bridge = sbot.solve_bridge((leaf, a), (y, b), 0.5, solver=TIGHT)
    grads = {}
    for unroll in (None, 2, 8, 40):
        plan = bridge.differentiable(unroll=unroll).plan()
        grads[unroll] = torch.autograd.grad(plan[:, 0].square().sum(), leaf)[0]
    errors = [float((grads[k] - grads[None]).abs().max()) for k in (2, 8, 40)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9


def test_zero_weights_have_rows_of_zeros_and_finite_gradients(generator):
    x, y, a, b = data(generator)
    a[2] = 0
    a = a / a.sum()
    leaf = x.clone().requires_grad_()
    bridge = sbot.solve_bridge((leaf, a), (y, b), 0.3, solver=TIGHT).differentiable()
    grad = torch.autograd.grad(bridge.plan().square().sum() + bridge.potentials().f.values.sum(), leaf)[0]
    assert bool(torch.isfinite(grad).all())
    wanting = sbot.solve_bridge((x, a.requires_grad_()), (y, b), 0.3, solver=TIGHT)
    with pytest.raises(sbot.InvalidProblem, match="drop these atoms"):
        wanting.differentiable()


def test_float32_gradients_are_those_of_float64(generator):
    inputs = data(generator)
    grads = []
    for dtype in (torch.float64, torch.float32):
        x, y, a, b = (part.to(dtype) for part in inputs)
        x.requires_grad_()
        bridge = sbot.solve_bridge((x, a), (y, b), 0.3, solver=sbot.Sinkhorn(tol=1e-5)).differentiable()
        grads.append(torch.autograd.grad(bridge.plan().square().sum() + bridge.transport().sum(), x)[0].double())
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_rows_of_the_plan_and_files(generator, tmp_path):
    x, y, a, b = data(generator)
    bridge = sbot.solve_bridge((x.requires_grad_(), a), (y, b), 0.3, solver=TIGHT).differentiable()
    torch.testing.assert_close(bridge.plan(rows=[1, 4]), bridge.plan()[[1, 4]])
    bridge.save(tmp_path / "bridge.safetensors")
    torch.testing.assert_close(sbot.load(tmp_path / "bridge.safetensors").plan(), bridge.plan().detach())


def test_only_atoms(generator):
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(sbot.Unsupported, match="Gaussians"):
        sbot.solve_bridge(one, one, 0.5).differentiable()
    x, y, _, _ = data(generator)
    bridge = sbot.solve_bridge(x.requires_grad_(), y, 0.5)
    assert not bridge.plan().requires_grad
    assert bridge.differentiable().plan().requires_grad
    with pytest.raises(sbot.InvalidProblem, match="unroll"):
        bridge.differentiable(unroll=0)


@pytest.mark.parametrize("eps", [0.12, 0.08, 0.06])
def test_small_gradients_in_single_precision(eps, generator):
    """Pairs that hardly mix: what is solved for is small beside the terms it is the difference of."""
    place = torch.arange(6, dtype=torch.float64)
    x = torch.stack([place, 0.1 * torch.sin(3 * place)], 1)
    y = x + 0.1 * torch.randn(6, 2, generator=generator.manual_seed(1), dtype=torch.float64)
    grads = []
    for dtype, tol in ((torch.float64, 1e-15), (torch.float32, 0.0)):
        leaf = x.to(dtype).requires_grad_()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bridge = sbot.solve_bridge(leaf, y.to(dtype), eps, solver=sbot.Sinkhorn(tol=tol)).differentiable()
        grads.append(torch.autograd.grad(bridge.plan().square().sum(), leaf)[0].double())
    assert float((grads[0] - grads[1]).norm() / grads[0].norm()) < 5e-3


def test_an_unfinished_gradient_is_told(generator, monkeypatch):
    monkeypatch.setattr(implicit, "MOST", 30)
    x = torch.arange(300, dtype=torch.float64)[:, None].requires_grad_()
    y = x.detach() + 0.1 * torch.randn(300, 1, generator=generator, dtype=torch.float64)
    bridge = sbot.solve_bridge(x, y, 0.1).differentiable()
    with pytest.warns(sbot.NotConverged, match="is solved to"):
        torch.autograd.grad(bridge.plan().square().sum(), x)
