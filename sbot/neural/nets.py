"""Networks of a point, a time and a direction, and what stands between them and a control.

A network is any module ``net(x, t)`` with points ``x`` ``(n, *event)`` and times ``t`` ``(n,)`` that returns ``(n, *event)``.
One that serves both directions takes ``net(x, t, direction)`` with ``direction`` ``(n,)`` of +1 (forward) and -1 (backward).
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any, final

import torch
from torch import Tensor, nn

from ..arrays import as_count
from ..errors import InvalidProblem

#: Frequencies of the time features, half periods over [0, 1].
WAVES = 8


def linear(inputs: int, outputs: int, generator: torch.Generator | None, gain: float = 1.0) -> nn.Linear:
    """A linear layer drawn from ``generator`` alone: the global one is neither read nor moved."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        layer.weight.copy_(torch.randn(outputs, inputs, generator=generator) * (gain / math.sqrt(inputs)))
        layer.bias.zero_()
    return layer


def time_features(t: Tensor) -> Tensor:
    """``(n,)`` to ``(n, 1 + 2 WAVES)``: t itself, and sines and cosines of half periods."""
    angles = t[:, None] * torch.arange(1, WAVES + 1, dtype=t.dtype, device=t.device) * math.pi
    return torch.cat([2 * t[:, None] - 1, angles.sin(), angles.cos()], -1)


@final
class TimeMLP(nn.Module):
    r"""A residual network of a point and a time; zero at the start.

    .. math:: net(x, t) = W_{out} h_L + a(t) \odot x + c(t),\quad h_{l+1} = h_l + silu(W_l h_l + s_l(t))

    The affine path lets a Gaussian bridge be learned at once; the residual path learns the rest.

    Parameters
    ----------
    d : dimension of the points.
    width, depth : size and number of the hidden layers.
    directed : whether the network takes a direction, and so serves both.
    generator : draws the initial weights.

    Examples
    --------
    >>> import torch
    >>> from sbot.neural import TimeMLP
    >>> TimeMLP(2)(torch.randn(5, 2), torch.rand(5)).abs().max()
    tensor(0., grad_fn=<MaxBackward1>)
    """

    def __init__(
        self,
        d: int,
        width: int = 256,
        depth: int = 3,
        *,
        directed: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        d, width, depth = as_count(d, "d"), as_count(width, "width"), as_count(depth, "depth")
        self.config = {"d": d, "width": width, "depth": depth, "directed": directed}
        self.directed = directed
        features, embedding = 1 + 2 * WAVES, 64
        # a direction doubles the time features: each direction sees its own half
        self.embed = linear(features * (2 if directed else 1), embedding, generator)
        self.into = linear(d, width, generator)
        self.layers = nn.ModuleList(linear(width, width, generator) for _ in range(depth))
        self.shifts = linear(embedding, width * depth, generator)
        self.out = linear(width, d, generator, gain=0.0)
        self.affine = linear(embedding, 2 * d, generator, gain=0.0)

    def forward(self, x: Tensor, t: Tensor, direction: Tensor | None = None) -> Tensor:
        """``(n, d)``, ``(n,)`` and, where directed, ``(n,)`` of +1 and -1, to ``(n, d)``; points of any shape are flattened."""
        event, x = x.shape[1:], x.flatten(1)
        features = time_features(t)
        if self.directed:
            assert direction is not None
            ahead = (direction > 0).to(features)[:, None]
            features = torch.cat([features * ahead, features * (1 - ahead)], -1)
        e = nn.functional.silu(self.embed(features))
        h = self.into(x)
        for layer, shift in zip(self.layers, self.shifts(e).chunk(len(self.layers), -1), strict=True):
            h = h + nn.functional.silu(layer(h) + shift)
        gain, bias = self.affine(e).chunk(2, -1)
        return (self.out(h) + gain * x + bias).reshape(-1, *event)


@final
class Directed(nn.Module):
    """A control for both directions or for one: networks that see points, and answer, in units of the data.

    ``u(t, x) = unit * net((x - centre) / scale, t, direction)`` on flat points ``(n, D)``.  One network that takes a
    direction serves both; of two that do not, the first is the forward one.

    Parameters
    ----------
    nets : one network, or two.
    event : shape of a point as the networks see it.
    centre, scale, unit : ``(D,)``, ``()`` and ``()``.
    """

    centre: Tensor
    scale: Tensor
    unit: Tensor

    def __init__(
        self, nets: tuple[nn.Module, ...], event: tuple[int, ...], centre: Tensor, scale: Tensor, unit: Tensor
    ) -> None:
        super().__init__()
        self.nets, self.event = nn.ModuleList(nets), event
        self._told = [takes_direction(net) for net in nets]
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        self.register_buffer("unit", unit)

    def forward(self, x: Tensor, t: Tensor, direction: Tensor) -> Tensor:
        seen = ((x - self.centre) / self.scale).reshape(-1, *self.event)
        if len(self.nets) == 1:
            said = self._ask(0, seen, t, direction)
        else:
            ahead = direction > 0
            said = torch.empty_like(seen)
            for index, rows in enumerate((ahead, ~ahead)):
                if bool(rows.any()):
                    said[rows] = self._ask(index, seen[rows], t[rows], direction[rows]).to(said.dtype)
        return self.unit * said.reshape(x.shape).to(x.dtype)  # autocast answers in bfloat16

    def _ask(self, index: int, x: Tensor, t: Tensor, direction: Tensor) -> Tensor:
        net = self.nets[index]
        said: Tensor = net(x, t, direction) if self._told[index] else net(x, t)
        return said


def takes_direction(net: nn.Module) -> bool:
    """Whether ``net`` takes a third argument, the direction."""
    told = getattr(net, "directed", None)
    if isinstance(told, bool):
        return told
    try:
        parameters = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(places) >= 3


def own_copy(net: Any, name: str) -> nn.Module:
    """A copy of the caller's module, which stays as it was."""
    if not isinstance(net, nn.Module):
        raise InvalidProblem(f"{name} is {type(net).__name__}; give a torch.nn.Module net(x, t), or None")
    return copy.deepcopy(net)


def check_net(net: nn.Module, event: tuple[int, ...], like: Tensor, directed: bool) -> None:
    """One evaluation, before any training: the right shape, dtype and finite numbers."""
    n = 3 if event[:1] == (2,) else 2  # so that a network which confuses points and coordinates is found out
    x = torch.zeros((n, *event), dtype=like.dtype, device=like.device)
    t = torch.linspace(0.25, 0.75, n, dtype=like.dtype, device=like.device)
    name = type(net).__name__
    try:
        with torch.no_grad():
            out = net(x, t, torch.ones_like(t)) if directed else net(x, t)
    except (RuntimeError, TypeError, ValueError) as fault:
        raise InvalidProblem(
            f"the network {name} failed on points {tuple(x.shape)} and times ({n},): {fault}; "
            "give a module net(x, t) that returns the shape of x"
        ) from None
    if not isinstance(out, Tensor) or out.shape != x.shape:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InvalidProblem(
            f"the network {name} returned {shape} for points {tuple(x.shape)}; return the shape of the points"
        )
    if out.dtype != x.dtype or not bool(torch.isfinite(out).all()):
        raise InvalidProblem(f"the network {name} returned {out.dtype} or numbers that are not finite for {x.dtype}")
