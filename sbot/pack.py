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
from .measures import Discrete, Gaussian, Measure, Mixture, Sampler
from .potentials import Atoms, Potential, Quadratics
from .problem import Problem
from .reference import Brownian, LinearSDE, OrnsteinUhlenbeck, Reference, Static

Header = dict[str, Any]
Tensors = dict[str, Tensor]


def pack(problem: Problem, phi: Potential, psi: Potential, report: Report) -> tuple[Header, Tensors]:
    """A bridge of potentials as a header and tensors."""
    header, tensors = pack_problem(problem, report)
    put = _putting(tensors)
    header |= {
        "phi": _pack_potential(phi, put, "phi", problem.mu),
        "psi": _pack_potential(psi, put, "psi", problem.nu),
    }
    return header, tensors


def pack_problem(problem: Problem, report: Report) -> tuple[Header, Tensors]:
    """What every bridge has: what was asked, and how it went."""
    tensors: Tensors = {}
    put = _putting(tensors)
    header = {
        "eps": problem.eps,
        "relax": [None if math.isinf(rho) else rho for rho in problem.relax],
        "result_dtype": str(problem.result_dtype).removeprefix("torch."),
        "notes": list(problem.notes),
        "reference": _pack_reference(problem.reference, put),
        "mu": _pack_measure(problem.mu, put, "mu"),
        "nu": _pack_measure(problem.nu, put, "nu"),
        "report": asdict(report)
        | {
            "error": _finite(report.error),
            "errors": [_finite(error) for error in report.errors],
            "history": [list(row) for row in report.history],
        },
    }
    return header, tensors


def _putting(tensors: Tensors) -> Callable[[str, dict[str, Tensor | None]], list[str]]:
    """A function that stores named tensors under a prefix, and returns the names."""

    def put(prefix: str, parts: dict[str, Tensor | None]) -> list[str]:
        kept = {name: part for name, part in parts.items() if part is not None}
        tensors.update({f"{prefix}.{name}": part for name, part in kept.items()})
        return sorted(kept)

    return put


def unpack(
    header: Header,
    tensors: Tensors,
    reference: Reference | None,
    ends: tuple[Measure | None, Measure | None] = (None, None),
) -> tuple[Problem, Potential, Potential, Report]:
    """The inverse of `pack`; ``reference`` and the measures ``ends`` stand in for what a file cannot hold."""
    problem, report = unpack_problem(header, tensors, reference, ends)
    try:
        phi, psi = (_unpack_potential(header[side], tensors, side) for side in ("phi", "psi"))
        _check_potential(phi, problem.mu)
        _check_potential(psi, problem.nu)
    except InvalidFile:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise InvalidFile(f"the file does not hold a bridge ({fault!r}); save it again") from None
    return problem, phi, psi, report


def unpack_problem(
    header: Header,
    tensors: Tensors,
    reference: Reference | None,
    ends: tuple[Measure | None, Measure | None] = (None, None),
) -> tuple[Problem, Report]:
    """The inverse of `pack_problem`."""
    try:
        reference = _unpack_reference(header["reference"], tensors, reference)
        mu, nu = (
            _unpack_measure(header[side], tensors, side, given) for side, given in zip(("mu", "nu"), ends, strict=True)
        )
        relax = tuple(math.inf if rho is None else rho for rho in header["relax"])
        result = _dtype(header["result_dtype"])
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
                "errors": tuple(math.nan if error is None else error for error in said.get("errors", ())),
            }
        )
    except (InvalidFile, Needs):
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as fault:
        raise InvalidFile(f"the file does not hold a bridge ({fault!r}); save it again") from None
    return problem, report


class Needs(InvalidProblem):
    """The file and what was given to `load` beside it do not fit together."""


def _check_potential(potential: Potential, measure: Measure) -> None:
    if isinstance(potential, Atoms) and not potential.points.dtype.is_floating_point:
        fits = isinstance(measure, Discrete) and potential.log_weights.shape == measure.weights.shape
    elif isinstance(potential, Atoms):
        fits = potential.points.shape == (*potential.log_weights.shape, *measure.event_shape)
        fits = fits and potential.log_weights.shape[:-1] == measure.batch_shape
    else:
        assert isinstance(potential, Quadratics)
        b, (d,), k = measure.batch_shape, measure.event_shape, potential.logits.shape[-1:]
        shapes = [part.shape for part in (potential.logits, potential.means, potential.covs, potential.growth)]
        fits = shapes == [(*b, *k), (*b, *k, d), (*b, *k, d, d), (*b, d, d)]
        fits = fits and (potential.origin is None or potential.origin.shape == (*b, d))
    if not fits:
        raise ValueError("a potential does not fit its measure")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _pack_measure(measure: Measure, put: Any, side: str) -> Header:
    if isinstance(measure, Discrete):
        return {"kind": "Discrete", "parts": put(side, _atoms(measure))}
    if isinstance(measure, Gaussian):
        return {"kind": "Gaussian", "parts": put(side, {"mean": measure.mean, "cov": measure.cov})}
    if isinstance(measure, Mixture):
        parts = {"logits": measure.logits, "means": measure.components.mean, "covs": measure.components.cov}
        return {"kind": "Mixture", "parts": put(side, parts)}
    if isinstance(measure, Sampler):
        dtype = str(measure.source_dtype).removeprefix("torch.")
        return {"kind": "Sampler", "event_shape": list(measure.event_shape), "dtype": dtype}
    raise Unsupported(f"a {type(measure).__name__} cannot be written to a file; save samples of it instead")


def _atoms(measure: Discrete) -> dict[str, Tensor | None]:
    return {"points": measure.points, "weights": measure.weights, "sizes": measure.sizes}


def _unpack_measure(said: Header, tensors: Tensors, side: str, given: Measure | None) -> Measure:
    if said["kind"] == "Sampler":
        return _missing(said, side) if given is None else _fitting(said, side, given)
    if given is not None:
        raise Needs(f"the file holds its own {side} ({said['kind']}); load it without {side}=")
    parts = {name: tensors[f"{side}.{name}"] for name in said["parts"]}
    if said["kind"] == "Discrete":
        return Discrete(parts.get("points"), parts["weights"], sizes=parts.get("sizes"))
    if said["kind"] == "Gaussian":
        return Gaussian(parts["mean"], parts["cov"])
    if said["kind"] == "Mixture":
        return Mixture(parts["logits"], parts["means"], parts["covs"])
    raise InvalidFile(f"the file holds an unknown measure {said['kind']!r}; upgrade sbot")


def _missing(said: Header, side: str) -> Sampler:
    """A sampler whose function stayed behind: all that does not draw from it still works."""

    def draw(n: int, generator: torch.Generator | None) -> Tensor:
        raise Unsupported(
            f"{side} was a Sampler, whose function a file cannot hold; give it again: sbot.load(path, {side}=...)"
        )

    shape = tuple(int(size) for size in said["event_shape"])
    return Sampler(draw, shape, like=torch.empty(0, dtype=_dtype(said["dtype"])))


def _fitting(said: Header, side: str, given: Measure) -> Measure:
    shape, dtype = tuple(said["event_shape"]), _dtype(said["dtype"])
    if given.event_shape != shape or given.batch_shape:
        raise Needs(
            f"{side} has samples of shape {(*given.batch_shape, *given.event_shape)} and the bridge was solved with "
            f"{shape}; give the measure it was solved with"
        )
    return given if given.source_dtype == dtype else given.to(dtype=dtype)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"{name} is not a floating dtype")
    return dtype


def _pack_potential(potential: Potential, put: Any, side: str, measure: Measure) -> Header:
    if isinstance(potential, Atoms):
        # points that are those of the measure are stored with it
        own = None if potential.lies_on(measure) else potential.points
        return {"kind": "Atoms", "parts": put(side, {"log_weights": potential.log_weights, "points": own})}
    if isinstance(potential, Quadratics):
        parts = {name: getattr(potential, name) for name in ("logits", "means", "covs", "growth", "origin")}
        return {"kind": "Quadratics", "parts": put(side, parts)}
    raise Unsupported(f"a {type(potential).__name__} cannot be written to a file; write its state yourself")


def _unpack_potential(said: Header, tensors: Tensors, side: str) -> Potential:
    parts = {name: tensors[f"{side}.{name}"] for name in said["parts"]}
    if said["kind"] == "Quadratics":
        return Quadratics(**parts)
    if said["kind"] != "Atoms":
        raise InvalidFile(f"the file holds an unknown potential {said['kind']!r}; upgrade sbot")
    if "points" in parts:
        return Atoms(parts["points"], parts["log_weights"])
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
        raise Needs(f"the file holds its own reference ({kind}); load it without reference= or cost=")
    if given is not None:
        return given
    if kind == "custom":
        raise Needs(
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
