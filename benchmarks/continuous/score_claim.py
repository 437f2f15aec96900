"""Claim 1: half-step 1 is score-based generative modelling."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import torch
from torch import Tensor

import sbot
from sbot import metrics

from .. import report
from . import figures, scores, settings
from .common import NAN, Options, Row, say, solve
from .page import number

TIMES = [0.05 * k for k in range(1, 21)]


def data() -> sbot.Mixture:
    """Eight Gaussians of standard deviation 0.15 on the unit circle: every score below is known exactly."""
    angle = torch.arange(8) * (math.pi / 4)
    means = torch.stack([angle.cos(), angle.sin()], 1)
    return sbot.Mixture(torch.zeros(8), means, 0.15**2 * torch.eye(2).expand(8, 2, 2))


@functools.cache
def reference() -> sbot.LinearSDE:
    """The variance-preserving process; what it leaves of the data at t = 1 is e^-5."""
    return sbot.LinearSDE.vp(0.1, 10.0)


def law(t: float) -> sbot.Mixture:
    """The data after a time t of the reference."""
    start, step = data(), reference().transition(0.0, t)
    parts = start.components
    cov = float(step.phi) ** 2 * parts.cov.double() + float(step.cov) * torch.eye(2, dtype=torch.float64)
    return sbot.Mixture(start.logits.double(), float(step.phi) * parts.mean.double(), cov)


def exact_score(t: float, x: Tensor) -> Tensor:
    with torch.enable_grad():
        place = x.double().detach().requires_grad_()
        (grad,) = torch.autograd.grad(law(t).log_prob(place).sum(), place)
    return grad.to(x)


def reverse(score: scores.Drift) -> scores.Drift:
    """The drift of the reversed reference: ``-b + eps B B' score``."""
    process = reference()

    def drift(t: float, x: Tensor) -> Tensor:
        spread = float(process.coefficients(t)[2])
        return -process.drift(t, x) + spread * score(t, x)

    return drift


def train_score(options: Options) -> scores.Drift:
    """Plain denoising score matching with the transitions of the same reference: no bridge, no simulation."""
    plan, generator = settings.CLAIM_SCORE["fit"], options.generator("score")
    steps = options.count(plan["steps"], 50)
    net, start = sbot.TimeMLP(2, generator=generator), data()
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=2e-5)
    average = [p.detach().clone() for p in net.parameters()]
    grid = torch.linspace(0.01, 1.0, 400)
    moves = [reference().transition(0.0, float(t)) for t in grid]
    phi, std = torch.tensor([float(m.phi) for m in moves]), torch.tensor([float(m.cov) ** 0.5 for m in moves])
    for k in range(steps):
        pick = torch.randint(len(grid), (plan["batch"],), generator=generator)
        noise = torch.randn(plan["batch"], 2, generator=generator)
        x = phi[pick, None] * start.sample(plan["batch"], generator=generator) + std[pick, None] * noise
        loss = (net(x, grid[pick]) + noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        torch._foreach_lerp_(average, [p.detach() for p in net.parameters()], max(1e-3, 1 / (k / 10 + 1)))
    with torch.no_grad():
        for p, mean in zip(net.parameters(), average, strict=True):
            p.copy_(mean)

    @torch.no_grad()
    def score(t: float, x: Tensor) -> Tensor:
        deviation = float(reference().transition(0.0, max(t, 0.01)).cov) ** 0.5
        return net(x, torch.full((len(x),), max(t, 0.01))) / deviation

    return score


def run(options: Options) -> tuple[str, list[Row], dict[str, Any]]:
    say("claims: half-step 1 and a score model")
    nu = sbot.Gaussian(torch.zeros(2), torch.eye(2))
    outcome = solve(data(), nu, 1.0, settings.CLAIM_SCORE, options, reference())
    start = time.perf_counter()
    drifts: dict[str, scores.Drift] = {"score matching, trained apart": reverse(train_score(options))}
    seconds = {"score matching, trained apart": time.perf_counter() - start, "DSB, half-step 1": outcome.seconds}
    if outcome.bridge is not None:
        bridge = outcome.bridge
        drifts["DSB, half-step 1"] = lambda t, x: bridge.reverse_drift(t, x).detach()
    drifts["exact score"] = reverse(exact_score)
    ends = {name: _samples(drift, options) for name, drift in drifts.items()}
    gaps = _gaps(drifts, options)
    n = options.count(10_000, 1_000)
    test = data().sample(n, generator=options.generator("score", "test"))
    again = data().sample(n, generator=options.generator("score", "floor"))
    rows: list[Row] = [_row(name, gaps[name], ends[name], test, seconds.get(name, NAN)) for name in drifts]
    rows.append(_row("exact samples (statistical floor)", (NAN, NAN), again, test, NAN))
    for row in rows:
        row["note"] = outcome.note if row["contender"].startswith("DSB") else ""
    return _text(rows), rows, {"score": _figure(test, ends, drifts)}


def _samples(drift: scores.Drift, options: Options) -> Tensor:
    generator = options.generator("score", "samples")  # the same noise for everybody
    x = torch.randn(options.count(10_000, 1_000), 2, generator=generator)
    process = reference()
    steps = settings.CLAIM_SCORE["steps"]
    return scores.simulate(
        drift, x, steps, 1.0, generator, back=True, variance=lambda t: float(process.coefficients(t)[2])
    )


def _gaps(drifts: dict[str, scores.Drift], options: Options) -> dict[str, tuple[float, float]]:
    """``E |u - v|^2 / E |v|^2`` over times and the law of the reference: to the exact drift, and to that of score matching."""
    n, generator = options.count(4_000, 500), options.generator("score", "places")
    process, apart = reference(), drifts["score matching, trained apart"]
    sums = {name: [0.0, 0.0, 0.0] for name in drifts}
    for t in TIMES:
        x = law(t).sample(n, generator=generator).float()
        exact = drifts["exact score"](t, x)
        scale = float((exact + process.drift(t, x)).square().sum())
        for name, drift in drifts.items():
            u = drift(t, x)
            parts = float((u - exact).square().sum()), float((u - apart(t, x)).square().sum()), scale
            sums[name] = [a + b for a, b in zip(sums[name], parts, strict=True)]
    return {name: (a / c, b / c) for name, (a, b, c) in sums.items()}


def _row(name: str, gaps: tuple[float, float], x: Tensor, test: Tensor, seconds: float) -> Row:
    distance = float(metrics.energy_distance(x, test))
    return {
        "claim": 1,
        "contender": name,
        "to_exact": gaps[0],
        "to_score": gaps[1],
        "energy": distance,
        "seconds": seconds,
    }


def _text(rows: list[Row]) -> str:
    head = ["reverse drift", "to the exact one, %", "to score matching, %", "energy distance x 1e-3", "seconds"]
    body = []
    for r in rows:
        gaps = [number(100 * r["to_exact"], 2), number(100 * r["to_score"], 2)]
        body.append([r["contender"], *gaps, number(1e3 * r["energy"], 2), number(r["seconds"])])
    text = f"""\
## 1. Half-step 1 is a score-based generative model

Data: eight Gaussians on a circle, whose score at every time is known. Reference: a variance-preserving process (beta from 0.1 to
10). One network is what DSB learns in half-step 1; the other is trained apart, by denoising score matching with the transitions
of the reference. *to* is the mean squared difference of the reverse drifts over t = 0.05, ..., 1 and the law of the reference
there, relative to that of the score's part of the exact drift. Samples start at N(0, I), with the same noise and the same
{settings.CLAIM_SCORE["steps"]} steps for all; energy distance to 10,000 fresh points of the data."""
    return f"{text}\n\n{report.table(head, body)}"


def _figure(test: Tensor, ends: dict[str, Tensor], drifts: dict[str, scores.Drift]) -> Any:
    figure, axes = figures.panels(2, 1 + len(ends), (3.0, 3.0))
    figures.scatter(axes[0, 0], test, "data", figures.BLUE)
    line = torch.linspace(-1.5, 1.5, 24)
    grid = torch.cartesian_prod(line, line)
    axes[1, 0].set_axis_off()
    for column, (name, x) in enumerate(ends.items(), 1):
        figures.scatter(axes[0, column], x, name, figures.BLUE, test)
        arrows = drifts[name](0.1, grid)
        axes[1, column].quiver(*grid.T.numpy(), *arrows.T.numpy(), width=0.004, color="0.3")
        axes[1, column].set(xticks=[], yticks=[], aspect="equal", title="reverse drift at t = 0.1")
    return figure
