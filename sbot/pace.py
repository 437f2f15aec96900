"""Over-relaxed half-steps of Sinkhorn's iteration on scalings, and how far to relax them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import as_array
from .linalg import Eps

#: Over-relaxation stays below this: far from the solution 2, the limit, diverges.
FASTEST = 1.8
TINY = float(np.finfo(np.float64).tiny)

Array = np.ndarray[Any, np.dtype[np.float64]]


def half_step(old: Any, goal: Any, sums: Any, power: Eps, omega: Eps | None) -> Any:
    """The half-step ``(goal / sums)^power``, carried too far by ``omega``; of tensors or arrays."""
    whole = not isinstance(power, Tensor) and power == 1
    if omega is None:
        return goal / sums if whole else (goal / sums) ** power
    if whole:
        return (goal / (sums * old + TINY)) ** omega * old
    # of a goal of 1, one operation less
    exact = sums ** (-power * omega) if isinstance(goal, float) else (goal / sums) ** (power * omega)
    return exact * (old + TINY) ** (1 - omega)


class Pace:
    """Over-relaxation of each problem, from the rate at which its error falls (Thibault et al. 2021, Lehmann et al. 2022).

    At the solution half-steps are Gauss-Seidel iterations on two blocks.  Where plain ones contract by theta^2, relaxed
    ones contract by the lambda of ``(lambda + omega - 1)^2 = lambda omega^2 theta^2``, which is least at
    ``omega = 2 / (1 + sqrt(1 - theta^2))``.
    """

    def __init__(self, errors: Tensor) -> None:
        self.like, self.last = errors, _numbers(errors)
        # arrays of no dimensions cost twenty times what numbers do
        single = isinstance(self.last, float)
        ways: tuple[Any, Any, Any] = (min, max, _choose) if single else (np.minimum, np.maximum, np.where)
        self._min, self._max, self._where = ways
        self.factor, self.fall = (1.0 if single else np.ones_like(self.last)), 0.0

    @property
    def omega(self) -> Eps | None:
        """A number, or ``(*b, 1)``; None where nothing is relaxed yet."""
        if isinstance(self.factor, float):
            return None if self.factor == 1 else self.factor
        return None if np.all(self.factor == 1) else torch.from_numpy(self.factor).to(self.like)[..., None]

    def resume(self, errors: Tensor) -> bool:
        """Go on from these ``errors``; whether they are those of as many problems, and it can."""
        now = _numbers(errors)
        if np.shape(now) != np.shape(self.last):
            return False
        self.last = now
        return True

    def look(self, errors: Any, iterations: int) -> None:
        now, least, most, where = _numbers(errors), self._min, self._max, self._where
        rate = (now / most(self.last, TINY)) ** (1 / iterations)
        self.fall = math.log(max(_top(self.last), TINY) / max(_top(now), TINY)) / iterations
        self.last = now
        over = rate + self.factor - 1
        theta = over * over / most(rate * self.factor**2, 1e-30)
        best = least(2 / (1 + (1 - least(theta, 0.999)) ** 0.5), FASTEST)
        # first iterations gain more than later ones, and say too little; where the error grew it starts again
        self.factor = where(rate >= 1, 1.0, where(rate == 0, self.factor, best))


def _numbers(errors: Any) -> Any:
    """As an array, or a number where there is one."""
    if isinstance(errors, float) or (isinstance(errors, Tensor) and not errors.ndim):
        return float(errors)
    values = as_array(errors)
    return values if values.ndim else float(values)


def _top(errors: Any) -> float:
    return errors if isinstance(errors, float) else float(errors.max())


def _choose(condition: Any, one: Any, other: Any) -> Any:
    return one if condition else other
