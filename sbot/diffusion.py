"""A reference process with a drift of the caller's: simulated, never solved in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from .arrays import as_number
from .costs import Cost
from .errors import InvalidProblem, Unsupported
from .linalg import Eps
from .potentials import Potential, Tilted
from .reference import Process


@final
class Intractable(Cost):
    """The cost of a process whose transition density is not known."""

    def matrix(self, x: Tensor, y: Tensor) -> Tensor:
        raise Unsupported(
            "a non-linear reference has no cost in closed form; use solver=sbot.DSB() or a linear reference"
        )

    def check(self, x: Tensor, y: Tensor) -> None:
        """Nothing to check: it is never evaluated."""


@final
class Diffusion(Process):
    """``dX = drift(t, X) dt + sqrt(eps) noise(t) dW`` with any drift; `DSB` alone takes it.

    Parameters
    ----------
    drift : ``drift(t, x)`` for a number t and points ``(n, *event)``, returns their shape.
    noise : a number > 0, or a function of t that returns one.

    Raises
    ------
    InvalidProblem : a drift that cannot be called, a noise that is not a positive number.

    Examples
    --------
    >>> import torch, sbot
    >>> double_well = sbot.Diffusion(lambda t, x: x - x**3)
    >>> double_well.drift(0.0, torch.tensor([[2.0]]))
    tensor([[-6.]])
    """

    def __init__(self, drift: Callable[[float, Tensor], Tensor], noise: float | Callable[[float], float] = 1.0) -> None:
        if not callable(drift):
            raise InvalidProblem(f"drift is {type(drift).__name__}; give a function drift(t, x), or use sbot.LinearSDE")
        self._drift, self._noise = drift, noise
        for t in (0.0, 0.5, 1.0):
            self.spread(t)

    def cost(self) -> Cost:
        return Intractable()

    def drift(self, t: float, x: Tensor) -> Tensor:
        out = self._drift(t, x)
        if not isinstance(out, Tensor) or out.shape != x.shape or out.dtype != x.dtype:
            said = f"{tuple(out.shape)}, {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
            raise InvalidProblem(
                f"the drift returned {said} for points {tuple(x.shape)}, {x.dtype}; return a tensor like the points"
            )
        return out

    def spread(self, t: float) -> Tensor:
        value: Any = self._noise(t) if callable(self._noise) else self._noise
        number = as_number(value, "noise")
        if not 0 < number < math.inf:
            raise InvalidProblem(f"noise is {number} at t = {t:g}; give a finite number > 0")
        return torch.tensor(number**2, dtype=torch.float64, device="cpu")

    def pull_back(self, psi: Potential, s: float, x: Tensor, eps: Eps) -> Tilted:
        raise Unsupported("a non-linear reference has no tilts in closed form; use solver=sbot.DSB()")

    def push_forward(self, phi: Potential, t: float, y: Tensor, eps: Eps) -> tuple[Tilted, Tensor]:
        raise Unsupported("a non-linear reference has no tilts in closed form; use solver=sbot.DSB()")

    def __repr__(self) -> str:
        return "Diffusion(drift(t, x))"
