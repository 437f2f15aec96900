"""``python -m benchmarks continuous``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click
import torch
from threadpoolctl import threadpool_limits

from .. import report
from . import cells, claims, gaussians, mixtures, overhead, page, toys
from .common import Options, Result, say

PARTS: dict[str, Callable[[Options], Result]] = {
    "gaussians": gaussians.run,
    "mixtures": mixtures.run,
    "toys": toys.run,
    "cells": cells.run,
    "claims": claims.run,
    "overhead": overhead.run,
}
RESULTS = Path(__file__).resolve().parents[1] / "results"


def run(only: str, filters: str, data: Path | None, seed: int, threads: int, quick: bool, out: Path) -> None:
    """Run the parts in ``only`` and write a page for each."""
    names = [name for name in only.split(",") if name] or list(PARTS)
    for name in names:
        if name not in PARTS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(PARTS)}", param_hint="--only")
    out.mkdir(parents=True, exist_ok=True)
    options = Options(seed, quick, tuple(part for part in filters.split(",") if part), data)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            for name in names:
                env = report.environment()
                files = page.save(PARTS[name](options), out, options, env)
                say(f"{name}: wrote {', '.join(files)} to {out}")
    finally:
        torch.set_num_threads(before)


@click.command()
@click.option("--only", default="", metavar="PARTS", help=f"Some of {','.join(PARTS)}; all when not given.")
@click.option(
    "--cells",
    "filters",
    default="",
    metavar="NAMES",
    help="Only these cells, or parts of their names: d5, halfsteps, D16-eps0.1, eps10, normal-moons, LightSB, digits.",
)
@click.option(
    "--data", type=click.Path(file_okay=False, exists=True, path_type=Path), help="Folder of the single cells."
)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=2, show_default=True, help="For every library.")
@click.option("--quick", is_flag=True, help="Little data and training, to see that it runs.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder for the results."
)
def continuous(only: str, filters: str, data: Path | None, seed: int, threads: int, quick: bool, out: Path) -> None:
    """Learned bridges against exact answers, floors and published numbers (minutes to hours)."""
    run(only, filters, data, seed, threads, quick, out)
