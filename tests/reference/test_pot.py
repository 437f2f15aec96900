"""Plans, potentials and values against POT's."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

import sbot

from ..conftest import clouds, half_squares, kl, weights

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ot


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("n", [1, 20, 60])
@pytest.mark.parametrize("m", [25, 60])
@pytest.mark.parametrize("d", [1, 2, 50])
@pytest.mark.parametrize("rel", [3e-2, 1e-1, 1.0, 10.0])
def test_balanced_plan(n, m, d, rel, generator):
    x, y = clouds(n, m, d, generator)
    a, b = weights(n, generator=generator), weights(m, generator=generator)
    c = half_squares(x, y)
    eps = rel * float(c.mean())
    theirs, log = ot.bregman.sinkhorn_log(
        a.numpy(), b.numpy(), c.numpy(), eps, numItermax=100_000, stopThr=1e-15, log=True, warn=False
    )
    theirs = torch.from_numpy(theirs)
    bridge = sbot.solve_bridge((x, a), (y, b), eps, solver=sbot.Sinkhorn(tol=1e-13, max_iter=100_000))
    assert relative(bridge.plan(), theirs) <= 1e-9
    f = eps * (torch.from_numpy(log["log_u"]) - a.log())  # POT's log u contains log a
    ours = bridge.potentials().f.values
    assert float((ours - ours.mean() - f + f.mean()).abs().max()) <= 1e-9 * float(c.max())
    torch.testing.assert_close(bridge.linear_cost(), (theirs * c).sum(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        bridge.cost(), (theirs * c).sum() + eps * kl(theirs, a[:, None] * b), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("metric", ["cityblock", "cosine", "euclidean"])
def test_other_costs(metric, generator):
    x, y = clouds(20, 25, 3, generator)
    cost = {"cityblock": sbot.Lp(1), "cosine": sbot.Cosine(), "euclidean": sbot.Lp(2)}[metric]
    c = torch.from_numpy(ot.dist(x.numpy(), y.numpy(), metric))
    theirs = ot.sinkhorn([], [], c.numpy(), 0.3, method="sinkhorn_log", numItermax=100_000, stopThr=1e-15, warn=False)
    for given in (cost, c, lambda x, y: c):
        bridge = sbot.solve_bridge(x, y, 0.3, cost=given, solver=sbot.Sinkhorn(tol=1e-13))
        assert relative(bridge.plan(), torch.from_numpy(theirs)) <= 1e-9


@pytest.mark.parametrize("rho", [(1.0, 1.0), (0.3, 3.0), (float("inf"), 0.5), (0.5, float("inf"))], ids=str)
@pytest.mark.parametrize("eps", [1.0, 0.2])
def test_unbalanced_plan(rho, eps, generator):
    x, y = clouds(20, 30, 2, generator)
    a, b = weights(20, generator=generator), 1.4 * weights(30, generator=generator)
    c = half_squares(x, y)
    theirs = ot.unbalanced.sinkhorn_unbalanced(
        a.numpy(), b.numpy(), c.numpy(), eps, list(rho), reg_type="kl", numItermax=100_000, stopThr=1e-15
    )
    bridge = sbot.solve_bridge((x, a), (y, b), eps, relax=rho, solver=sbot.Sinkhorn(tol=1e-13))
    assert relative(bridge.plan(), torch.from_numpy(theirs)) <= 1e-9


def test_small_eps_against_unregularised_transport(generator):
    """As eps falls, <P, C> falls to the transport cost of ot.emd2, and the dual stays below the entropic value."""
    x, y = clouds(30, 30, 2, generator)
    c = half_squares(x, y)
    exact = ot.emd2([], [], np.ascontiguousarray(c.numpy()))
    values = []
    for rel in (1e-1, 3e-2, 1e-2):
        bridge = sbot.solve_bridge(x, y, rel * float(c.mean()), solver=sbot.Sinkhorn(tol=1e-6, max_iter=100_000))
        values.append(float(bridge.linear_cost()))
    assert values[0] > values[1] > values[2] > exact - 1e-6
    assert values[2] - exact < 0.05 * exact
