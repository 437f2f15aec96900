"""What the benchmarks of continuous bridges hold contenders against is itself right."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import sbot
from benchmarks.__main__ import main
from benchmarks.continuous import cells, ipf, page, problems, score_claim, scores, settings
from benchmarks.continuous.common import Options, Result, half_steps, solve

EXACT = (math.sqrt(5) - 1) / 2


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- Gaussian fits -------------------------------------------------------------------------------------------------------


def test_diagonal_kl_of_exact_samples_is_d_over_n():
    d, n, generator = 10, 2000, seeded()
    found = [
        scores.diagonal_kl(torch.randn(n, d, generator=generator), torch.zeros(d), torch.ones(d)) for _ in range(60)
    ]
    assert sum(found) / len(found) == pytest.approx(d / n, rel=0.1)


def test_diagonal_kl_is_the_divergence():
    x = 2 * torch.randn(400_000, 1, generator=seeded(), dtype=torch.float64) + 1
    p, q = torch.distributions.Normal(1.0, 2.0), torch.distributions.Normal(0.0, 3.0)
    exact = float(torch.distributions.kl_divergence(p, q))
    assert scores.diagonal_kl(x, torch.zeros(1), 9 * torch.ones(1)) == pytest.approx(exact, abs=5e-3)
    paths = torch.stack([x, 0.5 * x], 1)
    both = scores.average_kl(paths, torch.zeros(2, 1), torch.tensor([[9.0], [2.25]]))
    assert both == pytest.approx(exact, abs=5e-3)  # the divergence of the halves is the same


def test_scores_of_pairs():
    d, n = 3, 50_000
    mu, nu = problems.gaussian_pair(d)
    joint = ipf.solution(mu, nu, 1.0)
    draws = sbot.Gaussian(joint.mean, joint.cov).sample(n, generator=seeded())
    x0, x1 = draws[:, :d], draws[:, d:]
    assert scores.cross_covariance(x0, x1) == pytest.approx(EXACT, abs=0.01)
    assert scores.pairs_kl(x0, x1, joint.mean, joint.cov) == pytest.approx(5 * d / (2 * n), rel=1)
    apart = scores.pairs_kl(x0, x1[torch.randperm(n, generator=seeded())], joint.mean, joint.cov)
    product = ipf.Joint(joint.mean, torch.block_diag(mu.cov, nu.cov))
    assert apart == pytest.approx(product.kl(joint), rel=0.05)


# ---- exact proportional fitting ------------------------------------------------------------------------------------------


def test_iterates_have_their_marginals_and_reach_the_closed_form():
    mu = sbot.Gaussian(torch.tensor([0.0, 1.0]), torch.tensor([[1.0, 0.3], [0.3, 0.5]]))
    nu = sbot.Gaussian(torch.tensor([1.0, -1.0]), torch.tensor([[0.4, -0.1], [-0.1, 2.0]]))
    limit, found = ipf.solution(mu, nu, 0.7), ipf.iterates(mu, nu, 0.7, 60)
    for k, joint in enumerate(found):
        law, t = (nu, 1.0) if k % 2 else (mu, 0.0)
        mean, cov = joint.marginal(t, 0.7)
        assert torch.allclose(mean, law.mean.double())
        assert torch.allclose(cov, law.cov.double())
    errors = [joint.kl(limit) for joint in found]
    assert all(b < a for a, b in itertools.pairwise(errors[:21]))
    assert errors[-1] < 1e-9


def test_iterates_are_those_of_a_fine_grid():
    grid = torch.linspace(-8, 8, 400, dtype=torch.float64)
    mu, nu = problems.gaussian_pair(1)
    a, b = (torch.softmax(law.log_prob(grid[:, None]), 0) for law in (mu, nu))
    plan = a[:, None] * torch.softmax(-((grid[:, None] - grid) ** 2) / 2, 1)
    for k, joint in enumerate(ipf.iterates(mu, nu, 1.0, 4)):
        if k:
            plan = plan * (b / plan.sum(0)) if k % 2 else plan * (a / plan.sum(1))[:, None]
        mean = torch.stack([plan.sum(1) @ grid, plan.sum(0) @ grid])
        cross = grid @ plan @ grid - mean[0] * mean[1]
        assert torch.allclose(joint.mean, mean, atol=1e-5)
        assert float(joint.cov[0, 1]) == pytest.approx(float(cross), abs=1e-4)


def test_the_rate_of_the_benchmark():
    mu, nu = problems.gaussian_pair(5)
    limit, found = ipf.solution(mu, nu, 1.0), ipf.iterates(mu, nu, 1.0, 12)
    assert found[12].kl(limit) / found[11].kl(limit) == pytest.approx(EXACT**2, rel=1e-2)
    assert float(limit.cov[0, 5]) == pytest.approx(EXACT)


# ---- simulation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heun", [False, True])
def test_simulation_of_the_exact_drift_reaches_the_end(heun):
    mu, nu = problems.gaussian_pair(2)
    bridge = sbot.solve_bridge(mu, nu, 1.0, solver=sbot.ClosedForm())
    x = mu.sample(20_000, generator=seeded())
    paths = scores.simulate(bridge.drift, x, 40, 1.0, seeded(1), heun=heun, keep=True)
    assert paths.shape == (20_000, 41, 2)
    assert torch.equal(paths[:, 0], x)
    assert scores.diagonal_kl(paths[:, -1], nu.mean, nu.cov.diagonal()) < (2e-3 if heun else 1e-2)
    assert scores.cross_covariance(paths[:, 0], paths[:, -1]) == pytest.approx(EXACT, abs=0.03)


def test_backwards_in_the_order_of_t():
    mu, nu = problems.gaussian_pair(2)
    bridge = sbot.solve_bridge(mu, nu, 1.0, solver=sbot.ClosedForm())
    y = nu.sample(20_000, generator=seeded())
    paths = scores.simulate(bridge.reverse_drift, y, 40, 1.0, seeded(1), back=True, keep=True)
    assert torch.equal(paths[:, -1], y)
    assert scores.diagonal_kl(paths[:, 0], mu.mean, mu.cov.diagonal()) < 1e-2


def test_noise_without_drift():
    x = scores.simulate(lambda t, x: 0 * x, torch.zeros(20_000, 1), 10, 0.5, seeded(), variance=lambda t: 2 * t)
    assert float(x.var()) == pytest.approx(0.5, rel=0.05)  # 0.5 times the integral of 2 t


# ---- transport -----------------------------------------------------------------------------------------------------------


def test_w2_of_a_shift_and_of_a_permutation():
    x = torch.randn(200, 2, generator=seeded())
    assert scores.w2(x, x[torch.randperm(200, generator=seeded())]) == pytest.approx(0, abs=1e-6)
    assert scores.w2(x, x + torch.tensor([3.0, 4.0])) == pytest.approx(5, rel=1e-5)


# ---- mixtures ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eps", [0.1, 1.0, 10.0])
def test_conditionals_are_potential_times_kernel(eps):
    pair = problems.MixturePair(1, eps, spread=0.3)
    y = torch.linspace(-30, 30, 60_001, dtype=torch.float64)
    x = torch.tensor([[-1.0], [0.4], [2.0]], dtype=torch.float64)
    psi = torch.exp(-((y[:, None] - pair.centres[:, 0]) ** 2) / 0.6).sum(1)
    density = psi * torch.exp(-((y - x) ** 2) / (2 * eps))
    density = density / density.sum(1, keepdim=True)
    law = pair.conditional(x)
    assert torch.allclose(law.mean[:, 0], density @ y, atol=1e-8)
    assert torch.allclose(law.cov[:, 0, 0], density @ y**2 - (density @ y) ** 2, atol=1e-8)
    # the drift is eps grad log of the potential after the heat flow of what time is left
    place, t = x.clone().requires_grad_(), 0.25
    heat = torch.logsumexp(-((place - pair.centres[:, 0]) ** 2) / (2 * (0.3 + eps * (1 - t))), 1)
    (grad,) = torch.autograd.grad(heat.sum(), place)
    assert torch.allclose(pair.drift(t, x), eps * grad, atol=1e-10)


def test_draws_end_and_scores_of_a_pair():
    pair = problems.MixturePair(3, 1.0)
    end, draws = pair.end(seeded()), pair.sample(40_000, generator=seeded(1)).double()
    assert torch.allclose(end.mean, draws.mean(0), atol=0.1)
    assert torch.allclose(end.cov, torch.cov(draws.T), atol=0.2)
    x = pair.start(40, seeded(2))
    exact = pair.conditional(x)
    floor = scores.conditional_score(pair.draw, x, 500, exact, end, seeded(3))
    assert floor < 1
    again = scores.conditional_moments(pair.draw, x, 500, seeded(3), rows=1500)
    assert again.mean.shape == (40, 3)
    assert float(sbot.metrics.cbw2_uvp(again, exact, end)) < 1
    drifted = scores.simulate(pair.drift, x.repeat_interleave(500, 0), 100, 1.0, seeded(4)).reshape(40, 500, 3)
    assert float(sbot.metrics.cbw2_uvp(drifted, exact, end)) < 2


def test_rebuilt_pairs_are_in_the_published_regime():
    from benchmarks.continuous.mixtures import _independent

    for d, published in ((2, 196), (16, 186), (64, 163)):
        pair = problems.MixturePair(d, 0.1)
        exact = pair.conditional(pair.start(20, seeded()))
        assert _independent(pair.end(seeded(1), 4000), exact) == pytest.approx(published, rel=0.15)


def test_moments_of_a_mixture_without_draws():
    from benchmarks.continuous.mixtures import _moments

    mu, nu = problems.gaussian_pair(3)
    bridge = sbot.solve_bridge(mu, nu, 1.0, solver=sbot.ClosedForm())
    x = mu.sample(25, generator=seeded())
    law, plan = _moments(bridge, x), ipf.solution(mu, nu, 1.0)
    assert torch.allclose(law.mean, bridge.transport(x))
    assert torch.allclose(law.cov, (1 - plan.cov[0, 3] ** 2) * torch.eye(3, dtype=torch.float64).expand(25, 3, 3))


# ---- toys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("toy", list(problems.TOYS))
def test_draws_and_even_sets_are_of_one_law(toy):
    for law in problems.TOYS[toy]:
        free, even = law.sample(20_000, generator=seeded()), law.even(20_000, 1)
        scale = float(even.std())
        assert free.shape == even.shape == (20_000, 2)
        assert torch.allclose(free.mean(0), even.mean(0), atol=0.03 * scale)
        assert torch.allclose(torch.cov(free.T), torch.cov(even.T), atol=0.04 * scale**2)


def test_the_last_pair_is_standardised():
    moons = problems.TOYS["moons-8gaussians"][0].even(10_000, 0)
    assert float(moons.mean()) == pytest.approx(0, abs=0.05)
    assert float(moons.std()) == pytest.approx(7, rel=0.01)


# ---- the score model -----------------------------------------------------------------------------------------------------


def test_exact_reverse_drift_samples_the_data():
    n, generator, process = 2000, seeded(), score_claim.reference()
    x = scores.simulate(
        score_claim.reverse(score_claim.exact_score),
        torch.randn(n, 2, generator=generator),
        100,
        1.0,
        generator,
        back=True,
        variance=lambda t: float(process.coefficients(t)[2]),
    )
    assert float(sbot.metrics.energy_distance(x, score_claim.data().sample(n, generator=generator))) < 0.005


# ---- running and writing -------------------------------------------------------------------------------------------------


def test_filters_are_names_or_their_parts():
    options = Options(cells=("d5", "eps0.1", "normal-moons"))
    wanted = ["d5", "D2-eps0.1", "D16-eps0.1", "normal-moons"]
    assert all(map(options.wants, wanted))
    assert not any(map(options.wants, ["d50", "D2-eps1", "normal-scurve", "moons-8gaussians"]))
    assert Options().wants("anything")


def test_generators_are_of_their_names():
    options = Options(seed=3)
    first, again, other = (torch.rand(2, generator=options.generator("a", name)) for name in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_what_a_version_lacks_or_refuses_is_a_note():
    mu, nu = problems.gaussian_pair(2)
    absent = solve(mu, nu, 1.0, {"class": "NoSuchSolver"}, Options())
    assert absent.bridge is None
    assert "NoSuchSolver" in absent.note
    refused = solve(mu, nu, 1.0, {"class": "Sinkhorn"}, Options())
    assert refused.bridge is None
    assert "Sinkhorn" in refused.note
    assert solve(mu, nu, 1.0, {"class": "ClosedForm"}, Options()).bridge is not None
    assert [k for k, _ in half_steps(mu, nu, 1.0, {"class": "NoSuchSolver"}, Options(), 5)] == [1]


def test_numbers_of_a_page():
    assert page.numbers([0.5494, 12.34, 123456.0, 1e-5, float("nan"), None, 0.0, 9.996]) == [
        *("0.549", "12.3", "1.23e+05", "1.00e-05", "-", "-"),
        *("0", "10.00"),
    ]
    assert page.slashed([1.04, 100.0], 2) == "1.0 / 100"


def test_cells_with_sinkhorn_and_a_page_of_it(tmp_path):
    rng = np.random.default_rng(0)
    for day in (2, 3, 4):
        points = rng.standard_normal((80, 50)) * 3 + day
        np.save(tmp_path / f"full_cite_pcas_50_day_{day}.npy", points.astype(np.float32))
    result = cells.run(Options(cells=("plug-in Sinkhorn",), data=tmp_path))
    by_name = {row["contender"]: row["energy_distance"] for row in result.rows}
    assert by_name["plug-in Sinkhorn"] < min(by_name["day 2 as prediction"], by_name["day 4 as prediction"])
    files = page.save(result, tmp_path, Options(data=tmp_path), {"date": "today", "versions": {}, **_machine()})
    assert set(files) == {f"continuous_cells.{end}" for end in ("md", "csv", "json", "png")}
    stored = json.loads((tmp_path / "continuous_cells.json").read_text())
    assert stored["rows"][1]["contender"] == "day 2 as prediction"
    text = (tmp_path / "continuous_cells.md").read_text()
    assert str(tmp_path) not in text


def _machine() -> dict[str, object]:
    return {"cpu": "a", "cores": 1, "threads": 1, "platform": "b", "revision": "c", "note": "d"}


def test_a_page_without_rows(tmp_path):
    assert page.save(Result("x", "X", "text", []), tmp_path, Options(), {"date": "", "versions": {}, **_machine()}) == [
        "continuous_x.md",
        "continuous_x.json",
    ]


def test_the_command_line(tmp_path):
    done = CliRunner().invoke(main, ["continuous", "--only", "cells", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert "Not run" in (tmp_path / "continuous_cells.md").read_text()
    assert CliRunner().invoke(main, ["continuous", "--only", "nothing"]).exit_code == 2


def test_plans_in_words():
    assert settings.words({"class": "DSB", "steps": 5, "fit": {"lr": 1}}) == "DSB: steps 5, fit (lr 1)"
