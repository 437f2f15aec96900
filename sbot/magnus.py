"""Transitions of linear stochastic equations with time-dependent coefficients.

The Van Loan block matrix ``H = [[A, BB', b], [0, -A', 0], [0, 0, 0]]`` generates a flow whose blocks are the propagator, the
noise and the shift.  A step is ``exp(Omega)`` with the sixth-order Magnus expansion on Gauss-Legendre nodes (Blanes, Casas,
Oteo and Ros, "The Magnus expansion and some of its applications", 2009, section 5.4); steps are halved until nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import linalg
from .errors import InvalidProblem

#: Change on halving the steps at which they are fine enough: the finer of the two is 64 times better still.
TOLERANCE = 1e-12
#: Change that the finest steps may leave; more means that the coefficients are not smooth.
ROUGH = 1e-8
MAX_HALVINGS = 7


class Transitions(NamedTuple):
    """``k`` transitions ``x -> N(phi x + shift, cov)`` side by side: ``(k, d, d)``, ``(k, d)``, ``(k, d, d)``."""

    phi: Tensor
    shift: Tensor
    cov: Tensor

    def then(self, later: Transitions) -> Transitions:
        """Each followed by its partner in ``later``."""
        return Transitions(
            later.phi @ self.phi,
            (later.phi @ self.shift[..., None])[..., 0] + later.shift,
            linalg.symmetrise(later.phi @ self.cov @ later.phi.mT) + later.cov,
        )

    def part(self, index: slice) -> Transitions:
        """Some of them."""
        return Transitions(*(field[index] for field in self))

    def merged(self) -> Transitions:
        """All of them in a row, as one: neighbours are composed until one is left."""
        parts = self
        while len(parts.phi) > 1:
            even = len(parts.phi) // 2 * 2
            pairs = parts.part(slice(0, even, 2)).then(parts.part(slice(1, even, 2)))
            parts = joined([pairs, parts.part(slice(even, None))])
        return parts


def joined(parts: list[Transitions]) -> Transitions:
    """Stacks one after the other."""
    return Transitions(*(torch.cat(fields) for fields in zip(*parts, strict=True)))


def block(a: Tensor, b: Tensor, noise: Tensor) -> Tensor:
    """The Van Loan matrix of ``A``, ``b`` and ``B B'``, ``(2 d + 1, 2 d + 1)``."""
    d = max(a.shape[-1] if a.ndim else 1, b.shape[-1] if b.ndim else 1, noise.shape[-1] if noise.ndim else 1)
    out = torch.zeros(2 * d + 1, 2 * d + 1, dtype=torch.float64, device="cpu")
    out[:d, :d] = linalg.matrix(a, d)
    out[:d, d : 2 * d] = linalg.matrix(noise, d)
    out[:d, 2 * d] = b
    out[d : 2 * d, d : 2 * d] = -out[:d, :d].mT
    return out


def exact(generator: Tensor, h: float) -> Transitions:
    """Constant coefficients over a time ``h``."""
    return _read(torch.linalg.matrix_exp(generator[None] * h))


def integrate(generator: Callable[[float], Tensor], s: float, t: float, parts: int) -> Transitions:
    """The transitions over ``parts`` equal intervals of ``[s, t]``; raises `InvalidProblem` for rough coefficients."""
    before = _magnus(generator, s, t, parts)
    change = math.inf
    for halving in range(1, MAX_HALVINGS + 1):
        finer = _magnus(generator, s, t, parts * 2**halving)
        for _ in range(halving):
            finer = finer.part(slice(0, None, 2)).then(finer.part(slice(1, None, 2)))
        change = max(_relative(finer.phi, before.phi), _relative(finer.cov, before.cov))
        change = max(change, float((finer.shift - before.shift).abs().max()))
        if change < TOLERANCE:
            return finer
        before = finer
    if change > ROUGH:
        raise InvalidProblem(
            f"the coefficients of the reference vary too roughly between t = {s:g} and {t:g} "
            f"(the transition is known to {change:.1g}); give smooth functions of t"
        )
    return before


def _relative(new: Tensor, old: Tensor) -> float:
    return float(((new - old).abs() / new.abs().amax((-2, -1), keepdim=True).clamp(min=1e-300)).max())


def _magnus(generator: Callable[[float], Tensor], s: float, t: float, steps: int) -> Transitions:
    h = (t - s) / steps
    first, middle, last = (
        _stacked([generator(s + (k + node) * h) for k in range(steps)])
        for node in (0.5 - math.sqrt(15) / 10, 0.5, 0.5 + math.sqrt(15) / 10)
    )
    a1 = middle * h
    a2 = (last - first) * (math.sqrt(15) * h / 3)
    a3 = (last - 2 * middle + first) * (10 * h / 3)
    c1 = _commutator(a1, a2)
    c2 = _commutator(a1, 2 * a3 + c1) / -60
    omega = a1 + a3 / 12 + _commutator(-20 * a1 - a3 + c1, a2 + c2) / 240
    return _read(torch.linalg.matrix_exp(omega))


def _stacked(blocks: list[Tensor]) -> Tensor:
    sizes = {block.shape[-1] // 2 for block in blocks}
    if len(sizes) > 1:
        raise InvalidProblem(
            f"the coefficients of the reference have dimensions {sorted(sizes)} at different times; give one"
        )
    return torch.stack(blocks)


def _read(flow: Tensor) -> Transitions:
    d = (flow.shape[-1] - 1) // 2
    phi = flow[:, :d, :d]
    return Transitions(phi, flow[:, :d, 2 * d], linalg.symmetrise(flow[:, :d, d : 2 * d] @ phi.mT))


def _commutator(a: Tensor, b: Tensor) -> Tensor:
    return a @ b - b @ a
