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
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import derivatives, linalg
from .arrays import refuse_vmap, wider
from .errors import NotConverged
from .kernels import LogKernel, share_of
from .linalg import Eps, along
from .partial import ceiling
from .relaxed import target_weights

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
        ctx.kernel, ctx.relax, _, _, eps, *rest = inputs
        ctx.eps = None if isinstance(eps, Tensor) else eps
        # where only values are asked for, their first derivatives need nothing of this
        ctx.set_materialize_grads(False)
        # the solution, and not what it is a copy of: derivatives of a derivative follow it
        ctx.save_for_backward(*output, eps if ctx.eps is None else None, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads == (None, None):
            return (None,) * len(ctx.needs_input_grad)
        f, g, given, *rest = ctx.saved_tensors
        grad_f, grad_g = (
            torch.zeros_like(part) if grad is None else grad for part, grad in zip((f, g), grads, strict=True)
        )
        refuse_vmap(grad_f, "the gradient of the potentials")
        refuse_vmap(grad_g, "the gradient of the potentials")
        inputs = [ctx.eps if given is None else given, *rest]
        wanted = ctx.needs_input_grad[4:]

        def number(*moved: Tensor) -> Tensor:
            moving = derivatives.filled(inputs, wanted, moved)
            return _written_out(ctx.kernel, ctx.relax, (f, g), inputs, moving, grad_f, grad_g)

        def stream() -> list[Tensor | None]:
            with linalg.full_precision():
                return _streamed(ctx.kernel, ctx.relax, (f, g), inputs, grad_f, grad_g, wanted)

        found = derivatives.of_number(number, inputs, wanted, stream, (grad_f, grad_g), ctx.kernel.size)
        return None, None, None, None, *found


def _streamed(
    kernel: LogKernel,
    relax: tuple[float, float],
    potentials: tuple[Tensor, Tensor],
    inputs: Sequence[Any],
    grad_f: Tensor,
    grad_g: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients in eps, a, b, the mass and the leaves of the cost, by tiles."""
    (f, g), (given, a, b, mass, *leaves) = potentials, inputs
    kernel, eps = kernel.on(leaves), linalg.plain(given)
    unit = along(eps, 1)
    left, right = a.log() + f / unit, b.log() + g / unit
    slope = torch.zeros(kernel.batch_shape, dtype=f.dtype, device=f.device)
    plan = Plan(kernel, left, right, eps)
    # potentials where there is no mass are c-transforms, which the caller writes out
    capped = None if mass is None else (at_cap(f, a, mass, unit), at_cap(g, b, mass, unit))
    alpha, beta = solve(plan, relax, torch.where(a > 0, grad_f, 0.0), torch.where(b > 0, grad_g, 0.0), capped)
    # P_ij / a_i and P_ij / b_j are finite at an atom of zero weight too
    over_a = -torch.exp(f / unit) * signed(kernel, right, beta, eps)
    over_b = -torch.exp(g / unit) * signed(kernel.T, left, alpha, eps)
    over_mass = None
    if capped is not None:
        # what is taken from the atoms at the cap, of each of which a share of the weight is filled
        shared = [_shared(which, part) for which, part in zip(capped, (alpha, beta), strict=True)]
        over_a = over_a - torch.exp(f / unit + plan.lse) * shared[0][..., None]
        over_b = over_b - torch.exp(g / unit + kernel.T.reduce(left, eps)[0]) * shared[1][..., None]
        over_mass = (shared[0] + shared[1]).to(mass)

    def tiles() -> Iterator[tuple[slice, Tensor]]:
        for rows, law in plan.laws():
            weight = (plan.rows / unit)[..., rows, None]
            w = law * weight * (alpha[..., rows, None] + beta[..., None, :])
            if isinstance(given, Tensor):
                # d eps = sum_ij w_ij (f_i + g_j - C_ij) / eps
                slope.add_((w.sum(-1) * f[..., rows]).sum(-1) + (w.sum(-2) * g).sum(-1) - kernel.inner(rows, w))
            yield rows, w

    grads = kernel.pulled(tiles(), wanted[4:])
    return [share_of(given, slope, eps), over_a, over_b, over_mass, *grads]


def _shared(which: Tensor, part: Tensor) -> Tensor:
    """The value that ``part`` has on the atoms ``which``, ``(*b,)``; 0 where there are none."""
    return torch.where(which, part, -torch.inf).amax(-1).nan_to_num(neginf=0.0)


def _written_out(
    kernel: LogKernel,
    relax: tuple[float, float],
    potentials: tuple[Tensor, Tensor],
    inputs: Sequence[Any],
    moving: Sequence[Any],
    grad_f: Tensor,
    grad_g: Tensor,
) -> Tensor:
    """``<alpha, A> + <beta, B>``, densely, with A and B what the equations of the potentials leave: A = a e^{-f / rho} - P 1.

    Its derivative in the ``moving`` inputs, with all else held, is the gradient that `_streamed` returns; alpha, beta, f and g
    follow the ``inputs`` themselves.  In double precision, whatever the input: a direct solve squares nothing, and is small.
    """
    f, g = (part.double() for part in potentials)

    def dense(parts: Sequence[Any]) -> tuple[Any, ...]:
        eps, a, b, _, *leaves = parts
        c = kernel.on(leaves).entries(slice(None))
        return eps.double() if isinstance(eps, Tensor) else eps, a.double(), b.double(), c.double()

    here, there = dense(inputs), dense(moving)
    eps, a, b = linalg.plain(here[0]), here[1].detach(), here[2].detach()
    mass, unit = inputs[3], along(eps, 1)
    with torch.no_grad():
        capped = None if mass is None else (at_cap(f, a, mass, unit), at_cap(g, b, mass, unit))
    grads = [torch.where(w > 0, grad.double(), 0.0) for w, grad in ((a, grad_f), (b, grad_g))]
    alpha, beta = _dense_solve(plan_between(f, g, *here), relax, here[0], grads, capped)
    _, a, b, _ = there
    p = plan_between(f, g, *there)
    total = -(alpha * p.sum(-1)).sum() - (beta * p.sum(-2)).sum()
    if capped is None:
        ends = (target_weights(w, part, rho) for w, part, rho in zip((a, b), (f, g), relax, strict=True))
        return total + sum((part * end).sum() for part, end in zip((alpha, beta), ends, strict=True))
    for w, part, which in zip((a, b), (alpha, beta), capped, strict=True):
        level = (torch.where(which, part, 0.0).sum(-1) / which.sum(-1).clamp(min=1))[..., None]
        total = total + (torch.where(which, 0.0, w) * (part - level)).sum() + (moving[3] * level[..., 0]).sum()
    return total


def plan_between(f: Tensor, g: Tensor, eps: Eps, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a_i b_j exp((f_i + g_j - C_ij) / eps)``, with derivatives of any order in all of them.

    Atoms of zero weight are not in it, nor those that forbidden pairs leave where they are, of infinite potential.
    """
    live = [torch.isfinite(part) & (w.detach() > 0) for w, part in ((a, f), (b, g))]
    f, g = (torch.where(known, part, 0.0) for known, part in zip(live, (f, g), strict=True))
    pairs = live[0][..., :, None] & live[1][..., None, :] & torch.isfinite(c)
    exponent = (f[..., :, None] + g[..., None, :] - torch.where(pairs, c, 0.0)) / along(eps, 2)
    return a[..., :, None] * b[..., None, :] * torch.where(pairs, exponent, -torch.inf).exp()


def _dense_solve(
    p: Tensor,
    relax: tuple[float, float],
    eps: Eps,
    grads: Sequence[Tensor],
    capped: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """`solve`, with derivatives of any order in the plan ``p``, eps and the right side."""
    if p.shape[-1] > p.shape[-2]:
        turned = None if capped is None else capped[::-1]
        beta, alpha = _dense_solve(p.mT, relax[::-1], eps, grads[::-1], turned)
        return alpha, beta
    unit = along(eps, 1)
    sums = p.sum(-1), p.sum(-2)
    upper, lower = (part * (1 + unit / rho) for part, rho in zip(sums, relax, strict=True))
    above, below = (unit * part for part in grads)
    if capped is not None:
        upper, lower = _level(upper, capped[0]), _level(lower, capped[1])
        above, below = _level(above, capped[0]), _level(below, capped[1])
        p = _level(_level(p, capped[1][..., None, :]).mT, capped[0][..., None, :]).mT
    live = upper > 0, lower > 0
    over = torch.where(live[0], 1 / torch.where(live[0], upper, 1.0), 0.0)
    rest = torch.where(live[1], below - linalg.product(p.mT, over * above), 0.0)
    # as much of a machine epsilon on the diagonal as keeps parts of the plan that exchange no mass from having no inverse
    diagonal = torch.where(live[1], lower * (1 + 8 * torch.finfo(lower.dtype).eps), 1.0)
    matrix = torch.diag_embed(diagonal) - p.mT @ (over[..., None] * p)
    if relax == (math.inf, math.inf):
        # a constant may move between f and g
        whole = lower.sum(-1, keepdim=True)
        rest = rest - lower * (rest.sum(-1, keepdim=True) / whole)
        matrix = matrix + (lower / whole)[..., :, None] * lower[..., None, :]
    beta = torch.linalg.solve(matrix, rest[..., None])[..., 0]
    return over * (above - linalg.product(p, beta)), beta


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
