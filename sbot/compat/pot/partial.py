"""``ot.partial``: entropic transport of a prescribed mass; what is not defined here is POT's.

``min <P, M> + reg sum P log P`` over plans with ``P 1 <= a``, ``P' 1 <= b`` and ``sum P = m``: the reference 1 in place of
``a x b`` is a change of the cost, ``M + reg log(a x b)``.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from ._arrays import covers, enter, forwarder
from ._solve import Ask, _outside, check_matrix, couple, strength, weights

__getattr__ = forwarder("partial")

METHODS = ("sinkhorn", "sinkhorn_log")
#: The marginal error that is aimed at: POT's default tolerance, 1e-100, is none.
FINE = 1e-9


@covers("partial.entropic_partial_wasserstein")
def entropic_partial_wasserstein(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    m: Any = None,
    method: str = "sinkhorn",
    numItermax: int = 1000,
    stopThr: float = 1e-100,
    verbose: bool = False,
    log: bool = False,
) -> Any:
    """The plan ``(dim_a, dim_b)`` of mass m (the smaller of both masses); with ``log=True`` and ``err, partial_w_dist``."""
    if method.lower() not in METHODS:
        raise ValueError(f"Unknown method '{method}'. Give one of: {', '.join(METHODS)}.")
    return _partial(a, b, M, reg, m, numItermax, stopThr, verbose, log)


@covers("partial.entropic_partial_wasserstein_logscale")
def entropic_partial_wasserstein_logscale(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    m: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-100,
    verbose: bool = False,
    log: bool = False,
) -> Any:
    """`entropic_partial_wasserstein`."""
    return _partial(a, b, M, reg, m, numItermax, stopThr, verbose, log)


def _partial(a: Any, b: Any, M: Any, reg: Any, m: Any, most: int, stop: float, verbose: bool, log: bool) -> Any:
    home, (a, b, M) = enter(a, b, M)
    check_matrix(M)
    a, b = weights(a, M.shape[0], M, "a"), weights(b, M.shape[1], M, "b")
    reg = strength(reg)
    least = min(float(a.detach().double().sum()), float(b.detach().double().sum()))
    mass = least if m is None else float(m)
    if mass < 0:
        raise ValueError("Problem infeasible. Parameter m should be greater than 0.")
    if mass > least * (1 + 4 * torch.finfo(M.dtype).eps):
        raise ValueError("Problem infeasible. Parameter m should lower or equal than min(|a|_1, |b|_1).")
    live = (a > 0)[:, None] & (b > 0)
    log_ab = torch.where(a > 0, a, 1.0).log()[:, None] + torch.where(b > 0, b, 1.0).log()
    solved = couple(
        a, b, torch.where(live, M + reg * log_ab, M), reg, Ask(stop, most, goal=FINE, least=FINE), mass=mass
    )
    solved.show(verbose)
    if not solved.report.converged:
        warnings.warn(
            f"entropic_partial_wasserstein stopped at marginal error {solved.report.error:.1e}; give more numItermax",
            stacklevel=_outside(),
        )
    plan = solved.plan
    if not log:
        return home.back(plan)
    errors = [home.number(error, M) for _, _, error in solved.report.history]
    return home.back(plan), {"err": errors, "partial_w_dist": home.back(torch.where(plan > 0, plan * M, 0.0).sum())}


#: POT's functions that this module has; the others are forwarded.
COVERED = ("entropic_partial_wasserstein", "entropic_partial_wasserstein_logscale")
