"""What training costs beside the network: the step, the simulation, the memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import sbot
from sbot.neural.fit import Trainer
from sbot.solvers import dsb, dsbm

from .. import report
from . import settings
from .common import Options, Result, Row, say
from .page import number

NETWORKS: dict[str, settings.Plan] = {"default": {}, "small": settings.ONE_WAY}
DIMENSIONS = (2, 50)
STEPS = 1_500
REPEATS, BARE = 5, 30
#: Steps taken and lengths of the dataset whose peaks of memory are compared.
MEMORY = {
    "DSB": ((200, 10_000), (2_000, 10_000), (200, 1_000_000)),
    "DSBM": ((200, 10_000), (2_000, 10_000), (200, 1_000_000)),
}


def run(options: Options) -> Result:
    """Time and memory of `DSB` and `DSBM`."""
    rows: list[Row] = []
    if options.wants("time"):
        rows += [
            _time(name, d, label, plan, options)
            for name in MEMORY
            for d in DIMENSIONS
            for label, plan in NETWORKS.items()
        ]
    if options.wants("memory"):
        rows += [_memory(name, *case, options) for name, cases in MEMORY.items() for case in cases]
    timed = [row for row in rows if "bare" in row]
    peaks = [row for row in rows if "peak" in row]
    head = ["solver", "d", "network", "forward and backward, ms", "whole step, ms", "ratio", "share of simulation, %"]
    lines = [
        [
            r["solver"],
            r["d"],
            r["network"],
            *(number(1e3 * r[k]) for k in ("bare", "step")),
            number(r["ratio"]),
            number(r["share"], 2),
        ]
        for r in timed
    ]
    memory = [[r["solver"], f"{r['steps']:,}", f"{r['length']:,}", number(r["peak"])] for r in peaks]
    table = report.table(["solver", "gradient steps", "items of the dataset", "peak above the start, MiB"], memory)
    body = "\n\n".join([HOW, report.table(head, lines), PEAKS, table])
    return Result("overhead", "What training costs beside the network", body, rows)


HOW = f"""\
Batches of 512, {STEPS:,} gradient steps. *Forward and backward* is the bare network on a batch of that size, measured before and
after in the same process (median of {2 * REPEATS} runs of {BARE}); *whole step* all that the solver does but simulate and
measure the residual, divided by its steps: drawing the batch, targets, loss, gradient, clipping, AdamW, moving average.
The default network is 3 layers of 256, the small one 2 of 128, where what does not depend on the network weighs more."""

PEAKS = """\
Peak resident memory of a fresh process above what it held before the solve, points of dimension 8 from a dataset that makes its
items when asked."""


@contextmanager
def _clocks(**methods: tuple[type, str]) -> Iterator[dict[str, float]]:
    """Seconds spent inside some methods."""
    spent = dict.fromkeys(methods, 0.0)
    originals = {key: getattr(*place) for key, place in methods.items()}

    def timed(key: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return originals[key](*args, **kwargs)
            finally:
                spent[key] += time.perf_counter() - start

        return call

    for key, (owner, name) in methods.items():
        setattr(owner, name, timed(key))
    try:
        yield spent
    finally:
        for key, (owner, name) in methods.items():
            setattr(owner, name, originals[key])


def _time(name: str, d: int, label: str, plan: settings.Plan, options: Options) -> Row:
    say(f"overhead: {name}, d = {d}, {label} network")
    count = options.count(STEPS, 100)
    directed = name == "DSBM"
    net = sbot.TimeMLP(d, **plan, directed=directed, generator=torch.Generator().manual_seed(options.seed))
    one = sbot.Gaussian(torch.zeros(d), torch.eye(d))
    fit = sbot.FitConfig(steps=count, seed=options.seed)
    solver: Any = (
        sbot.DSBM(net=net, fit=fit, tol=100.0) if directed else sbot.DSB(net=net, fit=fit, half_steps=1, tol=100.0)
    )
    if directed:
        methods = {
            "rows": (dsbm._Fitting, "_rows"),
            "fill": (dsbm._Fitting, "_refresh"),
            "look": (dsbm._Fitting, "_look"),
        }
    else:
        methods = {"fill": (dsb._Fitting, "_fill"), "look": (dsb._Fitting, "_residual")}
    bare = _bare(net, d)
    with _clocks(step=(Trainer, "step"), **methods) as spent:
        start = time.perf_counter()
        sbot.solve_bridge(one, one, 1.0, solver=solver)
        total = time.perf_counter() - start
    each = statistics.median([*bare, *_bare(net, d)])
    step = (total - spent["fill"] - spent["look"]) / count
    row: Row = {"solver": name, "d": d, "network": label, "bare": each, "step": step, "ratio": step / each}
    return row | {"share": 100 * spent["fill"] / total, "seconds": total}


def _bare(net: torch.nn.Module, d: int) -> list[float]:
    x, t, way = torch.randn(512, d), torch.rand(512), torch.ones(512)
    out = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(BARE):
            said = net(x, t, way) if getattr(net, "directed", False) else net(x, t)
            said.square().mean().backward()
        out.append((time.perf_counter() - start) / BARE)
    net.zero_grad(set_to_none=True)
    return out


class Items:
    """A dataset that holds nothing."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.sin(torch.arange(1.0, 9.0) * (index + 1))


CHILD = """
import json, sys
import torch
import sbot
from benchmarks.continuous import overhead
print(json.dumps(overhead.peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
"""


def peak(name: str, steps: int, length: int) -> float:
    """MiB above the start at the highest point of a solve; for a fresh process."""
    torch.set_num_threads(1)
    data = sbot.Sampler.from_dataset(Items(length))
    one = sbot.Gaussian(torch.zeros(8), torch.eye(8))
    fit, more = {"batch": 128}, {"half_steps": 2} if name == "DSB" else {"pairs": 512}
    if name == "DSB":
        more["cache"] = sbot.Cache(paths=256)  # type: ignore[assignment]

    def go(count: int) -> None:
        solver = getattr(sbot, name)(
            net=sbot.TimeMLP(8, 64, 2), fit=sbot.FitConfig(steps=count, **fit), tol=100.0, **more
        )
        sbot.solve_bridge(data, one, 1.0, solver=solver)

    go(2)  # what the libraries take at the first call is not counted
    before = _status("VmRSS")
    go(steps)
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """KiB, as Linux says them of this process; ``getrusage`` would say its parent's highest point too."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0])


def _memory(name: str, steps: int, length: int, options: Options) -> Row:
    say(f"overhead: memory of {name}, {steps} steps, {length} items")
    count = options.count(steps, steps // 100)
    child = subprocess.run(
        [sys.executable, "-c", CHILD, name, str(count), str(length)], capture_output=True, text=True, check=True
    )
    return {"solver": name, "steps": count, "length": length, "peak": float(json.loads(child.stdout))}
