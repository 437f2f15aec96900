"""The page, its picture and the flat table."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from .. import report
from ..speed.figures import COLOURS
from ..speed.records import Records, Row
from . import goals
from .calls import CALLS, MODULES
from .grids import RATIOS
from .measure import FAILED, LOOSE, SOLVED

HOW = f"""\
Each call is written once and made on the original and, with the import changed, on sbot; every option has its default but those
that make the problem. Two clouds of n points in the plane; reg is given over the largest cost. Both sides are called once and
then in turn, and times are medians of at least five calls; a call longer than the settings say is timed once. A plan is made
where a pipeline reads one; losses are timed with their gradient, transports with the samples that they move.

*Error* is that of the result, whatever it cost: the relative L1 error of both marginals, summed; for relaxed marginals the
relative L1 distance to the solution (sbot's in float64, with a relative gap of at most {SOLVED:g}); for partial plans what
exceeds the bounds and the mass. The original stops at its own default tolerance, which asks for less here and more there, so the
errors stand beside the times.

A number is the original's time over that of sbot. "~": the original ended with an error above {LOOSE:g}. "fails": it raised, or
what it returned is not numbers or has an error above {FAILED:g}. "> t": it was stopped after so many times as long."""


def page(records: Records, pictures: list[str], quick: bool) -> str:
    """All rows that there are."""
    parts = ["# Drop-in: the same call on the original and on sbot"]
    parts += [f"Run {name}: {report.preamble(env, env['settings'])}" for name, env in records.runs.items() if env]
    parts += ["*A quick run: small sizes, to see that it works; no number here means anything.*"] if quick else []
    parts += [HOW, *(f"![times]({name})" for name in pictures), "## Where sbot is slower, or fails"]
    slower = goals.slower(records)
    head = ["call", "dtype", "n", "reg / max cost"]
    parts.append(report.table([*head, "times slower", "why"], slower) if slower else "Nowhere.")
    for library in MODULES:
        rows = [pair for pair in goals.pairs(records) if pair[0]["contender"] == library]
        if rows:
            parts += [f"## {library}", _ratios(rows)]
    failed = goals.failed(records)
    parts.append("## Where the original has no result")
    told = [*head, "the original", "sbot, s", "its error"]
    parts.append(report.table(told, failed) if failed else "Nowhere.")
    return "\n\n".join(parts) + "\n"


def _ratios(rows: list[tuple[Row, Row]]) -> str:
    lines: dict[tuple[Any, ...], dict[float, str]] = {}
    for row, ours in rows:
        lines.setdefault((row["kind"], row["dtype"], row["n"]), {})[row["ratio"]] = goals.said(row, ours)
    ratios = [ratio for ratio in RATIOS if any(ratio in line for line in lines.values())]
    body = [[*line, *(found.get(ratio, "-") for ratio in ratios)] for line, found in lines.items()]
    return report.table(["call", "dtype", "n", *(f"reg {ratio:g}" for ratio in ratios)], body)


def flat(records: Records) -> list[Row]:
    """One row for each cell, for a spreadsheet."""
    out = []
    for row, ours in goals.pairs(records):
        found = goals.times(row, ours)
        out.append(
            {
                "library": row["contender"],
                "call": row["kind"],
                "dtype": row["dtype"],
                "n": row["n"],
                "reg over max cost": row["ratio"],
                "original": row["status"],
                "original seconds": row.get("seconds"),
                "sbot seconds": row.get("ours") or ours.get("seconds"),
                "times": found[0] if found is not None else None,
                "a bound": found is not None and not found[1],
                "original error": row.get("error"),
                "sbot error": ours.get("error"),
                "original said": "; ".join([*(row.get("warned") or []), row.get("note", "")]).strip("; "),
                "sbot said": "; ".join(ours.get("warned") or []),
            }
        )
    return out


def figure(records: Records) -> Figure | None:
    """The original's time over that of sbot, a line for each call; a cross at the right edge where it failed."""
    found = [(row, goals.times(row, ours)) for row, ours in goals.pairs(records)]
    calls = [name for name in CALLS if any(row["kind"] == name for row, _ in found)][::-1]
    if not calls:
        return None
    known = [times[0] for _, times in found if times is not None]
    edge = 2 * max([*known, 10.0])
    drawn = Figure(figsize=(8, 1.2 + 0.26 * len(calls)), layout="constrained")
    ax = drawn.subplots()
    shades = dict(zip(RATIOS, ("#9ecae1", "#4292c6", "#08519c", "#041f3d"), strict=True))
    for row, times in found:
        y = calls.index(row["kind"]) + 0.18 * (RATIOS.index(row["ratio"]) - 1.5) * -1
        colour, size = shades[row["ratio"]], 3 + 1.5 * (row["n"] > 500) + 1.5 * (row["n"] > 1000)
        if row["status"] == "failed":
            ax.plot(edge, y, "x", color=COLOURS["POT"], ms=size)
        elif times is not None:
            ax.plot(times[0], y, "o" if times[1] else ">", color=colour, ms=size, mfc=colour if times[1] else "none")
    ax.axvline(1, color="#888888", lw=1)
    ax.set_xscale("log")
    ax.set_yticks(range(len(calls)), calls, fontsize=8)
    ax.set_xlabel("time of the original over that of sbot (x: the original fails)")
    ax.grid(axis="x", alpha=0.25)
    marks = [ax.plot([], [], "o", color=colour, label=f"reg {ratio:g}")[0] for ratio, colour in shades.items()]
    drawn.legend(handles=marks, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return drawn
