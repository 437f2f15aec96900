"""Entropic transport between samples: with the matrix of distances, or streamed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...measures import Discrete
from ._arrays import Home, enter
from ._costs import dist, streamed
from ._solve import Ask, Solved, balanced, couple, strength, weights

if TYPE_CHECKING:
    from .bregman import Call


class LazyPlan:
    """The plan of a streamed problem: ``T[i]``, ``T[i, j]`` and ``T[:]`` compute what they are asked for."""

    def __init__(self, solved: Solved, home: Home) -> None:
        self._solved, self._home = solved, home
        mu, nu = solved.bridge.problem.mu, solved.bridge.problem.nu
        assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
        self.shape = (mu.n, nu.n)

    def __getitem__(self, key: Any) -> Any:
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        if isinstance(rows, int):
            rows = slice(rows, rows + 1 if rows != -1 else None)
        if isinstance(columns, int):
            columns = slice(columns, columns + 1 if columns != -1 else None)
        part = self._solved.following.plan(rows=rows)
        return self._home.back(part[:, columns])

    def __repr__(self) -> str:
        return f"LazyPlan(shape={self.shape})"


def points(X_s: Any, X_t: Any, a: Any, b: Any) -> tuple[Home, Tensor, Tensor, Tensor, Tensor]:
    """Samples and their weights as tensors."""
    home, (x, y, a, b) = enter(X_s, X_t, [] if a is None else a, [] if b is None else b)
    for name, part in (("X_s", x), ("X_t", y)):
        if part.ndim != 2 or part.shape[1] != x.shape[1]:
            raise ValueError(f"{name} has shape {tuple(part.shape)}; give two arrays of samples (n, d) with the same d")
    return home, x, y, weights(a, len(x), x, "a"), weights(b, len(y), y, "b")


def stream(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    reg: Any,
    metric: Any,
    ask: Ask,
    relax: tuple[float, float] | None = None,
) -> tuple[Solved, float]:
    """Solve between points without a matrix; and the factor that the values take."""
    ours, reg = streamed(metric), strength(reg)
    scaled = None if relax is None else (relax[0] / ours.scale, relax[1] / ours.scale)
    return couple((x, a), (y, b), ours.cost, reg / ours.scale, ask, scaled), ours.scale


def _lazy(
    call: Call, x: Tensor, y: Tensor, a: Tensor, b: Tensor, reg: Any, metric: Any, size: Any
) -> tuple[Solved, float]:
    if not isinstance(size, int) and not (isinstance(size, tuple) and len(size) == 2):
        raise ValueError("Batch size must be in integer or a tuple of two integers")
    warm = None
    if call.warmstart is not None:
        u, v = (part.to(x) for part in enter(*call.warmstart)[1])
        warm = u, v
    b, differ = balanced(a, b, call.warn)
    solved, scale = stream(x, y, a, b, reg, metric, Ask(call.stop, call.most, warm))
    solved.show(call.verbose)
    solved.complain(call.warn and not differ)
    return solved, scale


def _lazy_log(solved: Solved, home: Home) -> dict[str, Any]:
    u, v = solved.logs()
    log = {"err": solved.errors(home), "u": home.back(u), "v": home.back(v)}
    return {**log, "niter": max(solved.report.iterations - 1, 0), "lazy_plan": LazyPlan(solved, home)}


def empirical_plan(call: Call, X_s: Any, X_t: Any, reg: Any, a: Any, b: Any, metric: Any, lazy: bool, size: Any) -> Any:
    """The plan, or (f, g) where it is streamed."""
    if not lazy:
        return call.run(a, b, dist(X_s, X_t, metric=metric), reg)
    home, x, y, a, b = points(X_s, X_t, a, b)
    solved, _ = _lazy(call, x, y, a, b, reg, metric, size)
    f, g = (home.back(part) for part in solved.logs())
    return (f, g, _lazy_log(solved, home)) if call.log else (f, g)


def empirical_value(
    call: Call, X_s: Any, X_t: Any, reg: Any, a: Any, b: Any, metric: Any, lazy: bool, size: Any
) -> Any:
    """``<P, M>``."""
    if not lazy:
        return call.run(a, b, dist(X_s, X_t, metric=metric), reg)
    home, x, y, a, b = points(X_s, X_t, a, b)
    solved, scale = _lazy(call, x, y, a, b, reg, metric, size)
    value = home.back(scale * solved.linear)
    return (value, _lazy_log(solved, home)) if call.log else value


def divergence(
    call: Call,
    X_s: Any,
    X_t: Any,
    reg: Any,
    a: Any,
    b: Any,
    metric: Any,
    lazy: bool,
    size: Any,
    strict: bool,
) -> Any:
    """Debiased by the values with themselves; ``strict`` takes the linear part of each value only."""
    home, x, y, a, b = points(X_s, X_t, a, b)
    start = call.warmstart
    starts = (None, None, None) if start is None else (start, (start[0], start[0]), (start[1], start[1]))
    values, logs = [], []
    for (p, v), (q, w), warm in zip(((x, a), (x, a), (y, b)), ((y, b), (x, a), (y, b)), starts, strict=True):
        part = replace(call, warmstart=warm)
        if lazy:
            solved, scale = _lazy(part, p, q, v, w, reg, metric, size)
            log = _lazy_log(solved, home) if call.log else {}
        else:
            matrix = (
                dist(p, q, metric=metric)
                if not home.numpy
                else enter(dist(home.back(p), home.back(q), metric=metric))[1][0]
            )
            solved, scale = part._solve(v, w, matrix, reg, part._warm(warm, matrix, reg)), 1.0
            log = call.method.log(solved, home, strength(reg)) if call.log else {}
        values.append(scale * (solved.linear if strict else solved.value))
        logs.append(log)
    left = (values[0] - (values[1] + values[2]) / 2).clamp(min=0)
    total = home.back(left.reshape(1) if strict and not home.numpy else left)  # POT's value has one entry on tensors
    if not call.log:
        return total
    names = ("ab", "a", "b")
    losses = {f"sinkhorn_loss_{name}": home.back(value) for name, value in zip(names, values, strict=True)}
    return total, {**losses, **{f"log_sinkhorn_{name}": log for name, log in zip(names, logs, strict=True)}}
