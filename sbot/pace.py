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
    step = goal / (sums * old + TINY) if whole else (goal / sums) ** power / (old + TINY)
    return step**omega * old


class Pace:
    """Over-relaxation of each problem, from the rate at which its error falls (Thibault et al. 2021, Lehmann et al. 2022).

    At the solution half-steps are Gauss-Seidel iterations on two blocks.  Where plain ones contract by theta^2, relaxed
    ones contract by the lambda of ``(lambda + omega - 1)^2 = lambda omega^2 theta^2``, which is least at
    ``omega = 2 / (1 + sqrt(1 - theta^2))``.
    """

    def __init__(self, errors: Tensor) -> None:
        self.like = errors
        self.last = as_array(errors)
        self.looks, self.factor, self.fall = np.zeros_like(self.last), np.ones_like(self.last), 0.0

    @property
    def omega(self) -> Eps | None:
        """A number, or ``(*b, 1)``; None where nothing is relaxed yet."""
        if np.all(self.factor == 1):
            return None
        return torch.from_numpy(self.factor).to(self.like)[..., None] if self.factor.ndim else float(self.factor)

    def look(self, errors: Any, iterations: int) -> None:
        now = as_array(errors)
        rate = (now / np.maximum(self.last, TINY)) ** (1 / iterations)
        self.fall = math.log(max(float(self.last.max()), TINY) / max(float(now.max()), TINY)) / iterations
        self.last, self.looks = now, self.looks + 1
        theta = (rate + self.factor - 1) ** 2 / np.maximum(rate * self.factor**2, 1e-30)
        best = np.minimum(2 / (1 + np.sqrt(1 - np.minimum(theta, 0.999))), FASTEST)
        # the first iterations are no measure of the last, and where the error grew it starts again
        factor = np.where((self.looks == 1) | (rate == 0), self.factor, best)
        self.factor = np.where(rate >= 1, 1.0, factor)
        self.looks = np.where((rate >= 1) & (self.looks > 1), 0.0, self.looks)
