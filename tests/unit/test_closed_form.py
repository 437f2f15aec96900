"""Gaussian to Gaussian: the certificate, singular limits, densities, and every method against its own law."""

from __future__ import annotations

import math

import pytest
import torch

import sbot
from sbot import linalg

from ..conftest import spd
from ..contract.test_references import REFERENCES

EPS = 0.5


def ends(d, gen, batch=()):
    count = math.prod(batch)
    covs = [torch.stack([spd(d, gen) for _ in range(count)]).reshape(*batch, d, d) for _ in range(2)]
    means = [torch.randn(*batch, d, generator=gen, dtype=torch.float64) for _ in range(2)]
    return [sbot.Gaussian(m, c) for m, c in zip(means, covs, strict=True)]


@pytest.fixture(params=REFERENCES.values(), ids=REFERENCES.keys())
def bridge(request, generator):
    return sbot.solve_bridge(*ends(3, generator), EPS, reference=request.param)


def off_diagonal_of_precision(bridge):
    step = bridge.problem.reference.transition(0.0, 1.0)
    phi, noise = linalg.matrix(step.phi, 3), linalg.matrix(bridge.problem.eps * step.cov, 3)
    return -phi.T @ torch.linalg.inv(noise)


def test_precision_block_certificate(bridge):
    """A Gaussian coupling with these marginals is the bridge's if and only if this block is the reference's."""
    plan = bridge.plan()
    torch.testing.assert_close(plan.mean[:3], bridge.problem.mu.mean)
    torch.testing.assert_close(plan.cov[:3, :3], bridge.problem.mu.cov)
    torch.testing.assert_close(plan.cov[3:, 3:], bridge.problem.nu.cov)
    block = torch.linalg.inv(plan.cov)[:3, 3:]
    want = off_diagonal_of_precision(bridge)
    assert float((block - want).abs().max() / want.abs().max()) <= 1e-10


def test_scalar_case_by_hand():
    one = sbot.Gaussian(torch.zeros(1).double(), torch.eye(1).double())
    bridge = sbot.solve_bridge(one, one, 1.0)
    c = (math.sqrt(5) - 1) / 2
    assert float(bridge.plan().cov[0, 1]) == pytest.approx(c, abs=1e-14)
    # <P, C> = E|x - y|^2 / 2 = 1 - c and KL = -log(1 - c^2) / 2
    assert float(bridge.linear_cost()) == pytest.approx(1 - c, abs=1e-14)
    assert float(bridge.cost()) == pytest.approx(1 - c - math.log(1 - c * c) / 2, abs=1e-14)


def test_cost_is_the_objective(bridge):
    """<P, C> from the plan's moments, KL from determinants."""
    plan, reference = bridge.plan(), bridge.problem.reference
    step = reference.transition(0.0, 1.0)
    phi, q = linalg.matrix(step.phi, 3), linalg.matrix(step.cov, 3)
    along = torch.cat([-phi, torch.eye(3).double()], 1)
    shift = step.shift.expand(3) if step.shift.ndim == 0 else step.shift
    residual = along @ plan.mean - shift
    second = along @ plan.cov @ along.T + torch.outer(residual, residual)
    linear = torch.trace(torch.linalg.solve(q, second)) / 2
    information = (torch.logdet(plan.cov[:3, :3]) + torch.logdet(plan.cov[3:, 3:]) - torch.logdet(plan.cov)) / 2
    torch.testing.assert_close(bridge.linear_cost(), linear, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(bridge.cost(), linear + EPS * information, rtol=1e-9, atol=1e-9)
    assert float(bridge.gap()) == 0


def test_potentials_are_the_density_of_the_plan(bridge, generator):
    """log dP/d(mu x nu) = (f + g - C) / eps, pointwise."""
    plan, problem = bridge.plan(), bridge.problem
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    f, g = bridge.potentials()
    cost = problem.cost.matrix(x, y).diagonal()
    want = plan.log_prob(torch.cat([x, y], 1)) - problem.mu.log_prob(x) - problem.nu.log_prob(y)
    torch.testing.assert_close((f(x) + g(y) - cost) / EPS, want, rtol=1e-8, atol=1e-8)


def test_potentials_share_the_cost_equally(bridge, generator):
    f, g = bridge.potentials()
    for measure, potential in ((bridge.problem.mu, f), (bridge.problem.nu, g)):
        draws = potential(measure.sample(100_000, generator=generator))
        assert float((draws.mean() - bridge.cost() / 2).abs() / (draws.std() / 300)) < 5


def test_log_prob_is_the_marginal_s(bridge, generator):
    z = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    for t in (0.0, 1e-9, 0.25, 0.5, 0.9, 1 - 1e-9, 1.0):
        torch.testing.assert_close(bridge.log_prob(t, z), bridge.marginal(t).log_prob(z), rtol=1e-6, atol=1e-6)


def test_drift_is_continuous_at_the_ends(bridge, generator):
    z = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(bridge.drift(1.0, z), bridge.drift(1 - 1e-9, z), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bridge.reverse_drift(0.0, z), bridge.reverse_drift(1e-9, z), rtol=1e-6, atol=1e-6)


def test_brownian_drift_is_the_formula(generator):
    """u(t, x) of math: m1 - m0 + [t S1 - (1-t) S0 + (1-t) C' - t C - eps t I] S_t^-1 (x - m_t)."""
    bridge = sbot.solve_bridge(*ends(3, generator), EPS)
    plan, t = bridge.plan(), 0.3
    s0, s1, c = plan.cov[:3, :3], plan.cov[3:, 3:], plan.cov[:3, 3:]
    m0, m1 = plan.mean[:3], plan.mean[3:]
    st = (1 - t) ** 2 * s0 + t**2 * s1 + t * (1 - t) * (c + c.T) + EPS * t * (1 - t) * torch.eye(3).double()
    mt = (1 - t) * m0 + t * m1
    torch.testing.assert_close(bridge.marginal(t).cov, st)
    torch.testing.assert_close(bridge.marginal(t).mean, mt)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    gain = t * s1 - (1 - t) * s0 + (1 - t) * c.T - t * c - EPS * t * torch.eye(3).double()
    u = m1 - m0 + torch.linalg.solve(st, (x - mt).T).T @ gain.T
    torch.testing.assert_close(bridge.drift(t, x), u, rtol=1e-9, atol=1e-9)
    back = -u - EPS * torch.linalg.solve(st, (x - mt).T).T
    torch.testing.assert_close(bridge.reverse_drift(t, x), back, rtol=1e-9, atol=1e-9)


def test_fokker_planck(bridge):
    """d/dt of the marginal's moments by differences against the drift: the process has these marginals."""
    t, h = 0.4, 1e-4
    law, before, after = (bridge.marginal(t + k * h) for k in (0, -1, 1))
    eye = torch.eye(3).double()
    # the drift is affine: read its matrix and shift off the basis
    shift = bridge.drift(t, torch.zeros(1, 3).double())[0]
    matrix = (bridge.drift(t, eye) - shift).T
    noise = linalg.matrix(bridge.problem.reference.coefficients(t)[2], 3) * EPS
    torch.testing.assert_close((after.mean - before.mean) / (2 * h), matrix @ law.mean + shift, rtol=1e-5, atol=1e-5)
    slope = matrix @ law.cov + law.cov @ matrix.T + noise
    torch.testing.assert_close((after.cov - before.cov) / (2 * h), slope, rtol=1e-5, atol=1e-5)
    back = bridge.reverse_drift(t, torch.zeros(1, 3).double())[0]
    back_matrix = (bridge.reverse_drift(t, eye) - back).T
    torch.testing.assert_close(
        -(after.mean - before.mean) / (2 * h), back_matrix @ law.mean + back, rtol=1e-5, atol=1e-5
    )


def test_sampled_pairs_and_paths_have_the_exact_moments(bridge, generator):
    n = 60_000
    x, y = bridge.sample_pairs(n, generator=generator)
    assert_moments(torch.cat([x, y], 1), bridge.plan())
    times = [0.0, 0.2, 0.55, 1.0]
    paths = bridge.sample_paths(n, times, generator=generator)
    assert paths.shape == (n, 4, 3)
    for k, t in enumerate(times):
        assert_moments(paths[:, k], bridge.marginal(t))
    assert_moments(bridge.interpolate(0.7, n, generator=generator), bridge.marginal(0.7))


def assert_moments(samples, law):
    n = len(samples)
    scale = law.cov.diagonal().sqrt()
    assert float(((samples.mean(0) - law.mean) / scale).abs().max()) < 5 / math.sqrt(n)
    error = (samples.T.cov() - law.cov) / torch.outer(scale, scale)
    assert float(error.abs().max()) < 8 / math.sqrt(n)


def test_euler_steps_of_the_drift_reach_the_law(bridge, generator):
    """The drift simulated, forwards and backwards, against the exact marginals; 200 steps, 20,000 paths."""
    steps, n = 200, 20_000
    noise = lambda t: linalg.root(linalg.matrix(bridge.problem.reference.coefficients(t)[2], 3) * EPS / steps)  # noqa: E731
    for drift, start, end in (
        (bridge.drift, bridge.problem.mu, bridge.problem.nu),
        (lambda t, x: bridge.reverse_drift(1 - t, x), bridge.problem.nu, bridge.problem.mu),
    ):
        x = start.sample(n, generator=generator)
        backward = start is bridge.problem.nu
        for k in range(steps):
            t = (k + 0.5) / steps
            z = torch.randn(n, 3, generator=generator, dtype=torch.float64)
            x = x + drift(t, x) / steps + z @ noise(1 - t if backward else t)
        scale = end.cov.diagonal().sqrt()
        assert float(((x.mean(0) - end.mean) / scale).abs().max()) < 0.1
        assert float(((x.T.cov() - end.cov) / torch.outer(scale, scale)).abs().max()) < 0.12


def test_transport_is_the_conditional_mean_of_the_plan(bridge, generator):
    plan = bridge.plan()
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    slope = plan.cov[3:, :3] @ torch.linalg.inv(plan.cov[:3, :3])
    want = plan.mean[3:] + (x - plan.mean[:3]) @ slope.T
    torch.testing.assert_close(bridge.transport(x), want, rtol=1e-9, atol=1e-9)
    late = bridge.condition(x, 0.6)
    torch.testing.assert_close(late.mean.shape, x.shape)


def test_ou_by_whitening_is_brownian_at_the_effective_eps(generator):
    """For a scalar reference the plan is Brownian motion's at eps G / Phi."""
    mu, nu = ends(3, generator)
    rate = 1.5
    ou = sbot.solve_bridge(mu, nu, EPS, reference=sbot.OrnsteinUhlenbeck(rate))
    brownian = sbot.solve_bridge(mu, nu, EPS * math.sinh(rate) / rate)
    torch.testing.assert_close(ou.plan().cov, brownian.plan().cov, rtol=1e-11, atol=1e-11)
    vp = sbot.solve_bridge(mu, nu, EPS, reference=sbot.LinearSDE.vp(0.1, 5.0))
    beta = (0.1 + 5.0) / 2
    brownian = sbot.solve_bridge(mu, nu, EPS * 2 * math.sinh(beta / 2))
    torch.testing.assert_close(vp.plan().cov, brownian.plan().cov, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", ["mu", "nu", "both", "dirac to dirac"])
def test_singular_covariances_are_the_limit(which, generator):
    """Directions of no width, against directions of width 1e-12."""
    d = 3
    covs = [spd(d, generator), spd(d, generator)]
    flat, thin = [c.clone() for c in covs], [c.clone() for c in covs]
    for k, name in enumerate(("mu", "nu")):
        if which in (name, "both"):
            direction = torch.randn(d, 1, generator=generator, dtype=torch.float64)
            away = torch.eye(d).double() - direction @ direction.T / direction.square().sum()
            flat[k] = away @ covs[k] @ away
        if which == "dirac to dirac":
            flat[k] = torch.zeros(d, d).double()
        thin[k] = flat[k] + 1e-12 * torch.eye(d).double()
    means = [torch.randn(d, generator=generator, dtype=torch.float64) for _ in range(2)]
    exact, near = (
        sbot.solve_bridge(*(sbot.Gaussian(m, c) for m, c in zip(means, pair, strict=True)), EPS)
        for pair in (flat, thin)
    )
    x = torch.randn(4, d, generator=generator, dtype=torch.float64)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(exact.plan().cov, near.plan().cov, **close)
    torch.testing.assert_close(exact.cost(), near.cost(), **close)
    for t in (0.2, 0.8):
        torch.testing.assert_close(exact.drift(t, x), near.drift(t, x), **close)
        torch.testing.assert_close(exact.reverse_drift(t, x), near.reverse_drift(t, x), **close)
        torch.testing.assert_close(exact.log_prob(t, x), exact.marginal(t).log_prob(x), **close)
        torch.testing.assert_close(exact.marginal(t).cov, near.marginal(t).cov, **close)
    torch.testing.assert_close(exact.transport(x), near.transport(x), **close)
    assert bool(torch.isfinite(exact.sample_paths(50, [0.0, 0.5, 1.0], generator=generator)).all())
    f = exact.potentials().f
    on_support = exact.problem.mu.sample(200, generator=generator)
    torch.testing.assert_close(f(on_support), near.potentials().f(on_support), rtol=1e-3, atol=1e-3)
    if which in ("mu", "both", "dirac to dirac"):
        with pytest.raises(sbot.Unsupported, match="no density"):
            exact.log_prob(0.0, x)


def test_batches_are_singles(generator):
    mu, nu = ends(2, generator, (2, 3))
    for reference in (
        sbot.Brownian(),
        sbot.OrnsteinUhlenbeck(1.0, 0.5),
        sbot.LinearSDE(-torch.eye(2), 0.1, torch.eye(2)),
    ):
        whole = sbot.solve_bridge(mu, nu, EPS, reference=reference)
        one = sbot.solve_bridge(
            sbot.Gaussian(mu.mean[1, 2], mu.cov[1, 2]),
            sbot.Gaussian(nu.mean[1, 2], nu.cov[1, 2]),
            EPS,
            reference=reference,
        )
        x = torch.randn(2, 3, 5, 2, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(whole.plan().cov[1, 2], one.plan().cov)
        torch.testing.assert_close(whole.cost()[1, 2], one.cost())
        for call in (
            lambda b, x: b.drift(0.3, x),
            lambda b, x: b.reverse_drift(0.3, x),
            lambda b, x: b.log_prob(0.3, x),
            lambda b, x: b.log_prob(1.0, x),
            lambda b, x: b.drift(1.0, x),
            lambda b, x: b.transport(x),
            lambda b, x: b.potentials().f(x),
            lambda b, x: b.potentials().g(x),
        ):
            torch.testing.assert_close(call(whole, x)[1, 2], call(one, x[1, 2]))
        assert whole.sample_paths(7, [0.1, 0.5, 1.0], generator=generator).shape == (2, 3, 7, 3, 2)
        torch.testing.assert_close(whole.marginal(0.4).cov[1, 2], one.marginal(0.4).cov)


def test_cost_is_differentiable_even_where_eigenvalues_repeat(generator):
    """Isotropic covariances: eigh's own gradient is NaN there."""

    def value(s):
        mu = sbot.Gaussian(torch.zeros(2).double(), s)
        return sbot.solve_bridge(mu, sbot.Gaussian(torch.ones(2).double(), 2 * torch.eye(2).double()), EPS).cost()

    leaf = torch.eye(2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(value(leaf), leaf)
    h = 1e-5
    for i in range(2):
        move = torch.zeros(2, 2).double()
        move[i, i] = h
        eye = torch.eye(2).double()
        assert float(grad[i, i]) == pytest.approx(float(value(eye + move) - value(eye - move)) / (2 * h), rel=1e-6)


def test_float32(generator):
    mu, nu = ends(3, generator)
    want = sbot.solve_bridge(mu, nu, EPS)
    got = sbot.solve_bridge(mu.to(dtype=torch.float32), nu.to(dtype=torch.float32), EPS)
    x = torch.randn(4, 3, generator=generator)
    for a, b in (
        (got.plan().cov, want.plan().cov),
        (got.cost(), want.cost()),
        (got.drift(0.4, x), want.drift(0.4, x.double())),
        (got.log_prob(0.4, x), want.log_prob(0.4, x.double())),
    ):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_what_does_not_exist_says_so(generator):
    bridge = sbot.solve_bridge(*ends(2, generator), EPS)
    with pytest.raises(sbot.Unsupported, match="has no rows; use"):
        bridge.plan(rows=[0])
    with pytest.raises(sbot.Unsupported, match="no atoms"):
        _ = bridge.potentials().f.values
    with pytest.raises(sbot.Unsupported, match="no atoms"):
        bridge.transport()
    with pytest.raises(sbot.Unsupported, match="nothing left"):
        bridge.condition(torch.zeros(1, 2), s=1.0)
    with pytest.raises(sbot.InvalidProblem, match="drop init="):
        sbot.solve_bridge(*ends(2, generator), EPS, init=bridge)
    with pytest.raises(sbot.Unsupported, match=r"ClosedForm: relaxed.*\n.*Sinkhorn: mu is Gaussian, needs Discrete"):
        sbot.solve_bridge(*ends(2, generator), EPS, relax=1.0)
