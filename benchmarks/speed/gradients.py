"""Value and gradients against the value alone, and gradients against central differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sbot

from . import footprint
from .measure import Tell, timed
from .tasks import Task, make

Value = Callable[..., Tensor]
#: Seconds after which a solve is not repeated.
LONG = 10.0


def sbot_value(task: Task, tol: float, streamed: bool = False) -> Value:
    """``cost()`` of points and weights."""
    solver = sbot.Sinkhorn(tol=tol, max_iter=200_000, memory=0 if streamed else 2**30)

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sbot.solve_bridge((x, a), (y, b), task.eps, solver=solver).cost()

    return value


def sbot_matrix_value(task: Task, tol: float) -> Value:
    """``cost()`` of a cost matrix and weights."""
    solver = sbot.Sinkhorn(tol=tol, max_iter=200_000)

    def value(cost: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return sbot.solve_bridge(a, b, task.eps, cost=cost, solver=solver).cost()

    return value


def pot_value(task: Task, tol: float) -> Value:
    """Differentiated through the iterations, in POT's units: the full square, entropy."""
    import ot

    options = {"reg": 2 * task.eps, "reg_type": "KL", "max_iter": 100_000, "tol": tol / math.sqrt(len(task.b))}

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ot.solve_sample(x, y, a, b, grad="autodiff", **options).value / 2

    return value


def geomloss_value(task: Task, tol: float) -> Value:
    """`SamplesLoss` with its envelope gradient, annealed as far as by 0.9."""
    from geomloss import SamplesLoss

    options = {"p": 2, "blur": math.sqrt(task.eps), "scaling": 0.9, "debias": False, "backend": "tensorized"}
    loss = SamplesLoss("sinkhorn", **options)

    def value(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return loss(a, x, b, y)

    return value


VALUES: dict[str, Callable[[Task, float], Value]] = {
    "sbot points and weights, stored": sbot_value,
    "sbot cost matrix and weights": sbot_matrix_value,
    "sbot points and weights, streamed": lambda task, tol: sbot_value(task, tol, True),
    "POT autodiff": pot_value,
    "GeomLoss autograd": geomloss_value,
}


def inputs(task: Task, contender: str) -> list[Tensor]:
    """What is differentiated."""
    weights = [torch.from_numpy(task.a), torch.from_numpy(task.b)]
    points = (
        [torch.from_numpy(task.cost)] if "matrix" in contender else [torch.from_numpy(task.x), torch.from_numpy(task.y)]
    )
    return [*points, *weights]


def run(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Time and peak of both, in a process that has only solved and differentiated a problem of eight points before.

    What the libraries load then is no memory of a gradient.  Neither are the gradients themselves, the ``answer``, whose
    bytes are counted apart: those of a cost matrix are as large as it.
    """
    _warm(job)
    task = make(job)
    value = VALUES[job["contender"]](task, job["tol"])
    given = inputs(task, job["contender"])
    leaves = [part.clone().requires_grad_() for part in given]

    def alone() -> float:
        with torch.no_grad():
            return float(value(*given))

    def both() -> tuple[float, tuple[Tensor, ...]]:
        out = value(*leaves)
        return float(out.detach()), torch.autograd.grad(out, leaves, allow_unused=True)

    before = footprint.resident()
    peaks: dict[str, float] = {}
    seconds: dict[str, list[float]] = {"value": [], "gradient": []}
    for name, call in (("value", alone), ("gradient", both)):
        tell({"event": "start"})
        footprint.forget_peak()
        out, took, _ = timed(call)
        answer = sum(part.nbytes for part in out[1] if part is not None) if isinstance(out, tuple) else 0
        peaks[name] = footprint.peak() - before
        seconds[name].append(took)
        del out
    if max(map(max, seconds.values())) <= LONG:
        seconds = {"value": [], "gradient": []}
        for _ in range(5):
            for name, call in (("value", alone), ("gradient", both)):
                tell({"event": "start"})
                seconds[name].append(timed(call)[1])
    tell({"event": "stop"})
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "status": "reached",
        "seconds": medians["gradient"],
        "seconds_value": medians["value"],
        "peak": peaks["gradient"],
        "peak_value": peaks["value"],
        "answer": answer,
        "value": alone(),
    }


def _warm(job: dict[str, Any]) -> None:
    small = make({**job, "n": 8})
    leaves = [part.requires_grad_() for part in inputs(small, job["contender"])]
    value = VALUES[job["contender"]](small, job["tol"])(*leaves)
    torch.autograd.grad(value, leaves, allow_unused=True)


def check(job: dict[str, Any], tell: Tell) -> dict[str, Any]:
    """Relative error of each gradient against central differences, in the direction of random changes of the data.

    Weights move within equal masses, where alone the balanced value is defined.
    """
    tell({"event": "start"})
    task = make(job)
    value = VALUES[job["contender"]](task, job["tol"])
    leaves = [part.clone().requires_grad_() for part in inputs(task, job["contender"])]
    names = ["cost", "a", "b"] if len(leaves) == 3 else ["x", "y", "a", "b"]
    gradients = torch.autograd.grad(value(*leaves), leaves)
    generator = torch.Generator().manual_seed(job["seed"])
    errors = {}
    for k, name in enumerate(names):
        direction = torch.randn(leaves[k].shape, generator=generator, dtype=leaves[k].dtype)
        if name in "ab":
            direction = (direction - direction.mean()) / direction.numel()
        errors[f"error_{name}"] = _relative(value, leaves, k, gradients[k], direction)
    tell({"event": "stop"})
    return {"status": "reached", **errors}


def _relative(value: Value, leaves: list[Tensor], k: int, gradient: Tensor, direction: Tensor) -> float:
    """Along the gradient and along the direction, fourth-order differences; the larger error over the size of the gradient."""
    worst = 0.0
    if gradient.ndim == 1:
        gradient = gradient - gradient.mean()
    for way in (direction / direction.norm(), gradient / gradient.norm()):
        expected = float((gradient * way).sum())
        step = 3e-4 * (float(leaves[k].detach().abs().mean()) if gradient.ndim == 1 else 1.0)

        def at(t: float, way: Tensor = way, step: float = step) -> float:
            moved = [leaf.detach() + t * step * way if j == k else leaf.detach() for j, leaf in enumerate(leaves)]
            with torch.no_grad():
                return float(value(*moved))

        found = (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * step)
        worst = max(worst, abs(found - expected) / float(gradient.norm()))
    return worst
