"""A bridge of drifts whose drifts are exact: what it says by simulation against what is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

import sbot
from sbot.bridge import Report
from sbot.drift_bridge import DriftBridge
from sbot.reference import LinearReference
from sbot.sde import TimeGrid
from sbot.steering import BridgeBase, Steering

F64 = torch.float64
EPS = 0.8
MU = sbot.Gaussian(torch.tensor([-0.5, 0.2], dtype=F64), torch.tensor([[1.0, 0.3], [0.3, 0.6]], dtype=F64))
NU = sbot.Gaussian(torch.tensor([0.7, 0.4], dtype=F64), torch.tensor([[0.5, -0.2], [-0.2, 0.9]], dtype=F64))
REFERENCES: dict[str, LinearReference] = {
    "brownian": sbot.Brownian(),
    "ou": sbot.OrnsteinUhlenbeck(1.0, 0.3),
    "vp": sbot.LinearSDE.vp(0.1, 3.0),
    "matrix": sbot.LinearSDE([[-0.5, 1.0], [-1.0, -0.2]], [0.4, -0.3], [[1.0, 0.0], [0.3, 0.8]]),
}


def simulated(exact: sbot.Bridge, steps: int | None = None, order: int = 2) -> DriftBridge:
    process = exact.problem.reference
    assert isinstance(process, LinearReference)
    steps = steps or (40 if process is REFERENCES["vp"] else 16)  # coefficients that depend on time need more
    controls = [Steering(way, BridgeBase(exact, process, way), None) for way in (1, -1)]
    return DriftBridge(exact.problem, *controls, Report("exact", True, "exact"), TimeGrid(steps), order)


@pytest.fixture(scope="module", params=REFERENCES.values(), ids=REFERENCES)
def exact(request) -> sbot.Bridge:
    return sbot.solve_bridge(MU, NU, EPS, reference=request.param)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_drifts_are_those_of_the_base(exact: sbot.Bridge) -> None:
    bridge = simulated(exact)
    x = torch.randn(6, 2, dtype=F64, generator=seeded())
    for t in (0.0, 0.3, 0.9):
        torch.testing.assert_close(bridge.drift(t, x), exact.drift(t, x))
        torch.testing.assert_close(bridge.reverse_drift(1 - t, x), exact.reverse_drift(1 - t, x))


@pytest.mark.parametrize("reverse", [False, True])
def test_simulated_pairs_have_the_plan_in_both_directions(exact: sbot.Bridge, reverse: bool) -> None:
    n = 8_000
    x, y = simulated(exact).sample_pairs(n, generator=seeded(), reverse=reverse)
    joint, want = torch.cat([x, y], 1), exact.plan()
    torch.testing.assert_close(joint.mean(0), want.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(joint.T.cov(), want.cov, atol=0.07, rtol=0)


def test_paths_pass_through_the_marginals_in_between(exact: sbot.Bridge) -> None:
    times = [0.0, 0.21, 0.7, 1.0]
    paths = simulated(exact).sample_paths(8_000, times, generator=seeded())
    assert paths.shape == (8_000, 4, 2)
    for k, t in enumerate(times):
        want = exact.marginal(t)
        torch.testing.assert_close(paths[:, k].mean(0), want.mean, atol=0.05, rtol=0)
        torch.testing.assert_close(paths[:, k].T.cov(), want.cov, atol=0.07, rtol=0)


def test_density_along_the_flow(exact: sbot.Bridge) -> None:
    bridge = simulated(exact)
    x = torch.randn(8, 2, dtype=F64, generator=seeded())
    for t in (0.0, 0.35, 0.8, 1.0):
        torch.testing.assert_close(bridge.log_prob(t, x), exact.log_prob(t, x), atol=2e-5, rtol=1e-5)


def test_hutchinson_is_exact_where_the_jacobian_is_a_multiple_of_the_identity() -> None:
    d = 20
    eye, zero = torch.eye(d, dtype=F64), torch.zeros(d, dtype=F64)
    exact = sbot.solve_bridge(sbot.Gaussian(zero, eye), sbot.Gaussian(zero + 0.3, 2 * eye), 1.0)
    x = torch.randn(5, d, dtype=F64, generator=seeded())
    torch.testing.assert_close(simulated(exact).log_prob(0.4, x), exact.log_prob(0.4, x), atol=1e-4, rtol=1e-5)


def test_values_within_their_stated_errors(exact: sbot.Bridge) -> None:
    bridge = simulated(exact, steps=30)
    estimate = bridge.cost_estimate(8_000, generator=seeded())
    assert abs(estimate.value - float(exact.cost())) < 4 * estimate.standard_error + 0.025 * abs(float(exact.cost()))
    assert 0 < estimate.standard_error < 0.05
    assert float(bridge.cost()) == pytest.approx(float(exact.cost()), abs=0.06)
    assert float(bridge.linear_cost()) == pytest.approx(float(exact.linear_cost()), rel=0.08)


def test_the_energy_is_the_same_seen_from_the_other_end() -> None:
    """eps KL(path | reference from mu) against its own closed form, and backwards: both give the one cost."""
    exact = sbot.solve_bridge(MU, sbot.Sampler(_draw), EPS, solver=_Copy())
    bridge = simulated(exact, steps=30)
    estimate = bridge.cost_estimate(8_000, generator=seeded())
    want = float(sbot.solve_bridge(MU, NU, EPS).cost())
    assert abs(estimate.value - want) < 4 * estimate.standard_error + 0.01 * want


def _draw(n: int, generator: torch.Generator | None) -> torch.Tensor:
    return NU.sample(n, generator=generator)


class _Copy(sbot.Solver):
    """The closed form under a problem whose second marginal is a sampler: only mu has a density then."""

    def accepts(self, problem: sbot.Problem) -> str | None:
        return None

    def solve(self, problem: sbot.Problem, *, init=None, progress=None) -> sbot.Bridge:
        bridge = sbot.solve_bridge(MU, NU, EPS)
        bridge.problem = problem
        return bridge


@pytest.mark.parametrize("name", ["brownian", "matrix"])
def test_transport_is_the_conditional_mean(name: str) -> None:
    exact = sbot.solve_bridge(MU, NU, EPS, reference=REFERENCES[name])
    x = torch.randn(7, 2, dtype=F64, generator=seeded())
    bridge = simulated(exact)
    torch.testing.assert_close(bridge.transport(x), exact.transport(x), atol=1e-2, rtol=0)
    torch.testing.assert_close(bridge.transport(x), bridge.transport(x), atol=0, rtol=0)
    late = bridge.condition(x, 0.6)
    torch.testing.assert_close(late.mean, exact.condition(x, 0.6).mean, atol=1e-2, rtol=0)
    draws = late.sample(generator=seeded())
    assert draws.shape == x.shape


def test_discretisation_shrinks_with_the_steps_and_faster_by_heun() -> None:
    one = torch.ones(1, 1, dtype=F64)
    exact = sbot.solve_bridge(sbot.Gaussian(one[0], one), sbot.Gaussian(one[0] + 1, one / 4), 0.5)

    def error(steps: int, order: int) -> float:
        return abs(float(simulated(exact, steps, order).sample_pairs(40_000, generator=seeded())[1].var()) - 0.25)

    assert error(5, 1) > 0.03
    assert error(20, 1) < 0.5 * error(5, 1)
    assert error(20, 2) < 0.5 * error(20, 1)


def test_using_changes_the_grid_and_nothing_else() -> None:
    bridge = simulated(sbot.solve_bridge(MU, NU, EPS), 10, 1)
    other = bridge.using([0.0, 0.2, 1.0], order=2)
    assert len(other.chain()) == 2 and other.order == 2 and len(bridge.chain()) == 10
    with pytest.raises(sbot.InvalidProblem, match="order is 3"):
        bridge.using(order=3)


def test_float32_and_half_come_back_as_they_went_in() -> None:
    exact = sbot.solve_bridge(MU, NU, EPS)
    bridge = simulated(exact).to(dtype=torch.float32)
    x = torch.randn(4, 2)
    assert bridge.drift(0.5, x).dtype == torch.float32
    assert bridge.log_prob(0.5, x).dtype == torch.float32
    assert bridge.to(dtype=torch.bfloat16).drift(0.5, x).dtype == torch.bfloat16
    with pytest.raises(sbot.InvalidProblem, match="dtype is"):
        bridge.to(dtype=torch.int32)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda b: b.plan(), "sample_pairs"),
        (lambda b: b.potentials(), "LightSB"),
        (lambda b: b.gap(), "metrics"),
        (lambda b: b.condition(), "give points x"),
        (lambda b: b.condition(torch.zeros(1, 2), 1.0), "s < 1"),
        (lambda b: b.condition(torch.zeros(1, 2)).log_mass, "potential"),
    ],
)
def test_what_does_not_exist_names_the_alternative(ask, says: str) -> None:
    with pytest.raises(sbot.Unsupported, match=says):
        ask(simulated(sbot.solve_bridge(MU, NU, EPS)))


def test_without_a_density_there_is_no_log_prob() -> None:
    x = torch.randn(30, 2, dtype=F64, generator=seeded())
    bridge = simulated(sbot.solve_bridge(x, x + 1, EPS))
    with pytest.raises(sbot.Unsupported, match="neither marginal has a density"):
        bridge.log_prob(0.5, x)
    with pytest.raises(sbot.Unsupported, match="energy"):
        bridge.cost_estimate()
    assert math.isfinite(bridge.energy(500).value)
    paths = bridge.sample_paths(50, [0.0, 0.5, 1.0], generator=seeded())
    assert bool(torch.isfinite(paths).all())  # the drift is infinite at the end, and never asked there


@pytest.mark.parametrize("order", [1, 2])
def test_the_cost_is_within_its_stated_error_on_a_coarse_grid(exact: sbot.Bridge, order: int) -> None:
    """At the default number of steps, under references whose coefficients depend on time too."""
    want = float(exact.cost())
    estimate = simulated(exact, steps=20, order=order).cost_estimate(8_000, generator=seeded())
    slack = 0.0 if order == 2 else 0.25 * want  # Euler's paths are another law, of first order in the steps
    assert abs(estimate.value - want) < 4 * estimate.standard_error + slack
    assert estimate.standard_error < 0.1


def test_the_density_in_more_dimensions_than_the_exact_trace() -> None:
    """Signs of their own for each point: errors do not have one sign at all of them."""
    d = 70
    generator = seeded(3)
    root = torch.randn(d, d, dtype=F64, generator=generator) / d**0.5
    cov = root @ root.T + 0.3 * torch.eye(d, dtype=F64)
    exact = sbot.solve_bridge(
        sbot.Gaussian(torch.zeros(d, dtype=F64), cov),
        sbot.Gaussian(torch.ones(d, dtype=F64), torch.eye(d, dtype=F64)),
        1.0,
    )
    x = torch.randn(40, d, dtype=F64, generator=generator)
    miss = simulated(exact).log_prob(0.5, x, steps=20, probes=8) - exact.log_prob(0.5, x)
    assert float(miss.std()) > 1e-3
    assert abs(float(miss.mean())) < 4 * float(miss.std()) / len(x) ** 0.5
    assert float(miss.abs().max()) < 2.0


def test_drifts_that_start_from_atoms_have_no_density() -> None:
    light = sbot.LightSB(components=2, atoms=64, fit=sbot.FitConfig(steps=5, lr=0.01), tol=100.0)
    nu = sbot.Sampler(lambda n, generator: torch.randn(n, 2, generator=generator))
    mu = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    start = sbot.solve_bridge(mu, nu, 1.0, solver=light)
    bridge = sbot.solve_bridge(
        mu, nu, 1.0, solver=sbot.DSBM(pairs=16, fit=sbot.FitConfig(steps=2, batch=8), tol=100.0), init=start
    )
    with pytest.raises(sbot.Unsupported, match="stands on atoms"):
        bridge.log_prob(0.3, torch.zeros(3, 2))
