"""What sbot stands for in other libraries, and names rebound in every module that holds them.

``from ot.bregman import sinkhorn`` binds the function once more; a swap that sets ``ot.sinkhorn`` alone leaves such bindings
as they were.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: The modules of POT of which something is covered.
POT_MODULES = ("bregman", "unbalanced", "solvers", "batch", "da", "partial")
GEOMLOSS_FUNCTIONS = ("solve", "solve_batch", "solve_sample")


@dataclass(frozen=True)
class Target:
    """A function or class of another library and the one of sbot that stands for it; ``name`` is where it is at home."""

    name: str
    theirs: Any
    mine: Any

    @property
    def root(self) -> str:
        """The package whose modules may hold it."""
        return self.name.partition(".")[0]


def targets(library: str) -> Iterator[Target]:
    """What sbot stands for in "ot", "geomloss" or "geomloss.ot", of what the installed version has."""
    if library == "ot":
        import sbot.compat.pot as pot

        for module in POT_MODULES:
            here, there = getattr(pot, module), importlib.import_module(f"ot.{module}")
            for name in getattr(here, "COVERED", ()):
                if hasattr(there, name):
                    yield Target(f"ot.{module}.{name}", getattr(there, name), getattr(here, name))
        return
    import sbot.compat.geomloss as geomloss

    there = importlib.import_module(library)
    here, names = (geomloss.ot, GEOMLOSS_FUNCTIONS) if library == "geomloss.ot" else (geomloss, ("SamplesLoss",))
    for name in names:
        if hasattr(there, name):
            yield Target(f"{library}.{name}", getattr(there, name), getattr(here, name))


class Bindings:
    """Attributes that were set, to be put back by `undo`."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """``owner.name = value``; an inherited attribute is covered, and uncovered by `undo`."""
        self._undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, value)

    def replace(self, old: Any, new: Any, root: str) -> int:
        """Put ``new`` wherever a module of the package ``root`` holds ``old``; returns the number of places."""
        places = 0
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").partition(".")[0] != root:
                continue
            for key, value in list(vars(module).items()):
                if value is old:
                    self.set(module, key, new)
                    places += 1
        return places

    def undo(self) -> None:
        """Put everything back, the last first."""
        while self._undo:
            owner, name, value = self._undo.pop()
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


_ABSENT = object()


def public_functions(*modules: str) -> dict[str, Any]:
    """The functions that modules name in ``__all__``, by the first name they have."""
    found: dict[str, Any] = {}
    for module in modules:
        there = importlib.import_module(module)
        for name in getattr(there, "__all__", ()):
            value = getattr(there, name, None)
            if inspect.isfunction(value) and not any(value is known for known in found.values()):
                found[f"{module}.{name}"] = value
    return found
