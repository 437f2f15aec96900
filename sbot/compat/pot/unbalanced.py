"""``ot.unbalanced``: marginals that are encouraged by ``reg_m KL``, with a reference measure c of the regularisation.

``min <P, M> + reg KL(P | c) + reg_m1 KL(P 1 | a) + reg_m2 KL(P' 1 | b)``: a reference other than ``a x b`` is a change of
the cost, ``M - reg log(c / (a x b))``.  What is not defined here is POT's.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import Unsupported
from ._arrays import Home, covers, enter, forwarder
from ._solve import Ask, Solved, _outside, balanced, check_matrix, couple, is_strict, options, strength, weights

__getattr__ = forwarder("unbalanced")

METHODS = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant", "sinkhorn_reg_scaling")
NOT_CONVERGED = (
    "Unbalanced Sinkhorn did not converge. Try a larger entropy `reg`, a lower mass `reg_m` or more `numItermax`."
)
#: The marginal error that is aimed at, whatever a looser tolerance on scalings would allow.
FINE = 1e-9


@dataclass(frozen=True)
class Relaxed:
    """A solved problem with relaxed marginals, in POT's terms."""

    solved: Solved
    M: Tensor
    a: Tensor
    b: Tensor
    reg: Any
    reg_m: tuple[float, float]
    c: Tensor | None
    entropic: bool

    @property
    def plan(self) -> Tensor:
        return self.solved.plan

    @property
    def linear(self) -> Tensor:
        """``<P, M>``: of the cost that was given, not of the one with c in it."""
        if self.c is None and not self.entropic:
            return self.solved.linear
        return torch.where(self.plan > 0, self.plan * self.M, 0.0).sum()

    def logs(self) -> tuple[Tensor, Tensor]:
        """``log u``, ``log v`` with respect to c: potentials in units of reg."""
        log_u, log_v = self.solved.logs()
        return _without(log_u, self.a), _without(log_v, self.b)

    @property
    def total(self) -> Tensor:
        """The objective; for the entropic reference ``sum P log P - P`` stands for the divergence."""
        value = self.solved.value - self.reg * self.a.sum() * self.b.sum()
        if self.entropic:
            return value
        return value + self.reg * (self.a.sum() * self.b.sum() if self.c is None else self.c.sum())

    @property
    def theirs(self) -> Tensor:
        """The objective without the mass terms of its divergences: about 0 at every solution, POT's defect."""
        plan = self.plan
        log_c = 0.0 if self.entropic else _log_reference(self.c, self.a, self.b)
        total = self.linear + self.reg * (torch.xlogy(plan, plan) - torch.where(plan > 0, plan * log_c, 0.0)).sum()
        for rho, sums, given in ((self.reg_m[0], plan.sum(1), self.a), (self.reg_m[1], plan.sum(0), self.b)):
            if not math.isinf(rho):
                total = total + rho * (torch.xlogy(sums, sums) - torch.xlogy(sums, given)).sum()
        return total


def _without(log: Tensor, w: Tensor) -> Tensor:
    live = w > 0
    return torch.where(live, log - torch.where(live, w, 1.0).log(), -math.inf)


def _log_reference(c: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a.log()[:, None] + b.log() if c is None else c.log()


def pair(reg_m: Any) -> tuple[float, float]:
    """The two strengths from a number or one or two of them."""
    values = [reg_m] if isinstance(reg_m, (int, float)) else list(reg_m) if getattr(reg_m, "ndim", 1) else [reg_m]
    if any(isinstance(value, Tensor) and value.requires_grad for value in values) and torch.is_grad_enabled():
        raise Unsupported("reg_m wants a gradient, which is not known here; give reg_m.detach(), or keep POT")
    if len(values) not in (1, 2):
        raise ValueError(f"reg_m has {len(values)} entries; give a number, or one or two of them")
    numbers = [float(value.detach() if isinstance(value, Tensor) else value) for value in values]
    return numbers[0], numbers[-1]


def relaxed(
    a: Tensor, b: Tensor, M: Tensor, reg: Any, reg_m: tuple[float, float], c: Tensor | None, entropic: bool, ask: Ask
) -> Relaxed:
    """Solve the problem with reference c, ``a x b`` where it is None, or 1 where ``entropic``."""
    hard, reg = min(reg_m) == math.inf, strength(reg)
    cost = M
    if c is not None or entropic:
        if c is not None and c.shape != M.shape:
            raise ValueError(f"c has shape {tuple(c.shape)} and M {tuple(M.shape)}; give both the same")
        live = (a > 0)[:, None] & (b > 0)
        log_ab = torch.where(a > 0, a, 1.0).log()[:, None] + torch.where(b > 0, b, 1.0).log()
        log_c = torch.zeros_like(M) if c is None else c.log()
        cost = torch.where(live, M - reg * (log_c - log_ab), M)
    if hard:
        b, _ = balanced(a, b)
    if ask.warm is not None:
        ask = Ask(ask.stop, ask.iterations, (ask.warm[0] + a.log(), ask.warm[1] + b.log()), ask.goal)
    solved = couple(a, b, cost, reg, ask, None if hard else reg_m)
    return Relaxed(solved, M, a, b, reg, reg_m, c, entropic)


@dataclass(frozen=True)
class Call:
    """The arguments that all methods share."""

    reg_m: Any
    reg_type: str
    c: Any
    warmstart: Any
    most: int
    stop: float
    verbose: bool
    log: bool
    strict: bool
    value: str = ""

    def run(self, a: Any, b: Any, M: Any, reg: Any) -> Any:
        home, (a, b, M) = enter([] if a is None else a, [] if b is None else b, M)
        check_matrix(M)
        a = weights(a, M.shape[0], M, "a")
        kind = self.reg_type.lower()
        if kind not in ("kl", "entropy"):
            raise ValueError(f"Unknown reg_type '{self.reg_type}'. Give 'kl' or 'entropy'.")
        if b.ndim == 2 and b.numel():
            return self._several(home, a, b, M, reg)
        if kind == "entropy":
            warnings.warn(
                "If reg_type = entropy, then the matrix c is overwritten by the one matrix.", stacklevel=_outside()
            )
        b = weights(b, M.shape[1], M, "b")
        c = None if self.c is None or kind == "entropy" else enter(self.c, home.back(M))[1][0]
        part = self._solve(a, b, M, reg, c, kind == "entropy", self.warmstart)
        if not self.log and not self.value:
            return home.back(part.plan)
        log = self._log(part, home) if self.log else {}
        if not self.value:
            return home.back(part.plan), log
        value = home.back(part.linear if self.value == "linear" else self._total(part))
        return (value, log) if self.log else value

    def _total(self, part: Relaxed) -> Tensor:
        return part.theirs if self.strict else part.total

    def _solve(
        self, a: Tensor, b: Tensor, M: Tensor, reg: Any, c: Tensor | None, entropic: bool, start: Any
    ) -> Relaxed:
        warm = None
        if start is not None:
            if not isinstance(start, (tuple, list)) or len(start) != 2:
                raise ValueError("warmstart must be a pair of arrays, of shapes (dim_a,) and (dim_b,)")
            u, v = (part.to(M) for part in enter(*start)[1])
            warm = u, v
        ask = Ask(self.stop, self.most, warm, FINE)
        part = relaxed(a, b, M, reg, pair(self.reg_m), c, entropic, ask)
        part.solved.show(self.verbose)
        if not part.solved.reached and self.stop > 0:
            warnings.warn(NOT_CONVERGED, stacklevel=_outside())
        return part

    def _several(self, home: Home, a: Tensor, b: Tensor, M: Tensor, reg: Any) -> Any:
        """Targets in the columns of b: a value ``<P_k, M>`` for each, with the entropic reference, as in POT."""
        if b.shape[0] != M.shape[1]:
            raise ValueError(
                f"b has shape {tuple(b.shape)} and M {tuple(M.shape)}; give b of shape ({M.shape[1]}, n_hists)"
            )
        start = self.warmstart
        starts = [None if start is None else (_column(start[0], k), _column(start[1], k)) for k in range(b.shape[1])]
        parts = [self._solve(a, b[:, k], M, reg, None, True, start) for k, start in enumerate(starts)]
        values = home.back(torch.stack([part.linear for part in parts]))
        if not self.log:
            return values
        u, v = (torch.stack(side, 1) for side in zip(*(part.logs() for part in parts), strict=True))
        errors = [max(part.solved.report.error for part in parts)]
        return values, {"err": [home.number(e, M) for e in errors], "logu": home.back(u), "logv": home.back(v)}

    def _log(self, part: Relaxed, home: Home) -> dict[str, Any]:
        u, v = part.logs()
        problem = part.solved.bridge.problem
        errors = [home.number(error, part.M) for _, eps, error in part.solved.report.history if eps == problem.eps]
        log = {"err": errors, "logu": home.back(u), "logv": home.back(v)}
        return {**log, "cost": home.back(part.linear), "total_cost": home.back(self._total(part))}


def _column(part: Any, k: int) -> Any:
    if part.ndim == 1:
        return part
    return part[:, k if part.shape[1] > 1 else 0]


def _check(method: str) -> None:
    if method.lower() not in METHODS:
        raise ValueError(f"Unknown method '{method}'. Give one of: {', '.join(METHODS)}.")
    if method.lower() == "sinkhorn_reg_scaling":
        warnings.warn("Method not implemented yet. Using classic Sinkhorn-Knopp", stacklevel=_outside())


@covers("unbalanced.sinkhorn_unbalanced")
def sinkhorn_unbalanced(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """The plan ``(dim_a, dim_b)``; with ``log=True`` and its log ``err, logu, logv, cost, total_cost``.

    Examples
    --------
    >>> import sbot.compat.pot as ot
    >>> ot.unbalanced.sinkhorn_unbalanced([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1, 1).round(4)
    array([[0.3221, 0.1185],
           [0.1185, 0.3221]])
    """
    asked = options(kwargs).get("strict")
    _check(method)
    call = Call(reg_m, reg_type, c, warmstart, numItermax, stopThr, verbose, log, is_strict(asked))
    return call.run(a, b, M, reg)


@covers("unbalanced.sinkhorn_unbalanced2")
def sinkhorn_unbalanced2(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    reg_m: Any,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    returnCost: str = "linear",
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """The value: ``<P, M>``, or with ``returnCost="total"`` the objective, mass terms included.

    POT leaves the mass terms out, so that the objective is 0 at every solution; ``strict=True`` does too.
    """
    asked = options(kwargs).get("strict")
    _check(method)
    if returnCost not in ("linear", "total"):
        raise ValueError(f"Unknown returnCost = {returnCost}. Give 'linear' or 'total'.")
    _, (_, targets) = enter(M, [] if b is None else b)
    if targets.ndim == 2 and reg_type == "kl":
        warnings.warn("Reg_type not implemented yet. Use entropy.", stacklevel=_outside())
    call = Call(reg_m, reg_type, c, warmstart, numItermax, stopThr, verbose, log, is_strict(asked), returnCost)
    return call.run(a, b, M, reg)


def _variant(name: str) -> Any:
    """One of the three functions of the methods, which differ in their knobs only."""

    @covers(f"unbalanced.{name}")
    def function(
        a: Any,
        b: Any,
        M: Any,
        reg: Any,
        reg_m: Any,
        reg_type: str = "kl",
        c: Any = None,
        warmstart: Any = None,
        numItermax: int = 1000,
        stopThr: float = 1e-6,
        verbose: bool = False,
        log: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`sinkhorn_unbalanced`."""
        asked = options(kwargs).get("strict")
        call = Call(reg_m, reg_type, c, warmstart, numItermax, stopThr, verbose, log, is_strict(asked))
        return call.run(a, b, M, reg)

    function.__name__ = function.__qualname__ = name
    return function


sinkhorn_knopp_unbalanced = _variant("sinkhorn_knopp_unbalanced")
sinkhorn_unbalanced_translation_invariant = _variant("sinkhorn_unbalanced_translation_invariant")


@covers("unbalanced.sinkhorn_stabilized_unbalanced")
def sinkhorn_stabilized_unbalanced(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    reg_m: Any,
    reg_type: str = "kl",
    c: Any = None,
    warmstart: Any = None,
    tau: float = 1e5,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = False,
    **kwargs: Any,
) -> Any:
    """`sinkhorn_unbalanced`."""
    asked = options(kwargs).get("strict")
    call = Call(reg_m, reg_type, c, warmstart, numItermax, stopThr, verbose, log, is_strict(asked))
    return call.run(a, b, M, reg)


#: POT's functions that this module has; the others are forwarded.
COVERED = (
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "sinkhorn_knopp_unbalanced",
    "sinkhorn_stabilized_unbalanced",
    "sinkhorn_unbalanced_translation_invariant",
)
