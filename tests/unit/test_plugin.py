"""The plug-in bridge: Sinkhorn on samples, out of sample by its potentials."""

from __future__ import annotations

import math

import pytest
import torch

import sbot
from sbot import metrics
from tests.conftest import clouds, spd, weights


def gaussians(d: int = 2) -> tuple[sbot.Gaussian, sbot.Gaussian]:
    generator = torch.Generator().manual_seed(0)
    zero = torch.zeros(d, dtype=torch.float64)
    return sbot.Gaussian(zero, torch.eye(d).double()), sbot.Gaussian(zero + 1, spd(d, generator))


@pytest.mark.parametrize(
    "reference", [sbot.Brownian(), sbot.OrnsteinUhlenbeck(0.7), sbot.LinearSDE(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))]
)
def test_near_the_closed_form(reference):
    mu, nu = gaussians()
    exact = sbot.solve_bridge(mu, nu, 1.0, reference=reference)
    ours = sbot.solve_bridge(mu, nu, 1.0, reference=reference, solver=sbot.PlugIn(samples=1500))
    assert ours.report.converged and "1500" in ours.report.notes[-1]
    x = mu.sample(300, generator=torch.Generator().manual_seed(1))
    spread = (exact.transport(x) - exact.transport(x).mean(0)).norm()
    assert (ours.transport(x) - exact.transport(x)).norm() < 0.15 * spread
    for t in (0.0, 0.5):
        gap = ours.drift(t, x) - exact.drift(t, x)
        assert gap.norm() < 0.15 * (exact.drift(t, x) - reference.drift(t, x)).norm()
    assert (ours.log_prob(0.5, x) - exact.log_prob(0.5, x)).abs().mean() < 0.15
    assert abs(float(ours.cost() - exact.cost())) < 0.1 * abs(float(exact.cost()))
    assert abs(float(ours.linear_cost() - exact.linear_cost())) < 0.1 * float(exact.linear_cost())


def test_pairs_start_from_fresh_samples():
    mu, nu = gaussians()
    bridge = sbot.solve_bridge(mu, nu, 1.0, solver=sbot.PlugIn(samples=200))
    x, y = bridge.sample_pairs(500, generator=torch.Generator().manual_seed(1))
    assert not torch.isin(x, bridge.phi.points).any()
    assert torch.isin(y, bridge.psi.points).all()
    with pytest.raises(sbot.Unsupported, match="sample_pairs"):
        bridge.plan()
    with pytest.raises(sbot.Unsupported, match="give points"):
        bridge.condition()


def test_whole_discrete_measures_are_the_problem_itself(generator):
    x, y = clouds(40, 50, 2, generator)
    a = weights(40, generator=generator)
    exact = sbot.solve_bridge((x, a), y, 0.5)
    for solver in (sbot.PlugIn(samples=50), sbot.PlugIn(samples=None)):
        bridge = sbot.solve_bridge((x, a), y, 0.5, solver=solver)
        assert torch.equal(bridge.plan(), exact.plan())
        assert torch.equal(bridge.cost(), exact.cost())


def test_some_of_the_atoms(generator):
    x, y = clouds(300, 300, 2, generator)
    bridge = sbot.solve_bridge(x, y, 0.5, solver=sbot.PlugIn(samples=100))
    drawn = bridge.phi.points
    assert len(drawn) == 100 and len(drawn.unique(dim=0)) == 100
    assert bridge.transport().shape == (300, 2)  # the atoms of mu, not those drawn of it
    exact = sbot.solve_bridge(x, y, 0.5)
    assert (bridge.transport() - exact.transport()).norm() < 0.5 * (
        exact.transport() - exact.transport().mean(0)
    ).norm()
    assert abs(float(bridge.cost() - exact.cost())) < 0.2 * float(exact.cost())


def test_the_marginals_may_have_any_equal_mass(generator):
    x, y = clouds(30, 40, 2, generator)
    a, b = 2 * weights(30, generator=generator), 2 * weights(40, generator=generator)
    bridge = sbot.solve_bridge((x, a), (y, b), 0.5, solver=sbot.PlugIn(samples=20))
    assert float(bridge.phi.log_weights.exp().sum()) > 0
    assert float(bridge.coupling.problem.mu.mass) == pytest.approx(2)
    grid = torch.cartesian_prod(*[torch.linspace(-7, 8, 200)] * 2).double()
    mass = bridge.log_prob(0.5, grid).exp().sum() * (15 / 199) ** 2
    assert float(mass) == pytest.approx(2, rel=1e-3)


def test_batches_lower_the_variance():
    mu, nu = gaussians()
    exact = sbot.solve_bridge(mu, nu, 1.0)
    x = mu.sample(300, generator=torch.Generator().manual_seed(1))

    def miss(**options) -> float:
        bridges = [sbot.solve_bridge(mu, nu, 1.0, solver=sbot.PlugIn(100, seed=s, **options)) for s in range(3)]
        return sum(float((b.transport(x) - exact.transport(x)).square().mean()) for b in bridges)

    assert miss(batches=10) < 0.4 * miss()


def test_a_pooled_bridge_has_the_right_mass():
    one = sbot.Gaussian(torch.zeros(1).double(), torch.eye(1).double())
    bridge = sbot.solve_bridge(one, one, 1.0, solver=sbot.PlugIn(samples=50, batches=4))
    assert bridge.psi.log_weights.shape == (200,)
    grid = torch.linspace(-9, 9, 3001).double()[:, None]
    for t in (0.3, 0.8):
        assert float(torch.trapezoid(bridge.log_prob(t, grid).exp(), grid[:, 0])) == pytest.approx(1, abs=1e-6)
    exact = (math.sqrt(5) - 1) / 2
    at = torch.linspace(-1, 1, 21).double()[:, None]
    slope = float((bridge.transport(at) * at).sum() / at.square().sum())
    assert slope == pytest.approx(exact, rel=0.15)


def test_fresh_pairs_of_mini_batches():
    mu, nu = gaussians()
    solver = sbot.PlugIn(samples=200, batches=5)
    problem = sbot.Problem.of(mu, nu, 1.0)
    x, y = solver.pairs(problem, 3003, generator=torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (3003, 2)
    cross = sbot.solve_bridge(mu, nu, 1.0).plan().cov[:2, 2:]
    ours = ((x - x.mean(0)).T @ (y - y.mean(0))) / len(x)
    assert (ours - cross).norm() < 0.3 * cross.norm()  # an independent coupling has none
    assert metrics.bw2_uvp(y, nu) < 3
    again = solver.pairs(problem, 3003, generator=torch.Generator().manual_seed(0))
    other = solver.pairs(problem, 3003, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again[0], x) and torch.equal(again[1], y)
    assert not torch.equal(other[0], x)
    x, y = sbot.PlugIn(samples=50).pairs(problem, 20, generator=torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (20, 2)


def test_the_seed_decides():
    mu, nu = gaussians()
    state = torch.random.get_rng_state()
    first, second, third = (sbot.solve_bridge(mu, nu, 1.0, solver=sbot.PlugIn(50, seed=s)) for s in (0, 0, 1))
    assert torch.equal(first.psi.points, second.psi.points)
    assert torch.equal(first.psi.log_weights, second.psi.log_weights)
    assert not torch.equal(first.psi.points, third.psi.points)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_files(tmp_path):
    mu, nu = gaussians()
    source = sbot.Sampler(lambda n, g: nu.sample(n, generator=g), (2,), like=mu.mean)
    bridge = sbot.solve_bridge(source, nu, 1.0, solver=sbot.PlugIn(50))
    path = tmp_path / "bridge.safetensors"
    bridge.save(path)
    loaded, x = sbot.load(path), torch.zeros(3, 2).double()
    for t in (0.2, 0.8):
        assert torch.equal(loaded.drift(t, x), bridge.drift(t, x))
        assert torch.equal(loaded.log_prob(t, x), bridge.log_prob(t, x))
    with pytest.raises(sbot.Unsupported, match="mu="):
        loaded.sample_pairs(5)
    again = sbot.load(path, mu=source)
    draws = [b.sample_pairs(5, generator=torch.Generator().manual_seed(0))[1] for b in (again, bridge)]
    assert torch.equal(*draws)


def test_never_automatic():
    assert not any(isinstance(solver, (sbot.PlugIn, sbot.LightSB)) for solver in sbot.AUTO)
    assert {"PlugIn", "LightSB"} <= {type(solver).__name__ for solver in sbot.SOLVERS}
    assert isinstance(sbot.choose_solver(sbot.Problem.of(*gaussians(), 1.0), "plugin"), sbot.PlugIn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples"),
        ({"batches": 1.5}, "batches"),
        ({"seed": -1}, "seed"),
        ({"solver": "sinkhorn"}, "Sinkhorn"),
        ({"solver": sbot.PlugIn()}, "Sinkhorn"),
        ({"samples": None, "batches": 2}, "size"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(sbot.InvalidProblem, match=message):
        sbot.PlugIn(**options)


def test_refused_problems(generator):
    x, y = clouds(10, 12, 2, generator)
    mu, nu = gaussians()
    for args, options, solver, message in (
        ((mu, nu), {}, sbot.PlugIn(samples=None), "give a number"),
        ((x[None], y[None]), {}, sbot.PlugIn(), "one by one"),
        ((x, y), {"relax": 1.0}, sbot.PlugIn(), "relaxed"),
        (([0.5, 0.5], [0.5, 0.5]), {"cost": torch.ones(2, 2)}, sbot.PlugIn(), "flatten"),
        ((mu, (y, torch.ones(12))), {}, sbot.PlugIn(), "normalise"),
    ):
        with pytest.raises(sbot.Unsupported, match=message):
            sbot.solve_bridge(*args, 1.0, solver=solver, **options)
    with pytest.raises(sbot.InvalidProblem, match="ClosedForm"):
        sbot.solve_bridge(x, y, 1.0, solver=sbot.PlugIn(solver=sbot.ClosedForm()))
    with pytest.raises(sbot.InvalidProblem, match="batches=1"):
        sbot.solve_bridge(x, y, 1.0, solver=sbot.PlugIn(5, batches=2), init=sbot.solve_bridge(x, y, 1.0))
    bad = sbot.Sampler(lambda n, g: torch.full((n, 2), torch.nan), (2,), like=torch.empty(0))
    with pytest.raises(sbot.InvalidProblem, match="NaN"):
        sbot.solve_bridge(bad, nu, 1.0, solver=sbot.PlugIn(10))


def test_the_cost_counts_the_mass(generator):
    """All atoms of a measure of mass two: the plug-in bridge is the problem itself; fewer atoms than it has are draws."""
    x, y = clouds(50, 50, 2, generator)
    a = torch.full((50,), 2 / 50, dtype=x.dtype)
    whole = sbot.solve_bridge((x, a), (y, a), 1.0)
    light = sbot.LightSB(components=30, tol=1.0, fit=sbot.FitConfig(steps=300, lr=0.02))
    learned = sbot.solve_bridge((x, a), (y, a), 1.0, solver=light)
    assert float(learned.cost()) == pytest.approx(float(whole.cost()), rel=0.1)
    some = learned.coupling.estimate(40), learned.coupling.estimate_linear(4000)
    assert abs(some[0].value - float(whole.cost())) < 5 * some[0].standard_error + 0.1 * float(whole.cost())
    want = float(whole.linear_cost())
    assert abs(some[1].value - want) < 5 * some[1].standard_error + 0.1 * want
