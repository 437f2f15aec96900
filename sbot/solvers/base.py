"""What a solver is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

from torch import nn

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


def brief(obj: Any) -> str:
    """A solver or its settings in one line: only what differs from the default, networks and bridges by their kind."""
    if isinstance(obj, (nn.Module, Bridge)):
        return type(obj).__name__
    if isinstance(obj, tuple):
        return "(" + ", ".join(brief(item) for item in obj) + ")"
    if not is_dataclass(obj) or isinstance(obj, type):
        return getattr(obj, "__name__", None) or repr(obj)
    said = []
    for field in fields(obj):
        value = getattr(obj, field.name)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if value is not default and value != default:
            said.append(f"{field.name}={brief(value)}")
    return f"{type(obj).__name__}({', '.join(said)})"
