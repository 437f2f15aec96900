"""Laws that hold for every problem: hypothesis draws the shapes, weights, scales and eps."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sbot

from .conftest import half_squares, kl, weights

INF = math.inf
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


#: The whole range: eps from a thousandth to a hundred times the mean cost, any unit of length, atoms without weight.
wide = st.fixed_dictionaries(
    {
        "n": st.integers(1, 9),
        "m": st.integers(1, 9),
        "d": st.integers(1, 4),
        "seed": st.integers(0, 10_000),
        "rel": st.floats(-3, 2).map(lambda e: 10**e),
        "scale": st.floats(-6, 6).map(lambda e: 10**e),
        "zeros": st.booleans(),
        "relax": st.sampled_from([(INF, INF), (1.0, 1.0), (INF, 0.7), (0.4, INF), (0.2, 5.0)]),
    }
)


def spread(p, batch=()):
    """Points, weights and the strengths of relaxation in units of the mean cost, and that as the unit."""
    gen = torch.Generator().manual_seed(p["seed"])
    x = p["scale"] * torch.randn(*batch, p["n"], p["d"], generator=gen, dtype=torch.float64)
    y = p["scale"] * (torch.randn(*batch, p["m"], p["d"], generator=gen, dtype=torch.float64) + 0.5)
    a, b = weights(*batch, p["n"], generator=gen), weights(*batch, p["m"], generator=gen)
    if p["zeros"]:
        a[..., 1:2], b[..., 3:5] = 0, 0
    a, b = a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True)
    unit = float(half_squares(x, y).mean())
    return x, a, y, b, unit, gen


def settled(p, mu, nu, unit, memory=2**30, **options):
    """Solved as far as the dtype allows, and converged: every law below starts from this."""
    relax = tuple(r * unit for r in p["relax"])
    solver = sbot.Sinkhorn(tol=1e-11, max_iter=50_000, memory=memory)
    bridge = sbot.solve_bridge(mu, nu, options.pop("eps", p["rel"] * unit), relax=relax, solver=solver, **options)
    assert bridge.report.converged
    return bridge


def same(one, two, unit, place=lambda plan: plan):
    """The plan and the value of ``two``, with its atoms put in their place, are those of ``one``."""
    close(place(two.plan()), one.plan())
    close(two.cost() / unit, one.cost() / unit)


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
@given(wide)
def test_permuting_atoms_permutes_the_plan(p):
    x, a, y, b, unit, gen = spread(p)
    i, j = torch.randperm(p["n"], generator=gen), torch.randperm(p["m"], generator=gen)
    one, two = settled(p, (x, a), (y, b), unit), settled(p, (x[i], a[i]), (y[j], b[j]), unit)
    same(one, two, unit, lambda plan: plan[i.argsort()][:, j.argsort()])


@laws
@given(wide)
def test_swapping_the_ends_transposes_the_plan(p):
    x, a, y, b, unit, _ = spread(p)
    one = settled(p, (x, a), (y, b), unit)
    two = settled({**p, "relax": p["relax"][::-1]}, (y, b), (x, a), unit)
    same(one, two, unit, lambda plan: plan.T)


@laws
@given(wide, st.floats(-1e3, 1e3))
def test_translation_changes_nothing(p, shift):
    x, a, y, b, unit, _ = spread(p)
    shift *= p["scale"]
    same(settled(p, (x, a), (y, b), unit), settled(p, (x + shift, a), (y + shift, b), unit), unit)


@laws
@given(wide, st.floats(-5, 5))
def test_a_constant_in_the_cost(p, constant):
    """Balanced: the plan stays and the value moves by the constant."""
    x, a, y, b, unit, _ = spread(p)
    p, c = {**p, "relax": (INF, INF)}, half_squares(x, y)
    one, two = (settled(p, a, b, unit, cost=m) for m in (c, c + constant * unit))
    close(two.plan(), one.plan())
    close(two.cost() / unit, one.cost() / unit + constant)


@laws
@given(wide, st.floats(0.1, 0.9))
def test_duplicate_points_share_the_mass_of_one(p, share):
    """On both sides at once, the copies of any weight, and one of none."""
    x, a, y, b, unit, _ = spread(p)
    x2, a2 = torch.cat([x, x[:1], x[:1]]), torch.cat([a, a[:1] * (1 - share), 0 * a[:1]])
    y2, b2 = torch.cat([y, y[:1]]), torch.cat([b, b[:1] * share])
    a2[0], b2[0] = a[0] * share, b[0] * (1 - share)

    def merged(plan):
        plan = torch.cat([plan[:1] + plan[-2:].sum(0), plan[1:-2]])
        return torch.cat([plan[:, :1] + plan[:, -1:], plan[:, 1:-1]], 1)

    one, two = settled(p, (x, a), (y, b), unit), settled(p, (x2, a2), (y2, b2), unit)
    same(one, two, unit, merged)
    assert float(two.plan()[-1].abs().max()) == 0


@laws
@given(wide, st.floats(1.1, 30.0))
def test_the_value_grows_with_eps_and_no_plan_is_below_the_dual(p, factor):
    x, a, y, b, unit, _ = spread(p)
    one = settled(p, (x, a), (y, b), unit)
    two = settled(p, (x, a), (y, b), unit, eps=factor * p["rel"] * unit)
    assert float(one.cost()) <= float(two.cost()) + 1e-9 * unit
    independent = a[:, None] * b
    hard = [math.isinf(r) for r in p["relax"]]
    for bridge in (one, two):
        assert float(bridge.gap()) <= 1e-8 * (unit + bridge.problem.eps)
        for other in (one.plan(), two.plan(), independent):
            value = float((other * half_squares(x, y)).sum()) + bridge.problem.eps * float(kl(other, independent))
            for soft, r, marginal, target in zip(hard, p["relax"], (other.sum(1), other.sum(0)), (a, b), strict=True):
                value += 0.0 if soft else r * unit * float(kl(marginal, target))
            assert float(bridge.cost()) <= value + 1e-9 * (unit + bridge.problem.eps)


@laws
@given(wide, st.integers(1, 4), st.booleans())
def test_a_batch_is_its_problems(p, count, own_eps):
    x, a, y, b, unit, _ = spread(p, (count,))
    eps = p["rel"] * unit * torch.logspace(0, 1, count, dtype=torch.float64)
    eps = eps if own_eps else float(eps[0])
    batch = settled(p, (x, a), (y, b), unit, eps=eps)
    for k in range(count):
        alone = settled(p, (x[k], a[k]), (y[k], b[k]), unit, eps=float(eps[k]) if own_eps else eps)
        close(batch.plan()[k], alone.plan())
        close(batch.cost()[k] / unit, alone.cost() / unit)
        same(alone, batch[k], unit)


@laws
@given(wide, st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4))
def test_ragged_is_padded_is_alone(p, sizes):
    """Padding by hand: far away, and without weight."""
    parts = [spread({**p, "n": n, "m": m, "seed": p["seed"] + k}) for k, (n, m) in enumerate(sizes)]
    unit = max(part[4] for part in parts)
    ends = [[part[k] for part in parts] for k in range(4)]
    ragged = settled(p, *(sbot.Discrete.from_list(*ends[k : k + 2]) for k in (0, 2)), unit)

    def padded(points, mass):
        most = max(map(len, points))
        full = torch.stack([torch.cat([q, q.mean(0).expand(most - len(q), -1) + p["scale"]]) for q in points])
        return full, torch.stack([torch.cat([w, w.new_zeros(most - len(w))]) for w in mass])

    whole = settled(p, *(padded(*ends[k : k + 2]) for k in (0, 2)), unit)
    for k, (n, m) in enumerate(sizes):
        x, a, y, b, _, _ = parts[k]
        alone = settled(p, (x, a), (y, b), unit)
        for other in (ragged, whole):
            close(other.plan()[k, :n, :m], alone.plan())
            close(other.cost()[k] / unit, alone.cost() / unit)
            assert float(other.plan()[k, n:].abs().sum() + other.plan()[k, :, m:].abs().sum()) == 0
        same(alone, ragged[k], unit)


@laws
@given(wide, st.sampled_from(["quadratic", "l1", "matrix"]))
def test_streamed_is_stored(p, name):
    x, a, y, b, _, _ = spread(p)
    c = sbot.Lp(1).matrix(x, y) if name == "l1" else half_squares(x, y)
    unit = float(c.mean())
    ends = (a, b) if name == "matrix" else ((x, a), (y, b))
    cost = {"quadratic": None, "l1": sbot.Lp(1), "matrix": c}[name]
    one, two = (settled(p, *ends, unit, memory, cost=cost) for memory in (2**30, 0))
    same(one, two, unit)
    v = torch.linspace(-1, 1, p["m"], dtype=torch.float64)
    close(two.apply(v), one.plan() @ v)
    close(two.linear_cost() / unit, one.linear_cost() / unit)


@laws
@given(wide, st.sampled_from([1e-12, 1e-3, 1e3, 1e12]))
def test_scaling(p, s):
    """Points by s, eps and relaxation by s^2: the same plan, the value by s^2, the drift by s."""
    x, a, y, b, unit, _ = spread(p)
    one, two = settled(p, (x, a), (y, b), unit), settled(p, (s * x, a), (s * y, b), s**2 * unit)
    close(two.plan(), one.plan())
    close(two.cost() / s**2 / unit, one.cost() / unit)
    close(two.drift(0.5, s * x) / s / p["scale"], one.drift(0.5, x) / p["scale"], 1e-6)


@laws
@given(wide, st.floats(0.1, 0.9))
def test_splitting_an_atom_splits_its_row(p, share):
    x, a, y, b, unit, _ = spread(p)
    x2, a2 = torch.cat([x, x[:1]]), torch.cat([a, a[:1] * (1 - share)])
    a2[0] = a[0] * share
    one, two = settled(p, (x, a), (y, b), unit), settled(p, (x2, a2), (y, b), unit)
    same(one, two, unit, lambda plan: torch.cat([plan[:1] + plan[-1:], plan[1:-1]]))
    z = x + 0.1 * p["scale"]
    close(two.transport(z) / p["scale"], one.transport(z) / p["scale"], 1e-6)


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
