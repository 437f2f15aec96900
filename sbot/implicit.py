r"""Derivatives of the potentials with respect to the problem, without the iterations that found them.

The potentials solve ``a_i e^{-f_i / rho_mu} = sum_j P_ij`` and ``b_j e^{-g_j / rho_nu} = sum_i P_ij``.  By the implicit function
theorem a gradient ``(F, G)`` in ``(f, g)`` becomes one in the problem through the solution of a symmetric linear system,

.. math:: \frac 1\varepsilon \begin{pmatrix} D_a & P \\ P' & D_b \end{pmatrix} \begin{pmatrix} \alpha \\ \beta \end{pmatrix}
    = \begin{pmatrix} F \\ G \end{pmatrix}, \qquad D_a = diag(P 1) / \lambda_\mu, \quad D_b = diag(P' 1) / \lambda_\nu,

solved for beta by conjugate gradients on the Schur complement ``D_b - P' D_a^-1 P``.  One iteration is one pass over tiles, and
memory does not depend on how the potentials were found.

In a partial plan the atoms at the cap of each side share one multiplier, and only their common mass is prescribed: alpha and beta
are each constant on them, and their rows, or columns, of the system are summed.  This holds as long as no atom is about to
reach the cap or to leave it; there the potentials have a kink, and the derivative is that of one side.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import linalg
from .arrays import refuse_vmap, wider
from .errors import NotConverged
from .kernels import LogKernel, share_of
from .linalg import Eps, along
from .partial import ceiling

#: Relative residual that conjugate gradients stop at, in units of the machine epsilon, and their limit.
REST, MOST = 100.0, 2000
#: Bytes up to which the plan is kept for the products of the backward pass; beyond it each product is a pass over the cost.
KEPT_BYTES = 2**28


class Plan:
    """``P_ij = exp(left_i + right_j - C_ij / eps)`` as an operator; ``left = log a + f / eps``, ``right = log b + g / eps``."""

    def __init__(self, kernel: LogKernel, left: Tensor, right: Tensor, eps: Eps) -> None:
        self.kernel, self.left, self.right, self.eps = kernel, left, right, eps
        lse = kernel.reduce(right, eps)[0]
        self.lse = lse
        self.rows = torch.exp(left + lse)
        size = math.prod(kernel.batch_shape) * kernel.shape[0] * kernel.shape[1] * kernel.dtype.itemsize
        self._kept = [(rows, law.clone()) for rows, law in self._stream()] if size <= KEPT_BYTES else None
        ones = torch.ones_like(self.rows)
        self.columns = self.transposed_times(ones)

    def laws(self) -> Iterator[tuple[slice, Tensor]]:
        """The conditional laws ``P_ij / (P 1)_i`` by tiles of rows; read only."""
        return iter(self._kept) if self._kept is not None else self._stream()

    def _stream(self) -> Iterator[tuple[slice, Tensor]]:
        return self.kernel.softmax_tiles(self.right, self.eps, self.lse)

    def times(self, v: Tensor) -> Tensor:
        """``P v``."""
        parts = [linalg.product(law, v) for _, law in self.laws()]
        return self.rows * torch.cat(parts, -1)

    def transposed_times(self, u: Tensor) -> Tensor:
        """``P' u``."""
        return sum_of(linalg.product(law.mT, (self.rows * u)[..., rows]) for rows, law in self.laws())

    def through(self, weights: Tensor, v: Tensor) -> Tensor:
        """``P' diag(weights) P v`` in one pass."""
        return sum_of(
            linalg.product(law.mT, (self.rows.square() * weights)[..., rows] * linalg.product(law, v))
            for rows, law in self.laws()
        )


def sum_of(parts: Iterator[Tensor]) -> Tensor:
    """The sum of tensors of one shape; there is at least one."""
    total = next(parts)
    for part in parts:
        total = total + part
    return total


def solve(
    plan: Plan,
    relax: tuple[float, float],
    grad_f: Tensor,
    grad_g: Tensor,
    capped: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """``alpha``, ``beta`` of the module's system, where the plan has mass; 0 elsewhere.

    ``capped`` says which atoms of each side of a partial plan are at its cap.
    """
    eps = along(plan.eps, 1)
    # 1 / lambda = 1 + eps / rho
    upper, lower = (sums * (1 + eps / rho) for sums, rho in zip((plan.rows, plan.columns), relax, strict=True))
    if capped is not None:
        upper, lower = _level(upper, capped[0]), _level(lower, capped[1])
    over = torch.where(upper > 0, 1 / upper, 0.0)

    def rows(v: Tensor) -> Tensor:
        return over * (v if capped is None else _level(v, capped[0]))

    def columns(v: Tensor) -> Tensor:
        return v if capped is None else _level(v, capped[1])

    def through(v: Tensor) -> Tensor:
        if capped is None:
            return plan.through(over, v)
        return columns(plan.transposed_times(rows(plan.times(v))))

    moved = plan.transposed_times(rows(grad_f))
    rest = columns(eps * (grad_g - moved))
    free = relax == (math.inf, math.inf)
    live = lower > 0
    if free:
        # a constant may move between f and g: the right side has no part along it, up to rounding
        rest = torch.where(live, rest - lower * (rest.sum(-1, keepdim=True) / lower.sum(-1, keepdim=True)), 0.0)
    inverse = torch.where(live, 1 / lower, 0.0)
    beta = torch.zeros_like(rest)
    first, terms = rest.abs().sum(-1), (eps * (grad_g.abs() + moved.abs())).sum(-1)
    # no further than the rounding of what it is the difference and, in a partial plan, the mean of
    goal = torch.finfo(rest.dtype).eps * torch.maximum(REST * first, 2 * terms)
    p = inverse * rest
    rho = (rest * p).sum(-1, keepdim=True)
    for _ in range(MOST):
        busy = rest.abs().sum(-1) > goal
        if not bool(busy.any()):
            break
        sp = lower * p - through(p)
        curvature = (p * sp).sum(-1, keepdim=True)
        step = torch.where((curvature > 0) & busy[..., None], rho / curvature, 0.0)
        beta, rest = beta + step * p, rest - step * sp
        if not bool((step != 0).any()):
            break
        q = inverse * rest
        old, rho = rho, (rest * q).sum(-1, keepdim=True)
        p = torch.where(busy[..., None], q + (rho / old) * p, 0.0)
    _tell(rest.abs().sum(-1), first, goal)
    return rows(eps * grad_f - plan.times(beta)), beta


def _tell(rest: Tensor, first: Tensor, goal: Tensor) -> None:
    """A warning where conjugate gradients left more than a thousandth, and more than ``goal``."""
    left = float(torch.where(rest > 2 * goal, rest / first, 0.0).max())
    if left > 1e-3:
        warnings.warn(
            f"the gradient through the plan is solved to {left:.0e} only; raise eps{wider(rest.dtype, ' or use float64')}",
            NotConverged,
            stacklevel=3,
        )


def _level(v: Tensor, which: Tensor) -> Tensor:
    """``v`` with its mean over the atoms ``which`` in their place."""
    total = torch.where(which, v, 0.0).sum(-1, keepdim=True)
    return torch.where(which, total / which.sum(-1, keepdim=True).clamp(min=1), v)


def at_cap(potential: Tensor, weights: Tensor, mass: Tensor, unit: Eps) -> Tensor:
    """The atoms of a partial plan that are at the cap; none of a side that is carried whole."""
    machine = torch.finfo(potential.dtype).eps
    whole = weights.double().sum(-1)
    partly = (whole - mass > 64 * machine * whole)[..., None]
    return partly & (weights > 0) & (potential >= ceiling(potential, weights) - math.sqrt(machine) * unit)


class _Potentials(torch.autograd.Function):
    """``(f, g)`` as a function of eps, the weights and what the cost is made of."""

    @staticmethod
    def forward(
        kernel: LogKernel,
        relax: tuple[float, float],
        f: Tensor,
        g: Tensor,
        eps: Eps,
        a: Tensor,
        b: Tensor,
        mass: Tensor | None,
        *leaves: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return f.clone(), g.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kernel, ctx.relax, f, g, eps, *rest = inputs
        ctx.eps = None if isinstance(eps, Tensor) else eps
        ctx.save_for_backward(f, g, eps if ctx.eps is None else None, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_f: Tensor, grad_g: Tensor) -> tuple[Tensor | None, ...]:
        refuse_vmap(grad_f, "the gradient of the potentials")
        refuse_vmap(grad_g, "the gradient of the potentials")
        f, g, given, a, b, mass, *leaves = ctx.saved_tensors
        kernel, eps = ctx.kernel.on(leaves), ctx.eps if given is None else linalg.plain(given)
        unit = along(eps, 1)
        left, right = a.log() + f / unit, b.log() + g / unit
        slope = torch.zeros(kernel.batch_shape, dtype=f.dtype, device=f.device)
        with linalg.full_precision():
            plan = Plan(kernel, left, right, eps)
            # potentials where there is no mass are c-transforms, which the caller writes out
            capped = None if mass is None else (at_cap(f, a, mass, unit), at_cap(g, b, mass, unit))
            alpha, beta = solve(
                plan, ctx.relax, torch.where(a > 0, grad_f, 0.0), torch.where(b > 0, grad_g, 0.0), capped
            )
            # P_ij / a_i and P_ij / b_j are finite at an atom of zero weight too
            over_a = -torch.exp(f / unit) * signed(kernel, right, beta, eps)
            over_b = -torch.exp(g / unit) * signed(kernel.T, left, alpha, eps)
            over_mass = None
            if capped is not None:
                # what is taken from the atoms at the cap, of each of which a share of the weight is filled
                shared = [
                    torch.where(which, part, -torch.inf).amax(-1).nan_to_num(neginf=0.0)
                    for which, part in zip(capped, (alpha, beta), strict=True)
                ]
                over_a = over_a - torch.exp(f / unit + plan.lse) * shared[0][..., None]
                over_b = over_b - torch.exp(g / unit + kernel.T.reduce(left, eps)[0]) * shared[1][..., None]
                over_mass = (shared[0] + shared[1]).to(mass)

            def tiles() -> Iterator[tuple[slice, Tensor]]:
                for rows, law in plan.laws():
                    weight = (plan.rows / unit)[..., rows, None]
                    w = law * weight * (alpha[..., rows, None] + beta[..., None, :])
                    if given is not None:
                        # d eps = sum_ij w_ij (f_i + g_j - C_ij) / eps
                        slope.add_((w.sum(-1) * f[..., rows]).sum(-1) + (w.sum(-2) * g).sum(-1) - kernel.inner(rows, w))
                    yield rows, w

            grads = kernel.pull_back(tiles())
        return None, None, None, None, share_of(given, slope, eps), over_a, over_b, over_mass, *grads


def signed(kernel: LogKernel, bias: Tensor, values: Tensor, eps: Eps) -> Tensor:
    """``sum_j exp(bias_j - C_ij / eps) values_j`` for values of any sign."""
    lse, mean = kernel.reduce(bias, eps, values[..., None])
    assert mean is not None
    return torch.where(lse == -torch.inf, 0.0, torch.exp(lse) * mean[..., 0])


def potentials(
    kernel: LogKernel,
    relax: tuple[float, float],
    eps: Eps,
    f: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    mass: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The solution ``(f, g)`` with its derivatives in eps, ``a``, ``b``, ``mass`` and the leaves of ``kernel``.

    ``f`` and ``g`` are ``(*b, n)`` and ``(*b, m)`` in cost units, finite everywhere; ``relax`` has the strength of both
    marginals, and ``mass`` is that of a partial plan, ``(*b,)``.  A solution with hard marginals, or bounds, is known up to a
    constant: only what does not depend on it has a derivative.
    """
    inputs = kernel, relax, f.detach(), g.detach(), eps, a, b, mass, *kernel.leaves
    f, g = _Potentials.apply(*inputs)  # type: ignore[no-untyped-call]
    return f, g
