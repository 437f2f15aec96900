"""Controls and bridges of drifts as plain data and tensors: what a file of one holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .bridge import Report
from .errors import Unsupported
from .neural import TimeMLP, UNet
from .pack import Header, Tensors, pack_problem
from .problem import Problem
from .sde import TimeGrid
from .steering import Base, BridgeBase, EquilibriumBase, ScoreBase, Steering

#: Networks that a file can make again by itself.
KNOWN: dict[str, type[nn.Module]] = {"TimeMLP": TimeMLP, "UNet": UNet}


def pack_drifts(
    problem: Problem,
    report: Report,
    forward: Steering,
    backward: Steering,
    grid: TimeGrid | Sequence[float],
    order: int,
) -> tuple[Header, Tensors]:
    """A bridge of drifts as a header and tensors."""
    header, tensors = pack_problem(problem, report)
    if isinstance(grid, TimeGrid):
        stands: Any = {"n": grid.n, "kind": grid.kind, "ratio": grid.ratio, "least": grid.least}
    else:
        stands = list(grid)
    shared = forward.net is not None and forward.net is backward.net
    drifts: Header = {"grid": stands, "order": order, "shared": shared}
    for name, steering in (("forward", forward), ("backward", backward)):
        said, parts = _pack_steering(steering, with_net=not (shared and name == "backward"))
        drifts[name] = said
        tensors |= {f"{name}.{key}": value for key, value in parts.items()}
    return header | {"drifts": drifts}, tensors


def _pack_steering(steering: Steering, with_net: bool) -> tuple[Header, Tensors]:
    base, tensors = _pack_base(steering.base)
    tensors = {f"base.{key}": value for key, value in tensors.items()}
    if steering.net is None or not with_net:
        return {"base": base, "net": None}, tensors
    nets = [_pack_net(net) for net in steering.net.nets]
    tensors |= {f"net.{key}": value for key, value in steering.net.state_dict().items()}
    return {"base": base, "net": {"nets": nets, "event": list(steering.net.event)}}, tensors


def _pack_net(net: nn.Module) -> Header:
    kind = type(net).__name__
    if KNOWN.get(kind) is type(net):
        return {"kind": kind, "config": net.config}
    return {"kind": "custom", "name": kind}


def _pack_base(base: Base | None) -> tuple[Header | None, Tensors]:
    if base is None:
        return None, {}
    if isinstance(base, BridgeBase):
        header, tensors = base.bridge.state()
        return {"kind": "bridge", "header": header}, tensors
    if isinstance(base, ScoreBase):
        return {"kind": "score", "name": type(base.score).__name__}, dict(base.score.state_dict())
    if isinstance(base, EquilibriumBase):
        return {"kind": "equilibrium"}, {}
    raise Unsupported(f"a {type(base).__name__} cannot be written to a file; write its state yourself")
