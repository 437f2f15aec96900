"""Peak memory of what can be asked of a bridge, beside what its answer takes."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import torch

import sbot

from . import footprint
from .measure import Tell, timed
from .tasks import make


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """One solve, then each query of it, in a process that has solved nothing before."""
    task = make(job)
    x, y = torch.from_numpy(task.x), torch.from_numpy(task.y)
    solver = sbot.Sinkhorn(tol=job["tol"])
    before = footprint.resident()
    tell({"event": "start"})
    result: dict[str, Any] = {"status": "reached", "inputs": task.x.nbytes + task.y.nbytes}

    def note(name: str, call: Callable[[], Any], base: int | None = None) -> Any:
        gc.collect()
        footprint.forget_peak()
        base = footprint.resident() if base is None else base
        out, seconds, _ = timed(call)
        result[f"peak_{name}"], result[f"seconds_{name}"] = footprint.peak() - base, seconds
        return out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bridge = note("solve", lambda: sbot.solve_bridge(x, y, task.eps, solver=solver), before)
        ones = torch.ones(len(y), dtype=y.dtype)
        note("apply", lambda: bridge.apply(ones))
        sparse = note("sparse_plan", lambda: bridge.sparse_plan(0.9, max_per_row=10))
        result["entries"] = len(sparse.values)
        del sparse
        if job["n"] <= 10_000:
            note("plan", bridge.plan)
        leaves = [part.clone().requires_grad_() for part in (x, y)]

        def gradient() -> Any:
            value = sbot.solve_bridge(*leaves, task.eps, solver=solver, init=bridge).cost()
            return torch.autograd.grad(value, leaves)

        note("gradient", gradient)
    tell({"event": "stop"})
    result["error"] = bridge.report.error
    result["seconds"] = result["seconds_solve"]
    return result
