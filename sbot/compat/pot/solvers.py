"""``ot.solvers``: `solve` and `solve_sample`, where they are entropic; what is not defined here is POT's."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ._arrays import covers, enter, forwarder, pot
from ._costs import dist
from ._empirical import LazyPlan, points, stream
from ._solve import Ask, Solved, balanced, check_matrix, couple, is_strict, strength, weights
from .unbalanced import pair, relaxed
from .utils import OTResult

__getattr__ = forwarder("solvers")

METHODS = ("sinkhorn", "sinkhorn_log", "mm", "lbfgsb")
GRADIENTS = ("autodiff", "envelope", "last_step", "detach")
#: Methods of `solve_sample` that are not sbot's.
OTHERS = (
    "mm",
    "lbfgsb",
    "1d",
    "gaussian",
    "gaussian_hd",
    "lowrank",
    "nystroem",
    "factored",
    "geomloss",
    "geomloss_auto",
    "geomloss_tensorized",
    "geomloss_online",
    "geomloss_multiscale",
    "sliced",
    "max_sliced",
    "bsp",
)


def _ours(reg: Any, reg_type: Any, unbalanced: Any, unbalanced_type: str) -> bool:
    """Whether the problem is entropic with hard or KL marginals."""
    if reg is None or (isinstance(reg, (int, float)) and reg == 0) or not isinstance(reg_type, str):
        return False
    return reg_type.lower() in ("kl", "entropy") and (unbalanced is None or unbalanced_type.lower() == "kl")


@covers("solve")
def solve(
    M: Any,
    a: Any = None,
    b: Any = None,
    reg: Any = None,
    c: Any = None,
    reg_type: Any = "KL",
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    method: Any = None,
    n_threads: int = 1,
    max_iter: Any = None,
    plan_init: Any = None,
    potentials_init: Any = None,
    tol: Any = None,
    verbose: bool = False,
    grad: str = "autodiff",
) -> Any:
    """Solve a discrete problem; an `OTResult` with plan, values and potentials.

    Entropic problems (``reg_type`` "KL" or "entropy", marginals hard or relaxed by KL) are solved here, the others by POT.
    ``value`` is ``<P, M> + reg sum P log(P / c)``, c the reference (``a x b``), or ``+ reg sum P log P`` for "entropy"; with
    relaxed marginals it is the whole objective, mass terms included (``sum P log P - P`` for "entropy").  Its gradients in M, a
    and b are exact.

    Parameters
    ----------
    grad : "autodiff" (all that is returned has derivatives), "envelope" (``value`` alone), "detach" (none), or "last_step": the
        plan's derivative through one iteration.

    Raises
    ------
    ValueError : an unknown method or grad, wrong shapes, ``plan_init`` for an entropic problem.

    Examples
    --------
    >>> import numpy as np, sbot.compat.pot as ot
    >>> result = ot.solve(np.array([[0.0, 1.0], [1.0, 0.0]]), reg=1.0)
    >>> round(float(result.value), 6), round(float(result.value_linear), 6)
    (0.379885, 0.268941)
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"Unknown method={method} for solve, must be in {list(METHODS)}")
    ours = _ours(reg, reg_type, unbalanced, unbalanced_type)
    started = ours and plan_init is not None and unbalanced is not None and reg_type.lower() == "entropy"
    if not ours or started or method in ("mm", "lbfgsb"):
        return pot("solve")(
            M, a, b, reg, c, reg_type, unbalanced, unbalanced_type, method, n_threads, max_iter, plan_init,
            potentials_init, tol, verbose, grad,
        )  # fmt: skip
    if isinstance(M, list):
        raise ValueError("M is a list; give a NumPy array or a torch tensor")
    if plan_init is not None:
        raise ValueError("plan_init does not start an entropic problem; give potentials_init=(log u, log v)")
    home, (M, a, b, c) = enter(M, *([] if part is None else part for part in (a, b, c)))
    check_matrix(M)
    a, b = weights(a, M.shape[0], M, "a"), weights(b, M.shape[1], M, "b")
    reference = c if c.numel() else None
    entropic = reg_type.lower() == "entropy"
    (M, a, b), reg, steps = _tracked(grad, M, a, b), _held(grad, reg), _most(max_iter, grad)
    warm = _start(potentials_init, M)
    ask = Ask(1e-9 if tol is None else tol, steps, warm)
    if unbalanced is not None:
        part = relaxed(a, b, M, reg, pair(unbalanced), None if entropic else reference, entropic, ask)
        part = replace(part, solved=_unrolled(part.solved, grad))
        without_masses = is_strict()  # of the call, not of when the value is looked at
        solved = part.solved
        solved.complain(True)
        solved.show(verbose)
        parts: dict[str, Callable[[], Any]] = {
            "value": lambda: part.theirs if without_masses else part.total,
            "value_linear": lambda: _attached(part.linear, grad),
            "plan": lambda: _attached(part.plan, grad),
            "potentials": lambda: tuple(_attached(log, grad) for log in part.logs()),
        }
        return OTResult(home, report=solved.report, status=_status(solved), parts=parts)
    b, differ = balanced(a, b)
    if reference is None or entropic:
        solved = couple(a, b, M, reg, ask)
        linear: Callable[[], Tensor] = lambda: solved.linear  # noqa: E731
    else:
        folded = relaxed(a, b, M, reg, (math.inf, math.inf), reference, False, replace(ask, warm=None))
        solved = folded.solved
        linear = lambda: folded.linear  # noqa: E731
    solved = _unrolled(solved, grad)
    solved.complain(not differ)
    solved.show(verbose)
    return OTResult(
        home,
        report=solved.report,
        status=_status(solved),
        parts={
            "value": lambda: regularised(solved, a, b, reg, entropic, grad),
            "value_linear": lambda: _attached(linear(), grad),
            "plan": lambda: _attached(solved.plan, grad),
            "potentials": lambda: tuple(_attached(log, grad) for log in solved.logs()),
        },
    )


def regularised(solved: Solved, a: Tensor, b: Tensor, reg: Any, entropic: bool, grad: str) -> Tensor:
    """``<P, M> + reg sum P log(P / ab)``, or with ``sum P log P``; in terms of sbot's value, which has mass terms."""
    whole = solved.bridge.cost() if grad in ("envelope", "last_step") else solved.value
    mass_a, mass_b = a.sum(-1), b.sum(-1)
    value = whole - reg * (mass_a * mass_b - (mass_a + mass_b) / 2)
    if not entropic:
        return value
    return value + reg * (torch.xlogy(a, a).sum(-1) + torch.xlogy(b, b).sum(-1))


def _tracked(grad: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    if grad not in GRADIENTS:
        raise ValueError(f"Unknown grad={grad}, must be in {list(GRADIENTS)}")
    return tuple(t.detach() for t in tensors) if grad == "detach" else tensors


def _held(grad: str, reg: Any) -> Any:
    """``reg`` with the derivatives that ``grad`` leaves it."""
    return strength(reg.detach() if grad == "detach" and isinstance(reg, Tensor) else reg)


def _attached(tensor: Tensor, grad: str) -> Tensor:
    """All but the value is a constant under "envelope"."""
    return tensor.detach() if grad == "envelope" else tensor


def _unrolled(solved: Solved, grad: str) -> Solved:
    return replace(solved, unroll=1) if grad == "last_step" else solved


def _most(max_iter: Any, grad: str) -> int:
    if max_iter is None:
        return 1000
    if max_iter == 0 and grad == "last_step":
        raise ValueError("The maximum number of iterations must be greater than 0 when using grad=last_step.")
    return int(max_iter)


def _start(potentials: Any, M: Tensor) -> tuple[Tensor, Tensor] | None:
    if potentials is None:
        return None
    if not isinstance(potentials, (tuple, list)) or len(potentials) != 2:
        raise ValueError("potentials_init must be a pair of arrays (log u, log v)")
    u, v = (part.to(M) for part in enter(*potentials)[1])
    return u, v


def _status(solved: Solved) -> str:
    if solved.reached or solved.report.converged:
        return "Converged"
    return f"Not converged ({solved.report.reason}), marginal error {solved.report.error:.1e}"


# ---- between samples -----------------------------------------------------------------------------------------------


@covers("solve_sample")
def solve_sample(
    X_a: Any,
    X_b: Any,
    a: Any = None,
    b: Any = None,
    metric: Any = "sqeuclidean",
    reg: Any = None,
    c: Any = None,
    reg_type: Any = "KL",
    unbalanced: Any = None,
    unbalanced_type: str = "KL",
    lazy: bool = False,
    batch_size: Any = None,
    method: Any = None,
    n_threads: int = 1,
    max_iter: Any = None,
    plan_init: Any = None,
    rank: int = 100,
    scaling: float = 0.95,
    potentials_init: Any = None,
    X_init: Any = None,
    tol: Any = None,
    verbose: bool = False,
    grad: str = "autodiff",
    random_state: Any = None,
    debias: Any = False,
    n_projections: int = 50,
    projections: Any = None,
    scaler: Any = None,
) -> Any:
    """`solve` between samples ``(n, d)`` and ``(m, d)``; with ``lazy=True`` no matrix is made, and nothing else changes.

    ``debias=True`` subtracts half the values of each sample with itself.  Methods but "sinkhorn" and "sinkhorn_log" are POT's.
    """
    if method is not None and method.lower() not in (*METHODS, *OTHERS):
        raise ValueError(f"Unknown method={method} for solve_sample. Available methods are: {[*METHODS, *OTHERS[2:]]}")
    if scaler is not None:
        X_a, X_b = _scaled(X_a, X_b, scaler)
    given = {
        "metric": metric, "reg": reg, "c": c, "reg_type": reg_type, "unbalanced": unbalanced,
        "unbalanced_type": unbalanced_type, "lazy": lazy, "batch_size": batch_size, "method": method, "n_threads": n_threads,
        "max_iter": max_iter, "plan_init": plan_init, "rank": rank, "scaling": scaling, "potentials_init": potentials_init,
        "X_init": X_init, "tol": tol, "verbose": verbose, "grad": grad, "random_state": random_state,
        "n_projections": n_projections, "projections": projections,
    }  # fmt: skip
    entropic = _ours(reg, reg_type, unbalanced, unbalanced_type)
    if not entropic or (method is not None and method.lower() in OTHERS) or debias == "split":
        if lazy or method is not None or debias:
            return pot("solve_sample")(X_a, X_b, a, b, debias=debias, **given)
        shared = [name for name in inspect.signature(solve).parameters if name in given and name != "method"]
        return solve(dist(X_a, X_b, metric=metric), a, b, **{name: given[name] for name in shared})
    if debias:
        return _debiased(X_a, X_b, a, b, given)
    if lazy:
        return _streamed(X_a, X_b, a, b, given)
    M = dist(X_a, X_b, metric=metric)
    name = None if method is None else method.lower()
    return solve(
        M, a, b, reg, c, reg_type, unbalanced, unbalanced_type, name, n_threads, max_iter, plan_init, potentials_init,
        tol, verbose, grad,
    )  # fmt: skip


def _scaled(X_a: Any, X_b: Any, scaler: Any) -> tuple[Any, Any]:
    change = scaler.transform if callable(getattr(scaler, "transform", None)) else scaler
    if not callable(change):
        raise ValueError(f"scaler is {type(scaler).__name__}; give None, a function, or an object with transform()")
    return change(X_a), X_b if is_strict() else change(X_b)


def _debiased(X_a: Any, X_b: Any, a: Any, b: Any, given: dict[str, Any]) -> OTResult:
    cross = solve_sample(X_a, X_b, a, b, **given)
    own = {**given, "c": None, "potentials_init": None}
    with_a, with_b = solve_sample(X_a, X_a, a, a, **own), solve_sample(X_b, X_b, b, b, **own)
    return OTResult(
        cross._home,
        report=cross.report,
        status=cross.status,
        log={"res_aa": with_a, "res_bb": with_b, "res_ab": cross},
        lazy_plan=cross.lazy_plan,
        parts={
            "value": lambda: cross.value - (with_a.value + with_b.value) / 2,
            "value_linear": lambda: cross.value_linear - (with_a.value_linear + with_b.value_linear) / 2,
            "plan": lambda: cross.plan,
            "potentials": lambda: cross.potentials,
        },
    )


def _streamed(X_a: Any, X_b: Any, a: Any, b: Any, given: dict[str, Any]) -> OTResult:
    """Points, and no matrix: the plan is lazy."""
    for name in ("c", "plan_init", "X_init"):
        if given[name] is not None:
            raise ValueError(f"{name} needs a matrix; give lazy=False")
    home, x, y, v, w = points(X_a, X_b, a, b)
    grad, reg, entropic = given["grad"], given["reg"], given["reg_type"].lower() == "entropy"
    (x, y, v, w), reg = _tracked(grad, x, y, v, w), _held(grad, reg)
    tol = given["tol"]
    ask = Ask(1e-9 if tol is None else tol, _most(given["max_iter"], grad), _start(given["potentials_init"], x))
    rho = None if given["unbalanced"] is None else pair(given["unbalanced"])
    if rho is None:
        w, _ = balanced(v, w)
    solved, scale = stream(x, y, v, w, reg, given["metric"], ask, rho)
    solved = _unrolled(solved, grad)
    solved.complain(True)
    solved.show(given["verbose"])

    def value() -> Tensor:
        if rho is not None:
            return scale * solved.value
        return scale * regularised(solved, v, w, reg / scale, entropic, grad)

    def potentials() -> tuple[Tensor, ...]:
        logs = solved.logs()
        if rho is not None:
            logs = logs[0] - v.log(), logs[1] - w.log()
        return tuple(_attached(log, grad) for log in logs)

    return OTResult(
        home,
        report=solved.report,
        status=_status(solved),
        lazy_plan=LazyPlan(solved, home),
        parts={
            "value": value,
            "value_linear": lambda: _attached(scale * solved.linear, grad),
            "potentials": potentials,
        },
    )


#: POT's functions that this module has; the others are forwarded.
COVERED = ("solve", "solve_sample")
