"""Which of two solutions of a transport problem is right: bounds in float64 that need no solver.

Any pair of potentials gives a value below the optimum, and any plan with the right marginals one above it.  Where the two that
our potentials give are next to each other, the optimum is known, whoever solved it.
"""

from __future__ import annotations

import numpy as np

#: Relative difference that counts as none.
CLOSE = 1e-8


def judged(mine, theirs, C, a, b, reg, unbalanced) -> tuple[str, float, float]:
    """A verdict, and the relative deviations of values and plans, for one problem in float64.

    "agree"; "theirs is off": our value is between bounds that are next to each other, and either our plan has its marginals, and
    one of theirs has not, or theirs is further from the solution than these bounds leave room for ours; "differ" otherwise.
    """
    lower, upper, known = bounds(C, a, b, reg, unbalanced, mine["f"], mine["g"])
    scale = max(abs(float(theirs["value"])), float(np.abs(C).max()) * min(a.sum(), b.sum()), reg)
    value_off = abs(float(mine["value"]) - float(theirs["value"])) / scale
    plan_off = np.abs(mine["plan"] - theirs["plan"]).max() / max(mine["plan"].max(), theirs["plan"].max())
    value_off, plan_off = (np.inf if np.isnan(off) else float(off) for off in (value_off, plan_off))
    if max(value_off, plan_off) <= CLOSE:
        return "agree", value_off, plan_off
    proven = upper - lower <= CLOSE * scale
    proven = proven and lower - CLOSE * scale <= float(mine["value"]) <= upper + CLOSE * scale
    off = not lower - CLOSE * scale <= float(theirs["value"]) <= upper + CLOSE * scale
    off = off or not slip(theirs["plan"], C, a, b, reg, unbalanced) <= 1e-9
    off = off and slip(mine["plan"], C, a, b, reg, unbalanced) <= 1e-9
    room = nearness(upper - lower, scale, known.sum(), reg)
    apart, far = (np.abs(plan - known).sum() for plan in (mine["plan"], theirs["plan"]))
    off = off or far > 2 * (room + apart)
    return ("theirs is off" if proven and off else "differ"), value_off, plan_off


def nearness(gap, scale, mass, reg) -> float:
    """The L1 distance from the solution of a plan whose objective is within ``gap`` of it, at most.

    The objective is ``reg KL`` above that of the solution, and more; the distance is then bounded by Pinsker's inequality.
    """
    rounding = 16 * np.finfo(np.float64).eps * scale
    return float(np.sqrt(2 * 1.01 * mass * max(gap, rounding) / reg))


def bounds(C, a, b, reg, rho, f, g) -> tuple[float, float, np.ndarray]:
    """Below and above the optimum, from potentials that need not be optimal, and the plan that the upper one is of."""
    density = np.exp((f[:, None] + g - C) / reg)
    plan = a[:, None] * b * density
    if rho is None:
        mass = (a.sum() + b.sum()) / 2
        lower = a @ f + b @ g + reg * (mass - plan.sum())
        plan = rounded(plan, a, b)
        upper = (plan * C).sum() + reg * (plan * log_ratio(plan, a[:, None] * b)).sum()
        return lower, upper, plan
    ends = [-rho * (w * np.expm1(-p / rho)).sum() for w, p in ((a, f), (b, g))]
    lower = sum(ends) - reg * (plan.sum() - a.sum() * b.sum())
    upper = (plan * C).sum() + reg * kl(plan, a[:, None] * b)
    return lower, upper + rho * (kl(plan.sum(1), a) + kl(plan.sum(0), b)), plan


def slip(plan, C, a, b, reg, rho) -> float:
    """How far a plan ``a_i b_j exp((f_i + g_j - C_ij) / reg)`` is from optimal: the L1 error of its marginals."""
    if rho is None:
        return (np.abs(plan.sum(1) - a).sum() + np.abs(plan.sum(0) - b).sum()) / a.sum()
    # f = -rho log(r / a) for sums r of rows, and so for g: what the plan should then be
    with np.errstate(divide="ignore"):
        f, g = (-rho * np.log(plan.sum(axis) / w) for axis, w in ((1, a), (0, b)))
    wanted = a[:, None] * b * np.exp((f[:, None] + g - C) / reg)
    return np.abs(plan - wanted).sum() / plan.sum()


def rounded(plan, a, b):
    """A plan with exactly these marginals (Altschuler, Weed and Rigollet 2017)."""
    plan = plan * np.minimum(1, a / plan.sum(1))[:, None]
    plan = plan * np.minimum(1, b / plan.sum(0))
    left, right = a - plan.sum(1), b - plan.sum(0)
    return plan + np.outer(left, right) / max(left.sum(), 1e-300)


def log_ratio(p, q):
    return np.log(np.where(p > 0, p, 1.0) / np.where(p > 0, q, 1.0))


def kl(p, q) -> float:
    return float((p * log_ratio(p, q) - p + q).sum())
