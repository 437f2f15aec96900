"""The page: tables cell by cell, ratios to the best rival, and what is missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import report
from . import goals
from .records import Records, Row

MIB = 2**20
HOW = """\
Every plan is judged by its own sums in float64: *error* is the relative L1 error of both marginals, summed. A library is
asked for what brings it just under the tolerance: sbot, POT and OTT-JAX through their own tolerance, corrected by what was
found; GeomLoss, which has none, by `scaling` 0.5, 0.7, 0.9, 0.95, 0.99 in turn; mdot-tnt by the exponent `p` of its stopping
rule ("as it comes": the default). sbot is timed through `solve_bridge` on points, everything included; whoever takes a cost
matrix gets it for nothing. Times are medians of at least five solves after a first one; a solve longer than the settings say
is timed once. OTT-JAX is compiled beforehand. POT's `sinkhorn_log` runs on tensors of torch, where it is several times faster
than on arrays. Processes are tied to as many cores as there are threads.

A rival is stopped when it has taken many times as long as sbot ("> t": it took more than t seconds); on a harder problem of the
same cloud it is then not run where that time would be a defeat there too ("> t*"). "fails": not numbers, or an error message.
A time in parentheses was not enough: the error that it ended with is beside it."""


def page(records: Records, pictures: Sequence[str], quick: bool) -> str:
    """All parts that have rows."""
    parts = ["# Time and memory to the same accuracy"]
    parts += [f"Run {name}: {report.preamble(env, env['settings'])}" for name, env in records.runs.items() if env]
    parts += ["*A quick run: small sizes, to see that it works; no number here means anything.*"] if quick else []
    parts.append(HOW)
    rest = goals.others(records)
    if rest:
        parts += ["Goals missed or not shown, but for those of single problems (below):"]
        parts.append(report.table(["part", "cell", "missed"], rest))
    for part, section in SECTIONS.items():
        if records.of(part):
            parts.append(section(records))
            parts += [f"![{part}]({name})" for name in pictures if part in name]
    return "\n\n".join(parts) + "\n"


# ---- target 1 --------------------------------------------------------------------------------------------------------


def accuracy(records: Records) -> str:
    """One table for each dtype, the missed goals first."""
    out = ["## One problem, to a marginal error of 1e-6 (float64) and 1e-4 (float32)", _missed(records)]
    for dtype in ("float64", "float32"):
        cells = goals.cells(records, dtype=dtype)
        if cells:
            out += [f"### {dtype}, seconds", _cells(records, cells, dtype)]
    different = goals.apart(records)
    if different:
        head = ["cloud", "n", "d", "eps / mean cost", "dtype", "contender", "its <P, C> over sbot's, less 1"]
        out += ["Plans that disagree with sbot's:", report.table(head, different)]
    return "\n\n".join(out)


def _missed(records: Records) -> str:
    rows = goals.missed(records)
    wanted = (
        "Goals: never slower than the best rival (n >= 500); at eps / mean cost <= 1e-2 ten times faster than the best of POT, "
        "OTT-JAX and GeomLoss; at <= 1e-3 twice as fast as mdot-tnt; in float32 never NaN and never slower than float64."
    )
    if not rows:
        return f"{wanted} No cell misses one."
    head = ["cloud", "n", "d", "eps / mean cost", "dtype", "missed"]
    why = "why, says docs/sinkhorn.md under *Measured*"
    return f"{wanted} Missed or not shown ({why}):\n\n{report.table(head, rows)}"


def _cells(records: Records, cells: list[tuple[Row, list[Row]]], dtype: str) -> str:
    names = list(dict.fromkeys(row["contender"] for _, rivals in cells for row in rivals))
    head = ["cloud", "n", "d", "eps / mean cost", "sbot", *names]
    head += ["best rival over sbot"] if names else ["float64 to 1e-6 over this"]
    body = []
    for ours, rivals in cells:
        by = {row["contender"]: row for row in rivals}
        tuned = [row for row in rivals if row["contender"] != "mdot-tnt as it comes"]
        if names:
            last = goals.best(tuned).over(ours["seconds"]) if ours.get("seconds") else "-"
        else:
            double = records.find(ours, dtype="float64", tol=1e-6)
            last = _over(double, ours)
        body.append([*goals.place(ours), time(ours), *(time(by.get(name)) for name in names), last])
    return report.table(head, body)


def _over(above: Row | None, below: Row) -> str:
    if above is None or not above.get("seconds") or not below.get("seconds"):
        return "-"
    return f"{above['seconds'] / below['seconds']:.3g}"


def time(row: Row | None) -> str:
    """Seconds, and what is to be said about them."""
    if row is None:
        return "-"
    status = row["status"]
    if status == "reached":
        return _number(row["seconds"])
    if status == "beyond the limit":
        return f"> {_number(row['limit'])}"
    if status == "not run":
        return f"> {_number(row['limit'])}*" if row.get("limit") else row.get("note", "not run")
    if row.get("error") is not None:
        return f"({_number(row['seconds'])}, {row['error']:.0e})"
    return "fails"


def _number(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 1000 else f"{seconds:.0f}"


# ---- targets 2 to 4, memory ------------------------------------------------------------------------------------------


def large(records: Records) -> str:
    """Seconds and peaks."""
    rows = sorted(records.of("large"), key=lambda row: row["n"])
    body = []
    for row in rows:
        ours = records.find(row, contender="sbot")
        ratio = goals.best([row]).over(ours["seconds"]).split(" (")[0] if ours and ours.get("seconds") else "-"
        error = f"{row['error']:.1e}" if row.get("error") is not None else "-"
        body.append([row["n"], row["contender"], time(row), ratio, error, mib(row.get("peak_above_inputs"))])
    head = ["n = m", "contender", "seconds", "over sbot", "error", "peak above the inputs, MiB"]
    text = (
        "## Large problems, streamed\n\nd = 3, eps = 0.05 mean cost, float32, to a marginal error of 1e-3. GeomLoss is stopped "
        "at 5.5 times sbot's time (`online`) or twice (`multiscale`). Goals at 100,000: under 1 GB, "
        "five times faster than GeomLoss `online` and faster than its `multiscale`. The grey line of the picture grows as n^2."
    )
    return f"{text}\n\n{report.table(head, body)}"


def batch(records: Records) -> str:
    """A batch, and single small problems."""
    many = records.of("batch", kind="batch")
    out = ["## Many small problems"]
    if many:
        first = many[0]
        out.append(
            f"{first['batch']} problems of {first['n']} x {first['n']}, eps = 0.05 mean cost, float64, to 1e-6 (the worst of "
            "them). Goals: ten times faster than a loop over POT, faster than POT's `solve_batch` and OTT-JAX under vmap."
        )
        out.append(_against(records, many))
    single = records.of("batch", kind="single")
    if single:
        out += ["One small problem at a time, what a call costs:", _against(records, single, "n")]
    return "\n\n".join(out)


def _against(records: Records, rows: Sequence[Row], *more: str) -> str:
    body = []
    for row in rows:
        ours = records.find(row, contender="sbot")
        error = f"{row['error']:.1e}" if row.get("error") is not None else "-"
        ratio = _over(row, ours) if ours is not None else "-"
        cores = f"{row['cores']:.1f}" if row.get("cores") else "-"
        body.append([*(row[name] for name in more), row["contender"], time(row), ratio, error, cores])
    return report.table([*more, "contender", "seconds", "over sbot", "error", "cores kept busy"], body)


def gradients(records: Records) -> str:
    """Ratios of gradient to value, and errors."""
    body = []
    for row in records.of("gradients", kind="gradient"):
        line = [row["contender"], row["n"], f"{row['ratio']:g}", f"{row['tol']:g}"]
        if row.get("seconds") is None:
            body.append([*line, time(row), *["-"] * 6])
            continue
        answer = row.get("answer", 0)
        beside = (row["peak"] - answer) / max(row["peak_value"], 1)
        ratios = [f"{row['seconds'] / row['seconds_value']:.2f}", f"{beside:.2f}"]
        sizes = [mib(row["peak_value"]), mib(row["peak"]), mib(answer)]
        body.append([*line, _number(row["seconds_value"]), _number(row["seconds"]), ratios[0], *sizes, ratios[1]])
    head = ["contender", "n", "eps / mean cost", "tolerance", "value, s", "value and gradients, s", "ratio"]
    head += ["peak of the value, MiB", "peak with gradients, MiB", "of which the gradients, MiB", "ratio without these"]
    text = (
        "## Gradients\n\nfloat64, d = 2: the value alone, without a graph, against the value and its gradients in all "
        "inputs. Goals: 1.3 times the time, 1.5 times the memory. Peaks are above the inputs, of the first solve in a process "
        "after one of eight points; the second tolerance takes many more iterations, and memory should not know."
    )
    checks = []
    for row in records.of("gradients", kind="check"):
        errors = [row.get(f"error_{name}") for name in ("x", "y", "cost", "a", "b")]
        checks.append([row["contender"], *("-" if e is None else f"{e:.1e}" for e in errors), row.get("note", "")])
    names = ["contender", "x", "y", "cost", "a", "b", "note"]
    check = (
        f"Relative error against central differences (goal 1e-6):\n\n{report.table(names, checks)}" if checks else ""
    )
    return "\n\n".join([text, report.table(head, body), check])


def memory(records: Records) -> str:
    """Peaks of a solve and of queries."""
    body = []
    for row in records.of("memory"):
        for name in ("solve", "apply", "sparse_plan", "plan", "gradient"):
            if f"peak_{name}" in row:
                what = {"gradient": "value and gradients, from the solution"}.get(name, name)
                size = f"n = {row['n']}, d = {row['d']}, {row['dtype']}"
                body.append([size, what, mib(row[f"peak_{name}"]), _number(row[f"seconds_{name}"])])
        if "peak_solve" not in row:
            body.append([f"n = {row['n']}", row["status"], row.get("note", ""), "-"])
    text = (
        "## Memory\n\nPeak of resident memory above what was resident before: the inputs for the solve (with what "
        "libraries allocate on first use), the bridge for what is asked of it."
    )
    return f"{text}\n\n{report.table(['problem', 'what', 'peak, MiB', 'seconds'], body)}"


def mib(size: Any) -> str:
    return "-" if size is None else f"{size / MIB:.0f}"


SECTIONS = {"accuracy": accuracy, "large": large, "batch": batch, "gradients": gradients, "memory": memory}
