"""Sinkhorn's half-steps, twice: in the log domain over any kernel, and as products on a stored, absorbed kernel.

Both keep the same state, the potentials f and g, and both end on an f half-step: the marginal of mu is then exact (the
relaxed one too) and the error is nu's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import linalg
from ..coupling import damping
from ..kernels import DenseKernel, LogKernel

#: after a check: total iterations so far and the error; returns whether to stop
Check = Callable[[int, float], bool]


@dataclass
class State:
    """The problem and where the iteration is; potentials in cost units, ``(*b, n)`` and ``(*b, m)``.

    ``absorbed`` is the storage of the absorbed kernel, None where iterations stream.
    """

    kernel: LogKernel
    a: Tensor
    b: Tensor
    rho: tuple[float, float]
    f: Tensor
    g: Tensor
    absorbed: Tensor | None = None
    eps: float = 1.0
    iterations: int = 0

    def __post_init__(self) -> None:
        self.log_a, self.log_b = self.a.log(), self.b.log()
        self.zeros = bool((self.a == 0).any()) or bool((self.b == 0).any())

    def f_step(self) -> None:
        """``f = -lambda eps log sum_j b_j exp((g_j - C_ij) / eps)``, ``lambda = rho / (rho + eps)``."""
        lse = self.kernel.reduce(self.log_b + self.g / self.eps, self.eps)[0]
        f = -damping(self.rho[0], self.eps) * self.eps * lse
        # an atom of zero weight may have only forbidden pairs: its potential is infinite and of no consequence
        self.f = torch.where(self.a > 0, f, 0.0) if self.zeros else f

    def column_lse(self) -> Tensor:
        """``log sum_i a_i exp((f_i - C_ij) / eps)``: minus it, times eps, is the balanced g half-step."""
        return self.kernel.T.reduce(self.log_a + self.f / self.eps, self.eps)[0]

    def translate(self) -> None:
        """Move a constant between f and g to the dual optimum (Sejourne, Vialard and Peyre 2022); relaxed problems only.

        Half-steps move this direction by a factor ``rho / (rho + eps)`` at a time, which is hardly at all for small eps.
        """
        rho_a, rho_b = self.rho
        if rho_a == torch.inf and rho_b == torch.inf:
            return
        left = -self.f / rho_a + self.log_a
        right = -self.g / rho_b + self.log_b
        weight = 1 / ((0 if rho_a == torch.inf else 1 / rho_a) + (0 if rho_b == torch.inf else 1 / rho_b))
        shift = weight * (left.logsumexp(-1) - right.logsumexp(-1))
        self.f, self.g = self.f + shift[..., None], self.g - shift[..., None]

    def centre(self) -> None:
        """Share the constant so that ``<a, f>`` and ``<b, g>`` are equal: swapping mu and nu then swaps f and g."""
        if self.rho != (torch.inf, torch.inf):
            return
        means = [(w * torch.where(w > 0, p, 0.0)).sum(-1) / w.sum(-1) for w, p in ((self.a, self.f), (self.b, self.g))]
        shift = (means[1] - means[0]) / 2
        self.f, self.g = self.f + shift[..., None], self.g - shift[..., None]

    def error_of(self, log_ratio: Tensor, scaling: Tensor | None = None) -> float:
        """Relative L1 distance of nu's marginal, ``b e^log_ratio``, from its target; the worst of a batch.

        ``log_ratio`` is the logarithm of the column sums over b; ``scaling`` multiplies ``e^{g/eps}`` where it is not
        absorbed into g yet.
        """
        goal = self.log_b
        if self.rho[1] != torch.inf:
            g = self.g if scaling is None else self.g + self.eps * scaling.log()
            goal = goal - g / self.rho[1]
        goal, columns = goal.exp(), (self.log_b + log_ratio).exp()
        total = goal.sum(-1).clamp(min=torch.finfo(goal.dtype).tiny)
        return float(((columns - goal).abs().sum(-1) / total).max())


def log_iterations(state: State, limit: int, every: int, check: Check) -> None:
    """Half-steps in the log domain: O(n + m) memory, always safe.  Expects rows that are exact (an f half-step)."""
    eps, lam = state.eps, damping(state.rho[1], state.eps)
    while True:
        # the sums of the g half-step are the column sums of the plan before it: the error costs nothing
        lse = state.column_lse()
        last = state.iterations >= limit
        due = state.iterations % every == 0 or last
        if due and (check(state.iterations, state.error_of(state.g / eps + lse)) or last):
            return
        g = -lam * eps * lse
        state.g = torch.where(state.b > 0, g, 0.0) if state.zeros else g
        state.translate()
        state.f_step()
        state.iterations += 1


def scaled_iterations(state: State, limit: int, every: int, check: Check) -> bool:
    """Half-steps as matrix-vector products on ``K = exp((f + g - C) / eps)``; False where the scalings overflowed.

    The scalings u, v multiply ``e^{f/eps}`` and ``e^{g/eps}`` and are absorbed into K before they grow large.  Five to ten
    times cheaper than the log domain, and as safe, since K is of order one where the plan is.
    """
    kernel, absorbed, eps, a, b = state.kernel, state.absorbed, state.eps, state.a, state.b
    assert isinstance(kernel, DenseKernel) and absorbed is not None
    lam_a, lam_b = damping(state.rho[0], eps), damping(state.rho[1], eps)
    relaxed = lam_a < 1 or lam_b < 1
    largest = 0.07 * math.log(torch.finfo(a.dtype).max)  # absorb at e^50 in float64, e^6 in float32
    live = (a > 0, b > 0)

    def absorb() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        f = torch.where(live[0], state.f, -torch.inf) if state.zeros else state.f
        g = torch.where(live[1], state.g, -torch.inf) if state.zeros else state.g
        kernel.absorb(f, g, eps, absorbed)
        # a relaxed half-step keeps the factor lambda of the old potential only
        return torch.ones_like(a), torch.ones_like(b), (lam_a - 1) * state.f / eps, (lam_b - 1) * state.g / eps

    def scaling(sums: Tensor, lam: float, kept: Tensor, alive: Tensor) -> Tensor:
        update = sums.reciprocal() if lam == 1 else torch.exp(kept - lam * sums.log())
        return torch.where(alive, update, 1.0) if state.zeros else update

    u, v, kept_a, kept_b = absorb()
    while True:
        sums = product(absorbed.mT, a * u)
        last = state.iterations >= limit
        if state.iterations % every == 0 or last:
            spread = float(torch.maximum(u.log().abs().amax(), v.log().abs().amax()))
            if not math.isfinite(spread) or spread > 10 * largest:
                return False
            stop = check(state.iterations, state.error_of((v * sums).log(), v)) or last
            if stop or relaxed or spread > largest:
                state.f, state.g = state.f + eps * u.log(), state.g + eps * v.log()
                if stop:
                    return True
                if relaxed:
                    state.translate()
                    state.f_step()
                u, v, kept_a, kept_b = absorb()
                sums = product(absorbed.mT, a * u)
        v = scaling(sums, lam_b, kept_b, live[1])
        u = scaling(product(absorbed, b * v), lam_a, kept_a, live[0])
        state.iterations += 1


def product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Of a matrix, or of each of a batch, with a vector."""
    with linalg.full_precision():
        return torch.mv(matrix, vector) if matrix.ndim == 2 else (matrix @ vector[..., None])[..., 0]
