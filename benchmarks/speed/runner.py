"""What is run, for how long, and what need not be: rivals are stopped when they have lost."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import contenders
from .grids import Job
from .pool import Pool
from .records import Records, Row

PACKAGES = {
    "sbot": "sbot",
    "POT": "ot",
    "OTT": "ott",
    "GeomLoss": "geomloss",
    "mdot-tnt": "mdot_tnt",
    "TorchCFM": "torchcfm",
}
#: A rival is worse by at least this much where a goal says how much; with a margin for noise.
LOST = 11.0
#: Large problems: a little more than what is to be shown.
LARGE = {"GeomLoss online": 5.5, "GeomLoss multiscale": 2.0}
#: The kinds of job that are measured in a process of their own.
FRESH = ("large", "gradient", "memory")
STOPPED = "beyond the limit"


@dataclass(frozen=True)
class Limits:
    """Seconds a solve may take: all of them, and a rival in multiples of what sbot took, but not less than ``least``.

    A solve of more than ``repeated`` is timed once.
    """

    seconds: float = 100.0
    factor: float = 12.0
    least: float = 3.0
    repeated: float = 10.0

    def of(self, job: Job, ours: Row | None) -> float:
        """The limit of one job; sbot's large problems have none to speak of."""
        if job["contender"].startswith("sbot"):
            return 3600.0 if job["kind"] in ("large", "memory") else self.seconds
        if ours is None or not ours.get("seconds"):
            return self.seconds
        cap = 1e9 if job["kind"] == "large" else self.seconds
        factor = LARGE.get(job["contender"], self.factor) if job["kind"] == "large" else self.factor
        return min(cap, max(self.least, factor * float(ours["seconds"])))


def run(
    jobs: Iterable[Job],
    records: Records,
    name: str,
    limits: Limits,
    threads: int,
    say: Callable[[str], None],
    until: float = float("inf"),
    data: str | None = None,
) -> int:
    """Run the jobs that have no result yet, and append what comes of each; how many are left when the time was up."""
    todo = [job for job in jobs if records.find(job) is None]
    with Pool(threads) as pool:
        for k, job in enumerate(todo):
            if time.monotonic() > until:
                return len(todo) - k
            row = _one(job, records, pool, limits, data)
            records.add({**job, **row, "run": name})
            say(f"[{k + 1}/{len(todo)}] {describe(job)}: {outcome(row)}")
    return 0


def _one(job: Job, records: Records, pool: Pool, limits: Limits, data: str | None) -> Row:
    library = contenders.library(job["contender"])
    if importlib.util.find_spec(PACKAGES[library]) is None:
        return {"status": "not run", "note": f"{library} is not installed"}
    ours = records.find(job, contender="sbot")
    limit = limits.of(job, ours)
    known = beaten(job, records, limits, ours)
    if known is not None:
        return known
    asked = {**job, "repeated": limits.repeated, "data": data}
    return pool.run(asked, library, limit, job["kind"] in FRESH)


def beaten(job: Job, records: Records, limits: Limits, ours: Row | None) -> Row | None:
    """Where a rival was stopped on an easier problem, after a time that would be a defeat here too."""
    if job["contender"].startswith("sbot"):
        return None
    axis, harder = ("n", 1) if job["kind"] == "large" else ("ratio", -1)
    for row in records.of(job["part"], kind=job["kind"], contender=job["contender"]):
        if row["status"] != STOPPED or not _same(row, job, axis) or harder * (job[axis] - row[axis]) <= 0:
            continue
        enough = limits.seconds
        if ours is not None and ours.get("seconds"):
            times = LARGE.get(job["contender"], LOST) if job["kind"] == "large" else LOST
            enough = min(math.inf if job["kind"] == "large" else enough, times * float(ours["seconds"]))
        if row["limit"] >= enough:
            where = "n" if axis == "n" else "eps / mean cost"
            return {
                "status": "not run",
                "limit": row["limit"],
                "note": f"already beyond the limit ({row['limit']:.3g} s) at {where} = {row[axis]:g}",
            }
    return None


def _same(row: Row, job: Job, axis: str) -> bool:
    names = ("cloud", "n", "d", "batch", "ratio", "dtype", "tol", "seed")
    return all(row.get(name) == job.get(name) for name in names if name != axis)


def describe(job: Job) -> str:
    """A job in a few words."""
    parts = [f"{job['contender']}: {job['kind']}, {job['cloud']}", f"n {job['n']}", f"d {job['d']}"]
    parts += [f"batch {job['batch']}"] if job.get("batch") else []
    return " ".join([*parts, f"eps {job['ratio']:g}", job["dtype"]])


def outcome(row: Row) -> str:
    """A result in a few words."""
    seconds, error = row.get("seconds"), row.get("error")
    parts = [row["status"]]
    parts += [f"{seconds:.3g} s"] if seconds is not None else []
    parts += [f"error {error:.1e}"] if error is not None else []
    return ", ".join([*parts, *([row["note"]] if row.get("note") else [])])
