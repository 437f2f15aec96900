"""One large streamed problem: time, and memory above the inputs, measured in a process of its own."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

import sbot
from sbot import metrics

TOLERANCE = 1e-3


def measure(n: int, d: int, ratio: float, seed: int, threads: int) -> dict[str, Any]:
    """Run `solve` in a child, whose peak of memory is then the solver's and not that of an earlier benchmark."""
    arguments = [str(part) for part in (n, d, ratio, seed, threads)]
    command = [sys.executable, "-m", __name__, *arguments]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def solve(n: int, d: int, ratio: float, seed: int) -> dict[str, Any]:
    """``n`` points on each side, N(0, I) and N(1, 0.49 I), float32, eps = ratio * mean cost, to a marginal error of 1e-3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    y = 0.7 * torch.randn(n, d, generator=generator) + 1
    eps = ratio * _mean_cost(x, y)
    before = _resident()  # before anything is solved: what libraries allocate on first use is counted
    sbot.solve_bridge(x[:2000], y[:2000], eps, solver=sbot.Sinkhorn(tol=TOLERANCE, memory=0))  # warm-up, for the time
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sbot.NotConverged)
        bridge = sbot.solve_bridge(x, y, eps, solver=sbot.Sinkhorn(tol=TOLERANCE))
    seconds, peak = time.perf_counter() - start, _peak()
    report = bridge.report
    stages = len({step[1] for step in report.history})
    half_steps = 2 * report.iterations + stages
    return {
        "n": n,
        "d": d,
        "dtype": "float32",
        "ratio": ratio,
        "eps": eps,
        "tolerance": TOLERANCE,
        "seconds": seconds,
        "iterations": report.iterations,
        "ns_per_pair_and_half_step": 1e9 * seconds / (half_steps * float(n) ** 2),
        "reported_error": report.error,
        "error": float(metrics.marginal_error(bridge)),
        "converged": report.converged,
        "reason": report.reason,
        "notes": list(report.notes),
        "input_mib": 2 * x.numel() * x.element_size() / 2**20,
        "resident_before_mib": before / 2**20,
        "peak_mib": peak / 2**20,
        "peak_above_inputs_mib": (peak - before) / 2**20,
        "dense_matrix_mib": n * n * x.element_size() / 2**20,
    }


def _mean_cost(x: torch.Tensor, y: torch.Tensor) -> float:
    """Mean of ``|x - y|^2 / 2`` over all pairs, without the pairs."""
    u, v = x.double(), y.double()
    squares = (u.square().sum(1).mean() + v.square().sum(1).mean()) / 2
    return float(squares - u.mean(0) @ v.mean(0))


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    # not ru_maxrss: it is inherited from the parent that forked
    return _status("VmHWM")


def _status(key: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def page(result: dict[str, Any], heading: str) -> str:
    """The result in words."""
    r = result
    state = "converged" if r["converged"] else f"not converged ({r['reason']})"
    return "\n".join(
        [
            "# One large streamed problem",
            "",
            heading,
            "",
            f"n = m = {r['n']}, d = {r['d']}, {r['dtype']}, quadratic cost, eps = {r['ratio']:g} x mean cost, "
            f"marginal error {r['tolerance']:g} asked for.",
            "",
            "| measured | |",
            "|---|---|",
            f"| outcome | {state} |",
            f"| seconds | {r['seconds']:.1f} |",
            f"| iterations, all values of eps | {r['iterations']} |",
            f"| ns a pair and half-step | {r['ns_per_pair_and_half_step']:.2f} |",
            f"| marginal error reported | {r['reported_error']:.2e} |",
            f"| marginal error of the plan, streamed in float64 afterwards | {r['error']:.2e} |",
            f"| peak memory above what was resident with the inputs | {r['peak_above_inputs_mib']:.0f} MiB |",
            f"| the inputs | {r['input_mib']:.1f} MiB |",
            f"| the cost matrix, had it been stored | {math.ceil(r['dense_matrix_mib'])} MiB |",
            "",
            f"Notes of the report: {'; '.join(r['notes'])}.",
            "",
        ]
    )


if __name__ == "__main__":
    given = sys.argv[1:]
    torch.set_num_threads(int(given[4]))
    print(json.dumps(solve(int(given[0]), int(given[1]), float(given[2]), int(given[3]))))
