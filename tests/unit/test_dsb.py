"""DSB and DSBM on Gaussians, where every answer is known; small but real training.

The tolerances are held to account: what a wrong time index, a wrong scale of the noise or an independent coupling would
give lies outside of them (`test_the_tolerances_would_catch_the_usual_mistakes`).
"""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

import sbot
from sbot.neural.residual import marginal_residual
from sbot.neural.training import Training
from sbot.reference import LinearReference
from sbot.sde import Chain, TimeGrid
from sbot.steering import BridgeBase, Steering

EPS = 1.0
#: On means, and on the entries of covariances, after the trainings below.
TOLERANCE = 0.09

REFERENCES: dict[str, LinearReference] = {
    "brownian": sbot.Brownian(),
    "ou": sbot.OrnsteinUhlenbeck(0.8),
    "vp": sbot.LinearSDE.vp(0.2, 2.0),
    "ve": sbot.LinearSDE.ve(0.3, 1.5),
    "matrix": sbot.LinearSDE([[-0.3, 0.6], [-0.6, -0.3]], [0.2, -0.2], [[1.0, 0.0], [0.3, 0.8]]),
}


def ends(d: int) -> tuple[sbot.Gaussian, sbot.Gaussian]:
    mean = torch.full((d,), 0.5)
    ramp = torch.linspace(0.5, 1.2, d)
    return sbot.Gaussian(-mean, torch.diag(ramp)), sbot.Gaussian(mean, torch.diag(ramp.flip(0)))


def net(d: int, width: int = 32) -> sbot.TimeMLP:
    return sbot.TimeMLP(d, width, 2, generator=torch.Generator().manual_seed(0))


def fit(steps: int, **options) -> sbot.FitConfig:
    return sbot.FitConfig(**{"steps": steps, "batch": 512, "lr": 5e-3, "ema": 0.99, "warmup": 20} | options)


def moments(bridge: sbot.DriftBridge, n: int = 16_000) -> list[tuple[Tensor, Tensor]]:
    """Mean and covariance of pairs, forward and backwards."""
    out = []
    for reverse in (False, True):
        pairs = bridge.sample_pairs(n, generator=torch.Generator().manual_seed(1), reverse=reverse)
        joint = torch.cat(pairs, 1)
        out.append((joint.mean(0), joint.T.cov()))
    return out


def deviation(bridge: sbot.DriftBridge, plan: sbot.Gaussian) -> float:
    """Largest error of a mean or of an entry of a covariance, over both directions."""
    return max(
        max(float((mean - plan.mean).abs().max()), float((cov - plan.cov).abs().max())) for mean, cov in moments(bridge)
    )


def iterates(
    mu: sbot.Gaussian, nu: sbot.Gaussian, count: int, reference: LinearReference = REFERENCES["brownian"]
) -> list[tuple[Tensor, Tensor]]:
    """Exact proportional fitting on Gaussians: mean and covariance of ``(X_0, X_1)`` after each half-step."""
    d = mu.event_shape[0]
    step = reference.transition(0.0, 1.0)
    flow, spread = sbot.linalg.matrix(step.phi, d), EPS * sbot.linalg.matrix(step.cov, d)
    m, a = mu.mean.double(), mu.cov.double()
    mean = torch.cat([m, flow @ m + step.shift])
    cov = torch.cat([torch.cat([a, a @ flow.T], 1), torch.cat([flow @ a, flow @ a @ flow.T + spread], 1)], 0)
    out = []
    for h in range(count):
        # keep the conditional of the other end given this one, and put the true marginal here
        here, there = (slice(d, 2 * d), slice(0, d)) if h % 2 == 0 else (slice(0, d), slice(d, 2 * d))
        end = nu if h % 2 == 0 else mu
        gain = torch.linalg.solve(cov[here, here], cov[here, there]).T
        rest = cov[there, there] - gain @ cov[here, there]
        new_mean, new = mean.clone(), cov.clone()
        new_mean[here], new_mean[there] = end.mean.double(), mean[there] + gain @ (end.mean.double() - mean[here])
        new[here, here] = end.cov.double()
        new[there, here] = gain @ new[here, here]
        new[here, there] = new[there, here].T
        new[there, there] = rest + gain @ new[here, here] @ gain.T
        mean, cov = new_mean, new
        out.append((mean, cov))
    return out


def from_iterates(bridge: sbot.DriftBridge) -> float:
    """Largest error of a mean or a covariance against the last two exact iterates, one in each direction."""
    problem, count = bridge.problem, len(bridge.report.history)
    assert isinstance(problem.mu, sbot.Gaussian) and isinstance(problem.nu, sbot.Gaussian)
    assert isinstance(problem.reference, LinearReference)
    *_, backward, forward = iterates(problem.mu, problem.nu, count, problem.reference)
    pairs = zip(moments(bridge), (forward, backward), strict=True)
    return max(float((a - b).abs().max()) for said, want in pairs for a, b in zip(said, want, strict=True))


#: Steps of the chain, of a batch and of training: targets of a single step have N times the noise of "bridge", and "drift"
#: and "mean" are first-order approximations.
TARGETS = {"bridge": (15, 1024, 250), "simplified": (30, 2048, 400), "drift": (40, 2048, 400), "mean": (40, 2048, 400)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reference", REFERENCES.values(), ids=REFERENCES)
def test_dsb_finds_the_gaussian_bridge(reference: LinearReference, target: str) -> None:
    """Each direction is an exact iterate of proportional fitting under its reference."""
    mu, nu = ends(2)
    steps, batch, count = TARGETS[target]
    solver = sbot.DSB(net=net(2), steps=steps, rounds=2, target=target, fit=fit(count, batch=batch), tol=0.1)
    bridge = sbot.solve_bridge(mu, nu, EPS, reference=reference, solver=solver)
    assert bridge.report.converged and len(bridge.report.history) == 4
    assert from_iterates(bridge) < TOLERANCE


def test_dsb_in_five_dimensions() -> None:
    mu, nu = ends(5)
    solver = sbot.DSB(net=net(5), rounds=4, fit=fit(200), tol=0.05)
    bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver)
    assert from_iterates(bridge) < TOLERANCE
    assert deviation(bridge, sbot.solve_bridge(mu, nu, EPS).plan()) < TOLERANCE


@pytest.mark.parametrize("init", ["zero", "independent", "sinkhorn", "minibatch", "bridge"])
def test_dsbm_finds_the_gaussian_bridge(init: str) -> None:
    mu, nu = ends(2)
    exact = sbot.solve_bridge(mu, nu, EPS)
    generator = torch.Generator().manual_seed(3)
    made = {
        "sinkhorn": lambda: sbot.PlugIn(samples=400),
        "minibatch": lambda: sbot.PlugIn(samples=128, batches=8),
        "bridge": lambda: sbot.solve_bridge(
            mu.sample(500, generator=generator), nu.sample(500, generator=generator), EPS
        ),
    }
    start = made[init]() if init in made else init
    solver = sbot.DSBM(net=net(2), init=start, pairs=2048, refresh=50, fit=fit(500, batch=1024), tol=0.05)
    bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver)
    assert bridge.report.converged
    assert deviation(bridge, exact.plan()) < TOLERANCE


@pytest.mark.parametrize("name", ["ou", "vp", "ve", "matrix"])
def test_dsbm_under_other_references(name: str) -> None:
    mu, nu = ends(2)
    exact = sbot.solve_bridge(mu, nu, EPS, reference=REFERENCES[name])
    solver = sbot.DSBM(net=net(2), init="independent", pairs=2048, refresh=50, fit=fit(500, batch=1024), tol=0.05)
    bridge = sbot.solve_bridge(mu, nu, EPS, reference=REFERENCES[name], solver=solver)
    assert deviation(bridge, exact.plan()) < TOLERANCE


def test_dsbm_in_five_dimensions() -> None:
    mu, nu = ends(5)
    solver = sbot.DSBM(net=net(5), init="independent", pairs=2048, refresh=50, fit=fit(800), tol=0.05)
    bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver)
    assert deviation(bridge, sbot.solve_bridge(mu, nu, EPS).plan()) < TOLERANCE


def test_the_tolerances_would_catch_the_usual_mistakes() -> None:
    """An exact bridge with one mistake each: its deviation is far beyond the tolerance of the tests above."""
    from sbot.bridge import Report
    from sbot.drift_bridge import DriftBridge
    from sbot.steering import Base, BridgeBase, Steering

    mu, nu = ends(2)
    exact = sbot.solve_bridge(mu, nu, EPS)
    process = exact.problem.reference
    assert isinstance(process, LinearReference)

    class Wrong(Base):
        def __init__(self, way: int, slip: float, scale: float) -> None:
            self.right, self.way, self.slip, self.scale = BridgeBase(exact, process, way), way, slip, scale

        def __call__(self, t: float, x: Tensor) -> Tensor:
            return self.scale * self.right(min(max(t + self.way * self.slip, 0.0), 1.0), x)

        def to(self, like: Tensor) -> Wrong:
            return self

    def bridge(slip: float = 0.0, scale: float = 1.0, noise: float = 1.0) -> DriftBridge:
        problem = exact.problem if noise == 1 else sbot.Problem.of(mu, nu, EPS * noise)
        controls = [Steering(way, Wrong(way, slip, scale), None) for way in (1, -1)]
        return DriftBridge(problem, *controls, Report("wrong", True, "exact"), sbot.TimeGrid(20))

    assert deviation(bridge(), exact.plan()) < TOLERANCE  # the right one passes, discretisation included
    assert deviation(bridge(scale=0.9), exact.plan()) > TOLERANCE
    assert deviation(bridge(noise=1.2), exact.plan()) > TOLERANCE  # covariance for standard deviation and the like
    independent = exact.plan().cov[:2, 2:].abs().max()
    assert float(independent) > 3 * TOLERANCE


def test_the_recursion_converges_to_the_bridge() -> None:
    mu, nu = ends(2)
    plan = sbot.solve_bridge(mu.to(dtype=torch.float64), nu.to(dtype=torch.float64), EPS).plan()
    mean, cov = iterates(mu, nu, 60)[-1]
    torch.testing.assert_close(mean, plan.mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(cov, plan.cov, atol=1e-9, rtol=0)


@pytest.mark.parametrize("half_steps", [1, 2, 3])
def test_every_half_step_of_dsb_is_an_iterate_of_proportional_fitting(half_steps: int) -> None:
    mu, nu = ends(2)
    solver = sbot.DSB(net=net(2), half_steps=half_steps, fit=fit(400), tol=10.0, steps=25)
    bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver)
    backwards = half_steps % 2 == 1
    mean, cov = moments(bridge)[1 if backwards else 0]
    want_mean, want = iterates(mu, nu, half_steps)[-1]
    assert float((mean - want_mean).abs().max()) < TOLERANCE
    assert float((cov - want).abs().max()) < TOLERANCE
    if half_steps < 3:  # and it is not yet the bridge
        assert float((sbot.solve_bridge(mu, nu, EPS).plan().mean - want_mean).abs().max()) > TOLERANCE


def test_half_step_one_is_a_score_based_model() -> None:
    """Its reverse drift is the score of the noised marginal, which for a Gaussian is known."""
    mu, nu = ends(2)
    solver = sbot.DSB(net=net(2), half_steps=1, fit=fit(800), tol=10.0, steps=20)
    bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver)
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    for t in (0.25, 0.5, 1.0):
        spread = mu.cov + EPS * t * torch.eye(2)
        score = -torch.linalg.solve(spread, (x - mu.mean).T).T
        assert float((bridge.reverse_drift(t, x) - EPS * score).square().mean().sqrt()) < 0.15
    # forwards it is still the reference
    torch.testing.assert_close(bridge.drift(0.5, x), torch.zeros_like(x))


class Score(torch.nn.Module):
    """The exact score of a Gaussian under Brownian motion, as a pretrained network would give it."""

    def __init__(self, measure: sbot.Gaussian) -> None:
        super().__init__()
        self.register_buffer("mean", measure.mean)
        self.register_buffer("spread", measure.cov.diagonal())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return -(x - self.mean) / (self.spread + EPS * t[:, None])


def test_a_pretrained_score_takes_the_place_of_half_step_one() -> None:
    mu, nu = ends(2)
    solver = sbot.DSB(net=net(2), half_steps=2, score=Score(mu), fit=fit(400), tol=10.0, steps=25)
    bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver)
    assert bridge.report.iterations == 400  # one half-step was trained
    mean, cov = moments(bridge)[0]
    want_mean, want = iterates(mu, nu, 2)[-1]
    assert float((mean - want_mean).abs().max()) < TOLERANCE
    assert float((cov - want).abs().max()) < TOLERANCE
    alone = sbot.DSB(net=net(2), half_steps=1, score=Score(mu), fit=fit(1), tol=10.0)
    x = torch.randn(5, 2)
    said = sbot.solve_bridge(mu, nu, EPS, solver=alone).reverse_drift(0.5, x)
    torch.testing.assert_close(said, EPS * Score(mu)(x, torch.full((5,), 0.5)))


def test_a_nonlinear_reference_is_fitted_to_both_ends() -> None:
    mu = sbot.Gaussian(torch.tensor([-1.0]), torch.tensor([[0.1]]))
    nu = sbot.Gaussian(torch.tensor([1.0]), torch.tensor([[0.1]]))
    well = sbot.Diffusion(lambda t, x: x - x**3)
    solver = sbot.DSB(net=net(1), rounds=4, steps=30, fit=fit(250), tol=0.1)
    bridge = sbot.solve_bridge(mu, nu, 0.5, reference=well, solver=solver)
    _, y = bridge.sample_pairs(8000, generator=torch.Generator().manual_seed(0))
    assert float(y.mean()) == pytest.approx(1.0, abs=0.08)
    assert float(y.var()) == pytest.approx(0.1, abs=0.04)


# ---- starting from another bridge ----------------------------------------------------------------------------------


@pytest.mark.parametrize("solver_class", [sbot.DSB, sbot.DSBM])
def test_an_exact_start_stays_exact(solver_class) -> None:
    mu, nu = ends(2)
    exact = sbot.solve_bridge(mu, nu, EPS)
    short = fit(30, lr=1e-3, batch=4096)
    solver = solver_class(net=net(2), fit=short, tol=0.05, **({"rounds": 1} if solver_class is sbot.DSB else {}))
    bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver, init=exact)
    assert deviation(bridge, exact.plan()) < TOLERANCE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sbot.NotConverged)
        cold = sbot.solve_bridge(mu, nu, EPS, solver=solver)
    assert deviation(cold, exact.plan()) > TOLERANCE


def test_learned_drifts_agree_with_the_plug_in_bridge_on_samples() -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4000, 2, generator=generator)
    y = torch.randn(4000, 2, generator=generator) * 0.5 + torch.where(
        torch.rand(4000, 1, generator=generator) < 0.5, 1.0, -1.0
    )
    plug = sbot.solve_bridge(x, y, EPS)
    solver = sbot.DSBM(net=net(2, 64), init="independent", pairs=2048, refresh=50, fit=fit(1500), tol=0.05)
    bridge = sbot.solve_bridge(x, y, EPS, solver=solver)
    for t in (0.2, 0.5, 0.8):
        place = plug.interpolate(t, 1000, generator=generator)
        exact, learned = plug.drift(t, place), bridge.drift(t, place)
        assert float((learned - exact).square().mean() / exact.square().mean()) < 0.04
        exact, learned = plug.reverse_drift(t, place), bridge.reverse_drift(t, place)
        assert float((learned - exact).square().mean() / exact.square().mean()) < 0.04


# ---- how it stops and what it says ---------------------------------------------------------------------------------


def test_it_stops_when_the_residual_stops_improving() -> None:
    mu, nu = ends(2)
    exact = sbot.solve_bridge(mu, nu, EPS)
    solver = sbot.DSB(net=net(2), rounds=40, patience=1, fit=fit(5), tol=1e-9)
    with pytest.warns(sbot.NotConverged, match="stalled"):
        bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver, init=exact)
    assert bridge.report.reason == "stalled" and len(bridge.report.history) < 80


def test_too_little_training_is_said() -> None:
    mu, nu = ends(2)
    with pytest.warns(sbot.NotConverged, match="train longer"):
        bridge = sbot.solve_bridge(mu, nu, EPS, solver=sbot.DSBM(net=net(2), fit=fit(2), tol=1e-3))
    assert not bridge.report.converged and bridge.report.error > 1e-3


def test_auto_trains_networks_for_samplers_only() -> None:
    mu, _ = ends(2)
    drawn = sbot.Sampler(lambda n, generator: torch.randn(n, 2, generator=generator))
    assert isinstance(sbot.choose_solver(sbot.Problem.of(mu, drawn, 1.0)), sbot.DSB)
    with pytest.raises(sbot.Unsupported, match="solver='dsb'"):
        sbot.choose_solver(sbot.Problem.of(mu, torch.randn(5, 2), 1.0))


def test_the_same_seed_gives_the_same_bits_and_moves_no_global_state() -> None:
    mu, nu = ends(2)
    before = torch.random.get_rng_state()
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def solve(seed: int) -> Tensor:
        solver = sbot.DSBM(fit=sbot.FitConfig(steps=5, batch=32, seed=seed), steps=3, pairs=64, tol=100.0)
        return sbot.solve_bridge(mu, nu, EPS, solver=solver).drift(0.5, x)

    one, two, other = solve(0), solve(0), solve(1)
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(before, torch.random.get_rng_state())


def test_float64_is_trained_in_float64() -> None:
    mu, nu = (m.to(dtype=torch.float64) for m in ends(2))
    solver = sbot.DSB(net=net(2), rounds=1, fit=fit(5), tol=100.0)
    bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver)
    assert bridge.sample_pairs(4)[1].dtype == torch.float64


def test_images_go_through_a_u_net() -> None:
    def draw(n: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(n, 1, 8, 8, generator=generator)

    solver = sbot.DSB(rounds=1, steps=4, fit=sbot.FitConfig(steps=2, batch=8), cache=sbot.Cache(paths=8), tol=100.0)
    bridge = sbot.solve_bridge(sbot.Sampler(draw), sbot.Sampler(draw), 1.0, solver=solver)
    paths = bridge.sample_paths(3, [0.0, 0.5, 1.0])
    assert paths.shape == (3, 3, 1, 8, 8)
    assert bridge.drift(0.5, paths[:, 1]).shape == (3, 1, 8, 8)
    assert bridge.interpolate(0.5, 2).shape == (2, 1, 8, 8)
    assert bridge.transport(paths[:1, 0]).shape == (1, 1, 8, 8)
    assert math.isfinite(bridge.energy(8).value)


def test_a_network_that_learned_nothing_says_nothing() -> None:
    """One of the caller's need not be zero at the start; beside a given score it is not asked before its own half-step."""
    mu, nu = ends(2)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    loud = Loud()
    for half_steps in (1, 2):
        solver = sbot.DSB(net=loud, half_steps=half_steps, score=Score(mu), fit=fit(1, batch=8), tol=100.0)
        bridge = sbot.solve_bridge(mu, nu, EPS, solver=solver)
        torch.testing.assert_close(bridge.reverse_drift(0.5, x), EPS * Score(mu)(x, torch.full((5,), 0.5)))
    assert float((bridge.drift(0.5, x)).abs().min()) > 1  # this one has had its half-step


class Loud(torch.nn.Module):
    """Far from zero at the start."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.nn.Parameter(torch.full((2,), 5.0))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 0 * x + self.shift


def test_the_score_given_is_copied_and_at_rest() -> None:
    mu, nu = ends(2)
    score = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
    given = Asked(score)
    bridge = sbot.solve_bridge(mu, nu, EPS, solver=sbot.DSB(half_steps=1, score=given, fit=fit(1), tol=100.0))
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    first = bridge.reverse_drift(0.5, x)
    with torch.no_grad():
        score[0].weight *= 10
    torch.testing.assert_close(bridge.reverse_drift(0.5, x), first, atol=0, rtol=0)
    assert not first.requires_grad
    assert given.training and all(p.requires_grad for p in given.parameters())


class Asked(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.inner(x)


def test_the_default_tolerance_sees_ends_that_are_off() -> None:
    """A shift by a fifth of a standard deviation, or a variance of 0.75 for 0.5, does not count as converged."""
    for law in (sbot.Gaussian([0.2], [[1.0]]), sbot.Gaussian([0.0], [[1.5]])):
        truth = sbot.Gaussian([0.0], [[1.0]])
        start = sbot.solve_bridge(law, law, EPS)  # its drifts keep a law that is not the marginal
        problem = sbot.solve_bridge(law, truth, EPS).problem
        chain = Chain(problem.reference, TimeGrid(20).times(EPS), EPS, torch.empty(()), (1,))
        control = Steering(1, BridgeBase(start, problem.reference, 1), None)
        residual = marginal_residual(problem, chain, control, 1, 0, 2)
        assert residual > sbot.DSB().tol == sbot.DSBM().tol
        exact = Steering(1, BridgeBase(sbot.solve_bridge(law, truth, EPS), problem.reference, 1), None)
        assert marginal_residual(problem, chain, exact, 1, 0, 2) < sbot.DSB().tol


def test_events_of_any_shape_have_a_network() -> None:
    short = fit(2, batch=4)
    for event in ((3, 4), (2, 2, 3, 2), (3, 1, 5), (1, 1, 1)):
        law = sbot.Sampler(lambda n, generator, e=event: torch.randn((n, *e), generator=generator))
        for solver in (
            sbot.DSB(rounds=1, steps=3, fit=short, tol=1e9, cache=sbot.Cache(paths=4)),
            sbot.DSBM(steps=3, pairs=8, fit=short, tol=1e9),
        ):
            bridge = sbot.solve_bridge(law, law, EPS, solver=solver)
            assert bridge.sample_paths(2, [0.0, 0.5, 1.0]).shape == (2, 3, *event)


def test_the_cache_keeps_to_its_memory() -> None:
    """Rows and the order in which they are used; many uses of few bytes would else be mostly order."""
    kept: list[int] = []

    def look(state: sbot.Progress) -> None:
        kept.append(max(fitting_bytes()))

    def fitting_bytes() -> list[int]:
        import gc

        found = [o for o in gc.get_objects() if type(o) is Training]
        return [sum(v.numel() * v.element_size() for v in training.kept.values()) for training in found]

    one = sbot.Gaussian([0.0], [[1.0]])
    memory = 2**16
    for reuse in (1, 16):
        solver = sbot.DSB(
            rounds=1, cache=sbot.Cache(reuse=reuse, memory=memory), fit=fit(30, callbacks=(look,)), tol=100.0
        )
        sbot.solve_bridge(one, one, EPS, solver=solver)
    assert memory / 4 < max(kept) <= memory
