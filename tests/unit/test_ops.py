"""Sinkhorn normalisation as a layer: laws, gradients, and the published formula."""

from __future__ import annotations

import math

import pytest
import torch

import sbot
from sbot.ops import log_optimal_transport, log_sinkhorn_iterations, sinkhorn_normalize


def published(scores, alpha, iterations):
    """SuperGlue's matching layer (Sarlin et al. 2020), one problem, from the formula."""
    n, m = scores.shape
    z = torch.full((n + 1, m + 1), float(alpha), dtype=scores.dtype)
    z[:n, :m] = scores
    a = torch.tensor([1.0] * n + [m], dtype=scores.dtype) / (n + m)
    b = torch.tensor([1.0] * m + [n], dtype=scores.dtype) / (n + m)
    k, v = z.exp(), torch.ones(m + 1, dtype=scores.dtype)
    for _ in range(iterations):
        u = a / (k @ v)
        v = b / (k.T @ u)
    return (u[:, None] * k * v).log() + math.log(n + m)


def scores(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("iterations", [1, 7, 100])
def test_matching_is_the_published_formula(generator, iterations):
    z = scores(3, 4, 6, generator=generator)
    got = log_optimal_transport(z, torch.tensor(0.7, dtype=z.dtype), iterations)
    expected = torch.stack([published(one, 0.7, iterations) for one in z])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture
def superglue():
    return pytest.importorskip(
        "transformers.models.superglue.modeling_superglue", reason="transformers is not installed", exc_type=ImportError
    )


def close(got, expected):
    """Equal to rounding, which 50 iterations do not add up."""
    near = 1e-12 if got.dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, expected, rtol=near, atol=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(2, 5, 4), (1, 1, 7), (3, 6, 6)])
@pytest.mark.parametrize("iterations", [0, 1, 50])
def test_matching_is_that_of_transformers(superglue, generator, dtype, size, iterations):
    z, alpha = 3 * scores(*size, generator=generator, dtype=dtype), torch.tensor(0.3, dtype=dtype)
    weight = scores(size[0], size[1] + 1, size[2] + 1, generator=generator, dtype=dtype)
    found = []
    for function in (log_optimal_transport, superglue.log_optimal_transport):
        leaves = z.clone().requires_grad_(), alpha.clone().requires_grad_()
        out = function(*leaves, iterations=iterations)
        found.append((out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)))
    for got, expected in zip(*found, strict=True):
        close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterations_are_those_of_transformers(superglue, generator, dtype):
    z = scores(2, 5, 4, generator=generator, dtype=dtype)
    log_mu, log_nu = (scores(2, k, generator=generator, dtype=dtype).log_softmax(-1) for k in (5, 4))
    weight = scores(2, 5, 4, generator=generator, dtype=dtype)
    found = []
    for function in (log_sinkhorn_iterations, superglue.log_sinkhorn_iterations):
        leaves = [part.clone().requires_grad_() for part in (z, log_mu, log_nu)]
        out = function(*leaves, 20)
        found.append((out.detach(), *torch.autograd.grad((out * weight).sum(), leaves)))
    for got, expected in zip(*found, strict=True):
        close(got, expected)


@pytest.mark.parametrize("iterations", [None, 2000])
def test_marginals_of_a_matching(generator, iterations):
    p = log_optimal_transport(scores(5, 7, generator=generator), 1.0, iterations).exp()
    torch.testing.assert_close(p.sum(1), torch.tensor([1.0] * 5 + [7.0], dtype=p.dtype))
    torch.testing.assert_close(p.sum(0), torch.tensor([1.0] * 7 + [5.0], dtype=p.dtype))


def test_the_fixed_point_is_an_entropic_plan(generator):
    z = scores(6, 6, generator=generator)
    w = torch.full((6,), 1 / 6, dtype=z.dtype)
    plan = sbot.solve_bridge(w, w, 1.0, cost=-z, solver=sbot.Sinkhorn(tol=1e-13)).plan()
    torch.testing.assert_close(log_sinkhorn_iterations(z, w.log(), w.log()).exp(), plan, rtol=1e-10, atol=0)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 50.0])
def test_normalised_is_doubly_stochastic(generator, dtype, scale):
    p = sinkhorn_normalize(scale * scores(20, 4, 4, generator=generator, dtype=dtype))
    close = 1e-4 if dtype == torch.float32 else 1e-10
    for axis in (-1, -2):
        assert float((p.sum(axis) - 1).abs().max()) < close
    assert p.dtype == dtype


def test_normalisation_follows_permutations_and_ignores_scalings(generator):
    z = scores(5, 5, generator=generator)
    order, other = torch.randperm(5, generator=generator), torch.randperm(5, generator=generator)
    p = sinkhorn_normalize(z)
    torch.testing.assert_close(sinkhorn_normalize(z[order][:, other]), p[order][:, other])
    shifted = z + scores(5, 1, generator=generator) + scores(1, 5, generator=generator)
    torch.testing.assert_close(sinkhorn_normalize(shifted), p)
    torch.testing.assert_close(sinkhorn_normalize(p.log()), p)


def test_last_dimension_is_exact(generator):
    z = scores(64, 10, generator=generator) / 0.05
    codes = sinkhorn_normalize(z, iterations=3, dim=(-2, -1))
    torch.testing.assert_close(codes.sum(-1), torch.ones(64, dtype=z.dtype))
    columns = sinkhorn_normalize(z, iterations=3)
    torch.testing.assert_close(columns.sum(-2), torch.full((10,), 6.4, dtype=z.dtype))
    # SwaV, written out: prototypes, then samples
    q = (z - z.max()).exp().T
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / 10
        q = q / q.sum(0, keepdim=True) / 64
    torch.testing.assert_close(codes, (64 * q).T)


@pytest.mark.parametrize("iterations", [None, 4])
def test_gradients(generator, iterations):
    z = scores(2, 3, 4, generator=generator).requires_grad_()
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sinkhorn_normalize(z, iterations=iterations), (z,))
    assert torch.autograd.gradcheck(lambda z, s: log_optimal_transport(z, s, iterations), (z, alpha))


def test_implicit_gradients_in_the_weights(generator):
    z = scores(2, 3, 4, generator=generator).requires_grad_()
    a, b = (scores(2, k, generator=generator).requires_grad_() for k in (3, 4))
    assert torch.autograd.gradcheck(
        lambda z, a, b: log_sinkhorn_iterations(z, a.log_softmax(-1), b.log_softmax(-1)), (z, a, b)
    )


def test_implicit_gradient_is_the_limit_of_the_unrolled(generator):
    z = scores(4, 4, generator=generator).requires_grad_()
    v = scores(4, 4, generator=generator)
    grads = [torch.autograd.grad((sinkhorn_normalize(z, iterations=k) * v).sum(), z)[0] for k in (None, 500)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_half_precision_is_computed_in_float32(generator):
    z = scores(3, 4, 4, generator=generator).bfloat16()
    for iterations in (None, 20):
        p = sinkhorn_normalize(z, iterations=iterations)
        assert p.dtype == torch.bfloat16
        assert float((p.float().sum(-1) - 1).abs().max()) < 0.02


def test_masked_pairs_stay_masked(generator):
    z = scores(4, 4, generator=generator)
    z[0, 1] = z[2, 3] = -math.inf
    p = sinkhorn_normalize(z)
    assert p[0, 1] == 0
    assert p[2, 3] == 0
    torch.testing.assert_close(p.sum(-1), torch.ones(4, dtype=z.dtype))


def test_near_a_permutation_gradients_are_finite(dtype):
    z = (200 * torch.eye(4, dtype=dtype)[[2, 0, 3, 1]]).requires_grad_()
    sinkhorn_normalize(z).square().sum().backward()
    assert bool(torch.isfinite(z.grad).all())


def test_not_converged_is_said():
    # rows 1 and 2 have one column between them: marginals that no plan has, and half-steps for ever
    z = torch.zeros(3, 3, dtype=torch.float64)
    z[1:, 1:] = -math.inf
    with pytest.warns(sbot.NotConverged, match="marginal error"):
        sinkhorn_normalize(z)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: sinkhorn_normalize(torch.ones(3)), "logits"),
        (lambda: sinkhorn_normalize(torch.ones(3, 3), dim=(0, 0)), "dim"),
        (lambda: sinkhorn_normalize(torch.ones(3, 3), iterations=3, tol=1e-3), "iters"),
        (lambda: sinkhorn_normalize(torch.ones(3, 3), tol=-1.0), "tol"),
        (lambda: sinkhorn_normalize(torch.full((2, 2), math.nan)), "NaN"),
        (lambda: sinkhorn_normalize(torch.full((2, 2), -math.inf)), "masked"),
        (lambda: log_sinkhorn_iterations(torch.ones(2, 2), torch.zeros(3), torch.zeros(2)), "log_mu"),
        (lambda: log_sinkhorn_iterations(torch.ones(2, 2), torch.zeros(2), torch.ones(2)), "masses"),
        (lambda: log_optimal_transport(torch.ones(2), 1.0), "scores"),
    ],
)
def test_bad_input(call, word):
    with pytest.raises(sbot.InvalidProblem, match=word):
        call()
