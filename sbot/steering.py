"""Controls: what steers a reference in one direction, from a bridge, a score or a network."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from . import linalg
from .bridge import Bridge
from .neural.nets import Directed
from .reference import Process
from .sde import drift_of


class Base(ABC):
    """A control that is known before any training, in one direction."""

    @abstractmethod
    def __call__(self, t: float, x: Tensor) -> Tensor:
        """At a time and flat points ``(n, D)``."""

    @abstractmethod
    def to(self, like: Tensor) -> Base:
        """On the dtype and device of ``like``."""


@final
class BridgeBase(Base):
    """The control of another bridge."""

    def __init__(self, bridge: Bridge, process: Process, direction: int) -> None:
        self.bridge, self.process, self.direction = bridge, process, direction

    def __call__(self, t: float, x: Tensor) -> Tensor:
        event = self.bridge.problem.mu.event_shape
        drift = self.bridge.drift if self.direction > 0 else self.bridge.reverse_drift
        move = drift(t, x.reshape(-1, *event)).reshape(x.shape)
        move = move - self.direction * drift_of(self.process, t, x, event)
        return linalg.apply(linalg.inverse(linalg.root(self.process.spread(t))).to(x), move)

    def to(self, like: Tensor) -> BridgeBase:
        return BridgeBase(self.bridge.to(dtype=like.dtype, device=like.device), self.process, self.direction)


@final
class EquilibriumBase(Base):
    """The backward control ``2 R^-1 b`` that turns the reversed drift ``-b`` into ``b``.

    A reference in equilibrium runs backwards as it runs forwards.  The reversed drift of one that confines its points
    drives them to infinity, where no network has learned to hold them back.
    """

    def __init__(self, process: Process, event: tuple[int, ...]) -> None:
        self.process, self.event = process, event

    def __call__(self, t: float, x: Tensor) -> Tensor:
        own = drift_of(self.process, t, x, self.event)
        return linalg.apply(2 * linalg.inverse(linalg.root(self.process.spread(t))).to(x), own)

    def to(self, like: Tensor) -> EquilibriumBase:
        return self


@final
class ScoreBase(Base):
    """The backward control ``eps R score(x, t)`` of a score network of the reference started at mu."""

    def __init__(self, score: nn.Module, process: Process, eps: float, event: tuple[int, ...]) -> None:
        self.score, self.process, self.eps, self.event = score, process, eps, event

    def __call__(self, t: float, x: Tensor) -> Tensor:
        times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        said = self.score(x.reshape(-1, *self.event), times).reshape(x.shape).to(x.dtype)
        return linalg.apply(self.eps * linalg.root(self.process.spread(t)).to(x), said)

    def to(self, like: Tensor) -> ScoreBase:
        return ScoreBase(copy.deepcopy(self.score).to(like), self.process, self.eps, self.event)


@final
class Steering:
    """A control in one direction: what a base says, plus what a network adds; with neither it is the reference itself.

    ``direction`` is +1 or -1.  Called with a time and flat points ``(n, D)``.
    """

    def __init__(self, direction: int, base: Base | None, net: Directed | None) -> None:
        self.direction, self.base, self.net = direction, base, net

    def __call__(self, t: float, x: Tensor) -> Tensor:
        if self.net is None:
            return self.underlying(t, x)
        times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        said: Tensor = self.net(x, times, torch.full_like(times, float(self.direction)))
        return said if self.base is None else said + self.underlying(t, x)

    def underlying(self, t: float, x: Tensor) -> Tensor:
        """The control of the base alone; zero where there is none."""
        return torch.zeros_like(x) if self.base is None else self.base(t, x)

    def to(self, like: Tensor) -> Steering:
        """A copy on the dtype and device of ``like``."""
        base = None if self.base is None else self.base.to(like)
        return Steering(self.direction, base, None if self.net is None else copy.deepcopy(self.net).to(like))
