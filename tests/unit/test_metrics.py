"""Scores against brute force, scipy, POT and closed forms."""

from __future__ import annotations

import math

import numpy as np
import ot
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from scipy.stats import chi2

import sbot
from sbot import metrics

from ..conftest import clouds, spd, weights


def gaussian(d: int, generator: torch.Generator) -> sbot.Gaussian:
    return sbot.Gaussian(torch.randn(d, generator=generator, dtype=torch.float64), spd(d, generator))


def sampled(bridge: sbot.Bridge) -> sbot.Sampler:
    """Pairs of a bridge side by side: something to draw from."""
    return sbot.Sampler(lambda n, generator: torch.cat(bridge.sample_pairs(n, generator=generator), 1))


# ---- plans -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_marginal_error_is_the_definition(batch, generator):
    p = torch.rand(*batch, 5, 7, generator=generator, dtype=torch.float64)
    a, b = 3 * weights(*batch, 5, generator=generator), 2 * weights(*batch, 7, generator=generator)
    got = metrics.marginal_error(p, a, b)
    for index in np.ndindex(*batch):
        q, u, v = (t[index].numpy() for t in (p, a, b))
        want = abs(q.sum(1) - u).sum() / u.sum() + abs(q.sum(0) - v).sum() / v.sum()
        assert float(got[index]) == pytest.approx(want, rel=1e-13)
    exact = a[..., None] * b[..., None, :] / b.sum(-1)[..., None, None]
    rescaled = sbot.Discrete(None, b * a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))
    assert float(metrics.marginal_error(exact, sbot.Discrete(None, a), rescaled).abs().max()) < 1e-14


def test_plan_error_is_the_definition_and_bounds_the_marginal_error(generator):
    p, q = torch.rand(2, 4, 6, generator=generator, dtype=torch.float64).unbind(0)
    want = np.abs(p.numpy() - q.numpy()).sum() / q.numpy().sum()
    assert float(metrics.plan_error(p, q)) == pytest.approx(want, rel=1e-13)
    assert float(metrics.plan_error(q, q)) == 0
    assert float(metrics.marginal_error(p, q.sum(1), q.sum(0))) <= 2 * want
    batched = metrics.plan_error(torch.stack([p, q]), torch.stack([q, q]))
    assert batched.tolist() == pytest.approx([want, 0], rel=1e-13)


@pytest.mark.parametrize("relax", [None, 0.5, (math.inf, 0.5)], ids=str)
def test_a_bridge_is_measured_against_its_own_problem_in_row_tiles(relax, generator, monkeypatch):
    x, y = clouds(23, 31, 2, generator)
    mu = sbot.Discrete(x, weights(23, generator=generator))
    rough = sbot.Sinkhorn(tol=1e-2, anneal=None)
    tight, loose = (sbot.solve_bridge(mu, y, 0.3, relax=relax, solver=s) for s in (sbot.Sinkhorn(tol=1e-12), rough))
    whole = metrics.plan_error(loose.plan(), tight.plan())
    monkeypatch.setattr(metrics, "TILE", 100)
    assert float(metrics.marginal_error(tight)) < 1e-11
    assert float(metrics.plan_error(loose, tight)) == pytest.approx(float(whole), rel=1e-12)
    assert 1e-7 < float(whole) < 0.1
    # the report's own error is that of nu; a bridge ends with mu exact
    assert float(metrics.marginal_error(loose)) == pytest.approx(loose.report.error, rel=1e-6)
    if relax is not None:
        assert float(metrics.marginal_error(tight.plan(), mu, sbot.Discrete(y))) > 1e-2


# ---- samples ---------------------------------------------------------------------------------------------------------


def test_bures_wasserstein_against_pot_and_scipy(generator):
    p, q = gaussian(4, generator), gaussian(4, generator)
    want = ot.gaussian.bures_wasserstein_distance(*(t.numpy() for t in (p.mean, q.mean, p.cov, q.cov))) ** 2 / 2
    assert float(metrics.bures_wasserstein(p, q)) == pytest.approx(float(want), rel=1e-9)
    assert float(metrics.bures_wasserstein(q, p)) == pytest.approx(float(want), rel=1e-9)
    assert float(metrics.bures_wasserstein(p, p)) < 1e-13
    dirac = sbot.Gaussian(p.mean, torch.zeros(4, 4, dtype=torch.float64))
    assert float(metrics.bures_wasserstein(dirac, p)) == pytest.approx(float(p.cov.trace()) / 2)


def test_bw2_uvp_of_samples_is_the_formula(generator):
    target, x = gaussian(3, generator), gaussian(3, generator).sample(500, generator=generator)
    s, t = np.cov(x.numpy().T), target.cov.numpy()
    root = sqrtm(s)
    bw = (x.numpy().mean(0) - target.mean.numpy()) @ (x.numpy().mean(0) - target.mean.numpy()) / 2
    bw += np.trace(s + t - 2 * np.real(sqrtm(root @ t @ root))) / 2
    assert float(metrics.bw2_uvp(x, target)) == pytest.approx(100 * bw / (np.trace(t) / 2), rel=1e-8)
    assert float(metrics.bw2_uvp(target.mean.expand(2, 3), target)) == pytest.approx(100)


def test_moments_of_mixtures_and_atoms(generator):
    means = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    covs = torch.stack([spd(2, generator) for _ in range(3)])
    mixture = sbot.Mixture(torch.tensor([0.1, 1.0, -0.5], dtype=torch.float64), means, covs)
    share = np.exp([0.1, 1.0, -0.5]) / np.exp([0.1, 1.0, -0.5]).sum()
    mean = share @ means.numpy()
    second = sum(w * (c + np.outer(m, m)) for w, m, c in zip(share, means.numpy(), covs.numpy(), strict=True))
    moments = sbot.Gaussian(mean, second - np.outer(mean, mean))
    assert float(metrics.bw2_uvp(mixture, moments)) < 1e-10
    atoms = sbot.Discrete(means, share)
    weighted = sbot.Gaussian(mean, np.cov(means.numpy().T, aweights=share, bias=True))
    assert float(metrics.bw2_uvp(atoms, weighted)) < 1e-10
    assert float(metrics.bw2_uvp(atoms, moments)) > 1


def test_cbw2_uvp_of_shifted_and_widened_conditionals(generator):
    places = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    cov = torch.eye(2, dtype=torch.float64).expand(50, 2, 2)
    exact, nu = sbot.Gaussian(places, cov), sbot.Gaussian([0.0, 0.0], [[2.0, 0.0], [0.0, 3.0]])
    wide = sbot.Gaussian(places + torch.tensor([0.3, 0.4]), 4 * cov)
    # |0.3, 0.4|^2 / 2 + 2 (2 - 1)^2 / 2, over (2 + 3) / 2
    assert float(metrics.cbw2_uvp(wide, exact, nu)) == pytest.approx(100 * (0.125 + 1) / 2.5)
    # half of the places are right
    half = sbot.Gaussian(torch.where(torch.arange(50)[:, None] < 25, places, wide.mean), cov)
    assert float(metrics.cbw2_uvp(half, exact, nu)) == pytest.approx(100 * 0.125 / 2 / 2.5)


def test_cbw2_uvp_sees_a_wrong_coupling_of_the_right_marginals(generator):
    mu, nu = gaussian(2, generator), gaussian(2, generator)
    bridge = sbot.solve_bridge(mu, nu, 0.5)
    x = mu.sample(200, generator=generator)
    cross = bridge.plan().cov[:2, 2:]
    gain = torch.linalg.solve(mu.cov, cross).T
    exact = sbot.Gaussian(nu.mean + (x - mu.mean) @ gain.T, (nu.cov - gain @ cross).expand(200, 2, 2))
    drawn = metrics.Conditionals(bridge, x).sample(400, generator=generator)
    chance = metrics.floor(lambda y: metrics.cbw2_uvp(y, exact, nu), exact, 400, generator=generator)
    assert abs(float(metrics.cbw2_uvp(drawn, exact, nu)) - chance.mean) < 5 * chance.spread
    independent = metrics.Conditionals(lambda at, g: nu.sample(len(at), generator=g), x)
    drawn = independent.sample(400, generator=generator)
    assert float(metrics.bw2_uvp(drawn.flatten(0, 1), nu)) < 1
    assert float(metrics.cbw2_uvp(drawn, exact, nu)) > 10 * chance.mean


@pytest.mark.parametrize("tile", [7, 10**6])
def test_energy_distance_is_brute_force(tile, generator, monkeypatch):
    x, y = clouds(40, 25, 3, generator)
    monkeypatch.setattr(metrics, "TILE", tile)

    def within(z):
        return sum(np.linalg.norm(a - b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j)

    u, v = x.numpy(), y.numpy()
    want = cdist(u, v).mean() - within(u) / (40 * 39) / 2 - within(v) / (25 * 24) / 2
    assert float(metrics.energy_distance(x, y)) == pytest.approx(want, rel=1e-12)
    assert float(metrics.energy_distance(y, x)) == pytest.approx(want, rel=1e-12)
    far = 1e6
    assert float(metrics.energy_distance(x + far, y + far)) == pytest.approx(want, rel=1e-8)


def test_energy_distance_of_shifted_normals(generator):
    """On a line it is the integral of the squared difference of the distribution functions (Szekely)."""
    grid = np.linspace(-12, 13, 200_001)
    phi = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))
    want = np.trapezoid((phi(grid) - phi(grid - 1)) ** 2, grid)
    one = sbot.Gaussian([0.0], [[1.0]])
    scores = torch.stack(
        [
            metrics.energy_distance(one.sample(300, generator=generator), 1 + one.sample(300, generator=generator))
            for _ in range(50)
        ]
    )
    assert float(scores.mean()) == pytest.approx(want, abs=4 * float(scores.std()) / math.sqrt(50))
    # unbiased: the biased estimate is off by E|x - x'| / n = 1.13 / 300, more than the tolerance
    chance = metrics.floor(
        lambda x: metrics.energy_distance(x, one.sample(300, generator=generator)), one, 300, generator=generator
    )
    assert abs(chance.mean) < 4 * chance.spread / math.sqrt(10)


# ---- floors ----------------------------------------------------------------------------------------------------------


def test_floor_of_a_known_law(generator):
    """``n |mean|^2`` of standard normals is chi-square."""
    one = sbot.Gaussian(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    chance = metrics.floor(lambda x: 50 * x.mean(0).square().sum(), one, 50, repeats=2000, generator=generator)
    assert chance.mean == pytest.approx(chi2(3).mean(), rel=0.1)
    assert chance.spread == pytest.approx(chi2(3).std(), rel=0.1)


def test_bw2_uvp_floor_is_what_exact_samples_score(generator):
    target = gaussian(3, generator)
    chance = metrics.floor(lambda x: metrics.bw2_uvp(x, target), target, 2000, repeats=20, generator=generator)
    score = float(metrics.bw2_uvp(target.sample(2000, generator=generator), target))
    assert abs(score - chance.mean) < 5 * chance.spread
    # delta method for the means alone: 100 E|mean - m|^2 / tr S = 100 / n; the covariances add to it
    assert 100 / 2000 < chance.mean < 3 * 100 / 2000


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "reference", [sbot.Brownian(), sbot.OrnsteinUhlenbeck(0.7), sbot.LinearSDE(diffusion=[[2.0, 0.0], [0.5, 1.0]])]
)
def test_path_kl_of_a_constant_error_of_drift(reference, generator):
    mu, nu = gaussian(2, generator), gaussian(2, generator)
    bridge = sbot.solve_bridge(mu, nu, 0.4, reference=reference)
    shift = torch.tensor([0.3, -0.2], dtype=torch.float64)
    noise = sbot.linalg.matrix(reference.coefficients(0.5)[2].double(), 2)
    want = float(shift @ torch.linalg.solve(noise, shift)) / (2 * 0.4)
    got = metrics.path_kl(bridge, lambda t, x: bridge.drift(t, x) + shift, n=5, strata=4, generator=generator)
    assert got.value == pytest.approx(want, rel=1e-10)
    assert got.standard_error < 1e-10
    part = metrics.path_kl(
        bridge, lambda t, x: bridge.drift(t, x) + shift, n=5, strata=4, interval=(0.2, 0.7), generator=generator
    )
    assert part.value == pytest.approx(want / 2, rel=1e-10)
    assert metrics.path_kl(bridge, bridge, n=5, strata=4, generator=generator) == (0, 0)


def test_path_kl_against_the_reference_is_the_kl_of_the_plans(generator):
    """KL(bridge | reference from the same start) = KL(plan | mu x transition), a KL of two Gaussians."""
    mu, nu, eps = gaussian(2, generator), gaussian(2, generator), 0.5
    bridge = sbot.solve_bridge(mu, nu, eps)
    p = bridge.plan()
    eye = torch.eye(2, dtype=torch.float64)
    q_mean = torch.cat([mu.mean, mu.mean])
    q_cov = torch.cat([torch.cat([mu.cov, mu.cov], 1), torch.cat([mu.cov, mu.cov + eps * eye], 1)], 0)
    gap = q_mean - p.mean
    want = torch.linalg.solve(q_cov, p.cov).trace() + gap @ torch.linalg.solve(q_cov, gap) - 4
    want = float(want + torch.logdet(q_cov) - torch.logdet(p.cov)) / 2
    got = metrics.path_kl(bridge, lambda t, x: torch.zeros_like(x), n=500, strata=100, generator=generator)
    assert abs(got.value - want) < 4 * got.standard_error
    assert got.standard_error < 0.01 * want


def test_path_kl_standard_error_is_the_spread_of_repeats(generator):
    mu, nu = gaussian(1, generator), gaussian(1, generator)
    bridge = sbot.solve_bridge(mu, nu, 0.5)
    runs = [metrics.path_kl(bridge, lambda t, x: t * x, n=20, strata=10, generator=generator) for _ in range(60)]
    spread = np.std([run.value for run in runs], ddof=1)
    assert np.sqrt(np.mean([run.standard_error**2 for run in runs])) == pytest.approx(spread, rel=0.35)


# ---- the door --------------------------------------------------------------------------------------------------------


def bad_calls():
    p, a = torch.full((2, 2), 0.25), torch.tensor([0.5, 0.5])
    x = torch.randn(4, 2)
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    bridge = sbot.solve_bridge(x, x + 1, 0.5)
    m = metrics
    return {
        "marginal missing": (m.marginal_error, (p, a)),
        "marginal of the wrong size": (m.marginal_error, (p, a, torch.ones(3) / 3)),
        "bridge with marginals": (m.marginal_error, (bridge, a, a)),
        "nan plan": (m.marginal_error, (p * float("nan"), a, a)),
        "negative weights": (m.marginal_error, (p, -a, a)),
        "plans of two shapes": (m.plan_error, (p, torch.ones(2, 3))),
        "plan of one dimension": (m.plan_error, (a, a)),
        "no mass": (m.plan_error, (p, 0 * p)),
        "one sample": (m.bw2_uvp, (x[:1], one)),
        "wrong dimension": (m.bw2_uvp, (torch.randn(5, 3), one)),
        "unknown moments": (m.bw2_uvp, (sbot.Sampler(lambda n, g: torch.randn(n, 2)), one)),
        "target without variance": (m.bw2_uvp, (x, sbot.Gaussian(torch.zeros(2), torch.zeros(2, 2)))),
        "batch against one": (m.bw2_uvp, (torch.randn(3, 5, 2), one)),
        "one conditional": (m.cbw2_uvp, (one, one, one)),
        "conditionals at other places": (m.cbw2_uvp, (torch.randn(3, 5, 2), torch.randn(4, 5, 2), one)),
        "places of one dimension": (m.Conditionals, (bridge, a)),
        "source that is nothing": (m.Conditionals, (3, x)),
        "source that returns the wrong shape": (m.Conditionals(lambda at, g: at[:1], x).sample, (2,)),
        "text": (m.energy_distance, ("x", x)),
        "energy of one sample": (m.energy_distance, (x[:1], x)),
        "energy in two dimensions": (m.energy_distance, (x, torch.randn(4, 3))),
        "infinite sample": (m.energy_distance, (x / 0, x)),
        "metric that is a vector": (m.floor, (lambda y: y.mean(0), one, 5)),
        "floor of no sample": (m.floor, (lambda y: 0.0, one, 0)),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_wrong_arguments_are_refused_by_name(name):
    function, arguments = bad_calls()[name]
    with pytest.raises(sbot.InvalidProblem):
        function(*arguments)


@pytest.mark.parametrize(
    "options",
    [
        {"interval": (0.5, 0.5)},
        {"interval": (-0.1, 1)},
        {"interval": 3},
        {"n": 0},
        {"strata": 1},
        {"drift": 3.0},
        {"drift": lambda t, x: x[:, :1]},
        {"drift": lambda t, x: x / 0},
    ],
    ids=["empty", "before 0", "number", "n", "strata", "no function", "shape", "infinite"],
)
def test_path_kl_refuses(options):
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    bridge = sbot.solve_bridge(one, one, 0.5)
    given = {"drift": bridge, "n": 3, "strata": 2, **options}
    with pytest.raises(sbot.InvalidProblem):
        metrics.path_kl(bridge, given.pop("drift"), **given)


def test_what_does_not_exist_is_unsupported(generator):
    one = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    x = torch.randn(3, 2, generator=generator)
    gaussian_bridge, static = sbot.solve_bridge(one, one, 0.5), sbot.solve_bridge(x, x, 0.5, cost=sbot.Lp(1))
    batch = sbot.solve_bridge(x.expand(2, 3, 2), x.expand(2, 3, 2), 0.5)
    for call in (
        lambda: metrics.marginal_error(gaussian_bridge),
        lambda: metrics.plan_error(gaussian_bridge, gaussian_bridge),
        lambda: metrics.path_kl(static, lambda t, x: x),
        lambda: metrics.path_kl(batch, lambda t, x: x),
    ):
        with pytest.raises(sbot.Unsupported):
            call()


def test_floor_of_a_plan_drawn_as_pairs(generator):
    """The energy distance of pairs to pairs: a bridge's own samples score at the floor, another coupling above it."""
    mu, nu = gaussian(2, generator), gaussian(2, generator)
    bridge = sbot.solve_bridge(mu, nu, 0.2)
    pairs = sampled(bridge)
    plan = bridge.plan().sample(500, generator=generator)
    chance = metrics.floor(lambda z: metrics.energy_distance(z, plan), pairs, 500, generator=generator)
    assert abs(chance.mean) < 5 * chance.spread
    independent = torch.cat([mu.sample(500, generator=generator), nu.sample(500, generator=generator)], 1)
    assert float(metrics.energy_distance(independent, plan)) > 5 * chance.spread
