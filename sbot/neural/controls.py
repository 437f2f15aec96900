"""From a problem and what the caller gave for a network to controls ready to train."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import linalg
from ..arrays import require_finite
from ..errors import InvalidProblem
from ..measures import Discrete
from ..problem import Problem
from ..reference import Process
from .fit import own_randomness
from .nets import Directed, TimeMLP, check_net, own_copy, takes_direction
from .unet import UNet

#: Samples of each marginal from which the units of the data are taken.
LOOK = 4096


def refusal(problem: Problem) -> str | None:
    """Why a solver of drifts cannot take a problem."""
    if problem.batch_shape:
        return f"the problem has batch dimensions {problem.batch_shape}; solve the problems one by one"
    if problem.eps_leaf is not None:
        return "eps wants a gradient, which exists for Sinkhorn and ClosedForm only; pass float(eps)"
    if not problem.hard:
        return (
            "relaxed marginals and partial plans are not learned from samples; try Sinkhorn on samples: mu.sample(4096)"
        )
    if not problem.mu.event_shape:
        return "histograms have no points to move; try Sinkhorn with the cost matrix"
    for name, end in (("mu", problem.mu), ("nu", problem.nu)):
        if isinstance(end, Discrete) and abs(float(end.mass) - 1) > 1e-4:
            return f"{name} has mass {float(end.mass):.6g} and paths have mass one; normalise the weights"
    if not isinstance(problem.reference, Process):
        return f"the reference is {problem.reference!r}, which has no paths; try reference=sbot.Brownian()"
    return None


def draw(problem: Problem, side: str, n: int, generator: torch.Generator) -> Tensor:
    """``n`` flat samples of ``mu`` or ``nu``; raises `InvalidProblem` where they are not finite."""
    measure = problem.mu if side == "mu" else problem.nu
    with torch.no_grad():
        return require_finite(measure.sample(n, generator=generator), f"a draw of {side}").flatten(1)


def units(problem: Problem, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Centre ``(D,)`` and scale of the points, and the size of a control that moves mu to nu."""
    x, y = (draw(problem, side, LOOK, generator).double() for side in ("mu", "nu"))
    a, b = x.mean(0), y.mean(0)
    spread = ((x - a).square().mean() + (y - b).square().mean()) / 2
    apart = (a - b).square().mean()
    reference = problem.reference
    assert isinstance(reference, Process)
    noise = sum(float(linalg.matrix(reference.spread(t), 1).diagonal().mean()) for t in (0.1, 0.3, 0.5, 0.7, 0.9)) / 5
    scale = (spread + apart / 4 + 1e-6 * problem.one_eps * noise).sqrt()
    unit = ((spread + apart) / noise + problem.one_eps).sqrt()
    like = torch.empty((), dtype=problem.dtype, device=problem.device)
    return ((a + b) / 2).to(like), scale.to(like), unit.to(like)


def default_net(event: tuple[int, ...], directed: bool, generator: torch.Generator) -> nn.Module:
    """A `UNet` for images ``(c, h, w)`` that can be halved, a `TimeMLP` for all else."""
    if len(event) == 3 and min(event[1:]) > 1:
        return UNet(event, directed=directed, generator=generator)
    return TimeMLP(math.prod(event), directed=directed, generator=generator)


def networks(problem: Problem, net: Any, count: int, generator: torch.Generator) -> tuple[nn.Module, ...]:
    """``count`` networks, copies of the caller's or the default ones, in the dtype and on the device of the problem.

    With ``count`` 1 a single network has to take a direction; where the caller's does not, two of it are made.
    """
    like = torch.empty((), dtype=problem.dtype, device=problem.device)
    event = problem.mu.event_shape
    if net is None:
        cpu = torch.Generator("cpu").manual_seed(
            int(torch.randint(2**62, (), generator=generator, device=generator.device))
        )
        nets = tuple(default_net(event, count == 1, cpu) for _ in range(count))
    else:
        given = net if isinstance(net, (tuple, list)) else (net,)
        if len(given) == 1 and (count == 2 or not takes_direction(own_copy(given[0], "net"))):
            given = (given[0], given[0])
        if len(given) not in (1, 2):
            raise InvalidProblem(f"net has {len(given)} networks; give one, or (forward, backward)")
        nets = tuple(own_copy(one, "net") for one in given)
    nets = tuple(one.to(like) for one in nets)
    with own_randomness(problem.device, 0):
        for one in nets:
            check_net(one, event, like, takes_direction(one))
    return nets


def controls(problem: Problem, nets: tuple[nn.Module, ...], generator: torch.Generator) -> tuple[Directed, ...]:
    """One `Directed` for each network, all in the same units."""
    centre, scale, unit = units(problem, generator)
    if not math.isfinite(float(scale)):
        raise InvalidProblem(
            "the samples reach so far that their squares overflow; rescale them and eps, or use float64"
        )
    event = problem.mu.event_shape
    return tuple(Directed((net,), event, centre, scale, unit) for net in nets)


def both_ways(problem: Problem, nets: tuple[nn.Module, ...], generator: torch.Generator) -> Directed:
    """One `Directed` that serves both directions."""
    return Directed(nets, problem.mu.event_shape, *units(problem, generator))
