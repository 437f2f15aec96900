"""Runs: grids of problems through the contenders, one row for each cell."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from .contenders import Answer, Contender, oracle, pot, pot_log, pot_plain, sbot_sinkhorn
from .problems import COSTS, KINDS, RATIOS, WEIGHTS, Cell, Task, make

Row = dict[str, Any]

#: What the plans are solved to, by dtype; below what the dtype can reach, a solver says so and stops there.
TOLERANCE = {"float64": 1e-12, "float32": 1e-6}
#: Seconds that one solve of POT may take in the comparison of plans, and any contender in the comparison of times.
SECONDS, SECONDS_TIMED = 2.0, 20.0
#: Marginal error at which times are compared.
TIMED_TOLERANCE = 1e-6


# ---- the grids -------------------------------------------------------------------------------------------------------


def pot_cells(quick: bool, seed: int) -> list[Cell]:
    """Everything crossed at one small size, then other sizes with the quadratic cost."""
    if quick:
        kinds = itertools.product(KINDS, (0.1, 1.0), TOLERANCE)
        corner = [Cell(20, 15, 2, "quadratic", "zeros", kind, ratio, dtype, seed) for kind, ratio, dtype in kinds]
        return [*corner, Cell(20, 15, 1, "matrix", "random", seed=seed), Cell(20, 15, 50, "l1", seed=seed)]
    # the cost of a random matrix does not know the dimension
    spaces = [(cost, d) for cost in COSTS for d in (1, 2, 50) if cost != "matrix" or d == 1]
    small = itertools.product(spaces, WEIGHTS, KINDS, RATIOS, TOLERANCE)
    cells = [Cell(48, 36, d, cost, w, kind, ratio, dtype, seed) for (cost, d), w, kind, ratio, dtype in small]
    sizes = itertools.product([(20, 90), (200, 150), (300, 300)], KINDS, RATIOS, TOLERANCE)
    return cells + [
        Cell(n, m, 2, "quadratic", "random", kind, ratio, dtype, seed) for (n, m), kind, ratio, dtype in sizes
    ]


def timed_cells(quick: bool, seed: int) -> list[Cell]:
    """One size, one cost, all eps: for the picture of times."""
    size, ratios = (60, (0.1, 1.0)) if quick else (1000, RATIOS)
    return [Cell(size, size, kind=kind, ratio=ratio, seed=seed) for kind in KINDS[:2] for ratio in ratios]


# ---- differences -----------------------------------------------------------------------------------------------------


def plan_difference(p: Answer, q: Answer) -> float:
    """Largest difference of an entry, relative to the largest entry of ``q``."""
    return float(abs(p.plan - q.plan).max() / abs(q.plan).max())


def potential_difference(task: Task, p: Answer, q: Answer) -> float:
    """Largest difference of a potential at the atoms with weight, in cost units, less the constant that is free."""
    live_a, live_b = task.a > 0, task.b > 0
    with np.errstate(invalid="ignore"):
        f, g = (p.f - q.f)[live_a], (p.g - q.g)[live_b]
    if math.isinf(task.rho[0]) and math.isinf(task.rho[1]):
        shift = (f.mean() - g.mean()) / 2
        f, g = f - shift, g + shift
    return float(max(abs(f).max(), abs(g).max()))


# ---- the comparison --------------------------------------------------------------------------------------------------


def compare(cells: Iterable[Cell]) -> Iterator[Row]:
    """sbot, POT and the oracle on every cell; both libraries to the tolerance that sbot reports."""
    for cell in cells:
        task = make(cell)
        ours = sbot_sinkhorn(task, TOLERANCE[cell.dtype], SECONDS)
        theirs, exact = pot(task, ours.tolerance, SECONDS), oracle(task)
        scale = float(task.cost.mean())
        yield {
            **cell.__dict__,
            "mean_cost": scale,
            "tolerance": ours.tolerance,
            "plan_sbot_pot": plan_difference(ours, theirs),
            "plan_sbot": plan_difference(ours, exact),
            "plan_pot": plan_difference(theirs, exact),
            "potential_sbot_pot": potential_difference(task, ours, theirs),
            "potential_sbot": potential_difference(task, ours, exact),
            "potential_pot": potential_difference(task, theirs, exact),
            "value": exact.value,
            "value_sbot_pot": abs(ours.value - theirs.value) / scale,
            "value_sbot": abs(ours.value - exact.value) / scale,
            "value_pot": abs(theirs.value - exact.value) / scale,
            **_outcome("sbot", ours),
            "reported_sbot": ours.reported,
            **_outcome("pot", theirs),
            "solver_pot": theirs.name,
            "error_oracle": exact.error,
        }


def _outcome(key: str, answer: Answer) -> Row:
    return {
        f"error_{key}": answer.error,
        f"status_{key}": answer.status,
        f"note_{key}": answer.note,
        f"iterations_{key}": answer.iterations,
        f"seconds_{key}": answer.seconds,
    }


def time_all(cells: Iterable[Cell]) -> Iterator[Row]:
    """Median seconds of up to five solves of each contender, to one tolerance; a solve cut off counts once."""
    for cell in cells:
        task = make(cell)
        rivals: dict[str, Contender] = {"sbot": sbot_sinkhorn, "POT sinkhorn_log": pot_log, "POT sinkhorn": pot_plain}
        if cell.kind != "balanced":
            rivals = {"sbot": sbot_sinkhorn, "POT sinkhorn_unbalanced": pot}
        for name, contender in rivals.items():
            answer, seconds = _median(lambda task=task, run=contender: run(task, TIMED_TOLERANCE, SECONDS_TIMED))
            more = {"status": answer.status, "error": answer.error, "iterations": answer.iterations}
            yield {**cell.__dict__, "contender": name, "seconds": seconds, **more, "note": answer.note}


def _median(solve: Callable[[], Answer]) -> tuple[Answer, float]:
    answer = solve()  # the warm-up, unless it is too slow to repeat
    if answer.seconds > 2:
        return answer, answer.seconds
    return answer, statistics.median(solve().seconds for _ in range(5))
