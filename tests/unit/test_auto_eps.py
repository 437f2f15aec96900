"""``eps="auto"``: a twentieth of the standard deviation of the cost, by moments, by tiles, between Gaussians, from draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sbot
from sbot import cli, kernels, spread
from sbot.spread import DRAWS, SHARE, natural_eps
from tests.conftest import clouds, half_squares, spd, weights


def deviation(c, a, b):
    """By the definition, over the pairs that are allowed."""
    w = a[..., :, None] * b[..., None, :] * torch.isfinite(c)
    c = torch.where(torch.isfinite(c), c, 0.0)
    w = w / w.sum((-2, -1), keepdim=True)
    mean = (w * c).sum((-2, -1), keepdim=True)
    return (w * (c - mean).square()).sum((-2, -1)).sqrt()


@pytest.mark.parametrize(("n", "m", "d"), [(30, 40, 3), (4, 5, 60), (1, 7, 2)])
def test_moments_are_the_sum_over_pairs(n, m, d, generator):
    x, y = clouds(n, m, d, generator, (2,))
    a, b = weights(2, n, generator=generator), weights(2, m, generator=generator)
    eps, words = natural_eps(sbot.Discrete(x, 3 * a), sbot.Discrete(y, b), sbot.Quadratic())
    torch.testing.assert_close(eps, SHARE * deviation(half_squares(x, y), a, b))
    assert words == "the standard deviation of the cost"


def test_any_cost_streams_over_tiles(generator, monkeypatch):
    x, y = clouds(30, 40, 3, generator)
    a, b = weights(30, generator=generator), weights(40, generator=generator)
    monkeypatch.setattr(kernels.base, "TILE_BYTES", 40 * 8 * 7 * kernels.COPIES)  # seven rows
    for cost in (sbot.Lp(1), sbot.Cosine(), sbot.Lp(2, 3)):
        eps, _ = natural_eps(sbot.Discrete(x, a), sbot.Discrete(y, b), cost)
        torch.testing.assert_close(eps, SHARE * deviation(cost.matrix(x, y), a, b))


def test_forbidden_pairs_are_left_out_and_constants_change_nothing(generator):
    c = torch.rand(6, 8, generator=generator, dtype=torch.float64)
    c[0, 3:] = torch.inf
    c[2, 0] = torch.inf
    a, b = weights(6, generator=generator), weights(8, generator=generator)
    want = SHARE * float(deviation(c, a, b))
    for constant in (0.0, 1e6):
        assert sbot.Problem.of(a, b, "auto", cost=c + constant).eps == pytest.approx(want, rel=1e-8)


def test_a_linear_reference_is_measured_in_its_own_cost(generator):
    x, y = clouds(20, 25, 2, generator)
    reference = sbot.OrnsteinUhlenbeck(rate=1.5)
    want = SHARE * float(deviation(reference.cost().matrix(x, y), torch.ones(20) / 20, torch.ones(25) / 25))
    assert sbot.Problem.of(x, y, "auto", reference).eps == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("reference", [sbot.Brownian(), sbot.OrnsteinUhlenbeck(rate=0.7, mean=2.0)])
def test_gaussians_in_closed_form_agree_with_many_draws(reference, generator):
    mu = sbot.Gaussian(torch.ones(3, dtype=torch.float64), spd(3, generator))
    nu = sbot.Gaussian(torch.zeros(3, dtype=torch.float64), spd(3, generator))
    exact = float(natural_eps(mu, nu, reference.cost())[0])
    x, y = (sbot.Discrete(law.sample(200_000, generator=generator)) for law in (mu, nu))
    assert float(natural_eps(x, y, reference.cost())[0]) == pytest.approx(exact, rel=0.02)
    assert sbot.solve_bridge(mu, nu, "auto", reference=reference).problem.eps == exact


def test_samplers_are_drawn_from_with_a_generator_of_their_own(generator):
    sizes, before = [], torch.get_rng_state()

    def draw(n, generator):
        sizes.append(n)
        return torch.randn(n, 2, generator=generator, dtype=torch.float64)

    mu, nu = sbot.Sampler(draw), sbot.Gaussian(torch.zeros(2).double(), torch.eye(2).double())
    before = torch.get_rng_state()
    eps = [sbot.Problem.of(mu, nu, "auto").eps for _ in range(2)]
    assert eps[0] == eps[1]
    assert sizes[-1] == DRAWS
    assert torch.equal(before, torch.get_rng_state())
    # Var |w|^2 / 2 for w of variance 2 in each of two dimensions is 4
    assert eps[0] == pytest.approx(SHARE * 2, rel=0.1)
    mixture = sbot.Mixture(torch.zeros(2), torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2))
    assert sbot.Problem.of(mixture, mixture, "auto").eps == pytest.approx(SHARE * 2, rel=0.1)


def test_the_number_is_kept_and_said(generator):
    x, y = clouds(30, 40, 2, generator)
    bridge = sbot.solve_bridge(x, y, "auto")
    assert isinstance(bridge.problem.eps, float)
    note = f'eps="auto": {bridge.problem.eps:.3g}, a twentieth of the standard deviation of the cost'
    assert note in bridge.report.notes
    assert torch.equal(bridge.plan(), sbot.solve_bridge(x, y, bridge.problem.eps).plan())
    assert bridge.report.converged


def test_it_scales_with_the_cost_and_the_dtype_does_not_matter(generator):
    x, y = clouds(30, 40, 2, generator)
    eps = sbot.Problem.of(x, y, "auto").eps
    assert sbot.Problem.of(10 * x, 10 * y, "auto").eps == pytest.approx(100 * eps)
    assert sbot.Problem.of(x + 5, y + 5, "auto").eps == pytest.approx(eps)
    assert sbot.Problem.of(x.float(), y.float(), "auto").eps == pytest.approx(eps, rel=1e-5)
    shifted = sbot.Problem.of(x.float() + 1e3, y.float() + 1e3, "auto").eps
    assert shifted == pytest.approx(eps, rel=1e-3)


def test_a_flat_cost_falls_back_to_its_size():
    point = torch.zeros(1, 2, dtype=torch.float64)
    bridge = sbot.solve_bridge(point, point + 2, "auto")
    assert bridge.problem.eps == pytest.approx(0.05 * 4)
    assert any("mean of the cost, which is the same for all pairs" in note for note in bridge.report.notes)
    flat = sbot.Problem.of([0.5, 0.5], [0.5, 0.5], "auto", cost=torch.full((2, 2), -3.0))
    assert flat.eps == pytest.approx(0.15)
    with pytest.raises(sbot.InvalidProblem, match=r"0 for all pairs and has no scale; give eps"):
        sbot.solve_bridge(point, point, "auto")


def test_a_batch_takes_the_mean(generator):
    x, y = clouds(10, 12, 2, generator, (3,))
    alone = [sbot.Problem.of(x[k], y[k], "auto").eps for k in range(3)]
    batch = sbot.Problem.of(x, y, "auto")
    assert float(torch.as_tensor(batch.eps).mean()) == pytest.approx(np.mean(alone))
    # a problem whose cost is zero has no scale of its own
    x[0], y[0] = 0.0, 0.0
    each, _ = spread.natural_eps(sbot.Discrete(x), sbot.Discrete(y), sbot.Quadratic())
    assert each.tolist() == pytest.approx([np.mean(alone[1:]), *alone[1:]])


def test_padding_does_not_count(generator):
    parts = [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (3, 8)]
    y = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    each, _ = spread.natural_eps(sbot.Discrete.from_list(parts), sbot.Discrete(y).expand((2,)), sbot.Quadratic())
    assert each.tolist() == pytest.approx([sbot.Problem.of(part, y, "auto").eps for part in parts])


def test_no_matrix_is_made(generator):
    x, y = (torch.randn(200_000, 2, generator=generator) for _ in range(2))  # 320 GB of pairs in float64
    assert 0 < sbot.Problem.of(x, y, "auto").eps < 1


def test_what_has_no_number_is_refused(generator):
    x, y = clouds(5, 6, 2, generator)
    with pytest.raises(sbot.InvalidProblem, match="'automatic'; give a number > 0 in the units of the cost, or 'auto'"):
        sbot.solve_bridge(x, y, "automatic")
    with pytest.raises(sbot.Unsupported, match="give eps as a number"):
        sbot.Problem.of(x, y, "auto", sbot.Diffusion(lambda t, x: -x))


def test_on_the_command_line(tmp_path, monkeypatch, capsys, generator):
    monkeypatch.chdir(tmp_path)
    x, y = clouds(30, 40, 2, generator)
    np.save("x.npy", x.numpy())
    np.save("y.npy", y.numpy())
    with pytest.raises(SystemExit) as done:
        cli.commands.main(["solve", "x.npy", "y.npy", "--eps", "auto", "--out", "b.safetensors"])
    assert done.value.code == 0
    assert 'note: eps="auto": ' in capsys.readouterr().out
    assert sbot.load("b.safetensors").problem.eps == pytest.approx(sbot.Problem.of(x, y, "auto").eps)
    with pytest.raises(SystemExit) as done:
        cli.commands.main(["solve", "x.npy", "y.npy", "--eps", "small", "--out", "b.safetensors"])
    assert done.value.code == 1
    assert "'small' is not a number, nor 'auto'" in capsys.readouterr().err
