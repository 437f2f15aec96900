"""Derivatives in eps against central differences, and the transforms of torch.func."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import sbot

from ..conftest import clouds, half_squares, kl, spd, weights

INF = math.inf
RELAX = [(INF, INF), (1.0, 0.7), (INF, 0.5)]
TIGHT = sbot.Sinkhorn(tol=1e-14)
KINDS = {"quadratic": {}, "ou": {"reference": sbot.OrnsteinUhlenbeck(0.5)}, "l1": {"cost": sbot.Lp(1)}, "matrix": {}}
BATCHES = {
    "one": ((), torch.tensor(0.3)),
    "one eps": ((2,), torch.tensor(0.3)),
    "two eps": ((2,), torch.tensor([0.5, 0.2])),
}


def solver_of(kind, batch, relax, generator):
    x, y = clouds(5, 6, 2, generator, batch)
    a, b = weights(*batch, 5, generator=generator), weights(*batch, 6, generator=generator)
    if kind == "matrix":
        return lambda eps: sbot.solve_bridge(a, b, eps, cost=half_squares(x, y), relax=relax, solver=TIGHT)
    return lambda eps: sbot.solve_bridge((x, a), (y, b), eps, relax=relax, solver=TIGHT, **KINDS[kind])


def quantities(kind, batch, generator):
    """One number for each kind of answer; none sees the constant between f and g."""
    u = torch.rand(*batch, 5, 6, generator=generator, dtype=torch.float64)
    z = torch.randn(*batch, 3, 2, generator=generator, dtype=torch.float64)
    out = {
        "value": lambda bridge: bridge.cost().sum(),
        "plan": lambda bridge: (u * bridge.plan()).sum(),
        "potentials": lambda bridge: (
            (u[..., 0] * bridge.potentials().f.values).sum() + (u[..., 0, :] * bridge.potentials().g.values).sum()
        ),
        "linear cost": lambda bridge: bridge.linear_cost().sum(),
    }
    if kind != "matrix":
        out |= {
            "map": lambda bridge: (u[..., :2] * bridge.transport()).sum(),
            "f elsewhere": lambda bridge: bridge.potentials().f(z).diff().sin().sum(),
            "g elsewhere": lambda bridge: bridge.potentials().g(z).diff().sin().sum(),
        }
    if kind in ("quadratic", "ou"):
        out |= {
            "drift": lambda bridge: bridge.drift(0.4, z).sin().sum(),
            "reverse drift": lambda bridge: bridge.reverse_drift(0.4, z).sin().sum(),
            "density": lambda bridge: bridge.log_prob(0.4, z).sum(),
        }
    return out


def slope(values, step):
    """Central differences of the fourth order, from values at 2, 1, -1, -2 steps."""
    return (8 * (values[1] - values[2]) - (values[0] - values[3])) / (12 * step)


@pytest.mark.parametrize("relax", RELAX, ids=str)
@pytest.mark.parametrize(
    ("kind", "case", "kept"),
    [
        ("quadratic", "one", 0),
        ("quadratic", "one eps", 2**28),
        ("ou", "two eps", 0),
        ("l1", "two eps", 2**28),
        ("matrix", "one", 2**28),
        ("matrix", "two eps", 0),
    ],
)
def test_against_differences(kind, case, kept, relax, generator, monkeypatch):
    monkeypatch.setattr("sbot.implicit.KEPT_BYTES", kept)  # whether products with the plan stream
    batch, eps = BATCHES[case]
    eps, step = eps.double(), 1e-4
    solve = solver_of(kind, batch, relax, generator)
    ends = [solve(eps * (1 + sign * step)) for sign in (2, 1, -1, -2)]
    leaf = eps.clone().requires_grad_()
    fixed = solve(leaf)
    moving = fixed.differentiable()
    for name, ask in quantities(kind, batch, generator).items():
        want = float(slope([ask(end).detach() for end in ends], step))
        for bridge in (moving, fixed) if name == "value" else (moving,):
            got = float((torch.autograd.grad(ask(bridge), leaf, retain_graph=True)[0] * eps).sum())
            assert abs(got - want) <= 1e-6 * max(1e-2, abs(want)), (name, got, want)


@pytest.mark.parametrize("relax", RELAX, ids=str)
def test_the_slope_of_the_value_is_the_divergence(relax, generator):
    x, y = clouds(5, 6, 2, generator)
    a, b = weights(5, generator=generator), weights(6, generator=generator)
    eps = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    bridge = sbot.solve_bridge((x, a), (y, b), eps, relax=relax, solver=TIGHT)
    (got,) = torch.autograd.grad(bridge.cost(), eps)
    torch.testing.assert_close(got, kl(bridge.plan(), a[:, None] * b))


@pytest.mark.parametrize("relax", RELAX, ids=str)
@pytest.mark.parametrize("case", list(BATCHES))
def test_second_derivatives_of_the_value(case, relax, generator):
    batch, eps = BATCHES[case]
    eps, step = eps.double(), 1e-4
    solve = solver_of("quadratic", batch, relax, generator)

    def first(at, graph=False):
        leaf = at.clone().requires_grad_()
        bridge = solve(leaf).differentiable() if graph else solve(leaf)
        return leaf, (torch.autograd.grad(bridge.cost().sum(), leaf, create_graph=graph)[0] * eps).sum()

    want = float(slope([first(eps * (1 + sign * step))[1] for sign in (2, 1, -1, -2)], step))
    leaf, value = first(eps, graph=True)
    got = float((torch.autograd.grad(value, leaf)[0] * eps).sum())
    assert abs(got - want) <= 1e-6 * max(1e-2, abs(want))


def test_gaussians(generator):
    ends = [sbot.Gaussian(torch.randn(2, generator=generator).double(), spd(2, generator)) for _ in range(2)]
    z = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    eps, step = torch.tensor(0.4, dtype=torch.float64), 1e-4
    for ask in (
        lambda bridge: bridge.cost(),
        lambda bridge: bridge.drift(0.4, z).sin().sum(),
        lambda bridge: bridge.log_prob(0.4, z).sum(),
        lambda bridge: bridge.marginal(0.3).cov.sum(),
    ):
        want = slope([ask(sbot.solve_bridge(*ends, eps + sign * step)) for sign in (2, 1, -1, -2)], step)
        torch.testing.assert_close(grad(lambda eps, ask=ask: ask(sbot.solve_bridge(*ends, eps)))(eps), want)


def test_float32_and_what_is_constant(generator):
    x, y = clouds(5, 6, 2, generator)
    slopes = []
    for dtype in (torch.float64, torch.float32):
        eps = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        bridge = sbot.solve_bridge(x.to(dtype), y.to(dtype), eps, solver=sbot.Sinkhorn(tol=1e-5))
        assert not bridge.plan().requires_grad
        assert not bridge.drift(0.3, x.to(dtype)).requires_grad
        assert bridge.differentiable().plan().dtype == dtype
        slopes += [torch.autograd.grad(bridge.cost(), eps)[0], eps.grad]
    assert slopes[1] is None
    torch.testing.assert_close(slopes[0], slopes[2], rtol=1e-4, atol=1e-5)


def test_learned_bridges_refuse(generator):
    x, y = clouds(5, 6, 2, generator)
    eps = torch.tensor(0.3, requires_grad=True)
    for solver in ("lightsb", "dsbm", "plugin"):
        with pytest.raises(sbot.Unsupported, match="eps wants a gradient"):
            sbot.solve_bridge(x, y, eps, solver=solver)


def test_forbidden_pairs(generator):
    """Of the plan, which has no mass there."""
    x, y = clouds(5, 6, 2, generator)
    c = half_squares(x, y)
    c[0, 1:3] = math.inf
    a, b = torch.full((5,), 0.2, dtype=torch.float64), torch.full((6,), 1 / 6, dtype=torch.float64)

    def number(eps):
        bridge = sbot.solve_bridge(a, b, eps, cost=c, solver=TIGHT).differentiable()
        return bridge.plan().square().sum() + bridge.linear_cost()

    eps = torch.tensor(0.3, dtype=torch.float64)
    want = (float(number(eps + 1e-4)) - float(number(eps - 1e-4))) / 2e-4
    assert abs(float(grad(number)(eps)) - want) <= 1e-6 * abs(want)
    eps.requires_grad_()
    assert abs(float(torch.autograd.grad(number(eps), eps)[0]) - want) <= 1e-6 * abs(want)


# ---- torch.func ----------------------------------------------------------------------------------------------------


def functions(generator):
    """Functions of the points that end in a number, and the points."""
    x, y = clouds(5, 6, 2, generator)
    solve = lambda x, **given: sbot.solve_bridge(x, y, 0.3, solver=TIGHT, **given)  # noqa: E731
    return x, {
        "value": lambda x: solve(x).cost(),
        "l1.5": lambda x: solve(x, cost=sbot.Lp(2, power=1.5)).cost(),
        "function": lambda x: solve(x, cost=lambda x, y: torch.cdist(x, y)).cost(),
        "ou": lambda x: solve(x, reference=sbot.OrnsteinUhlenbeck(0.5)).cost(),
        "matrix": lambda x: sbot.solve_bridge(
            [0.2] * 5, [1 / 6] * 6, 0.3, cost=half_squares(x, y), solver=TIGHT
        ).cost(),
        "weights": lambda x: sbot.solve_bridge((x, x[:, 0].softmax(0)), y, 0.3, solver=TIGHT).cost(),
        "relaxed": lambda x: solve(x, relax=1.0).cost(),
        "implicit value": lambda x: solve(x).differentiable().cost(),
        "plan": lambda x: solve(x).differentiable().plan()[0].square().sum(),
        "map": lambda x: solve(x).differentiable().transport().square().sum(),
        "batch": lambda x: (
            sbot.solve_bridge(x.expand(2, 5, 2), y.expand(2, 6, 2), [0.3, 0.1], solver=TIGHT).cost().sum()
        ),
        "drift": lambda x: solve(x.detach()).drift(0.3, x).square().sum(),
    }


@pytest.mark.parametrize("name", list(functions(torch.Generator())[1]))
def test_reverse_mode_transforms_are_autograd(name, generator):
    x, known = functions(generator)
    function = known[name]
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(function(leaf), leaf)
    for got in (
        grad(function)(x),
        vjp(function, x)[1](torch.ones((), dtype=torch.float64))[0],
        jacrev(function, chunk_size=1)(x),
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def test_hessians(generator):
    x, known = functions(generator)
    value = known["implicit value"]
    want = torch.autograd.functional.hessian(value, x)
    torch.testing.assert_close(jacrev(grad(value), chunk_size=1)(x), want, rtol=1e-9, atol=1e-11)
    step, way = 1e-5, torch.rand(x.shape, generator=generator, dtype=torch.float64)
    differences = (grad(value)(x + step * way) - grad(value)(x - step * way)) / (2 * step)
    torch.testing.assert_close((want * way).sum((-2, -1)), differences, rtol=1e-6, atol=1e-7)


def test_eps_under_transforms(generator):
    x, y = clouds(5, 6, 2, generator, (2,))
    for eps in (torch.tensor(0.3), torch.tensor([0.3, 0.2])):
        value = lambda eps: sbot.solve_bridge(x, y, eps, solver=TIGHT).cost().sum()  # noqa: E731
        leaf = eps.double().requires_grad_()
        torch.testing.assert_close(grad(value)(eps.double()), torch.autograd.grad(value(leaf), leaf)[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, in its forward mode
def test_forward_mode_and_vmap_say_what_to_do_instead(generator):
    x, known = functions(generator)
    value, half = known["value"], torch.full((5,), 0.2, dtype=torch.float64)
    eps = torch.tensor(0.3, dtype=torch.float64)
    by_weights = lambda a: sbot.solve_bridge((x, a), x, 0.3).cost()  # noqa: E731
    by_eps = lambda eps: sbot.solve_bridge(x, x, eps).cost()  # noqa: E731
    for call in (
        lambda: jvp(value, (x,), (x,)),
        lambda: jvp(by_weights, (half,), (half,)),
        lambda: jvp(by_eps, (eps,), (eps,)),
        lambda: jacfwd(value)(x),
        lambda: hessian(known["implicit value"])(x),
    ):
        with pytest.raises(sbot.Unsupported, match="reverse-mode"):
            call()
    for call in (
        lambda: vmap(value)(x[None]),
        lambda: vmap(by_eps)(eps[None]),
        lambda: vmap(grad(value))(x[None]),
        lambda: jacrev(value)(x),
        lambda: torch.autograd.functional.hessian(known["implicit value"], x, vectorize=True),
    ):
        with pytest.raises(sbot.Unsupported, match="as a batch"):
            call()
