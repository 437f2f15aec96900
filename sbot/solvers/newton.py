r"""Truncated Newton on the dual: the last digits of a balanced problem, where half-steps gain little each.

With f eliminated by its half-step the dual is concave in g alone.  At row sums ``P 1 = a`` and column sums ``c = P' 1``

.. math:: S z = b - c, \qquad S = diag(c) - P' diag(1/a) P, \qquad g \leftarrow g + \varepsilon z,

with ``S`` the Schur complement of the Hessian, times eps.  Conjugate gradients need only products with the absorbed kernel, two
each, as many as a Sinkhorn iteration; the further off, the fewer of them (Dembo, Eisenstat, Steihaug 1982).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import DenseKernel
from .halfsteps import Check, State, product

#: No potential moves further than this in one step, in units of eps: the quadratic model says nothing beyond.
TRUST = 5.0
#: Conjugate gradient iterations in one step.
INNER = 200
#: Times that a step is cut by four before Newton is given up.
CUTS = 6


def newton_iterations(state: State, limit: int, check: Check) -> int:
    """Newton steps from an exact f half-step until ``check`` says stop, the limit, or no step helps; the steps taken.

    An iteration, counted towards ``limit``, is one product on each side, as in Sinkhorn's.
    """
    kernel, absorbed, eps, a, b = state.kernel, state.absorbed, state.eps, state.a, state.b
    assert isinstance(kernel, DenseKernel) and absorbed is not None
    live = (a > 0, b > 0)

    def settle(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Absorb; the weights that make rows exact, f after that half-step, and the column sums."""
        left = torch.where(live[0], f, -torch.inf) if state.zeros else f
        right = torch.where(live[1], g, -torch.inf) if state.zeros else g
        kernel.absorb(left, right, eps, absorbed)
        rows = product(absorbed, b)
        rows = torch.where(live[0], rows, 1.0) if state.zeros else rows
        weight = a / rows
        return weight, f - eps * rows.log(), b * product(absorbed.mT, weight)

    def errors(c: Tensor) -> Tensor:
        return (c - b).abs().sum(-1) / b.sum(-1)

    weight, f, c = settle(state.f, state.g)
    state.f = f
    steps = 0
    while state.iterations < limit:
        error = errors(c)
        if check(state.iterations, float(error.max())):
            break
        z, used = _solve(absorbed, weight, b, c, error, min(INNER, limit - state.iterations))
        state.iterations += used + 1
        size = z.abs().amax(-1, keepdim=True).clamp(min=TRUST)
        move = eps * z * (TRUST / size)
        value = _dual(state, state.f, state.g)
        share = torch.ones_like(error)
        for _ in range(CUTS):
            g = state.g + share[..., None] * move
            weight, f, c = settle(state.f, g)
            # of a batch, all have to gain; where the dual is flat to rounding the error decides
            gained = (_dual(state, f, g) >= value) | (errors(c) <= error)
            if bool(gained.all()):
                break
            share = torch.where(gained, share, share / 4)
        else:
            weight, f, c = settle(state.f, state.g)
            break
        state.f, state.g, steps = f, g, steps + 1
    return steps


def _dual(state: State, f: Tensor, g: Tensor) -> Tensor:
    parts = [(w * torch.where(w > 0, p, 0.0)).sum(-1, dtype=torch.float64) for w, p in ((state.a, f), (state.b, g))]
    return parts[0] + parts[1]


def _solve(k: Tensor, weight: Tensor, b: Tensor, c: Tensor, error: Tensor, most: int) -> tuple[Tensor, int]:
    """``S z = b - c`` by conjugate gradients, preconditioned by the diagonal; the products on each side that it took."""
    r = b - c
    inverse = torch.where(c > 0, 1 / c, 0.0)
    z = torch.zeros_like(r)
    p = inverse * r
    rho = (r * p).sum(-1, keepdim=True)
    goal = error.sqrt().clamp(max=0.1) * r.abs().sum(-1)
    used = 0
    while used < most:
        used += 1
        sp = c * p - b * product(k.mT, weight * product(k, b * p))
        curvature = (p * sp).sum(-1, keepdim=True)
        alpha = torch.where(curvature > 0, rho / curvature, 0.0)
        z, r = z + alpha * p, r - alpha * sp
        busy = (r.abs().sum(-1) > goal) & (alpha[..., 0] != 0)
        if not bool(busy.any()):
            break
        old, rho = rho, (r * inverse * r).sum(-1, keepdim=True)
        p = torch.where(busy[..., None], inverse * r + (rho / old) * p, 0.0)
    return z, used
