"""What a solver is, and how it shows its progress."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..bridge import Bridge
from ..errors import InvalidProblem
from ..problem import Problem


@dataclass(frozen=True)
class Progress:
    """Where a solver is: passed to the ``progress`` callback at each check."""

    iteration: int
    eps: float
    error: float
    tolerance: float


@dataclass(frozen=True)
class Solver(ABC):
    """A method with its options; frozen, so that one object serves many problems."""

    @abstractmethod
    def accepts(self, problem: Problem) -> str | None:
        """None, or why this solver cannot take the problem and the way out."""

    @abstractmethod
    def solve(self, problem: Problem, *, init: Bridge | None = None, progress: Any = None) -> Bridge:
        """Solve it.  ``progress`` is None, True for a bar, or a function of `Progress`."""


@contextmanager
def reporting(progress: Any, name: str) -> Iterator[Callable[[Progress], None]]:
    """A function to call at each check: silent, a progress bar, or the caller's own."""
    if progress is None or progress is False:
        yield lambda state: None
    elif callable(progress):
        yield progress
    elif progress is True:
        from tqdm import tqdm

        with tqdm(desc=name, unit="it") as bar:

            def show(state: Progress) -> None:
                bar.set_postfix_str(f"eps {state.eps:.3g}, error {state.error:.1e} -> {state.tolerance:.0e}", False)
                bar.update(state.iteration - bar.n)

            yield show
    else:
        raise InvalidProblem(f"progress is {progress!r}; give None, True for a bar, or a function")
