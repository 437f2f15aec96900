"""TorchCFM's sampler and matchers over sbot, against POT and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import ot
import pytest
import torch

import sbot
from sbot.compat.torchcfm import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
    OTPlanSampler,
    SchrodingerBridgeConditionalFlowMatcher,
    TargetConditionalFlowMatcher,
    VariancePreservingConditionalFlowMatcher,
    wasserstein,
)
from sbot.pairing import distinct, match, quantile
from tests.conftest import clouds


@pytest.fixture
def seeded():
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    yield
    np.random.set_state(state)  # noqa: NPY002


def squares(x, y):
    return (x[:, None] - y[None]).square().sum(-1)


# ---- the permutation of least cost ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prices", [False, True])
def test_match_is_the_best_of_all_permutations(generator, prices):
    for n in (1, 2, 3, 6):
        cost = torch.rand(n, n, generator=generator, dtype=torch.float64)
        given = torch.randn(n, generator=generator, dtype=torch.float64) if prices else None
        best = min(sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(n)))
        order = match(cost, given)
        assert sorted(order.tolist()) == list(range(n))
        assert float(cost.gather(1, order[:, None]).sum()) == pytest.approx(float(best), rel=1e-12)


def test_match_with_ties():
    cost = torch.randint(0, 3, (40, 40), generator=torch.Generator().manual_seed(0)).double()
    plan = ot.emd([], [], cost)
    assert float(cost.gather(1, match(cost)[:, None]).sum()) == pytest.approx(40 * float((plan * cost).sum()))


def test_match_refuses_what_has_no_permutation():
    with pytest.raises(sbot.InvalidProblem, match="permutation"):
        match(torch.ones(2, 3))
    with pytest.raises(sbot.InvalidProblem, match="NaN"):
        match(torch.tensor([[math.inf]]))


@pytest.mark.parametrize(("n", "d"), [(20, 2), (128, 2), (200, 30)])
def test_exact_plan_is_that_of_pot(generator, dtype, n, d):
    x, y = (part.to(dtype) for part in clouds(n, n, d, generator))
    plan = OTPlanSampler("exact").get_map(x, y)
    assert plan.dtype == dtype
    assert torch.equal(plan > 0, ot.emd([], [], squares(x.double(), y.double())) > 0)
    torch.testing.assert_close(plan.sum(0), torch.full((n,), 1 / n, dtype=dtype))


def test_exact_plan_of_coinciding_and_of_far_points():
    x = torch.zeros(40, 3)
    assert OTPlanSampler("exact").get_map(x, x).sum() == pytest.approx(1.0)
    y = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OTPlanSampler("exact").get_map(y + 1000, y + 1000), torch.eye(40) / 40)


def test_exact_plan_between_unequal_numbers(generator):
    x, y = clouds(6, 9, 2, generator)
    torch.testing.assert_close(OTPlanSampler("exact").get_map(x, y), ot.emd([], [], squares(x, y)))


# ---- entropic plans ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("method", ["sinkhorn", "partial", "unbalanced"])
def test_entropic_plans_are_those_of_pot(generator, method, normalize):
    x, y = clouds(30, 40, 2, generator)
    reg, reg_m = 0.3, 2.0
    cost = squares(x, y)
    cost = cost / cost.max() if normalize else cost
    a, b = torch.full((30,), 1 / 30, dtype=x.dtype), torch.full((40,), 1 / 40, dtype=x.dtype)
    expected = {
        "sinkhorn": lambda: ot.sinkhorn(a, b, cost, reg, method="sinkhorn_log", stopThr=1e-14, numItermax=10_000),
        "partial": lambda: ot.partial.entropic_partial_wasserstein(a, b, cost, reg, stopThr=1e-14, numItermax=10_000),
        "unbalanced": lambda: ot.unbalanced.sinkhorn_knopp_unbalanced(
            a, b, cost, reg, reg_m, stopThr=1e-14, numItermax=10_000
        ),
    }[method]()
    sampler = OTPlanSampler(method, reg=reg, reg_m=reg_m, normalize_cost=normalize)
    torch.testing.assert_close(sampler.get_map(x, y), expected, rtol=1e-6, atol=1e-12)


def test_small_reg_in_float32_is_computed_in_float64():
    x, y = torch.randn(2, 64, 3, generator=torch.Generator().manual_seed(0)).unbind(0)
    plan = OTPlanSampler("sinkhorn", reg=1e-6).get_map(x, y)
    assert plan.dtype == torch.float32
    torch.testing.assert_close(plan.sum(0), torch.full((64,), 1 / 64), rtol=1e-4, atol=0)


def test_a_plan_without_mass_is_scaled_and_not_uniform():
    x = torch.tensor([[0.0], [1.0]])
    sampler = OTPlanSampler("unbalanced", reg=0.05, reg_m=0.1)
    with pytest.warns(UserWarning, match="mass"):
        plan = sampler.get_map(x, x + 100)
    assert float(plan.sum()) == pytest.approx(1, rel=1e-4)
    assert float(plan.max()) > 0.3


# ---- pairs ---------------------------------------------------------------------------------------------------------


def test_pairs_are_those_that_numpy_draws(generator, seeded):
    plan = torch.rand(7, 5, generator=generator, dtype=torch.float64)
    i, j = OTPlanSampler("exact").sample_map(plan, 50)
    np.random.seed(7)  # noqa: NPY002
    cells = np.random.choice(35, p=(plan / plan.sum()).flatten().numpy(), size=50)  # noqa: NPY002
    assert np.array_equal(i * 5 + j, cells)


def test_torch_stream_is_left_alone(seeded):
    x, y = torch.rand(2, 8, 2).unbind(0)
    before = torch.get_rng_state()
    for replace in (True, False):
        OTPlanSampler("sinkhorn").sample_plan(x, y, replace=replace)
    assert torch.equal(torch.get_rng_state(), before)


def test_generator_decides(generator):
    x, y = clouds(16, 16, 2, generator)
    sampler = OTPlanSampler("sinkhorn", reg=1.0)
    for replace in (True, False):
        one, two = (sampler.sample_plan(x, y, replace, generator=torch.Generator().manual_seed(3))[1] for _ in range(2))
        assert torch.equal(one, two)


def test_without_replacement_no_pair_comes_twice(generator):
    x, y = clouds(30, 30, 2, generator)
    plan = OTPlanSampler("exact").get_map(x, y)
    i, j = OTPlanSampler("exact").sample_map(plan, 30, replace=False, generator=generator)
    assert sorted(i.tolist()) == list(range(30))
    assert bool((plan[i, j] > 0).all())
    with pytest.raises(ValueError, match="30 entries"):
        OTPlanSampler("exact").sample_map(plan, 31, replace=False)


def test_draws_follow_the_mass(generator):
    mass = torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0, 0.0])
    cells = quantile(mass, torch.rand(40_000, generator=generator))
    torch.testing.assert_close(cells.bincount(minlength=6) / 40_000, mass / 8, atol=0.01, rtol=0)
    assert quantile(mass, torch.tensor([0.0, 1.0])).tolist() == [1, 4]
    # two draws without replacement: P(first = a, second = b) = p_a p_b / (1 - p_a)
    pairs = torch.stack([distinct(mass[1:3].repeat(1), 1, generator=generator)[0] for _ in range(2000)])
    assert float(pairs.double().mean()) == pytest.approx(2 / 3, abs=0.04)


def test_permutation_keeps_the_first_in_order(generator):
    x, y = clouds(40, 40, 2, generator)
    sampler = OTPlanSampler("exact", permutation=True)
    x0, x1, y0, y1 = sampler.sample_plan_with_labels(x, y, torch.arange(40), torch.arange(40))
    assert torch.equal(x0, x)
    assert torch.equal(y0, torch.arange(40))
    assert sorted(y1.tolist()) == list(range(40))
    assert torch.equal(x1, y[y1])
    assert torch.equal(sampler.sample_plan_with_scipy(x, y)[1], x1)
    with pytest.raises(sbot.Unsupported, match="permutation"):
        sampler.sample_plan(x, y[:-1])


def test_labels_and_shapes_move_with_the_points(generator):
    x, y = torch.randn(2, 12, 3, 4, generator=generator).unbind(0)
    x0, x1, y0, y1 = OTPlanSampler("sinkhorn", reg=2.0).sample_plan_with_labels(x, y, None, y[:, 0, 0])
    assert x0.shape == x1.shape == (12, 3, 4)
    assert y0 is None
    assert torch.equal(y1, x1[:, 0, 0])


@pytest.mark.parametrize("method", ["exact", "sinkhorn"])
def test_trajectories_follow_the_plans(seeded, method):
    x = torch.linspace(0, 1, 12)[:, None]
    flow = torch.stack([x, x.flip(0) + 3, x + 6], 1)
    out = OTPlanSampler(method, reg=1e-4).sample_trajectory(flow)
    assert isinstance(out, np.ndarray)
    np.testing.assert_allclose(out[:, 1] - out[:, 0], 3, atol=1e-5)
    np.testing.assert_allclose(out[:, 2] - out[:, 1], 3, atol=1e-5)


# ---- distances and matchers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [1, 2])
def test_wasserstein(generator, power):
    x, y = clouds(25, 25, 2, generator)
    cost = squares(x, y) ** (power / 2)
    assert wasserstein(x, y, power=power) == pytest.approx(float(ot.emd2([], [], cost)) ** (1 / power))
    entropic = float(ot.sinkhorn2([], [], cost, 0.1, method="sinkhorn_log", stopThr=1e-13, numItermax=10_000))
    assert wasserstein(x, y, "sinkhorn", reg=0.1, power=power) == pytest.approx(entropic ** (1 / power), rel=1e-8)


def test_schrodinger_matcher_has_the_law_of_the_bridge(generator):
    """Mid-points of the matcher against the bridge of ``eps = sigma^2``."""
    sigma, n = 0.8, 400
    x, y = (
        torch.randn(n, 1, dtype=torch.float64, generator=generator),
        1 + torch.randn(n, 1, dtype=torch.float64, generator=generator),
    )
    sampler = SchrodingerBridgeConditionalFlowMatcher(sigma).ot_sampler
    bridge = sbot.solve_bridge(x, y, sigma**2, solver=sbot.Sinkhorn(tol=1e-11))
    torch.testing.assert_close(sampler.get_map(x, y), bridge.plan(), rtol=1e-6, atol=0)


def test_paths_of_the_matchers(generator):
    x0, x1 = clouds(6, 6, 3, generator)
    t = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)
    s = t[:, None].clone().requires_grad_()
    for matcher in (
        ConditionalFlowMatcher(0.3),
        TargetConditionalFlowMatcher(0.3),
        VariancePreservingConditionalFlowMatcher(0.0),
        SchrodingerBridgeConditionalFlowMatcher(0.3),
    ):
        z = torch.randn(6, 3, generator=generator, dtype=torch.float64)
        if isinstance(matcher, ConditionalFlowMatcher) and type(matcher) is ConditionalFlowMatcher:
            assert matcher.compute_lambda(t) == pytest.approx(2 / 0.3)
        path = matcher.compute_mu_t(x0, x1, s) + matcher.compute_sigma_t(s) * z
        # the velocity is the derivative of the path in time
        (speed,) = torch.autograd.grad(path.sum(1).sum(), s)
        flow = matcher.compute_conditional_flow(x0, x1, t, path.detach())
        torch.testing.assert_close(flow.sum(1), speed[:, 0], rtol=1e-5, atol=1e-6)


def test_guided_matcher_returns_labels_and_noise():
    x = torch.rand(9, 2)
    matcher = ExactOptimalTransportConditionalFlowMatcher(0.1)
    t, xt, ut, y0, y1, noise = matcher.guided_sample_location_and_conditional_flow(
        x, x, torch.arange(9), torch.arange(9), return_noise=True
    )
    assert torch.equal(y0, y1)
    assert torch.allclose(ut, torch.zeros(9, 2))
    assert t.shape == (9,)
    assert xt.shape == noise.shape == (9, 2)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: OTPlanSampler("emd"), "Unknown method"),
        (lambda: OTPlanSampler("sinkhorn", reg=0), "reg"),
        (lambda: OTPlanSampler("unbalanced", reg_m=-1), "reg_m"),
        (lambda: OTPlanSampler("exact", num_threads="all"), "num_threads"),
        (lambda: OTPlanSampler("sinkhorn", permutation=True), "exact"),
        (lambda: OTPlanSampler("exact").get_map(torch.ones(3), torch.ones(3)), "shape"),
        (lambda: OTPlanSampler("exact").get_map(torch.full((3, 1), math.nan), torch.ones(3, 1)), "NaN"),
        (lambda: OTPlanSampler("exact").sample_map(torch.zeros(2, 2), 1), "mass"),
        (lambda: wasserstein(torch.ones(2, 1), torch.ones(2, 1), "noname"), "Unknown method"),
        (lambda: wasserstein(torch.ones(2, 1), torch.ones(2, 1), power=3), "power"),
        (lambda: SchrodingerBridgeConditionalFlowMatcher(0.0), "positive"),
        (
            lambda: ConditionalFlowMatcher().sample_location_and_conditional_flow(
                torch.ones(2, 1), torch.ones(2, 1), torch.ones(3)
            ),
            "times",
        ),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="numItermax"):
        wasserstein(torch.ones(2, 1), torch.ones(2, 1), numItermax=3)


@pytest.mark.parametrize("n", [20, 60])
def test_exact_pairs_are_those_of_the_plan(n, generator):
    """Drawn from the permutation as from the plan it is, under one seed."""
    x, y = (part.float() for part in clouds(n, n, 2, generator))
    sampler = OTPlanSampler("exact")
    drawn = []
    for draw in (lambda: sampler._pairs(x, y, True, None), lambda: sampler.sample_map(sampler.get_map(x, y), n)):
        np.random.seed(3)  # noqa: NPY002
        drawn.append(draw())
    for one, two in zip(*drawn, strict=True):
        assert torch.equal(one, two)
    assert len(set(drawn[0][0].tolist())) < n  # with replacement
