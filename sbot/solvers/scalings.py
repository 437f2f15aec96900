"""Half-steps on scalings u, v of ``e^{f/eps}`` and ``e^{g/eps}``: what the masses of rows and columns are brought to.

Vectors are tensors or arrays, whichever the products of the model are quickest with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..linalg import Eps
from ..pace import TINY, half_step
from ..relaxed import target_weights

if TYPE_CHECKING:
    from .halfsteps import State


class Hard:
    """Marginals that are met: ``v = b / columns``, ``u = 1 / sums``, the latter over the row masses."""

    def __init__(self, state: State, goal: Any, as_vector: Callable[[Tensor], Any]) -> None:
        self.goal, self.whole = goal, goal.sum(-1)
        self.slack = as_vector(state.slack) if isinstance(state.slack, Tensor) else None
        # 1 at an atom of zero weight, where v is 0
        self.gone = as_vector((~state.live[1]).double()) if state.zeros else None

    def raise_columns(self, v: Any, columns: Any, omega: Eps | None) -> Any:
        """v after the half-step of g, over-relaxed by ``omega``."""
        return half_step(v, self.goal, columns, 1.0, omega)

    def raise_rows(self, u: Any, v: Any, sums: Any, omega: Eps | None) -> tuple[Any, Any, Any]:
        """u after the half-step of f, and with it v and what it makes the sums of rows."""
        return half_step(u, 1.0, sums, 1.0, omega), v, sums

    def range(self, v: Any) -> tuple[Any, Any]:
        """The least and the largest of v, at atoms that have weight."""
        there = v if self.gone is None else v + self.gone
        return there.min(), there.max()

    def errors(self, masses: Any, v: Any) -> Any:
        """`State.errors` at these masses of columns."""
        return self._in_slack(abs(masses - self.goal).sum(-1) / self.whole)

    def _in_slack(self, errors: Any) -> Any:
        return errors if self.slack is None else errors / self.slack


class Relaxed(Hard):
    """Marginals that are encouraged, on one side at least: half-steps are damped, and the goal moves with the potential.

    A constant between f and g would move by a factor ``rho / (rho + eps)`` in each half-step, which is hardly at all for small
    eps.  It is set to the dual optimum (Sejourne, Vialard and Peyre 2022) together with an exact half-step of f: of g moved by a
    constant c, that is moved by -lambda c, so that both are optimal at once, and no error is left in that direction.
    """

    def __init__(self, state: State, goal: Any, as_vector: Callable[[Tensor], Any]) -> None:
        super().__init__(state, goal, as_vector)
        self.damp = state.damp
        self.powers = tuple(0.0 if math.isinf(rho) else state.unit / rho for rho in state.rho)
        self.goals = as_vector(target_weights(state.a.double(), state.f.double(), state.rho[0], state.zeros)), goal
        # scalings may be 0 where goals are, and their powers infinite
        self.empty = tuple(part == 0 if bool((part == 0).any()) else None for part in self.goals)
        self.dot = np.dot if isinstance(goal, np.ndarray) else _dot

    def raise_columns(self, v: Any, columns: Any, omega: Eps | None) -> Any:
        return half_step(v, self.goal, columns, self.damp[1], omega)

    def raise_rows(self, u: Any, v: Any, sums: Any, omega: Eps | None) -> tuple[Any, Any, Any]:
        u, follows = half_step(u, 1.0, sums, self.damp[0], omega), self.damp[0]
        if omega is not None:  # half-steps that are carried too far need no constant
            return u, v, sums
        one, two = self.dot(self.goals[0], self._fall(0, u)), self.dot(self.goals[1], self._fall(1, v))
        shift = (two / one) ** (1 / (follows * self.powers[0] + self.powers[1]))
        return u / shift**follows, v * shift, sums * shift

    def errors(self, masses: Any, v: Any) -> Any:
        goal = self.goal * self._fall(1, v)
        return self._in_slack(abs(masses - goal).sum(-1) / (goal.sum(-1) + TINY))

    def _fall(self, side: int, scaling: Any) -> Any:
        """``e^{-f / rho}`` for an f moved by ``eps log u``, over what it was before; or that of g and v."""
        return (scaling if self.empty[side] is None else scaling + self.empty[side]) ** -self.powers[side]


def _dot(one: Tensor, two: Tensor) -> Tensor:
    return torch.linalg.vecdot(one, two)[..., None]


class Bounded(Hard):
    """A prescribed mass within the marginals (see `partial`); tensors only, and never over-relaxed, which would cross the cap."""

    def __init__(self, state: State, goal: Any, as_vector: Callable[[Tensor], Any]) -> None:
        super().__init__(state, goal, as_vector)
        self.state = state

    def raise_columns(self, v: Any, columns: Any, omega: Eps | None) -> Any:
        return self.state.rise(columns.log()).exp_()

    def raise_rows(self, u: Any, v: Any, sums: Any, omega: Eps | None) -> tuple[Any, Any, Any]:
        return (self.state.lower(self.state.lse + sums.log()) - self.state.height).exp_(), v, sums

    def errors(self, masses: Any, v: Any) -> Any:
        there = v if self.gone is None else v + self.gone
        return self._in_slack(self.state.distance(masses, there.log()))
