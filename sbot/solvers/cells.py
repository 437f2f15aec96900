"""A problem between cells of atoms: where a streamed solve starts, and what its slow directions are.

Potentials vary on the scale ``sqrt(eps)``.  Where cells are smaller than that, the problem between their means is nearly the
problem itself, and small enough to be solved with everything that is kept.  Its potentials start the streamed iterations, and its
linearisation takes over the directions in which they are slow: a two-grid method, whose smoother is the half-step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import LogKernel
from ..measures import Discrete
from ..problem import Problem
from .halfsteps import State
from .newton import Newton

#: Mean cost from an atom to the mean of its cell, in units of eps, up to which cells stand for their atoms.
SMOOTH = 1.5
#: Conjugate gradients on the coarse problem stop at the square root of this share of the residual.
RESOLVED = 1e-4


class Cells(NamedTuple):
    """Atoms grouped: the means as a measure, ``(k, d)``, the cell of each atom, ``(n,)``, and the mean cost within cells."""

    measure: Discrete
    label: Tensor
    spread: float


def levels(n: int, most: int) -> int:
    """How often ``n`` atoms are halved into at most ``most`` cells."""
    return max(1, min(most, n)).bit_length() - 1


def halved(points: Tensor, levels: int) -> Tensor:
    """The cell of each of ``(n, d)`` points, ``(n,)``: ``2^levels`` of equal counts, made by halving the longest side."""
    n, device = len(points), points.device
    size = -(-n // 2**levels)
    # a few atoms come twice so that all halves are equal; the later cell has them
    index = torch.arange(2**levels * size, device=device) % n
    for level in range(levels):
        index = index.view(2**level, -1)
        part = points[index]
        side = (part.amax(1) - part.amin(1)).argmax(-1)
        place = torch.take_along_dim(part, side[:, None, None], 2)[..., 0]
        index = torch.take_along_dim(index, place.argsort(1), 1)
    out = torch.empty(n, dtype=torch.int64, device=device)
    out[index.flatten()] = torch.arange(2**levels, device=device).repeat_interleave(size)
    return out


def grouped(measure: Discrete, embedded: Tensor, levels: int) -> Cells:
    """Cells of near atoms in the embedded points; masses and means of what they hold."""
    assert measure.points is not None
    points, weights = measure.points.detach().double(), measure.weights.detach().double()
    _, index = torch.unique(halved(embedded.double(), levels), return_inverse=True)
    count = int(index.max()) + 1

    def gathered(values: Tensor) -> Tensor:
        return values.new_zeros((count, *values.shape[1:])).index_add_(0, index, values)

    mass = gathered(weights)
    # a cell without mass keeps its place
    share = torch.where(mass[index] > 0, weights / mass[index], 1 / gathered(torch.ones_like(weights))[index])[:, None]
    near = embedded.double() - gathered(share * embedded.double())[index]
    spread = float((weights * near.square().sum(-1)).sum() / weights.sum() / 2)
    means = Discrete(gathered(share * points).to(measure.points), mass.to(measure.weights))
    return Cells(means, index, spread)


def coarsened(problem: Problem, most: int) -> tuple[Problem, Tensor] | None:
    """The problem between at most ``most`` cells on each side, and the cells of nu; None where cells are too coarse for eps."""
    mu, nu = problem.mu, problem.nu
    assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
    eps = problem.one_eps
    pair = problem.cost.embed(*(site.detach() for site in problem.sites))
    if pair is None or most < 2:
        return None
    sides = []
    for measure, embedded in zip((mu, nu), pair, strict=True):
        sides.append(grouped(measure, embedded, levels(measure.n, most)))
    if sides[0].spread + sides[1].spread > SMOOTH * eps:
        return None
    return replace(problem, mu=sides[0].measure, nu=sides[1].measure, notes=()), sides[1].label


@dataclass(frozen=True)
class Correction:
    """Newton's step, with the problem between cells in place of the whole one where that is smooth.

    ``S z = r`` of `newton` with ``S = D (1 - G)`` is ``z = D^-1 r + G z``: a half-step, which knows the fast directions, and
    ``G = lambda_mu lambda_nu P' diag(1/r) P`` in units of the columns, which smooths.  So z is only needed there, and the one of
    the problem between cells will do, looked at from the atoms of nu.

    Attributes
    ----------
    state : the problem between cells, solved, with its model.
    cells : ``(m,)`` the cell of each atom of nu.
    kernel : the cost from the atoms of nu to the cells of mu, ``(m, k)``.
    """

    state: State
    cells: Tensor
    kernel: LogKernel

    def under(self, problem: Problem, label: Tensor) -> Correction:
        """The same of a problem whose atoms of nu, in cells ``label``, are grouped to those of this one."""
        means, _ = self.kernel.leaves
        return replace(self, cells=self.cells[label], kernel=self.kernel.on((means, problem.sites[1].detach())))

    def __call__(self, rest: Tensor, step: Tensor) -> Tensor:
        """The step ``(m,)``, in units of eps, given the masses that are missing and the half-step that would be taken."""
        state, newton = self.state, Newton()
        assert state.model is not None
        missing = torch.zeros_like(state.columns).index_add_(0, self.cells, rest)
        errors = torch.full((), RESOLVED, dtype=missing.dtype, device=missing.device)
        z, _ = newton.direction(state, missing, errors, newton.inner)
        moved = state.model.times(z).to(state.f)
        _, smooth = self.kernel.reduce(state.log_a + state.f / state.eps, state.eps, moved[:, None])
        assert smooth is not None
        return step + state.damp[0] * state.damp[1] * smooth[:, 0].double()
