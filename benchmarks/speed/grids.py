"""The jobs of each part: plain data, one solve each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .contenders import BATCH, LARGE, SINGLE
from .gradients import VALUES

Job = dict[str, Any]
RATIOS = (1e-1, 1e-2, 1e-3, 1e-4)
TOLERANCE = {"float64": 1e-6, "float32": 1e-4}
#: On tensors of torch it is several times faster, but for the smallest problems.
SMALL_ONLY = "POT sinkhorn_log on arrays"
#: Images of the digits 0 to 4; there are 896 of the others.
DIGITS = 896


@dataclass(frozen=True)
class Options:
    """What was asked for on the command line."""

    seed: int = 0
    quick: bool = False
    data: Path | None = None
    million: bool = False
    float32_rivals: bool = False
    sizes: tuple[int, ...] = ()


def accuracy(options: Options) -> list[Job]:
    """Target 1: every eps of a cloud, from easy to hard, sbot first; float32 after all of float64."""
    sizes, ratios = ((100,), (1e-1, 1e-2)) if options.quick else ((500, 2000, 5000), RATIOS)
    clouds: list[Job] = []
    for n in sizes:
        clouds += [{"cloud": "gaussians", "n": n, "d": d} for d in ((2,) if options.quick else (2, 50))]
        if options.data is not None:
            clouds.append({"cloud": "cells", "n": n, "d": 50})
    if not options.quick:
        clouds.append({"cloud": "digits", "n": DIGITS, "d": 64})
    clouds.sort(key=lambda cloud: cloud["n"])
    clouds = [cloud for cloud in clouds if not options.sizes or cloud["n"] in options.sizes]
    jobs = []
    for dtype, tol in TOLERANCE.items():
        names = [name for name in SINGLE if name != SMALL_ONLY]
        names = names if dtype == "float64" or options.float32_rivals else ["sbot"]
        for cloud in clouds:
            base = {"part": "accuracy", "kind": "single", **cloud, "dtype": dtype, "tol": tol, "seed": options.seed}
            jobs += [{**base, "ratio": ratio, "contender": name} for ratio in ratios for name in names]
    return jobs


def large(options: Options) -> list[Job]:
    """Target 2; the last is for sbot alone."""
    sizes = [1000] if options.quick else [10_000, 30_000, 100_000]
    base = {"part": "large", "kind": "large", "cloud": "gaussians", "d": 3, "ratio": 0.05, "dtype": "float32"}
    base |= {"tol": 1e-3, "seed": options.seed}
    jobs = [{**base, "n": n, "contender": name} for n in sizes for name in LARGE]
    if options.million:
        jobs.append({**base, "n": 1_000_000, "contender": "sbot"})
    return jobs


def batch(options: Options) -> list[Job]:
    """Target 3, and the overhead of one small problem."""
    count, size = (16, 24) if options.quick else (256, 64)
    base = {"part": "batch", "cloud": "gaussians", "d": 2, "ratio": 0.05, "dtype": "float64", "tol": 1e-6}
    base |= {"seed": options.seed}
    jobs = [{**base, "kind": "batch", "n": size, "batch": count, "contender": name} for name in BATCH]
    names = ("sbot", "POT sinkhorn", "POT sinkhorn_log", SMALL_ONLY, "OTT")
    sizes = (20, 50) if options.quick else (20, 50, 100, 200)
    return jobs + [{**base, "kind": "single", "n": n, "contender": name} for n in sizes for name in names]


def gradients(options: Options) -> list[Job]:
    """Target 4: all but the streamed ones at the size that differentiating through iterations can afford."""
    base = {"part": "gradients", "cloud": "gaussians", "d": 2, "ratio": 0.05, "dtype": "float64", "seed": options.seed}
    jobs: list[Job] = []
    sizes = (150,) if options.quick else (1000, 3000)
    for n in sizes:
        for name in VALUES:
            if n <= 1000 or name.startswith("sbot"):
                jobs.append({**base, "kind": "gradient", "n": n, "contender": name, "tol": 1e-6})
    if not options.quick:  # the same with many more iterations: what they cost in memory
        jobs += [{**job, "tol": 1e-10, "ratio": 0.01} for job in jobs if job["n"] == sizes[0]]
    ours = [name for name in VALUES if name.startswith("sbot")]
    return jobs + [{**base, "kind": "check", "n": 40, "contender": name, "tol": 1e-13, "ratio": 0.1} for name in ours]


def memory(options: Options) -> list[Job]:
    """What a stored and a streamed solve take, and what can be asked of them."""
    base = {"part": "memory", "kind": "memory", "cloud": "gaussians", "contender": "sbot", "seed": options.seed}
    base |= {"ratio": 0.05}
    stored = {**base, "n": 300 if options.quick else 5000, "d": 2, "dtype": "float64", "tol": 1e-6}
    streamed = {**base, "n": 2000 if options.quick else 100_000, "d": 3, "dtype": "float32", "tol": 1e-3}
    return [stored, streamed]


PARTS: dict[str, Callable[[Options], list[Job]]] = {
    "accuracy": accuracy,
    "large": large,
    "batch": batch,
    "gradients": gradients,
    "memory": memory,
}
