r"""How much a cost varies between two measures: what ``eps="auto"`` is a share of.

Where the cost is ``|u - v|^2 / 2`` of places ``u`` and ``v`` (`Cost.embed`), and these are independent with means that differ by
``delta`` and covariances S and T, the variance of the cost splits,

.. math:: Var C = Var(|u'|^2 / 2 + \delta \cdot u') + Var(|v'|^2 / 2 - \delta \cdot v') + tr(S T)

with u', v' centred: moments of each side, without pairs.  Other costs stream over tiles of pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .costs import Cost, MatrixCost, Quadratic, TransitionCost
from .diffusion import Intractable
from .errors import InvalidProblem, Unsupported
from .kernels import COPIES, make_kernel
from .linalg import full_precision
from .measures import Discrete, Gaussian, Measure

#: eps="auto" is this share of the standard deviation of the cost.
SHARE = 0.05
#: Draws of a measure without atoms, and the seed of their generator.
DRAWS, SEED = 2048, 0
#: A standard deviation below this share of the mean cost, in units of the machine epsilon, is rounding.
FLAT = 8.0

Cloud = tuple[Tensor, Tensor]


@torch.no_grad()
def natural_eps(mu: Measure, nu: Measure, cost: Cost) -> tuple[Tensor, str]:
    """A twentieth of the standard deviation of the cost under ``mu x nu``, ``(*b,)`` in float64, and that in words.

    Weights count, forbidden pairs do not, and a constant added to the cost changes nothing.  Where the cost is the same
    for all pairs it is a twentieth of its size instead; `InvalidProblem` where that is zero.
    """
    if isinstance(cost, Intractable):
        raise Unsupported(
            'eps="auto" needs a cost, and that of a non-linear reference is not known; give eps as a number'
        )
    affine = isinstance(cost, (Quadratic, TransitionCost))
    with full_precision():
        if affine and isinstance(mu, Gaussian) and isinstance(nu, Gaussian):
            mean, deviation = _of_gaussians(mu, nu, cost)
        else:
            mean, deviation = _of_atoms(_atoms(mu), _atoms(nu), cost)
    flat = deviation <= FLAT * torch.finfo(mu.dtype).eps * mean.abs()
    eps = SHARE * torch.where(flat, mean.abs(), deviation)
    if not bool(torch.isfinite(eps).all()):
        raise InvalidProblem('eps="auto": the cost overflows; rescale the points, or use float64')
    if bool((eps == 0).all()):
        raise InvalidProblem('eps="auto": the cost is 0 for all pairs and has no scale; give eps as a number > 0')
    # a problem of a batch without a scale of its own takes that of the others
    eps = torch.where(eps > 0, eps, eps.sum() / (eps > 0).sum())
    return eps, "the mean of the cost, which is the same for all pairs" if bool(flat.all()) else (
        "the standard deviation of the cost"
    )


def _atoms(measure: Measure) -> Cloud:
    """Places and shares: the atoms, or draws with a generator of its own."""
    if isinstance(measure, Discrete):
        share = measure.weights.detach().double()
        share = share / share.sum(-1, keepdim=True)
        if measure.points is None:
            return torch.arange(measure.n, device=measure.device), share
        return measure.points.detach(), share
    drawn = measure.sample(DRAWS, generator=torch.Generator(measure.device).manual_seed(SEED))
    drawn = drawn.to(measure.dtype).flatten(len(measure.batch_shape) + 1)
    return drawn, torch.full(drawn.shape[:-1], 1 / DRAWS, dtype=torch.float64, device=drawn.device)


def _of_gaussians(mu: Gaussian, nu: Gaussian, cost: Cost) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of ``|w|^2 / 2`` for the Gaussian ``w = u - v``."""
    d = mu.event_shape[0]
    frame = torch.cat([torch.zeros(1, d), torch.eye(d)]).to(mu.mean.double())
    ends = cost.embed(frame, frame)
    means = cost.embed(mu.mean[..., None, :].double(), nu.mean[..., None, :].double())
    assert ends is not None and means is not None
    delta = (means[0] - means[1])[..., 0, :]
    spread = torch.zeros_like(mu.cov, dtype=torch.float64)
    for end, law in zip(ends, (mu, nu), strict=True):
        linear = end[1:] - end[:1]  # an affine map, by what it does to the axes
        spread = spread + linear.mT @ law.cov.double() @ linear
    mean = (spread.diagonal(dim1=-2, dim2=-1).sum(-1) + delta.square().sum(-1)) / 2
    variance = spread.square().sum((-2, -1)) / 2 + ((delta[..., None, :] @ spread)[..., 0, :] * delta).sum(-1)
    return mean, variance.sqrt()


def _of_atoms(mu: Cloud, nu: Cloud, cost: Cost) -> tuple[Tensor, Tensor]:
    (x, a), (y, b) = mu, nu
    pair = None if isinstance(cost, MatrixCost) else cost.embed(x.double(), y.double())
    if pair is not None:
        return _by_moments((pair[0], a), (pair[1], b))
    return _by_tiles(x, y, a, b, cost)


def _by_moments(mu: Cloud, nu: Cloud) -> tuple[Tensor, Tensor]:
    (u, a), (v, b) = mu, nu
    mean_u, mean_v = ((w[..., None] * p).sum(-2, keepdim=True) for p, w in (mu, nu))
    u, v, delta = u - mean_u, v - mean_v, mean_u - mean_v
    p, q = u.square().sum(-1) / 2 + (u * delta).sum(-1), v.square().sum(-1) / 2 - (v * delta).sum(-1)
    mean_p, mean_q = (a * p).sum(-1, keepdim=True), (b * q).sum(-1, keepdim=True)
    own = (a * (p - mean_p).square()).sum(-1) + (b * (q - mean_q).square()).sum(-1)
    left, right = u * a.sqrt()[..., None], v * b.sqrt()[..., None]
    if u.shape[-1] ** 2 <= u.shape[-2] * v.shape[-2]:
        crossed = ((left.mT @ left) * (right.mT @ right)).sum((-2, -1))
    else:  # few points of many dimensions: the products are the smaller matrix
        crossed = (left @ right.mT).square().sum((-2, -1))
    mean = mean_p[..., 0] + mean_q[..., 0] + delta.square().sum((-2, -1)) / 2
    return mean, (own + crossed).sqrt()


def _by_tiles(x: Tensor, y: Tensor, a: Tensor, b: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """One pass; tiles are merged by their means, so that a large constant in the cost loses no digits (Chan et al. 1983)."""
    kernel = make_kernel(cost, x, y)
    kernel.copies = COPIES
    mass = torch.zeros(a.shape[:-1], dtype=torch.float64, device=a.device)
    mean, squares = torch.zeros_like(mass), torch.zeros_like(mass)
    for rows in kernel.tiles():
        c = kernel.entries(rows).double()
        allowed = torch.isfinite(c)
        w = torch.where(allowed, a[..., rows, None] * b[..., None, :], 0.0)
        c = torch.where(allowed, c, 0.0)
        part = w.sum((-2, -1))
        here = (w * c).sum((-2, -1)) / part.clamp(min=math.ulp(0.0))
        gap, total = here - mean, (mass + part).clamp(min=math.ulp(0.0))
        squares += (w * (c - here[..., None, None]).square()).sum((-2, -1)) + gap.square() * mass * part / total
        mean += gap * part / total
        mass += part
    return mean, (squares / mass).sqrt()
