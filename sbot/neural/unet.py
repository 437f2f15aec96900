"""A small residual U-Net of an image, a time and a direction."""

from __future__ import annotations

import itertools
import math
from typing import final

import torch
from torch import Tensor, nn

from ..arrays import as_count
from ..errors import InvalidProblem
from .nets import WAVES, linear, time_features


def convolution(
    inputs: int, outputs: int, generator: torch.Generator | None, *, size: int = 3, stride: int = 1, gain: float = 1.0
) -> nn.Conv2d:
    """A convolution drawn from ``generator`` alone: the global one is neither read nor moved."""
    layer = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, device="meta").to_empty(device="cpu")
    weight = torch.randn(outputs, inputs, size, size, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(weight * (gain / math.sqrt(inputs * size * size)))
        assert layer.bias is not None
        layer.bias.zero_()
    return layer


def normalisation(channels: int) -> nn.GroupNorm:
    """Groups of about four channels or more, and a number of them that divides the channels."""
    return nn.GroupNorm(math.gcd(channels, max(1, min(8, channels // 4))), channels)


@final
class _Block(nn.Module):
    """``x + conv(silu(scale * norm(conv(silu(norm(x)))) + shift))``; the skip is a 1 x 1 convolution where widths differ."""

    def __init__(self, inputs: int, outputs: int, embedding: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.first_norm, self.second_norm = normalisation(inputs), normalisation(outputs)
        self.first = convolution(inputs, outputs, generator)
        self.second = convolution(outputs, outputs, generator, gain=0.5)
        self.film = linear(embedding, 2 * outputs, generator, gain=0.5)
        self.skip = nn.Identity() if inputs == outputs else convolution(inputs, outputs, generator, size=1)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        scale, shift = self.film(e)[:, :, None, None].chunk(2, 1)
        h = self.first(nn.functional.silu(self.first_norm(x)))
        h = nn.functional.silu((1 + scale) * self.second_norm(h) + shift)
        return self.skip(x) + self.second(h)


@final
class _Stage(nn.Module):
    """The blocks of one level."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, embedding: int, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        sizes = itertools.pairwise([inputs] + [outputs] * blocks)
        self.blocks = nn.ModuleList(_Block(a, b, embedding, generator) for a, b in sizes)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, e)
        return x


@final
class UNet(nn.Module):
    r"""A residual U-Net of an image and a time; zero at the start.

    .. math:: net(x, t) = W_{out} U(x, t) + a(t) \odot x + c(t)

    At each level the image is halved and the width doubled, then the way back joins each level's own features.  Time (and
    direction) scale and shift the features of every block; ``a`` and ``c`` act on whole channels.

    Parameters
    ----------
    event_shape : ``(c, h, w)`` of an image; any h and w, odd ones too.
    width : channels at full size.
    levels : sizes of the image that are seen, the full one included.
    blocks : residual blocks at each level, on the way down and on the way up.
    directed : whether the network takes a direction, and so serves both.
    generator : draws the initial weights.

    Raises
    ------
    InvalidProblem : an event that is not an image, more levels than the image can be halved.

    Examples
    --------
    >>> import torch
    >>> from sbot.neural.unet import UNet
    >>> UNet((1, 8, 8), width=8)(torch.randn(5, 1, 8, 8), torch.rand(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    def __init__(
        self,
        event_shape: tuple[int, ...],
        width: int = 32,
        levels: int = 2,
        blocks: int = 1,
        directed: bool = False,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(event_shape, (tuple, list)) or len(event_shape) != 3:
            raise InvalidProblem(f"event_shape is {event_shape!r}; give (channels, height, width), or use TimeMLP")
        c, h, w = (as_count(size, "event_shape") for size in event_shape)
        width, levels, blocks = as_count(width, "width"), as_count(levels, "levels"), as_count(blocks, "blocks")
        if min(h, w) <= 2 ** (levels - 1) - 1:
            raise InvalidProblem(f"an image of {h} x {w} has no {levels} levels; give fewer levels=")
        self.config = {
            "event_shape": [c, h, w],
            "width": width,
            "levels": levels,
            "blocks": blocks,
            "directed": bool(directed),
        }
        self.directed = bool(directed)
        features, embedding = 1 + 2 * WAVES, 4 * width
        # a direction doubles the time features: each direction sees its own half
        self.embed = linear(features * (2 if directed else 1), embedding, generator)
        self.mix = linear(embedding, embedding, generator)
        self.into = convolution(c, width, generator)
        widths = [width * 2**level for level in range(levels)]
        steps = list(itertools.pairwise(widths))
        self.down = nn.ModuleList(_Stage(wide, wide, blocks, embedding, generator) for wide in widths)
        self.halve = nn.ModuleList(convolution(a, b, generator, stride=2) for a, b in steps)
        self.up = nn.ModuleList(_Stage(a + b, a, blocks, embedding, generator) for a, b in steps)
        self.last_norm = normalisation(width)
        self.out = convolution(width, c, generator, gain=0.0)
        self.affine = linear(embedding, 2 * c, generator, gain=0.0)

    def forward(self, x: Tensor, t: Tensor, direction: Tensor | None = None) -> Tensor:
        """``(n, c, h, w)``, ``(n,)`` and, where directed, ``(n,)`` of +1 and -1, to ``(n, c, h, w)``."""
        e = self._embedding(t, direction)
        h, kept = self.into(x), []
        for level, stage in enumerate(self.down):
            h = stage(h if level == 0 else self.halve[level - 1](h), e)
            kept.append(h)
        h = kept.pop()
        for stage in reversed(self.up):
            skip = kept.pop()
            # to the size of the level above, whatever it is: an odd one was not halved exactly
            h = nn.functional.interpolate(h, size=skip.shape[2:], mode="nearest")
            h = stage(torch.cat([skip, h], 1), e)
        gain, bias = self.affine(e)[:, :, None, None].chunk(2, 1)
        return self.out(nn.functional.silu(self.last_norm(h))) + gain * x + bias

    def _embedding(self, t: Tensor, direction: Tensor | None) -> Tensor:
        features = time_features(t)
        if self.directed:
            assert direction is not None
            ahead = (direction > 0).to(features)[:, None]
            features = torch.cat([features * ahead, features * (1 - ahead)], -1)
        return nn.functional.silu(self.mix(nn.functional.silu(self.embed(features))))
