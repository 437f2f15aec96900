"""Claim 5: images; digits from noise, and from one set of digits to another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sbot
from sbot import metrics

from .. import report
from . import figures, problems, settings
from .common import NAN, Options, Row, flat, say, solve
from .page import number

EVENT = (1, 8, 8)
#: The digits that are carried to each other.
FROM, TO = 3, 8
SHOWN = [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0]


def run(options: Options) -> tuple[str, list[Row], dict[str, Any]]:
    """Generation and interpolation by every contender."""
    rows: list[Row] = []
    made: dict[str, Any] = {}
    for task, (mu, nu, images) in _tasks().items():
        floor = _floor(images, options)
        for name, plan in settings.DIGITS.items():
            say(f"claims: digits, {task}, {name}")
            outcome = solve(mu, nu, settings.DIGITS_EPS[task], plan, options)
            row: Row = {"claim": 5, "task": task, "contender": name, "seconds": outcome.seconds, "note": outcome.note}
            row |= {"energy": NAN, "floor": floor, "label": NAN}
            rows.append(row)
            if outcome.bridge is None:
                continue
            generator = options.generator("digits", task, name)
            x = outcome.bridge.sample_pairs(options.count(1_000, 100), generator=generator)[1]
            row["energy"] = float(metrics.energy_distance(flat(x), flat(images)))
            row["label"] = _nearest_share(x) if task == "interpolation" else NAN
            paths = outcome.bridge.sample_paths(16, SHOWN, generator=generator)
            made[f"digits_{task}_{name.lower()}"] = _figure(task, name, paths, images)
    head = ["task", "contender", "energy distance", "floor", f"nearest image is a {TO}, %", "seconds"]
    body = [[r["task"], r["contender"], *(number(r[k]) for k in ("energy", "floor", "label", "seconds"))] for r in rows]
    return f"{TEXT}\n\n{report.table(head, body)}", rows, made


TEXT = f"""\
## 5. Images: from noise to digits, and from digits to digits

The 8 x 8 digits of scikit-learn, scaled to [-1, 1], a U-Net, Brownian reference; eps = {settings.DIGITS_EPS["generation"]:g} from
N(0, I), eps = {settings.DIGITS_EPS["interpolation"]:g} from the images of {FROM} to those of {TO}. Energy distance of 1,000
simulated ends to the images; its floor is that of one random half of the images to the other, in size. The data are the training
data: there are too few to keep some back."""


def _tasks() -> dict[str, tuple[Any, Any, Tensor]]:
    noise = sbot.Sampler(lambda n, generator: torch.randn(n, *EVENT, generator=generator), EVENT, like=torch.empty(0))
    everything, first, second = problems.digits(), problems.digits(FROM), problems.digits(TO)
    return {
        "generation": (noise, problems.image_sampler(everything), everything),
        "interpolation": (problems.image_sampler(first), problems.image_sampler(second), second),
    }


def _floor(images: Tensor, options: Options) -> float:
    sizes = []
    for k in range(5):
        order = torch.randperm(len(images), generator=options.generator("digits", "floor", k))
        halves = flat(images[order]).chunk(2)
        sizes.append(abs(float(metrics.energy_distance(halves[0], halves[1]))))
    return sum(sizes) / len(sizes)


def _nearest_share(x: Tensor) -> float:
    """Share of samples, in percent, whose nearest image among all digits is one of the digits wanted."""
    every, wanted = problems.digits(), problems.digits(TO)
    apart = torch.cdist(flat(x), flat(every)).min(1).values
    return 100 * float((torch.cdist(flat(x), flat(wanted)).min(1).values <= apart + 1e-6).float().mean())


def _figure(task: str, name: str, paths: Tensor, images: Tensor) -> Any:
    rows = {f"t = {t:g}": paths[:, k] for k, t in enumerate(SHOWN)}
    return figures.images({**rows, "data": images[:16]}, f"{task}, {name}: one column is one path")
