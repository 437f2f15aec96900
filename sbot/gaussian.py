r"""The entropic plan between two Gaussians under a linear reference, exactly.

In the coordinates ``x~ = G^-1/2 (Phi x + c)``, ``y~ = G^-1/2 y`` with ``G = eps Q`` the reference is standard noise and, with
``D = (4 S^1/2 T S^1/2 + I)^1/2`` (Janati, Muzellec, Peyre and Cuturi 2020, Mallasto, Gerolin and Minh 2021),

    Cov(y | x) = 2 T^1/2 (D' + I)^-1 T^1/2,     Cov(x, y) = Cov(x | y) T,     KL(plan | product) = log det((I + D) / 2) / 2.

No covariance is inverted, so singular marginals, Diracs included, are exact too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import linalg
from .errors import NumericalError
from .linalg import Eps
from .measures import Gaussian
from .reference import LinearReference


@dataclass(frozen=True)
class GaussianPlan:
    """The plan and its pieces, in the coordinates of the problem.

    Attributes
    ----------
    cross : ``Cov(X_0, X_1)``, ``(*b, d, d)``.
    ahead, behind : ``Cov(X_1 | X_0)`` and ``Cov(X_0 | X_1)``.
    landing : ``E[X_1]`` under the reference started from mu, ``(*b, d)``.
    growth_ahead, growth_behind : precision of the reference's transition as a function of ``X_1`` and of ``X_0``.
    linear_cost, information : ``<P, C>`` and ``KL(P | mu x nu)``, ``(*b,)``.
    """

    cross: Tensor
    ahead: Tensor
    behind: Tensor
    landing: Tensor
    growth_ahead: Tensor
    growth_behind: Tensor
    linear_cost: Tensor
    information: Tensor


def couple(mu: Gaussian, nu: Gaussian, reference: LinearReference, eps: Eps) -> GaussianPlan:
    """The entropic plan between ``mu`` and ``nu``."""
    d = mu.event_shape[0]
    step = reference.transition(0.0, 1.0).to(mu.mean)
    phi, noise = linalg.matrix(step.phi, d), linalg.matrix(linalg.scaled(eps, step.cov), d)
    spread = linalg.sqrtm(noise)
    whiten, back = torch.linalg.inv(spread), torch.linalg.inv(phi)
    s = linalg.symmetrise(whiten @ phi @ mu.cov @ phi.mT @ whiten)
    t = linalg.symmetrise(whiten @ nu.cov @ whiten)
    behind, stretch = _conditional(s, t)
    ahead, _ = _conditional(t, s)
    cross = behind @ t
    landing = step.mean(mu.mean[..., None, :])[..., 0, :]
    gap = ((nu.mean - landing)[..., None, :] @ whiten)[..., 0, :]
    trace = (s + t - 2 * cross).diagonal(dim1=-2, dim2=-1).sum(-1)
    eye = torch.eye(d, dtype=s.dtype, device=s.device)
    if not bool(torch.isfinite(trace + gap.square().sum(-1) + cross.sum((-2, -1))).all()):
        raise NumericalError(f"the plan overflows {s.dtype}; rescale the measures (and eps with them) or use float64")
    precision = linalg.symmetrise(whiten @ whiten)
    return GaussianPlan(
        cross=back @ spread @ cross @ spread,
        ahead=linalg.symmetrise(spread @ ahead @ spread),
        behind=linalg.symmetrise(back @ spread @ behind @ spread @ back.mT),
        landing=landing,
        growth_ahead=precision,
        growth_behind=linalg.symmetrise(phi.mT @ precision @ phi),
        linear_cost=eps * (trace + gap.square().sum(-1)) / 2,
        information=torch.linalg.slogdet((stretch + eye) / 2)[1] / 2,
    )


def _conditional(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Covariance of the end with covariance ``s`` given the end with covariance ``t``, under unit noise; and ``D``."""
    root = linalg.sqrtm(s)
    eye = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    stretch = linalg.sqrtm(4 * root @ t @ root + eye)
    return linalg.symmetrise(2 * root @ torch.linalg.solve(stretch + eye, root)), stretch
