"""Results as JSON lines, in the order in which they came; the last line of a job is its result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

Row = dict[str, Any]
#: What makes a job; anything else in a row is its outcome.
KEYS = ("part", "kind", "contender", "cloud", "n", "d", "batch", "ratio", "dtype", "tol", "seed")


def key(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in KEYS)


class Records:
    """A file of rows; a line ``{"run": id, "environment": ...}`` says where the rows of that run were measured."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[tuple[Any, ...], Row] = {}
        self.runs: dict[str, Row] = {}
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    self._take(json.loads(line))
                except json.JSONDecodeError:
                    continue  # cut off in the middle

    def _take(self, row: Row) -> None:
        if "environment" in row:
            self.runs[row["run"]] = row["environment"]
        else:
            self.rows[key(row)] = row

    def add(self, row: Row) -> None:
        """Append one row, or an environment."""
        row = _plain(row)
        self._take(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def find(self, job: Row, **changed: Any) -> Row | None:
        """The row of a job, or of the job with some keys changed."""
        return self.rows.get(key({**job, **changed}))

    def forget(self, part: str) -> None:
        """Drop the rows of a part, in the file too."""
        self.rows = {k: row for k, row in self.rows.items() if row["part"] != part}
        used = {row["run"] for row in self.rows.values()}
        self.runs = {run: env for run, env in self.runs.items() if run in used}
        lines = [{"run": run, "environment": env} for run, env in self.runs.items()]
        text = "".join(json.dumps(row) + "\n" for row in [*lines, *self.rows.values()])
        self.path.write_text(text, encoding="utf-8")

    def of(self, part: str, **wanted: Any) -> list[Row]:
        """The rows of a part with these values."""
        rows = [row for row in self.rows.values() if row["part"] == part]
        return [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]


def _plain(value: Any) -> Any:
    """JSON knows no NaN, and numbers here need no more than five digits."""
    if isinstance(value, dict):
        return {k: v if k in KEYS else _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
