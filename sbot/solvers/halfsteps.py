"""The state of a Sinkhorn solve, and three ways to improve it, each a small object.

The state is the potential g: f is always its half-step, so that the marginal of mu is exact (the relaxed one too) and the
error is nu's.  One pass over the kernel gives f, the masses of rows and columns and, where there is room, the conditional
laws of the plan, on which `HalfSteps` and `newton.Newton` work until the next pass.  Passes are in the log domain and in the
problem's precision; what is worked out between them is only a proposal for g.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..coupling import damping, dual_term
from ..kernels import Conditionals, LogKernel

#: after a look at the error: total iterations so far and the error; returns whether to stop
Check = Callable[[int, float], bool]

#: Largest change of a potential, in units of eps, that a model which leaves small entries out is trusted with.
TRUST = 8.0


@dataclass
class State:
    """The problem and where the iteration is; potentials in cost units, ``(*b, n)`` and ``(*b, m)``.

    ``model`` is where the conditional laws are kept, None where iterations stream.  ``rows`` and ``columns`` are the masses
    of the plan, in float64; ``known`` says whether the model is that of the present potentials.
    """

    kernel: LogKernel
    a: Tensor
    b: Tensor
    rho: tuple[float, float]
    g: Tensor
    model: Conditionals | None = None
    eps: float = 1.0
    iterations: int = 0
    passes: int = 0
    f: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    columns: Tensor = field(init=False)
    known: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.log_a, self.log_b, self.f = self.a.log(), self.b.log(), torch.zeros_like(self.a)
        self.live = self.a > 0, self.b > 0
        self.zeros = not bool(self.live[0].all()) or not bool(self.live[1].all())

    @property
    def damp(self) -> tuple[float, float]:
        """``lambda = rho / (rho + eps)`` of both sides."""
        return damping(self.rho[0], self.eps), damping(self.rho[1], self.eps)

    def settle(self) -> None:
        """One pass: ``f = -lambda eps log sum_j b_j exp((g_j - C_ij) / eps)`` and the plan's masses at (f, g)."""
        lam = self.damp[0]
        keep = None
        if self.model is not None:
            self.model.open()
            keep = self.model.keep
        seen = self.kernel.conditionals(self.log_b + self.g / self.eps, self.eps, self.a, 1 - lam, keep)
        self.known = self.model is not None and self.model.close()
        f = -lam * self.eps * seen.lse
        # an atom of zero weight may have only forbidden pairs: its potential is infinite and of no consequence
        self.f = torch.where(self.live[0], f, 0.0) if self.zeros else f
        self.rows, self.columns = seen.rows.double(), seen.columns
        self.passes += 1

    def goal(self, log_v: Tensor | float = 0.0) -> Tensor:
        """What the columns should sum to: b, or ``b e^{-g / rho}`` where nu is relaxed, with g moved by ``eps log_v``."""
        if math.isinf(self.rho[1]):
            return self.b.double()
        return self.b.double() * torch.exp(-(self.g.double() + self.eps * log_v) / self.rho[1])

    def errors(self) -> Tensor:
        """Relative L1 distance of nu's marginal from its target, ``(*b,)``."""
        return relative(self.columns, self.goal())

    def error(self) -> float:
        """The worst of a batch."""
        return float(self.errors().max())

    def move(self, log_v: Tensor) -> None:
        """``g += eps log_v``."""
        g = self.g + self.eps * log_v.to(self.g)
        self.g = torch.where(self.live[1], g, 0.0) if self.zeros else g

    def translate(self) -> None:
        """Move a constant between f and g to the dual optimum (Sejourne, Vialard and Peyre 2022); relaxed problems only.

        Half-steps move this direction by a factor ``rho / (rho + eps)`` at a time, which is hardly at all for small eps.
        """
        rho_a, rho_b = self.rho
        if math.isinf(rho_a) and math.isinf(rho_b):
            return
        left = self.log_a - self.f / rho_a
        right = self.log_b - self.g / rho_b
        weight = 1 / ((0 if math.isinf(rho_a) else 1 / rho_a) + (0 if math.isinf(rho_b) else 1 / rho_b))
        shift = weight * (left.logsumexp(-1) - right.logsumexp(-1))
        self.f, self.g = self.f + shift[..., None], self.g - shift[..., None]

    def dual(self) -> Tensor:
        """The dual objective up to a constant, ``(*b,)``, in float64."""
        total = -self.eps * self.rows.sum(-1)
        for weights, potential, rho in ((self.a, self.f, self.rho[0]), (self.b, self.g, self.rho[1])):
            live = torch.where(weights > 0, potential, 0.0).double()
            total = total + (weights.double() * dual_term(live, rho)).sum(-1)
        return total

    def centre(self) -> None:
        """Share the constant so that ``<a, f>`` and ``<b, g>`` are equal: swapping mu and nu then swaps f and g."""
        if self.rho != (math.inf, math.inf):
            return
        means = [(w * torch.where(w > 0, p, 0.0)).sum(-1) / w.sum(-1) for w, p in ((self.a, self.f), (self.b, self.g))]
        shift = (means[1] - means[0]) / 2
        self.f, self.g = self.f + shift[..., None], self.g - shift[..., None]


def relative(columns: Tensor, goal: Tensor) -> Tensor:
    """Relative L1 distance over the last dimension."""
    return (columns - goal).abs().sum(-1) / goal.sum(-1).clamp(min=torch.finfo(goal.dtype).tiny)


class Step(ABC):
    """A way from one settled state to a better one."""

    #: what the report counts
    name: str

    @abstractmethod
    def advance(self, state: State, most: int, check: Check) -> None:
        """Improve ``state`` by at most ``most`` iterations and settle it; an iteration is one product, or pass, on each side."""


class Exact(Step):
    """One half-step on each side from what the pass found: needs no model, and is safe wherever the numbers are."""

    name = "passes"

    def advance(self, state: State, most: int, check: Check) -> None:
        goal, columns = state.goal(), state.columns
        if bool(((columns <= 0) & state.live[1]).any()):
            # an atom of nu that underflowed in every row: its sums are to be had in the log domain only
            lse = state.kernel.T.reduce(state.log_a + state.f / state.eps, state.eps)[0]
            log_columns = state.log_b.double() + (state.g / state.eps + lse).double()
        else:
            log_columns = columns.log()
        state.move(state.damp[1] * (goal.log() - log_columns))
        state.translate()
        state.settle()
        state.iterations += 1


@dataclass(frozen=True)
class HalfSteps(Step):
    """Half-steps as matrix-vector products with the model: ten times cheaper than passes.

    The scalings u, v multiply ``e^{f/eps}`` and ``e^{g/eps}``.  What the model lacks of the masses that the pass found is
    taken as constant, so that ``u = v = 1`` is exact: the error of the model vanishes with the steps.
    """

    name = "half-steps"
    every: int = 5

    def advance(self, state: State, most: int, check: Check) -> None:
        model, r, goal = state.model, state.rows, state.goal()
        assert model is not None
        lam_a, lam_b = state.damp
        live, tiny = state.live[1], torch.finfo(torch.float64).tiny
        lack_rows, lack_columns = 1 - model.times(torch.ones_like(goal)), state.columns - model.transposed_times(r)
        columns, log_v, done = state.columns, torch.zeros_like(goal), 0
        while done < most:
            log_v = torch.where(live, lam_b * (goal / columns.clamp(min=tiny)).log(), 0.0)
            v = log_v.exp()
            u = (model.times(v) + lack_rows).clamp(min=tiny).pow(-lam_a)
            columns = (model.transposed_times(r * u) + lack_columns).clamp(min=0)
            done += 1
            if done % self.every == 0 or done == most:
                spread = float(log_v.abs().max())
                if not math.isfinite(spread) or spread > TRUST:
                    break
                if check(state.iterations + done, float(relative(columns * v, state.goal(log_v)).max())):
                    break
        if not bool(torch.isfinite(log_v).all()):
            Exact().advance(state, most, check)
            return
        state.move(log_v)
        state.translate()
        state.settle()
        state.iterations += done
