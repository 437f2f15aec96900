"""From a file to whatever bridge it holds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .bridge import Bridge
from .drift_bridge import DriftBridge
from .drift_pack import KNOWN
from .errors import InvalidFile, InvalidProblem
from .measures import Measure
from .neural.nets import Directed, own_copy
from .pack import Header, Needs, Tensors, unpack, unpack_problem
from .potential_bridge import PotentialBridge
from .problem import Problem
from .reference import Process, Reference
from .sde import TimeGrid, as_grid
from .steering import Base, BridgeBase, EquilibriumBase, ScoreBase, Steering

WAYS = {"forward": 1, "backward": -1}


def unpack_bridge(
    header: Header,
    tensors: Tensors,
    reference: Reference | None,
    ends: tuple[Measure | None, Measure | None],
    net: Any = None,
    score: Any = None,
) -> Bridge:
    """Whatever `Bridge.state` gave: a bridge of potentials or of drifts."""
    if "drifts" not in header:
        if net is not None or score is not None:
            raise InvalidProblem(
                "the file holds a bridge of potentials, without networks; load it without net= or score="
            )
        return PotentialBridge(*unpack(header, tensors, reference, ends))
    problem, report = unpack_problem(header, tensors, reference, ends)
    if not isinstance(problem.reference, Process):
        raise InvalidFile("the file holds drifts of a reference without paths; save it again")
    try:
        said = header["drifts"]
        stands = said["grid"]
        grid = TimeGrid(**stands) if isinstance(stands, dict) else as_grid(stands)
        sides = {}
        for name, way in WAYS.items():
            own = {key.removeprefix(f"{name}."): v for key, v in tensors.items() if key.startswith(f"{name}.")}
            base = _unpack_base(said[name]["base"], own, problem, way, net, score)
            sides[name] = Steering(way, base, _unpack_control(said[name]["net"], own, problem, net, name))
        if said["shared"]:
            sides["backward"].net = sides["forward"].net
        return DriftBridge(problem, sides["forward"], sides["backward"], report, grid, int(said["order"]))
    except (InvalidFile, Needs):
        raise
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as fault:
        raise InvalidFile(f"the file does not hold a bridge of drifts ({fault!r}); save it again") from None


def _part(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _unpack_control(said: Header | None, tensors: Tensors, problem: Problem, net: Any, name: str) -> Directed | None:
    if said is None:
        return None
    nets = [_unpack_net(one, net, name, index) for index, one in enumerate(said["nets"])]
    like = torch.empty((), dtype=problem.dtype, device=problem.device)
    parts = _part(tensors, "net.")
    control = Directed(tuple(nets), tuple(said["event"]), *(parts[key] for key in ("centre", "scale", "unit"))).to(like)
    try:
        control.load_state_dict(parts)
    except RuntimeError as fault:
        raise Needs(f"the network given does not fit the file: {fault}") from None
    return control.eval().requires_grad_(False)


def _unpack_net(said: Header, given: Any, name: str, index: int) -> nn.Module:
    if said["kind"] in KNOWN:
        return KNOWN[said["kind"]](**said["config"])
    if said["kind"] != "custom":
        raise InvalidFile(f"the file holds an unknown network {said['kind']!r}; upgrade sbot")
    if given is None:
        raise Needs(
            f"the file was made with a network of your own, {said['name']}, which a file cannot hold; give one of the same "
            "shape: sbot.load(path, net=...)"
        )
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    if not all(isinstance(one, nn.Module) for one in pair):
        raise Needs(
            f"net is {type(given).__name__}; give a torch.nn.Module of the shape that was trained, or two of them"
        )
    return own_copy(pair[max(index, 1 if name == "backward" else 0) if len(pair) > 1 else 0], "net")


def _unpack_base(
    said: Header | None, tensors: Tensors, problem: Problem, way: int, net: Any, score: Any
) -> Base | None:
    if said is None:
        return None
    process, event = problem.reference, problem.mu.event_shape
    assert isinstance(process, Process)
    parts = _part(tensors, "base.")
    if said["kind"] == "bridge":
        ends = (problem.mu, problem.nu)
        nested = said["header"]
        given = tuple(
            m if nested[side]["kind"] == "Sampler" else None for side, m in zip(("mu", "nu"), ends, strict=True)
        )
        custom = process if nested["reference"]["kind"] == "custom" else None
        more = (net, score) if "drifts" in nested else ()  # the bridge started from may have been made with them too
        return BridgeBase(unpack_bridge(nested, parts, custom, given, *more), process, way)  # type: ignore[arg-type]
    if said["kind"] == "equilibrium":
        return EquilibriumBase(process, event)
    if said["kind"] != "score":
        raise InvalidFile(f"the file holds an unknown control {said['kind']!r}; upgrade sbot")
    if score is None:
        raise Needs(
            f"the file was made with a score network, {said['name']}, which a file cannot hold; give one of the same shape: "
            "sbot.load(path, score=...)"
        )
    if not isinstance(score, nn.Module):
        raise Needs(f"score is {type(score).__name__}; give a torch.nn.Module of the shape that was used")
    module = own_copy(score, "score")
    try:
        module.load_state_dict(parts)
    except RuntimeError as fault:
        raise Needs(f"the score network given does not fit the file: {fault}") from None
    like = torch.empty((), dtype=problem.dtype, device=problem.device)
    return ScoreBase(module.to(like), process, problem.one_eps, event)
