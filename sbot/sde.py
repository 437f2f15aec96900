r"""Time grids, steps of controlled processes, and pinned reference bridges in batches.

Everything here works on flat points ``(n, D)``.  A *control* is a function ``u(t, x)``; it steers a reference,

.. math:: dX = (b(t, X) + R(t)\,u(t, X))\,dt + \sqrt{\varepsilon}\,R(t)\,dW, \qquad R = (B B')^{1/2},

so that the path law it makes has ``KL = E int |u|^2 dt / (2 eps)`` against the reference, whatever the noise.  Backwards,
``Y_s = X_{1-s}`` is steered by a control of its own from the reversed drift ``-b``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from torch import Tensor

from . import linalg
from .arrays import as_count, as_number, as_tensor
from .errors import InvalidProblem, NumericalError
from .reference import LinearReference, Process

Control = Callable[[float, Tensor], Tensor]

#: Times at which pinned bridges are tabulated; a training time is one of them.
TABLE = 512


@final
@dataclass(frozen=True)
class TimeGrid:
    """Where a chain stands: ``0 = t_0 < ... < t_N = 1``.

    Parameters
    ----------
    n : number of steps.
    kind : "uniform"; "linear" or "geometric", sizes that grow from the first step to the last; "symmetric", sizes that
        grow linearly to the middle and shrink again, small at both ends as in the paper of De Bortoli et al. (2021).
    ratio : largest step over smallest.
    least : variance ``eps dt`` of the smallest step, in place of ``ratio``: the paper's ``2 gamma_min``.

    Raises
    ------
    InvalidProblem : ``n < 1``, an unknown kind, or an ``eps`` too small for ``least``.

    Examples
    --------
    >>> from sbot import TimeGrid
    >>> [round(t, 3) for t in TimeGrid(4, "symmetric", ratio=3.0).times(eps=1.0)]
    [0.0, 0.125, 0.5, 0.875, 1.0]
    """

    n: int = 20
    kind: str = "uniform"
    ratio: float = 10.0
    least: float | None = None

    def __post_init__(self) -> None:
        as_count(self.n, "the number of steps")
        if self.kind not in ("uniform", "linear", "geometric", "symmetric"):
            raise InvalidProblem(f"kind is {self.kind!r}; give 'uniform', 'linear', 'geometric' or 'symmetric'")
        if not 1 <= as_number(self.ratio, "ratio") < math.inf:
            raise InvalidProblem(
                f"ratio is {self.ratio}; give a finite number >= 1, the largest step over the smallest"
            )
        if self.least is not None and not 0 < as_number(self.least, "least") < math.inf:
            raise InvalidProblem(f"least is {self.least}; give a variance > 0, or None")
        if self.least is not None and max(self._climb()) == 0:
            raise InvalidProblem(f"all {self.n} steps of kind {self.kind!r} have one size; drop least=")

    def times(self, eps: float) -> list[float]:
        """The times, strictly increasing."""
        climb = self._climb()
        ratio = self.ratio
        if self.least is not None:
            ratio = self._ratio_for(self.least / eps, climb)
        sizes = [self._size(c, ratio) for c in climb]
        total = math.fsum(sizes)
        times = [0.0, *(t / total for t in itertools.accumulate(sizes))]
        times[-1] = 1.0
        if any(b - a <= 1e-7 for a, b in itertools.pairwise(times)):
            raise InvalidProblem(
                f"the steps of {self} become shorter than 1e-7; give a smaller ratio or a larger least"
            )
        return times

    def _climb(self) -> list[float]:
        """How far up each step is, from 0 (smallest) to 1 (largest)."""
        last = self.n - 1
        if self.kind == "uniform" or last == 0:
            return [0.0] * self.n
        if self.kind == "symmetric":
            half = last // 2
            return [min(k, last - k) / half if half else 0.0 for k in range(self.n)]
        return [k / last for k in range(self.n)]

    def _size(self, climb: float, ratio: float) -> float:
        return float(ratio**climb) if self.kind == "geometric" else 1 + (ratio - 1) * climb

    def _ratio_for(self, least: float, climb: list[float]) -> float:
        """The ratio at which the smallest step is ``least``, by bisection on its logarithm."""
        if least * self.n >= 1:
            raise InvalidProblem(
                f"eps is too small for {self.n} steps of variance {self.least:g} and more: they would not fit in [0, 1] "
                "in increasing order; give a smaller least, fewer steps or a larger eps"
            )
        low, high = 0.0, 60.0
        for _ in range(80):
            middle = (low + high) / 2
            smallest = 1 / math.fsum(self._size(c, math.exp(middle)) for c in climb)
            low, high = (middle, high) if smallest > least else (low, middle)
        return math.exp(low)


def as_grid(steps: Any) -> TimeGrid | tuple[float, ...]:
    """A `TimeGrid`, a number of uniform steps, or the times themselves."""
    if isinstance(steps, TimeGrid):
        return steps
    if isinstance(steps, (int,)) and not isinstance(steps, bool):
        return TimeGrid(as_count(steps, "steps"))
    if isinstance(steps, (str, bytes, float, bool)) or steps is None:
        raise InvalidProblem(f"steps is {steps!r}; give a number of steps, a sbot.TimeGrid, or the times from 0 to 1")
    like = torch.zeros((), dtype=torch.float64, device="cpu")
    times = as_tensor(steps, "steps", like=like).double().flatten().tolist()
    if len(times) < 2 or times[0] != 0 or times[-1] != 1 or any(b - a <= 1e-7 for a, b in itertools.pairwise(times)):
        raise InvalidProblem(f"steps are the times {times}; give strictly increasing times from 0 to 1")
    return tuple(times)


def grid_times(grid: TimeGrid | Sequence[float], eps: float) -> list[float]:
    """The times of what `as_grid` returned."""
    return grid.times(eps) if isinstance(grid, TimeGrid) else list(grid)


def drift_of(process: Process, t: float, x: Tensor, event: tuple[int, ...]) -> Tensor:
    """Drift of the reference at flat points; a function of the caller's sees them in their own shape."""
    if isinstance(process, LinearReference):
        return process.drift(t, x)
    return process.drift(t, x.reshape(-1, *event)).reshape(x.shape)


@dataclass(frozen=True)
class _Step:
    start: float
    end: float
    ahead: Tensor  # flow of the reference over the step, and back
    behind: Tensor
    shift: Tensor
    root: Tensor  # square root of its noise covariance / eps


@final
class Chain:
    """A process in steps: exact where nothing steers and the reference is linear, Euler-Maruyama in the control.

    One step forward has mean ``Phi x + c + sqrt(dt) S u`` and noise ``sqrt(eps) S z``, with ``Phi, c, S^2`` the flow, shift
    and noise covariance of the reference over the step; backwards the flow is inverted and the noise the same.
    """

    def __init__(
        self, process: Process, times: Sequence[float], eps: float, like: Tensor, event: tuple[int, ...]
    ) -> None:
        self.process, self.times, self.eps, self.event = process, list(times), eps, event
        self._steps = [self._make(s, t, like) for s, t in itertools.pairwise(times)]

    def __len__(self) -> int:
        return len(self._steps)

    def _make(self, s: float, t: float, like: Tensor) -> _Step:
        if isinstance(self.process, LinearReference):
            law = self.process.transition(s, t)
            parts = law.phi, linalg.inverse(law.phi), law.shift, linalg.root(law.cov)
        else:  # frozen at the start of the step
            one = torch.ones((), dtype=torch.float64, device="cpu")
            parts = one, one, 0 * one, linalg.root((t - s) * self.process.spread(s))
        return _Step(s, t, *(part.to(like) for part in parts))

    def dt(self, k: int) -> float:
        """Length of step k."""
        return self._steps[k].end - self._steps[k].start

    def time(self, k: int, direction: int) -> float:
        """Where step k starts, for one who goes in ``direction``."""
        return self._steps[k].start if direction > 0 else self._steps[k].end

    def order(self, direction: int) -> range:
        """The steps in the order in which they are taken."""
        return range(len(self)) if direction > 0 else range(len(self) - 1, -1, -1)

    def base(self, k: int, x: Tensor, direction: int) -> Tensor:
        """Mean of step k where nothing steers."""
        step = self._steps[k]
        if not isinstance(self.process, LinearReference):
            move = (step.end - step.start) * drift_of(self.process, self.time(k, direction), x, self.event)
            return x + move if direction > 0 else x - move
        if direction > 0:
            return linalg.apply(step.ahead, x) + step.shift
        return linalg.apply(step.behind, x - step.shift)

    def push(self, k: int, u: Tensor) -> Tensor:
        """What a control adds to the mean of step k."""
        return linalg.apply(self._steps[k].root, math.sqrt(self.dt(k)) * u)

    def unpush(self, k: int, move: Tensor) -> Tensor:
        """The control that adds ``move``."""
        return linalg.apply(linalg.inverse(self._steps[k].root), move) / math.sqrt(self.dt(k))

    def noise(self, k: int, z: Tensor, direction: int = 1) -> Tensor:
        """The noise of step k from a standard normal ``z``: of the reference, or backwards of its undone flow."""
        shake = linalg.apply(self._steps[k].root, math.sqrt(self.eps) * z)
        return shake if direction > 0 else linalg.apply(self._steps[k].behind, shake)

    def heun(self, k: int, x: Tensor, guess: Tensor, u: Tensor, u_guess: Tensor, direction: int) -> Tensor:
        """Second-order mean of step k: the drift averaged over both its ends (Heun; weak order 2 for additive noise)."""
        step, dt = self._steps[k], self.dt(k)
        near, far = self.time(k, direction), self.time(k, -direction)
        roots = [linalg.root(self.process.spread(t)).to(x) for t in (near, far)]
        if not isinstance(self.process, LinearReference):
            slopes = [
                direction * drift_of(self.process, t, place, self.event) + linalg.apply(root, v)
                for t, place, root, v in zip((near, far), (x, guess), roots, (u, u_guess), strict=True)
            ]
            return x + dt / 2 * (slopes[0] + slopes[1])
        carried = linalg.apply(step.ahead if direction > 0 else step.behind, linalg.apply(roots[0], u))
        return self.base(k, x, direction) + dt / 2 * (carried + linalg.apply(roots[1], u_guess))


def walk(
    chain: Chain,
    control: Control,
    x: Tensor,
    direction: int,
    *,
    generator: torch.Generator | None = None,
    order: int = 1,
    noise: Callable[[int], Tensor] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Take all steps from ``x``; yields ``(k, x before, mean, x after)`` for each.

    ``order`` 1 is Euler-Maruyama, 2 is Heun; the last step is always Euler's, since a drift may be infinite at its far end.
    ``noise(k)`` may give the standard normals.  Raises `NumericalError` where the points leave the finite numbers.
    """
    steps = chain.order(direction)
    for k in steps:
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) if noise is None else noise(k)
        shake = chain.noise(k, z, direction if order == 2 else 1)
        u = control(chain.time(k, direction), x)
        mean = chain.base(k, x, direction) + chain.push(k, u)
        if order == 2 and k != steps[-1]:
            guess = mean + shake
            mean = chain.heun(k, x, guess, u, control(chain.time(k, -direction), guess), direction)
        after = mean + shake
        yield k, x, mean, after
        x = after
    if not bool(torch.isfinite(x).all()):
        raise NumericalError("a simulated path left the finite numbers; give more steps, or clip= and a smaller lr")


@final
@dataclass(frozen=True)
class Pull:
    r"""The control at time t of a reference pinned at one end: ``gain (there end + shift - here x)``.

    With the law ``N(Phi x + c, eps Q)`` of the transition from t to 1 it is ``R Phi' Q^-1 (x1 - Phi x - c)``; backwards, with
    that from 0 to t, ``R Q^-1 (Phi x0 + c - x)``.  For Brownian motion ``(x1 - x) / (1 - t)`` and ``(x0 - x) / t``.
    ``size`` is the mean square of its noise where both ends are pinned.
    """

    gain: Tensor
    there: Tensor
    shift: Tensor
    here: Tensor
    size: Tensor

    @classmethod
    def at(cls, reference: LinearReference, eps: float, t: float, direction: int) -> Pull:
        """For one time, which is not that of the end pulled to."""
        root, one = linalg.root(reference.spread(t)), torch.ones((), dtype=torch.float64, device="cpu")
        law = reference.transition(t, 1.0) if direction > 0 else reference.transition(0.0, t)
        precision = linalg.inverse(law.cov)
        if direction > 0:
            gain = linalg.compose(root, linalg.compose(linalg.transpose(law.phi), precision))
            there, shift, here = one, -law.shift, law.phi
        else:
            gain, there, shift, here = linalg.compose(root, precision), law.phi, law.shift, one
        moved = linalg.compose(gain, here)
        spread = eps * reference.pin(0.0, t).cov if 0 < t < 1 else 0 * law.cov
        noise = linalg.compose(linalg.compose(moved, spread), linalg.transpose(moved))
        return cls(gain, there, shift, here, noise if noise.ndim == 0 else noise.diagonal().mean())

    def to(self, like: Tensor) -> Pull:
        """In the dtype and on the device of ``like``."""
        return Pull(*(getattr(self, field.name).to(like) for field in fields(self)))

    def __call__(self, x: Tensor, end: Tensor) -> Tensor:
        """The control at points ``x``."""
        left = linalg.apply(self.there, end) + self.shift - linalg.apply(self.here, x)
        return linalg.apply(self.gain, left)


@final
class PinnedTable:
    """Bridges of a linear reference at many times at once, and the controls they ask for.

    At time k, ``X_t | x0, x1 ~ N(near x0 + far x1 + shift, eps V)``; the controls are those of `Pull`.
    """

    def __init__(self, reference: LinearReference, eps: float, like: Tensor) -> None:
        times = [(k + 0.5) / TABLE for k in range(TABLE)]
        self.times = torch.tensor(times, dtype=like.dtype, device=like.device)
        rows = [self._row(reference, eps, t) for t in times]
        names = rows[0].keys()
        self._tables = {name: torch.stack([row[name] for row in rows]).to(like) for name in names}

    @staticmethod
    def _row(reference: LinearReference, eps: float, t: float) -> dict[str, Tensor]:
        pin = reference.pin(0.0, t)
        row = {"near": pin.near, "far": pin.far, "shift": pin.shift, "root": linalg.root(eps * pin.cov)}
        for name, way in (("ahead", 1), ("behind", -1)):
            pull = Pull.at(reference, eps, t, way)
            row |= {f"{part.name}_{name}": getattr(pull, part.name) for part in fields(pull)}
        return row

    def _apply(self, name: str, k: Tensor, x: Tensor) -> Tensor:
        op = self._tables[name][k]
        return op[:, None] * x if op.ndim == 1 else torch.einsum("nij,nj->ni", op, x)

    def _shift(self, name: str, k: Tensor) -> Tensor:
        shift = self._tables[name][k]
        return shift[:, None] if shift.ndim == 1 else shift

    def place(self, k: Tensor, x0: Tensor, x1: Tensor, z: Tensor) -> Tensor:
        """A draw of ``X_t`` between the ends, from standard normals ``z``."""
        mean = self._apply("near", k, x0) + self._apply("far", k, x1) + self._shift("shift", k)
        return mean + self._apply("root", k, z)

    def target(self, k: Tensor, x: Tensor, end: Tensor, direction: int) -> tuple[Tensor, Tensor]:
        """The control towards ``end``, and the mean square ``(n,)`` of the noise in it."""
        name = "ahead" if direction > 0 else "behind"
        left = (
            self._apply(f"there_{name}", k, end) + self._shift(f"shift_{name}", k) - self._apply(f"here_{name}", k, x)
        )
        return self._apply(f"gain_{name}", k, left), self._tables[f"size_{name}"][k]
