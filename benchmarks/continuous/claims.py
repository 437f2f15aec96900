"""The claims of the paper (De Bortoli et al. 2021), each with a number and a picture."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sbot
from sbot import metrics

from .. import report
from . import digits, figures, problems, score_claim, settings
from .common import NAN, Options, Result, Row, half_steps, sampler, say, solve
from .page import notes, number


def run(options: Options) -> Result:
    """Claims 1, 2, 3 and 5; claim 4, the geometric rate, is on the page of the Gaussians."""
    parts = {"score": score_claim.run, "short": short, "steps": few_steps, "digits": digits.run}
    texts: list[str] = []
    rows: list[Row] = []
    made: dict[str, Any] = {}
    for name, part in parts.items():
        if options.wants(name):
            text, more, pictures = part(options)
            texts.append(text)
            rows += more
            made |= pictures
        if name == "steps":
            texts.append(RATE)
    used = {
        "1. half-step 1": settings.words(settings.CLAIM_SCORE),
        "2. short interval": settings.words(settings.CLAIM_SHORT),
        **{f"3. {name}": settings.words(plan) for name, plan in settings.CLAIM_FEW.items()},
        **{f"5. {name}": settings.words(plan) for name, plan in settings.DIGITS.items()},
    }
    return Result("claims", "Claims of the paper", "\n\n".join([*texts, notes(rows)]), rows, made, used)


RATE = """\
## 4. Proportional fitting converges at a geometric rate

See [the page of the Gaussians](continuous_gaussians.md): the error after each half-step against the exact iterate."""


def _moons() -> problems.Toy:
    """Moons of unit size."""
    return problems._moons(0.05, (0.5, 0.25), 1.0)


def _prior() -> sbot.Gaussian:
    return sbot.Gaussian(torch.zeros(2), torch.eye(2))


# ---- 2: a short interval -------------------------------------------------------------------------------------------------

SHORT_EPS = 0.2


def short(options: Options) -> tuple[str, list[Row], dict[str, Any]]:
    """Brownian motion of variance 0.2 cannot carry the moons to N(0, I); further half-steps can."""
    count, n = options.count(settings.CLAIM_SHORT_COUNT, 3), options.count(10_000, 1_000)
    mu, nu = sampler(_moons(), (2,)), _prior()
    tests = [law.sample(n, generator=options.generator("short", "test", k)).float() for k, law in enumerate((mu, nu))]
    floors = _floors(tests, mu, nu, options)
    rows: list[Row] = []
    kept: dict[int, Tensor] = {}
    for k, outcome in half_steps(mu, nu, SHORT_EPS, settings.CLAIM_SHORT, options, count):
        say(f"claims: short interval, half-step {k} of {count}")
        row: Row = {"claim": 2, "contender": "DSB", "half_step": k, "seconds": outcome.seconds, "note": outcome.note}
        rows.append(row)
        if outcome.bridge is None:
            continue
        back = bool(k % 2)
        pairs = outcome.bridge.sample_pairs(n, generator=options.generator("short", k), reverse=back)
        kept[k] = pairs[0 if back else 1]
        row["end"] = "mu" if back else "nu"
        row["energy"] = float(metrics.energy_distance(kept[k], tests[0 if back else 1]))
    text = [SHORT, _short_table(rows, floors)]
    return "\n\n".join(text), rows, {"short": _short_figure(rows, kept, tests, floors)} if kept else {}


def _floors(tests: list[Tensor], mu: Any, nu: Any, options: Options) -> list[float]:
    """Energy distance of fresh exact samples to each test set, in size: unbiased, it is as often below 0 as above."""
    generator = options.generator("short", "floor")
    pairs = [(law, test) for law, test in zip((mu, nu), tests, strict=True) for _ in range(4)]
    found = [
        abs(float(metrics.energy_distance(law.sample(len(test), generator=generator), test))) for law, test in pairs
    ]
    return [sum(found[:4]) / 4, sum(found[4:]) / 4]


SHORT = f"""\
## 2. Further half-steps mend what a short interval leaves wrong

Moons to N(0, I) by Brownian motion of variance eps = {SHORT_EPS:g}: started at the moons it is far from N(0, I) at t = 1, so that
half-step 1 alone, a score-based model, starts at a law it never saw. After each odd half-step the learned backward process is
started at N(0, I) and compared with the moons, after each even one the learned forward process is started at the moons and
compared with N(0, I): energy distance of 10,000 samples. The floor is its mean size for exact samples."""


def _short_table(rows: list[Row], floors: list[float]) -> str:
    head = ["half-step", "end compared", "energy distance x 1e-3", "floor x 1e-3", "seconds so far"]
    body = []
    for row in rows:
        floor = floors[(row["half_step"] + 1) % 2]
        distance = number(1e3 * row.get("energy", NAN))
        body.append([row["half_step"], row.get("end", "-"), distance, number(1e3 * floor, 2), number(row["seconds"])])
    return report.table(head, body)


def _short_figure(rows: list[Row], kept: dict[int, Tensor], tests: list[Tensor], floors: list[float]) -> Any:
    figure, axes = figures.panels(2, 3, (3.4, 3.2))
    lines = {}
    for end, first, floor in (("mu", 1, floors[0]), ("nu", 2, floors[1])):
        mine = [row for row in rows if row["half_step"] % 2 == first % 2 and "energy" in row]
        k = [row["half_step"] for row in mine]
        lines[f"to {end}"] = (k, figures.finite([row["energy"] for row in mine]), "o-")
        lines[f"floor of {end}"] = (k, [floor] * len(k), ":")
    figures.curves(axes[0, 0], lines, xlabel="half-step", ylabel="energy distance", title="both ends")
    axes[0, 0].set_xticks([row["half_step"] for row in rows])
    figures.scatter(axes[1, 0], tests[0], "mu", figures.BLUE)
    odd, even = [k for k in kept if k % 2], [k for k in kept if not k % 2]
    for column, k in ((1, odd[0]), (2, odd[-1])):
        figures.scatter(axes[0, column], kept[k], f"backwards, half-step {k}", figures.BLUE, tests[0])
    for column, k in ((1, even[0]), (2, even[-1])):
        figures.scatter(axes[1, column], kept[k], f"forward, half-step {k}", figures.RED, tests[1])
    return figure


# ---- 3: few steps --------------------------------------------------------------------------------------------------------

FEW_EPS = 1.0


def few_steps(options: Options) -> tuple[str, list[Row], dict[str, Any]]:
    """Quality of the samples against the number of steps."""
    n = options.count(10_000, 1_000)
    mu, nu = sampler(_moons(), (2,)), _prior()
    test = mu.sample(n, generator=options.generator("steps", "test"))
    again = mu.sample(n, generator=options.generator("steps", "floor"))
    floor = abs(float(metrics.energy_distance(again, test)))
    rows: list[Row] = []
    kept: dict[str, dict[int, Tensor]] = {}
    for name, plan in settings.CLAIM_FEW.items():
        for steps in settings.CLAIM_STEPS if not options.quick else settings.CLAIM_STEPS[:2]:
            say(f"claims: {name}, {steps} steps")
            outcome = solve(mu, nu, FEW_EPS, plan, options, steps=steps)
            row: Row = {"claim": 3, "contender": name, "steps": steps, "seconds": outcome.seconds, "note": outcome.note}
            rows.append(row)
            if outcome.bridge is not None:
                x = outcome.bridge.sample_pairs(n, generator=options.generator("steps", steps), reverse=True)[0]
                kept.setdefault(name, {})[steps] = x
                row["energy"] = float(metrics.energy_distance(x, test))
    head = ["contender", "steps", "energy distance x 1e-3", "floor x 1e-3", "seconds"]
    body = [
        [r["contender"], r["steps"], number(1e3 * r.get("energy", NAN)), number(1e3 * floor, 2), number(r["seconds"])]
        for r in rows
    ]
    return f"{FEW}\n\n{report.table(head, body)}", rows, {"steps": _few_figure(kept, test)} if kept else {}


FEW = f"""\
## 3. Few steps are enough

Moons from N(0, I), Brownian reference, eps = {FEW_EPS:g}: trained and sampled with N steps, compared with fresh moons."""


def _few_figure(kept: dict[str, dict[int, Tensor]], test: Tensor) -> Any:
    columns = max(len(by) for by in kept.values())
    figure, axes = figures.panels(len(kept), 1 + columns, (2.6, 2.6))
    for line, (name, by) in zip(axes, kept.items(), strict=True):
        figures.scatter(line[0], test, "data", figures.BLUE, test)
        for ax, (steps, x) in zip(line[1:], by.items(), strict=False):
            figures.scatter(ax, x, f"{name}\nN = {steps}", figures.BLUE, test)
    return figure
