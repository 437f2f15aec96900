"""What every part shares: options, rows, results, and one way to run a contender."""

from __future__ import annotations

import contextlib
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure
from torch import Tensor

import sbot

from . import settings

Row = dict[str, Any]
NAN = float("nan")


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    seed: int = 0
    quick: bool = False
    cells: tuple[str, ...] = ()
    data: Path | None = None

    def wants(self, cell: str) -> bool:
        """Whether a cell is to be run; a filter is its name, or some of the parts between its hyphens."""
        return not self.cells or any(f"-{part}-" in f"-{cell}-" for part in self.cells)

    def generator(self, *names: object) -> torch.Generator:
        """A generator of its own for every name, so that leaving out a cell changes no other."""
        key = "/".join(map(str, (self.seed, *names)))
        return torch.Generator().manual_seed(zlib.crc32(key.encode()))

    def count(self, full: int, quick: int) -> int:
        return quick if self.quick else full


@dataclass
class Result:
    """One page of results: text, raw rows, pictures by the ending of their name ("" for the main one)."""

    name: str
    title: str
    body: str
    rows: list[Row]
    figures: dict[str, Figure] = field(default_factory=dict)
    settings: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What a contender returned: a bridge, or the reason why there is none."""

    bridge: Any
    seconds: float
    note: str = ""


def say(text: str) -> None:
    """Progress, on stderr: a full run takes minutes to hours."""
    click.echo(text, err=True)


def sampler(law: Any, event: tuple[int, ...]) -> sbot.Sampler:
    """A measure known only by its draws: ``law.sample(n, generator=)`` as float32."""
    return sbot.Sampler(
        lambda n, generator: law.sample(n, generator=generator).float(), event, like=torch.empty(0, dtype=torch.float32)
    )


def solve(
    mu: Any, nu: Any, eps: float, solver: settings.Plan, options: Options, reference: Any = None, **changes: Any
) -> Outcome:
    """Run the contender that ``solver`` describes and time it; what it refuses becomes a note."""
    more = {} if reference is None else {"reference": reference}
    try:
        made = settings.make(solver, mu, nu, eps, seed=options.seed, quick=options.quick, **changes)
    except settings.Missing as absent:
        return Outcome(None, NAN, str(absent))
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sbot.NotConverged)
            if solver.get("ends") == "gaussian fits":
                mu, nu = settings.fitted(mu, nu, options.seed)
            init = settings.start(solver, mu, nu, eps, seed=options.seed, quick=options.quick)
            bridge = sbot.solve_bridge(mu, nu, eps, solver=made, init=init, **more)
    except sbot.SbotError as fault:
        return Outcome(None, time.perf_counter() - start, " ".join(f"{type(fault).__name__}: {fault}".split()))
    return Outcome(bridge, time.perf_counter() - start)


def half_steps(
    mu: Any, nu: Any, eps: float, solver: settings.Plan, options: Options, count: int, reference: Any = None
) -> Iterator[tuple[int, Outcome]]:
    """The bridge after 1, 2, ... half-steps of one training, each continued from the one before."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message="going on from a run that differs")
        spent = 0.0
        for k in range(1, count + 1):
            changes = {"half_steps": k, "fit": {"folder": folder, "resume": "force"}}
            outcome = solve(mu, nu, eps, solver, options, reference, **changes)
            spent += outcome.seconds
            yield k, Outcome(outcome.bridge, spent, outcome.note)
            if outcome.bridge is None:
                return


def flat(x: Tensor) -> Tensor:
    """``(n, *event)`` as ``(n, D)``."""
    return x.reshape(len(x), -1)
