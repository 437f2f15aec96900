"""The Sinkhorn divergence against plain log-domain solves, closed forms and laws."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import sbot
from sbot import divergence
from sbot.kernels import LogKernel
from sbot.relaxed import damping

from ..conftest import clouds, half_squares, spd, weights

INF = math.inf
TIGHT = sbot.Sinkhorn(tol=1e-11)


def plain(a, b, c, eps, rho=INF):
    """The entropic cost by log-domain half-steps in float64 until nothing moves."""
    lam = 1.0 if math.isinf(rho) else rho / (rho + eps)
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    for _ in range(2000):
        g = -lam * eps * torch.logsumexp(a.log()[:, None] + (f[:, None] - c) / eps, 0)
        new = -lam * eps * torch.logsumexp(b.log() + (g - c) / eps, 1)
        moved, f = float((new - f).abs().max()), new
        if moved < 1e-12:
            break
    f_term, g_term = (u if math.isinf(rho) else -rho * torch.expm1(-u / rho) for u in (f, g))
    total = (a[:, None] * b * torch.exp((f[:, None] + g - c) / eps)).sum()
    return a @ f_term + b @ g_term - eps * (total - a.sum() * b.sum())


def by_definition(a, b, costs, eps, rho=INF):
    xy, xx, yy = costs
    halves = (plain(a, a, xx, eps, rho) + plain(b, b, yy, eps, rho)) / 2
    return plain(a, b, xy, eps, rho) - halves + eps / 2 * (a.sum() - b.sum()) ** 2


def small(generator, n=9, m=12, batch=()):
    x, y = clouds(n, m, 2, generator, batch)
    return x, y, weights(*batch, n, generator=generator), weights(*batch, m, generator=generator)


COSTS = [
    sbot.Quadratic(),
    sbot.Lp(1),
    sbot.Lp(2, power=1.5),
    sbot.Cosine(),
    lambda x, y: -(x @ y.mT),
]


@pytest.mark.parametrize("cost", COSTS, ids=lambda cost: repr(cost).split(" at")[0])
@pytest.mark.parametrize(("eps", "rho"), [(2.0, None), (0.4, None), (0.4, 1.0)])
def test_against_the_definition(cost, eps, rho, dtype, generator):
    x, y, a, b = small(generator)
    if rho is not None:
        a, b = 2 * a, 0.7 * b  # masses that differ
    x, y, a, b = (part.to(dtype) for part in (x, y, a, b))
    got = sbot.sinkhorn_divergence((x, a), (y, b), eps, cost=cost, relax=rho)
    assert got.dtype == dtype
    assert got.shape == ()
    x, y, a, b = (part.double() for part in (x, y, a, b))
    charge = cost.matrix if isinstance(cost, sbot.Cost) else cost
    want = by_definition(a, b, [charge(p, q) for p, q in ((x, y), (x, x), (y, y))], eps, rho or INF)
    # float32 potentials have no part in the error: it is quadratic
    torch.testing.assert_close(got.double(), want, rtol=1e-9 if dtype == torch.float64 else 2e-6, atol=1e-12)
    zero = sbot.sinkhorn_divergence((x.to(dtype), a.to(dtype)), (x.to(dtype), a.to(dtype)), eps, cost=cost, relax=rho)
    assert abs(float(zero)) <= (1e-13 if dtype == torch.float64 else 2e-6) * eps * float(a.sum()) ** 2


@pytest.mark.parametrize("eps", [3.0, 0.3, 0.03])
def test_a_translation_costs_half_its_square(eps, dtype, generator):
    x, _, a, _ = small(generator)
    shift = torch.tensor([3.0, -1.0], dtype=torch.float64)
    x, a, shift = (part.to(dtype) for part in (x, a, shift))
    x.requires_grad_()
    value = sbot.sinkhorn_divergence((x, a), (x.detach() + shift, a), eps)
    torch.testing.assert_close(value.detach(), shift.square().sum() / 2, rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(slope, -a[:, None] * shift, rtol=0, atol=1e-6 if dtype == torch.float64 else 3e-3)


@pytest.mark.parametrize("rho", [None, 0.5])
def test_never_negative_however_far_the_solves_got(rho, dtype, generator):
    for near in (1.0, 1e-2, 1e-4):
        for solver in (sbot.Sinkhorn(max_iter=1), sbot.Sinkhorn(tol=0.3), sbot.Sinkhorn()):
            x, _, a, _b = small(generator, m=9)
            y = x + near * torch.randn(x.shape, generator=generator)
            mass = 1.0 if rho is None else 1 + near
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", sbot.NotConverged)
                value = sbot.sinkhorn_divergence(
                    (x.to(dtype), a.to(dtype)), (y.to(dtype), mass * a.to(dtype)), 0.05, relax=rho, solver=solver
                )
            assert float(value) >= 0


@pytest.mark.parametrize("rho", [None, 1.0])
def test_laws(rho, generator):
    x, y, a, b = small(generator)
    call = lambda mu, nu, eps=0.2, **more: sbot.sinkhorn_divergence(mu, nu, eps, relax=rho, solver=TIGHT, **more)  # noqa: E731
    close = lambda got, want: torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)  # noqa: E731
    value = call((x, a), (y, b))
    close(call((y, b), (x, a)), value)  # symmetric
    order = torch.randperm(9, generator=generator)
    close(call((x[order], a[order]), (y, b)), value)
    close(call((x + 5, a), (y + 5, b)), value)
    split = torch.cat([x, x[:1]]), torch.cat([a[:1] / 3, a[1:], 2 * a[:1] / 3])  # an atom in two
    close(call(split, (y, b)), value)
    assert abs(float(call(split, (x, a)))) < 1e-12  # equal measures, written differently
    far = torch.cat([y, torch.full((1, 2), 50.0)]), torch.cat([b, b.new_zeros(1)])
    close(call((x, a), far), value)  # no weight, no part
    costs = half_squares(x, y), half_squares(x, x), half_squares(y, y)
    close(call(a, b, cost=costs), value)
    close(call((x, a), (y, b), cost=costs), value)
    if rho is None:
        close(call((2 * x, a), (2 * y, b), 0.8), 4 * value)
        close(call((x, 3 * a), (y, 3 * b)), 3 * value)
        close(call(a, b, cost=tuple(c + 1 for c in costs)), value)


@pytest.mark.parametrize("rho", [None, 1.0])
@pytest.mark.parametrize("cost", [None, sbot.Lp(2), "matrices"], ids=str)
def test_batches_are_singles(rho, cost, generator):
    x, y, a, b = small(generator, batch=(3,))
    a = a * torch.tensor([[1.0], [1.0], [1.0]]) if rho is None else a * torch.tensor([[1.0], [2.0], [0.5]])
    mu, nu = sbot.Discrete(x, a), sbot.Discrete(y, b)
    if cost == "matrices":
        three = half_squares(x, y), half_squares(x, x), half_squares(y, y)
        got = sbot.sinkhorn_divergence(mu, nu, 0.1, relax=rho, cost=three)
    else:
        got = sbot.sinkhorn_divergence(mu, nu, 0.1, relax=rho, cost=cost)
    assert got.shape == (3,)
    for k in range(3):
        part = tuple(c[k] for c in three) if cost == "matrices" else cost
        one = sbot.sinkhorn_divergence((x[k], a[k]), (y[k], b[k]), 0.1, relax=rho, cost=part)
        torch.testing.assert_close(got[k], one, rtol=1e-10, atol=1e-13)


def slope_along(value, leaves, generator, step=1e-4):
    """The derivative along a random direction, by autograd and by central differences."""
    ways = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    slopes = torch.autograd.grad(value(*leaves), leaves)
    got = sum((slope * way).sum() for slope, way in zip(slopes, ways, strict=True))
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            ends.append(value(*(leaf + sign * step * way for leaf, way in zip(leaves, ways, strict=True))))
    return got, (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("rho", [None, 1.0])
def test_gradients_in_points_and_weights(rho, generator):
    x, y, a, b = small(generator, 4, 5)
    leaves = [part.requires_grad_() for part in (x, y, a, b)]

    def value(x, y, a, b):
        if rho is None:  # along equal masses
            a, b = a / a.sum(), b / b.sum()
        return sbot.sinkhorn_divergence((x, a), (y, b), 0.3, relax=rho, solver=TIGHT)

    for k in range(4):
        alone = lambda leaf, k=k: value(*(*leaves[:k], leaf, *leaves[k + 1 :]))  # noqa: E731
        torch.testing.assert_close(*slope_along(alone, [leaves[k]], generator, 1e-5), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cost", [sbot.Lp(2), sbot.Cosine(), lambda x, y: -(x @ y.mT)])
def test_gradients_of_other_costs(cost, generator):
    x, y, *_ = small(generator, 4, 5)
    value = lambda x: sbot.sinkhorn_divergence(x, y, 0.3, cost=cost, solver=TIGHT)  # noqa: E731
    torch.testing.assert_close(*slope_along(value, [x.requires_grad_()], generator, 1e-5), rtol=1e-5, atol=1e-7)


def test_gradients_in_cost_matrices(generator):
    x, y, a, b = small(generator, 4, 5)
    costs = [half_squares(x, y), half_squares(x, x), half_squares(y, y)]

    def value(xy, xx, yy):
        return sbot.sinkhorn_divergence(a, b, 0.3, cost=(xy, (xx + xx.mT) / 2, (yy + yy.mT) / 2), solver=TIGHT)

    leaves = [c.requires_grad_() for c in costs]
    torch.testing.assert_close(*slope_along(value, leaves, generator, 1e-5), rtol=1e-5, atol=1e-7)


def test_the_gradient_is_zero_where_the_measures_are_equal(dtype, generator):
    x, _, a, _ = small(generator)
    x, a = x.to(dtype).requires_grad_(), a.to(dtype).requires_grad_()
    value = sbot.sinkhorn_divergence((x, a), (x.detach(), a.detach()), 0.1)
    for slope in torch.autograd.grad(value, (x, a)):
        centred = slope if slope.ndim > 1 else slope - slope.mean()
        assert float(centred.abs().max()) < (1e-7 if dtype == torch.float64 else 1e-3)


@pytest.mark.parametrize("rho", [0.3, 5.0])
@pytest.mark.parametrize("closed", [1, 2])
def test_an_atom_that_may_not_stay_is_lost(rho, closed, generator):
    """Its mass is paid for, as in any other relaxed problem: the definition, term by term."""
    a, b = weights(3, generator=generator), weights(4, generator=generator)
    c_xy, c_xx, c_yy = (torch.rand(n, m, generator=generator, dtype=torch.float64) for n, m in ((3, 4), (3, 3), (4, 4)))
    c_xx, c_yy = c_xx + c_xx.T, c_yy + c_yy.T
    for k in range(closed):
        c_xx[k], c_xx[:, k] = math.inf, math.inf
    solver = sbot.Sinkhorn(tol=1e-12)
    value = sbot.sinkhorn_divergence(a, b, 0.2, cost=(c_xy, c_xx, c_yy), relax=rho, solver=solver)
    across, within_b = (
        sbot.solve_bridge(left, right, 0.2, cost=c, relax=rho, solver=solver).cost()
        for left, right, c in ((a, b, c_xy), (b, b, c_yy))
    )
    free = torch.arange(closed, 3)
    lost = a[:closed].sum()
    # KL(P | mu x mu) has the whole product's mass, of which the atoms that take part know their own only
    within_a = 2 * rho * lost + 0.2 * (a.sum() ** 2 - a[free].sum() ** 2)
    if len(free):
        inner = sbot.solve_bridge(a[free], a[free], 0.2, cost=c_xx[free][:, free], relax=rho, solver=solver)
        within_a = within_a + inner.cost()
    want = across - within_a / 2 - within_b / 2 + 0.1 * (a.sum() - b.sum()) ** 2
    torch.testing.assert_close(value, want, rtol=1e-9, atol=1e-10)


def test_a_batch_shares_its_three_matrices(generator):
    a, b = weights(2, 3, generator=generator), weights(2, 3, generator=generator)
    c = torch.rand(3, 3, generator=generator, dtype=torch.float64)
    c = c + c.T
    both = sbot.sinkhorn_divergence(a, b, 0.3, cost=(c, c, c))
    each = [sbot.sinkhorn_divergence(a[k], b[k], 0.3, cost=(c, c, c)) for k in range(2)]
    torch.testing.assert_close(both, torch.stack(each), rtol=1e-9, atol=1e-12)


def test_a_flow_ends_at_its_target(generator):
    _, y = clouds(1, 20, 2, generator)
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64).requires_grad_()
    values = []
    for _ in range(15):
        value = sbot.sinkhorn_divergence(x, y, 0.05)
        values.append(float(value.detach()))
        (slope,) = torch.autograd.grad(value, x)
        x = (x.detach() - 20 * slope).requires_grad_()
    assert values[-1] < 1e-2 * values[0]


def test_zero_weights_have_finite_gradients(dtype, generator):
    x, y, a, b = small(generator)
    a[2], b[3] = 0, 0
    a, b = a / a.sum(), b / b.sum()
    leaves = [part.to(dtype).requires_grad_() for part in (x, y, a, b)]
    x, y, a, b = leaves
    for rho in (None, 1.0):
        value = sbot.sinkhorn_divergence((x, a), (y, b), 0.2, relax=rho)
        slopes = torch.autograd.grad(value, leaves)
        assert all(bool(torch.isfinite(slope).all()) for slope in slopes)
        assert float(slopes[0][2].abs().max()) == 0


def test_single_and_identical_points(dtype):
    one, two = torch.zeros(1, 2, dtype=dtype), torch.ones(1, 2, dtype=dtype)
    torch.testing.assert_close(sbot.sinkhorn_divergence(one, two, 0.1), torch.ones((), dtype=dtype))
    assert float(sbot.sinkhorn_divergence(one, one, 0.1)) == 0
    assert float(sbot.sinkhorn_divergence(one.expand(4, 2), one, 0.1)) == pytest.approx(0, abs=1e-7)
    got = sbot.sinkhorn_divergence((one, [2.0]), (one, [1.0]), 0.5, relax=1.0)
    assert float(got) > 0


def test_gaussians(generator, dtype):
    mu = sbot.Gaussian(torch.zeros(2, dtype=dtype), spd(2, generator).to(dtype))
    nu = sbot.Gaussian(torch.tensor([1.0, 2.0], dtype=dtype), spd(2, generator).to(dtype))
    value = sbot.sinkhorn_divergence(mu, nu, 0.5)
    assert value.dtype == dtype
    ways = [float(sbot.solve_bridge(p.to(dtype=torch.float64), q.to(dtype=torch.float64), 0.5).cost())
            for p, q in ((mu, nu), (mu, mu), (nu, nu))]  # fmt: skip
    assert float(value) == pytest.approx(ways[0] - (ways[1] + ways[2]) / 2, rel=1e-6)
    assert abs(float(sbot.sinkhorn_divergence(mu, mu, 0.5))) < 1e-7
    # samples are near
    draw = lambda law: law.to(dtype=torch.float64).sample(400, generator=generator)  # noqa: E731
    assert float(sbot.sinkhorn_divergence(draw(mu), draw(nu), 0.5)) == pytest.approx(float(value), rel=0.2)
    # a reference whose paths spread without drift is symmetric
    ve = sbot.LinearSDE.ve(0.5, 1.0)
    assert float(sbot.sinkhorn_divergence(mu, nu, 0.5, reference=ve)) > 0
    mean = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    one = torch.eye(2, dtype=torch.float64)
    value = sbot.sinkhorn_divergence(sbot.Gaussian(mean, one), sbot.Gaussian(torch.ones(2).double(), one), 0.5)
    torch.testing.assert_close(torch.autograd.grad(value, mean)[0], -torch.ones(2, dtype=torch.float64))


def test_self_terms_need_few_passes_at_any_eps(generator):
    x = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    for eps in (10.0, 1.0, 1e-2, 1e-4):
        for cost in (sbot.Quadratic(), sbot.Lp(1)):
            steps = []
            problem = sbot.Problem.of(x, x, eps, cost=cost)
            found = divergence._alone(problem, sbot.Sinkhorn(), 1e-8, steps.append)
            assert found.converged
            assert len(steps) <= 20
            # against the plan of the definition
            p = found.values
            log_p = (p[:, None] + p - cost.matrix(x, x)) / eps - 2 * math.log(300)
            assert float((log_p.exp().sum(1) - 1 / 300).abs().sum()) < 1e-8


def test_self_terms_of_costs_that_are_not_definite(generator):
    # exp(-C / eps) has a negative eigenvalue: going to oneself costs more than going to the other
    c = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    got = sbot.sinkhorn_divergence([0.9, 0.1], half, 0.1, cost=(c, c, c), solver=TIGHT)
    want = by_definition(torch.tensor([0.9, 0.1], dtype=torch.float64), half, (c, c, c), 0.1)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


def test_non_convergence_is_warned_once_and_named(generator):
    x, y = clouds(40, 50, 2, generator)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sbot.sinkhorn_divergence(x, y, 1e-3, solver=sbot.Sinkhorn(max_iter=2))
    assert [item.category for item in caught] == [sbot.NotConverged]
    said = str(caught[0].message)
    assert "(mu, nu) at" in said
    assert caught[0].filename == __file__
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sbot.sinkhorn_divergence(x, x, 10.0, solver=sbot.Sinkhorn(max_iter=2, tol=1e-3))
    assert not caught


def test_progress_and_half_precision(generator):
    x, y = clouds(20, 20, 2, generator)
    seen = []
    value = sbot.sinkhorn_divergence(x.half(), y.half(), 0.5, progress=seen.append)
    assert value.dtype == torch.float16
    assert len(seen) > 3
    want = sbot.sinkhorn_divergence(x.half().double(), y.half().double(), 0.5)
    assert float(value) == pytest.approx(float(want), rel=2e-3)


def test_bad_questions(generator):
    x, y, a, b = small(generator)
    c = half_squares(x, y)
    cases = [
        ({"cost": c}, r"\(C_xy, C_xx, C_yy\)"),
        ({"cost": sbot.MatrixCost(c)}, r"\(C_xy, C_xx, C_yy\)"),
        ({"cost": (c, c, c)}, "cost.1., the matrix within mu"),
        ({"cost": (c, half_squares(x, x), half_squares(y, y).triu())}, "cost.2.*symmetric"),
        ({"cost": (c, half_squares(x, x) * math.nan, half_squares(y, y))}, "cost.1.*NaN"),
        ({"relax": (1.0, 2.0)}, "one number"),
        ({"relax": (INF, 2.0)}, "one number"),
        ({"reference": sbot.OrnsteinUhlenbeck(rate=1.0)}, "Brownian"),
        ({"cost": lambda x, y: (x[..., :, None, :] - 2 * y[..., None, :, :]).square().sum(-1)}, "symmetric"),
        ({"solver": "best"}, "solver"),
    ]
    for options, said in cases:
        with pytest.raises(sbot.InvalidProblem, match=said):
            sbot.sinkhorn_divergence((x, a), (y, b), 0.1, **options)
    with pytest.raises(sbot.InvalidProblem, match="relax the marginals"):
        sbot.sinkhorn_divergence((x, a), (y, 2 * b), 0.1)
    with pytest.raises(sbot.InvalidProblem, match="eps"):
        sbot.sinkhorn_divergence(x, y, 0)
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(sbot.InvalidProblem, match="Brownian"):
        sbot.sinkhorn_divergence(one, one, 0.1, reference=sbot.OrnsteinUhlenbeck(rate=1.0))
    for mu, solver in ((one, "auto"), (one, "sinkhorn"), (one, sbot.LightSB())):
        with pytest.raises(sbot.Unsupported):
            sbot.sinkhorn_divergence(mu, y.float(), 0.1, solver=solver)
    sampler = sbot.Sampler(lambda n, generator: torch.zeros(n, 2))
    with pytest.raises(sbot.Unsupported, match="4096"):
        sbot.sinkhorn_divergence(sampler, sampler, 0.1)


# ---- of a prescribed mass ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("eps", "share"), [(1.0, 0.3), (0.1, 0.8), (0.01, 0.6), (0.1, 1.0)])
def test_partial_divergence_is_three_values_and_never_negative(seed, dtype, eps, share):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 2, generator=generator, dtype=dtype) + k for k, n in enumerate((9, 12)))
    a, b = weights(9, generator=generator).to(dtype), (1.0 + seed / 10) * weights(12, generator=generator).to(dtype)
    mass = share * min(float(a.double().sum()), float(b.double().sum()))
    value = sbot.sinkhorn_divergence((x, a), (y, b), eps, mass=mass)
    assert value.dtype == dtype and float(value) > 0
    wide = [part.double() for part in (x, y, a, b)]
    pairs = [((wide[i], wide[i + 2]), (wide[j], wide[j + 2])) for i, j in ((0, 1), (0, 0), (1, 1))]
    tight = sbot.Sinkhorn(tol=1e-10)
    three = [float(sbot.solve_bridge(*pair, eps, mass=mass, solver=tight).cost()) for pair in pairs]
    want = three[0] - (three[1] + three[2]) / 2 + eps / 2 * float(wide[2].sum() - wide[3].sum()) ** 2
    assert float(value) == pytest.approx(want, rel=1e-4, abs=1e-5 if dtype == torch.float32 else 1e-8)
    order = torch.randperm(9, generator=generator)
    same = sbot.sinkhorn_divergence((x, a), (x[order], a[order]), eps, mass=min(mass, float(a.double().sum())))
    assert 0 <= float(same) < (1e-5 if dtype == torch.float32 else 1e-9)


def test_partial_divergence_does_not_see_what_is_left_behind(generator):
    """Twice the same measure, where nothing is used up: at distance 0, and no less; and all of both is the balanced one."""
    x, y = (torch.randn(8, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    a = weights(8, generator=generator)
    assert abs(float(sbot.sinkhorn_divergence((x, a), (x, 2 * a), 5.0, mass=0.1))) < 1e-9
    whole = sbot.sinkhorn_divergence((x, a), (y, a), 0.1, mass=1.0)
    torch.testing.assert_close(whole, sbot.sinkhorn_divergence((x, a), (y, a), 0.1), rtol=1e-6, atol=1e-9)
    with pytest.raises(sbot.InvalidProblem, match="give 0 < mass <= 1"):
        sbot.sinkhorn_divergence((x, a), (y, 2 * a), 0.1, mass=1.5)


def test_gradients_of_the_partial_divergence(generator):
    inputs = [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (6, 7)]
    inputs += [weights(6, generator=generator), 1.2 * weights(7, generator=generator)]
    inputs.append(torch.tensor(0.6, dtype=torch.float64))
    solver = sbot.Sinkhorn(tol=1e-12)

    def value(x, y, a, b, s):
        return sbot.sinkhorn_divergence((x, a), (y, b), 0.2, mass=s, solver=solver)

    leaves = [part.clone().requires_grad_() for part in inputs]
    grads = torch.autograd.grad(value(*leaves), leaves)
    for k, grad in enumerate(grads):
        way = torch.rand(inputs[k].shape, generator=generator, dtype=torch.float64) - 0.4
        ends = [value(*[p + h * way if j == k else p for j, p in enumerate(inputs)]) for h in (1e-5, -1e-5)]
        assert float((grad * way).sum()) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-7)


def test_partial_divergences_in_a_batch(generator):
    x, y = (torch.randn(2, 6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    mass = torch.tensor([0.3, 0.9], dtype=torch.float64)
    both = sbot.sinkhorn_divergence(x, y, 0.1, mass=mass)
    for k in range(2):
        torch.testing.assert_close(
            both[k], sbot.sinkhorn_divergence(x[k], y[k], 0.1, mass=float(mass[k])), rtol=1e-6, atol=1e-9
        )


@pytest.mark.parametrize("memory", [2**30, 4 * 400**2])
@pytest.mark.parametrize("eps", [0.5, 5e-3])
def test_a_self_term_needs_few_passes_and_no_other_solver(memory, eps, generator, monkeypatch):
    """On laws in double precision, and on rounded ones, that the memory leaves room for."""
    passes = []
    made = divergence._pass
    monkeypatch.setattr(divergence, "_pass", lambda *given: (passes.append(1), made(*given))[1])
    monkeypatch.setattr(divergence, "_as_any_other", lambda *_: pytest.fail("handed to the solver"))
    x, y = clouds(400, 380, 2, generator)
    a, b = weights(400, generator=generator), weights(380, generator=generator)
    solver = sbot.Sinkhorn(tol=1e-10, memory=memory)
    value = sbot.sinkhorn_divergence((x, a), (y, b), eps, solver=solver)
    assert len(passes) <= 10, len(passes)
    costs = [half_squares(*pair) for pair in ((x, y), (x, x), (y, y))]
    terms = [plain(p, q, c, eps) for (p, q), c in zip(((a, b), (a, a), (b, b)), costs, strict=True)]
    assert abs(float(value) - float(terms[0] - (terms[1] + terms[2]) / 2)) <= 1e-8


@pytest.mark.parametrize("cost", [sbot.Quadratic(), sbot.Lp(2)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("relax", [None, 0.7])
def test_a_self_term_of_a_small_problem_is_one_pass(cost, dtype, relax, generator, monkeypatch):
    """The rest is worked out on its laws, and the half-step of what they end at is where it is."""
    x = torch.randn(40, 2, generator=generator, dtype=dtype)
    problem = sbot.Problem.of(x, x, 0.5, cost=cost, relax=relax)
    passes, whole = [], LogKernel.conditionals
    monkeypatch.setattr(LogKernel, "conditionals", lambda *args: passes.append(1) or whole(*args))
    tolerance = math.sqrt(torch.finfo(dtype).eps)
    found = divergence._alone(problem, sbot.Sinkhorn(), tolerance, lambda _: None)
    assert len(passes) == 1 and found.converged and found.error <= tolerance
    p, a = found.values.double(), problem.mu.weights.double()
    c, rho = cost.matrix(x.double(), x.double()), INF if relax is None else relax
    half = -damping(rho, 0.5) * 0.5 * (a.log() + (p - c) / 0.5).logsumexp(-1)
    off = 2 * (a * torch.expm1((p - half) / (damping(rho, 0.5) * 0.5)).abs()).sum()
    assert float(off) <= 1.1 * tolerance
