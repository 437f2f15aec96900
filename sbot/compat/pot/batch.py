"""``ot.batch``: many small problems at once; what is not defined here is POT's."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from ._arrays import covers, enter, forwarder, pot
from ._costs import distances
from ._solve import DID_NOT_CONVERGE, Ask, _outside, couple
from .solvers import GRADIENTS, _held, _tracked, _unrolled, regularised
from .utils import OTResult

__getattr__ = forwarder("batch")

METHODS = ("auto", "proximal", "log_sinkhorn", "sinkhorn")
TYPES = ("kl", "entropy")


@covers("batch.dist_batch")
def dist_batch(X1: Any, X2: Any = None, metric: str = "sqeuclidean", p: Any = 2, nx: Any = None) -> Any:
    """Distances ``(B, n, m)`` between samples ``(B, n, d)`` and ``(B, m, d)``; metrics but the Euclidean ones are POT's."""
    kind = metric.lower()
    if kind not in ("sqeuclidean", "euclidean"):
        return pot("batch.dist_batch")(X1, X2, metric=metric, p=p, nx=nx)
    home, (x, y) = enter(X1, X1 if X2 is None else X2)
    for name, part in (("X1", x), ("X2", y)):
        if part.ndim != 3 or part.shape[0] != x.shape[0] or part.shape[2] != x.shape[2]:
            raise ValueError(f"{name} has shape {tuple(part.shape)}; give (B, n, d) and (B, m, d) of the same B and d")
    return home.back(distances(x, y, kind))


@covers("batch.solve_batch")
def solve_batch(
    M: Any,
    reg: Any = None,
    a: Any = None,
    b: Any = None,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> Any:
    """Solve B problems with costs ``(B, n, m)``; an `OTResult` of batched arrays with the log ``n_iter``.

    ``reg=None`` and ``method="proximal"`` are POT's.  ``value`` is ``<P, M> + reg sum P log P``, or with ``P log(P / ab)``.

    Examples
    --------
    >>> import numpy as np, sbot.compat.pot as ot
    >>> ot.solve_batch(np.zeros((3, 2, 2)), reg=1.0).plan.shape
    (3, 2, 2)
    """
    for name, value, known in (("method", method, METHODS), ("reg_type", reg_type, TYPES), ("grad", grad, GRADIENTS)):
        if value not in known:
            raise ValueError(f"Unknown {name}: {value}. Must be one of {list(known)}.")
    given = reg is not None and reg != 0
    if method in ("sinkhorn", "log_sinkhorn") and (not given or reg <= 0):
        raise ValueError(
            "Sinkhorn methods require a strictly positive reg parameter. Please provide a valid reg value."
        )
    if method == "proximal" or not given:
        return pot("batch.solve_batch")(M, reg, a, b, max_iter, tol, method, inner_iter, inner_reg, reg_type, grad)
    home, (M, a, b) = enter(M, [] if a is None else a, [] if b is None else b)
    if M.ndim != 3 or 0 in M.shape:
        raise ValueError(f"M has shape {tuple(M.shape)}; give costs of shape (B, n, m)")
    a, b = _weights(a, M, 1, "a"), _weights(b, M, 2, "b")
    (M, a, b), reg = _tracked(grad, M, a, b), _held(grad, reg)
    solved = _unrolled(couple(a, b, M, reg, Ask(tol, max_iter)), grad)
    report = solved.report
    if not report.converged and report.error > tol:
        warnings.warn(DID_NOT_CONVERGE, stacklevel=_outside())

    def potentials() -> tuple[Tensor, ...]:
        logs = solved.logs()
        held = tuple(log.detach() for log in logs) if grad == "envelope" else logs
        return tuple(log.exp() for log in held) if method == "sinkhorn" else held

    def plan() -> Tensor:
        return solved.plan.detach() if grad == "envelope" else solved.plan

    def linear() -> Tensor:
        return (M * plan()).sum((1, 2)) if grad == "envelope" else solved.linear

    return OTResult(
        home,
        report=report,
        status="Converged" if report.converged else f"Not converged ({report.reason})",
        log={"n_iter": max(report.iterations - 1, 0)},
        parts={
            "value": lambda: regularised(solved, a, b, reg, reg_type == "entropy", grad),
            "value_linear": linear,
            "plan": plan,
            "potentials": potentials,
        },
    )


def _weights(w: Tensor, M: Tensor, axis: int, name: str) -> Tensor:
    size = M.shape[0], M.shape[axis]
    if w.numel() == 0:
        return M.new_full(size, 1.0 / size[1])
    if w.shape != size:
        raise ValueError(f"{name} has shape {tuple(w.shape)} and M {tuple(M.shape)}; give {name} of shape {size}")
    return w


@covers("batch.solve_sample_batch")
def solve_sample_batch(
    X_a: Any,
    X_b: Any,
    reg: Any = None,
    a: Any = None,
    b: Any = None,
    metric: str = "sqeuclidean",
    p: Any = 2,
    max_iter: int = 1000,
    tol: float = 1e-5,
    method: str = "auto",
    inner_iter: int = 1,
    inner_reg: float = 1e-3,
    reg_type: str = "entropy",
    grad: str = "envelope",
) -> Any:
    """`solve_batch` with the costs of `dist_batch`."""
    M = dist_batch(X_a, X_b, metric=metric, p=p)
    return solve_batch(M, reg, a, b, max_iter, tol, method, inner_iter, inner_reg, reg_type, grad)


#: POT's functions that this module has; the others are forwarded.
COVERED = ("solve_batch", "solve_sample_batch", "dist_batch")
