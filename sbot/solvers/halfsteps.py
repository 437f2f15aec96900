"""The state of a Sinkhorn solve, and three ways to improve it, each a small object.

The state is the potential g: f is always its half-step, so that the marginal of mu is exact (the relaxed one too) and the
error is nu's.  One pass over the kernel gives f, the masses of rows and columns and, where there is room, the conditional
laws of the plan, on which `HalfSteps` and `newton.Newton` work until the next pass.  Passes are in the log domain and in the
problem's precision; what is worked out between them is only a proposal for g.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import linalg
from ..kernels import FLOOR, Conditionals, LogKernel, same
from ..linalg import Eps, along
from ..pace import TINY, Pace
from ..partial import capped, masses, support, violation
from ..relaxed import damping, dual_term, target_weights
from .scalings import Bounded, Hard, Relaxed

#: after a look at the error: total iterations so far and the error; returns whether to stop
Check = Callable[[int, float], bool]
#: from the masses that columns lack and the half-step that would be taken, in units of eps: a better step
Correct = Callable[[Tensor, Tensor], Tensor]

#: Largest change of a potential, in units of eps, that a model which leaves small entries out is trusted with.
TRUST = 8.0
#: The same for a model with all entries: what single precision can hold.
RANGE = 50.0
#: Growth of the error over its least, at which accelerated passes start again from there.
GROWN = 3.0
#: Passes without a new best after which the correction between cells is given up, as it is where the error has grown so.
PATIENCE = 8
#: Marginal error above which the rounding of a model in single precision is not noticed.
NOTICED = 1e-4
#: Marginal error below which it would say nothing, where it is not `near`.
ROUNDED = 3e-7

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class State:
    """The problem and where the iteration is; potentials in cost units, ``(*b, n)`` and ``(*b, m)``.

    ``eps`` is a number, or ``(*b,)``.  ``slack`` says how many times looser the tolerance of each problem is than that of the
    solve, ``(*b,)``: errors are measured in it.  ``tolerance`` is the error to stop at.  ``model`` is where the conditional laws
    are kept, None where iterations stream.  ``rows`` and ``columns`` are the masses of the plan, in float64; ``fresh`` says
    whether they are those of the present g, ``known`` whether the model is; ``roomless`` is the smallest eps at which there was
    no room for one.  ``correct`` improves a half-step where iterations stream, see `cells.Correction`; ``stiff`` remembers that
    conjugate gradients did not do.  ``mass`` is what a partial plan carries, ``(*b,)``; ``lse`` and ``height`` are then what its
    pass found, and ``f / eps``, in float64; ``caps`` are the last ones of f and g, ``(*b, 1)``, in units of eps.
    """

    kernel: LogKernel
    a: Tensor
    b: Tensor
    rho: tuple[float, float]
    g: Tensor
    model: Conditionals | None = None
    eps: Eps = 1.0
    slack: Eps = 1.0
    tolerance: float = 0.0
    iterations: int = 0
    passes: int = 0
    roomless: float = math.inf
    stiff: bool = False
    correct: Correct | None = None
    mass: Tensor | None = None
    f: Tensor = field(init=False)
    rows: Tensor = field(init=False)
    columns: Tensor = field(init=False)
    lse: Tensor = field(init=False)
    height: Tensor = field(init=False)
    caps: tuple[Tensor | None, Tensor | None] = field(init=False, default=(None, None))
    known: bool = field(init=False, default=False)
    fresh: bool = field(init=False, default=False)
    #: what was worked out, and of what: asked for several times between two steps
    _kept: dict[str, tuple[tuple[Any, ...], Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.log_a, self.log_b, self.f = self.a.log(), self.b.log(), torch.zeros_like(self.a)
        self.zeros = min(float(self.a.min()), float(self.b.min())) <= 0

    @cached_property
    def live(self) -> tuple[Tensor, Tensor]:
        """Which atoms have weight."""
        return self.a > 0, self.b > 0

    @property
    def unit(self) -> Eps:
        """``eps`` as potentials are measured in it."""
        return along(self.eps, 1)

    @property
    def largest(self) -> float:
        """The largest eps of a batch."""
        return float(self.eps.max()) if isinstance(self.eps, Tensor) else self.eps

    @property
    def damp(self) -> tuple[Eps, Eps]:
        """``lambda = rho / (rho + eps)`` of both sides."""
        return damping(self.rho[0], self.unit), damping(self.rho[1], self.unit)

    def settle(self, keep_model: bool = True) -> None:
        """One pass: ``f = -lambda eps log sum_j b_j exp((g_j - C_ij) / eps)`` and the plan's masses at (f, g)."""
        lam = self.damp[0]
        keep, room = None, None
        self.known = False
        if self.model is not None:
            room = self.model.room
            # the smaller eps, the fewer entries: what had no room may have it at half the eps
            if keep_model and self.largest <= self.roomless / 2:
                keep = self.model.keep
            if keep is not None or room is not None:  # where a pass is made whatever becomes of it
                self.model.open()
        bias, rows = self.log_b + self.g / self.unit, self.a
        if self.mass is None:
            seen = self.kernel.conditionals(bias, self.eps, rows, 1 - lam, keep, room)
        elif self.kernel.whole:
            seen = self.kernel.conditionals(bias, self.eps, self._filled, 0, keep, room)
        else:
            # the cap depends on all rows: their sums first
            rows = self._filled(self.kernel.reduce(bias, self.eps)[0])
            seen = self.kernel.conditionals(bias, self.eps, rows, 0, keep, room)
            self.passes += 1
        if self.model is not None and keep is not None:
            self.known = self.model.close(seen, bias)
            self.roomless = self.roomless if self.known else self.largest
        f = -lam * self.unit * seen.lse
        if self.mass is not None:
            f = (self.unit * self.height).to(self.a)
        # an atom of zero weight may have only forbidden pairs: its potential is infinite and of no consequence
        self.f = torch.where(self.live[0], f, 0.0) if self.zeros else f
        self.rows, self.columns = seen.rows.double(), seen.columns
        self.passes += 1
        self.fresh = True

    def _filled(self, lse: Tensor) -> Tensor:
        """The row masses of a partial plan."""
        assert self.mass is not None
        self.lse = lse.double()
        self.height = self.lower(self.lse)
        return masses(self.log_a, self.lse, self.mass, self.height).to(self.a)

    def take(self, index: Tensor) -> State:
        """These problems of a batch, ``(k,)``, settled."""
        kernel = self.kernel.take(index)
        model = None if self.model is None else self.model.like(kernel)
        eps, slack = (part[index] if isinstance(part, Tensor) else part for part in (self.eps, self.slack))
        part = State(kernel, self.a[index], self.b[index], self.rho, self.g[index], model, eps, slack, self.tolerance)
        part.iterations = self.iterations
        part.mass = None if self.mass is None else self.mass[index]
        part.settle()
        return part

    def put(self, index: Tensor, part: State) -> None:
        """Take over the solutions of these problems."""
        for name in ("f", "g", "rows", "columns"):
            getattr(self, name)[index] = getattr(part, name)
        self.iterations, self.passes = part.iterations, self.passes + part.passes
        self.known = False  # the model is that of before
        self._kept.clear()

    def _once(self, name: str, what: Callable[[], Tensor], *of: Any) -> Tensor:
        """``what()``, where it has not been worked out of the same tensors before."""
        if name not in self._kept or any(one is not two for one, two in zip(self._kept[name][0], of, strict=True)):
            self._kept[name] = of, what()
        return self._kept[name][1]

    def goal(self) -> Tensor:
        """What the columns should sum to: b, or ``b e^{-g / rho}`` where nu is relaxed.

        In a partial plan it is what a half-step makes of them.
        """
        return self._once("goal", self._goal, self.columns, self.g, self.eps, self.caps[1])

    def _goal(self) -> Tensor:
        if self.mass is not None:
            lse = self.columns.log() - self.log_b - self.g.double() / self.unit
            return masses(self.log_b, lse, self.mass, capped(self.log_b, lse, self.mass, self.caps[1]))
        return target_weights(self.b.double(), self.g.double(), self.rho[1], self.zeros)

    def log_goal(self) -> Tensor:
        """The logarithm of `goal`, which underflows where an atom of a relaxed nu is too far to be worth any mass."""
        if self.mass is not None or math.isinf(self.rho[1]):
            return self.goal().log()
        return self.log_b.double() - self.g.double() / self.rho[1]

    def errors(self) -> Tensor:
        """Relative L1 distance of nu's marginal from its target, ``(*b,)``, in units of ``slack``.

        Of a partial plan, the distance from what its bounds allow.
        """
        return self._once("errors", self._errors, *self._of_errors)

    def _errors(self) -> Tensor:
        errors = self.distance(self.columns)
        return errors / self.slack if isinstance(self.slack, Tensor) else errors

    @property
    def _of_errors(self) -> tuple[Any, ...]:
        return self.columns, self.g, self.eps, self.slack

    def distance(self, columns: Tensor, log_v: Tensor | float = 0.0) -> Tensor:
        """`errors` at other masses, as they are; of a partial plan with g moved by ``eps log_v``."""
        if self.mass is None:
            return relative(columns, self.goal())
        height = self.g.double() / self.unit + log_v
        return violation(columns, self.b.double(), height, self.mass)

    def error(self) -> float:
        """The worst of a batch."""
        return float(self.errors().max())

    def worst(self, tolerance: float) -> tuple[float, float]:
        """The true error and tolerance of the problem that is furthest from its tolerance."""
        errors = self.errors()
        if not isinstance(self.slack, Tensor):
            return self.error() * self.slack, tolerance * self.slack
        slack = self.slack.expand(errors.shape).flatten()
        k = int(errors.argmax())
        return float(errors.flatten()[k] * slack[k]), float(tolerance * slack[k])

    @property
    def sunk(self) -> Tensor:
        """Columns whose mass is below what a pass can tell."""
        return self.columns <= 2 ** (FLOOR[self.a.dtype] + 1) * self.rows.sum(-1, keepdim=True)

    def lift(self, log_columns: Tensor) -> Tensor:
        """``g / eps`` of a partial plan after its half-step, float64, from the columns' masses."""
        assert self.mass is not None
        height = capped(self.log_b, log_columns - self.log_b - self.g.double() / self.unit, self.mass, self.caps[1])
        self.caps = self.caps[0], height.amax(-1, keepdim=True)
        return height

    def lower(self, lse: Tensor) -> Tensor:
        """``f / eps`` of a partial plan after its half-step, float64."""
        assert self.mass is not None
        height = capped(self.log_a, lse, self.mass, self.caps[0])
        self.caps = height.amax(-1, keepdim=True), self.caps[1]
        return height

    def rise(self, log_columns: Tensor) -> Tensor:
        """What the half-step of a partial plan adds to ``g / eps``."""
        return self.lift(log_columns) - self.g.double() / self.unit

    def move(self, log_v: Tensor) -> None:
        """``g += eps log_v``."""
        g = linalg.plus(self.g, self.unit, log_v.to(self.g))
        self.g = torch.where(self.live[1], g, 0.0) if self.zeros else g
        self.fresh = self.known = False

    def land(self, log_u: Tensor, rows: Tensor, columns: Tensor, errors: Any = None) -> None:
        """``f += eps log_u``, the half-step of the present g, and the plan's masses there, and its errors where they are known.

        It is as good as a pass.
        """
        f = linalg.plus(self.f, self.unit, log_u.to(self.f))
        self.f = torch.where(self.live[0], f, 0.0) if self.zeros else f
        self.rows, self.columns, self.fresh = rows, columns, True
        if errors is not None:
            self._kept["errors"] = self._of_errors, torch.as_tensor(errors, dtype=torch.float64, device=columns.device)

    def translate(self) -> None:
        """Move a constant between f and g to the dual optimum (Sejourne, Vialard and Peyre 2022); relaxed problems only.

        Half-steps move this direction by a factor ``rho / (rho + eps)`` at a time, which is hardly at all for small eps.
        """
        shift = self.imbalance(self.g)
        self.f, self.g = self.f + shift, self.g - shift

    def imbalance(self, g: Tensor) -> Tensor:
        """The constant that `translate` would move from ``g`` to f, ``(*b, 1)``; 0 where both sides are hard."""
        rho_a, rho_b = self.rho
        if math.isinf(rho_a) and math.isinf(rho_b):
            return torch.zeros_like(g[..., :1])
        left = self.log_a - self.f / rho_a
        right = self.log_b - g / rho_b
        weight = 1 / ((0 if math.isinf(rho_a) else 1 / rho_a) + (0 if math.isinf(rho_b) else 1 / rho_b))
        return weight * (left.logsumexp(-1, keepdim=True) - right.logsumexp(-1, keepdim=True))

    def dual(self) -> Tensor:
        """The dual objective up to a constant, ``(*b,)``, in float64."""
        total = -self.eps * self.rows.sum(-1)
        for weights, potential, rho in ((self.a, self.f, self.rho[0]), (self.b, self.g, self.rho[1])):
            live = torch.where(weights > 0, potential, 0.0).double()
            if self.mass is not None:
                total = total + support(live, weights.double(), self.mass)
                continue
            total = total + (weights.double() * dual_term(live, rho)).sum(-1)
        return total

    def centre(self) -> None:
        """Share the constant so that ``<a, f>`` and ``<b, g>`` are equal: swapping mu and nu then swaps f and g."""
        if self.rho != (math.inf, math.inf):
            return
        sides = (self.a, self.f), (self.b, self.g)
        if self.mass is None:
            means = [(w * torch.where(w > 0, p, 0.0)).sum(-1) / w.sum(-1) for w, p in sides]
        else:
            means = [support(p, w, self.mass) / self.mass.to(p) for w, p in sides]
        shift = (means[1] - means[0]) / 2
        self.f, self.g = self.f + shift[..., None], self.g - shift[..., None]


def relative(columns: Tensor, goal: Tensor) -> Tensor:
    """Relative L1 distance over the last dimension."""
    return torch.linalg.vector_norm(columns - goal, 1, -1) / goal.sum(-1).clamp(min=TINY)


class Step(ABC):
    """A way from one settled state to a better one."""

    #: what the report counts
    name: str

    @abstractmethod
    def advance(self, state: State, most: int, check: Check) -> bool:
        """Move ``state.g`` by at most ``most`` iterations, of one product, or pass, on each side; whether ``check`` said stop."""


class Exact(Step):
    """A half-step on each side from what the pass found: needs no model, and is safe wherever the numbers are.

    Several in a row are accelerated by Anderson's method: the next g is that combination of the last ones whose residuals
    ``log(goal / columns)``, weighted by the goal, nearly cancel.  Where the error has grown, it goes back to the best and
    takes some plain steps.
    """

    name = "passes"

    def __init__(self, memory: int = 5) -> None:
        self.memory = memory
        self._past: list[tuple[Tensor, Tensor]] = []
        self._best: tuple[float, tuple[Tensor, Tensor]] | None = None
        self._plain = self._waited = 0
        self._loose: tuple[Tensor, Tensor] | None = None

    def advance(self, state: State, most: int, check: Check) -> bool:
        goal, columns, error = state.goal(), state.columns, state.error()
        lost = state.sunk & state.live[1]
        if state.mass is not None:
            # at the cap of a partial plan a column may have no mass to speak of
            lost = lost & (state.g < state.g.amax(-1, keepdim=True) - state.unit)
        if sunk := bool(lost.any()):
            # an atom of nu that underflowed in every row: its sums are to be had in the log domain only
            lse = state.kernel.T.reduce(state.log_a + state.f / state.unit, state.eps)[0]
            log_columns = state.log_b.double() + (state.g / state.unit + lse).double()
        else:
            log_columns = columns.log()
        here = state.g.double() / state.unit
        wanted = state.damp[1] * (state.log_goal() - log_columns) if state.mass is None else state.rise(log_columns)
        rest = torch.where(state.live[1], wanted, 0.0)
        grown = self._best is not None and error > GROWN * self._best[0]
        if state.correct is not None and (grown or self._waited >= PATIENCE):
            state.correct, self._past, self._best, grown = None, [], None, False
        if state.correct is not None and not sunk:
            rest = state.correct(goal - columns, rest)
        else:
            rest = rest - state.imbalance((state.unit * (here + rest)).to(state.g)).double() / state.unit
        self._plain = max(0, self._plain - 1)
        if sunk or self._plain or self._turned(state, here + rest):
            self._past = []
        self._past = [*self._past, (here, rest)][-1 - self.memory :]
        if self._best is None or error < self._best[0]:
            self._best, self._waited = (error, (here, rest)), 0
        elif grown and not self._plain:
            self._past, self._plain = [self._best[1]], 2 * self.memory
        self._waited += 1
        step = self._mixed(goal) - here
        if self._loose is not None:
            # nothing above the cap of a partial plan
            top = torch.where(self._loose[1], here + step, -torch.inf).amax(-1, keepdim=True)
            step = torch.minimum(here + step, top) - here
        if state.rho == (math.inf, math.inf):
            # the error does not see a constant, which would grow until it costs digits
            step = step - ((goal * step).sum(-1) / goal.sum(-1))[..., None]
        state.move(step)
        state.iterations += 1
        return False

    def _turned(self, state: State, lifted: Tensor) -> bool:
        """Whether other atoms are at the caps of a partial plan than a step ago: what was smooth is not."""
        if state.mass is None:
            return False
        high = torch.where(state.live[1], lifted, -torch.inf)
        loose = tuple(part >= part.amax(-1, keepdim=True) for part in (state.height, high))
        before, self._loose = self._loose, (loose[0], loose[1])
        return before is None or any(not torch.equal(one, two) for one, two in zip(before, loose, strict=True))

    def _mixed(self, goal: Tensor) -> Tensor:
        here, rest = self._past[-1]
        if len(self._past) == 1:
            return here + rest
        weight = goal.sqrt()[..., None]
        moves = torch.stack([here - g for g, _ in self._past[:-1]], -1)
        changes = torch.stack([rest - r for _, r in self._past[:-1]], -1)
        seen = weight * changes
        gram = seen.mT @ seen
        ridge = 1e-10 * gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + torch.finfo(gram.dtype).tiny
        gram = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        share = torch.linalg.solve(gram, seen.mT @ (weight * rest[..., None]))
        return here + rest - ((moves + changes) @ share)[..., 0]


class HalfSteps(Step):
    """Half-steps as matrix-vector products with the model: ten times cheaper than passes.

    The scalings u, v multiply ``e^{f/eps}`` and ``e^{g/eps}``.  Near the solution only what they change is worked out, as
    ``1 + K (v - 1)``, so that ``u = v = 1`` is exact: the error of the model vanishes with the steps.  A model that lacks
    nothing is as good as a pass, and none follows where the last half-step was one.
    """

    name = "half-steps"
    #: iterations between two looks at the error, at most: the first two come sooner, and one where it is foreseen to be met
    every = 4
    #: of the tolerance, what is waited for: results have a digit more than is asked for
    beyond = 0.1

    def __init__(self) -> None:
        self._pace: Pace | None = None

    @property
    def fall(self) -> float:
        """By how much the logarithm of the error fell in each of the last iterations."""
        return 0.0 if self._pace is None else self._pace.fall

    def advance(self, state: State, most: int, check: Check) -> bool:
        # arrays would warn of what tensors bear
        with np.errstate(all="ignore"):
            return self._advance(state, most, check)

    def _advance(self, state: State, most: int, check: Check) -> bool:
        model = state.model
        assert model is not None
        bounded = state.mass is not None
        pace, near = self._paced(state), _near(state)
        omega = pace.omega
        # what follows is the same for tensors and arrays
        products, as_vector, as_tensor = (model, same, same) if bounded else model.products()
        weights, goal, columns = as_vector(state.rows), as_vector(state.goal()), as_vector(state.columns) + TINY
        kind = Bounded if bounded else Hard if state.rho == (math.inf, math.inf) else Relaxed
        aim: Hard = kind(state, goal, as_vector)
        u, v, sums = as_vector(torch.ones_like(state.rows)), as_vector(torch.ones_like(state.columns)), weights
        found, lacking = columns, _lacking(state, near)
        done, seen, due, stop, spread, worst = 0, 0, 2, False, 0.0, math.inf
        while done < most and not stop:
            look = done + 1 >= min(due, most)
            v = aim.raise_columns(v, columns, omega)
            sums = _sums(products, v, near)
            # where the error is looked at, f is exact as everywhere else
            u, v, sums = aim.raise_rows(u, v, sums, None if look else omega)
            columns = _columns(products, u, weights, found, near, lacking)
            done += 1
            if look:
                low, high = aim.range(v)
                if not 0 < low <= high < math.inf:
                    return Exact().advance(state, most, check)
                spread = max(math.log(high), -math.log(low))
                if spread > (TRUST if model.sparse else RANGE):
                    break
                errors = aim.errors(columns * v, v)
                worst = float(errors.max())
                stop = check(state.iterations + done, worst)
                pace.look(errors, done - seen)
                seen, omega = done, pace.omega
                due = done + (2 if done == 2 else self._wait(worst, self.beyond * state.tolerance, pace.fall))
                if not stop and not near and not model.exact and worst <= ROUNDED:
                    break
        state.move(as_tensor(v).log())
        state.iterations += done
        if stop and not bounded and model.resolves(spread if near else max(spread, 1.0), worst):
            landed = as_tensor(weights * u * sums), as_tensor(columns * v)
            state.land(as_tensor(u).log(), *landed, errors if model.exact else None)
        else:
            # the constant to move depends on f, which has moved with g
            f = linalg.plus(state.f, state.unit, as_tensor(u).log().to(state.f))
            state.f = torch.where(state.live[0], f, 0.0) if state.zeros else f
            state.translate()
        return stop

    def _wait(self, error: float, goal: float, fall: float) -> int:
        """Iterations until the next look, of which each lowers the logarithm of the error by ``fall``."""
        if not 0 < goal < error or fall <= 0:
            return self.every
        return max(1, min(self.every, math.ceil(math.log(error / goal) / fall)))

    def half(self, state: State, v: Tensor) -> Tensor:
        """Of a partial plan, what a half-step on each side from ``v``, on the model, adds to ``g / eps``."""
        model, near = state.model, _near(state)
        assert model is not None
        u = (state.lower(state.lse + _sums(model, v, near).log()) - state.height).exp_()
        return state.rise(_columns(model, u, state.rows, state.columns + TINY, near, _lacking(state, near)).log())

    def _paced(self, state: State) -> Pace:
        """The pace of the last run where it goes on."""
        errors = state.errors()
        if self._pace is None or not self._pace.resume(errors):
            self._pace = Pace(errors)
        return self._pace


def _near(state: State) -> bool:
    """Whether only changes are worked out on the model, which rounds or leaves out, and added to what the pass found."""
    model = state.model
    assert model is not None
    return not model.exact and (model.sparse or state.error() <= NOTICED)


def _sums(products: Any, v: Any, near: bool) -> Any:
    """``K v``, of tensors or arrays; K has rows that sum to one."""
    return (1 + products.times(v - 1)).clip(min=TINY) if near else products.times(v)


def _lacking(state: State, near: bool) -> Any:
    """What the pass found of columns whose entries are too small for the model: they are taken to stay as they are."""
    model = state.model
    assert model is not None
    if near or not model.cut:  # a sparse model is always near
        return TINY
    held = model.transposed_times(state.rows)
    return torch.where(held < state.columns / 2, state.columns - held, 0.0) + TINY


def _columns(products: Any, u: Any, weights: Any, found: Any, near: bool, lacking: Any) -> Any:
    """``K' (r u)``, never zero, of tensors or arrays; with ``found`` for ``K' r``, and ``lacking`` of it."""
    if near:
        return (found + products.transposed_times(weights * (u - 1))).clip(min=TINY)
    return products.transposed_times(weights * u) + lacking
