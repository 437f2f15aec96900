r"""The adjusted mixture of LightSB, in units of the data, and a start for it that is near the optimum.

With ``u = (E[X_1 | X_0] - mean) / s_x`` under the reference, ``w = (X_1 - mean) / s_y`` and the temperature
``tau = eps Q / (s_x s_y)`` the reference charges ``-u'w`` up to functions of u and of w alone, and

    v(w) = sum_k exp(l_k) N(w; m_k, tau S_k),    c(u) = int v(w) exp(u'w / tau) dw = sum_k exp(l_k + (u'm_k + u'S_k u / 2) / tau)

(Korotin, Gushchin and Burnaev 2024, eq. 8 and prop. 3.2).  Component k sends u to ``N(m_k + S_k u, tau S_k)``.

It is learned through ``b_k = m_k + S_k a_k``, where it sends a fixed anchor ``a_k``, the slope ``S_k``, and
``h_k = tau log(its term of c at a_k)``: as tau falls these converge (to the pieces of the Kantorovich potential), so that
one set of parameters serves every temperature on the way down.
"""

from __future__ import annotations

import math
from typing import Any, final

import torch
from torch import Tensor, nn

from .. import linalg

#: Slopes stay above this: a component narrower than a thousandth of the data is a point.
LEAST = 1e-6
#: Updates of the start at each temperature, and its Newton steps.
ROUNDS, NEWTON = 3, 20


@final
class AdjustedMixture(nn.Module):
    """The parameters: heights ``(K,)``, centres ``(K, d)`` and roots of slopes, with anchors ``(K, d)``.

    ``root`` is ``(K, d)``, half the logarithm of a diagonal slope, or ``(K, d, d)``: a lower triangle whose diagonal is kept
    as its logarithm.
    """

    anchor: Tensor

    def __init__(self, height: Tensor, centre: Tensor, slope: Tensor, anchor: Tensor) -> None:
        super().__init__()
        self.full = slope.ndim == 3
        if self.full:
            factor = torch.linalg.cholesky(slope)
            root = factor.tril(-1) + torch.diag_embed(factor.diagonal(dim1=-2, dim2=-1).log())
        else:
            root = slope.log() / 2
        self.height, self.centre, self.root = (nn.Parameter(part.contiguous()) for part in (height, centre, root))
        self.register_buffer("anchor", anchor)

    def factors(self) -> Tensor:
        """``L`` with ``S = L L'``, ``(K, d, d)``, or the roots ``(K, d)`` of a diagonal one."""
        least = math.log(LEAST) / 2
        if not self.full:
            return self.root.clamp(min=least).exp()
        return self.root.tril(-1) + torch.diag_embed(self.root.diagonal(dim1=-2, dim2=-1).clamp(min=least).exp())

    def pieces(self, tau: float) -> tuple[Tensor, Tensor, Tensor]:
        """``l``, ``m`` and the factors of ``S``."""
        factors = self.factors()
        pulled = _times(factors, self.anchor)  # L'a
        mean = self.centre - _back(factors, pulled)
        logit = (self.height - (self.anchor * self.centre).sum(-1) + pulled.square().sum(-1) / 2) / tau
        return logit, mean, factors

    def ahead(self, u: Tensor, tau: float) -> Tensor:
        """Logarithms of the terms of ``c(u)``, ``(n, K)``."""
        logit, mean, factors = self.pieces(tau)
        return logit + (u @ mean.T + _square(factors, u) / 2) / tau

    def density(self, w: Tensor, tau: float) -> Tensor:
        """Logarithms of the terms of ``v(w)``, ``(n, K)``."""
        logit, mean, factors = self.pieces(tau)
        d = w.shape[-1]
        if self.full:
            r = w[None] - mean[:, None]  # (K, n, d)
            white = torch.linalg.solve_triangular(factors, r.mT, upper=False).square().sum(-2).T
            volume = factors.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        else:
            precision = factors.square().reciprocal()
            white = w.square() @ precision.T - 2 * w @ (mean * precision).T + (mean.square() * precision).sum(-1)
            volume = factors.log().sum(-1)
        return logit - white / (2 * tau) - volume - d / 2 * math.log(2 * math.pi * tau)

    def dual(self, u: Tensor, w: Tensor, tau: float) -> Tensor:
        """``log c(u_i) - log v(w_i)``, ``(n,)``: its mean is KL(plan | ours) up to a constant (their eq. 9)."""
        return self.ahead(u, tau).logsumexp(-1) - self.density(w, tau).logsumexp(-1)

    def bridge_drift(self, t: Tensor, x: Tensor, tau: float) -> Tensor:
        """``tau grad log`` of the pulled-back potential for times ``(T,)`` and places ``(T, n, d)``.

        Seen from time t under Brownian motion of variance tau, with ``V = 1 - t`` and ``A = V I + t S``, component k has the
        drift ``A^-1 (m + S x - x)`` and the log-mass
        ``l - log det A / 2 + (2 x' A^-1 m - t m' A^-1 m - x' A^-1 (I - S) x) / (2 tau)``.
        """
        logit, mean, factors = self.pieces(tau)
        v, time = (1 - t)[:, None, None, None], t[:, None, None, None]
        if self.full:
            slope = factors @ factors.mT
            eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
            base = torch.linalg.cholesky(v * eye + time * slope)  # (T, K, d, d)
            moved = torch.einsum("kij,tnj->tkni", slope, x)
            inward, inner = mean[:, None] + moved - x[:, None], x[:, None] - moved
            drift = torch.cholesky_solve(inward.mT, base).mT  # (T, K, n, d)
            solved = torch.cholesky_solve(torch.cat([mean[:, None].expand_as(inner), inner], -2).mT, base).mT
            by_mean, by_x = torch.split(solved, x.shape[1], -2)
            volume = base.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        else:
            slope = factors.square()[:, None]  # (K, 1, d)
            base = v + time * slope  # (T, K, 1, d)
            drift = (mean[:, None] + (slope - 1) * x[:, None]) / base
            by_mean, by_x = mean[:, None] / base, (1 - slope) * x[:, None] / base
            volume = base.log().sum((-2, -1)) / 2
        form = 2 * (x[:, None] * by_mean).sum(-1) - time[..., 0] * (mean[:, None] * by_mean).sum(-1)
        mass = logit[:, None] - volume[..., None] + (form - (x[:, None] * by_x).sum(-1)) / (2 * tau)  # (T, K, n)
        return torch.einsum("tkn,tknd->tnd", mass.softmax(1), drift)


def _times(factors: Tensor, x: Tensor) -> Tensor:
    """``L_k' x_k``."""
    return factors * x if factors.ndim == 2 else (x[:, None] @ factors)[:, 0]


def _back(factors: Tensor, x: Tensor) -> Tensor:
    """``L_k x_k``."""
    return factors * x if factors.ndim == 2 else (factors @ x[..., None])[..., 0]


def _square(factors: Tensor, u: Tensor) -> Tensor:
    """``u_i' S_k u_i``, ``(n, K)``."""
    if factors.ndim == 2:
        return u.square() @ factors.square().T
    return (u @ factors).square().sum(-1).T


# ---- a start ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def start(u: Tensor, w: Tensor, k: int, tau: float, full: bool, generator: torch.Generator) -> AdjustedMixture:
    r"""``k`` components near the optimum at temperature ``tau``, from samples ``(n, d)`` of both ends.

    k-means on w, then, at temperatures from that of the data down to ``tau``, expectation-maximisation for both ends at once:
    with shares p of each u and r of each w, the moments of the components agree where ``S`` is the slope of the Gaussian
    bridge between the covariances of the two shares (the same for all components here), ``m_k = E_r w - S E_p u``, and
    ``h`` makes the masses of p those of r: a convex problem in K unknowns, by Newton's method.
    """
    d = u.shape[-1]
    label = kmeans(w, k, generator)
    share = nn.functional.one_hot(label, k).to(w)
    mass, centre, spread = _moments(w, share, full)
    origin = torch.zeros(1, dtype=u.dtype, device=u.device)
    anchor = u.mean(0).expand(k, d).clone()
    _, _, near = _moments(u, torch.ones_like(share) / k, full)
    temperature = max(tau, float(d))
    height = None
    while True:
        for _ in range(ROUNDS):
            slope = _slope(near, spread, temperature)
            mixture = AdjustedMixture(origin.expand(k), centre, slope.expand(k, *slope.shape), anchor)
            terms = mixture.ahead(u, temperature)
            height = _balance(terms, mass, mass.log())
            mixture.height.copy_(height * temperature)
            share = mixture.density(w, temperature).softmax(-1)
            mass, centre, spread = _moments(w, share, full)
            _, anchor, near = _moments(u, (terms + height).softmax(-1), full)
        if temperature <= tau:
            return mixture
        temperature = max(tau, temperature / 2)


def _slope(near: Tensor, far: Tensor, tau: float) -> Tensor:
    """Conditional covariance over tau of the Gaussian bridge from ``near`` to ``far``, floored."""
    if near.ndim == 1:
        return (2 * far / (tau + (tau**2 + 4 * near * far).sqrt())).clamp(min=1e2 * LEAST)
    eye = torch.eye(len(near), dtype=near.dtype, device=near.device)
    root = linalg.sqrtm(far / tau)
    stretch = linalg.sqrtm(4 * root @ (near / tau) @ root + eye)
    return linalg.symmetrise(2 * root @ torch.linalg.solve(stretch + eye, root)) + 1e2 * LEAST * eye


def _moments(x: Tensor, share: Tensor, full: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Masses ``(K,)``, means ``(K, d)``, and the covariance within components: ``(d,)``, or ``(d, d)`` where ``full``."""
    raw = share.mean(0)
    mean = share.T @ x / len(x) / raw.clamp(min=1e-12)[:, None]
    if full:
        spread = x.T @ x / len(x) - (raw[:, None] * mean).T @ mean
        spread = spread / 2 + spread.T / 2
    else:
        spread = (x.square().mean(0) - (raw[:, None] * mean.square()).sum(0)).clamp(min=0)
    mass = raw.clamp(min=1e-3 / len(raw))
    return mass / mass.sum(), mean, spread


def _balance(terms: Tensor, mass: Tensor, height: Tensor) -> Tensor:
    """``h`` with ``E softmax(terms + h) = mass``: Newton on the convex ``E logsumexp(terms + h) - mass'h``."""

    def value(h: Tensor) -> float:
        return float((terms + h).logsumexp(-1).double().mean() - (mass * h).double().sum())

    now = value(height)
    for _ in range(NEWTON):
        p = (terms + height).softmax(-1)
        here = p.mean(0)
        gradient = mass - here
        if float(gradient.abs().sum()) < 1e-3:
            break
        hessian = torch.diag(here * 1.001 + 1e-6) - p.T @ p / len(p)
        move = torch.linalg.solve(hessian.double(), gradient.double()).to(height)
        step, gain = 1.0, float((gradient * move).sum())
        while step > 1e-4 and not value(height + step * move) <= now - 1e-4 * step * gain:
            step /= 2
        if step <= 1e-4:  # as far as rounding lets it; a half-step of Sinkhorn never goes up
            move, step = (mass / here.clamp(min=1e-6)).log().clamp(-1, 1), 1.0
        height = height + step * move
        now = value(height)
    return height - height.mean()


def kmeans(x: Tensor, k: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Labels ``(n,)`` of ``k`` clusters: k-means++ (Arthur and Vassilvitskii 2007), then Lloyd's iterations."""
    chosen = torch.randint(len(x), (1,), generator=generator, device=x.device)
    centres = x[chosen]
    nearest = (x - centres).square().sum(-1)
    for _ in range(k - 1):
        # where every point is a centre already any will do
        weights = nearest if bool((nearest > 0).any()) else torch.ones_like(nearest)
        tried = x[torch.multinomial(weights, 4, replacement=True, generator=generator)]
        distance = torch.minimum(nearest, torch.cdist(tried, x).square())  # (4, n)
        best = distance.sum(-1).argmin()
        nearest = distance[best]
        centres = torch.cat([centres, tried[best][None]])
    label = torch.cdist(x, centres).argmin(-1)
    for _ in range(rounds):
        count = torch.bincount(label, minlength=k).to(x)
        sums = torch.zeros_like(centres).index_add_(0, label, x)
        centres = torch.where((count > 0)[:, None], sums / count.clamp(min=1)[:, None], centres)
        before, label = label, torch.cdist(x, centres).argmin(-1)
        if torch.equal(before, label):
            break
    return label


def as_operator(scale: Any, factors: Tensor) -> Tensor:
    """``scale S_k`` as matrices ``(K, d, d)``."""
    return scale * (torch.diag_embed(factors.square()) if factors.ndim == 2 else factors @ factors.mT)
