"""Pictures of a bridge.

matplotlib is imported here and nowhere else, and only its objects are used: no pyplot, no backend, no settings changed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from . import io
from .arrays import as_count
from .bridge import Bridge
from .drift_bridge import DriftBridge
from .errors import InvalidProblem, Unsupported
from .measures import Discrete, Gaussian, Measure

if TYPE_CHECKING:
    from .path import BridgePath

Array = NDArray[np.float64]

#: The suffixes that `save` writes.
FORMATS = (".png", ".pdf", ".svg", ".jpg")
#: mu and t = 0 are blue, nu and t = 1 are red, in every picture.
BLUE, RED = "#2166ac", "#c8452f"
TIME = LinearSegmentedColormap.from_list("time", [BLUE, "#8a6bb0", RED])
#: A heat map has at most this many cells a side; beyond it neighbouring atoms share a cell.
CELLS = 100


def draw(bridge: Bridge, kind: str = "auto", **options: Any) -> Figure:
    """Draw a bridge.

    Parameters
    ----------
    bridge : what a solver returned.
    kind : "plan", "paths", "marginals", "convergence", or "auto", the first of these that exists for the bridge.
    options : "plan" takes ``n`` (pairs drawn) and ``generator``; "paths" takes ``n``, ``steps`` and ``generator``;
        "marginals" takes ``n``, ``times`` and ``generator``; "convergence" takes none.

    Returns
    -------
    Figure : a figure of its own, on which more can be drawn; `save` writes it.

    Raises
    ------
    InvalidProblem : an unknown kind or option.
    Unsupported : the bridge has no such picture; the message names the way out.

    Examples
    --------
    >>> import torch, sbot
    >>> from sbot import plot
    >>> bridge = sbot.solve_bridge(torch.rand(20, 2), torch.rand(30, 2), 0.1)
    >>> [axes.get_xlabel() for axes in plot.draw(bridge, "convergence").axes]
    ['iteration']
    """
    if kind != "auto":
        return _drawn(bridge, kind, options)
    _check_options("auto", options, [name for other in KINDS for name in _options(other)])
    refusals = []
    for name in KINDS:
        try:
            return _drawn(bridge, name, {key: value for key, value in options.items() if key in _options(name)})
        except Unsupported as refusal:
            refusals.append(f"{name}: {refusal}")
    raise Unsupported("nothing of this bridge can be drawn:\n" + "\n".join(refusals))


def _drawn(bridge: Bridge, kind: str, options: dict[str, Any]) -> Figure:
    if kind not in tuple(KINDS):
        raise InvalidProblem(f"kind is {kind!r}; give one of {', '.join(map(repr, ('auto', *KINDS)))}")
    _check_options(kind, options, _options(kind))
    if bridge.problem.batch_shape and kind != "convergence":
        raise Unsupported(
            f"the bridge holds a batch {bridge.problem.batch_shape} of problems; take one alone to draw it, bridge[k], "
            "or draw 'convergence'"
        )
    return KINDS[kind](bridge, **options)


def _options(kind: str) -> list[str]:
    return [p.name for p in inspect.signature(KINDS[kind]).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _check_options(kind: str, options: dict[str, Any], known: list[str]) -> None:
    for name in options:
        if name not in known:
            choices = ", ".join(dict.fromkeys(known)) or "no options"
            raise InvalidProblem(f"{name!r} is not an option of the picture {kind!r}; it takes {choices}")


def save(figure: Figure, path: str | PathLike[str], *, dpi: int = 150) -> None:
    """Write a figure as .png, .pdf, .svg or .jpg; the file appears whole or not at all."""
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        raise InvalidProblem(f"{path} ends in {suffix!r}; a picture is written as {', '.join(FORMATS)}")
    buffer = BytesIO()
    figure.savefig(buffer, format=suffix[1:], dpi=dpi)
    io.write_bytes(path, buffer.getvalue())


# ---- the plan ------------------------------------------------------------------------------------------------------


def plan(bridge: Bridge, *, n: int = 500, generator: Generator | None = None) -> Figure:
    """The plan: its density in one dimension, its pairs in two, a heat map of atoms or a covariance beyond."""
    mu, nu = bridge.problem.mu, bridge.problem.nu
    d = mu.event_shape[0] if mu.event_shape == nu.event_shape and mu.event_shape else 0
    if isinstance(bridge, DriftBridge) and len(mu.event_shape) == 1 and d <= 2:
        return _pairs(bridge, n, generator)  # known by its samples, whatever the ends are
    if isinstance(mu, Gaussian):
        if d > 2:
            return _covariance(bridge)
        law = bridge.plan()
        if d == 1 and float(torch.linalg.det(law.cov)) > 0:
            return _joint_density(bridge, law)
    elif not isinstance(mu, Discrete) or not isinstance(nu, Discrete):
        raise Unsupported(f"the plan from {mu!r} is known by its samples only; draw 'paths' or 'marginals'")
    elif d == 1:
        return _binned(bridge)
    elif d != 2:
        return _atoms(bridge)
    return _pairs(bridge, as_count(n, "n"), generator)


def _binned(bridge: Bridge) -> Figure:
    """Points on a line: mass of the plan in cells of the plane ``(x_0, x_1)``."""
    cells, edges, shape = [], [], []
    for points in bridge.problem.values:
        assert points is not None
        bins = min(60, 4 + round(3 * len(points) ** (1 / 3)))  # more would show single atoms, as stripes
        x = points.detach().double().cpu()[:, 0]
        low, high = float(x.min()), float(x.max())
        low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
        cells.append(((x - low) / (high - low) * bins).long().clamp(max=bins - 1))
        edges.append((low, high))
        shape.append(bins)
    figure, axes = _figure(bridge, "Plan", (6.4, 5.2))
    mass = _mass_in_cells(bridge, cells[0], cells[1], (shape[0], shape[1]))
    _heat(axes, mass.T, (*edges[0], *edges[1]), "mass in a cell")
    axes.set(xlabel="$x_0$ ~ mu", ylabel="$x_1$ ~ nu")
    return figure


def _atoms(bridge: Bridge) -> Figure:
    """Histograms and points in many dimensions: one cell an atom, or a few neighbouring atoms."""
    cells, labels = [], []
    for side, measure in (("mu", bridge.problem.mu), ("nu", bridge.problem.nu)):
        assert isinstance(measure, Discrete)
        rank, order = _ranks(measure)
        cells.append(rank * min(measure.n, CELLS) // measure.n)
        labels.append(f"{'bin' if measure.points is None else 'atom'} of {side}{order}")
    shape = int(cells[0].max()) + 1, int(cells[1].max()) + 1
    mass = _mass_in_cells(bridge, cells[0], cells[1], shape)
    figure, axes = _figure(bridge, "Plan", (6.4, 5.4))
    n, m = len(cells[0]), len(cells[1])
    merged = (n, m) != shape
    label = "mass in a cell of neighbouring atoms" if merged else "mass of a pair"
    # a plan in many dimensions is a few strong pairs among many weak ones: the root shows both
    _heat(axes, mass, (-0.5, m - 0.5, n - 0.5, -0.5), label, PowerNorm(0.5, 0, mass.max()))
    axes.set(xlabel=labels[1], ylabel=labels[0])
    return figure


def _ranks(measure: Discrete) -> tuple[Tensor, str]:
    """Place of each atom on the axis: its number, or its order along the direction in which the atoms spread most."""
    numbers = torch.arange(measure.n)
    if measure.points is None:
        return numbers, ""
    points = measure.points.detach().double().cpu()
    along = points[:, 0]
    if points.shape[1] > 1:
        along = torch.from_numpy(_principal(points.numpy(), 1)[1][:, 0] @ points.numpy().T)
    rank = torch.empty_like(numbers)
    rank[along.argsort(stable=True)] = numbers
    return rank, ", in order of its first principal component"


def _mass_in_cells(bridge: Bridge, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> Array:
    """Sum of the plan over the cells its atoms fall in, a few rows at a time: the dense plan is never held."""
    total = torch.zeros(shape, dtype=torch.float64)
    step = max(1, 2**22 // len(columns))
    for first in range(0, len(rows), step):
        block = torch.arange(first, min(first + step, len(rows)))
        part = bridge.plan(rows=block).detach().double().cpu()
        across = torch.zeros(len(block), shape[1], dtype=torch.float64).index_add_(1, columns, part)
        total.index_add_(0, rows[block], across)
    return total.numpy()


def _heat(
    axes: Axes, values: Array, extent: tuple[float, float, float, float], label: str, norm: Normalize | None = None
) -> None:
    # rows from the top where the extent says so (atoms), from the bottom otherwise (coordinates)
    origin: Literal["upper", "lower"] = "upper" if extent[2] > extent[3] else "lower"
    image = axes.imshow(
        values,
        extent=extent,
        origin=origin,
        aspect="auto",
        cmap="Blues",
        norm=norm or Normalize(0, values.max()),
        interpolation="none",
    )
    axes.figure.colorbar(image, ax=axes, label=label)


def _joint_density(bridge: Bridge, law: Gaussian) -> Figure:
    mean, cov = _array(law.mean), _array(law.cov)
    x, y = (np.linspace(m - 3.5 * s, m + 3.5 * s, 200) for m, s in zip(mean, np.sqrt(np.diag(cov)), strict=True))
    grid = torch.from_numpy(np.stack(np.meshgrid(x, y), -1).reshape(-1, 2)).to(law.mean)
    density = _array(law.log_prob(grid).exp()).reshape(len(y), len(x))
    figure, axes = _figure(bridge, "Plan", (6.4, 5.2))
    _heat(axes, density, (x[0], x[-1], y[0], y[-1]), "density")
    axes.set(xlabel="$x_0$ ~ mu", ylabel="$x_1$ ~ nu")
    ahead = bridge.transport(torch.from_numpy(x)[:, None].to(law.mean))
    axes.plot(x, _array(ahead)[:, 0], color=RED, label="$E[X_1 | X_0]$")
    axes.set_ylim(y[0], y[-1])
    axes.legend(loc="upper left")
    return figure


def _covariance(bridge: Bridge) -> Figure:
    cov = _array(bridge.plan().cov)
    d = len(cov) // 2
    figure, axes = _figure(bridge, "Covariance of the plan", (6.4, 5.4))
    image = axes.imshow(cov, cmap="RdBu_r", vmin=-abs(cov).max(), vmax=abs(cov).max())
    figure.colorbar(image, ax=axes, label="covariance")
    for line in (axes.axhline, axes.axvline):
        line(d - 0.5, color="black", lw=0.8)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([(d - 1) / 2, d + (d - 1) / 2], ["$X_0$ ~ mu", "$X_1$ ~ nu"])
    axes.tick_params(axis="y", rotation=90)
    axes.set(xlabel=f"coordinate, {d} for each end", ylabel=f"coordinate, {d} for each end")
    return figure


def _pairs(bridge: Bridge, n: int, generator: Generator | None) -> Figure:
    """Lines between ends: every pair as dark as its mass where there are few, else pairs drawn from the plan."""
    mu, nu = bridge.problem.mu, bridge.problem.nu
    every = isinstance(mu, Discrete) and isinstance(nu, Discrete) and mu.n * nu.n <= n
    every = every and not isinstance(bridge, DriftBridge)
    if every:
        assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
        mass = _array(bridge.plan()).ravel()
        ends = [_array(points) for points in bridge.problem.values if points is not None]
        x, y = np.repeat(ends[0], nu.n, 0), np.tile(ends[1], (mu.n, 1))
        opacity = mass / mass.max()
    else:
        x, y = (_array(end) for end in bridge.sample_pairs(n, generator=generator))
        opacity = np.full(n, min(0.5, 100 / n))
    view = _view(bridge, generator)
    figure, axes = _figure(bridge, "Plan, all pairs" if every else f"Plan, {n} pairs drawn from it", (6.4, 5.6))
    segments = np.stack([view.place(x, 0.0), view.place(y, 1.0)], 1)
    axes.add_collection(LineCollection(list(segments), colors="0.3", alpha=opacity, linewidths=0.8))
    _ends(bridge, axes, view, generator)
    return figure


# ---- paths ---------------------------------------------------------------------------------------------------------


def paths(bridge: Bridge, *, n: int = 50, steps: int = 100, generator: Generator | None = None) -> Figure:
    """Sample paths: against t in one dimension, in the plane in two, in two principal components beyond."""
    times = np.linspace(0, 1, as_count(steps, "steps") + 1)
    drawn = _array(bridge.sample_paths(n, times, generator=generator))
    view = _view(bridge, generator)
    figure, axes = _figure(bridge, f"{n} sample paths", (7.0, 5.2))
    placed = view.place(drawn, times)
    segments = np.stack([placed[:, :-1], placed[:, 1:]], 2).reshape(-1, 2, 2)
    middle = np.tile((times[:-1] + times[1:]) / 2, n)
    lines = LineCollection(list(segments), cmap=TIME, array=middle, linewidths=1.0, alpha=0.8, capstyle="round")
    lines.set_clim(0, 1)
    axes.add_collection(lines)
    _ends(bridge, axes, view, generator)
    axes.autoscale_view()
    if not view.timed:
        figure.colorbar(ScalarMappable(Normalize(0, 1), TIME), ax=axes, label="time t")
    return figure


# ---- marginals -----------------------------------------------------------------------------------------------------


def marginals(
    bridge: Bridge,
    *,
    n: int = 1000,
    times: Sequence[float] = (0, 0.25, 0.5, 0.75, 1),
    generator: Generator | None = None,
) -> Figure:
    """The law of ``X_t`` at several times: its density in one dimension, samples beyond."""
    drawn = _array(bridge.sample_paths(n, times, generator=generator))
    view = _view(bridge, generator)
    if view.timed:
        return _densities(bridge, drawn[..., 0], times)
    placed = view.place(drawn, np.asarray(times))
    wide, high = np.ptp(placed, axis=(0, 1)) + 1e-12
    height = 2.2 * float(np.clip(high / wide, 0.5, 1.5)) + 1.4
    figure = _blank(bridge, f"Law of $X_t$, {n} samples", (2.3 * len(times) + 0.8, height))
    panels = figure.subplots(1, len(times), sharex=True, sharey=True, squeeze=False)[0]
    for k, (t, axes) in enumerate(zip(times, panels, strict=True)):
        axes.scatter(placed[:, k, 0], placed[:, k, 1], s=5, color=TIME(float(t)), alpha=0.5, linewidths=0)
        axes.set_title(f"t = {t:g}", fontsize="medium")
        axes.set_aspect("equal", adjustable="box")
        _tidy(axes)
    panels[len(times) // 2].set_xlabel(view.labels[0])
    panels[0].set_ylabel(view.labels[1])
    return figure


def _densities(bridge: Bridge, drawn: Array, times: Sequence[float]) -> Figure:
    """``exp(log_prob)``, exact, or a histogram of the samples where the law has no density."""
    figure, axes = _figure(bridge, "Law of $X_t$", (7.0, 4.6))
    low, high = float(drawn.min()), float(drawn.max())
    grid = np.linspace(low - 0.05 * (high - low), high + 0.05 * (high - low), 1000)
    start = bridge.marginal(0.0)
    mass = float(start.mass) if isinstance(start, Discrete) else 1.0
    points = torch.from_numpy(grid)[:, None].to(bridge.problem.dtype).to(bridge.problem.device)
    for k, t in enumerate(times):
        style: dict[str, Any] = {"color": TIME(float(t)), "label": f"t = {t:g}"}
        try:
            axes.plot(grid, _array(bridge.log_prob(t, points).exp()), **style)
        except Unsupported:
            heights, edges = np.histogram(drawn[:, k], bins=40, density=True)
            axes.stairs(mass * heights, edges, fill=True, alpha=0.3, **style)
    axes.set(xlabel="x", ylabel="density", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


# ---- convergence ---------------------------------------------------------------------------------------------------


def convergence(bridge: Bridge) -> Figure:
    """Error at each check against the iteration, one colour for each value of eps on the way, and the tolerance."""
    report = bridge.report
    if not report.history:
        raise Unsupported(f"{report.solver} iterated nothing ({report.reason}); draw 'plan' or 'marginals'")
    iterations, eps, error = np.asarray(report.history, dtype=float).T
    figure, axes = _figure(bridge, "Convergence", (7.0, 4.4))
    stages = list(dict.fromkeys(eps.tolist()))
    for k, stage in enumerate(stages):
        here = eps == stage
        colour = TIME((k + 1) / len(stages))
        # an error of exactly 0 has no logarithm; it is drawn at the rounding unit
        axes.semilogy(iterations[here], error[here].clip(min=1e-16), ".-", color=colour, label=f"eps = {stage:.3g}")
    axes.axhline(report.tolerance or 1e-16, color="black", ls="--", lw=1, label=f"tolerance {report.tolerance:.1e}")
    axes.set(xlabel="iteration", ylabel="error of the marginals")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize="small")
    return figure


KINDS: dict[str, Callable[..., Figure]] = {
    "plan": plan,
    "paths": paths,
    "marginals": marginals,
    "convergence": convergence,
}


# ---- against eps ---------------------------------------------------------------------------------------------------


def eps_path(path: BridgePath) -> Figure:
    """A path of one problem against eps: costs, ``KL(P | mu x nu)`` and, between atoms, quantiles of the perplexity."""
    problem = path[0].problem
    if problem.batch_shape:
        raise Unsupported(f"the path holds a batch {problem.batch_shape} of problems; solve one alone to draw it")
    atoms = isinstance(problem.mu, Discrete) and isinstance(problem.nu, Discrete)
    order = path.eps.argsort()
    eps = _array(path.eps[order])
    figure = Figure(figsize=(4.4 * (3 if atoms else 2), 4.2), layout="constrained")
    title = f"{len(path)} values of eps in units of the cost\n{problem.reference!r}"
    figure.suptitle(title, fontsize="medium")
    table = figure.subplots(1, 3 if atoms else 2)
    for values, colour, label in ((path.cost, RED, "objective"), (path.linear_cost, BLUE, "<P, C>")):
        height = _array(values[order])
        table[0].plot(eps, height, ".-", color=colour, label=label)
        if (height <= 0).any():
            table[0].set_yscale("symlog", linthresh=float(np.abs(height[height != 0]).min(initial=1.0)))
        elif table[0].get_yscale() == "linear":
            table[0].set_yscale("log")
    table[1].loglog(
        eps, _array(path.entropy[order]).clip(min=1e-16), ".-", color="black", label="KL(P | mu x nu), nats"
    )
    if atoms:
        _spread_over_atoms(table[2], path, order)
    for axes, label in zip(table, ("cost", "relative entropy", "perplexity of a row"), strict=False):
        axes.set(xlabel="eps", ylabel=label, xscale="log")
        bad = ~_array(path.converged[order]).astype(bool)
        for k, place in enumerate(eps[bad]):
            axes.axvline(place, color="#b00020", lw=1, ls=":", label="NOT converged" if k == 0 else None)
        axes.grid(alpha=0.25, which="both")
        axes.legend(framealpha=0.8, edgecolor="none", fontsize="small")
        _tidy(axes)
    return figure


def _spread_over_atoms(axes: Axes, path: BridgePath, order: Tensor) -> None:
    mu, nu = path[0].problem.mu, path[0].problem.nu
    assert isinstance(mu, Discrete) and isinstance(nu, Discrete)
    rows = path.perplexity[order][:, (mu.weights > 0).to(path.perplexity.device)].double()
    level = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=rows.dtype, device=rows.device)
    eps, bands = _array(path.eps[order]), _array(torch.quantile(rows, level, dim=1))
    axes.fill_between(eps, bands[0], bands[4], color=BLUE, alpha=0.15, lw=0, label="5 % to 95 % of the rows")
    axes.fill_between(eps, bands[1], bands[3], color=BLUE, alpha=0.3, lw=0, label="25 % to 75 %")
    axes.plot(eps, bands[2], ".-", color=BLUE, label="median")
    axes.axhline(nu.n, color="black", lw=1, ls="--", label=f"all {nu.n} atoms of nu")
    axes.set_yscale("log")


# ---- other pictures ------------------------------------------------------------------------------------------------


def digits(images: Any, times: Sequence[float], title: str = "") -> Figure:
    """A table of pictures that change: ``images`` ``(rows, len(times), height, width)``, 0 white and 1 black."""
    pictures = np.asarray(images.detach().cpu() if isinstance(images, Tensor) else images, dtype=float)
    if pictures.ndim != 4 or pictures.shape[1] != len(times):
        raise InvalidProblem(f"images have shape {pictures.shape}; give (rows, {len(times)}, height, width)")
    rows, columns = pictures.shape[:2]
    figure = Figure(figsize=(0.85 * columns + 0.3, 0.85 * rows + 0.9), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    table = figure.subplots(rows, columns, squeeze=False)
    for row, line in zip(table, pictures, strict=True):
        for axes, picture in zip(row, line, strict=True):
            # a person reads eight by eight pixels better without their edges
            axes.imshow(picture, cmap="Greys", vmin=0, vmax=1, interpolation="bilinear")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_color("0.85")
    for axes, t in zip(table[0], times, strict=True):
        axes.set_title(f"t = {t:g}", fontsize="small")
    return figure


def animation(
    bridge: Bridge,
    path: str | PathLike[str],
    *,
    n: int = 300,
    frames: int = 50,
    generator: Generator | None = None,
) -> None:
    """Write a GIF of ``n`` samples that move along the paths of the bridge, at rest for a moment at both ends."""
    if Path(path).suffix.lower() != ".gif":
        raise InvalidProblem(f"{path} does not end in .gif; an animation is written as .gif")
    if bridge.problem.batch_shape:
        raise Unsupported(
            f"the bridge holds a batch {bridge.problem.batch_shape} of problems; take one alone to draw it, bridge[k]"
        )
    times = np.linspace(0, 1, as_count(frames, "frames", least=2))
    view = _view(bridge, generator)
    placed = view.place(_array(bridge.sample_paths(n, times, generator=generator)), times)
    figure, axes = _figure(bridge, f"{n} samples", (5.6, 4.8))
    figure.set_dpi(90)
    _ends(bridge, axes, view, generator)
    dots = axes.scatter(placed[:, 0, 0], placed[:, 0, 1], s=10, color="black", zorder=3)
    # the frame holds every frame
    axes.update_datalim(placed.reshape(-1, 2))
    axes.autoscale_view()
    clock = axes.set_title("t = 0.00", fontsize="medium")

    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    figure.set_layout_engine("none")  # once is enough: a layout for each frame is slow and trembles
    film = []
    for k, t in enumerate(times):
        dots.set_offsets(placed[:, k])
        clock.set_text(f"t = {t:.2f}")
        canvas.draw()
        film.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(64))
    milliseconds = [800, *[60] * (len(film) - 2), 800]
    buffer = BytesIO()
    film[0].save(buffer, "GIF", save_all=True, append_images=film[1:], duration=milliseconds, loop=0)
    io.write_bytes(path, buffer.getvalue())


# ---- shared --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """How points are put on paper: against t, in their plane, or in the two directions in which they spread most."""

    labels: tuple[str, str]
    centre: Array  # (d,)
    directions: Array  # (d, 2)
    timed: bool = False

    def place(self, x: Array, t: float | Array) -> Array:
        """``(..., d)`` at times ``t`` that broadcast, as ``(..., 2)``."""
        if self.timed:
            return np.stack(np.broadcast_arrays(t, x[..., 0]), -1).astype(float)
        return (x - self.centre) @ self.directions


def _view(bridge: Bridge, generator: Generator | None) -> _View:
    mu, nu = bridge.problem.mu, bridge.problem.nu
    if len(mu.event_shape) != 1 or mu.event_shape != nu.event_shape:
        raise Unsupported("the ends are not points of one space; draw 'plan' instead")
    d = mu.event_shape[0]
    if d == 1:
        return _View(("time t", "x"), np.zeros(1), np.zeros((1, 2)), timed=True)
    if d == 2:
        return _View(("first coordinate", "second coordinate"), np.zeros(2), np.eye(2))
    cloud = np.concatenate([_cloud(measure, generator)[0] for measure in (mu, nu)])
    centre, directions, share = _principal(cloud, 2)
    labels = [f"principal component {k + 1} of {d}\n({share[k]:.0%} of the variance)" for k in range(2)]
    return _View((labels[0], labels[1]), centre, directions)


def _principal(points: Array, k: int) -> tuple[Array, Array, Array]:
    """Mean, first ``k`` principal directions ``(d, k)``, and their shares of the variance."""
    centre = points.mean(0)
    values, vectors = np.linalg.eigh(np.cov(points.T, ddof=0))
    directions, values = vectors[:, ::-1][:, :k], values[::-1]
    # a direction has no sign of its own: make its largest entry positive
    largest = np.take_along_axis(directions, abs(directions).argmax(0)[None], 0)
    return centre, directions * np.sign(largest), values[:k] / max(values.sum(), 1e-300)


def _cloud(measure: Measure, generator: Generator | None, most: int = 2000) -> tuple[Array, Array]:
    """Points that stand for a measure, and their relative weights: its atoms, or samples where they are too many."""
    if isinstance(measure, Discrete) and measure.points is not None and measure.n <= most:
        live = measure.weights.detach() > 0
        weights = _array(measure.weights[live])
        return _array(measure.points[live]), weights / weights.mean()
    return _array(measure.sample(most, generator=generator)), np.ones(most)


def _ends(bridge: Bridge, axes: Axes, view: _View, generator: Generator | None) -> None:
    """Both ends: atoms as large as their weights, or the ellipses of one and two standard deviations."""
    for t, name, colour, measure in ((0.0, "mu", BLUE, bridge.problem.mu), (1.0, "nu", RED, bridge.problem.nu)):
        if isinstance(measure, Gaussian) and not view.timed:
            _ellipses(axes, view, measure, colour, f"{name}, t = {t:g}")
            continue
        points, weights = _cloud(measure, generator)
        sizes = (16 if len(points) < 300 else 7) * weights
        spots = view.place(points, t)
        axes.scatter(
            spots[:, 0],
            spots[:, 1],
            s=sizes,
            color=colour,
            alpha=0.8,
            linewidths=0,
            zorder=2,
            label=f"{name}, t = {t:g}",
        )
    axes.set(xlabel=view.labels[0], ylabel=view.labels[1])
    if not view.timed:
        axes.set_aspect("equal", adjustable="datalim")
    axes.autoscale_view()
    axes.legend(loc="best", framealpha=0.8)


def _ellipses(axes: Axes, view: _View, measure: Gaussian, colour: str, label: str) -> None:
    centre = view.place(_array(measure.mean), 0.0)
    values, vectors = np.linalg.eigh(view.directions.T @ _array(measure.cov) @ view.directions)
    angle = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
    for deviations in (1, 2):
        minor, major = 2 * deviations * np.sqrt(values.clip(min=0))
        axes.add_patch(
            Ellipse(
                (centre[0], centre[1]),
                major,
                minor,
                angle=angle,
                fill=False,
                edgecolor=colour,
                lw=1.8 / deviations,
                zorder=3,
            )
        )
    axes.plot(*centre, "o", color=colour, label=label)


def _figure(bridge: Bridge, what: str, size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = _blank(bridge, what, size)
    axes = figure.add_subplot()
    _tidy(axes)
    return figure, axes


def _blank(bridge: Bridge, what: str, size: tuple[float, float]) -> Figure:
    """A figure with its title and, where it has to be, the mark that the solver did not converge."""
    figure = Figure(figsize=size, layout="constrained")
    problem, report = bridge.problem, bridge.report
    title = f"{what}\n{problem.reference!r}, eps = {problem.eps:g} in units of the cost"
    figure.suptitle(title, fontsize="medium")
    if not report.converged:
        mark = f"NOT converged ({report.reason}): error {report.error:.1e}, tolerance {report.tolerance:.1e}"
        figure.supxlabel(mark, color="#b00020", weight="bold", fontsize="small")  # the layout keeps its place clear
    return figure


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _array(tensor: Tensor) -> Array:
    return tensor.detach().double().cpu().numpy()
