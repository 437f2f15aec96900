"""What a solver is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ..bridge import Bridge
from ..problem import Problem
from ..progress import Progress, reporting

__all__ = ["Progress", "Solver", "reporting"]


@dataclass(frozen=True)
class Solver(ABC):
    """A method with its options; frozen, so that one object serves many problems."""

    @abstractmethod
    def accepts(self, problem: Problem) -> str | None:
        """None, or why this solver cannot take the problem and the way out."""

    @abstractmethod
    def solve(self, problem: Problem, *, init: Bridge | None = None, progress: Any = None) -> Bridge:
        """Solve it.  ``progress`` is None, True for a bar, or a function of `Progress`."""
