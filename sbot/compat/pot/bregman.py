"""``ot.bregman``: entropic transport between histograms, and (from `_empirical`) between samples.

Every method is sbot's solver; their names choose the keys of the log and the units of the warm start.  What is not defined
here is POT's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...linalg import plain
from ._arrays import Home, covers, enter, forwarder, pot
from ._empirical import (
    divergence,
    empirical_plan,
    empirical_value,
)
from ._solve import Ask, Solved, _outside, balanced, check_matrix, couple, is_strict, options, strength, weights

__getattr__ = forwarder("bregman")

#: Largest entry of M / reg up to which several targets are solved side by side, by the dtype of M.
SIDE_BY_SIDE = {torch.float64: 100.0, torch.float32: 10.0}


# ---- what the methods write into their logs ----------------------------------------------------------------------


def _knopp(solved: Solved, home: Home, reg: Any) -> dict[str, Any]:
    u, v = solved.logs()
    log = {"err": solved.errors(home), "niter": max(solved.report.iterations - 1, 0)}
    return {**log, "u": home.back(u.exp()), "v": home.back(v.exp())}


def _log(solved: Solved, home: Home, reg: Any) -> dict[str, Any]:
    u, v = solved.logs()
    log = {"err": solved.errors(home), "niter": max(solved.report.iterations - 1, 0)}
    logs = {"log_u": home.back(u), "log_v": home.back(v)}
    return {**log, **logs, "u": home.back(u.exp()), "v": home.back(v.exp())}


def _green(solved: Solved, home: Home, reg: Any) -> dict[str, Any]:
    u, v = solved.logs()
    return {"n_iter": max(solved.report.iterations - 1, 0), "u": home.back(u.exp()), "v": home.back(v.exp())}


def _stabilized(solved: Solved, home: Home, reg: Any) -> dict[str, Any]:
    u, v = solved.logs()
    duals = (home.back(reg * u), home.back(reg * v))
    log = {"err": solved.errors(home), "n_iter": max(solved.report.iterations - 1, 0)}
    logs = {"logu": home.back(u), "logv": home.back(v)}
    return {**log, **logs, "alpha": duals[0], "beta": duals[1], "warmstart": duals}


def _scaling(solved: Solved, home: Home, reg: Any) -> dict[str, Any]:
    u, v = solved.logs()
    duals = (home.back(reg * u), home.back(reg * v))
    log = {"err": solved.errors(home), "niter": max(solved.report.iterations - 1, 0)}
    return {**log, "alpha": duals[0], "beta": duals[1], "warmstart": duals}


@dataclass(frozen=True)
class Method:
    """One of POT's methods: its log, whether warm starts are in cost units, and whether it takes several targets."""

    name: str
    log: Callable[[Solved, Home, Any], dict[str, Any]]
    cost_units: bool = False
    several: bool = True


KNOPP = Method("sinkhorn", _knopp)
LOG = Method("sinkhorn_log", _log)
STABLE = Method("sinkhorn_stabilized", _stabilized, cost_units=True)
SCALING = Method("sinkhorn_epsilon_scaling", _scaling, cost_units=True, several=False)
GREEN = Method("greenkhorn", _green, several=False)
METHODS = {method.name: method for method in (KNOPP, LOG, GREEN, STABLE, SCALING)}


def _method(name: str, *allowed: Method) -> Method:
    found = METHODS.get(name.lower())
    if found is None or (allowed and found not in allowed):
        known = ", ".join(method.name for method in allowed or METHODS.values())
        raise ValueError(f"Unknown method '{name}'. Give one of: {known}.")
    return found


# ---- one call for all of them --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """The arguments that all methods share."""

    method: Method
    most: int
    stop: float
    verbose: bool
    log: bool
    warn: bool
    warmstart: Any
    value: bool = False

    def run(self, a: Any, b: Any, M: Any, reg: Any) -> Any:
        home, (a, b, M) = enter([] if a is None else a, [] if b is None else b, M)
        check_matrix(M)
        a, reg = weights(a, M.shape[0], M, "a"), strength(reg)
        if b.ndim == 2 and b.numel():
            return self._several(home, a, b, M, reg)
        b = weights(b, M.shape[1], M, "b")
        if isinstance(reg, (int, float)) and reg == 0:
            return self._unregularised(home, a, b, M)
        solved = self._solve(a, b, M, reg, self._warm(self.warmstart, M, reg))
        out = home.back(solved.linear if self.value else solved.plan)
        return (out, self.method.log(solved, home, reg)) if self.log else out

    def _solve(self, a: Tensor, b: Tensor, M: Tensor, reg: Any, warm: tuple[Tensor, Tensor] | None) -> Solved:
        b, differ = balanced(a, b, self.warn)
        solved = couple(a, b, M, reg, Ask(self.stop, self.most, warm), warn=self.warn)
        solved.show(self.verbose)
        solved.complain(self.warn and not differ)
        return solved

    def _warm(self, start: Any, M: Tensor, reg: Any) -> tuple[Tensor, Tensor] | None:
        if start is None:
            return None
        if not isinstance(start, (tuple, list)) or len(start) != 2:
            raise ValueError("warmstart must be a pair of arrays, of shapes (dim_a,) and (dim_b,)")
        u, v = (part.to(M) for part in enter(*start)[1])
        if self.method.cost_units:
            u, v = u / reg, v / reg
        return u, v

    def _several(self, home: Home, a: Tensor, b: Tensor, M: Tensor, reg: Any) -> Any:
        """Targets in the columns of b: a value ``<P_k, M>`` for each, as POT returns them."""
        if not self.method.several:
            raise ValueError(
                f"{self.method.name} takes one target; give b of shape ({M.shape[1]},), or method='sinkhorn'"
            )
        if b.shape[0] != M.shape[1]:
            raise ValueError(
                f"b has shape {tuple(b.shape)} and M {tuple(M.shape)}; give b of shape ({M.shape[1]}, n_hists)"
            )
        if self.warmstart is None and self._mild(M, reg):
            values, parts = self._side_by_side(a, b, M, reg)
        else:
            starts = self._starts(b.shape[1])
            parts = [self._solve(a, b[:, k], M, reg, self._warm(start, M, reg)) for k, start in enumerate(starts)]
            values = torch.stack([part.linear for part in parts])
        values = home.back(values)
        if not self.log:
            return values
        logs = [self.method.log(part, Home(False), reg) for part in parts]
        return values, {key: self._together(home, [log[key] for log in logs]) for key in self._keys(logs[0])}

    @staticmethod
    def _mild(M: Tensor, reg: Any) -> bool:
        """Whether exp(-M / reg) surely keeps all its entries, and problems side by side need no more than it."""
        low, high = (float(end) for end in torch.aminmax(M.detach()))
        return max(-low, high) <= SIDE_BY_SIDE.get(M.dtype, 0.0) * float(plain(reg))

    def _side_by_side(self, a: Tensor, b: Tensor, M: Tensor, reg: Any) -> tuple[Tensor, list[Solved]]:
        """The values, and each target's part, of one solve for all, whose iterations all of them report."""
        levelled = [balanced(a, column, self.warn) for column in b.T]
        whole = couple(
            a, torch.stack([column for column, _ in levelled]), M, reg, Ask(self.stop, self.most), warn=self.warn
        )
        parts = [whole.part(k) for k in range(b.shape[1])]
        whole.show(self.verbose)
        for part, (_, differ) in zip(parts, levelled, strict=True):
            part.complain(self.warn and not differ)
        return whole.linear, parts

    def _keys(self, log: dict[str, Any]) -> list[str]:
        return [key for key in log if self.method is not LOG or key not in ("err", "niter")]

    def _together(self, home: Home, parts: list[Any]) -> Any:
        """Column by column; counts are the largest, errors the joint 2-norm at the end."""
        if isinstance(parts[0], Tensor):
            return home.back(torch.stack(parts, 1))
        if isinstance(parts[0], tuple):
            return tuple(home.back(torch.stack(side, 1)) for side in zip(*parts, strict=True))
        if isinstance(parts[0], list):
            return [home.back(torch.stack([errors[-1] for errors in parts]).norm())]
        return max(parts)

    def _starts(self, count: int) -> list[Any]:
        start = self.warmstart
        if start is None:
            return [None] * count
        if len(start) == 2 and all(getattr(part, "ndim", 0) == 2 for part in start):
            return [(start[0][:, k], start[1][:, k]) for k in range(count)]
        if len(start) != count:
            raise ValueError(
                f"warmstart has {len(start)} entries for {count} targets; give two matrices, or a pair for each"
            )
        return list(start)

    def _unregularised(self, home: Home, a: Tensor, b: Tensor, M: Tensor) -> Any:
        if self.log:
            raise ValueError("reg is 0: the unregularised plan has no scalings for a log; use ot.emd, or give reg > 0")
        warnings.warn("reg is 0: this is unregularised transport, solved by ot.emd", stacklevel=_outside())
        arrays = [home.back(part) for part in (a, b, M)]
        return pot("emd2" if self.value else "emd")(*arrays)


# ---- POT's functions ----------------------------------------------------------------------------------------------


@covers("bregman.sinkhorn")
def sinkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """The plan ``(dim_a, dim_b)`` of ``min <P, M> + reg sum P log P`` with marginals a and b; with ``log=True`` and its log.

    For targets b ``(dim_b, n_hists)`` it returns the values ``<P_k, M>``, as POT does.  Raises ValueError for an unknown
    method and for wrong shapes.

    Examples
    --------
    >>> import sbot.compat.pot as ot
    >>> ot.sinkhorn([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1).round(4)
    array([[0.3655, 0.1345],
           [0.1345, 0.3655]])
    """
    options(kwargs)
    chosen = _method(method)
    if chosen is SCALING:
        numItermax = _inner(numItermax, kwargs.get("numInnerItermax", 100))
    return Call(chosen, numItermax, stopThr, verbose, log, warn, warmstart).run(a, b, M, reg)


@covers("bregman.sinkhorn2")
def sinkhorn2(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = False,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """The value ``<P, M>`` of the plan of `sinkhorn` (without the entropy); one for each column of b.

    Examples
    --------
    >>> import sbot.compat.pot as ot
    >>> round(float(ot.sinkhorn2([0.5, 0.5], [0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 1)), 6)
    0.268941
    """
    options(kwargs)
    chosen = _method(method, KNOPP, LOG, STABLE)
    return Call(chosen, numItermax, stopThr, verbose, log, warn, warmstart, value=True).run(a, b, M, reg)


@covers("bregman.sinkhorn_knopp")
def sinkhorn_knopp(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """`sinkhorn`, with the log ``err, niter, u, v``."""
    options(kwargs)
    return Call(KNOPP, numItermax, stopThr, verbose, log, warn, warmstart).run(a, b, M, reg)


@covers("bregman.sinkhorn_log")
def sinkhorn_log(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    numItermax: int = 1000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """`sinkhorn`, with the log ``err, niter, log_u, log_v, u, v``; ``u`` overflows where ``log_u`` does not."""
    options(kwargs)
    return Call(LOG, numItermax, stopThr, verbose, log, warn, warmstart).run(a, b, M, reg)


@covers("bregman.greenkhorn")
def greenkhorn(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    numItermax: int = 10000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
) -> Any:
    """`sinkhorn`, with the log ``n_iter, u, v``."""
    return Call(GREEN, numItermax, stopThr, verbose, log, warn, warmstart).run(a, b, M, reg)


@covers("bregman.sinkhorn_stabilized")
def sinkhorn_stabilized(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    numItermax: int = 1000,
    tau: float = 1e3,
    stopThr: float = 1e-9,
    warmstart: Any = None,
    verbose: bool = False,
    print_period: int = 20,
    log: bool = False,
    warn: bool = True,
    **kwargs: Any,
) -> Any:
    """`sinkhorn`, with the log ``err, n_iter, logu, logv, alpha, beta, warmstart``; warm starts are in cost units."""
    options(kwargs)
    return Call(STABLE, numItermax, stopThr, verbose, log, warn, warmstart).run(a, b, M, reg)


@covers("bregman.sinkhorn_epsilon_scaling")
def sinkhorn_epsilon_scaling(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    numItermax: int = 100,
    epsilon0: float = 1e4,
    numInnerItermax: int = 100,
    tau: float = 1e3,
    stopThr: float = 1e-9,
    warmstart: Any = None,
    verbose: bool = False,
    print_period: int = 10,
    log: bool = False,
    warn: bool = True,
    **kwargs: Any,
) -> Any:
    """`sinkhorn`, with the log ``err, niter, alpha, beta, warmstart``; warm starts are in cost units."""
    options(kwargs)
    most = _inner(numItermax, numInnerItermax)
    return Call(SCALING, most, stopThr, verbose, log, warn, warmstart).run(a, b, M, reg)


def _inner(outer: int, inner: int) -> int:
    return max(35, outer) * inner


@covers("bregman.empirical_sinkhorn")
def empirical_sinkhorn(
    X_s: Any,
    X_t: Any,
    reg: Any,
    a: Any = None,
    b: Any = None,
    metric: Any = "sqeuclidean",
    numIterMax: int = 10000,
    stopThr: float = 1e-9,
    isLazy: bool = False,
    batchSize: Any = 100,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """`sinkhorn` between samples ``(ns, d)`` and ``(nt, d)``; with ``isLazy=True`` the log-scalings (f, g), without a plan."""
    options(kwargs)
    chosen = _method(kwargs.get("method", "sinkhorn"))
    call = Call(chosen, numIterMax, stopThr, verbose, log, warn, warmstart)
    return empirical_plan(call, X_s, X_t, reg, a, b, metric, isLazy, batchSize)


@covers("bregman.empirical_sinkhorn2")
def empirical_sinkhorn2(
    X_s: Any,
    X_t: Any,
    reg: Any,
    a: Any = None,
    b: Any = None,
    metric: Any = "sqeuclidean",
    numIterMax: int = 10000,
    stopThr: float = 1e-9,
    isLazy: bool = False,
    batchSize: Any = 100,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """The value ``<P, M>`` of `empirical_sinkhorn`."""
    options(kwargs)
    chosen = _method(kwargs.get("method", "sinkhorn"), KNOPP, LOG, STABLE)
    call = Call(chosen, numIterMax, stopThr, verbose, log, warn, warmstart, value=True)
    return empirical_value(call, X_s, X_t, reg, a, b, metric, isLazy, batchSize)


@covers("bregman.empirical_sinkhorn_divergence")
def empirical_sinkhorn_divergence(
    X_s: Any,
    X_t: Any,
    reg: Any,
    a: Any = None,
    b: Any = None,
    metric: Any = "sqeuclidean",
    numIterMax: int = 10000,
    stopThr: float = 1e-9,
    verbose: bool = False,
    log: bool = False,
    warn: bool = True,
    warmstart: Any = None,
    **kwargs: Any,
) -> Any:
    """The debiased value ``W(s, t) - (W(s, s) + W(t, t)) / 2`` with the regularised values W, as its definition has it.

    POT leaves the entropies out of the values; ``strict=True`` does too.
    """
    options(kwargs, "isLazy", "batchSize")
    chosen = _method(kwargs.get("method", "sinkhorn"), KNOPP, LOG, STABLE)
    call = Call(chosen, numIterMax, stopThr, verbose, log, warn, warmstart, value=True)
    lazy, size = kwargs.get("isLazy", False), kwargs.get("batchSize", 100)
    return divergence(call, X_s, X_t, reg, a, b, metric, lazy, size, is_strict(kwargs.get("strict")))


#: POT's functions that this module has; the others are forwarded.
COVERED = (
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_knopp",
    "sinkhorn_log",
    "greenkhorn",
    "sinkhorn_stabilized",
    "sinkhorn_epsilon_scaling",
    "empirical_sinkhorn",
    "empirical_sinkhorn2",
    "empirical_sinkhorn_divergence",
)
