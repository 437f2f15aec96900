"""Problems and potentials as plain data and tensors, and back: what a file of a bridge holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from .bridge import Report
from .costs import Cosine, Cost, Lp, MatrixCost, Quadratic
from .errors import InvalidFile, InvalidProblem, Unsupported
from .measures import Discrete, Gaussian, Measure
from .potentials import Atoms, Potential, Quadratics
from .problem import Problem
from .reference import Brownian, LinearSDE, OrnsteinUhlenbeck, Reference, Static

Header = dict[str, Any]
Tensors = dict[str, Tensor]


def pack(problem: Problem, phi: Potential, psi: Potential, report: Report) -> tuple[Header, Tensors]:
    """A bridge as a header and tensors."""
    tensors: Tensors = {}

    def put(prefix: str, parts: dict[str, Tensor | None]) -> list[str]:
        kept = {name: part for name, part in parts.items() if part is not None}
        tensors.update({f"{prefix}.{name}": part for name, part in kept.items()})
        return sorted(kept)

    header = {
        "eps": problem.eps,
        "relax": [None if math.isinf(rho) else rho for rho in problem.relax],
        "result_dtype": str(problem.result_dtype).removeprefix("torch."),
        "notes": list(problem.notes),
        "reference": _pack_reference(problem.reference, put),
        "mu": _pack_measure(problem.mu, put, "mu"),
        "nu": _pack_measure(problem.nu, put, "nu"),
        "phi": _pack_potential(phi, put, "phi"),
        "psi": _pack_potential(psi, put, "psi"),
        "report": asdict(report) | {"error": _finite(report.error), "history": [list(row) for row in report.history]},
    }
    return header, tensors


def unpack(
    header: Header, tensors: Tensors, reference: Reference | None
) -> tuple[Problem, Potential, Potential, Report]:
    """The inverse of `pack`; ``reference`` stands in for one that a file cannot hold."""
    try:
        reference = _unpack_reference(header["reference"], tensors, reference)
        mu, nu = (_unpack_measure(header[side], tensors, side) for side in ("mu", "nu"))
        relax = tuple(math.inf if rho is None else rho for rho in header["relax"])
        result = getattr(torch, header["result_dtype"])
        if not isinstance(result, torch.dtype) or not result.is_floating_point:
            raise TypeError(f"{header['result_dtype']} is not a floating dtype")
        # a file is input like any other: the same checks at the same door
        problem = replace(
            Problem.of(mu, nu, header["eps"], reference, None, relax), result_dtype=result, notes=tuple(header["notes"])
        )
        said = header["report"]
        report = Report(
            **said
            | {
                "error": math.nan if said["error"] is None else said["error"],
                "history": tuple(tuple(row) for row in said["history"]),
                "notes": tuple(said["notes"]),
            }
        )
        phi, psi = (_unpack_potential(header[side], tensors, side) for side in ("phi", "psi"))
        _check_potential(phi, mu)
        _check_potential(psi, nu)
    except (InvalidFile, NeedsReference):
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise InvalidFile(f"the file does not hold a bridge ({fault!r}); save it again") from None
    return problem, phi, psi, report


class NeedsReference(InvalidProblem):
    """The file and the reference given to `load` do not fit together."""


def _check_potential(potential: Potential, measure: Measure) -> None:
    if isinstance(potential, Atoms):
        fits = isinstance(measure, Discrete) and potential.log_weights.shape == measure.weights.shape
    else:
        assert isinstance(potential, Quadratics)
        b, (d,), k = measure.batch_shape, measure.event_shape, potential.logits.shape[-1:]
        shapes = [part.shape for part in (potential.logits, potential.means, potential.covs, potential.growth)]
        fits = isinstance(measure, Gaussian) and shapes == [(*b, *k), (*b, *k, d), (*b, *k, d, d), (*b, d, d)]
    if not fits:
        raise ValueError("a potential does not fit its measure")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _pack_measure(measure: Measure, put: Any, side: str) -> Header:
    if isinstance(measure, Discrete):
        return {"kind": "Discrete", "parts": put(side, {"points": measure.points, "weights": measure.weights})}
    if isinstance(measure, Gaussian):
        return {"kind": "Gaussian", "parts": put(side, {"mean": measure.mean, "cov": measure.cov})}
    raise Unsupported(f"a {type(measure).__name__} cannot be written to a file; save samples of it instead")


def _unpack_measure(said: Header, tensors: Tensors, side: str) -> Measure:
    parts = {name: tensors[f"{side}.{name}"] for name in said["parts"]}
    if said["kind"] == "Discrete":
        return Discrete(parts.get("points"), parts["weights"])
    if said["kind"] == "Gaussian":
        return Gaussian(parts["mean"], parts["cov"])
    raise InvalidFile(f"the file holds an unknown measure {said['kind']!r}; upgrade sbot")


def _pack_potential(potential: Potential, put: Any, side: str) -> Header:
    if isinstance(potential, Atoms):
        # the points are those of the measure, and stored with it
        return {"kind": "Atoms", "parts": put(side, {"log_weights": potential.log_weights})}
    if isinstance(potential, Quadratics):
        parts = {name: getattr(potential, name) for name in ("logits", "means", "covs", "growth")}
        return {"kind": "Quadratics", "parts": put(side, parts)}
    raise Unsupported(f"a {type(potential).__name__} cannot be written to a file; write its state yourself")


def _unpack_potential(said: Header, tensors: Tensors, side: str) -> Potential:
    parts = {name: tensors[f"{side}.{name}"] for name in said["parts"]}
    if said["kind"] == "Quadratics":
        return Quadratics(**parts)
    if said["kind"] != "Atoms":
        raise InvalidFile(f"the file holds an unknown potential {said['kind']!r}; upgrade sbot")
    points = tensors.get(f"{'mu' if side == 'phi' else 'nu'}.points")
    if points is None or "cost.values" in tensors:
        return Atoms(torch.arange(parts["log_weights"].shape[-1]), parts["log_weights"], points)
    return Atoms(points, parts["log_weights"])


def _pack_reference(reference: Reference, put: Any) -> Header:
    if isinstance(reference, Brownian):
        return {"kind": "Brownian"}
    if isinstance(reference, OrnsteinUhlenbeck):
        return {
            "kind": "OrnsteinUhlenbeck",
            "rate": reference.rate,
            "parts": put("reference", {"mean": reference.mean}),
        }
    if isinstance(reference, LinearSDE) and reference.recipe is not None:
        return {"kind": "LinearSDE", "recipe": reference.recipe[0], "arguments": list(reference.recipe[1])}
    if isinstance(reference, LinearSDE) and reference.constants is not None:
        a, b, noise = reference.constants
        return {"kind": "LinearSDE", "parts": put("reference", {"drift": a, "shift": b, "diffusion": noise})}
    if isinstance(reference, Static):
        return _pack_cost(reference.cost(), put)
    return {"kind": "custom", "name": repr(reference)}


def _pack_cost(cost: Cost, put: Any) -> Header:
    if isinstance(cost, (Quadratic, Cosine)):
        return {"kind": "Static", "cost": type(cost).__name__}
    if isinstance(cost, Lp):
        return {"kind": "Static", "cost": "Lp", "p": str(cost.p), "power": cost.power}
    if isinstance(cost, MatrixCost):
        return {"kind": "Static", "cost": "MatrixCost", "parts": put("cost", {"values": cost.values})}
    return {"kind": "custom", "name": repr(cost)}


def _unpack_reference(said: Header, tensors: Tensors, given: Reference | None) -> Reference:
    kind = said["kind"]
    if given is not None and kind != "custom":
        raise NeedsReference(f"the file holds its own reference ({kind}); load it without reference= or cost=")
    if given is not None:
        return given
    if kind == "custom":
        raise NeedsReference(
            f"the file was solved with a reference or cost of your own, {said['name']}, which a file cannot hold; "
            "give it again: sbot.load(path, reference=...) or sbot.load(path, cost=...)"
        )
    makers: dict[str, Callable[[], Reference]] = {
        "Brownian": Brownian,
        "OrnsteinUhlenbeck": lambda: OrnsteinUhlenbeck(said["rate"], tensors["reference.mean"]),
        "LinearSDE": lambda: _unpack_sde(said, tensors),
        "Static": lambda: Static(_unpack_cost(said, tensors)),
    }
    if kind not in makers:
        raise InvalidFile(f"the file holds an unknown reference {kind!r}; upgrade sbot")
    return makers[kind]()


def _unpack_sde(said: Header, tensors: Tensors) -> Reference:
    if "recipe" in said:
        return {"vp": LinearSDE.vp, "ve": LinearSDE.ve}[said["recipe"]](*said["arguments"])
    return LinearSDE(*(tensors[f"reference.{name}"] for name in ("drift", "shift", "diffusion")))


def _unpack_cost(said: Header, tensors: Tensors) -> Cost:
    if said["cost"] == "Lp":
        return Lp(float(said["p"]), said["power"])
    if said["cost"] == "MatrixCost":
        return MatrixCost(tensors["cost.values"])
    return {"Quadratic": Quadratic, "Cosine": Cosine}[said["cost"]]()
