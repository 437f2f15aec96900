r"""Truncated Newton on the dual: the last digits, where half-steps gain little each.

With f eliminated by its half-step the dual is concave in g alone.  At row masses r, column masses c and the masses ``b~``
that the columns should have (b, or ``b e^{-g / rho}`` where nu is relaxed),

.. math:: S z = \tilde b - c, \qquad S = diag(c + \varepsilon \tilde b / \rho_\nu) - \lambda_\mu P' diag(1/r) P, \qquad
    g \leftarrow g + \varepsilon z,

with ``S`` the Schur complement of the Hessian, times eps, and ``lambda_mu = rho_mu / (rho_mu + eps)``.  Conjugate gradients need
only products with P, one on each side; the further off, the fewer of them (Dembo, Eisenstat and Steihaug 1982).

In a partial plan the atoms at the cap of each side move together, and only their common mass is prescribed: the same equations
with these atoms merged into one (`partial.Merged`), which atoms they are being taken from a half-step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels import same
from ..partial import Merged
from .halfsteps import Check, HalfSteps, State, Step

#: Entries of conditional laws that are nothing, as products of smaller ones may be denormal numbers, see `kernels.base.exp2`; and
#: what entries of a matrix to be factorised are at least, over its diagonal.
NOTHING, TIE = 1e-100, 1e-30


@dataclass(frozen=True)
class Newton(Step):
    """One step of Newton's method, cut until the dual gains.

    Attributes
    ----------
    trust : no potential moves further in one step, in units of eps: the quadratic model says nothing beyond.
    inner : conjugate gradient iterations in one step, at most.
    cuts : times that a step is cut by four before it is given up.
    near, direct : the error and the size, of the plan and of S, up to which S is factorised where ``inner`` iterations did not
        do: groups of atoms that share hardly any mass make it so ill-conditioned that conjugate gradients would go on for ever.
    ridge : the diagonal is raised by this share, times the error: far off, S is nearly singular on groups of atoms that hardly
        share mass.
    """

    name = "Newton steps"
    trust: float = 5.0
    inner: int = 300
    near: float = 1e-2
    direct: int = 2**24
    cuts: int = 5
    ridge: float = 0.1

    def advance(self, state: State, most: int, check: Check) -> bool:
        g, errors, value = state.g, state.errors(), state.dual()
        loose = None
        if state.mass is not None:
            height = state.lift(state.columns.log())
            loose = height >= height.amax(-1, keepdim=True)
        rest = state.goal() - state.columns
        before = state.error()
        exact = self.solution(state, rest) if state.stiff and before <= self.near else None
        z, used = self.direction(state, rest, errors, min(self.inner, most), loose) if exact is None else (exact, 1)
        state.iterations += used
        share = (self.trust / z.abs().amax(-1, keepdim=True).clamp(min=self.trust)).clamp(max=1.0)
        for _ in range(self.cuts):
            _step(state, share * z, g)
            state.settle()
            # where the dual is flat to rounding the error decides; of a batch each has its own share
            gained = (state.dual() >= value) | (state.errors() <= errors)
            if bool(gained.all()):
                state.stiff |= used == self.inner and before <= self.near and state.error() > self._slow(state) * before
                return False
            share = torch.where(gained[..., None], share, share / 4)
        # those that gained keep their step, the others are left where they were
        _step(state, torch.where(gained[..., None], share, 0.0) * z, g)
        return False

    def direction(
        self, state: State, rest: Tensor, errors: Tensor, most: int, loose: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """``S z = rest`` by preconditioned conjugate gradients, to a residual that ``errors`` says, and how many it took."""
        model, r, goal = state.model, state.rows, state.goal()
        assert model is not None
        lam = state.damp[0]
        # with the sums of the model itself S stays positive semi-definite whatever the model leaves out
        sums = model.times(torch.ones_like(goal))
        inner = lam * r / sums.clamp(min=torch.finfo(sums.dtype).tiny)
        whole = model.transposed_times(r)
        if not math.isinf(state.rho[1]):
            whole = whole + state.unit / state.rho[1] * goal
        ridge = self.ridge * errors.clamp(max=1.0)[..., None]
        free = None if loose is None else state.height >= state.height.amax(-1, keepdim=True)
        own = inner if free is None else torch.where(free, 0.0, inner)
        diagonal = (whole - model.squares(own)).clamp(min=1e-3 * whole) + ridge * whole
        whole = (1 + ridge) * whole
        inverse = torch.where(diagonal > 0, 1 / diagonal, 0.0)
        if loose is None or free is None:
            products, to, back = model.products()
            with np.errstate(all="ignore"):
                z, used = _conjugate_gradients(products, to(whole), to(inner), to(rest), to(inverse), to(errors), most)
            return back(z), used
        rows, columns = Merged(free, inner), Merged(loose, diagonal)
        g = state.g.double()
        # what is to be at the cap is first brought to it
        start = torch.where(loose, torch.where(loose, g, -torch.inf).amax(-1, keepdim=True) - g, 0.0) / state.unit
        rest = columns(rest - whole * start + model.transposed_times(rows(inner * model.times(start))))
        z, used = _conjugate_gradients(model, whole, inner, rest, inverse, errors, most, rows, columns)
        return start + z, used

    @staticmethod
    def _slow(state: State) -> float:
        """The share of the error that a step may leave; more is borne where a factorisation takes long."""
        return 0.3 if state.kernel.shape[0] * state.kernel.shape[1] <= 2**20 else 0.9

    def solution(self, state: State, rest: Tensor) -> Tensor | None:
        """``S z = rest`` by Cholesky factorisation of ``S + ridge diag(S)``, with the least ridge that keeps z within trust.

        On the plan itself, not on a model of it: groups of atoms may hang together by entries that a model leaves out.  None for
        batches and partial plans, for large ones, and where S has no factor.
        """
        kernel, eps, lam = state.kernel, state.eps, state.damp[0]
        n, m = kernel.shape
        # S is m x m however few atoms mu has
        if kernel.batch_shape or state.mass is not None or max(n, m) * m > self.direct:
            return None
        r, goal = state.rows, state.goal()
        s, whole = goal.new_zeros((len(goal), len(goal))), torch.zeros_like(goal)
        bias = state.log_b + state.g / state.unit
        for rows, law in kernel.softmax_tiles(bias, eps, kernel.reduce(bias, eps)[0]):
            part = law.double()
            # with its own sums S is positive semi-definite whatever the rounding
            part /= part.sum(-1, keepdim=True).clamp(min=torch.finfo(part.dtype).tiny)
            part = torch.threshold_(part, NOTHING, 0.0)
            s.addmm_(part.mT, part * (lam * r)[rows, None], alpha=-1)
            whole += part.mT @ r[rows]
        if not math.isinf(state.rho[1]):
            whole = whole + state.unit / state.rho[1] * goal
        s.diagonal().add_(torch.where(whole > 0, whole, 1.0))
        # far below rounding: else what goes from group to group would be denormal in the factor
        s.addr_(whole.sqrt(), whole.sqrt(), alpha=-TIE)
        ridge = 1e-6 * state.error()
        while 0 < ridge < 1:
            raised = s.clone()
            raised.diagonal().add_(ridge * whole)
            factor, fault = torch.linalg.cholesky_ex(raised)
            z = torch.cholesky_solve(rest[:, None], factor)[:, 0]
            if int(fault) == 0 and float(z.abs().max()) <= self.trust:
                return z
            ridge *= 10
        return None


def _step(state: State, z: Tensor, before: Tensor) -> None:
    """From ``g = before`` a step ``eps z``; in a partial plan a half-step then sorts out which atoms are at the cap."""
    if state.mass is None or not state.known:
        state.g = before
        state.move(z)
        if state.mass is not None:
            state.settle(keep_model=False)
            state.move(state.rise(state.columns.log()))
        return
    # on the model, which is that of the last pass
    shift = z + (before - state.g).double() / state.unit
    state.move(HalfSteps().half(state, torch.where(state.live[1], shift, 0.0).exp()))


def _conjugate_gradients(
    products: Any,
    whole: Any,
    inner: Any,
    rest: Any,
    inverse: Any,
    errors: Any,
    most: int,
    rows: Callable[[Tensor], Tensor] = same,
    columns: Callable[[Tensor], Tensor] = same,
) -> tuple[Any, int]:
    """Of tensors or arrays alike."""
    z, p = 0.0 * rest, inverse * rest
    rho = (rest * p).sum(-1)[..., None]
    target = (errors**0.5).clip(max=0.1) * abs(rest).sum(-1)
    used = 0
    while used < most:
        used += 1
        sp = columns(whole * p - products.transposed_times(rows(inner * products.times(p))))
        curvature = (p * sp).sum(-1)[..., None]
        alpha = (curvature > 0) * rho / (curvature + (curvature <= 0))
        z, rest = z + alpha * p, rest - alpha * sp
        busy = (abs(rest).sum(-1) > target) & (alpha[..., 0] != 0)
        if not busy.any():
            break
        q = inverse * rest
        old, rho = rho, (rest * q).sum(-1)[..., None]
        # a problem of a batch that is done stands still
        p = busy[..., None] * (q + rho / (old + (old == 0)) * p)
    return z, used
