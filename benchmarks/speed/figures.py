"""Times on logarithmic axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .records import Records, Row

COLOURS = {
    "sbot": "#0b6fb8",
    "POT": "#d1600f",
    "OTT": "#2c8a4b",
    "GeomLoss": "#8a6bb0",
    "mdot-tnt": "#b8324a",
}
DASHES = ("-", "--", ":", "-.")
MARKS = ("o", "s", "^", "D")


def accuracy(records: Records) -> Figure | None:
    """Seconds against eps, a panel for each cloud and size, float64."""
    rows = [row for row in records.of("accuracy", dtype="float64") if row["contender"] != "mdot-tnt as it comes"]
    clouds = sorted({(row["cloud"], row["d"]) for row in rows}, key=lambda c: (c[0] != "gaussians", c))
    sizes = {cloud: sorted({row["n"] for row in rows if (row["cloud"], row["d"]) == cloud}) for cloud in clouds}
    if not rows:
        return None
    wide, high = max(map(len, sizes.values())), len(clouds)
    figure, axes = _panels(high, wide)
    for line, cloud in zip(axes, clouds, strict=True):
        for k, ax in enumerate(line):
            if k >= len(sizes[cloud]):
                ax.set_visible(False)
                continue
            here = [row for row in rows if (row["cloud"], row["d"]) == cloud and row["n"] == sizes[cloud][k]]
            _lines(ax, here, "ratio")
            ax.set_title(f"{cloud[0]}, d = {cloud[1]}, n = {sizes[cloud][k]}", fontsize=10)
            ax.invert_xaxis()
            ax.set_xlabel("eps / mean cost")
    return _finished(figure, axes, rows)


def large(records: Records) -> Figure | None:
    """Seconds and peak memory against n."""
    rows = records.of("large")
    if not rows:
        return None
    figure, axes = _panels(1, 2)
    _lines(axes[0][0], rows, "n")
    _lines(axes[0][1], rows, "n", lambda row: row["peak_above_inputs"] / 2**20 if "peak_above_inputs" in row else None)
    for ax, label in zip(axes[0], ("seconds", "peak above the inputs, MiB"), strict=True):
        ax.set_xlabel("n = m")
        ax.set_ylabel(label)
    axes[0][1].set_yscale("linear")
    axes[0][1].set_ylim(bottom=0)
    first = [row for row in rows if row["contender"] == "sbot" and row.get("seconds")]
    if first:
        start = min(first, key=lambda row: row["n"])
        ends = [start["n"], max(row["n"] for row in first)]
        axes[0][0].plot(ends, [start["seconds"] * (n / ends[0]) ** 2 for n in ends], color="#bbbbbb", lw=1, zorder=0)
    return _finished(figure, axes, rows)


def _panels(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = Figure(figsize=(3.6 * columns + 0.4, 3.1 * rows + 0.9), layout="constrained")
    mpl.rcParams["svg.hashsalt"] = "sbot"
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def _seconds(row: Row) -> float | None:
    return row.get("seconds")


def _lines(ax: Axes, rows: Sequence[Row], axis: str, value: Callable[[Row], float | None] = _seconds) -> None:
    """Filled where the tolerance was reached, hollow where not; an arrow up where a solve was stopped."""
    for name in _names(rows):
        style = _style(name, rows)
        mine = sorted((row for row in rows if row["contender"] == name), key=lambda row: row[axis])
        reached = [(row[axis], value(row)) for row in mine if row["status"] == "reached" and value(row)]
        ax.plot([x for x, _ in reached], [y for _, y in reached], **style, ms=4, lw=2.2 if name == "sbot" else 1.2)
        plain = {"color": style["color"], "ls": "none", "ms": 6}
        if value is _seconds:
            stopped = [(row[axis], row["limit"]) for row in mine if row["status"] == "beyond the limit"]
            ax.plot([x for x, _ in stopped], [y for _, y in stopped], marker=r"$\uparrow$", **plain)
        short = [(row[axis], value(row)) for row in mine if row["status"] in ("not reached", "failed") and value(row)]
        ax.plot([x for x, _ in short], [y for _, y in short], marker=style["marker"], mfc="none", **plain)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_ylabel("seconds")
    ax.grid(alpha=0.25)


def _names(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["contender"] for row in rows))
    return sorted(names, key=lambda name: list(COLOURS).index(name.split()[0]), reverse=True)


def _style(name: str, rows: Sequence[Row]) -> dict[str, str]:
    family = name.split()[0]
    same = [other for other in dict.fromkeys(row["contender"] for row in rows) if other.split()[0] == family]
    k = same.index(name) % len(DASHES)
    return {"color": COLOURS[family], "ls": DASHES[k], "marker": MARKS[k]}


def _finished(figure: Figure, axes: list[list[Axes]], rows: Sequence[Row]) -> Figure:
    names = _names(rows)[::-1]
    handles = [Line2D([], [], label=name, ms=4, **_style(name, rows)) for name in names]  # type: ignore[arg-type]
    handles.append(Line2D([], [], label="stopped", color="#555555", ls="none", marker=r"$\uparrow$"))
    handles.append(
        Line2D([], [], label="ended above the tolerance", color="#555555", ls="none", marker="o", mfc="none")
    )
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(4, 2 * len(axes[0])), fontsize=8, frameon=False
    )
    return figure
