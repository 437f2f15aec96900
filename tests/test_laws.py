"""Laws that hold for every problem: hypothesis draws the shapes, weights, scales and eps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sbot

from .conftest import half_squares, kl, weights

INF = float("inf")
TIGHT = sbot.Sinkhorn(tol=1e-11, max_iter=50_000)
laws = settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

problems = st.fixed_dictionaries(
    {
        "n": st.integers(1, 9),
        "m": st.integers(1, 9),
        "d": st.integers(1, 4),
        "seed": st.integers(0, 10_000),
        "eps": st.floats(0.1, 10.0),
        "relax": st.sampled_from([(INF, INF), (1.0, 1.0), (INF, 0.7), (0.4, INF), (0.2, 5.0)]),
    }
)


def make(p):
    gen = torch.Generator().manual_seed(p["seed"])
    x = torch.randn(p["n"], p["d"], generator=gen, dtype=torch.float64)
    y = torch.randn(p["m"], p["d"], generator=gen, dtype=torch.float64) + 0.5
    return x, weights(p["n"], generator=gen), y, weights(p["m"], generator=gen), gen


def solve(x, a, y, b, eps, relax, **options):
    return sbot.solve_bridge((x, a), (y, b), eps, relax=relax, solver=TIGHT, **options)


def close(a, b, tolerance=1e-8):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@laws
@given(problems)
def test_permuting_atoms_permutes_the_plan(p):
    x, a, y, b, gen = make(p)
    i, j = torch.randperm(p["n"], generator=gen), torch.randperm(p["m"], generator=gen)
    one, two = solve(x, a, y, b, p["eps"], p["relax"]), solve(x[i], a[i], y[j], b[j], p["eps"], p["relax"])
    close(two.plan(), one.plan()[i][:, j])
    close(two.cost(), one.cost())


@laws
@given(problems, st.floats(-1e3, 1e3))
def test_translation_changes_nothing(p, shift):
    x, a, y, b, _ = make(p)
    close(
        solve(x + shift, a, y + shift, b, p["eps"], p["relax"]).plan(), solve(x, a, y, b, p["eps"], p["relax"]).plan()
    )


@laws
@given(problems, st.sampled_from([1e-12, 1e-3, 1e3, 1e12]))
def test_scaling(p, s):
    """Points by s, eps and relaxation by s^2: the same plan, the value by s^2, the drift by s."""
    x, a, y, b, _ = make(p)
    one = solve(x, a, y, b, p["eps"], p["relax"])
    two = solve(s * x, a, s * y, b, s**2 * p["eps"], tuple(s**2 * r for r in p["relax"]))
    close(two.plan(), one.plan())
    close(two.cost() / s**2, one.cost())
    close(two.drift(0.5, s * x) / s, one.drift(0.5, x), 1e-6)


@laws
@given(problems, st.floats(-5, 5))
def test_a_constant_in_the_cost(p, constant):
    """Balanced: the plan stays and the value moves by the constant."""
    x, a, y, b, _ = make(p)
    c = half_squares(x, y)
    one, two = (sbot.solve_bridge(a, b, p["eps"], cost=m, solver=TIGHT) for m in (c, c + constant))
    close(two.plan(), one.plan())
    close(two.cost(), one.cost() + constant)


@laws
@given(problems, st.floats(0.1, 0.9))
def test_splitting_an_atom_splits_its_row(p, share):
    x, a, y, b, _ = make(p)
    x2, a2 = torch.cat([x, x[:1]]), torch.cat([a, a[:1] * (1 - share)])
    a2[0] = a[0] * share
    one, two = solve(x, a, y, b, p["eps"], p["relax"]), solve(x2, a2, y, b, p["eps"], p["relax"])
    close(two.plan()[0] + two.plan()[-1], one.plan()[0])
    close(two.cost(), one.cost())
    z = x + 0.1
    close(two.transport(z), one.transport(z))


@laws
@given(problems)
def test_weak_duality_and_monotonicity_in_eps(p):
    """Any feasible plan costs at least the dual; the entropic value grows with eps."""
    x, a, y, b, _ = make(p)
    c = half_squares(x, y)
    values = []
    for eps in (p["eps"], 1.7 * p["eps"]):
        bridge = solve(x, a, y, b, eps, p["relax"])
        independent = a[:, None] * b
        assert float(bridge.cost()) <= float((independent * c).sum()) + 1e-9
        values.append(float(bridge.cost()))
        assert float(bridge.gap()) < 1e-8
    assert values[0] <= values[1] + 1e-9


@laws
@given(problems)
def test_any_other_plan_is_worse(p):
    """Move mass around a 2 x 2 corner: marginals stay, the objective may only rise."""
    x, a, y, b, gen = make(p)
    if min(p["n"], p["m"]) < 2:
        return
    bridge = solve(x, a, y, b, p["eps"], (INF, INF))
    plan, c = bridge.plan(), half_squares(x, y)
    objective = lambda q: float((q * c).sum() + p["eps"] * kl(q, a[:, None] * b))  # noqa: E731
    i, j = torch.randperm(p["n"], generator=gen)[:2], torch.randperm(p["m"], generator=gen)[:2]
    corner = plan[i][:, j]
    for sign in (1, -1):
        step = 0.3 * float(corner.min())
        other = plan.clone()
        other[i[0], j[0]] += sign * step
        other[i[1], j[1]] += sign * step
        other[i[0], j[1]] -= sign * step
        other[i[1], j[0]] -= sign * step
        assert objective(other) >= objective(plan) - 1e-12


@laws
@given(problems)
def test_the_process_starts_and_ends_in_the_plan(p):
    """The density integrates to the mass, by importance sampling from the pinned mixture itself is circular: use a grid."""
    p = {**p, "d": 1}
    x, a, y, b, _ = make(p)
    bridge = solve(x, a, y, b, p["eps"], p["relax"])
    wide = 6 * math.sqrt(p["eps"]) + 6
    z = torch.linspace(-wide, wide, 4001, dtype=torch.float64)[:, None]
    for t in (0.3, 0.7):
        total = bridge.log_prob(t, z).exp().sum() * float(z[1, 0] - z[0, 0])
        assert float(total) == pytest.approx(float(bridge.plan().sum()), rel=1e-6)


@laws
@given(problems)
def test_drift_is_the_gradient_of_the_h_transform(p):
    """eps grad log psi_t by autograd, and the continuity of forward and reverse drifts: u + v = eps grad log p_t."""
    x, a, y, b, gen = make(p)
    bridge = solve(x, a, y, b, p["eps"], p["relax"])
    z = torch.randn(3, p["d"], generator=gen, dtype=torch.float64, requires_grad=True)
    t = 0.4
    (score,) = torch.autograd.grad(bridge.log_prob(t, z).sum(), z)
    z = z.detach()
    close(bridge.drift(t, z) + bridge.reverse_drift(t, z), p["eps"] * score, 1e-7)


@laws
@given(problems)
def test_the_map_is_a_projection_of_the_plan(p):
    x, a, y, b, _ = make(p)
    bridge = solve(x, a, y, b, p["eps"], p["relax"])
    plan = bridge.plan()
    close(bridge.transport(x), plan @ y / plan.sum(1, keepdim=True))
    close(bridge.transport(), bridge.transport(x))
    close(bridge.drift(0.0, x), bridge.transport(x) - x, 1e-7)
