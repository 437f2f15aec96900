"""How eps is annealed on the way to a small one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from torch import Tensor

from ..arrays import as_number
from ..errors import InvalidProblem
from ..linalg import Eps


@final
@dataclass(frozen=True)
class Schedule:
    """Stages ``(eps_k, tolerance_k)`` from ``start`` down to the problem's eps by ``factor``, the last one exact.

    The potentials of one stage start the next: a large eps moves mass far in few iterations, a small one only refines.
    The early stages are left at a loose tolerance, since the next one undoes their last digits.

    Parameters
    ----------
    factor : ratio of one eps to the one before, in (0, 1).
    tolerance : marginal error at which a stage before the last is left, > 0.

    Examples
    --------
    >>> import sbot
    >>> [round(eps, 3) for eps, _ in sbot.Schedule(factor=0.5).stages(4.0, 1.0, 1e-9)]
    [4.0, 2.0, 1.0]
    """

    factor: float = 0.25
    tolerance: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 < as_number(self.factor, "factor") < 1 or not 0 < as_number(self.tolerance, "tolerance") < math.inf:
            raise InvalidProblem(f"{self!r} is no schedule; give 0 < factor < 1 and a finite tolerance > 0")

    def stages(self, start: Eps, eps: Eps, tolerance: float) -> Iterator[tuple[Eps, float]]:
        """Equal ratios of ``factor`` (to a hundredth of a stage) or more, from about ``start``; one where eps is not smaller.

        Of a batch with an eps ``(*b,)`` each problem has ratios of its own, and as many stages as the one that needs most.
        """
        ratio = start / eps
        ratio = ratio.clamp(min=1.0) if isinstance(ratio, Tensor) else ratio
        top = float(ratio.max()) if isinstance(ratio, Tensor) else ratio
        # not a stage more for what is rounding of the mean cost
        steps = math.ceil(math.log(top) / -math.log(self.factor) - 1e-2) if top > 1 else 0
        for k in range(steps, 0, -1):
            yield eps * ratio ** (k / steps), max(self.tolerance, tolerance)
        yield eps, tolerance
