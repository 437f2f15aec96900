"""Who is right where POT and sbot differ: each plan held against the conditions that the solution meets, written out here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
#: A plan that breaks its conditions by no more, relative to its mass, is the solution: what is compared is compared to 1e-8.
SOLVED = 1e-9
#: How much worse the other one has to be.
APART = 10.0
#: Entries below it are rounded to few digits, or to none: they say nothing about scalings.
COARSE = 1e-290


def verdict(name: str, given: dict[str, Any], mine: Any, theirs: Any, complained: list[str]) -> str:
    """What a difference is; "differ" where it is not shown that sbot has the solution and POT has not."""
    ours, other = (violation(name, given, plan_of(out)) for out in (mine, theirs))
    if _below_exact(name, given, theirs) and not _below_exact(name, given, mine):
        return "POT's value is below that of exact transport"
    if ours is None or other is None:
        silent = not any("did not converge" in text for text in complained)
        return "differ" if silent else "POT does not converge in 5000 iterations"
    if not ours <= SOLVED or other <= APART * max(ours, 1e-15):
        return "differ"
    silent = not any("did not converge" in text for text in complained)
    return f"POT stops short of the solution{', and does not say so' if silent else ''}"


def _below_exact(name: str, given: dict[str, Any], out: Any) -> bool:
    """Whether a value ``<P, M>`` is one that no plan with these marginals has."""
    value = _plain(out[0] if isinstance(out, tuple) else out)
    if name != "bregman.sinkhorn2" or np.ndim(value) > 0 or np.ndim(given.get("b")) != 1:
        return False
    import ot

    exact = float(ot.emd2(*(_plain(given[key]) for key in ("a", "b", "M"))))
    return float(value) < exact - 1e-6 * abs(exact)


def plan_of(out: Any) -> Array | None:
    """The plan in what a function returned, ``(*b, n, m)``."""
    if isinstance(out, tuple):
        out = out[0]
    plan = getattr(out, "plan", out)
    if plan is None or getattr(plan, "ndim", 0) < 2:
        return None
    return np.asarray(plan.detach().numpy() if hasattr(plan, "detach") else plan, dtype=np.float64)


def violation(name: str, given: dict[str, Any], plan: Array | None) -> float | None:
    """By how much a plan fails to be ``diag(u) K diag(v)`` with the marginals that are asked for, relative to its mass, in L1.

    None where that cannot be said: no plan, another kind of problem.  Entries that underflow say nothing.
    """
    if plan is None:
        return None
    if not np.isfinite(plan).all():
        return math.inf
    numbers = {key: _plain(value) for key, value in given.items()}
    M, reg = numbers.get("M"), numbers.get("reg")
    if M is None and "X_s" in numbers:
        import ot

        M = ot.dist(numbers["X_s"], numbers["X_t"], metric=given.get("metric", "sqeuclidean"))
    if M is None and name == "batch.solve_sample_batch":
        import ot.batch

        M = ot.batch.dist_batch(numbers["X_a"], numbers["X_b"], metric=given.get("metric", "sqeuclidean"))
    if M is None or reg is None or M.shape != plan.shape:
        return None
    a, b = (_weights(numbers.get(side), plan, axis) for side, axis in (("a", -2), ("b", -1)))
    if a.shape != plan.shape[:-1] or b.shape != (*plan.shape[:-2], plan.shape[-1]):
        return None
    rows, columns, mass = plan.sum(-1), plan.sum(-2), plan.sum()
    log_k = -M / float(reg)
    if name.startswith("partial."):
        m = numbers.get("m")
        return _partial(plan, log_k, a, b, min(a.sum(), b.sum()) if m is None else float(m)) / mass
    strengths = numbers.get("reg_m") if "reg_m" in numbers else numbers.get("unbalanced")
    if strengths is not None:
        c = numbers.get("c")
        entropic = str(given.get("reg_type", "kl")).lower() == "entropy"
        log_c = 0.0 if entropic else np.log(a[..., :, None] * b[..., None, :] if c is None else c)
        return _relaxed(plan, log_k + log_c, a, b, np.ravel(strengths) / float(reg)) / mass
    if abs(a.sum() - b.sum()) > 1e-12 * a.sum():
        b = b * (a.sum() / b.sum())
    return (_scalings(plan, log_k)[2] + np.abs(rows - a).sum() + np.abs(columns - b).sum()) / mass


def _plain(value: Any) -> Any:
    if hasattr(value, "detach"):
        return value.detach().double().numpy()
    return np.asarray(value, dtype=np.float64) if isinstance(value, (np.ndarray, list, int, float)) else value


def _weights(given: Any, plan: Array, axis: int) -> Array:
    shape = (*plan.shape[:-2], plan.shape[axis])
    return np.full(shape, 1.0 / plan.shape[axis]) if given is None or np.size(given) == 0 else given


def _scalings(plan: Array, log_k: Array) -> tuple[Array, Array, float]:
    """``u`` and ``v`` with ``log P - log K = u_i + v_j``, and how far that is from true, weighed by the plan."""
    live = plan > COARSE
    log = np.where(live, np.log(np.where(live, plan, 1.0)) - log_k, 0.0)
    if live.all():
        u = log.mean(-1)
        v = log.mean(-2) - log.mean((-2, -1))[..., None]
    else:
        n = plan.shape[0]
        graph = np.block([[np.diag(live.sum(1)), live], [live.T, np.diag(live.sum(0))]]).astype(float)
        both = np.linalg.lstsq(graph, np.concatenate([log.sum(1), log.sum(0)]), rcond=1e-12)[0]
        u, v = both[:n], both[n:]
    off = np.where(live, log - u[..., :, None] - v[..., None, :], 0.0)
    return u, v, float((plan * np.abs(off)).sum())


def _relaxed(plan: Array, log_k: Array, a: Array, b: Array, strengths: Array) -> float:
    """The distance to the plan that its own marginals call for; a side of infinite strength has to be met."""
    u, v, off = _scalings(plan, log_k)
    total, level = off, 0.0
    for log, sums, weights, strength in (
        (u, plan.sum(-1), a, float(strengths[0])),
        (v, plan.sum(-2), b, float(strengths[-1])),
    ):
        if strength == math.inf:
            total += float(np.abs(sums - weights).sum())
            level = math.nan  # a constant is free
            continue
        gap = log + strength * np.log(sums / weights)
        mean = float((sums * gap).sum() / sums.sum())
        level += mean
        total += float((sums * np.abs(gap - mean)).sum())
    return total + (0.0 if math.isnan(level) else abs(level) * plan.sum())


def _partial(plan: Array, log_k: Array, a: Array, b: Array, m: float) -> float:
    """What exceeds the bounds, the mass that is missing, and what is left where a multiplier says that nothing should be."""
    u, v, off = _scalings(plan, log_k)
    total = off + abs(plan.sum() - m)
    for sums, weights, heights in ((plan.sum(-1), a, u), (plan.sum(-2), b, v)):
        below = np.minimum(heights.max() - heights, 1.0)
        total += np.maximum(sums - weights, 0).sum() + (np.maximum(weights - sums, 0) * below).sum()
    return float(total)
