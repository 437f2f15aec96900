"""Rows to train on: filled by simulation, shuffled, used whole, and kept in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ..arrays import as_count


@final
@dataclass(frozen=True)
class Cache:
    """How simulated paths are kept.

    Parameters
    ----------
    paths : paths simulated at a time.
    reuse : times that each of their rows is used before the next are simulated.
    memory : bytes the rows and their order may take; fewer paths are simulated where they would take more.

    Raises
    ------
    InvalidProblem : a number below 1.

    Examples
    --------
    >>> import sbot
    >>> sbot.Cache(paths=1024, reuse=2).steps(batch=512, rows=1024 * 20)
    80
    """

    paths: int = 4096
    reuse: int = 4
    memory: int = 2**28

    def __post_init__(self) -> None:
        for name in ("paths", "reuse", "memory"):
            as_count(getattr(self, name), name)

    def paths_for(self, steps: int, row_bytes: int) -> int:
        """Paths of ``steps`` steps that fit the memory; at least one."""
        return max(1, min(self.paths, self.memory // max(1, steps * row_bytes)))

    def steps(self, batch: int, rows: int) -> int:
        """Gradient steps until every row was used ``reuse`` times."""
        return max(1, self.reuse * rows // batch)


def shuffled(rows: int, wanted: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``wanted`` row numbers: whole permutations of all rows, one after the other, and a part of the last."""
    parts = []
    left = wanted
    while left > 0:
        parts.append(torch.randperm(rows, generator=generator, device=device, dtype=torch.int32)[:left])
        left -= rows
    return torch.cat(parts)
