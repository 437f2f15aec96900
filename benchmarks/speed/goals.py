"""The goals, held against the rows: who won a cell, by how much, and which goals are missed or not shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .records import Records, Row

#: A ratio of two medians on one machine is not known better than this.
NOISE = 1.05
CLASSICAL = ("POT", "OTT", "GeomLoss")


@dataclass(frozen=True)
class Best:
    """Seconds of the best rival, exact or a lower bound where one was stopped before the others ended; None if all failed."""

    seconds: float | None
    name: str
    exact: bool

    def over(self, ours: float) -> str:
        """Its seconds over ours, as text."""
        if self.seconds is None:
            return "none reached it"
        return f"{'' if self.exact else '> '}{self.seconds / ours:.3g} ({self.name})"


def best(rows: Iterable[Row]) -> Best:
    """The quickest that reached the tolerance; a bound where somebody was stopped before that time."""
    found = [(row["seconds"], row["contender"], True) for row in rows if row["status"] == "reached"]
    # one that was stopped after a longer time than another took does not matter
    found += [
        (row["limit"], row["contender"], False) for row in rows if row.get("limit") and row["status"] != "reached"
    ]
    if not found:
        return Best(None, "-", True)
    seconds, name, exact = min(found)
    return Best(seconds, name, exact)


def cells(records: Records, **wanted: object) -> list[tuple[Row, list[Row]]]:
    """Each cell of target 1 as sbot's row and those of its rivals."""
    out = []
    for ours in records.of("accuracy", contender="sbot", **wanted):
        names = ("cloud", "n", "d", "ratio", "dtype", "seed")
        rivals = [row for row in records.of("accuracy", **{name: ours[name] for name in names}) if row is not ours]
        out.append((ours, rivals))
    return out


def judge_cell(ours: Row, rivals: list[Row]) -> list[str]:
    """What is missed or not shown in one cell of float64."""
    if ours["status"] != "reached":
        return [f"sbot: {ours['status']}" + ("" if ours.get("error") is None else f", error {ours['error']:.1e}")]
    seconds, ratio, missed = ours["seconds"], ours["ratio"], []
    tuned = [row for row in rivals if row["contender"] != "mdot-tnt as it comes"]
    wanted = [("the best rival", tuned, 1 / NOISE)] if ours["n"] >= 500 else []
    if ratio <= 0.0101:
        classical = [row for row in rivals if row["contender"].startswith(CLASSICAL)]
        wanted.append(("the best of POT, OTT and GeomLoss", classical, 10.0))
    if ratio <= 0.00101:
        reached = [row for row in tuned if row["contender"] == "mdot-tnt" and row["status"] != "not reached"]
        loose = [
            row | {"status": "reached"} for row in rivals if row["contender"].startswith("mdot") and row.get("seconds")
        ]
        wanted.append(("mdot-tnt", reached or loose, 2.0))
    for who, rows, times in wanted:
        rival = best(rows)
        if rival.seconds is not None and rival.seconds < times * seconds:
            verb = "" if rival.exact else "not shown, since it was stopped: "
            missed.append(f"{verb}{rival.over(seconds)} x the time of {who}, {max(times, 1):g} wanted")
    return missed


def missed(records: Records) -> list[list[str]]:
    """Every cell of target 1 where a goal is missed: cloud, n, d, eps, dtype, what."""
    out = []
    for ours, rivals in cells(records, dtype="float64"):
        out += [[*place(ours), "float64", what] for what in judge_cell(ours, rivals)]
    for ours, _ in cells(records, dtype="float32"):
        double = records.find(ours, dtype="float64", tol=1e-6)
        if ours["status"] == "failed" or ours.get("error") is None:
            out.append([*place(ours), "float32", f"not numbers: {ours['status']}"])
        elif double is not None and double.get("seconds") and ours["seconds"] > NOISE * double["seconds"]:
            out.append([*place(ours), "float32", f"{ours['seconds'] / double['seconds']:.2f} x the time of float64"])
    return out


def place(row: Row) -> list[str]:
    return [row["cloud"], str(row["n"]), str(row["d"]), f"{row['ratio']:g}"]


def apart(records: Records) -> list[list[str]]:
    """Rivals whose plan reached the tolerance and has another cost than sbot's: a wrong unit, or a wrong plan."""
    out = []
    for ours, rivals in cells(records):
        for row in rivals:
            both = row["status"] == "reached" and ours["status"] == "reached"
            if both and abs(row["linear_cost"] / ours["linear_cost"] - 1) > 50 * ours["tol"]:
                gap = row["linear_cost"] / ours["linear_cost"] - 1
                out.append([*place(ours), ours["dtype"], row["contender"], f"{gap:+.1e}"])
    return out


# ---- targets 2 to 4 --------------------------------------------------------------------------------------------------


def others(records: Records) -> list[list[str]]:
    """What is missed or not shown by large problems, batches and gradients: part, cell, what."""
    return [*_large(records), *_batch(records), *_gradients(records)]


def _ahead(records: Records, row: Row, wanted: dict[str, float]) -> list[str]:
    """Rivals of a row that are not as many times slower as wanted; the longest beginning of the name counts."""
    out = []
    for rival in records.of(row["part"], kind=row["kind"]):
        same = all(rival.get(name) == row.get(name) for name in ("n", "d", "batch", "ratio", "dtype", "tol", "seed"))
        times = next((value for name, value in wanted.items() if rival["contender"].startswith(name)), None)
        if not same or times is None or rival is row:
            continue
        found = best([rival])
        if found.seconds is not None and found.seconds < times * row["seconds"]:
            verb = "" if found.exact else "not shown, since it was stopped: "
            out.append(f"{verb}{found.over(row['seconds'])}, {times:g} wanted")
    return out


def _large(records: Records) -> list[list[str]]:
    out = []
    for row in records.of("large", contender="sbot"):
        cell = f"n = {row['n']}"
        if row["status"] != "reached":
            out.append(["large", cell, f"sbot: {row['status']}"])
        elif row["n"] == 100_000:
            if row["peak_above_inputs"] >= 1e9:
                out.append(["large", cell, f"peak {row['peak_above_inputs'] / 1e9:.2f} GB above the inputs, 1 wanted"])
            rivals = {"GeomLoss online": 5.0, "GeomLoss multiscale": 1.0}
            out += [["large", cell, what] for what in _ahead(records, row, rivals)]
    return out


def _batch(records: Records) -> list[list[str]]:
    out = []
    for row in records.of("batch", kind="batch", contender="sbot"):
        cell = f"{row['batch']} x {row['n']}"
        if row["status"] != "reached":
            out.append(["batch", cell, f"sbot: {row['status']}"])
        else:
            rivals = {"POT loop": 10.0, "POT solve_batch": 1.0, "OTT": 1.0}
            out += [["batch", cell, what] for what in _ahead(records, row, rivals)]
    return out


def _gradients(records: Records) -> list[list[str]]:
    out = []
    for row in records.of("gradients"):
        name = row["contender"]
        if not name.startswith("sbot"):
            continue
        cell = f"{name}, n = {row['n']}, eps {row['ratio']:g}"
        errors = [
            row[key] for key in ("error_x", "error_y", "error_cost", "error_a", "error_b") if row.get(key) is not None
        ]
        if row["status"] != "reached":
            out.append(["gradients", cell, f"{row['status']}: {row.get('note', '')}"])
        elif row["kind"] == "check":
            out += [["gradients", cell, f"error {max(errors):.1e}, 1e-6 wanted"]] if max(errors) > 1e-6 else []
        else:
            pairs = (("time", "seconds", 1.3), ("memory", "peak", 1.5))
            for what, key, most in pairs:
                answer = row.get("answer", 0) if key == "peak" else 0
                ratio = (row[key] - answer) / max(row[f"{key}_value"], 1e-9)
                if ratio > most:
                    out.append(["gradients", cell, f"{ratio:.2f} x the {what} of the value, {most:g} wanted"])
    return out
