"""Every linear reference: its transitions solve its own equation, compose, and pin."""

from __future__ import annotations

import math

import pytest
import torch

import sbot
from sbot import linalg

A = torch.tensor([[-0.5, 1.0, 0.0], [-1.0, -0.3, 0.2], [0.1, 0.0, 0.4]], dtype=torch.float64)
B = torch.tensor([[1.0, 0.0, 0.0], [0.3, 0.8, 0.0], [0.0, -0.2, 1.2]], dtype=torch.float64)
b = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)
REFERENCES = {
    "brownian": sbot.Brownian(),
    "ou": sbot.OrnsteinUhlenbeck(1.5, 0.3),
    "ou vector mean, repelling": sbot.OrnsteinUhlenbeck(-0.7, [1.0, 0.0, -1.0]),
    "constant": sbot.LinearSDE(A, b, B),
    "vp": sbot.LinearSDE.vp(0.1, 20.0),
    "ve": sbot.LinearSDE.ve(0.05, 3.0),
    "time-dependent": sbot.LinearSDE(lambda t: A * math.sin(3 * t), lambda t: b * t, lambda t: B * (1 + t)),
    "scalar drift, matrix noise": sbot.LinearSDE(-1.0, 0.5, lambda t: B * (2 - t)),
}


@pytest.fixture(params=REFERENCES.values(), ids=REFERENCES.keys())
def reference(request) -> sbot.LinearReference:
    return request.param


def dense(op, d=3):
    return linalg.matrix(op, d)


def vector(shift, d=3):
    return shift.expand(d) if shift.ndim == 0 else shift


def test_transitions_compose(reference):
    whole, parts = reference.transition(0.1, 0.9), reference.transition(0.1, 0.37).then(reference.transition(0.37, 0.9))
    for name in ("phi", "shift", "cov"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-10, atol=1e-12, msg=name)


def test_transitions_solve_the_equation(reference):
    """d/dt of mean and covariance by central differences against ``A m + b`` and ``A S + S A' + BB'``."""
    s, t, h = 0.2, 0.7, 1e-4
    now, before, after = (reference.transition(s, t + k * h) for k in (0, -1, 1))
    a, shift, noise = reference.coefficients(t)
    a, noise = dense(a), dense(noise)
    slope = [(dense(p) - dense(q)) / (2 * h) for p, q in ((after.phi, before.phi), (after.cov, before.cov))]
    torch.testing.assert_close(slope[0], a @ dense(now.phi), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(slope[1], a @ dense(now.cov) + dense(now.cov) @ a.T + noise, rtol=1e-5, atol=1e-5)
    moved = (vector(after.shift) - vector(before.shift)) / (2 * h)
    torch.testing.assert_close(moved, a @ vector(now.shift) + vector(shift), rtol=1e-5, atol=1e-5)


def test_drift_is_the_coefficients(reference):
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    a, shift, _ = reference.coefficients(0.3)
    torch.testing.assert_close(reference.drift(0.3, x)[0], dense(a) @ x[0] + vector(shift))


def test_pinned_law_is_gaussian_conditioning(reference):
    """X_t given X_s and X_1, by conditioning the joint Gaussian of (X_t, X_1)."""
    s, t = 0.2, 0.6
    near, far = reference.transition(s, t), reference.transition(t, 1.0)
    q, phi = dense(near.cov), dense(far.phi)
    cross, total = q @ phi.T, phi @ q @ phi.T + dense(far.cov)
    x, end = torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([1.0, 0.0, -0.5]).double()
    mean = dense(near.phi) @ x + vector(near.shift)
    gain = cross @ torch.linalg.inv(total)
    want = mean + gain @ (end - phi @ mean - vector(far.shift))
    law = reference.pin(s, t)
    torch.testing.assert_close(
        dense(law.near) @ x + dense(law.far) @ end + vector(law.shift), want, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(dense(law.cov), q - gain @ cross.T, rtol=1e-9, atol=1e-9)


def test_pinned_law_at_the_ends(reference):
    x, end = torch.tensor([[0.3, -1.0, 2.0]]).double(), torch.tensor([[1.0, 0.0, -0.5]]).double()
    torch.testing.assert_close(reference.pin(0.0, 0.0).sample(x, end, 0.7), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(reference.pin(0.0, 1.0).sample(x, end, 0.7), end, rtol=1e-6, atol=1e-6)


def test_cost_is_minus_log_transition(reference):
    eps = 0.4
    gen = torch.Generator().manual_seed(1)
    x, y = (torch.randn(4, 3, generator=gen, dtype=torch.float64) for _ in range(2))
    step = reference.transition(0.0, 1.0)
    law = torch.distributions.MultivariateNormal(step.mean(x)[:, None], eps * dense(step.cov))
    want = -law.log_prob(y[None])
    got = reference.cost().matrix(x, y) / eps + reference.log_normaliser(3, eps, x)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_known_schedules():
    """VP against its integral, VE against its own."""
    vp = sbot.LinearSDE.vp(0.1, 20.0).transition(0.0, 0.6)
    total = 0.1 * 0.6 + (20 - 0.1) * 0.36 / 2
    assert abs(float(vp.phi) - math.exp(-total / 2)) < 1e-13
    assert abs(float(vp.cov) - (1 - math.exp(-total))) < 1e-12
    ve = sbot.LinearSDE.ve(0.05, 3.0).transition(0.2, 0.9)
    integral = 0.05**2 * (60 ** (2 * 0.9) - 60 ** (2 * 0.2)) / (2 * math.log(60))
    assert abs(float(ve.cov) / integral - 1) < 1e-12


def test_ou_of_rate_zero_is_brownian():
    ou, brownian = sbot.OrnsteinUhlenbeck(0.0, 5.0), sbot.Brownian()
    for part in ("phi", "shift", "cov"):
        assert float(getattr(ou.transition(0.1, 0.8), part)) == pytest.approx(
            float(getattr(brownian.transition(0.1, 0.8), part))
        )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sbot.OrnsteinUhlenbeck(float("nan")), "rate is NaN"),
        (lambda: sbot.OrnsteinUhlenbeck("fast"), "rate must be a real number"),
        (lambda: sbot.OrnsteinUhlenbeck(1.0, [[1.0]]), "mean has shape"),
        (lambda: sbot.LinearSDE(torch.zeros(2, 3)), "drift of the reference has shape"),
        (lambda: sbot.LinearSDE(0.0, [[0.0]]), "shift of the reference has shape"),
        (lambda: sbot.LinearSDE(float("inf")), "drift has 1 entries"),
        (lambda: sbot.LinearSDE.vp(-1.0), "beta_min is -1.0"),
        (lambda: sbot.LinearSDE(lambda t: float(t > 0.3)).transition(0.0, 1.0), "vary too roughly"),
    ],
)
def test_bad_references(make, match):
    with pytest.raises(sbot.InvalidProblem, match=match):
        make()


def test_reference_of_another_dimension_is_refused():
    x = torch.zeros(4, 2)
    with pytest.raises(sbot.InvalidProblem, match="dimension 3 and the points in dimension 2"):
        sbot.solve_bridge(x, x, 1.0, reference=sbot.LinearSDE(A, b, B))
    with pytest.raises(sbot.InvalidProblem, match="noise does not reach"):
        sbot.solve_bridge(x, x, 1.0, reference=sbot.LinearSDE(0.0, 0.0, torch.tensor([[1.0, 0.0], [0.0, 0.0]])))
