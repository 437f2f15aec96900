r"""Relaxed marginals: a divergence ``rho KL(P 1 | a)`` in place of ``P 1 = a``; ``rho`` is infinite where a marginal is hard.

The dual has ``<a, F(f)>`` with ``F(f) = rho (1 - e^{-f / rho})`` in place of ``<a, f>``; the half-step is that of a hard marginal
times ``rho / (rho + eps)``, and at the solution the marginal is ``a e^{-f / rho}`` (Chizat, Peyre, Schmitzer and Vialard 2018).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .linalg import Eps


def damping(rho: float, eps: Eps) -> Eps:
    """``rho / (rho + eps)``: what a relaxed marginal does to a half-step; the number 1 for a hard one."""
    return 1.0 if math.isinf(rho) else rho / (rho + eps)


def dual_term(f: Tensor, rho: float) -> Tensor:
    """What a potential contributes to the dual: ``f``, or ``rho (1 - e^{-f / rho})`` where the marginal is relaxed."""
    return f if math.isinf(rho) else -rho * torch.expm1(-f / rho)


def target_weights(weights: Tensor, f: Tensor, rho: float, zeros: bool = True) -> Tensor:
    """``a e^{-f / rho}``: what the marginal is at the solution; a hard one is its weights, also where f is infinite.

    ``zeros`` says whether there may be atoms of zero weight.
    """
    if math.isinf(rho):
        return weights
    target = weights * torch.exp(f / -rho)
    # at an atom of zero weight the potential may be so low that the exponential overflows
    return torch.where(weights > 0, target, 0.0) if zeros else target
