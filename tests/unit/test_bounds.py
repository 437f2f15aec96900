"""What brackets the entropic optimum, and what brackets unregularised transport, against exact values."""

from __future__ import annotations

import math

import ot
import pytest
import torch

import sbot

from ..conftest import clouds, half_squares, weights

INF = math.inf


def small(generator, batch=(), n=12, m=15):
    x, y = clouds(n, m, 2, generator, batch)
    return x, y, weights(*batch, n, generator=generator), weights(*batch, m, generator=generator)


@pytest.mark.parametrize("eps", [1.0, 0.1, 0.01])
@pytest.mark.parametrize("tol", [0.5, 1e-2, 1e-8])
def test_unregularised_transport_lies_between(eps, tol, dtype, recwarn):
    for seed in range(4):
        x, y, a, b = (part.to(dtype) for part in small(torch.Generator().manual_seed(seed)))
        bridge = sbot.solve_bridge((x, a), (y, b), eps, solver=sbot.Sinkhorn(tol=tol))
        bounds = bridge.bounds()
        a, b = a.double(), b.double()
        exact = float(ot.emd2(a.numpy(), (b * a.sum() / b.sum()).numpy(), half_squares(x.double(), y.double()).numpy()))
        assert bounds.lower.dtype == torch.float64
        assert float(bounds.lower) <= exact * (1 + 1e-12)
        assert float(bounds.upper) >= exact * (1 - 1e-12)
        torch.testing.assert_close(bounds.gap, bounds.upper - bounds.lower)
        if tol == 1e-8:  # near: the error falls with eps
            assert float(bounds.gap) <= 3 * eps


@pytest.mark.parametrize("cost", [sbot.Lp(1), sbot.Cosine(), "matrix"], ids=str)
def test_other_costs_batches_and_tiles(cost, generator, monkeypatch):
    x, y, a, b = small(generator, (3,))
    c = half_squares(x, y) if cost == "matrix" else cost.matrix(x, y)
    mu, nu = sbot.Discrete(x, a), sbot.Discrete(y, b)
    bridge = sbot.solve_bridge(mu, nu, 0.05, cost=c if cost == "matrix" else cost, solver=sbot.Sinkhorn(tol=1e-3))
    whole = bridge.bounds()
    assert whole.lower.shape == whole.upper.shape == (3,)
    for k in range(3):
        exact = float(ot.emd2(a[k].numpy(), b[k].numpy(), c[k].numpy()))
        assert float(whole.lower[k]) - 1e-12 <= exact <= float(whole.upper[k]) + 1e-12
    monkeypatch.setattr("sbot.kernels.base.TILE_BYTES", 1)
    for got, want in zip(bridge.bounds(), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)


def test_the_lower_bound_is_the_hard_dual(generator):
    x, y, a, b = small(generator)
    bridge = sbot.solve_bridge((x, a), (y, b), 0.3, solver=sbot.Sinkhorn(tol=1e-2))
    c, (f, g) = half_squares(x, y), (part.values for part in bridge.potentials())
    want = []
    for left, right, cost, start in ((a, b, c, g), (b, a, c.T, f)):
        near = (cost - start).amin(1)
        far = (cost - near[:, None]).amin(0)
        want.append(float(left @ near + right @ far))
        assert float((near[:, None] + far - cost).max()) < 1e-14  # feasible
    assert float(bridge.bounds().lower) == pytest.approx(max(want), rel=1e-12)


def test_zero_weights_and_forbidden_pairs(generator):
    x, y, a, b = small(generator, n=6, m=6)
    c = half_squares(x, y)
    c[torch.arange(6), torch.arange(6)] = INF
    a = torch.tensor([0.3, 0.0, 0.1, 0.2, 0.2, 0.2], dtype=torch.float64)
    b = torch.full((6,), 1 / 6, dtype=torch.float64)
    # the pairs of an atom of no weight bound nothing
    c[1] = -5.0
    bridge = sbot.solve_bridge(a, b, 0.02, cost=c, solver=sbot.Sinkhorn(tol=1e-10))
    bounds = bridge.bounds()
    exact = float(ot.emd2(a[a > 0].numpy(), b.numpy(), torch.where(c.isinf(), 1e3, c)[a > 0].numpy()))
    assert exact - 0.2 <= float(bounds.lower) <= exact + 1e-9
    assert exact - 1e-9 <= float(bounds.upper) <= exact + 0.2
    rough = sbot.solve_bridge(a, b, 0.02, cost=c, solver=sbot.Sinkhorn(tol=0.5)).bounds()
    assert math.isfinite(float(rough.lower))
    assert float(rough.lower) <= exact + 1e-9
    assert exact - 1e-9 <= float(rough.upper) < 1e3
    assert float(rough.gap) == float(rough.upper - rough.lower)


@pytest.mark.parametrize("tol", [0.5, 1e-2, 1e-9])
@pytest.mark.parametrize("relax", [None, 0.7])
def test_the_entropic_optimum_lies_between(tol, relax, generator):
    x, y, a, b = small(generator)
    c, eps = half_squares(x, y), 0.2
    lam = 1.0 if relax is None else relax / (relax + eps)
    g = torch.zeros_like(b)
    for _ in range(2000):
        f = -lam * eps * torch.logsumexp(b.log() + (g - c) / eps, 1)
        g = -lam * eps * torch.logsumexp(a.log()[:, None] + (f[:, None] - c) / eps, 0)
    p = a[:, None] * b * torch.exp((f[:, None] + g - c) / eps)
    f, g = (u if relax is None else -relax * torch.expm1(-u / relax) for u in (f, g))
    exact = float(a @ f + b @ g - eps * (p.sum() - 1))
    bridge = sbot.solve_bridge((x, a), (y, b), eps, relax=relax, solver=sbot.Sinkhorn(tol=tol))
    assert float(bridge.cost()) - 1e-13 <= exact <= float(bridge.cost() + bridge.gap()) + 1e-13
    if tol == 1e-9:
        assert float(bridge.gap()) < 1e-9


def test_bad_questions(generator):
    x, y, a, b = small(generator)
    with pytest.raises(sbot.Unsupported, match="without relax="):
        sbot.solve_bridge((x, a), (y, b), 0.1, relax=(INF, 1.0)).bounds()
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    with pytest.raises(sbot.Unsupported, match="atoms"):
        sbot.solve_bridge(one, one, 0.5).bounds()
