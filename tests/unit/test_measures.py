"""Measures: samples have the moments, conversions keep what was given."""

from __future__ import annotations

import pytest
import torch
from torch import distributions as td

import sbot

from ..conftest import spd


def test_discrete_frequencies(generator):
    w = torch.tensor([0.0, 0.5, 0.2, 0.3, 0.0]).double()
    draws = sbot.Discrete(None, 7 * w).sample(100_000, generator=generator)
    freq = torch.bincount(draws, minlength=5) / 100_000
    assert float(freq[0]) == float(freq[4]) == 0
    assert float((freq - w).abs().max()) < 0.008


def test_discrete_batches(generator):
    points = torch.arange(6.0).reshape(2, 3, 1)
    w = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    draws = sbot.Discrete(points, w).sample(4, generator=generator)
    assert draws.squeeze(-1).tolist() == [[0.0] * 4, [5.0] * 4]


def test_more_atoms_than_multinomial_takes():
    n = 2**24 + 5
    w = torch.zeros(n)
    w[-1] = 1
    assert sbot.Discrete(None, w).sample(3).tolist() == [n - 1] * 3


def test_gaussian_moments_and_density(generator):
    cov = spd(3, generator)
    g = sbot.Gaussian(torch.tensor([1.0, 2.0, 3.0]).double(), cov)
    draws = g.sample(100_000, generator=generator)
    fitted = sbot.Gaussian.from_samples(draws)
    torch.testing.assert_close(fitted.mean, g.mean, atol=0.02, rtol=0)
    torch.testing.assert_close(fitted.cov, cov, atol=0.03, rtol=0)
    torch.testing.assert_close(g.log_prob(draws[:5]), td.MultivariateNormal(g.mean, cov).log_prob(draws[:5]))
    flat = sbot.Gaussian(torch.zeros(2), torch.diag(torch.tensor([1.0, 0.0])))
    assert float(flat.sample(10, generator=generator)[:, 1].abs().max()) == 0
    with pytest.raises(sbot.Unsupported, match="no density"):
        flat.log_prob(torch.zeros(1, 2))


def test_covariance_rounding_is_mended():
    cov = torch.eye(2).double()
    cov[0, 1] = 1e-9
    assert torch.equal(
        sbot.Gaussian(torch.zeros(2).double(), cov).cov, sbot.Gaussian(torch.zeros(2).double(), cov).cov.T
    )
    slightly = torch.diag(torch.tensor([1.0, -1e-12])).double()
    assert float(torch.linalg.eigvalsh(sbot.Gaussian(torch.zeros(2).double(), slightly).cov)[0]) >= -1e-16


def test_mixture(generator):
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]]).double()
    covs = torch.stack([spd(2, generator), spd(2, generator)])
    mixture = sbot.Mixture(torch.tensor([0.0, 1.0]).double(), means, covs)
    draws = mixture.sample(100_000, generator=generator)
    weights = torch.tensor([0.0, 1.0]).double().softmax(0)
    torch.testing.assert_close(draws.mean(0), weights @ means, atol=0.03, rtol=0)
    want = td.MixtureSameFamily(td.Categorical(weights), td.MultivariateNormal(means, covs))
    torch.testing.assert_close(mixture.log_prob(draws[:6]), want.log_prob(draws[:6]))


def test_as_measure_knows_what_people_have(generator):
    normal = td.MultivariateNormal(torch.zeros(2), torch.eye(2))
    assert isinstance(sbot.as_measure(normal), sbot.Gaussian)
    assert isinstance(sbot.as_measure(td.Independent(td.Normal(torch.zeros(2), 2 * torch.ones(2)), 1)), sbot.Gaussian)
    image = td.Independent(td.Normal(torch.zeros(3, 2), torch.ones(3, 2)), 2)
    assert sbot.as_measure(image).event_shape == (3, 2)  # one event, not a batch of three
    mix = td.MixtureSameFamily(
        td.Categorical(torch.ones(2)), td.MultivariateNormal(torch.zeros(2, 2), torch.eye(2).expand(2, 2, 2))
    )
    assert isinstance(sbot.as_measure(mix), sbot.Mixture)
    other = sbot.as_measure(td.Independent(td.Laplace(torch.zeros(3), torch.ones(3)), 1))
    assert isinstance(other, sbot.Sampler)
    before = torch.get_rng_state()
    seeded = [other.sample(4, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(seeded[0], seeded[1])
    assert not torch.equal(seeded[0], seeded[2])
    assert torch.equal(before, torch.get_rng_state())
    for function in (lambda n: torch.ones(n, 2), lambda n, generator: torch.ones(n, 2)):
        assert sbot.as_measure(function).sample(3).shape == (3, 2)
    dataset = torch.utils.data.TensorDataset(torch.arange(10.0)[:, None])
    assert sbot.as_measure(dataset).sample(5, generator=generator).shape == (5, 1)
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    sampler = sbot.as_measure(loader)
    assert sampler.sample(25).shape == (25, 1)  # more than the loader holds: it starts again
    pair = sbot.as_measure((torch.zeros(3, 2), [1, 2, 3]))
    assert pair.weights.tolist() == [1, 2, 3]
    column = sbot.Discrete(torch.zeros(3, 2), torch.ones(3, 1))
    assert column.weights.shape == (3,)


def test_a_sampler_is_checked_at_every_draw():
    calls = []

    def draw(n, generator):
        calls.append(n)
        return torch.zeros(n if len(calls) < 3 else n - 1, 2)

    sampler = sbot.Sampler(draw)
    sampler.sample(5)
    with pytest.raises(sbot.InvalidProblem, match=r"returned shape \(4, 2\) for n = 5"):
        sampler.sample(5)


def test_images_are_events():
    assert sbot.Sampler(lambda n, g: torch.zeros(n, 1, 8, 8)).event_shape == (1, 8, 8)


def test_a_wider_copy_is_a_measure_of_its_own(generator):
    measure = sbot.Discrete(torch.rand(2, 5, 3, generator=generator), sizes=torch.tensor([5, 3]))
    wide = measure.to(dtype=torch.float64)
    assert (wide.dtype, wide.source_dtype, wide.points.dtype, wide.weights.dtype) == (torch.float64,) * 4
    assert torch.equal(wide.sizes, measure.sizes) and torch.equal(wide.mask, measure.mask)
    assert measure.dtype == measure.points.dtype == torch.float32
    same = measure.to(dtype=torch.float32)
    same.points.zero_()
    assert float(measure.points.abs().sum()) > 0
    with pytest.raises(sbot.InvalidProblem, match="complex64"):
        measure.to(dtype=torch.complex64)
    with pytest.raises(sbot.InvalidProblem, match="finite"):
        sbot.Discrete(torch.full((2, 1), 1e300, dtype=torch.float64)).to(dtype=torch.float32)
