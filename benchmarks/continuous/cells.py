"""Target 8: single cells, day 3 predicted from days 2 and 4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sbot
from sbot import metrics

from .. import report
from . import figures, problems, settings
from .common import NAN, Options, Result, Row, say, solve
from .page import notes, number

EPS = 0.1
SOURCE = (
    "full_cite_pcas_50_day_{2,3,4}.npy: 50 principal components of the CITE-seq measurements of the competition Open Problems, "
    "Multimodal Single-Cell Integration (one donor), as preprocessed by the authors of LightSB (repository ngushchin/LightSB, "
    "folder data, MIT licence)"
)
PUBLISHED = [["LightSB", "2.31", "65 (four cores)"], ["DSBM", "2.46", "-"], ["SF2M", "2.66", "-"]]


def run(options: Options) -> Result:
    """All contenders, and the two other days as predictions."""
    if options.data is None:
        return Result("cells", "Single cells", f"Not run: give --data, a folder with {SOURCE}.", [])
    days = problems.load_cells(options.data)
    if options.quick:
        days = {day: x[torch.randperm(len(x), generator=options.generator("cells"))[:500]] for day, x in days.items()}
    scale = problems.cell_scale(days)
    truth, generator = days[3], options.generator("cells", "floor")
    half = truth[torch.randperm(len(truth), generator=generator)].chunk(2)
    rows = [
        _row("day 3, one half against the other (statistical floor)", half[0], half[1]),
        _row("day 2 as prediction", days[2], truth),
        _row("day 4 as prediction", days[4], truth),
    ]
    ends = [sbot.Discrete(days[day] / scale) for day in (2, 4)]
    drawn: dict[str, Tensor] = {}
    for name, plan in settings.CELLS.items():
        if not options.wants(name):
            continue
        say(f"cells: {name}")
        outcome = solve(ends[0], ends[1], EPS, plan, options)
        if outcome.bridge is not None:
            x = outcome.bridge.interpolate(0.5, len(truth), generator=options.generator("cells", name))
            drawn[name] = x.float() * scale
        row = _row(name, drawn.get(name), truth)
        said = getattr(outcome.bridge, "report", None)
        state = "" if said is None else f"{said.reason}, {said.error:.1e} for a tolerance of {said.tolerance:.1e}"
        rows.append(row | {"seconds": outcome.seconds, "note": outcome.note, "state": state})
    used = {name: settings.words(plan) for name, plan in settings.CELLS.items()}
    body = "\n\n".join([_how(scale, days), _table(rows), PUBLISHED_NOTE, _published(), notes(rows)])
    return Result("cells", "Single cells: day 3 from days 2 and 4", body, rows, {"": _figure(days, drawn)}, used)


def _row(name: str, x: Tensor | None, truth: Tensor) -> Row:
    value = NAN if x is None else float(metrics.energy_distance(x, truth))
    return {"contender": name, "energy_distance": value, "seconds": NAN, "note": "", "state": ""}


PUBLISHED_NOTE = "Published, averages over this pair and 3 to 7 (not the same number):"


def _how(scale: float, days: dict[int, Tensor]) -> str:
    sizes = ", ".join(f"day {day}: {len(x)}" for day, x in days.items())
    return f"""\
{SOURCE}. Cells: {sizes}.

Days 2 and 4 are given, day 3 is predicted at t = 1/2 by as many samples as it has cells. Coordinates are divided by {scale:.4f},
the mean over coordinates of the standard deviation of the three days together; eps = {EPS:g} there. The score is the unbiased
energy distance E|x - y| - E|x - x'|/2 - E|y - y'|/2 in the original units."""


def _table(rows: list[Row]) -> str:
    head = ["prediction", "energy distance", "seconds", "end of the solve"]
    return report.table(
        head, [[r["contender"], number(r["energy_distance"]), number(r["seconds"]), r["state"]] for r in rows]
    )


def _published() -> str:
    return report.table(["published", "energy distance", "seconds"], PUBLISHED)


def _figure(days: dict[int, Tensor], drawn: dict[str, Tensor]) -> Any:
    """First two coordinates, which are the first two principal components."""
    figure, axes = figures.panels(1, 3 + len(drawn), (3.0, 2.1))
    every = torch.cat(list(days.values()))[:, :2]
    colours = {2: figures.BLUE, 3: "#8a6bb0", 4: figures.RED}
    for ax, (day, x) in zip(axes[0], days.items(), strict=False):
        figures.scatter(ax, x[:, :2], f"day {day}", colours[day], every)
    for ax, (name, x) in zip(axes[0, 3:], drawn.items(), strict=True):
        figures.scatter(ax, x[:, :2], f"day 3 by {name}", "#8a6bb0", every)
    return figure
