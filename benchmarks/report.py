"""What a run leaves behind: raw rows, a page of tables, a picture; each with the machine, the versions and the settings."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .problems import KINDS, RATIOS
from .run import SECONDS_TIMED, TIMED_TOLERANCE, Row

#: Below this a difference is drawn here: zero has no logarithm.
LOWEST = 1e-17
#: Plans of two converged solvers that differ by more are listed.
APART = {"float64": 1e-9, "float32": 5e-3}
PACKAGES = ("sbot", "torch", "numpy", "scipy", "POT")
NOISY = "The machine is shared and its times are noisy: read ratios, not seconds."
COLOURS = {"sbot": "#0b6fb8", "POT": "#d1600f", "plain": "#8a8a8a"}


def environment() -> dict[str, Any]:
    """Machine, versions and date of a run."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "revision": _revision(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "note": NOISY,
    }


def _revision() -> str:
    """The commit of the working tree, and whether the library differs from it."""
    root = Path(__file__).resolve().parents[1]
    try:
        commands = ["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "sbot"]
        head, changed = (
            subprocess.run(["git", "-C", str(root), *c], capture_output=True, text=True, check=True).stdout.strip()
            for c in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} with changes" if changed else head


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Raw rows, numbers to four digits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_text(cell) for cell in line) + " |" for line in body]
    return "\n".join(lines)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.1e}"
    return str(value)


def preamble(env: dict[str, Any], settings: dict[str, Any]) -> str:
    """Where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    options = ", ".join(f"{key} {value}" for key, value in settings.items())
    return (
        f"{env['date']}; {env['cpu']}, {env['cores']} cores, {env['threads']} thread(s) for every library; "
        f"{env['platform']}; {versions}; commit {env['revision']}. Settings: {options}. {env['note']}"
    )


# ---- the page on POT -------------------------------------------------------------------------------------------------


def pot_page(rows: list[Row], times: list[Row], env: dict[str, Any], settings: dict[str, Any]) -> str:
    """Differences by kind, dtype and eps; what failed; who is wrong where the two disagree; times."""
    return "\n\n".join(
        [
            "# sbot and POT on the same problems",
            preamble(env, settings),
            HOW_TO_READ,
            "![plan differences and times](pot.png)",
            "## Largest differences where both converged",
            _differences(rows),
            "## What did not converge",
            _failures(rows),
            "## Disagreements",
            _disagreements(rows),
            f"## Seconds to a marginal error of {TIMED_TOLERANCE:g}",
            _times(times),
            "",
        ]
    )


HOW_TO_READ = """\
Both libraries get the same arrays. The *oracle* is a third solver (annealed log-domain Sinkhorn, then Newton on the dual, in
float64 NumPy, written for this benchmark): it says who is right. *Plan* is the largest difference of an entry over the
largest entry; *potential* the largest difference at atoms with weight, in units of the mean cost, after removing the
constant that a balanced problem leaves free (POT's log-scalings contain log a and have no unit); *value* is the difference
of the objective `<P,C> + eps KL(P | a b) + rho KL(...)`, mass terms included, in units of the mean cost: sbot's own `cost()`
against the definition on POT's plan. *Marginal error* is the relative L1 error of both marginals, measured on the plan
in float64. Both are run to the tolerance that sbot's report names: 1e-12 in float64, 1e-6 in float32, or about what
rounding leaves where that is more. POT is `sinkhorn_log` where balanced; else the best of the `sinkhorn_unbalanced` methods
with `reg_type="kl"`. *Converged* means a measured error of at most twice the tolerance; *failed* means not numbers, or that
the solver itself gave up with numerical errors. In the picture a hollow mark did not converge or failed, lines join
medians of what converged, and a cross at the upper edge is a failure."""


def _worst(rows: Iterable[Row], key: str, scale: str | None = None) -> float:
    return max((row[key] / (row[scale] if scale else 1) for row in rows), default=float("nan"))


def _differences(rows: list[Row]) -> str:
    head = ["dtype", "problem", "eps / mean cost", "cells", "both converged", "plan: sbot - POT", "sbot - oracle"]
    head += ["POT - oracle", "potential", "value", "marginal error: sbot", "POT"]
    body = []
    for dtype in ("float64", "float32"):
        for kind in KINDS:
            for ratio in RATIOS:
                here = [r for r in rows if (r["dtype"], r["kind"], r["ratio"]) == (dtype, kind, ratio)]
                both = [r for r in here if r["status_sbot"] == r["status_pot"] == "converged"]
                if here:
                    plans = [_worst(both, key) for key in ("plan_sbot_pot", "plan_sbot", "plan_pot")]
                    rest = [_worst(both, "potential_sbot_pot", "mean_cost"), _worst(both, "value_sbot_pot")]
                    errors = [_worst(both, "error_sbot"), _worst(both, "error_pot")]
                    body.append([dtype, kind, f"{ratio:g}", len(here), len(both), *plans, *rest, *errors])
    return table(head, body)


def _failures(rows: list[Row]) -> str:
    head = ["who", "dtype", "problem", "eps / mean cost", "not converged", "failed", "of", "worst error"]
    head += ["over the tolerance", "why"]
    body = []
    for who, name in (("sbot", "sbot"), ("pot", "POT")):
        bad = [row for row in rows if row[f"status_{who}"] != "converged"]
        for dtype, kind, ratio in dict.fromkeys((r["dtype"], r["kind"], r["ratio"]) for r in sorted(bad, key=_place)):
            same = [r for r in rows if (r["dtype"], r["kind"], r["ratio"]) == (dtype, kind, ratio)]
            here = [r for r in same if r[f"status_{who}"] != "converged"]
            failed = sum(r[f"status_{who}"] == "failed" for r in here)
            why = ", ".join(sorted({str(r[f"note_{who}"]).split(";")[0] for r in here}))
            errors = [r[f"error_{who}"] for r in here if math.isfinite(r[f"error_{who}"])]
            times = [r[f"error_{who}"] / r["tolerance"] for r in here if math.isfinite(r[f"error_{who}"])]
            worst = [max(errors, default=math.nan), max(times, default=math.nan)]
            counts = [len(here) - failed, failed, len(same)]
            body.append([name, dtype, kind, f"{ratio:g}", *counts, worst[0], f"{worst[1]:.2g}", why])
    return f"{table(head, body)}\n\n{_failure_notes(rows)}"


def _place(row: Row) -> tuple[bool, int, float]:
    return row["dtype"] == "float32", KINDS.index(row["kind"]), row["ratio"]


def _failure_notes(rows: list[Row]) -> str:
    helped = sum("without them" in r["note_pot"] for r in rows)
    claimed = [r for r in rows if r["note_sbot"] == "tolerance"]
    said = [sum(r["status_sbot"] != "converged" for r in claimed if r["dtype"] == d) for d in ("float64", "float32")]
    return (
        f"POT's unbalanced solvers stop at iteration 0 where a weight is zero: in {helped} cells its answer is that of the "
        'problem without those atoms. "tolerance" as the reason of sbot means that it reports convergence while the error '
        f"measured on its plan is more than twice the tolerance: {said[0]} cells in float64, {said[1]} in float32, where "
        "the report leaves out the rounding of the plan itself."
    )


def _disagreements(rows: list[Row]) -> str:
    return "\n\n".join(_apart(rows, dtype, limit) for dtype, limit in APART.items())


def _apart(rows: list[Row], dtype: str, limit: float) -> str:
    """Cells where both converged and the plans are still apart, with their distances to the oracle."""
    both = [r for r in rows if r["dtype"] == dtype and r["status_sbot"] == r["status_pot"] == "converged"]
    apart = sorted((r for r in both if r["plan_sbot_pot"] > limit), key=lambda r: -r["plan_sbot_pot"])
    if not apart:
        return f"{dtype}: none of the {len(both)} cells where both converged differs by more than {limit:g}."
    where, plans = ["cost", "d", "n", "m", "weights", "kind"], ["plan_sbot_pot", "plan_sbot", "plan_pot"]
    head = [*where, "eps / mean cost", "sbot - POT", "sbot - oracle", "POT - oracle", "POT's solver"]
    body = [
        [
            *(r[key] for key in where),
            f"{r['ratio']:g}",
            *(r[key] for key in plans),
            r["solver_pot"].removeprefix("POT "),
        ]
        for r in apart
    ]
    text = f"{dtype}: {len(apart)} of the {len(both)} cells where both converged differ by more than {limit:g}."
    if any("unbalanced" in r["solver_pot"] for r in apart):
        text += (
            " POT's unbalanced solvers multiply by `exp(-C / eps)`: where that is below the smallest number of the dtype the "
            "entry of the plan is lost, and the marginals do not show it, since the potentials adapt."
        )
    if any(0.5 < r["plan_sbot"] / r["plan_pot"] < 2 for r in apart):
        text += " Where both are about as far from the oracle, it is the tolerance that leaves them that far."
    return f"{text}\n\n{table(head, body)}"


def _times(times: list[Row]) -> str:
    head = ["problem", "eps / mean cost", "contender", "seconds", "over sbot", "iterations", "status", "error reached"]
    body = []
    for row in times:
        same = [t for t in times if (t["kind"], t["ratio"]) == (row["kind"], row["ratio"])]
        base = next(t["seconds"] for t in same if t["contender"] == "sbot")
        done = row["status"] == "converged"
        ratio = f"{'' if done else '> '}{row['seconds'] / base:.1f}" if row["status"] != "failed" else "-"
        line = [row["kind"], f"{row['ratio']:g}", row["contender"], f"{row['seconds']:.3f}", ratio]
        body.append([*line, row["iterations"], row["status"], row["error"]])
    n = times[0]["n"]
    small = f"n = m = {n}, d = 2, quadratic cost, float64. {NOISY} A solve stops at {SECONDS_TIMED:g} s."
    return small + "\n\n" + table(head, body)


# ---- the picture -----------------------------------------------------------------------------------------------------


def pot_figure(rows: list[Row], times: list[Row]) -> Figure:
    """Distance to the oracle against eps, and time against eps, both libraries; above balanced, below relaxed."""
    with mpl.rc_context({"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12.5, 7.6), layout="constrained")
        axes = figure.subplots(2, 3)
        for line, (name, kinds) in enumerate((("balanced", KINDS[:1]), ("unbalanced and semi-relaxed", KINDS[1:]))):
            for column, dtype in enumerate(("float64", "float32")):
                some = [r for r in rows if r["kind"] in kinds and r["dtype"] == dtype]
                _error_panel(axes[line, column], some, f"{name}, {dtype}")
            _time_panel(axes[line, 2], [t for t in times if t["kind"] in kinds])
        handles = [Line2D([], [], color=COLOURS[name], marker="o", label=name) for name in ("sbot", "POT")]
        handles += [Line2D([], [], color="black", marker="o", mfc="none", ls="", label="not converged (or failed)")]
        figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
        return figure


def _error_panel(ax: Axes, rows: list[Row], title: str) -> None:
    rng = np.random.default_rng(0)
    counts = []
    for key, label, side in (("sbot", "sbot", -1), ("pot", "POT", 1)):
        colour = COLOURS[label]
        for done in (True, False):
            some = [r for r in rows if (r[f"status_{key}"] == "converged") == done and math.isfinite(r[f"plan_{key}"])]
            x = [r["ratio"] * 10 ** (side * 0.17 + rng.uniform(-0.11, 0.11)) for r in some]
            y = [max(r[f"plan_{key}"], LOWEST) for r in some]
            face = colour if done else "none"
            ax.scatter(x, y, s=13, c=face, edgecolors=colour, linewidths=0.7, alpha=0.4 if done else 0.9)
        good = [r for r in rows if r[f"status_{key}"] == "converged"]
        _medians(ax, good, key, side, colour)
        counts.append(f"{label} {len(good)}")
    ax.set(xscale="log", yscale="log", ylim=(LOWEST, 300), title=title, xlabel="eps / mean cost")
    ax.set_ylabel("max |plan - oracle| / max oracle")
    ax.set_yticks([1e-15, 1e-12, 1e-9, 1e-6, 1e-3, 1])
    ax.text(0.98, 0.97, f"converged: {', '.join(counts)} of {len(rows)}", ha="right", va="top", transform=ax.transAxes)
    ax.grid(alpha=0.25)


def _medians(ax: Axes, rows: list[Row], key: str, side: int, colour: str) -> None:
    groups = {ratio: [max(r[f"plan_{key}"], LOWEST) for r in rows if r["ratio"] == ratio] for ratio in RATIOS}
    x = [ratio * 10 ** (side * 0.17) for ratio, some in groups.items() if some]
    ax.plot(x, [statistics.median(some) for some in groups.values() if some], color=colour, lw=1.5)


def _time_panel(ax: Axes, times: list[Row]) -> None:
    shades = {"sbot": COLOURS["sbot"], "POT sinkhorn": COLOURS["plain"]}
    failures = dict.fromkeys(t["contender"] for t in times)
    for step, contender in enumerate(failures):
        colour = shades.get(contender, COLOURS["POT"])
        some = sorted((t for t in times if t["contender"] == contender), key=lambda t: t["ratio"])
        good = [t for t in some if t["status"] != "failed"]
        ax.plot([t["ratio"] for t in good], [t["seconds"] for t in good], "-", color=colour, lw=1.5, label=contender)
        for t in good:
            done = t["status"] == "converged"
            ax.plot(t["ratio"], t["seconds"], "o" if done else "^", color=colour, mfc=colour if done else "none", ms=6)
        for t in some:
            if t["status"] == "failed":  # it has no time: at the upper edge
                height = 0.98 - 0.05 * step
                ax.plot(t["ratio"], height, "x", color=colour, ms=8, mew=2, transform=ax.get_xaxis_transform())
    ax.plot([], [], "^", color="black", mfc="none", label=f"stopped after {SECONDS_TIMED:g} s")
    ax.plot([], [], "x", color="black", mew=2, label="failed (numerical errors)")
    ax.set(xscale="log", yscale="log", xlabel="eps / mean cost", ylabel="seconds (shared machine: read ratios)")
    ax.set_title(f"{times[0]['kind']}, n = m = {times[0]['n']}: time to error {TIMED_TOLERANCE:g}")
    low, high = ax.get_ylim()
    ax.set_ylim(low, 5 * high)  # room for the crosses and the legend
    ax.grid(alpha=0.25)
    ax.legend(loc="upper right", fontsize=8, framealpha=0.9)
