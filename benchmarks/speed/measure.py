"""One contender on one problem: find what it has to be asked for, then time that."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .tasks import Answer, Task, Verdict, judge

#: The same plan summed in another order.
SLACK = 1.02
#: A solve that takes longer is not repeated, if nothing else is asked for.
REPEATED = 10.0
#: Times a solve is repeated at least, at most, and the seconds after which it is enough.
LEAST, MOST, ENOUGH = 5, 200, 0.5
#: Values of the knob that are tried.
TRIES = 7


@dataclass(frozen=True)
class Solve:
    """A library on one problem, with the one knob that says how exact it is to be.

    ``setup(knob)`` does what is not timed and returns the call that is; ``read`` turns what that returns into an `Answer`;
    ``following(knob, error, tol)`` is the knob to try when the error was too large, or much too small, or None.
    """

    setup: Callable[[float], Callable[[], Any]]
    read: Callable[[Any], Answer]
    first: float
    following: Callable[[float, float, float], float | None]


Tell = Callable[[dict[str, Any]], None]


def scaled(knob: float, error: float, tol: float) -> float | None:
    """A tolerance: the error is proportional to it."""
    if not math.isfinite(error):
        return None
    following = knob * (0.7 if error > tol else 0.85) * tol / max(error, 1e-3 * tol)
    return following if following > 1e-17 else None


def ladder(*rungs: float) -> Callable[[float, float, float], float | None]:
    """Settings from quick to exact: the next one while the error is too large."""

    def following(knob: float, error: float, tol: float) -> float | None:
        place = rungs.index(knob) + 1
        return rungs[place] if error > SLACK * tol and place < len(rungs) else None

    return following


@dataclass(frozen=True)
class Try:
    knob: float
    seconds: float
    cores: float
    answer: Answer
    verdict: Verdict
    call: Callable[[], Any]


def measure(task: Task, solve: Solve, tol: float, tell: Tell, repeated: float = REPEATED) -> dict[str, Any]:
    """Median seconds of the loosest setting found whose plan has a marginal error of at most ``tol``."""
    best: Try | None = None
    knob: float | None = solve.first
    tried: list[dict[str, float]] = []
    for _ in range(TRIES):
        assert knob is not None
        this = _once(task, solve, knob, tell)
        error = this.verdict.error
        tried.append({"knob": knob, "seconds": this.seconds, "error": error, "linear_cost": this.verdict.linear_cost})
        tell({"event": "tried", "tried": tried})
        good = error <= SLACK * tol
        if best is None or _rank(this, tol) < _rank(best, tol):
            best = this
        if good and (error > 0.6 * tol or this.seconds > repeated / 2 or len(tried) > 2):
            break
        knob = solve.following(knob, error, tol)
        if knob is None or (not good and _hopeless(tried)):
            break
    assert best is not None
    seconds, cores, repeats = _repeat(best, tell, repeated)
    error = best.verdict.error
    return {
        "status": "failed" if not math.isfinite(error) else "reached" if error <= SLACK * tol else "not reached",
        "seconds": seconds,
        "repeats": repeats,
        "cores": cores,
        "error": error,
        "linear_cost": best.verdict.linear_cost,
        "knob": best.knob,
        "tried": tried,
        **best.answer.notes,
    }


def _rank(this: Try, tol: float) -> tuple[bool, float]:
    """Good ones first, the least exact of them best: one solve of a small problem does not tell times apart."""
    error = this.verdict.error
    if error <= SLACK * tol:
        return False, -error
    return True, error if math.isfinite(error) else math.inf


def _hopeless(tried: list[dict[str, float]]) -> bool:
    """A harder setting did not help: rounding, a limit of iterations, or not numbers."""
    errors = [step["error"] for step in tried]
    return not math.isfinite(errors[-1]) or (len(errors) > 1 and errors[-1] > 0.98 * errors[-2])


def _once(task: Task, solve: Solve, knob: float, tell: Tell) -> Try:
    call = solve.setup(knob)
    tell({"event": "start"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        raw, seconds, cores = timed(call)
    tell({"event": "stop"})
    answer = solve.read(raw)
    said = sorted({str(w.message).splitlines()[0][:90] for w in caught})
    if said:
        answer.notes["warned"] = said[:3]
    return Try(knob, seconds, cores, answer, judge(task, answer), call)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it returns, seconds, and the cores that it kept busy on average."""
    cpu, start = time.process_time(), time.perf_counter()
    raw = call()
    seconds = time.perf_counter() - start
    return raw, seconds, (time.process_time() - cpu) / max(seconds, 1e-9)


def _repeat(best: Try, tell: Tell, repeated: float) -> tuple[float, float, int]:
    if best.seconds > repeated:
        return best.seconds, best.cores, 1
    times, busy = [], []
    tell({"event": "start"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while len(times) < LEAST or (len(times) < MOST and sum(times) < ENOUGH):
            _, seconds, cores = timed(best.call)
            times.append(seconds)
            busy.append(cores * seconds)
            tell({"event": "start"})  # each repetition has the limit to itself
    tell({"event": "stop"})
    return statistics.median(times), sum(busy) / sum(times), len(times)
