"""LightSB and the coupling of bridges known through samples, against mixtures whose plan is known."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import sbot
from sbot import metrics
from sbot.potentials import Atoms, Quadratics
from sbot.solvers.mixture import AdjustedMixture, kmeans, start
from tests.conftest import spd

FAST = sbot.FitConfig(steps=250, batch=512, lr=1e-2, ema=0.98, clip=None)
REFERENCES = {
    "brownian": sbot.Brownian(),
    "ou": sbot.OrnsteinUhlenbeck(0.8, [1.0, -0.5]),
    "vp": sbot.LinearSDE.vp(0.1, 3.0),
    "ve": sbot.LinearSDE.ve(0.5, 2.0),
}


#: Exact samples of nu that stand for it.
POOL = 20_000


class Known:
    """A bridge from N(0, I) with a mixture potential of our own: K components, its nu by exact sampling."""

    def __init__(
        self, reference=None, eps: float = 0.5, d: int = 2, k: int = 3, full: bool = False, offset=0.0
    ) -> None:
        generator = torch.Generator().manual_seed(3)
        self.reference = sbot.Brownian() if reference is None else reference
        step = self.reference.transition(0.0, 1.0)
        noise = eps * step.cov
        angle = 2 * math.pi * torch.arange(k, dtype=torch.float64) / k
        means = torch.zeros(k, d, dtype=torch.float64)
        means[:, 0], means[:, 1 % d] = 1.5 * angle.cos(), 1.5 * angle.sin()
        width = noise * (0.3 + 0.4 * torch.rand(k, d, generator=generator, dtype=torch.float64))
        covs = torch.diag_embed(width)
        if full:
            covs = noise * torch.stack([spd(d, generator, 0.2) for _ in range(k)]) / 4
        self.offset, self.eps, self.d = offset, eps, d
        origin = torch.full((d,), float(offset), dtype=torch.float64)
        growth = torch.eye(d, dtype=torch.float64) / noise
        psi = Quadratics(torch.zeros(k, dtype=torch.float64), means + origin, covs, growth, origin)
        self.mu = sbot.Gaussian(origin, torch.eye(d, dtype=torch.float64))
        report = sbot.Report("known", True, "exact")
        problem = sbot.Problem.of(self.mu, sbot.Sampler(self.draw, (d,), like=origin), eps, self.reference)
        self.bridge = sbot.PotentialBridge(problem, Atoms(origin[None], torch.zeros(1).double()), psi, report)

        x = self.mu.sample(POOL, generator=generator)
        self.pool = self.bridge.condition(x).sample(generator=generator)

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Samples of nu, from a pool of exact ones."""
        return self.pool[torch.randint(POOL, (n,), generator=generator)]

    def nu(self, dtype: torch.dtype = torch.float64) -> sbot.Sampler:
        return sbot.Sampler(lambda n, g: self.draw(n, g).to(dtype), (self.d,), like=torch.empty(0, dtype=dtype))

    def solve(self, solver: sbot.LightSB, dtype: torch.dtype = torch.float64) -> sbot.Bridge:
        return sbot.solve_bridge(
            self.mu.to(dtype=dtype), self.nu(dtype), self.eps, reference=self.reference, solver=solver
        )

    def score(self, bridge: sbot.Bridge, n: int = 200) -> float:
        """cBW2-UVP from the moments of both conditional laws, without sampling noise."""
        x = self.mu.sample(n, generator=torch.Generator().manual_seed(5))
        laws = [moments(b, x) for b in (bridge, self.bridge)]
        nu = self.draw(5000, torch.Generator().manual_seed(6))
        return float(metrics.cbw2_uvp(*laws, nu))


def moments(bridge: sbot.Bridge, x: Tensor) -> sbot.Gaussian:
    """Mean and covariance of each law of ``X_1`` given ``X_0 = x_i``."""
    law = bridge.condition(x)
    share, means, covs = (part.double() for part in (law.component_weights, law.component_means, law.component_covs))
    mean = (share[..., None] * means).sum(0)
    gap = means - mean
    cov = torch.einsum("kn,kni,knj->nij", share, gap, gap) + torch.einsum("kn,kij->nij", share, covs)
    return sbot.Gaussian(mean, (cov + cov.mT) / 2)


def solver(**options) -> sbot.LightSB:
    return sbot.LightSB(**{"components": 6, "atoms": 1024, "fit": FAST} | options)


# ---- known plans -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("brownian", torch.float32),
        ("brownian", torch.float64),
        ("ou", torch.float64),
        ("vp", torch.float32),
        ("ve", torch.float64),
    ],
)
def test_known_mixture_under_scalar_references(name, dtype):
    known = Known(REFERENCES[name])
    bridge = known.solve(solver(), dtype)
    assert bridge.report.converged
    assert known.score(bridge) < 0.3
    x = known.mu.sample(300, generator=torch.Generator().manual_seed(1)).to(dtype)
    for t in (0.0, 0.3, 0.9):
        ours, exact = bridge.drift(t, x), known.bridge.drift(t, x.double())
        assert ours.dtype == dtype
        reference = known.reference.drift(t, x.double())
        assert (ours - exact).norm() < 0.1 * (exact - reference).norm()


def test_score_sees_a_wrong_noise_and_the_independent_coupling():
    # what the tolerance above would let through
    known = Known()
    x = known.mu.sample(200, generator=torch.Generator().manual_seed(5))
    nu = known.draw(5000, torch.Generator().manual_seed(6))
    exact, marginal = moments(known.bridge, x), sbot.Gaussian.from_samples(nu)
    independent = sbot.Gaussian(marginal.mean.expand(200, 2), marginal.cov.expand(200, 2, 2))
    assert metrics.cbw2_uvp(independent, exact, nu) > 10
    wider = sbot.Gaussian(exact.mean, exact.cov * 1.5)
    assert metrics.cbw2_uvp(wider, exact, nu) > 1


@pytest.mark.parametrize("loss", ["dual", "matching"])
@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_both_losses_and_covariances(loss, covariance):
    known = Known(full=covariance == "full")
    bridge = known.solve(solver(loss=loss, covariance=covariance, teacher=known.bridge if loss == "matching" else None))
    assert known.score(bridge) < 0.6


def test_matching_learns_from_a_pair_of_tensors():
    known = Known()
    x, y = known.bridge.sample_pairs(20_000, generator=torch.Generator().manual_seed(0))
    assert known.score(known.solve(solver(loss="matching", teacher=(x, y)))) < 0.6


def test_drift_of_the_matching_loss_is_that_of_the_bridge():
    generator = torch.Generator().manual_seed(0)
    t, tau = torch.tensor([0.0, 0.4, 0.95]).double(), 0.3
    x = torch.randn(3, 5, 2, generator=generator).double()
    for slope in (torch.rand(4, 2, generator=generator).double() + 0.2, torch.stack([spd(2, generator)] * 4)):
        parts = torch.randn(4, generator=generator).double(), torch.randn(4, 2, generator=generator).double()
        mixture = AdjustedMixture(*parts, slope, torch.randn(4, 2, generator=generator).double())
        logit, mean, _ = mixture.pieces(tau)
        covs = tau * (torch.diag_embed(slope) if slope.ndim == 2 else slope)
        psi = Quadratics(logit, mean, covs, torch.eye(2).double() / tau)
        one = sbot.Gaussian(torch.zeros(2).double(), torch.eye(2).double())
        phi = Atoms(torch.zeros(1, 2).double(), torch.zeros(1).double())
        bridge = sbot.PotentialBridge(sbot.Problem.of(one, one, tau), phi, psi, sbot.Report("", True, "exact"))
        drifts = mixture.bridge_drift(t, x, tau)
        for k, time in enumerate(t.tolist()):
            assert torch.allclose(drifts[k], bridge.drift(time, x[k]), atol=1e-9)
        # log c is the log-mass at the start, log v the log-density at the end, up to the quadratics of the reference
        gap = (
            mixture.ahead(x[0], tau).logsumexp(-1) - x[0].square().sum(-1) / (2 * tau) - bridge.condition(x[0]).log_mass
        )
        assert torch.allclose(gap, gap[:1].expand(5), atol=1e-9)
        gap = mixture.density(x[0], tau).logsumexp(-1) + x[0].square().sum(-1) / (2 * tau) - psi.log_density(x[0])
        assert torch.allclose(gap, torch.zeros(5).double(), atol=1e-9)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_one_component_is_the_gaussian_bridge(covariance):
    generator = torch.Generator().manual_seed(0)
    cov = torch.diag(torch.tensor([0.5, 2.0]).double()) if covariance == "diagonal" else spd(2, generator)
    mu = sbot.Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    nu = sbot.Gaussian(torch.tensor([2.0, -1.0]).double(), cov)
    exact = sbot.solve_bridge(mu, nu, 0.7)
    ours = sbot.solve_bridge(mu, nu, 0.7, solver=solver(components=1, covariance=covariance, atoms=4096))
    x = torch.randn(100, 2, generator=generator).double()
    assert float(metrics.cbw2_uvp(moments(ours, x), moments(exact, x), nu)) < 0.05
    for t in (0.0, 0.5, 1.0):
        assert (ours.drift(t, x) - exact.drift(t, x)).norm() < 0.05 * exact.drift(t, x).norm()
    assert abs(float(ours.cost() - exact.cost())) < 0.05 * float(exact.cost())
    assert abs(float(ours.linear_cost() - exact.linear_cost())) < 0.05 * float(exact.linear_cost())
    f, g = (ours.potentials().f(x), ours.potentials().g(x))
    assert abs(float((f - exact.potentials().f(x)).mean())) < 0.1
    # through the atoms of phi, at the times where they are dense enough
    assert (ours.log_prob(0.5, x) - exact.log_prob(0.5, x)).abs().median() < 0.1
    assert (ours.reverse_drift(0.7, x) - exact.reverse_drift(0.7, x)).norm() < 0.2 * exact.reverse_drift(0.7, x).norm()
    assert g.shape == (100,)


def test_discrete_ends_agree_with_sinkhorn():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 2, generator=generator).double()
    y = x[torch.randperm(300, generator=generator)] * 0.6 + 1
    weights = torch.rand(300, generator=generator).double() + 0.5
    exact = sbot.solve_bridge((x, weights / weights.sum()), y, 1.0)
    ours = sbot.solve_bridge((x, weights / weights.sum()), y, 1.0, solver=solver(covariance="full"))
    assert (ours.transport() - exact.transport()).norm() < 0.1 * (exact.transport() - exact.transport().mean(0)).norm()
    assert abs(float(ours.cost() - exact.cost())) < 0.05
    assert abs(float(ours.linear_cost() - exact.linear_cost())) < 0.1 * float(exact.linear_cost())
    assert torch.equal(ours.phi.points, x)
    assert isinstance(ours.marginal(0.0), sbot.Discrete)


# ---- laws ------------------------------------------------------------------------------------------------------------


def test_the_law_at_every_time_integrates_to_one():
    nu = sbot.Mixture(torch.zeros(2).double(), torch.tensor([[-2.0], [1.0]]), 0.2 * torch.ones(2, 1, 1))
    bridge = sbot.solve_bridge(sbot.Gaussian([[0.0]][0], [[1.0]]), nu, 0.5, solver=solver())
    grid = torch.linspace(-9, 9, 3001)[:, None].to(bridge.problem.dtype)
    for t in (0.2, 0.5, 1.0):
        density = bridge.log_prob(t, grid).exp()
        assert abs(float(torch.trapezoid(density, grid[:, 0])) - 1) < 1e-3
    end = bridge.log_prob(1.0, grid).exp()
    assert (end - nu.log_prob(grid).exp()).abs().max() < 0.1 * nu.log_prob(grid).exp().max()


@pytest.mark.parametrize(("offset", "scale"), [(1e3, 1.0), (0.0, 1e-3), (0.0, 1e3)])
def test_places_and_units_do_not_matter(offset, scale):
    known, quick = Known(), sbot.FitConfig(steps=150, lr=1e-2, ema=0.95)
    plain = known.solve(solver(fit=quick), torch.float32)
    mu = sbot.Sampler(
        lambda n, g: (known.mu.sample(n, generator=g) * scale + offset).float(), (2,), like=torch.empty(0)
    )
    nu = sbot.Sampler(lambda n, g: (known.draw(n, g) * scale + offset).float(), (2,), like=torch.empty(0))
    moved = sbot.solve_bridge(mu, nu, 0.5 * scale**2, solver=solver(fit=quick))
    assert moved.report.converged
    x = known.mu.sample(200, generator=torch.Generator().manual_seed(1)).float()
    for t in (0.0, 0.7):
        ours = moved.drift(t, x * scale + offset) / scale
        assert (ours - plain.drift(t, x)).norm() < 0.05 * plain.drift(t, x).norm()


@pytest.mark.parametrize("eps", [0.1, 10.0])
def test_float32_stays_finite_in_high_dimension(eps):
    d, generator = 64, torch.Generator().manual_seed(0)
    x = torch.randn(500, d, generator=generator)
    y = x[torch.randperm(500, generator=generator)] + 5 * torch.nn.functional.one_hot(torch.arange(500) % 3, d)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sbot.NotConverged)
        bridge = sbot.solve_bridge(x, y, eps, solver=solver(components=20, fit=sbot.FitConfig(steps=30, lr=1e-2)))
    assert torch.isfinite(bridge.drift(0.5, x)).all()
    assert torch.isfinite(bridge.sample_paths(50, [0.0, 0.5, 1.0])).all()


def test_point_masses_and_repeated_points():
    x, y = torch.zeros(1, 2).double(), torch.ones(5, 2).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sbot.NotConverged)
        bridge = sbot.solve_bridge(x, y, 0.5, solver=solver(fit=sbot.FitConfig(steps=50)))
    assert torch.allclose(bridge.transport(), y[:1], atol=0.1)


def test_the_seed_decides():
    known, quick = Known(), sbot.FitConfig(steps=20, lr=1e-2)
    before = torch.random.get_rng_state()
    bridges = [known.solve(solver(fit=quick, tol=10.0)) for _ in range(2)]
    other = known.solve(solver(fit=sbot.FitConfig(steps=20, lr=1e-2, seed=1), tol=10.0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(bridges[0].psi.means, bridges[1].psi.means)
    assert torch.equal(bridges[0].phi.log_weights, bridges[1].phi.log_weights)
    assert not torch.equal(bridges[0].psi.means, other.psi.means)


def test_history_holds_the_objective_and_progress_is_shown():
    known, seen = Known(eps=0.05, k=2), []
    bridge = sbot.solve_bridge(known.mu, known.nu(), 0.05, solver=solver(), progress=seen.append)
    steps, temperatures, objectives = zip(*bridge.report.history, strict=True)
    assert steps[-1] == 250 and len(seen) == len(steps)
    assert temperatures[-1] == pytest.approx(0.05)
    at_the_end = [o for t, o in zip(temperatures, objectives, strict=True) if t == temperatures[-1]]
    assert at_the_end[-1] <= at_the_end[0] + 0.05


def test_a_callback_ends_the_training():
    fit = sbot.FitConfig(steps=100, callbacks=(lambda state: state.iteration == 7,))
    bridge = Known().solve(solver(fit=fit, tol=10.0))
    assert bridge.report.iterations == 7


def test_not_converged_warns_once():
    # one component cannot be three
    with pytest.warns(sbot.NotConverged, match="components=") as caught:
        bridge = Known(eps=0.02).solve(solver(components=1, tol=1e-4, fit=sbot.FitConfig(steps=10)))
    assert len(caught) == 1
    assert not bridge.report.converged and bridge.report.error > 1e-4


# ---- a start -----------------------------------------------------------------------------------------------------------


def test_kmeans_finds_separate_clusters():
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    x = 10 * torch.eye(3)[truth] + torch.randn(300, 3, generator=generator)
    label = kmeans(x, 3, generator)
    assert all(len(label[truth == k].unique()) == 1 for k in range(3))
    assert len(label.unique()) == 3


def test_start_of_one_gaussian_is_exact_in_moments():
    generator = torch.Generator().manual_seed(0)
    u, w = torch.randn(20_000, 2, generator=generator).double(), torch.randn(20_000, 2, generator=generator).double()
    mixture = start(u, w, 1, 1.0, True, generator)
    slope = mixture.factors() @ mixture.factors().mT
    # Cov(x, y) between two standard normals at eps = 1 is (sqrt 5 - 1) / 2 times the identity
    assert torch.allclose(slope[0], (math.sqrt(5) - 1) / 2 * torch.eye(2).double(), atol=0.02)


# ---- the coupling ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def learned() -> sbot.Bridge:
    return Known().solve(solver())


def test_what_a_sampled_plan_has_and_has_not(learned):
    with pytest.raises(sbot.Unsupported, match="sample_pairs"):
        learned.plan()
    with pytest.raises(sbot.Unsupported, match="energy_distance"):
        learned.gap()
    with pytest.raises(sbot.Unsupported, match="call the potential"):
        _ = learned.potentials().f.values
    with pytest.raises(sbot.Unsupported, match="give points"):
        learned.transport()
    assert torch.equal(learned.cost(), learned.cost())
    estimate = learned.coupling.estimate(2000, generator=torch.Generator().manual_seed(1))
    assert abs(estimate.value - float(learned.cost())) < 6 * estimate.standard_error
    x, y = learned.sample_pairs(20_000, generator=torch.Generator().manual_seed(0))
    assert float(learned.linear_cost()) == pytest.approx(float((x - y).square().sum(-1).mean() / 2), rel=0.1)
    assert learned.marginal(0.0) is learned.problem.mu
    assert learned.interpolate(0.5, 10).shape == (10, 2)
    assert learned.to(dtype=torch.float32).drift(0.5, x[:3].float()).dtype == torch.float32


def test_files_keep_mixtures_and_ask_for_samplers(learned, tmp_path):
    path = tmp_path / "bridge.safetensors"
    learned.save(path)
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()
    loaded = sbot.load(path)
    assert torch.equal(loaded.drift(0.5, x), learned.drift(0.5, x))
    assert torch.equal(loaded.reverse_drift(0.5, x), learned.reverse_drift(0.5, x))
    with pytest.raises(sbot.Unsupported, match="nu="):
        loaded.cost()
    given = sbot.load(path, nu=learned.problem.nu)
    assert torch.equal(given.cost(), learned.cost())
    with pytest.raises(sbot.InvalidProblem, match="load it without mu="):
        sbot.load(path, mu=x)
    with pytest.raises(sbot.InvalidProblem, match="samples of shape"):
        sbot.load(path, nu=torch.zeros(5, 3))
    nu = sbot.Mixture(torch.zeros(2), torch.tensor([[-2.0], [2.0]]), 0.1 * torch.ones(2, 1, 1))
    bridge = sbot.solve_bridge(nu, nu, 0.5, solver=solver(fit=sbot.FitConfig(steps=20), tol=10.0))
    bridge.save(path)
    assert torch.equal(sbot.load(path).cost(), bridge.cost())
    assert isinstance(sbot.load(path).problem.mu, sbot.Mixture)


# ---- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": 0}, "components"),
        ({"atoms": 0.5}, "atoms"),
        ({"covariance": "tied"}, "diagonal"),
        ({"loss": "mse"}, "matching"),
        ({"loss": "matching"}, "teacher="),
        ({"teacher": (torch.zeros(2, 2), torch.zeros(2, 2))}, "teacher="),
        ({"fit": 100}, "FitConfig"),
        ({"fit": sbot.FitConfig(folder="runs")}, "folder"),
        ({"tol": 0.0}, "tol"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(sbot.InvalidProblem, match=message):
        sbot.LightSB(**options)


ONE = sbot.Gaussian(torch.zeros(2), torch.eye(2))


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        ({"reference": sbot.LinearSDE(drift=torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))}, "PlugIn"),
        ({"mu": torch.zeros(5, 2), "nu": torch.ones(5, 2), "relax": 1.0}, "relaxed"),
        ({"mu": torch.zeros(3, 5, 2), "nu": torch.ones(3, 5, 2)}, "one by one"),
        ({"mu": (torch.zeros(5, 2), torch.ones(5))}, "normalise"),
        ({"mu": torch.zeros(5, 2), "nu": torch.ones(5, 2), "cost": sbot.Lp(1)}, "Brownian"),
    ],
)
def test_refused_problems(problem, message):
    mu, nu = problem.pop("mu", ONE), problem.pop("nu", ONE)
    with pytest.raises(sbot.Unsupported, match=message):
        sbot.solve_bridge(mu, nu, 1.0, solver=solver(), **problem)


def sampler(make) -> sbot.Sampler:
    return sbot.Sampler(lambda n, generator: make(n), (2,), like=torch.empty(0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: torch.full((n, 2), torch.nan), "NaN"),
        (lambda n: torch.zeros(n, 3), "shape"),
        (lambda n: torch.zeros(n // 2, 2), "shape"),
        (lambda n: None, "torch tensor"),
    ],
)
def test_bad_samplers(make, message):
    with pytest.raises(sbot.InvalidProblem, match=message):
        sbot.solve_bridge(ONE, sampler(make), 1.0, solver=solver())


def test_bad_pairs_and_init():
    for teacher in (torch.zeros(5, 2), (torch.zeros(5, 2), torch.zeros(4, 2)), (torch.zeros(5, 3), torch.zeros(5, 3))):
        with pytest.raises(sbot.InvalidProblem, match="pair"):
            sbot.solve_bridge(ONE, ONE, 1.0, solver=solver(loss="matching", teacher=teacher))
    bad = torch.full((5, 2), torch.nan)
    with pytest.raises(sbot.InvalidProblem, match="NaN"):
        sbot.solve_bridge(ONE, ONE, 1.0, solver=solver(loss="matching", teacher=(bad, bad)))
    with pytest.raises(sbot.InvalidProblem, match="teacher=bridge"):
        sbot.solve_bridge(ONE, ONE, 1.0, solver=solver(), init=sbot.solve_bridge(ONE, ONE, 1.0))
