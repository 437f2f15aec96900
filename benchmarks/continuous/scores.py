"""Scores of samples and processes; each is 0, or its floor, for the exact answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import ot
import torch
from torch import Tensor

import sbot
from sbot import metrics

Drift = Callable[[float, Tensor], Tensor]
Draw = Callable[[Tensor, torch.Generator], Tensor]


# ---- Gaussian fits -------------------------------------------------------------------------------------------------------


def diagonal_kl(x: Tensor, mean: Tensor, variance: Tensor) -> float:
    """``KL(N(m, diag v) | N(mean, diag variance))`` of the mean and variances of samples ``(n, d)``: d/n for exact ones."""
    x = x.double()
    m, v = x.mean(0), x.var(0)
    ratio = v / variance
    return float(((m - mean).square() / variance + ratio - 1 - ratio.log()).sum() / 2)


def average_kl(paths: Tensor, means: Tensor, variances: Tensor) -> float:
    """`diagonal_kl` averaged over the times of ``(n, times, d)``."""
    return sum(diagonal_kl(paths[:, k], means[k], variances[k]) for k in range(paths.shape[1])) / paths.shape[1]


def cross_covariance(x0: Tensor, x1: Tensor) -> float:
    """``Cov(X_0, X_1)`` of one coordinate, averaged over the coordinates."""
    a, b = x0.double(), x1.double()
    return float(((a - a.mean(0)) * (b - b.mean(0))).sum(0).mean() / (len(a) - 1))


def pairs_kl(x0: Tensor, x1: Tensor, mean: Tensor, cov: Tensor) -> float:
    """KL of Gaussian fits of ``(X_0, X_1)``, coordinate by coordinate, to the exact joint law on ``R^{2d}``, summed."""
    d = x0.shape[1]
    pairs = torch.stack([x0.double(), x1.double()], -1).transpose(0, 1)  # (d, n, 2)
    m = pairs.mean(1)
    centred = pairs - m[:, None]
    s = centred.mT @ centred / (len(x0) - 1)
    index = torch.stack([torch.arange(d), torch.arange(d) + d], -1)
    exact = cov.double()[index[:, :, None], index[:, None, :]]
    gap = (m - mean.double()[index])[..., None]
    inverse = torch.linalg.inv(exact)
    trace = (inverse @ s).diagonal(dim1=-2, dim2=-1).sum(-1)
    logdet = torch.linalg.slogdet(exact)[1] - torch.linalg.slogdet(s)[1]
    return float((trace - 2 + logdet + (gap.mT @ inverse @ gap)[:, 0, 0]).sum() / 2)


# ---- transport -----------------------------------------------------------------------------------------------------------


def w2(x: Tensor, y: Tensor) -> float:
    """The 2-Wasserstein distance of two sets of points, exactly: the root of the least mean of ``|x - y|^2``."""
    a, b = (part.double().numpy() for part in (x, y))
    cost = ot.dist(a, b)
    weights = [np.full(len(part), 1 / len(part)) for part in (a, b)]
    value, log = ot.emd2(*weights, cost, numItermax=10**8, log=True)
    if log["warning"]:
        raise RuntimeError(f"the transport problem was not solved: {log['warning']}")
    return math.sqrt(max(float(value), 0.0))


# ---- simulation ----------------------------------------------------------------------------------------------------------


def simulate(
    drift: Drift,
    x: Tensor,
    steps: int,
    eps: float,
    generator: torch.Generator,
    *,
    back: bool = False,
    heun: bool = False,
    variance: Callable[[float], float] = lambda t: 1.0,
    keep: bool = False,
) -> Tensor:
    """Euler (or Heun) steps of ``dX = drift dt + sqrt(eps variance) dW`` on a uniform grid.

    ``back`` runs ``Y_s = X_{1-s}`` with ``drift`` a reverse drift, and starts at t = 1.  Returns the last points, or with
    ``keep`` all of them, ``(n, steps + 1, *event)``, in the order of t.
    """
    path, dt = [x], 1 / steps
    for k in range(steps):
        t, after = (1 - k / steps, 1 - (k + 1) / steps) if back else (k / steps, (k + 1) / steps)
        noise = math.sqrt(eps * dt) * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        u = drift(t, x)
        if heun:
            guess = x + u * dt + math.sqrt(variance(t)) * noise
            u = (u + drift(after, guess)) / 2
        x = x + u * dt + math.sqrt((variance(t) + variance(after)) / 2) * noise
        if keep:
            path.append(x)
    return torch.stack(path[::-1] if back else path, 1) if keep else x


# ---- conditionals --------------------------------------------------------------------------------------------------------


def conditional_moments(draw: Draw, x: Tensor, k: int, generator: torch.Generator, rows: int = 50_000) -> sbot.Gaussian:
    """Mean and covariance of ``k`` draws of ``X_1`` at each place of ``x``; a few places at a time."""
    means, covs = [], []
    for part in _parts(x, max(1, rows // k)):
        with torch.no_grad():
            y = draw(part.repeat_interleave(k, 0), generator).double().reshape(len(part), k, -1)
        mean = y.mean(1)
        centred = y - mean[:, None]
        means.append(mean)
        covs.append(centred.mT @ centred / (k - 1))
    return sbot.Gaussian(torch.cat(means), torch.cat(covs))


def _parts(x: Tensor, size: int) -> Iterator[Tensor]:
    yield from torch.split(x, size)


def conditional_score(
    draw: Draw, x: Tensor, k: int, exact: sbot.Gaussian, nu: sbot.Gaussian, generator: torch.Generator
) -> float:
    """cBW2-UVP in percent, from ``k`` draws at each place."""
    return float(metrics.cbw2_uvp(conditional_moments(draw, x, k, generator), exact, nu))
