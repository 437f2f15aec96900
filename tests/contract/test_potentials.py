"""Every family of potentials: a tilt is an integral, its score the gradient, its sampler its mean."""

from __future__ import annotations

import pytest
import torch

from sbot import linalg
from sbot.errors import Unsupported
from sbot.potentials import Atoms, Quadratics

from ..conftest import spd

GRID = torch.linspace(-12, 12, 4001, dtype=torch.float64)[:, None]


def atoms(d, gen):
    log_weights = torch.randn(6, generator=gen, dtype=torch.float64)
    log_weights[2] = -torch.inf
    return Atoms(torch.randn(6, d, generator=gen, dtype=torch.float64), log_weights)


def quadratics(d, gen, k=3, growth=0.4):
    covs = torch.stack([spd(d, gen, 0.3) for _ in range(k)])
    means = torch.randn(k, d, generator=gen, dtype=torch.float64)
    logits = torch.randn(k, generator=gen, dtype=torch.float64)
    return Quadratics(logits, means, covs, growth * torch.eye(d, dtype=torch.float64))


FAMILIES = {
    "atoms": atoms,
    "one quadratic": lambda d, gen: quadratics(d, gen, 1),
    "mixture": quadratics,
    "wide end": lambda d, gen: quadratics(d, gen, 2, growth=1.2),
}


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request):
    return request.param


def tilt_of(psi, obs, cov):
    return psi.tilt(obs, cov)


@pytest.mark.parametrize("scalar", [True, False])
def test_score_is_the_gradient_of_log_mass(family, scalar, generator):
    psi = family(2, generator)
    cov = torch.tensor(0.6).double() if scalar else spd(2, generator) * 0.5
    obs = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    tilted = psi.tilt(obs, cov)
    want = torch.autograd.grad(tilted.log_mass.sum(), obs)[0]
    torch.testing.assert_close(tilted.score, want, rtol=1e-9, atol=1e-9)
    tweedie = linalg.apply(linalg.inverse(cov), tilted.mean - obs)
    torch.testing.assert_close(tilted.score, tweedie, rtol=1e-9, atol=1e-9)


def test_tilt_is_an_integral_in_one_dimension(generator):
    psi = quadratics(1, generator)
    obs = torch.tensor([[-1.0], [0.5], [2.0]], dtype=torch.float64)
    cov = torch.tensor(0.6).double()
    noise = torch.distributions.Normal(obs[:, 0, None], cov.sqrt())
    log_integrand = noise.log_prob(GRID[:, 0]) + psi.log_density(GRID)
    weights = (log_integrand - log_integrand.max()).exp()
    step = float(GRID[1] - GRID[0])
    want = (weights.sum(1) * step).log() + log_integrand.max()
    tilted = psi.tilt(obs, cov)
    torch.testing.assert_close(tilted.log_mass, want, rtol=1e-9, atol=1e-9)
    mean = (weights * GRID[:, 0]).sum(1) / weights.sum(1)
    torch.testing.assert_close(tilted.mean[:, 0], mean, rtol=1e-8, atol=1e-8)


def test_atoms_against_the_sum(generator):
    psi = atoms(3, generator)
    obs = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    cov = spd(3, generator)
    law = torch.distributions.MultivariateNormal(obs[:, None], cov)
    logits = law.log_prob(psi.points[None]) + psi.log_weights
    tilted = psi.tilt(obs, cov)
    torch.testing.assert_close(tilted.log_mass, logits.logsumexp(1))
    torch.testing.assert_close(tilted.mean, logits.softmax(1) @ psi.points)
    torch.testing.assert_close(tilted.weights, logits.softmax(1))


def test_samples_have_the_mean(family, generator):
    psi = family(2, generator)
    obs = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    tilted = psi.tilt(obs.expand(40_000, 2), torch.tensor(0.5).double())
    draws = tilted.sample(generator=generator)
    error = (draws.mean(0) - tilted.mean[0]).abs() / (draws.std(0) / 200)
    assert float(error.max()) < 4.5


def test_dropped_atoms_are_never_drawn(generator):
    psi = atoms(1, generator)
    draws = psi.tilt(psi.points[2].expand(5000, 1), torch.tensor(0.01).double()).sample(generator=generator)
    assert not bool((draws == psi.points[2]).any())


def test_score_survives_vanishing_noise(generator):
    """V -> 0 is where mean - obs cancels; the limit is the potential's own score."""
    psi = quadratics(2, generator, 1)
    obs = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    near = psi.tilt(obs, torch.tensor(1e-13).double()).score
    torch.testing.assert_close(near, psi.score(obs), rtol=1e-10, atol=1e-10)


def test_score_of_a_mixture_is_the_gradient_of_its_density(generator):
    psi = quadratics(2, generator)
    y = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(psi.log_density(y).sum(), y)[0]
    torch.testing.assert_close(psi.score(y), want)


def test_singular_components(generator):
    """A degenerate end: the limit of ever narrower ones."""
    thin = torch.diag(torch.tensor([0.5, 1e-9])).double()
    flat = torch.diag(torch.tensor([0.5, 0.0])).double()
    growth = 0.3 * torch.eye(2, dtype=torch.float64)
    means, logits = torch.tensor([[0.2, 1.0]]).double(), torch.zeros(1).double()
    obs = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    near, limit = (
        Quadratics(logits, means, c[None], growth).tilt(obs, torch.tensor(0.5).double()) for c in (thin, flat)
    )
    for part in ("log_mass", "mean", "score"):
        torch.testing.assert_close(getattr(limit, part), getattr(near, part), rtol=1e-6, atol=1e-6)
    assert torch.equal(limit.sample(generator=generator)[:, 1], torch.ones(4).double())
    with pytest.raises(Unsupported, match="no density"):
        Quadratics(logits, means, flat[None], growth).log_density(obs)


def test_batches_are_singles(generator):
    parts = [quadratics(2, generator) for _ in range(2)]
    joint = Quadratics(
        *(torch.stack([getattr(p, name) for p in parts]) for name in ("logits", "means", "covs", "growth"))
    )
    obs = torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)
    for cov in (torch.tensor(0.4).double(), spd(2, generator)):
        whole = joint.tilt(obs, cov)
        for i, part in enumerate(parts):
            one = part.tilt(obs[i], cov)
            for name in ("log_mass", "mean", "score"):
                torch.testing.assert_close(getattr(whole, name)[i], getattr(one, name))
        torch.testing.assert_close(joint.log_density(obs)[1], parts[1].log_density(obs[1]))
        torch.testing.assert_close(joint.score(obs)[1], parts[1].score(obs[1]))
        assert whole.sample(generator=generator).shape == obs.shape
