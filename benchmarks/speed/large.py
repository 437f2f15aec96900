"""Problems whose plan cannot be stored: seconds, and memory above the inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import footprint
from .contenders import LARGE
from .measure import Solve, Tell, measure
from .tasks import make

#: Points of the small problem that is solved first: what a library compiles or allocates once is not timed.
WARM = 2000


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """One contender on one problem, in a process that has solved nothing before."""
    task = make(job)
    prepare = LARGE[job["contender"]]
    before = footprint.resident()  # before anything is solved: what libraries allocate on first use is counted
    small = prepare(make({**job, "n": min(WARM, job["n"])}), job["tol"])
    small.setup(small.first)()
    peaks: list[int] = []
    solve = _watched(prepare(task, job["tol"]), peaks, before)
    result = measure(task, solve, job["tol"], tell)
    return {**result, "peak_above_inputs": max(peaks), "inputs": task.x.nbytes + task.y.nbytes}


def _watched(solve: Solve, peaks: list[int], before: int) -> Solve:
    """The same, with the peak of memory noted: of the first call above ``before``, of others above what judging a plan left."""

    def setup(knob: float) -> Callable[[], Any]:
        call = solve.setup(knob)

        def watched() -> Any:
            start = footprint.resident() if peaks else before
            footprint.forget_peak()
            raw = call()
            peaks.append(footprint.peak() - start)
            return raw

        return watched

    return replace(solve, setup=setup)
