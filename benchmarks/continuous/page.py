"""From results to files: one page, raw rows, pictures; each with the machine, the versions and the settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import report
from .common import Options, Result, Row
from .goals import GOALS


def save(result: Result, out: Path, options: Options, env: Row) -> list[str]:
    """Write ``continuous_NAME.md``, ``.csv``, ``.json`` and ``.png``; their names."""
    stem = f"continuous_{result.name}"
    run = {"seed": options.seed, "quick": options.quick, **({"only": " ".join(options.cells)} if options.cells else {})}
    pictures = {f"{stem}{'_' * bool(end)}{end}.png": figure for end, figure in result.figures.items()}
    text = [
        f"# {result.title}",
        report.preamble(env, run),
        *(["*A quick run: sizes in the text are those of a full one.*"] if options.quick else []),
        result.body,
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        *(["## Goals", GOALS[result.name]] if result.name in GOALS else []),
        "## Settings",
        report.table(["contender", "settings"], [[name, value] for name, value in result.settings.items()]),
    ]
    (out / f"{stem}.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    files = [f"{stem}.md"]
    if result.rows:
        keys = list(dict.fromkeys(key for row in result.rows for key in row))
        report.write_csv(out / f"{stem}.csv", [{key: row.get(key, "") for key in keys} for row in result.rows])
        files.append(f"{stem}.csv")
    content = {
        "environment": env,
        "run": run,
        "settings": result.settings,
        "rows": [_plain(row) for row in result.rows],
    }
    report.write_json(out / f"{stem}.json", content)
    for name, figure in pictures.items():
        figure.savefig(out / name, dpi=110)
    return [*files, f"{stem}.json", *pictures]


def _plain(row: Row) -> Row:
    """JSON knows no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def number(value: Any, digits: int = 3) -> str:
    """A number to so many significant digits; a dash where there is none."""
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def numbers(values: Sequence[Any], digits: int = 3) -> list[str]:
    return [number(value, digits) for value in values]


def slashed(values: Sequence[Any], digits: int = 2) -> str:
    """Several numbers in one field, as the published tables print them."""
    return " / ".join(numbers(values, digits))


def notes(rows: Sequence[Row], key: str = "contender") -> str:
    """What contenders refused, once each."""
    said = dict.fromkeys(f"- {row[key]}: {row['note']}" for row in rows if row.get("note"))
    return "\n".join(said)
