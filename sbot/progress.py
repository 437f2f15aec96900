"""How long work shows where it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .errors import InvalidProblem


@dataclass(frozen=True)
class Progress:
    """Where a solver is: passed to the ``progress`` callback at each check.

    ``loss`` is that of the last step where a network is trained; ``total`` the number of iterations where it is known.
    """

    iteration: int
    eps: float
    error: float
    tolerance: float
    loss: float = math.nan
    total: int | None = None


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
                bar.total = state.total  # the bar then knows the time left
                if math.isnan(state.loss):
                    said = f"eps {state.eps:.3g}, error {state.error:.1e} -> {state.tolerance:.0e}"
                else:
                    said = f"loss {state.loss:.4g}, residual {state.error:.1e}"
                bar.set_postfix_str(said, False)
                bar.update(state.iteration - bar.n)

            yield show
    else:
        raise InvalidProblem(f"progress is {progress!r}; give None, True for a bar, or a function")
