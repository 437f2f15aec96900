"""Discrete against closed forms: a fine grid must reproduce Gaussian bridges, balanced and unbalanced."""

from __future__ import annotations

import math

import pytest
import torch

import sbot

from ..contract.test_references import REFERENCES


def grid_of(mean, var, n=400, width=9.0):
    """A one-dimensional Gaussian as weights on a grid: the trapezoid rule is spectrally accurate."""
    x = mean + math.sqrt(var) * torch.linspace(-width, width, n, dtype=torch.float64)
    w = torch.exp(-((x - mean) ** 2) / (2 * var))
    return x[:, None], w / w.sum()


SCALAR = {name: ref for name, ref in REFERENCES.items() if name in ("brownian", "ou", "vp", "ve")}


@pytest.mark.parametrize("reference", SCALAR.values(), ids=SCALAR.keys())
@pytest.mark.parametrize("options", [{}, {"memory": 0}], ids=["stored", "streamed"])
def test_sinkhorn_on_a_grid_is_the_closed_form(reference, options):
    (m0, v0), (m1, v1), eps = (0.2, 0.8), (1.0, 1.7), 0.9
    bridge = sbot.solve_bridge(
        grid_of(m0, v0), grid_of(m1, v1), eps, reference=reference, solver=sbot.Sinkhorn(tol=1e-13, **options)
    )
    ends = [sbot.Gaussian(torch.tensor([m]).double(), torch.tensor([[v]]).double()) for m, v in ((m0, v0), (m1, v1))]
    exact = sbot.solve_bridge(*ends, eps, reference=reference)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(bridge.cost(), exact.cost(), **close)
    torch.testing.assert_close(bridge.linear_cost(), exact.linear_cost(), **close)
    z = torch.linspace(-1.5, 2.5, 9, dtype=torch.float64)[:, None]
    torch.testing.assert_close(bridge.transport(z), exact.transport(z), **close)
    for ours, theirs in zip(bridge.potentials(), exact.potentials(), strict=True):
        torch.testing.assert_close(ours(z), theirs(z), **close)
    for t in (0.3, 0.6):
        torch.testing.assert_close(bridge.drift(t, z), exact.drift(t, z), **close)
        torch.testing.assert_close(bridge.reverse_drift(t, z), exact.reverse_drift(t, z), **close)
        torch.testing.assert_close(bridge.log_prob(t, z), exact.log_prob(t, z), **close)


def janati(mean_a, var_a, mass_a, mean_b, var_b, mass_b, sigma2, gamma):
    """Mass, mean and covariance of the plan: Janati, Muzellec, Peyre and Cuturi 2020, theorem 3, in one dimension.

    Their problem: ``min <P, (x - y)^2> + 2 sigma^2 KL(P | a b) + gamma KL(P 1 | a) + gamma KL(P' 1 | b)``.
    """
    tau, lam = gamma / (2 * sigma2 + gamma), sigma2 + gamma / 2
    a = gamma / 2 * (1 - lam / (var_a + lam))
    b = gamma / 2 * (1 - lam / (var_b + lam))
    c = math.sqrt(a * b / tau + sigma2**2 / 4) - sigma2 / 2
    x = var_a + var_b + lam
    mean = (mean_a + var_a / x * (mean_b - mean_a), mean_b + var_b / x * (mean_a - mean_b))
    grow = 1 + c / lam
    cov = (grow * (var_a - var_a**2 / x), c + grow * var_a * var_b / x, grow * (var_b - var_b**2 / x))
    inner = mass_a * mass_b * c * math.sqrt((a * b) ** tau / (var_a * var_b))
    mass = math.sqrt(sigma2) ** (sigma2 / (gamma + sigma2)) * inner ** (1 / (tau + 1))
    mass *= math.exp(-((mean_a - mean_b) ** 2) / x / (2 * (tau + 1))) / math.sqrt(c - 2 / gamma * a * b)
    return mass, mean, cov


@pytest.mark.parametrize("rho", [0.5, 2.0, 20.0])
@pytest.mark.parametrize("eps", [0.1, 0.4, 2.0])
def test_unbalanced_against_the_gaussian_closed_form(rho, eps):
    m0, v0, mass0, m1, v1, mass1 = 0.0, 1.0, 1.0, 1.2, 0.6, 1.5
    (x, a), (y, b) = grid_of(m0, v0), grid_of(m1, v1)
    bridge = sbot.solve_bridge((x, mass0 * a), (y, mass1 * b), eps, relax=rho, solver=sbot.Sinkhorn(tol=1e-12))
    # our problem is half of theirs: 2 sigma^2 / 2 = eps and gamma / 2 = rho
    mass, mean, cov = janati(m0, v0, mass0, m1, v1, mass1, eps, 2 * rho)
    plan = bridge.plan()
    assert float(plan.sum()) == pytest.approx(mass, rel=1e-6)
    u, v = x[:, 0], y[:, 0]
    p = plan / plan.sum()
    got_mean = float(p.sum(1) @ u), float(p.sum(0) @ v)
    assert got_mean == pytest.approx(mean, rel=1e-6)
    du, dv = u - got_mean[0], v - got_mean[1]
    got_cov = float(p.sum(1) @ du**2), float(du @ p @ dv), float(p.sum(0) @ dv**2)
    assert got_cov == pytest.approx(cov, rel=1e-6)
