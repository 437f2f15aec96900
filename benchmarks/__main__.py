"""``python -m benchmarks NAME``: run one and write its results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import torch
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from . import report, run
from .continuous.command import continuous
from .dropin.command import dropin
from .speed.command import speed

RESULTS = Path(__file__).parent / "results"
out_option = click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=RESULTS, help="Folder for the results."
)


@click.group()
def main() -> None:
    """Benchmarks of sbot; each writes its results to a folder."""


@contextmanager
def threads_for_all(count: int) -> Iterator[None]:
    """The same number of threads for PyTorch and for NumPy's linear algebra, and the caller's numbers back after."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


@main.command()
@click.option("--quick", is_flag=True, help="A few cells, to see that it runs.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", default=1, show_default=True, help="For every library; POT's half-steps use one.")
@out_option
def pot(quick: bool, seed: int, threads: int, out: Path) -> None:
    """Plans, potentials and values of sbot and POT on the same problems (the full grid takes some minutes)."""
    out.mkdir(parents=True, exist_ok=True)
    cells = run.pot_cells(quick, seed)
    with threads_for_all(threads):
        rows = list(tqdm(run.compare(cells), total=len(cells), desc="compare"))
        times = list(tqdm(run.time_all(run.timed_cells(quick, seed)), desc="time"))
        env = report.environment()
    tolerances = " and ".join(f"{tol:g} in {dtype}" for dtype, tol in run.TOLERANCE.items())
    settings = {"seed": seed, "tolerance": tolerances, "seconds for POT": run.SECONDS, "quick": quick}
    report.write_csv(out / "pot.csv", rows)
    report.write_json(out / "pot.json", {"environment": env, "settings": settings, "times": times})
    (out / "pot.md").write_text(report.pot_page(rows, times, env, settings), encoding="utf-8")
    report.pot_figure(rows, times).savefig(out / "pot.png", dpi=110)
    click.echo(f"{len(rows)} problems; wrote pot.csv, pot.json, pot.md and pot.png to {out}")


main.add_command(continuous)
main.add_command(dropin)
main.add_command(speed)


if __name__ == "__main__":
    main()
