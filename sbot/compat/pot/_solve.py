"""POT's arguments into a problem of sbot, and a bridge back into POT's terms.

POT's plan is ``diag(u) exp(-M / reg) diag(v)``: its ``log u`` is ``f / reg + log a``, dimensionless; with a reference
matrix c (unbalanced) it is ``diag(u) (c exp(-M / reg)) diag(v)`` and ``log u = f / reg``.
"""

from __future__ import annotations

import contextlib
import math
import re
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...arrays import as_number
from ...bridge import Report
from ...costs import MatrixCost
from ...errors import InvalidProblem, NotConverged, PrecisionWarning
from ...feasibility import limit
from ...linalg import full_precision
from ...measures import Discrete
from ...potential_bridge import PotentialBridge
from ...potentials import Atoms
from ...problem import Problem
from ...solvers import Sinkhorn
from ._arrays import Home, wants_gradient

#: Where sbot is: warnings point at the first frame outside.
PACKAGE = str(Path(__file__).parents[2])
#: An iteration here is cheaper than one of POT's and half of them go before the last eps: so many count as one of POT's.
PACE = 10
#: Relative difference of the masses that is taken for rounding, by dtype; beyond it the caller is told.
ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-5}

DID_NOT_CONVERGE = (
    "Sinkhorn did not converge. You might want to increase the number of iterations `numItermax` or the "
    "regularization parameter `reg`."
)
PARTED = (
    "the forbidden pairs (+inf in M, or labels) leave no plan with both a and b as marginals; b was rescaled to what the rows "
    "of a can send to each part of it. Give labels in equal shares, or use ot.unbalanced."
)
#: Numerical knobs of POT's methods, and what its own functions pass along: taken, and of no effect here.
KNOBS = ("tau", "print_period", "epsilon0", "numInnerItermax", "method", "tol_abs", "tol_rel")

_strict: ContextVar[bool] = ContextVar("sbot.compat.pot.strict", default=False)


@contextlib.contextmanager
def strict(on: bool = True) -> Iterator[None]:
    """Within it, defects of POT that pipelines depend on are reproduced; see docs/compat/pot.md for the list.

    Examples
    --------
    >>> import numpy as np, sbot.compat.pot as ot
    >>> x, y = np.array([[0.0], [1.0]]), np.array([[0.0], [3.0]])
    >>> right = ot.bregman.empirical_sinkhorn_divergence(x, y, 1.0)
    >>> with ot.strict():
    ...     theirs = ot.bregman.empirical_sinkhorn_divergence(x, y, 1.0)  # without the entropies
    >>> round(float(right), 4), round(float(theirs), 4)
    (2.1081, 2.0073)
    """
    token = _strict.set(on)
    try:
        yield
    finally:
        _strict.reset(token)


def is_strict(asked: bool | None = None) -> bool:
    """Whether POT's defects are wanted: by the call, else by the context."""
    return _strict.get() if asked is None else bool(asked)


def options(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """The extra keywords of a call, checked: TypeError names the unknown one and lists what there is."""
    known = (*names, "strict", *KNOBS)
    for name in given:
        if name not in known:
            raise TypeError(
                f"unknown argument {name!r}; beside its own arguments the function takes {', '.join(known)}"
            )
    return given


# ---- into a problem ------------------------------------------------------------------------------------------------


def weights(w: Any, n: int, M: Tensor, name: str) -> Tensor:
    """Weights of n atoms: None and [] are uniform; ValueError for another number of them."""
    if w is None or w.numel() == 0:
        return torch.full((n,), 1.0 / n, dtype=M.dtype, device=M.device)
    if w.ndim == 2 and w.shape[1] == 1:
        w = w[:, 0]
    if w.shape != (n,):
        raise ValueError(f"{name} has shape {tuple(w.shape)} and M {tuple(M.shape)}; give {name} of shape ({n},)")
    if not float(w.detach().min()) >= 0:
        raise ValueError(f"{name} has weights that are negative or NaN; give weights >= 0")
    return w


def check_matrix(M: Tensor) -> None:
    """ValueError where the cost is not a matrix."""
    if M.ndim != 2 or 0 in M.shape:
        raise ValueError(f"M has shape {tuple(M.shape)}; give a cost matrix of shape (dim_a, dim_b)")


def strength(reg: Any) -> Any:
    """``reg`` as a number, or a tensor without dimensions where it wants a gradient; what is neither is left to the core."""
    if isinstance(reg, (Tensor, np.ndarray)) and math.prod(reg.shape) == 1:
        reg = reg.reshape(())
    if isinstance(reg, Tensor) and reg.requires_grad and torch.is_grad_enabled():
        return reg
    try:
        return float(reg)
    except (TypeError, ValueError, RuntimeError):
        return reg


def balanced(a: Tensor, b: Tensor, warn: bool = True) -> tuple[Tensor, bool]:
    """``b`` with the mass of ``a``, which is where POT's iterations end too, and whether the masses really differed."""
    mass_a, mass_b = a.sum(dtype=torch.float64), b.sum(dtype=torch.float64)
    held_a, held_b = float(mass_a.detach()), float(mass_b.detach())
    apart = abs(held_a - held_b) / max(held_a, held_b, 1e-300)
    differ = apart > ROUNDING.get(torch.promote_types(a.dtype, b.dtype), 1e-2)
    if apart > 1e-15 and held_b > 0:
        b = b * (mass_a / mass_b).to(b.dtype)
    if differ and warn:
        warnings.warn(
            f"a has the mass {held_a:.6g} and b {held_b:.6g}, {apart:.0e} apart: no plan has both as marginals; "
            "b was rescaled to the mass of a. Normalise them, or use ot.unbalanced.",
            stacklevel=_outside(),
        )
    return b, differ


def _outside() -> int:
    """The stack level of the caller of sbot, for warnings."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


@dataclass(frozen=True)
class Ask:
    """POT's tolerance on the marginal and number of iterations, a start (log u, log v), a finer goal and its floor."""

    stop: float
    iterations: int
    warm: tuple[Tensor, Tensor] | None = None
    goal: float = math.inf
    least: float = 0.0

    def solver(self, mass: float) -> Sinkhorn:
        tolerance = max(min(as_number(self.stop, "stopThr"), self.goal), self.least) / max(mass, 1e-300)
        most = self.iterations
        if isinstance(most, bool) or not isinstance(most, (int, np.integer)) or most < 1:
            raise ValueError(f"numItermax is {most!r}; give an integer >= 1")
        return Sinkhorn(tol=max(tolerance, 0.0), max_iter=PACE * int(most))


def couple(
    a: Any,
    b: Any,
    cost: Any,
    reg: Any,
    ask: Ask,
    relax: tuple[float, float] | None = None,
    mass: float | None = None,
    warn: bool = True,
) -> Solved:
    """Solve between weights with a cost matrix, or between pairs (points, weights) with a cost."""
    partial: dict[str, Any] = {} if mass is None else {"mass": mass}
    reg = strength(reg)
    if isinstance(reg, str):  # an "auto" of ours is none of theirs
        raise InvalidProblem(f"reg is the string {reg!r}; give a number > 0 in the units of M")
    try:
        with full_precision(), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotConverged)
            warnings.simplefilter("ignore", PrecisionWarning)
            try:
                problem = Problem.of(a, b, reg, cost=cost, relax=relax, **partial)
            except InvalidProblem:
                ending = None if relax or partial else _limit(a, b, cost)
                if ending is None:
                    raise
                problem = Problem.of(a, ending[0], reg, cost=ending[1])
                if warn:
                    warnings.warn(PARTED, stacklevel=_outside())
            assert isinstance(problem.mu, Discrete)
            whole = float(problem.mu.mass.detach().max())
            init = None if ask.warm is None else _start(problem, *ask.warm)
            bridge = ask.solver(whole).solved(problem, init, lend=True)
    except InvalidProblem as fault:
        raise InvalidProblem(_in_their_words(str(fault))) from None
    assert isinstance(bridge, PotentialBridge)
    return Solved(bridge, ask.stop)


def _limit(a: Any, b: Any, M: Any) -> tuple[Tensor, Tensor] | None:
    """``b`` and ``M`` of a problem that has the plan which POT's iterations tend to where a and b have none."""
    if not all(isinstance(part, Tensor) for part in (a, b, M)) or not bool(torch.isposinf(M).any()):
        return None
    found = limit(torch.isfinite(M.detach()), a, b)
    return None if found is None else (b * found.factor, torch.where(found.kept, M, math.inf))


def _start(problem: Problem, log_u: Tensor, log_v: Tensor) -> PotentialBridge:
    mu, nu = problem.mu, problem.nu
    assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
    for name, part, side in (("u", log_u, mu), ("v", log_v, nu)):
        if part.shape != side.weights.shape:
            raise ValueError(f"warmstart {name} has shape {tuple(part.shape)}; give {tuple(side.weights.shape)}")
        if bool(torch.isnan(part).any()) or bool((part == math.inf).any()):
            raise ValueError(f"warmstart {name} holds NaN or +inf; give finite numbers")
    x, y = problem.sites
    phi, psi = (Atoms(points.detach(), part.detach().to(problem.dtype)) for points, part in ((x, log_u), (y, log_v)))
    return PotentialBridge(problem, phi, psi, Report(solver="warm start", converged=False, reason="max_iter"))


WORDS = {
    r"\bmu\b": "a",
    r"\bnu\b": "b",
    r"\beps\b": "reg",
    r"cost=M\b": "M",
    r"relax the marginals: relax=(\(rho_mu, rho_nu\))?": "use ot.unbalanced",
    r"relax=\(rho_mu, rho_nu\)": "ot.unbalanced",
    r"\brelax\b": "reg_m",
}


def _in_their_words(message: str) -> str:
    for ours, theirs in WORDS.items():
        message = re.sub(ours, theirs, message)
    return message


# ---- out of a bridge -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Solved:
    """A solved problem in POT's terms; tensors, differentiable where the input asks for it."""

    bridge: PotentialBridge
    stop: float
    unroll: int | None = None

    def part(self, k: int) -> Solved:
        """One problem of a batch."""
        bridge = self.bridge[k]
        assert isinstance(bridge, PotentialBridge)
        return Solved(bridge, self.stop)

    @cached_property
    def following(self) -> PotentialBridge:
        """The bridge with derivatives in the data, where one is wanted."""
        problem = self.bridge.problem
        assert isinstance(problem.mu, Discrete) and isinstance(problem.nu, Discrete)
        values = problem.cost.values if isinstance(problem.cost, MatrixCost) else None
        ends = problem.mu, problem.nu
        parts = [*(end.weights for end in ends), *(end.points for end in ends), values, problem.eps_leaf, problem.mass]
        if wants_gradient(*parts):
            return self.bridge.differentiable(unroll=self.unroll)
        return self.bridge

    @cached_property
    def plan(self) -> Tensor:
        plan: Tensor = self.following.plan()
        # a caller may write into it, which would be in the way of its own derivatives
        return plan.clone() if plan.requires_grad else plan

    @property
    def linear(self) -> Tensor:
        """``<P, M>``."""
        return self.following.linear_cost()

    @property
    def value(self) -> Tensor:
        """``<P, M> + reg KL(P | a x b)``, with the terms for relaxed marginals."""
        return self.following.cost()

    def logs(self) -> tuple[Tensor, Tensor]:
        """``log u`` and ``log v``, with a and b in them."""
        phi, psi = self.following.phi, self.following.psi
        assert isinstance(phi, Atoms) and isinstance(psi, Atoms)
        dtype = self.bridge.problem.result_dtype
        return phi.log_weights.to(dtype), psi.log_weights.to(dtype)

    @property
    def report(self) -> Report:
        return self.bridge.report

    def error(self) -> float:
        """``||P' 1 - b||_2``, POT's measure of convergence."""
        nu = self.bridge.problem.nu
        assert isinstance(nu, Discrete)
        if "plan" in self.__dict__:  # made already: a sum costs less than a pass over the kernel
            mass = self.plan.detach().sum(-2)
        else:
            mass = self.bridge.apply(torch.ones_like(self.bridge.problem.mu.weights), transpose=True)  # type: ignore[attr-defined]
        return float((mass.double() - nu.weights.detach().double()).norm())

    @cached_property
    def reached(self) -> bool:
        """Whether POT's criterion is met: by our own, which is stronger, or by theirs.  Never for a tolerance of 0."""
        if self.stop <= 0:
            return False
        if self.report.converged:
            return True
        if self.report.reason == "precision":
            return False
        relaxed = min(self.bridge.problem.relax) < math.inf
        return (self.report.error if relaxed else self.error()) <= self.stop

    def complain(self, warn: bool) -> None:
        """POT's warning where it did not converge; where the dtype cannot resolve reg, whatever ``warn`` says."""
        if self.reached:
            return
        if self.report.reason == "precision":
            note = next((note for note in self.report.notes if "cannot resolve" in note), "the dtype is too coarse")
            warnings.warn(f"Warning: numerical errors: {_in_their_words(note)}", stacklevel=_outside())
        elif warn:
            warnings.warn(DID_NOT_CONVERGE, stacklevel=_outside())

    def errors(self, home: Home) -> list[Any]:
        """The marginal error along the way, absolute: L1 norms, which bound the 2-norm of POT, and that one at last."""
        problem = self.bridge.problem
        assert isinstance(problem.mu, Discrete)
        mass = float(problem.mu.mass.detach().max())
        along = [mass * error for _, eps, error in self.report.history if eps == problem.eps]
        return [home.number(value, problem.mu.weights) for value in (*along[:-1], self.error())]

    def show(self, verbose: bool) -> None:
        """POT's table of iterations and errors."""
        if verbose:
            print("{:5s}|{:12s}".format("It.", "Err") + "\n" + "-" * 19)
            for iteration, _, error in self.report.history:
                print(f"{iteration:5d}|{error:8e}|")
