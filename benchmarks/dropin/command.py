"""``python -m benchmarks dropin``."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import click

from .. import report
from ..speed.command import RESULTS, environment
from ..speed.records import Records
from ..speed.runner import Limits, run
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
@click.option(
    "--limit-seconds", default=100.0, show_default=True, help="For one call; it is stopped when they are over."
)
@click.option(
    "--factor", default=12.0, show_default=True, help="The original is stopped at this many times sbot's time."
)
@click.option("--repeat-below", default=3.0, show_default=True, help="Seconds above which a call is timed once.")
@click.option("--minutes", default=float("inf"), help="No new call is started after so many; run again to go on.")
@click.option("--fresh", is_flag=True, help="Forget all results; else what is there is not run again.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, help="For every library, by tying processes to so many cores.")
@click.option("--quick", is_flag=True, help="Small sizes, to see that it runs.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder for the results."
)
def dropin(
    only: str,
    sizes: str,
    limit_seconds: float,
    factor: float,
    repeat_below: float,
    minutes: float,
    fresh: bool,
    seed: int,
    threads: int,
    quick: bool,
    out: Path,
) -> None:
    """Every covered call of POT, GeomLoss and TorchCFM on the original and on sbot (about two hours; can be continued)."""
    names, until = chosen(only), time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    limits = Limits(limit_seconds, factor, repeated=repeat_below)
    if quick:
        limits = Limits(min(limit_seconds, 20.0), factor, repeated=0.02)
    # quick numbers mean nothing and never mix with others
    records = Records(out / ("dropin_quick.jsonl" if quick else "dropin.jsonl"))
    if fresh:
        records.forget(PART)
    todo = jobs(names, seed, quick, tuple(int(n) for n in sizes.split(",") if n))
    key = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
    settings: dict[str, Any] = {"seed": seed, "limit, s": limits.seconds, "factor": limits.factor}
    settings |= {"timed once above, s": limits.repeated, "quick": quick}
    if any(records.find(job) is None for job in todo):
        records.add({"run": key, "environment": environment(threads, settings)})
    left = run(todo, records, key, limits, threads, click.echo, until)
    click.echo(
        f"{left} of {len(todo)} jobs are left; wrote {', '.join([records.path.name, *write(records, out, quick)])} to {out}"
    )
