"""The translation for moscot, which need not be installed; its own backend is compared in tests/conformance."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sbot
from sbot.compat import moscot


@pytest.fixture
def data():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(12, 2)), draw.normal(size=(15, 2)) + 0.5
    a, b = draw.random(12) + 0.2, draw.random(15) + 0.2
    points = SimpleNamespace(is_cost_matrix=False, is_point_cloud=True, cost=None, data_src=x, data_tgt=y)
    cost = ((x[:, None] - y) ** 2).sum(-1)
    return points, cost, {"a": a / a.sum(), "b": b / b.sum(), "epsilon": 0.3}


def solved(points, asked):
    return sbot.solve_bridge(**moscot.problem(points, asked), solver=sbot.Sinkhorn(tol=1e-11, max_iter=100_000))


def test_a_hard_problem_has_its_marginals_and_the_form_of_a_plan(data):
    points, cost, asked = data
    plan = solved(points, asked).plan().numpy()
    np.testing.assert_allclose(plan.sum(1), asked["a"], rtol=1e-9)
    np.testing.assert_allclose(plan.sum(0), asked["b"], rtol=1e-9)
    form = np.log(plan) + cost / 0.3  # f_i + g_j
    np.testing.assert_allclose(form - form[:1] - form[:, :1] + form[0, 0], 0, atol=1e-8)


@pytest.mark.parametrize("taus", [(0.9, 0.8), (0.9, 1.0), (1.0, 0.7)])
def test_a_relaxed_plan_is_optimal_for_the_entropy_of_the_counting_measure(data, taus):
    """``sum P log P - P`` has ``log P_ij = (f_i + g_j - C_ij) / eps`` with ``f = -rho log(r / a)`` for sums r of rows."""
    points, cost, asked = data
    plan = solved(points, {**asked, "tau_a": taus[0], "tau_b": taus[1]}).plan().numpy()
    rest = 0.3 * np.log(plan) + cost
    sides = zip(taus, (asked["a"], asked["b"]), (plan.sum(1), plan.sum(0)), (1, 0), strict=True)
    for tau, weights, sums, axis in sorted(sides, key=lambda side: side[0]):  # what a hard side has is free
        if tau == 1:
            np.testing.assert_allclose(sums, weights, rtol=1e-9)
            rest = rest - rest.mean(axis, keepdims=True)
        else:
            rest = rest + np.expand_dims(0.3 * tau / (1 - tau) * np.log(sums / weights), axis)
    np.testing.assert_allclose(rest, 0, atol=1e-7)


def test_the_value_of_a_relaxed_problem_tends_to_that_of_the_hard_one(data):
    points, _, asked = data
    hard = float(solved(points, asked).cost())
    found = [moscot.value(solved(points, {**asked, "tau_a": tau, "tau_b": tau})) for tau in (1 - 1e-4, 1 - 1e-6)]
    assert abs(found[0] - hard) > 10 * abs(found[1] - hard)
    assert abs(found[1] - hard) <= 1e-4 * abs(hard)


def test_the_value_is_the_dual_at_these_potentials(data):
    """At the potentials of the entropy relative to ``a x b``, in terms of the counting measure, it is the value there."""
    _, cost, asked = data
    mu, nu, c = (torch.as_tensor(part) for part in (asked["a"], asked["b"], cost))
    relative = sbot.solve_bridge(mu, nu, 0.3, cost=c, relax=(0.5, 0.8), solver=sbot.Sinkhorn(tol=1e-12))
    f, g = (part.values for part in relative.potentials())
    shifted = [(f + 0.3 * mu.log(), mu), (g + 0.3 * nu.log(), nu)]
    plan = relative.plan()
    stand_in = SimpleNamespace(
        problem=SimpleNamespace(mu=relative.problem.mu, nu=relative.problem.nu, one_eps=0.3, relax=(0.5, 0.8)),
        plan=lambda: plan,
        potentials=lambda: [SimpleNamespace(values=part) for part, _ in shifted],
    )
    assert abs(moscot.value(stand_in) - float(relative.cost())) <= 1e-9


def test_another_cost_is_refused(data):
    points, _, asked = data
    with pytest.raises(sbot.errors.Unsupported, match="ott"):
        moscot.problem(SimpleNamespace(**{**vars(points), "cost": "cosine"}), asked)
