"""``python -m benchmarks speed``."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from .. import report
from . import figures, page
from .grids import PARTS, Options
from .records import Records
from .runner import Limits, run

RESULTS = Path(__file__).resolve().parents[1] / "results"
RIVALS = ("ott-jax", "jax", "geomloss", "pykeops", "mdot-tnt")


def environment(threads: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Machine and versions, of the rivals too."""
    env = report.environment() | {"threads": threads, "settings": settings}
    for name in RIVALS:
        try:
            env["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            env["versions"][name] = "not installed"
    return env


def write(records: Records, out: Path, quick: bool) -> list[str]:
    """The page and its pictures, from all rows that there are."""
    pictures = {"accuracy": figures.accuracy(records), "large": figures.large(records)}
    names = []
    for name, figure in pictures.items():
        if figure is not None:
            names.append(f"speed_{name}.png")
            figure.savefig(out / names[-1], dpi=110)
    (out / "speed.md").write_text(page.page(records, names, quick), encoding="utf-8")
    return ["speed.md", *names]


def parts(only: str) -> list[str]:
    """The parts asked for."""
    names = [name for name in only.split(",") if name] or list(PARTS)
    for name in names:
        if name not in PARTS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(PARTS)}", param_hint="--only")
    return names


@dataclass(frozen=True)
class Asked:
    """What the options of `shared` say."""

    limit_seconds: float
    factor: float
    repeat_below: float
    minutes: float
    fresh: bool
    seed: int
    threads: int
    quick: bool
    out: Path


def shared(what: str, repeat_below: float, threads: int) -> Callable[[Any], Any]:
    """The options of every command that times ``what`` on several sides and can be continued; it gets them as ``asked``."""
    options = (
        click.option(
            "--limit-seconds",
            default=100.0,
            show_default=True,
            help=f"For one {what}; it is killed when they are over.",
        ),
        click.option(
            "--factor", default=12.0, show_default=True, help="A rival is stopped at this many times sbot's time."
        ),
        click.option(
            "--repeat-below",
            default=repeat_below,
            show_default=True,
            help=f"Seconds above which a {what} is timed once.",
        ),
        click.option(
            "--minutes", default=float("inf"), help=f"No new {what} is started after so many; run again to go on."
        ),
        click.option(
            "--fresh",
            is_flag=True,
            help="Forget the results of the parts that are run; else what is there is not run again.",
        ),
        click.option("--seed", default=0, show_default=True),
        click.option(
            "--threads",
            default=threads,
            show_default=True,
            help="For every library, by tying processes to so many cores.",
        ),
        click.option("--quick", is_flag=True, help="Small sizes, to see that it runs."),
        click.option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            default=RESULTS,
            help="Folder for the results.",
        ),
    )

    def decorated(command: Any) -> Any:
        @functools.wraps(command)
        def called(**given: Any) -> Any:
            return command(asked=Asked(**{part.name: given.pop(part.name) for part in fields(Asked)}), **given)

        for option in reversed(options):
            called = option(called)
        return called

    return decorated


def opened(name: str, asked: Asked, parts: Sequence[str]) -> Records:
    """The rows of a command, without those of ``parts`` where they are to be forgotten; quick numbers never mix with others."""
    asked.out.mkdir(parents=True, exist_ok=True)
    records = Records(asked.out / f"{name}{'_quick' if asked.quick else ''}.jsonl")
    for part in parts if asked.fresh else ():
        records.forget(part)
    return records


def carry_out(
    jobs: list[Any],
    records: Records,
    limits: Limits,
    asked: Asked,
    write: Callable[[Records, Path, bool], list[str]],
    folder: str | None = None,
) -> None:
    """Run the jobs that have no row yet, write what ``write`` does, and say what is left."""
    until = time.monotonic() + 60 * asked.minutes
    key = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%S")
    settings = {
        "seed": asked.seed,
        "limit, s": limits.seconds,
        "factor": limits.factor,
        "timed once above, s": limits.repeated,
        "quick": asked.quick,
    }
    if any(records.find(job) is None for job in jobs):
        records.add({"run": key, "environment": environment(asked.threads, settings)})
    left = run(jobs, records, key, limits, asked.threads, click.echo, until, folder)
    files = ", ".join([records.path.name, *write(records, asked.out, asked.quick)])
    click.echo(f"{left} of {len(jobs)} jobs are left; wrote {files} to {records.path.parent}")


@click.command()
@click.option("--only", default="", metavar="PARTS", help=f"Some of {','.join(PARTS)}; all when not given.")
@click.option("--sizes", default="", metavar="N,N", help="Only these n of the accuracy part.")
@click.option("--million", is_flag=True, help="A million points on each side, sbot alone (long).")
@click.option("--float32-rivals", is_flag=True, help="Rivals in float32 too; else only sbot is run there.")
@click.option(
    "--data",
    envvar="SBOT_BENCH_DATA",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Folder of the single cells; without it they are left out.",
)
@shared("solve", repeat_below=10.0, threads=2)
def speed(only: str, sizes: str, million: bool, float32_rivals: bool, data: Path | None, asked: Asked) -> None:
    """Time and memory of sbot, POT, OTT-JAX, GeomLoss and mdot-tnt to the same accuracy (most of an hour; can be continued)."""
    names = parts(only)
    options = Options(
        asked.seed, asked.quick, data, million, float32_rivals, tuple(int(n) for n in sizes.split(",") if n)
    )
    limits = Limits(asked.limit_seconds, asked.factor, repeated=asked.repeat_below)
    if asked.quick:
        limits = Limits(min(asked.limit_seconds, 20.0), asked.factor, 0.5, 0.2)
    todo = [job for name in names for job in PARTS[name](options)]
    folder = str(data.resolve()) if data is not None else None
    carry_out(todo, opened("speed", asked, names), limits, asked, write, folder)
