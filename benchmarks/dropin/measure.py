"""Both sides of one call on the same arrays, in turn, and how good each result is."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

import sbot

from ..problems import Array
from ..speed.measure import ENOUGH, LEAST, MOST, REPEATED, Tell, timed
from .calls import CALLS, MASS, RELAX, Call, Data

#: A plan whose error is larger is none; what is between the two is marked.
FAILED, LOOSE = 0.1, 1e-4
#: The relative gap at which a plan is a solution.
SOLVED = 1e-10
WARNINGS = 3
#: Points of the small problem that is solved first.
WARM = 12


@dataclass(frozen=True)
class Side:
    """One side after its first call, which is not among the timed ones."""

    call: Callable[[], Any]
    seconds: float
    error: float
    said: list[str]
    fault: str = ""


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """sbot alone, which sets the limit of the original; or the original, with sbot between its repetitions."""
    call = CALLS[job["kind"]]
    data = Data.of(job, call.tensors)
    alone = job["contender"] == "sbot"
    modules = [call.module(ours=True)] if alone else [call.module(ours=True), call.module(ours=False)]
    for module in modules:  # what is imported or compiled once is not timed
        first(call, module, Data.of({**job, "n": min(WARM, job["n"])}, call.tensors), lambda event: None)
    mine = first(call, modules[0], data, tell)
    if alone:
        return _outcome(mine, repeat([mine], tell, job.get("repeated", REPEATED))[0])
    other = first(call, modules[1], data, tell)
    if other.fault:
        return {"status": "failed", "note": other.fault, "ours": mine.seconds, "ours_error": mine.error}
    seconds = repeat([other, mine], tell, job.get("repeated", REPEATED))
    return {**_outcome(other, seconds[0]), "ours": seconds[1], "ours_error": mine.error}


def _outcome(side: Side, seconds: float) -> dict[str, Any]:
    if side.fault:
        return {"status": "failed", "note": side.fault}
    good = math.isfinite(side.error) and side.error <= FAILED
    return {
        "status": "reached" if good else "failed",
        "seconds": seconds,
        "error": side.error,
        "warned": side.said,
        **({} if good else {"note": f"error {side.error:.1g}" if math.isfinite(side.error) else "not numbers"}),
    }


def first(call: Call, module: Any, data: Data, tell: Tell) -> Side:
    """The first call of a side, with what it warns of and the error of its plan."""

    def made() -> Any:
        return call.make(module, data)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tell({"event": "start"})
        try:
            out, seconds, _ = timed(made)
        except Exception as fault:
            return Side(made, math.nan, math.nan, [], f"{type(fault).__name__}: {str(fault)[:100]}")
        finally:
            tell({"event": "stop"})
        said = sorted({str(w.message).splitlines()[0][:90] for w in caught if issubclass(w.category, UserWarning)})
        plan = call.plan(module, data, out)
    return Side(made, seconds, error(call.kind, data, plan), said[:WARNINGS])


def repeat(sides: list[Side], tell: Tell, repeated: float) -> list[float]:
    """Median seconds of each, in turn; a side is not repeated where the first call of any took longer than ``repeated``."""
    if any(side.seconds > repeated for side in sides):
        return [side.seconds for side in sides]
    times: list[list[float]] = [[] for _ in sides]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while len(times[0]) < LEAST or (len(times[0]) < MOST and sum(times[0]) < min(ENOUGH, repeated)):
            for side, found in zip(sides, times, strict=True):
                if side.fault:
                    found.append(math.nan)
                    continue
                tell({"event": "start"})  # each repetition has the limit to itself
                found.append(timed(side.call)[1])
    tell({"event": "stop"})
    return [statistics.median(found) for found in times]


# ---- how good a plan is ----------------------------------------------------------------------------------------------


def error(kind: str, data: Data, plan: Any) -> float:
    """Relative L1 distance from what the marginals of the plan have to be, in float64; the worst of a batch."""
    if hasattr(plan, "detach"):
        plan = plan.detach().cpu().numpy()
    plan = np.asarray(plan, dtype=np.float64)
    a, b = (np.asarray(w, dtype=np.float64) for w in (data.a, data.b))
    if kind == "first target":
        b = data.targets[:, 0].astype(np.float64)
    if kind == "relaxed":
        return _relaxed(data, plan, a, b)
    rows, columns = plan.sum(-1), plan.sum(-2)
    if kind == "partial":
        over = np.maximum(rows - a, 0).sum() + np.maximum(columns - b, 0).sum()
        return float((over + abs(plan.sum() - MASS)) / MASS)
    return float((np.abs(rows - a).sum(-1) + np.abs(columns - b).sum(-1)).max())


def _relaxed(data: Data, plan: Array, a: Array, b: Array) -> float:
    """The distance from the solution, which is sbot's in float64 where its certificate says that it is one."""
    cost, top = data.squares.astype(np.float64), float(data.top)
    solver = sbot.Sinkhorn(tol=SOLVED / 100, max_iter=100_000)
    with warnings.catch_warnings():  # the gap decides
        warnings.simplefilter("ignore")
        bridge = sbot.solve_bridge(a, b, data.ratio * top, cost=cost, relax=RELAX * top, solver=solver)
    if not float(bridge.gap()) <= SOLVED * float(bridge.cost()):
        raise RuntimeError(f"the relaxed problem at reg {data.ratio:g} is not solved: {bridge.report}")
    exact = bridge.plan().numpy()
    return float(np.abs(exact - plan).sum() / exact.sum())
