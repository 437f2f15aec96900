"""How eps is annealed on the way to a small one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Stages ``(eps_k, tolerance_k)`` from ``start`` down to the problem's eps by ``factor``, the last one exact.

    The potentials of one stage start the next: a large eps moves mass far in few iterations, a small one only refines.
    The early stages are left at a loose tolerance, since the next one undoes their last digits.
    """

    factor: float = 0.25
    tolerance: float = 1e-2

    def stages(self, start: float, eps: float, tolerance: float) -> Iterator[tuple[float, float]]:
        """Equal ratios of at least ``factor`` from about ``start``; one stage where eps is not smaller."""
        steps = max(0, math.ceil(math.log(start / eps) / -math.log(self.factor))) if start > eps else 0
        for k in range(steps, 0, -1):
            yield eps * (start / eps) ** (k / steps), max(self.tolerance, tolerance)
        yield eps, tolerance
