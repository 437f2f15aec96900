"""The libraries on one problem: each in its own units and array type, its answer in ours.

The cost is ``|x - y|^2 / 2`` and eps multiplies ``KL(P | a b)``.  POT, OTT-JAX and mdot-tnt regularise by the entropy, which
changes the potentials by ``eps log a`` and ``eps log b`` and not the plan.  GeomLoss has ``blur = sqrt(eps)``; mdot-tnt wants a
cost in [0, 1] and the inverse of eps on that scale.  Whoever takes a cost matrix gets it for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch

import sbot

from .measure import Solve, ladder, scaled
from .tasks import Answer, Task

#: No iteration limit ends a solve here: the clock does.
MANY = 10_000_000
SCALINGS = (0.5, 0.7, 0.9, 0.95, 0.99)


def sbot_points(task: Task, tol: float, memory: int = 2**30) -> Solve:
    """`sbot.solve_bridge` on points, everything included."""
    x, y = torch.from_numpy(task.x), torch.from_numpy(task.y)

    def setup(knob: float) -> Callable[[], Any]:
        solver = sbot.Sinkhorn(tol=knob, max_iter=200_000, memory=memory)
        return lambda: sbot.solve_bridge(x, y, task.eps, solver=solver)

    def read(bridge: sbot.Bridge) -> Answer:
        (f, g), report = bridge.potentials(), bridge.report
        notes = {
            "iterations": report.iterations,
            "reported": report.error,
            "tolerance": report.tolerance,
            "reason": report.reason,
            "notes": list(report.notes),
        }
        return Answer(f.values, g.values, matrix=False, notes=notes)

    return Solve(setup, read, tol, scaled)


def _pot(method: str, tensors: bool) -> Callable[[Task, float], Solve]:
    def prepare(task: Task, tol: float) -> Solve:
        import ot

        def kind(array: Any) -> Any:
            return torch.from_numpy(array) if tensors else array

        a, b, cost = kind(task.a), kind(task.b), kind(task.cost)

        def setup(knob: float) -> Callable[[], Any]:
            options = {"method": method, "numItermax": MANY, "stopThr": knob, "warn": False, "log": True}
            return lambda: ot.sinkhorn(a, b, cost, task.eps, **options)

        def read(raw: Any) -> Answer:
            return Answer(plan=raw[0], notes={"iterations": int(raw[1].get("niter", -1))})

        # it stops on the 2-norm of one marginal, which is at least the L1 norm over sqrt(n)
        return Solve(setup, read, tol / math.sqrt(len(task.b)), scaled)

    return prepare


def _ott(**acceleration: Any) -> Callable[[Task, float], Solve]:
    def prepare(task: Task, tol: float) -> Solve:
        import jax

        jax.config.update("jax_enable_x64", task.dtype == "float64")
        number = np.dtype(task.dtype).type
        arrays = [jax.numpy.asarray(part) for part in (task.cost, number(task.eps), task.a, task.b)]

        def setup(knob: float) -> Callable[[], Any]:
            compiled = _compiled(task.cost.shape, task.dtype, **acceleration)
            threshold = jax.numpy.asarray(number(knob))
            return lambda: jax.block_until_ready(compiled(*arrays, threshold))

        def read(raw: Any) -> Answer:
            f, g = (np.asarray(part, dtype=np.float64) for part in raw[:2])
            iterations = int(np.max(np.asarray(raw[2])))
            log_a, log_b = np.log(task.a.astype(np.float64)), np.log(task.b.astype(np.float64))
            return Answer(f - task.eps * log_a, g - task.eps * log_b, notes={"iterations": iterations})

        return Solve(setup, read, tol, scaled)

    return prepare


@lru_cache(maxsize=8)
def _compiled(shape: tuple[int, ...], dtype: str, momentum: float | None = None, anderson: int | None = None) -> Any:
    """Machine code for every problem of this shape, eps and threshold included among its arguments; not timed."""
    import jax
    from ott.geometry.geometry import Geometry
    from ott.problems.linear.linear_problem import LinearProblem
    from ott.solvers.linear import acceleration
    from ott.solvers.linear.sinkhorn import Sinkhorn

    more: dict[str, Any] = {} if momentum is None else {"momentum": acceleration.Momentum(value=momentum)}
    if anderson is not None:
        more["anderson"] = acceleration.AndersonAcceleration(memory=anderson)

    def run(cost: Any, eps: Any, a: Any, b: Any, threshold: Any) -> Any:
        solver = Sinkhorn(threshold=threshold, max_iterations=MANY // 100, **more)
        out = solver(LinearProblem(Geometry(cost_matrix=cost, epsilon=eps), a, b))
        return out.f, out.g, out.n_iters

    mapped = jax.vmap(run, in_axes=(0, None, None, None, None)) if len(shape) == 3 else run
    shapes = (shape, (), shape[-2:-1], shape[-1:], ())
    return jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(part, np.dtype(dtype)) for part in shapes)).compile()


def geomloss(task: Task, tol: float, backend: str = "tensorized") -> Solve:
    """`SamplesLoss`, which has no tolerance: its annealing is made slower until the error is small enough."""
    from geomloss import SamplesLoss

    x, y, a, b = (torch.from_numpy(part) for part in (task.x, task.y, task.a, task.b))

    def setup(knob: float) -> Callable[[], Any]:
        options = {"p": 2, "blur": math.sqrt(task.eps), "scaling": knob, "debias": False, "potentials": True}
        loss = SamplesLoss("sinkhorn", backend=backend, **options)
        return lambda: loss(a, x, b, y)

    def read(raw: Any) -> Answer:
        f, g = (part.reshape(-1).double() for part in raw)
        return Answer(f, g, matrix=False)

    return Solve(setup, read, SCALINGS[0], ladder(*SCALINGS))


def _mdot(exact: bool) -> Callable[[Task, float], Solve]:
    """As it comes, or with the exponent ``p`` of its stopping rule raised until the error is small enough."""

    def prepare(task: Task, tol: float) -> Solve:
        import mdot_tnt

        top = float(task.cost.max())
        a, b, cost = (torch.from_numpy(part) for part in (task.a, task.b, task.cost / task.cost.max()))
        gamma = top / task.eps

        def setup(knob: float) -> Callable[[], Any]:
            return lambda: mdot_tnt.mdot(a, b, cost, gamma, p=knob)

        def read(raw: Any) -> Answer:
            u, v, reached, operations = raw[0].double(), raw[1].double(), float(raw[2]), int(raw[3])
            if abs(reached / gamma - 1) > 1e-6:  # it gave up at a larger eps: a plan of another problem
                nothing = torch.full_like(u, math.nan)
                return Answer(nothing, v, notes={"iterations": operations, "note": f"stopped at gamma {reached:.3g}"})
            f, g = (part - torch.from_numpy(w).double().log() for part, w in ((u, task.a), (v, task.b)))
            return Answer(task.eps * f, task.eps * g, notes={"iterations": operations})

        def following(knob: float, error: float, tol: float) -> float | None:
            if not math.isfinite(error) or error <= tol:
                return None
            return min(knob + math.log(error / (0.5 * tol)) / math.log(max(gamma, 2.0)), knob + 3)

        return Solve(setup, read, 1.5, following if exact else lambda *_: None)

    return prepare


SINGLE: dict[str, Callable[[Task, float], Solve]] = {
    "sbot": sbot_points,
    "POT sinkhorn": _pot("sinkhorn", False),
    "POT sinkhorn_log": _pot("sinkhorn_log", True),
    "POT sinkhorn_stabilized": _pot("sinkhorn_stabilized", False),
    "POT sinkhorn_log on arrays": _pot("sinkhorn_log", False),
    "OTT": _ott(),
    "OTT momentum 1.5": _ott(momentum=1.5),
    "OTT Anderson 5": _ott(anderson=5),
    "GeomLoss": geomloss,
    "mdot-tnt": _mdot(True),
    "mdot-tnt as it comes": _mdot(False),
}


# ---- batches ---------------------------------------------------------------------------------------------------------


def _pot_loop(method: str) -> Callable[[Task, float], Solve]:
    def prepare(task: Task, tol: float) -> Solve:
        import ot

        def setup(knob: float) -> Callable[[], Any]:
            options = {"method": method, "numItermax": MANY, "stopThr": knob, "warn": False}
            return lambda: [ot.sinkhorn(task.a, task.b, cost, task.eps, **options) for cost in task.cost]

        return Solve(setup, lambda raw: Answer(plan=np.stack(raw)), tol / math.sqrt(len(task.b)), scaled)

    return prepare


def _pot_batch(method: str) -> Callable[[Task, float], Solve]:
    def prepare(task: Task, tol: float) -> Solve:
        import ot

        count = len(task.cost)
        cost = torch.from_numpy(task.cost)
        a, b = (torch.from_numpy(part).expand(count, -1).contiguous() for part in (task.a, task.b))

        def setup(knob: float) -> Callable[[], Any]:
            options = {"reg": task.eps, "max_iter": 100_000, "tol": knob, "method": method, "grad": "detach"}
            return lambda: ot.solve_batch(cost, a=a, b=b, **options)

        return Solve(setup, lambda raw: Answer(plan=raw.plan), tol, scaled)

    return prepare


def _mdot_batch(task: Task, tol: float) -> Solve:
    """`solve_OT_batched`, whose public options have no tolerance: the error is what it stops at."""
    import mdot_tnt

    top = float(task.cost.max())
    cost = torch.from_numpy(task.cost / task.cost.max())
    a, b = (torch.from_numpy(part).expand(len(cost), -1).contiguous() for part in (task.a, task.b))
    options = {"gamma_f": top / task.eps, "return_plan": True, "round": False}

    def setup(knob: float) -> Callable[[], Any]:
        return lambda: mdot_tnt.solve_OT_batched(a, b, cost, **options)

    return Solve(setup, lambda raw: Answer(plan=raw), 0.0, lambda *_: None)


BATCH: dict[str, Callable[[Task, float], Solve]] = {
    "sbot": sbot_points,
    "POT loop sinkhorn": _pot_loop("sinkhorn"),
    "POT loop sinkhorn_log": _pot_loop("sinkhorn_log"),
    "POT solve_batch": _pot_batch("sinkhorn"),
    "POT solve_batch log": _pot_batch("log_sinkhorn"),
    "OTT vmap": _ott(),
    "OTT vmap momentum 1.5": _ott(momentum=1.5),
    "mdot-tnt batched": _mdot_batch,
}

#: Where the plan of a large problem cannot be stored.
LARGE: dict[str, Callable[[Task, float], Solve]] = {
    "sbot": sbot_points,
    "GeomLoss online": lambda task, tol: geomloss(task, tol, "online"),
    "GeomLoss multiscale": lambda task, tol: geomloss(task, tol, "multiscale"),
}


def library(name: str) -> str:
    """Whose process a contender runs in."""
    return name.split()[0]
