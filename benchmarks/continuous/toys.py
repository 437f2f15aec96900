"""Target 7: laws in the plane, scored by the exact 2-Wasserstein distance of 10,000 samples."""

from __future__ import annotations

from typing import Any

import torch

from .. import report
from . import figures, problems, scores, settings
from .common import NAN, Options, Outcome, Result, Row, sampler, say, solve
from .page import notes, number

EPS = 1.0
TITLES = {
    "normal-8gaussians": "N to 8 Gaussians",
    "normal-moons": "N to moons",
    "normal-scurve": "N to s-curve",
    "moons-8gaussians": "moons to 8 Gaussians",
}
#: 2-Wasserstein distances, 20 steps for DSB and DSBM, 100 for SF2M.
PUBLISHED = {
    "SF2M-Exact": (0.275, 0.124, 0.128, 0.726),
    "DSBM-IPF": (0.315, 0.140, 0.140, 0.812),
    "DSB": (0.411, 0.190, 0.272, 0.987),
}


def run(options: Options) -> Result:
    """Every pair of laws."""
    rows: list[Row] = []
    made: dict[str, Any] = {}
    for toy in settings.TOYS:
        if options.wants(toy):
            rows += _toy(toy, options, made)
    table = report.table(["W2 at t = 1", *TITLES.values(), "seconds in all"], _lines(rows, "w2"))
    back = report.table(["W2 at t = 0, backwards", *TITLES.values(), "seconds in all"], _lines(rows, "w2_back"))
    published = report.table(["published", *TITLES.values()], [[name, *map(str, v)] for name, v in PUBLISHED.items()])
    used = {
        f"{TITLES[toy]}: {name}": settings.words(plan)
        for toy, plans in settings.TOYS.items()
        for name, plan in plans.items()
    }
    body = "\n\n".join([HOW, table, back, published, notes(rows)])
    return Result("toys", "Toys in the plane", body, rows, made, used)


def _toy(toy: str, options: Options, made: dict[str, Any]) -> list[Row]:
    start, end = problems.TOYS[toy]
    n = options.count(10_000, 500)
    tests = [law.even(n, 1_000_000 + options.seed) for law in (start, end)]
    generator = options.generator("toys", toy)
    floors = [
        scores.w2(law.sample(n, generator=generator), test) for law, test in zip((start, end), tests, strict=True)
    ]
    rows: list[Row] = [{"toy": toy, "contender": FLOOR, "w2": floors[1], "w2_back": floors[0], "n": n}]
    rows[0] |= {"seconds": NAN, "note": ""}
    ends = [sampler(law, (2,)) for law in (start, end)]
    drawn: dict[str, Any] = {}
    for name, plan in settings.TOYS[toy].items():
        say(f"toys: {toy}, {name}")
        outcome = solve(ends[0], ends[1], EPS, plan, options)
        row: Row = {"toy": toy, "contender": name, "w2": NAN, "w2_back": NAN, "n": n}
        row |= {"seconds": outcome.seconds, "note": outcome.note}
        rows.append(row)
        if outcome.bridge is None:
            continue
        there = outcome.bridge.sample_paths(n, [1.0], generator=options.generator("toys", toy, name))[:, 0]
        row["w2"] = scores.w2(there, tests[1])
        row["w2_back"] = _backwards(outcome, n, tests[0], options.generator("toys", toy, name, "back"))
        times = [k / 20 for k in range(21)]
        drawn[name] = there, outcome.bridge.sample_paths(100, times, generator=options.generator("toys", toy, name))
    made[toy] = _figure(toy, tests, drawn)
    return rows


def _backwards(outcome: Outcome, n: int, test: torch.Tensor, generator: torch.Generator) -> float:
    """The reverse process from nu; a bridge of potentials is exact in its own direction and has no such simulation."""
    try:
        x = outcome.bridge.sample_pairs(n, generator=generator, reverse=True)[0]
    except TypeError:
        return NAN
    return scores.w2(x, test)


FLOOR = "independent exact draws (statistical floor)"
HOW = f"""\
Laws and scales are those of the runner of TorchCFM: 8 Gaussians of standard deviation 1 on a circle of radius 5
("gaussians"); moons of noise 0.05, times 2 and shifted by -1 in x, and the s-curve of noise 0.05 times 1.5 ("moons",
"scurve"); for the last pair ("twodim") moons of noise 0.1 standardised times 7, and 8 Gaussians of standard deviation 1.5 on a
circle of radius 12. sigma = 1, that is eps = {EPS:g}. Training sees fresh independent draws. The score is the exact
2-Wasserstein distance (root of the least mean of |x - y|^2) of as many simulated ends to a test set of 10,000 points, for
which scikit-learn places the angles evenly and each Gaussian has the same number of points; the floor is what independent
exact draws score against that set."""


def _lines(rows: list[Row], key: str) -> list[list[str]]:
    names = list(dict.fromkeys(row["contender"] for row in rows))
    lines = []
    for name in names:
        mine = {row["toy"]: row for row in rows if row["contender"] == name}
        seconds = [row["seconds"] for row in mine.values() if row["seconds"] == row["seconds"]]
        values = [number(mine[toy][key]) if toy in mine else "-" for toy in TITLES]
        lines.append([name, *values, f"{sum(seconds):.0f}" if seconds else "-"])
    return lines


def _figure(toy: str, tests: list[torch.Tensor], drawn: dict[str, Any]) -> Any:
    figure, axes = figures.panels(2, 1 + len(drawn), (3.2, 3.4))
    both = torch.cat(tests)
    figures.scatter(axes[0, 0], tests[0], f"{TITLES[toy]}:\nmu", figures.BLUE, both)
    figures.scatter(axes[1, 0], tests[1], "nu", figures.RED, both)
    for column, (name, (ends, paths)) in enumerate(drawn.items(), 1):
        title = name.replace(", ", ",\n")
        figures.paths(axes[0, column], paths, f"{title}: paths", both)
        figures.scatter(axes[1, column], ends, f"{title}: at t = 1", figures.RED, both)
    return figure
