"""What a row of the original says beside that of sbot: how many times, where sbot is slower and why, where the original fails."""

from __future__ import annotations

from ..speed.goals import NOISE
from ..speed.records import Records, Row
from ..speed.runner import STOPPED
from .calls import CALLS
from .grids import PART
from .measure import LOOSE


def pairs(records: Records) -> list[tuple[Row, Row]]:
    """Rows of the original, each with that of sbot, in the order of the calls."""
    rows = [row for row in records.of(PART) if row["contender"] != "sbot"]
    rows.sort(key=lambda row: (list(CALLS).index(row["kind"]), row["dtype"] != "float64", row["n"], -row["ratio"]))
    return [(row, ours) for row in rows if (ours := records.find(row, contender="sbot")) is not None]


def times(row: Row, ours: Row) -> tuple[float, bool] | None:
    """The original's time over that of sbot, and whether it is known or a lower bound; None where one has no time."""
    mine = row.get("ours") or ours.get("seconds")
    if not mine:
        return None
    if row["status"] == "reached":
        return row["seconds"] / mine, True
    return (row["limit"] / mine, False) if row.get("limit") else None


def said(row: Row, ours: Row) -> str:
    """The ratio as text: with ">" a bound, with "~" of a result that is loose, "fails" where there is none."""
    found = times(row, ours)
    if row["status"] == "failed":
        return "fails"
    if found is None:
        return row.get("note", "-")
    loose = "~" if row.get("error") is not None and row["error"] > LOOSE else ""
    return f"{'' if found[1] else '> '}{loose}{found[0]:.3g}"


def slower(records: Records) -> list[list[str]]:
    """Where sbot fails, or takes longer than the original beyond noise, with the reason: call, dtype, n, reg, times, why."""
    out = []
    for row, ours in pairs(records):
        if ours["status"] != "reached":
            out.append([*place(row), "-", f"sbot fails: {ours.get('note', '')}"])
            continue
        found = times(row, ours)
        if found is not None and found[1] and found[0] < 1 / NOISE:
            out.append([*place(row), f"{1 / found[0]:.3g}", reason(row)])
    return out


def reason(row: Row) -> str:
    """Why the original was quicker: it stopped short, or its iterations are cheaper."""
    theirs, ours = row["error"], row["ours_error"]
    if theirs > 10 * max(ours, 1e-15):
        return f"the original stops at an error of {theirs:.0e}, sbot at {ours:.0e}"
    if CALLS[row["kind"]].exact:
        return "both exact: network simplex against augmenting paths"
    return "both converge: products with a fixed kernel cost less than passes in the log domain"


def failed(records: Records) -> list[list[str]]:
    """Where the original has no result: call, dtype, n, reg, what happened, and the time and error of sbot."""
    out = []
    for row, ours in pairs(records):
        if row["status"] in ("failed", STOPPED, "not run") and ours["status"] == "reached":
            what = row.get("note") or row["status"]
            if row["status"] == STOPPED:
                what = f"no result after {row['limit']:.3g} s"
            if "not installed" not in what:
                out.append([*place(row), what, f"{ours['seconds']:.3g}", f"{ours['error']:.0e}"])
    return out


def place(row: Row) -> list[str]:
    return [row["kind"], row["dtype"], str(row["n"]), f"{row['ratio']:g}"]
