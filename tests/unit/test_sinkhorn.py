"""Sinkhorn against laws: marginals, duality, symmetry, strategies that agree, gradients by differences."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch

import sbot
from sbot.solvers import sinkhorn
from sbot.solvers.schedule import Schedule

from ..conftest import clouds, half_squares, kl, weights

INF = float("inf")
RELAX = [(INF, INF), (1.0, 1.0), (0.2, 3.0), (INF, 0.5), (2.0, INF)]
STREAM = {"memory": 0}
STORE = {"memory": 2**30}


def marginal_error(plan, a, b):
    return float(((plan.sum(-1) - a).abs().sum(-1) + (plan.sum(-2) - b).abs().sum(-1)).max())


@pytest.mark.parametrize("options", [STORE, STREAM], ids=["stored", "streamed"])
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
@pytest.mark.parametrize("rel", [1e-2, 1e-1, 1.0, 10.0, 1e3])
def test_marginals_to_the_tolerance(options, batch, rel, dtype, device, generator):
    x, y = clouds(30, 40, 2, generator, batch)
    a, b = weights(*batch, 30, generator=generator), weights(*batch, 40, generator=generator)
    eps = rel * float(half_squares(x, y).mean())
    inputs = [(p.to(device, dtype), w.to(device, dtype)) for p, w in ((x, a), (y, b))]
    bridge = sbot.solve_bridge(*inputs, eps, solver=sbot.Sinkhorn(**options))
    report = bridge.report
    assert report.converged
    assert report.error <= report.tolerance
    measured = marginal_error(bridge.plan().double().cpu(), a, b)
    rounding = 1e-13 if dtype == torch.float64 else 1e-4
    assert measured <= report.error * 1.01 + rounding
    assert measured >= report.error * 0.99 - rounding  # the report tells no better and no worse than the truth


@pytest.mark.parametrize("relax", RELAX, ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.1, 0.02])
def test_stored_streamed_and_batched_agree(relax, eps, generator):
    x, y = clouds(20, 25, 2, generator, (2,))
    a, b = weights(2, 20, generator=generator), weights(2, 25, generator=generator)
    solve = lambda x, y, **o: sbot.solve_bridge(x, y, eps, relax=relax, solver=sbot.Sinkhorn(tol=1e-12, **o))  # noqa: E731
    whole = solve((x, a), (y, b), **STORE)
    for i in range(2):
        for options in (STORE, STREAM):
            one = solve((x[i], a[i]), (y[i], b[i]), **options)
            torch.testing.assert_close(one.plan(), whole.plan()[i], rtol=1e-9, atol=1e-13)
            for name in ("cost", "linear_cost"):
                torch.testing.assert_close(getattr(one, name)(), getattr(whole, name)()[i], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(one.potentials().f.values, whole.potentials().f.values[i], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("relax", RELAX, ids=str)
def test_dual_is_primal_within_the_gap(relax, generator):
    """The objective of the plan written out; a loose tolerance leaves a gap that must cover it."""
    x, y = clouds(20, 30, 2, generator)
    a, b = weights(20, generator=generator), weights(30, generator=generator)
    exact = sbot.solve_bridge((x, a), (y, b), 0.05, relax=relax, solver=sbot.Sinkhorn(tol=1e-13))
    for tol in (1e-1, 1e-2, 1e-4, 1e-12):
        bridge = sbot.solve_bridge((x, a), (y, b), 0.05, relax=relax, solver=sbot.Sinkhorn(tol=tol))
        gap, cost = float(bridge.gap()), float(bridge.cost())
        assert gap >= 0
        best = float(exact.cost())
        assert cost <= best + 1e-12
        assert best <= cost + gap + 1e-12
        assert gap <= 10 * bridge.report.error + 1e-12
    plan, c = exact.plan(), half_squares(x, y)
    primal = (plan * c).sum() + 0.05 * kl(plan, a[:, None] * b)
    primal += 0.0 if math.isinf(relax[0]) else relax[0] * kl(plan.sum(1), a)
    primal += 0.0 if math.isinf(relax[1]) else relax[1] * kl(plan.sum(0), b)
    torch.testing.assert_close(exact.cost(), primal, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(exact.linear_cost(), (plan * c).sum(), rtol=1e-12, atol=1e-12)


def test_gap_at_a_loose_tolerance_is_the_rounded_objective(generator):
    """Altschuler's rounding written out, densely."""
    x, y = clouds(12, 15, 2, generator)
    a, b = weights(12, generator=generator), weights(15, generator=generator)
    eps = 0.05
    bridge = sbot.solve_bridge((x, a), (y, b), eps, solver=sbot.Sinkhorn(tol=3e-2))
    plan, c = bridge.plan(), half_squares(x, y)
    p = plan * (a / plan.sum(1)).clamp(max=1)[:, None]
    p = p * (b / p.sum(0)).clamp(max=1)
    ea, eb = (a - p.sum(1)).clamp(min=0), (b - p.sum(0)).clamp(min=0)
    p = p + ea[:, None] * eb / ea.sum()
    primal = (p * c).sum() + eps * kl(p, a[:, None] * b)
    torch.testing.assert_close(bridge.gap(), primal - bridge.cost(), rtol=1e-6, atol=1e-12)
    assert float(bridge.gap()) > 1e-6


@pytest.mark.parametrize("relax", RELAX, ids=str)
def test_swapping_mu_and_nu_transposes(relax, generator):
    x, y = clouds(18, 23, 3, generator)
    a, b = weights(18, generator=generator), weights(23, generator=generator)
    solver = sbot.Sinkhorn(tol=1e-13)
    forth = sbot.solve_bridge((x, a), (y, b), 0.1, relax=relax, solver=solver)
    back = sbot.solve_bridge((y, b), (x, a), 0.1, relax=relax[::-1], solver=solver)
    torch.testing.assert_close(forth.plan(), back.plan().T, rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(forth.cost(), back.cost(), rtol=1e-11, atol=1e-11)
    for p, q in zip(forth.potentials(), back.potentials()[::-1], strict=True):
        torch.testing.assert_close(p.values, q.values, rtol=1e-8, atol=1e-8)
    z = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(forth.log_prob(0.3, z), back.log_prob(0.7, z), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(forth.reverse_drift(0.3, z), back.drift(0.7, z), rtol=1e-8, atol=1e-8)


def test_potentials_off_the_support(generator):
    """The c-transform: at the atoms it is the values, between them the Schroedinger equation."""
    x, y = clouds(15, 20, 2, generator)
    for relax in RELAX:
        bridge = sbot.solve_bridge(x, y, 0.1, relax=relax, solver=sbot.Sinkhorn(tol=1e-13))
        f, g = bridge.potentials()
        torch.testing.assert_close(f(x), f.values, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(g(y), g.values, rtol=1e-8, atol=1e-9)
        z = torch.randn(4, 2, generator=generator, dtype=torch.float64)
        lam = 1.0 if math.isinf(relax[0]) else relax[0] / (relax[0] + 0.1)
        want = -lam * 0.1 * ((g.values - half_squares(z, y)) / 0.1 - math.log(20)).logsumexp(1)
        torch.testing.assert_close(f(z), want, rtol=1e-9, atol=1e-9)


def test_zero_weights_are_atoms_that_are_not_there(dtype, generator):
    x, y = clouds(12, 14, 2, generator)
    a, b = weights(12, generator=generator), weights(14, generator=generator)
    a[[0, 5]], b[[3, 13]] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    for relax in ((INF, INF), (0.5, 2.0)):
        for options in (STORE, STREAM):
            solver = sbot.Sinkhorn(tol=None if dtype == torch.float32 else 1e-12, **options)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                full = sbot.solve_bridge(
                    (x.to(dtype), a.to(dtype)), (y.to(dtype), b.to(dtype)), 0.1, relax=relax, solver=solver
                )
                small = sbot.solve_bridge(
                    (x[a > 0].to(dtype), a[a > 0].to(dtype)),
                    (y[b > 0].to(dtype), b[b > 0].to(dtype)),
                    0.1,
                    relax=relax,
                    solver=solver,
                )
            plan = full.plan()
            assert float(plan[a == 0].abs().max()) == 0
            assert float(plan[:, b == 0].abs().max()) == 0
            close = {"rtol": 1e-8, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-5}
            torch.testing.assert_close(plan[a > 0][:, b > 0], small.plan(), **close)
            f, g = full.potentials()
            assert bool(torch.isfinite(f.values).all() and torch.isfinite(g.values).all())
            torch.testing.assert_close(f.values, f(x.to(dtype)), rtol=1e-3, atol=1e-3)
            assert torch.isfinite(full.gap())


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1)], ids=str)
def test_one_atom(shape, dtype, generator):
    x, y = (t.to(dtype) for t in clouds(*shape, 2, generator))
    bridge = sbot.solve_bridge(x, y, 0.3)
    n, m = shape
    torch.testing.assert_close(bridge.plan(), torch.full(shape, 1 / (n * m), dtype=dtype))
    torch.testing.assert_close(bridge.cost(), half_squares(x, y).mean(), rtol=1e-5, atol=1e-5)
    assert bridge.report.converged


def test_masses_other_than_one(generator):
    """Three times the mass on both sides is three times the plan; the value keeps its mass terms."""
    x, y = clouds(10, 12, 2, generator)
    a, b = weights(10, generator=generator), weights(12, generator=generator)
    one = sbot.solve_bridge((x, a), (y, b), 0.2, solver=sbot.Sinkhorn(tol=1e-12))
    three = sbot.solve_bridge((x, 3 * a), (y, 3 * b), 0.2, solver=sbot.Sinkhorn(tol=1e-12))
    torch.testing.assert_close(three.plan(), 3 * one.plan(), rtol=1e-9, atol=1e-12)
    plan = three.plan()
    want = (plan * half_squares(x, y)).sum() + 0.2 * kl(plan, 9 * a[:, None] * b)
    torch.testing.assert_close(three.cost(), want)
    assert three.sample_pairs(5, generator=generator)[1].shape == (5, 2)


# ---- gradients -----------------------------------------------------------------------------------------------------


def central(function, leaf, h=1e-5):
    out = torch.zeros_like(leaf)
    flat, view = leaf.detach().clone().flatten(), out.flatten()
    for i in range(len(flat)):
        ends = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[i] += sign * h
            ends.append(function(moved.view_as(leaf)))
        view[i] = (ends[0] - ends[1]) / (2 * h)
    return out


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("relax", RELAX, ids=str)
@pytest.mark.parametrize("cost", [None, sbot.Lp(1.5), sbot.Cosine(), lambda x, y: torch.cdist(x, y, p=3)])
@pytest.mark.parametrize("options", [STORE, STREAM], ids=["stored", "streamed"])
def test_gradient_in_the_points(relax, cost, options, generator):
    x, y = clouds(5, 6, 2, generator)

    def value(x, y):
        return sbot.solve_bridge(x, y, 0.3, cost=cost, relax=relax, solver=sbot.Sinkhorn(tol=1e-13, **options)).cost()

    leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
    got = torch.autograd.grad(value(*leaves), leaves)
    assert relative(got[0], central(lambda z: value(z, y), x)) <= 1e-6
    assert relative(got[1], central(lambda z: value(x, z), y)) <= 1e-6


@pytest.mark.parametrize("relax", RELAX, ids=str)
def test_gradient_in_the_weights(relax, generator):
    """Along directions that keep the mass where the mass is fixed; an atom of zero weight has a gradient too."""
    x, y = clouds(6, 7, 2, generator)
    a, b = weights(6, generator=generator), weights(7, generator=generator)

    def value(a, b):
        return sbot.solve_bridge((x, a), (y, b), 0.3, relax=relax, solver=sbot.Sinkhorn(tol=1e-13)).cost()

    leaves = [a.clone().requires_grad_(), b.clone().requires_grad_()]
    grads = torch.autograd.grad(value(*leaves), leaves)
    for k, grad in enumerate(grads):
        direction = torch.randn(len(grad), generator=generator, dtype=torch.float64)
        direction -= direction.mean()
        h = 1e-5
        ends = []
        for sign in (1, -1):
            moved = [a.clone(), b.clone()]
            moved[k] += sign * h * direction
            ends.append(float(value(*moved)))
        difference = (ends[0] - ends[1]) / (2 * h)
        assert abs(float(grad @ direction) - difference) <= 1e-6 * abs(difference)


def test_gradient_at_a_zero_weight_is_the_one_sided_derivative(generator):
    x, y = clouds(6, 7, 2, generator)
    a = weights(6, generator=generator)
    a[2] = 0
    a = a / a.sum()

    def value(a):
        return sbot.solve_bridge((x, a), y, 0.3, solver=sbot.Sinkhorn(tol=1e-13)).cost()

    leaf = a.clone().requires_grad_()
    (grad,) = torch.autograd.grad(value(leaf), leaf)
    assert bool(torch.isfinite(grad).all())
    direction = torch.tensor([-1.0, 0, 1, 0, 0, 0]).double()
    h = 1e-6
    difference = (-3 * value(a) + 4 * value(a + h * direction) - value(a + 2 * h * direction)) / (2 * h)
    assert float(grad @ direction) == pytest.approx(float(difference), rel=1e-4)


@pytest.mark.parametrize("relax", RELAX, ids=str)
def test_gradient_in_the_cost_matrix_is_the_plan(relax, generator):
    c = torch.rand(6, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    a, b = weights(6, generator=generator), weights(7, generator=generator)
    bridge = sbot.solve_bridge(a, b, 0.1, cost=c, relax=relax, solver=sbot.Sinkhorn(tol=1e-13))
    (grad,) = torch.autograd.grad(bridge.cost(), c)
    torch.testing.assert_close(grad, bridge.plan(), rtol=1e-8, atol=1e-12)
    value = lambda m: sbot.solve_bridge(a, b, 0.1, cost=m, relax=relax, solver=sbot.Sinkhorn(tol=1e-13)).cost()  # noqa: E731
    assert relative(grad, central(value, c)) <= 1e-6


def test_gradient_through_the_plan_s_functions(generator):
    """transport, drift and log_prob are differentiable in the place where they are asked."""
    x, y = clouds(9, 8, 2, generator)
    bridge = sbot.solve_bridge(x, y, 0.5)
    z = torch.randn(2, 2, generator=generator, dtype=torch.float64)
    for function in (
        lambda z: bridge.transport(z).sin().sum(),
        lambda z: bridge.drift(0.4, z).sin().sum(),
        lambda z: bridge.log_prob(0.4, z).sum(),
    ):
        leaf = z.clone().requires_grad_()
        (got,) = torch.autograd.grad(function(leaf), leaf)
        assert relative(got, central(function, z)) <= 1e-6


# ---- behaviour -----------------------------------------------------------------------------------------------------


def test_non_convergence_is_said_and_can_be_continued(generator):
    x, y = clouds(40, 50, 2, generator)
    with pytest.warns(
        sbot.NotConverged, match=r"stopped \(max_iter\) after 20 iterations at marginal error .* init=bridge"
    ):
        short = sbot.solve_bridge(x, y, 0.1, solver=sbot.Sinkhorn(max_iter=20))
    assert not short.report.converged
    assert short.report.reason == "max_iter"
    assert short.report.iterations == 20
    cold = sbot.solve_bridge(x, y, 0.1, solver=sbot.Sinkhorn(tol=1e-6))
    warm = sbot.solve_bridge(x, y, 0.1, solver=sbot.Sinkhorn(tol=1e-6), init=short)
    again = sbot.solve_bridge(x, y, 0.1, solver=sbot.Sinkhorn(tol=1e-6), init=cold)
    assert warm.report.converged
    assert warm.report.iterations < cold.report.iterations
    assert again.report.iterations <= 1
    torch.testing.assert_close(warm.plan(), cold.plan(), rtol=1e-2, atol=1e-6)


def test_warm_start_from_other_atoms_and_other_families(generator):
    x, y = clouds(60, 60, 2, generator)
    x2, y2 = clouds(50, 70, 2, generator)
    near = sbot.solve_bridge(x2, y2, 0.1)
    gaussian = sbot.solve_bridge(sbot.Gaussian.from_samples(x), sbot.Gaussian.from_samples(y), 0.1)
    want = sbot.solve_bridge(x, y, 0.1, solver=sbot.Sinkhorn(tol=1e-12)).plan()
    for init in (near, gaussian):
        got = sbot.solve_bridge(x, y, 0.1, init=init, solver=sbot.Sinkhorn(tol=1e-12)).plan()
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-13)
    with pytest.raises(sbot.InvalidProblem, match="init is str"):
        sbot.solve_bridge(x, y, 0.1, init="zeros")


def test_annealing_changes_the_way_not_the_end(generator):
    x, y = clouds(40, 50, 2, generator)
    plans = [
        sbot.solve_bridge(x, y, 0.02, solver=sbot.Sinkhorn(tol=1e-12, anneal=anneal)).plan()
        for anneal in (None, Schedule(), Schedule(factor=0.5, tolerance=1e-1))
    ]
    for plan in plans[1:]:
        torch.testing.assert_close(plan, plans[0], rtol=1e-8, atol=1e-13)


def test_schedule_ends_on_the_problem():
    stages = list(Schedule(0.25, 1e-2).stages(3.0, 0.01, 1e-9))
    assert stages[-1] == (0.01, 1e-9)
    ratios = [b[0] / a[0] for a, b in itertools.pairwise(stages)]
    assert all(0.25 - 1e-12 <= r < 1 for r in ratios)
    assert max(ratios) - min(ratios) < 1e-12
    assert list(Schedule().stages(0.0, 1.0, 1e-9)) == [(1.0, 1e-9)]


def test_bad_schedules():
    for options in ({"factor": 1.0}, {"factor": 0.0}, {"tolerance": 0.0}, {"tolerance": float("inf")}):
        with pytest.raises(sbot.InvalidProblem, match="is no schedule"):
            Schedule(**options)


def test_tolerance_the_dtype_cannot_reach_is_raised_and_said(generator):
    x, y = (t.float() for t in clouds(20, 20, 2, generator))
    with pytest.warns(sbot.PrecisionWarning, match="tolerance raised from 1.0e-09 to .* float32"):
        bridge = sbot.solve_bridge(x, y, 0.1, solver=sbot.Sinkhorn(tol=1e-9))
    assert bridge.report.tolerance > 1e-9
    assert any("tolerance raised" in note for note in bridge.report.notes)


def test_progress_is_shown_and_can_stop(generator):
    x, y = clouds(30, 30, 2, generator)
    seen = []
    bridge = sbot.solve_bridge(x, y, 0.05, progress=seen.append)
    assert [(p.iteration, p.eps, p.error) for p in seen] == list(bridge.report.history)
    assert seen[-1].error == bridge.report.error

    def stop(state):
        raise KeyboardInterrupt

    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        sbot.solve_bridge(x, y, 0.05, progress=stop)
    after = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_rng_state()
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_progress_bar(capsys, generator):
    x, y = clouds(10, 10, 2, generator)
    sbot.solve_bridge(x, y, 0.5, progress=True)
    assert "Sinkhorn" in capsys.readouterr().err
    with pytest.raises(sbot.InvalidProblem, match="progress is 'yes'"):
        sbot.solve_bridge(x, y, 0.5, progress="yes")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tol": -1.0}, "tol is -1.0"),
        ({"tol": float("nan")}, "tol is NaN"),
        ({"tol": "tight"}, "tol must be a real number"),
        ({"max_iter": 0}, "max_iter must be an integer >= 1"),
        ({"max_iter": 1.5}, "max_iter must be an integer"),
        ({"memory": -1}, "memory must be an integer >= 0"),
        ({"anneal": True}, "anneal is True"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(sbot.InvalidProblem, match=match):
        sbot.Sinkhorn(**options)
    with pytest.raises(TypeError):
        sbot.Sinkhorn(tolerence=1e-3)


def test_forbidden_pairs(generator):
    c = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    c[0, 1], c[3, 2], c[3, 4] = torch.inf, torch.inf, torch.inf
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    bridge = sbot.solve_bridge(uniform, uniform, 0.1, cost=c, solver=sbot.Sinkhorn(tol=1e-10))
    torch.testing.assert_close(bridge.plan().sum(1), uniform)
    plan = bridge.plan()
    assert float(plan[~torch.isfinite(c)].abs().max()) == 0
    assert torch.isfinite(bridge.cost())
    assert torch.isfinite(bridge.linear_cost())
    leaf = c.clone().requires_grad_()
    (grad,) = torch.autograd.grad(sbot.solve_bridge(uniform, uniform, 0.1, cost=leaf).cost(), leaf)
    assert bool(torch.isfinite(grad).all())


def test_warnings_point_at_the_caller(generator):
    """So that filters by module, and once for each place, work as everywhere."""
    x, y = clouds(20, 20, 2, generator)
    with pytest.warns(sbot.NotConverged) as caught:
        sbot.solve_bridge(x, y, 0.01, solver=sbot.Sinkhorn(max_iter=2))
    assert [one.filename for one in caught] == [__file__]
    with pytest.warns(sbot.PrecisionWarning) as caught:
        sbot.solve_bridge(x.float(), y.float(), 0.5, solver=sbot.Sinkhorn(tol=1e-9))
    assert {one.filename for one in caught} == {__file__}


@pytest.mark.parametrize(("rel", "passes"), [(0.1, True), (0.02, False)])
def test_at_mild_eps_one_pass_is_enough(rel, passes, generator, monkeypatch):
    """There the model is in double precision, lacks nothing, and no pass has to confirm it; also from a start."""
    models, plain = [], sinkhorn.Conditionals
    monkeypatch.setattr(
        sinkhorn, "Conditionals", lambda *given, **more: models.append(plain(*given, **more)) or models[-1]
    )
    x = torch.randn(700, 2, generator=generator, dtype=torch.float64)
    y = torch.randn(700, 2, generator=generator, dtype=torch.float64)
    mean = float(torch.cdist(x, y).square().mean()) / 2
    bridge = sbot.solve_bridge(x, y, rel * mean)
    for one in (bridge, sbot.solve_bridge(x, y, rel * mean * 0.99, init=bridge)):
        assert any("; 1 passes" in note for note in one.report.notes) == passes
    assert [model.dense.dtype == torch.float64 for model in models] == [passes] * 2


@pytest.mark.parametrize("tiny", [1e-20, 1e-25, 1e-35])
@pytest.mark.parametrize(("size", "eps"), [(50, 0.05), (200, 0.016), (600, 0.0016), (600, 0.05)])
def test_a_weight_far_below_rounding_stands_in_nobody_s_way(tiny, size, eps, dtype, generator):
    """The entries of its column are too small for a model in single precision, and what the pass found stands for them."""
    x, y = torch.rand(size, 2, generator=generator, dtype=dtype), torch.rand(size, 2, generator=generator, dtype=dtype)
    b = torch.full((size,), 1 / size, dtype=dtype)
    alone = sbot.solve_bridge(x, y, eps)
    b[0] = tiny
    bridge = sbot.solve_bridge(x, (y, b / b.sum()), eps)
    assert bridge.report.converged
    # in single precision there is no arithmetic below 1e-38: such a column is worked out in the log domain, pass by pass
    if tiny > 1e-30 or dtype == torch.float64:
        assert bridge.report.iterations <= 1.2 * alone.report.iterations + 10


@pytest.mark.parametrize("far", [5.0, 7.0, 10.0, 12.0])
@pytest.mark.parametrize("rho", [0.1, 1.0])
def test_an_atom_that_is_too_far_to_be_worth_any_mass(far, rho, generator):
    x = torch.rand(600, 2, generator=generator, dtype=torch.float64)
    y = torch.rand(600, 2, generator=generator, dtype=torch.float64)
    y[0] += far
    bridge = sbot.solve_bridge(x, y, 0.01, relax=rho)
    assert bridge.report.converged
    assert float(bridge.gap()) <= 1e-7
