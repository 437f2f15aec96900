"""The drop-in for GeomLoss: its units, shapes and conventions, against plain iterations, differences and GeomLoss itself."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

import sbot
from sbot.compat.geomloss import SamplesLoss, ot

from ..conftest import clouds, half_squares, weights

TIGHT = sbot.Sinkhorn(tol=1e-12)


@pytest.fixture
def sample(generator):
    x, y = clouds(14, 17, 2, generator)
    return weights(14, generator=generator), x / 3, weights(17, generator=generator), y / 3


def costs(p, x, y):
    return half_squares(x, y) if p == 2 else (2 * half_squares(x, y)).sqrt()


def dual(a, b, c, eps, rho=None):
    """Converged potentials and the value ``OT`` by a plain log-domain iteration."""
    f, g = torch.zeros_like(a), torch.zeros_like(b)
    damp = 1.0 if rho is None else rho / (rho + eps)
    for _ in range(20_000):
        before = f
        g = -damp * eps * torch.logsumexp(a.log()[:, None] + (f[:, None] - c) / eps, 0)
        f = -damp * eps * torch.logsumexp(b.log() + (g - c) / eps, 1)
        if float((f - before).abs().max()) < 1e-14:
            break
    plan = a[:, None] * b * torch.exp((f[:, None] + g - c) / eps)

    def kl(p, q):
        return (p * (p / q).log() - p + q).sum()

    value = (plan * c).sum() + eps * kl(plan, a[:, None] * b)
    if rho is not None:
        value = value + rho * kl(plan.sum(1), a) + rho * kl(plan.sum(0), b)
    return f, g, value


# ---- SamplesLoss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.6])
def test_units_are_geomloss_s(sample, p, reach):
    a, x, b, y = sample
    blur = 0.3 if p == 2 else 0.5
    eps, rho = blur**p, None if reach is None else reach**p
    f, g, across = dual(a, b, costs(p, x, y), eps, rho)
    own = [dual(w, w, costs(p, z, z), eps, rho) for w, z in ((a, x), (b, y))]
    loss = SamplesLoss(p=p, blur=blur, reach=reach, debias=False)
    torch.testing.assert_close(loss(a, x, b, y), across, rtol=1e-9, atol=1e-12)
    loss.debias = True
    torch.testing.assert_close(loss(a, x, b, y), across - (own[0][2] + own[1][2]) / 2, rtol=1e-8, atol=1e-12)
    loss.potentials = True
    got = loss(a, x, b, y)
    for mine, whole, part in zip(got, (f, g), (own[0][0] + own[0][1], own[1][0] + own[1][1]), strict=True):
        off = mine - (whole - part / 2)
        if reach is None:
            off = off - off.mean()  # a constant is free
        assert float(off.abs().max()) < 1e-6


@pytest.mark.parametrize("reach", [None, 0.6])
@pytest.mark.parametrize("debias", [False, True])
def test_masses_other_than_one(sample, reach, debias):
    a, x, b, y = sample
    a, b = 2 * a, (2 if reach is None else 0.7) * b
    rho = None if reach is None else reach**2
    eps = 0.09
    value = SamplesLoss(blur=0.3, reach=reach, debias=debias)(a, x, b, y)
    across = dual(a, b, half_squares(x, y), eps, rho)
    if not debias and reach is None:
        # GeomLoss's balanced value is <a, f> + <b, g>
        torch.testing.assert_close(value, (a * across[0]).sum() + (b * across[1]).sum(), rtol=1e-8, atol=1e-12)
        return
    want = across[2]
    if debias:
        own = sum(dual(w, w, half_squares(z, z), eps, rho)[2] for w, z in ((a, x), (b, y)))
        want = want - own / 2 + eps / 2 * (a.sum() - b.sum()) ** 2
    torch.testing.assert_close(value, want, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reach", [None, 0.6])
@pytest.mark.parametrize("debias", [False, True])
def test_gradients_are_those_of_the_value(sample, p, reach, debias):
    a, x, b, y = sample
    loss = SamplesLoss(p=p, blur=0.4, reach=reach, debias=debias, solver=TIGHT)
    a, x, y = (part.clone().requires_grad_() for part in (a, x, y))
    slopes = torch.autograd.grad(loss(a, x, b, y), [a, x, y])
    step = 1e-5
    for k, (part, slope) in enumerate(zip((a, x, y), slopes, strict=True)):
        move = torch.zeros_like(part)
        move.view(-1)[3] = step
        if k == 0:
            move.view(-1)[5] = -step  # within equal masses
        plus, minus = ([q.detach() + s * move if q is part else q.detach() for q in (a, x, y)] for s in (1, -1))
        difference = (loss(plus[0], plus[1], b, plus[2]) - loss(minus[0], minus[1], b, minus[2])) / (2 * step)
        assert float(difference) == pytest.approx(float((slope * move).sum() / step), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("options", [{}, {"debias": False}, {"p": 1}, {"reach": 1.0}], ids=str)
def test_second_derivatives(sample, options):
    """Against differences of gradients."""
    a, x, b, y = sample
    loss = SamplesLoss("sinkhorn", blur=0.5, **options)
    way = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)

    def gradient(x, graph=False):
        leaf = x.clone().requires_grad_()
        return leaf, torch.autograd.grad(loss(a, leaf, b, y).sum(), leaf, create_graph=graph)[0]

    leaf, first = gradient(x, graph=True)
    (have,) = torch.autograd.grad((first * way).sum(), leaf)
    want = (gradient(x + 1e-5 * way)[1] - gradient(x - 1e-5 * way)[1]) / 2e-5
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-6)


def test_geomloss_says_the_same_where_it_converges(sample):
    geomloss = pytest.importorskip("geomloss")
    a, x, b, y = sample
    for options in ({"p": 2}, {"p": 2, "debias": False}, {"p": 1, "debias": False}, {"p": 2, "reach": 0.6}):
        theirs = geomloss.SamplesLoss(blur=0.3, scaling=0.99, backend="tensorized", **options)(a, x, b, y)
        torch.testing.assert_close(SamplesLoss(blur=0.3, **options)(a, x, b, y), theirs, rtol=5e-4, atol=0)


def test_geomloss_s_unbalanced_gradient_is_off_by_a_known_factor(sample):
    """(rho + eps / 2) / (rho + eps): the factor that the page names, so that the page stays true."""
    geomloss = pytest.importorskip("geomloss")
    a, x, b, y = sample
    eps, rho = 0.09, 0.36
    points = x.clone().requires_grad_()
    options = {"blur": 0.3, "reach": 0.6, "debias": False}
    (theirs,) = torch.autograd.grad(
        geomloss.SamplesLoss(scaling=0.99, backend="tensorized", **options)(a, points, b, y), points
    )
    (ours,) = torch.autograd.grad(SamplesLoss(**options)(a, points, b, y), points)
    torch.testing.assert_close(theirs, ours * (rho + eps / 2) / (rho + eps), rtol=2e-2, atol=1e-4)


def test_the_three_calls_and_batches(sample):
    _, x, _, y = sample
    loss = SamplesLoss(blur=0.2)
    a, b = torch.full((14,), 1 / 14, dtype=x.dtype), torch.full((17,), 1 / 17, dtype=x.dtype)
    value = loss(x, y)
    assert value.shape == ()
    torch.testing.assert_close(loss(a, x, b, y), value)
    torch.testing.assert_close(loss(a[:, None], x, b[:, None], y), value)
    torch.testing.assert_close(loss(torch.zeros(14).long(), a, x, torch.zeros(17).long(), b, y), value)
    batch = loss(torch.stack([x, x + 1]), torch.stack([y, y]))
    assert batch.shape == (2,)
    torch.testing.assert_close(batch, torch.stack([value, loss(x + 1, y)]), rtol=1e-7, atol=1e-10)
    loss.potentials = True
    f, g = loss(torch.stack([x, x + 1]), torch.stack([y, y]))
    assert f.shape == (2, 14) and g.shape == (2, 17)
    assert loss(a[:, None], x, b[:, None], y)[0].shape == (14,)


@pytest.mark.parametrize("backend", ["auto", "tensorized", "online", "multiscale"])
def test_backends_and_costs_agree(sample, backend):
    a, x, b, y = sample
    want = SamplesLoss(blur=0.2)(a, x, b, y)

    def cost(u, v):
        assert u.ndim == 3
        return (u[:, :, None] - v[:, None]).square().sum(-1) / 2

    torch.testing.assert_close(SamplesLoss(blur=0.2, backend=backend)(a, x, b, y), want, rtol=1e-8, atol=1e-12)
    own = SamplesLoss(blur=0.2, backend=backend, cost=cost)
    points = x.clone().requires_grad_()
    value = own(a, points, b, y)
    torch.testing.assert_close(value.detach(), want, rtol=1e-8, atol=1e-12)
    (slope,) = torch.autograd.grad(value, points)
    (other,) = torch.autograd.grad(SamplesLoss(blur=0.2)(a, points, b, y), points)
    torch.testing.assert_close(slope, other, rtol=1e-6, atol=1e-9)
    formula = SamplesLoss(blur=0.2, backend=backend, cost="(SqDist(X,Y) / IntCst(2))")
    torch.testing.assert_close(formula(a, x, b, y), want, rtol=1e-8, atol=1e-12)


def test_equal_measures_and_single_points(dtype):
    x = torch.tensor([[0.3, 0.2]], dtype=dtype)
    loss = SamplesLoss()
    assert float(loss(x, x)) == 0
    assert float(loss(x, x + 1)) == pytest.approx(1.0, rel=1e-5)
    cloud = torch.linspace(0, 1, 20, dtype=dtype)[:, None]
    assert 0 <= float(loss(cloud, cloud)) < 1e-7
    assert loss(cloud, cloud).dtype == dtype


def test_debiased_potentials_carry_derivatives(sample):
    a, x, b, y = sample
    points = x.clone().requires_grad_()
    f, _ = SamplesLoss(blur=0.4, potentials=True, solver=TIGHT)(a, points, b, y)
    f = f - (a * f).sum()
    (slope,) = torch.autograd.grad(f[2], points)
    step = torch.zeros_like(x)
    step[2, 0] = 1e-5

    def at(z):
        h = SamplesLoss(blur=0.4, potentials=True, solver=TIGHT)(a, z, b, y)[0]
        return (h - (a * h).sum())[2]

    assert float(slope[2, 0]) == pytest.approx(float((at(x + step) - at(x - step)) / 2e-5), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "sinkhron"},
        {"p": 3},
        {"blur": 0},
        {"reach": -1.0},
        {"scaling": 1.0},
        {"diameter": 0.0},
        {"truncate": -1},
        {"backend": "keops"},
        {"kernel": torch.cdist},
        {"solver": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=r"give|takes"):
        SamplesLoss(**options)


def test_bad_calls(sample):
    with pytest.raises(sbot.InvalidProblem, match=r"float32 and y torch\.float64"):
        SamplesLoss()(torch.ones(3, 2), torch.ones(3, 2, dtype=torch.float64))
    with pytest.raises(sbot.InvalidProblem, match="int64"):
        SamplesLoss()(torch.ones(3, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64))
    a, x, b, y = sample
    loss = SamplesLoss()
    for args in [(x,), (x.numpy(), y), (x, y[:, :1]), (x[0], y), (a[:3], x, b, y), (a, x, b[None], y), (x[None], y)]:
        with pytest.raises(ValueError, match="give"):
            loss(*args)
    with pytest.raises(ValueError, match="equal masses"):
        loss(a, x, 2 * b, y)
    with pytest.raises(ValueError, match="leave them out"):
        SamplesLoss(backend="online")(torch.zeros(14), a, x, torch.zeros(17), b, y)
    with pytest.raises(sbot.Unsupported, match="formula"):
        SamplesLoss(cost="Sum(X*Y)")
    with pytest.raises(ValueError, match="cost function returned"):
        SamplesLoss(cost=lambda u, v: torch.zeros(2))(x, y)


def test_nearly_equal_masses_are_levelled_and_said(sample):
    a, x, b, y = sample
    want = SamplesLoss()(a, x, b, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(SamplesLoss()(a, x, b * (1 + 1e-7), y), want, rtol=1e-5, atol=0)
    with pytest.warns(sbot.PrecisionWarning, match="rescaled"):
        SamplesLoss()(a, x, b * (1 + 1e-4), y)


@pytest.mark.parametrize("enabled", [True, False])
def test_autograd_is_left_as_it_was(sample, enabled):
    a, x, b, y = sample

    def fails(u, v):
        raise ArithmeticError("in the middle")

    with torch.set_grad_enabled(enabled):
        SamplesLoss()(a, x, b, y)
        assert torch.is_grad_enabled() is enabled
        with pytest.raises(ArithmeticError):
            SamplesLoss(cost=fails)(a, x, b, y)
        assert torch.is_grad_enabled() is enabled
        if sys.modules.get("geomloss") or pytest.importorskip("geomloss"):
            assert SamplesLoss("energy")(x, y).shape == ()
            with pytest.raises(Exception, match=r".*"):
                SamplesLoss("hausdorff", kernel=fails)(x, y)
            assert torch.is_grad_enabled() is enabled


def test_other_losses_are_geomloss_s(sample):
    geomloss = pytest.importorskip("geomloss")
    _, x, _, y = sample
    for name in ("energy", "gaussian", "laplacian"):
        want = geomloss.SamplesLoss(name, blur=0.3)(x, y)
        assert torch.equal(SamplesLoss(name, blur=0.3)(x, y), want)


def test_without_geomloss():
    code = (
        "import sys; sys.modules['geomloss'] = None\n"
        "import torch, sbot, sbot.compat.geomloss as geomloss\n"
        "x = torch.zeros(2, 1); print(float(geomloss.SamplesLoss()(x, x + 2)))\n"
        "for ask in (lambda: geomloss.SamplesLoss('energy')(x, x), lambda: geomloss.ImagesBarycenter):\n"
        "    try: ask()\n"
        "    except (sbot.Unsupported, AttributeError) as error: print('pip install geomloss' in str(error))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["2.0", "True", "True"], run.stderr


# ---- the functions of geomloss.ot -----------------------------------------------------------------------------------


def test_solve_against_a_plain_iteration(sample):
    a, x, b, y = sample
    c = 2 * half_squares(x, y)
    f, g, value = dual(a, b, c, 0.2)
    solution = ot.solve(c, a=a, b=b, reg=0.2)
    plan = a[:, None] * b * torch.exp((f[:, None] + g - c) / 0.2)
    torch.testing.assert_close(solution.plan, plan, rtol=1e-7, atol=1e-11)
    torch.testing.assert_close(solution.value, value, rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.value_linear, (plan * c).sum(), rtol=1e-7, atol=0)
    torch.testing.assert_close(solution.density, plan / (a[:, None] * b), rtol=1e-7, atol=1e-11)
    torch.testing.assert_close(solution.potential_a[:, None] + solution.potential_b, f[:, None] + g, rtol=0, atol=1e-7)
    torch.testing.assert_close(solution.marginal_a, a, rtol=1e-7, atol=0)
    torch.testing.assert_close(solution.marginal_b, b, rtol=1e-7, atol=0)
    v = torch.linspace(0, 1, 17, dtype=x.dtype)
    for operator, matrix in ((solution.plan_operator, plan), (solution.lazy_density, plan / (a[:, None] * b))):
        assert operator.shape == (14, 17) and operator.T.shape == (17, 14)
        torch.testing.assert_close(operator @ v, matrix @ v, rtol=1e-7, atol=1e-10)
        torch.testing.assert_close(operator.transpose() @ x, matrix.T @ x, rtol=1e-7, atol=1e-10)
    assert solution.converged and solution.report.tolerance < 1e-10
    assert solution.a_to_b is None and "feydy2019" in solution.citation
    with pytest.raises(ValueError, match="debias=True"):
        _ = solution.potential_aa


@pytest.mark.parametrize("unbalanced", [None, 0.5])
@pytest.mark.parametrize("debias", [False, True])
def test_samples_have_the_full_square_and_right_gradients(sample, unbalanced, debias):
    a, x, b, y = sample

    def value(z):
        return ot.solve_sample(z, y, a, b, reg=0.3, unbalanced=unbalanced, debias=debias, tol=1e-12).value

    half = SamplesLoss(blur=0.15**0.5, reach=None if unbalanced is None else 0.25**0.5, debias=debias)
    torch.testing.assert_close(value(x), 2 * half(a, x, b, y), rtol=1e-8, atol=1e-12)
    points = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(points), points)
    step = torch.zeros_like(x)
    step[1, 1] = 1e-5
    assert float(slope[1, 1]) == pytest.approx(float((value(x + step) - value(x - step)) / 2e-5), rel=1e-5)


def test_the_gradient_in_the_cost_is_the_plan(sample):
    a, x, b, y = sample
    c = half_squares(x, y).requires_grad_()
    solution = ot.solve(c, a=a, b=b, reg=0.2)
    (slope,) = torch.autograd.grad(solution.value, c)
    torch.testing.assert_close(slope, solution.plan.detach(), rtol=1e-9, atol=1e-12)


def test_samples_have_all_attributes(sample):
    a, x, b, y = sample
    solution = ot.solve_sample(x, y, a, b, blur=0.4, reach=0.9, debias=True)
    torch.testing.assert_close(
        solution.value, ot.solve_sample(x, y, a, b, reg=0.32, unbalanced=1.62, debias=True).value, rtol=1e-12, atol=0
    )
    plan = solution.plan
    mean = (plan @ y) / plan.sum(1, keepdim=True)
    torch.testing.assert_close(solution.a_to_b, mean - x, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(solution.b_to_a, plan.T @ x / plan.sum(0)[:, None] - y, rtol=1e-7, atol=1e-9)
    f, _, _ = dual(a, a, 2 * half_squares(x, x), 0.32, 1.62)
    torch.testing.assert_close(solution.potential_aa, f, rtol=0, atol=1e-7)
    assert solution.potential_bb.shape == (17,)


def test_batches_and_libraries(sample):
    _, x, _, y = sample
    c = half_squares(x, y)
    batch = ot.solve_batch(torch.stack([c, c + 1]), reg=0.1)
    one = ot.solve(c, reg=0.1)
    torch.testing.assert_close(batch.value, torch.stack([one.value, one.value + 1]), rtol=1e-8, atol=0)
    assert batch.plan.shape == (2, 14, 17) and batch.plan_operator.shape == (28, 34)
    assert (batch.plan_operator @ torch.ones(2, 17, 3)).shape == (2, 14, 3)
    array = ot.solve(c.numpy(), reg=0.1)
    for name in ("value", "plan", "potential_a", "marginal_b", "density"):
        got = getattr(array, name)
        assert isinstance(got, (np.ndarray, np.generic)) and got.dtype == np.float64
        np.testing.assert_allclose(got, getattr(one, name).numpy(), rtol=1e-9)
    assert isinstance(array.plan_operator @ np.ones(17), np.ndarray)
    single = ot.solve_sample(x.float(), y.float(), reg=0.1)
    assert single.value.dtype == single.plan.dtype == single.potential_a.dtype == torch.float32
    both = ot.solve_sample_batch(torch.stack([x, x]), torch.stack([y, y]), reg=0.2)
    torch.testing.assert_close(both.value[1], 2 * one.value, rtol=1e-8, atol=0)


def test_zero_weights(sample):
    a, x, b, y = sample
    a = a.clone()
    a[3] = 0
    a = a / a.sum()
    solution = ot.solve_sample(x, y, a, b, reg=0.3)
    assert bool((solution.plan[3] == 0).all()) and bool(torch.isfinite(solution.potential_a).all())
    torch.testing.assert_close(solution.density_operator @ b, solution.density @ b, rtol=1e-7, atol=1e-10)


def test_a_pair_of_penalties_and_max_iter(sample):
    a, x, b, y = sample
    c = half_squares(x, y)
    half = ot.solve(c, a=a, b=2 * b, reg=0.1, unbalanced=(None, 0.5), max_iter=1)
    assert half.converged  # a ladder of one step there, a limit that is no lower than the default here
    torch.testing.assert_close(half.marginal_a, a, rtol=1e-7, atol=0)
    assert float(half.marginal_b.sum()) == pytest.approx(1.0)


def test_bad_arguments_of_the_functions(sample):
    a, x, b, y = sample
    c = half_squares(x, y)
    for options in ({"reg": 0}, {"reg": 1, "unbalanced_type": "TV"}, {"reg": 1, "method": "annealing"}):
        with pytest.raises(NotImplementedError):
            ot.solve(c, **options)
    for options in (
        {"reg": -1},
        {"reg": None},
        {"reg": 1, "unbalanced": 0},
        {"reg": 1, "unbalanced": (1, 2, 3)},
        {"reg": 1, "max_iter": 0},
        {"reg": 1, "tol": -1},
        {"reg": 1, "a": a[:3]},
        {"reg": 1, "a": a.numpy()},
        {"reg": 1, "a": a.float()},
        {"reg": 1, "a": -a, "b": b},
        {"reg": 1, "a": 2 * a, "b": b},
    ):
        with pytest.raises(ValueError, match=r"give|cast|needs equal masses|tol|negative|integer"):
            ot.solve(c, **options)
    with pytest.raises(ValueError, match="NumPy array"):
        ot.solve("C", reg=1)
    with pytest.raises(ValueError, match="say the same"):
        ot.solve_sample(x, y, reg=1, blur=1)
    with pytest.raises(NotImplementedError, match="sqeuclidean"):
        ot.solve_sample(x, y, reg=1, cost="manhattan")
    with pytest.raises(ValueError, match=r"\(N, D\)"):
        ot.solve_sample(x[None], y[None], reg=1)
