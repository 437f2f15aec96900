"""``python -m benchmarks dropin``."""

from __future__ import annotations

from pathlib import Path

import click

from .. import report
from ..speed.command import Asked, carry_out, opened, shared
from ..speed.records import Records
from ..speed.runner import Limits
from . import page
from .calls import CALLS
from .grids import PART, jobs


def write(records: Records, out: Path, quick: bool) -> list[str]:
    """The page, its picture and the flat table, from all rows that there are."""
    drawn, rows = page.figure(records), page.flat(records)
    names = ["dropin.md"]
    if drawn is not None:
        drawn.savefig(out / "dropin.png", dpi=110)
        report.write_csv(out / "dropin.csv", rows)
        names += ["dropin.csv", "dropin.png"]
    (out / "dropin.md").write_text(page.page(records, names[2:], quick), encoding="utf-8")
    return names


def chosen(only: str) -> list[str]:
    """The calls whose name, or whose library, is asked for."""
    wanted = [name for name in only.split(";") if name]
    for name in wanted:
        if name not in CALLS and all(call.library != name for call in CALLS.values()):
            raise click.BadParameter(f"{name!r} is no library and none of {'; '.join(CALLS)}", param_hint="--only")
    return [name for name, call in CALLS.items() if not wanted or name in wanted or call.library in wanted]


@click.command()
@click.option(
    "--only", default="", metavar="NAMES", help="Libraries (POT;GeomLoss;TorchCFM) or calls, between semicolons."
)
@click.option("--sizes", default="", metavar="N,N", help="Only these n.")
@shared("call", repeat_below=3.0, threads=1)
def dropin(only: str, sizes: str, asked: Asked) -> None:
    """Every covered call of POT, GeomLoss and TorchCFM on the original and on sbot (about two hours; can be continued)."""
    names = chosen(only)
    limits = Limits(asked.limit_seconds, asked.factor, repeated=asked.repeat_below)
    if asked.quick:
        limits = Limits(min(asked.limit_seconds, 20.0), asked.factor, repeated=0.02)
    todo = jobs(names, asked.seed, asked.quick, tuple(int(n) for n in sizes.split(",") if n))
    carry_out(todo, opened("dropin", asked, [PART]), limits, asked, write)
