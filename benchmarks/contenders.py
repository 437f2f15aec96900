"""Who is measured, behind one call: ``contender(task, tol, seconds) -> Answer``."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import ot
import torch
from scipy.special import logsumexp

import sbot

from .problems import Array, Task, marginal_error, objective

#: Iterations of POT between two looks at the clock and at the L1 error.
CHUNK = 100
#: Chunks without a better error after which POT counts as stalled.
PATIENCE = 30
SBOT_COSTS = {"quadratic": sbot.Quadratic(), "l1": sbot.Lp(1), "cosine": sbot.Cosine()}
POT_UNBALANCED = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant")


@dataclass(frozen=True)
class Answer:
    """A plan, its potentials in cost units (``P = a b exp((f + g - C) / eps)``), and what it took.

    ``status`` is "converged", "not converged" (stopped by a limit or stalled; ``error`` says where) or "failed" (not numbers, or
    the solver gave up with numerical errors), judged by ``error``, which is measured on the plan; ``reported`` is what the
    solver says of itself.  ``value`` is the objective with its mass terms.
    """

    name: str
    plan: Array = field(repr=False)
    f: Array = field(repr=False)
    g: Array = field(repr=False)
    value: float
    error: float
    status: str
    seconds: float
    iterations: int
    tolerance: float
    note: str = ""
    reported: float = math.nan


Contender = Callable[[Task, float, float], Answer]


def _status(error: float, tol: float, note: str) -> str:
    if error <= 2 * tol:  # twice: the same plan summed in another order
        return "converged"
    return "failed" if not math.isfinite(error) or "errors" in note else "not converged"


def _answer(name: str, task: Task, plan: Array, duals: tuple[Array, Array], tol: float, **more: Any) -> Answer:
    plan, f, g = (np.asarray(part, dtype=np.float64) for part in (plan, *duals))
    live = np.ix_(task.a > 0, task.b > 0)
    sound = bool(np.isfinite(plan[live]).all()) and bool((plan >= 0).all())
    error = marginal_error(task, plan, f, g) if sound else math.nan
    value = objective(task, plan) if sound else math.nan
    status = _status(error, tol, more["note"])
    return Answer(name, plan, f, g, value, error, status, tolerance=tol, **more)


# ---- sbot ------------------------------------------------------------------------------------------------------------


def sbot_sinkhorn(task: Task, tol: float, seconds: float, max_iter: int = 50_000) -> Answer:
    """`sbot.solve_bridge`; the clock is not looked at, the number of iterations is bounded."""
    a, b, x, y = (torch.from_numpy(part) for part in (task.a, task.b, task.x, task.y))
    cost = SBOT_COSTS.get(task.cell.cost)
    if cost is None:
        mu, nu, cost = sbot.Discrete(None, a), sbot.Discrete(None, b), sbot.MatrixCost(torch.from_numpy(task.cost))
    else:
        mu, nu = sbot.Discrete(x, a), sbot.Discrete(y, b)
    relax = None if math.isinf(max(task.rho)) and math.isinf(min(task.rho)) else task.rho
    solver = sbot.Sinkhorn(tol=tol, max_iter=max_iter)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sbot.NotConverged)
        warnings.simplefilter("ignore", sbot.PrecisionWarning)
        bridge = sbot.solve_bridge(mu, nu, task.eps, cost=cost, relax=relax, solver=solver)
    took = time.perf_counter() - start
    potentials, report = bridge.potentials(), bridge.report
    duals = potentials.f.values.numpy(), potentials.g.values.numpy()
    answer = _answer(
        "sbot",
        task,
        bridge.plan().numpy(),
        duals,
        report.tolerance,
        seconds=took,
        iterations=report.iterations,
        note=report.reason,
    )
    status = answer.status if report.converged else "not converged"
    return replace(answer, value=float(bridge.cost()), status=status, reported=report.error)


# ---- POT -------------------------------------------------------------------------------------------------------------


def pot(task: Task, tol: float, seconds: float) -> Answer:
    """POT as far as it gets: `sinkhorn_log` where the problem is balanced, else the best of its unbalanced solvers."""
    if task.cell.kind == "balanced":
        return pot_log(task, tol, seconds)
    best = _best_unbalanced(task, tol, seconds)
    if best.status == "failed" and min(task.a.min(), task.b.min()) == 0:
        best = _on_support(task, lambda smaller: _best_unbalanced(smaller, tol, seconds))
    return best


def _best_unbalanced(task: Task, tol: float, seconds: float) -> Answer:
    best: Answer | None = None
    for method in POT_UNBALANCED:
        answer = _pot_unbalanced(task, tol, seconds, method)
        if best is None or not best.error <= answer.error:
            best = answer
        if answer.status == "converged":
            break
    assert best is not None
    return best


def _on_support(task: Task, solve: Callable[[Task], Answer]) -> Answer:
    """Solve without the atoms of zero weight and put zeros back: what a user has to do where zeros break a solver."""
    live = np.flatnonzero(task.a), np.flatnonzero(task.b)
    x, y, a, b = task.x[live[0]], task.y[live[1]], task.a[live[0]], task.b[live[1]]
    small = solve(replace(task, x=x, y=y, a=a, b=b, cost=task.cost[np.ix_(*live)]))
    plan, f, g = np.zeros(task.cost.shape), np.zeros(len(task.a)), np.zeros(len(task.b))
    plan[np.ix_(*live)], f[live[0]], g[live[1]] = small.plan, small.f, small.g
    return replace(small, plan=plan, f=f, g=g, note=f"{small.note}; fails with zero weights, solved without them")


def pot_log(task: Task, tol: float, seconds: float) -> Answer:
    """`ot.bregman.sinkhorn_log`, continued by its own warm start until the L1 error, the clock or a stall ends it."""
    warm, iterations, best, waited, note = None, 0, math.inf, 0, "time"
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        with _quiet():
            plan, log = ot.bregman.sinkhorn_log(
                task.a,
                task.b,
                task.cost,
                task.eps,
                numItermax=CHUNK,
                stopThr=tol / math.sqrt(len(task.b)),
                log=True,
                warn=False,
                warmstart=warm,
            )
        warm, iterations = (log["log_u"], log["log_v"]), iterations + log["niter"] + 1
        error = abs(plan.sum(1) - task.a).sum() + abs(plan.sum(0) - task.b).sum()
        waited = 0 if error < 0.999 * best else waited + 1
        best = min(best, error)
        if error <= tol or not np.isfinite(error) or waited >= PATIENCE:
            note = "tolerance" if error <= tol else "stalled"
            break
    took = time.perf_counter() - start
    with _quiet():  # its log-scalings contain the weights
        duals = task.eps * (log["log_u"] - np.log(task.a)), task.eps * (log["log_v"] - np.log(task.b))
    more = {"seconds": took, "iterations": iterations, "note": note}
    return _answer("POT sinkhorn_log", task, plan, duals, tol, **more)


def pot_plain(task: Task, tol: float, seconds: float) -> Answer:
    """`ot.sinkhorn` as most people call it: products with the kernel ``exp(-C / eps)``."""
    warm, iterations, note = None, 0, "time"
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        with _quiet() as caught:
            plan, log = ot.sinkhorn(
                task.a,
                task.b,
                task.cost,
                task.eps,
                numItermax=10 * CHUNK,
                stopThr=tol / math.sqrt(len(task.b)),
                log=True,
                warn=False,
                warmstart=warm,
            )
            warm, iterations = (np.log(log["u"]), np.log(log["v"])), iterations + log["niter"] + 1
        error = abs(plan.sum(1) - task.a).sum() + abs(plan.sum(0) - task.b).sum()
        broken = any("numerical errors" in str(w.message) for w in caught)
        if error <= tol or broken or not np.isfinite(error):
            note = "tolerance" if error <= tol else "numerical errors"
            break
    took = time.perf_counter() - start
    with _quiet():
        duals = task.eps * (warm[0] - np.log(task.a)), task.eps * (warm[1] - np.log(task.b))
    more = {"seconds": took, "iterations": iterations, "note": note}
    return _answer("POT sinkhorn", task, plan, duals, tol, **more)


def _pot_unbalanced(task: Task, tol: float, seconds: float, method: str) -> Answer:
    """`ot.unbalanced.sinkhorn_unbalanced`, which stops on the change of its scalings, with the KL reference of sbot."""
    tight = 1e-15 if task.cell.dtype == "float64" else 1e-7
    options = {"method": method, "reg_type": "kl", "stopThr": tight, "log": True}
    warm, iterations, best, waited, note = None, 0, math.inf, 0, "time"
    # only the plain method survives its own warm start; the others get one call of as many iterations as fit the time
    chunk = CHUNK if method == "sinkhorn" else 20_000
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        with _quiet() as caught:
            arguments = task.a, task.b, task.cost, task.eps, task.rho
            plan, log = ot.unbalanced.sinkhorn_unbalanced(*arguments, numItermax=chunk, warmstart=warm, **options)
        warm, iterations = (log["logu"], log["logv"]), iterations + min(chunk, len(log["err"]))
        duals = task.eps * log["logu"], task.eps * log["logv"]
        error = marginal_error(task, plan, *duals)
        waited = 0 if error < 0.999 * best else waited + 1
        best = min(best, error)
        broken = any("umerical errors" in str(w.message) for w in caught)
        if error <= tol or broken or not np.isfinite(error) or waited >= PATIENCE or chunk > CHUNK:
            note = "tolerance" if error <= tol else "numerical errors" if broken else "stalled"
            break
    more = {"seconds": time.perf_counter() - start, "iterations": iterations, "note": note}
    return _answer(f"POT unbalanced {method}", task, plan, duals, tol, **more)


class _quiet(warnings.catch_warnings):
    """Record POT's warnings and drop NumPy's: both are expected where it is driven past what it can do."""

    def __init__(self) -> None:
        super().__init__(record=True)

    def __enter__(self) -> list[warnings.WarningMessage]:
        caught = super().__enter__()
        warnings.simplefilter("always")
        assert caught is not None
        return caught


# ---- the oracle ------------------------------------------------------------------------------------------------------


def oracle(task: Task, tol: float = 0.0, seconds: float = 0.0) -> Answer:
    """The answer by another road: annealed log-domain Sinkhorn, then damped Newton on the dual, in float64 NumPy.

    With f eliminated (its half-step is exact, relaxed or not), the dual in g is concave with gradient ``b e^{-g/rho} - P'1``
    and minus its Hessian is ``(diag(P'1) - lambda P' diag(1 / P1) P) / eps + diag(b e^{-g/rho}) / rho``.  It goes on until
    rounding stops it, and ignores ``tol``.
    """
    start = time.perf_counter()
    t = task.double()
    live_a, live_b = t.a > 0, t.b > 0
    dual = _Dual(t.a[live_a], t.b[live_b], t.cost[np.ix_(live_a, live_b)], t.rho)
    g, eps, steps = np.zeros(live_b.sum()), max(float(t.cost.mean()), t.eps), 0
    while eps > t.eps:
        g = dual.sinkhorn(g, eps, 20)
        g, used = dual.newton(g, eps, 5)
        eps, steps = max(eps / 4, t.eps), steps + 20 + used
    g = dual.sinkhorn(g, t.eps, 50)
    g, used = dual.newton(g, t.eps, 100)
    f, plan = dual.f_of(g, t.eps), np.zeros(t.cost.shape)
    plan[np.ix_(live_a, live_b)] = dual.plan(f, g, t.eps)
    wide = np.zeros(len(t.a)), np.zeros(len(t.b))
    wide[0][live_a], wide[1][live_b] = f, g
    took = time.perf_counter() - start
    return _answer("oracle", t, plan, wide, 1e-9, seconds=took, iterations=steps + 50 + used, note="rounding")


@dataclass(frozen=True)
class _Dual:
    """The dual of a problem whose atoms all have weight, as a function of g."""

    a: Array
    b: Array
    cost: Array
    rho: tuple[float, float]

    def f_of(self, g: Array, eps: float) -> Array:
        """The half-step: ``-lambda eps log sum_j b_j exp((g_j - C_ij) / eps)``."""
        return -self._damping(0, eps) * eps * logsumexp((g - self.cost) / eps, axis=1, b=self.b)

    def _damping(self, side: int, eps: float) -> float:
        return 1.0 if math.isinf(self.rho[side]) else self.rho[side] / (self.rho[side] + eps)

    def plan(self, f: Array, g: Array, eps: float) -> Array:
        """``a b exp((f + g - C) / eps)``."""
        with np.errstate(over="ignore"):  # a Newton step too long is seen by its value
            return np.outer(self.a, self.b) * np.exp((f[:, None] + g - self.cost) / eps)

    def target(self, g: Array) -> Array:
        """The column sums at the optimum."""
        return self.b * np.exp(-g / self.rho[1])

    def value(self, f: Array, g: Array, plan: Array, eps: float) -> float:
        """The dual up to a constant."""
        total = -eps * plan.sum()
        for rho, weights, dual in zip(self.rho, (self.a, self.b), (f, g), strict=True):
            total += weights @ (dual if math.isinf(rho) else -rho * np.expm1(-dual / rho))
        return float(total)

    def sinkhorn(self, g: Array, eps: float, count: int) -> Array:
        """Plain half-steps in the log domain."""
        for _ in range(count):
            f = self.f_of(g, eps)
            g = -self._damping(1, eps) * eps * logsumexp((f[:, None] - self.cost) / eps, axis=0, b=self.a[:, None])
        return g

    def newton(self, g: Array, eps: float, count: int) -> tuple[Array, int]:
        """Newton steps, halved until the error falls (or, far away, the dual rises); ends where neither happens."""
        f = self.f_of(g, eps)
        plan = self.plan(f, g, eps)
        value, error = self.value(f, g, plan, eps), abs(plan.sum(0) - self.target(g)).sum()
        for k in range(count):
            step = self._direction(g, plan, eps)
            step *= min(1.0, 5 * eps / max(abs(step).max(), 1e-300))
            for _ in range(30):
                trial = g + step
                f = self.f_of(trial, eps)
                p = self.plan(f, trial, eps)
                v, e = self.value(f, trial, p, eps), abs(p.sum(0) - self.target(trial)).sum()
                if e < 0.9 * error or (error > 1e-6 and v > value):
                    break
                step = step / 2
            else:
                return g, k
            g, plan, value, error = trial, p, v, e
        return g, count

    def _direction(self, g: Array, plan: Array, eps: float) -> Array:
        columns, target = plan.sum(0), self.target(g)
        hessian = np.diag(columns) - self._damping(0, eps) * plan.T @ (plan / plan.sum(1)[:, None])
        hessian += np.diag(target) * (0 if math.isinf(self.rho[1]) else eps / self.rho[1])
        # scaled to a unit diagonal; what is left of a direction below rounding (the constant, when balanced) is dropped
        scale = 1 / np.sqrt(np.maximum(np.diag(hessian), 1e-300))
        values, vectors = np.linalg.eigh(scale[:, None] * hessian * scale)
        inverse = np.where(values > 1e-14, 1 / np.maximum(values, 1e-14), 0.0)
        return eps * scale * (vectors @ (inverse * (vectors.T @ (scale * (target - columns)))))
