"""Pictures of results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from sbot.plot import BLUE, RED, TIME

STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}
COLOURS = ("#0b6fb8", "#d1600f", "#4b8f3c", "#8a6bb0", "#8a8a8a")


def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, Any]:
    """A figure and its axes, ``(rows, columns)``."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def scatter(axes: Axes, x: Tensor, title: str, colour: str = BLUE, limits: Tensor | None = None) -> None:
    """Points in the plane; ``limits`` are points that all have to fit."""
    axes.scatter(*x[:2000].T.numpy(), s=2, color=colour, alpha=0.5, linewidths=0)
    frame(axes, x if limits is None else limits)
    axes.set_title(title)


def frame(axes: Axes, points: Tensor) -> None:
    """The middle 99.8 % of the points, and a margin."""
    low, high = np.quantile(points.numpy(), 0.001, axis=0), np.quantile(points.numpy(), 0.999, axis=0)
    margin = 0.1 * (high - low)
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
    axes.set_aspect("equal", adjustable="box")
    axes.set(xticks=[], yticks=[])


def paths(axes: Axes, drawn: Tensor, title: str, limits: Tensor) -> None:
    """Paths ``(n, times, 2)`` in the plane, blue at t = 0 and red at t = 1."""
    array = drawn.numpy()
    segments = np.stack([array[:, :-1], array[:, 1:]], 2).reshape(-1, 2, 2)
    middle = np.tile(np.linspace(0, 1, array.shape[1] - 1), len(array))
    lines = LineCollection(list(segments), cmap=TIME, array=middle, linewidths=0.7, alpha=0.6)
    lines.set_clim(0, 1)
    axes.add_collection(lines)
    axes.scatter(*array[:, 0].T, s=5, color=BLUE, zorder=3)
    axes.scatter(*array[:, -1].T, s=5, color=RED, zorder=3)
    frame(axes, limits)
    axes.set_title(title)


def curves(axes: Axes, lines: Mapping[str, tuple[Sequence[float], Sequence[float], str]], **labels: Any) -> None:
    """Named lines ``(x, y, style)`` on a logarithmic scale."""
    for k, (name, (x, y, style)) in enumerate(lines.items()):
        axes.plot(x, y, style, color=COLOURS[k % len(COLOURS)], label=name, ms=5, lw=1.5)
    axes.set(yscale="log", **labels)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)


def images(rows: Mapping[str, Tensor], title: str = "") -> Figure:
    """Named rows of images ``(n, 1, h, w)`` in [-1, 1]."""
    columns = max(len(row) for row in rows.values())
    figure, axes = panels(len(rows), columns, (0.62, 0.72))
    for line, (name, row) in zip(axes, rows.items(), strict=True):
        for k, ax in enumerate(line):
            ax.set_axis_off()
            if k < len(row):
                ax.imshow(row[k, 0].numpy(), cmap="gray_r", vmin=-1, vmax=1, interpolation="nearest")
        line[0].set_title(name, loc="left", fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def finite(values: Sequence[float]) -> list[float]:
    """Numbers a logarithmic axis can show; the others leave a gap."""
    return [v if v > 0 else math.nan for v in values]
