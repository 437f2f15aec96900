"""What the processes of a program wrote down, put together: as plain data, and as text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Calls told one by one in the report as data, and as text.
KEPT, SHOWN = 1000, 8
SIDES = ("original", "sbot")
#: Verdicts that count the deviation of a call: where one answer is at fault it says nothing of the other.
SOUND = ("agree", "differ")
TOLD = ("sbot at fault", "differ", "both at fault", "defect avoided")


class Tally:
    """The calls of one function."""

    def __init__(self) -> None:
        self.calls = 0
        self.verdicts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.deviations: dict[str, list[float]] = {}
        self.all_deviations: dict[str, list[float]] = {}
        self.seconds = dict.fromkeys(SIDES, 0.0)
        self.first = dict.fromkeys(SIDES, 0.0)
        self.bytes: dict[str, int | None] = dict.fromkeys(SIDES)

    def add(self, call: dict[str, Any]) -> None:
        self.calls += 1
        self.verdicts[call["verdict"]] += 1
        if call["verdict"] == "forwarded":
            self.reasons[call["why"]] += 1
            return
        if call["verdict"] == "defect avoided":
            self.kinds[call["kind"]] += 1
        for kind, gaps in call["deviations"].items():
            for found in [self.all_deviations, *([self.deviations] if call["verdict"] in SOUND else [])]:
                found[kind] = [max(pair) for pair in zip(found.get(kind, [0.0, 0.0]), gaps, strict=True)]
        if not any(self.seconds.values()):
            self.first = {side: call[side]["seconds"] for side in SIDES}
        for side in SIDES:
            self.seconds[side] += call[side]["seconds"]
            if call[side]["bytes"] is not None:
                self.bytes[side] = max(self.bytes[side] or 0, call[side]["bytes"])

    def worst(self, *kinds: str) -> list[float] | None:
        """The largest deviation of these kinds, absolute and relative, over calls both of whose answers are sound."""
        found = [gaps for kind, gaps in self.deviations.items() if kind in kinds]
        return [max(column) for column in zip(*found, strict=True)] if found else None

    def data(self) -> dict[str, Any]:
        def named(found: dict[str, list[float]]) -> dict[str, Any]:
            return {kind: {"absolute": gaps[0], "relative": gaps[1]} for kind, gaps in found.items()}

        return {
            "calls": self.calls,
            "verdicts": dict(self.verdicts),
            "defects_avoided": dict(self.kinds),
            "forwarded": dict(self.reasons),
            "deviations": named(self.deviations),
            "deviations_of_all_calls": named(self.all_deviations),
            "seconds": self.seconds,
            "seconds_of_the_first_call": self.first,
            "peak_bytes": self.bytes,
        }


class Report:
    """The events of all processes."""

    def __init__(self, folder: Path, command: list[str], returned: str, status: int, seconds: float) -> None:
        self.command, self.returned, self.status, self.seconds = command, returned, status, seconds
        self.processes: list[dict[str, Any]] = []
        self.swapped: dict[str, str] = {}
        self.functions: dict[str, Tally] = {}
        self.others: Counter[str] = Counter()
        self.missing: Counter[tuple[str, str]] = Counter()
        self.troubles: Counter[str] = Counter()
        self.told: list[dict[str, Any]] = []
        for path in sorted(folder.glob("*.jsonl")):
            for event in _events(path):
                getattr(self, f"_{event.pop('event')}")(event)

    def _process(self, event: dict[str, Any]) -> None:
        self.processes.append(event)

    def _swapped(self, event: dict[str, Any]) -> None:
        self.swapped[event["library"]] = event["version"]

    def _missing(self, event: dict[str, Any]) -> None:
        self.missing[event["name"], event["python"]] += 1

    def _trouble(self, event: dict[str, Any]) -> None:
        self.troubles[event["what"]] += 1

    def _other(self, event: dict[str, Any]) -> None:
        self.others[event["name"]] += 1

    def _call(self, event: dict[str, Any]) -> None:
        self.functions.setdefault(event["name"], Tally()).add(event)
        if event["verdict"] in TOLD and len(self.told) < KEPT:
            self.told.append(event)

    # ---- what it comes to ------------------------------------------------------------------------------------------

    @property
    def compared(self) -> int:
        """Calls that both sides made."""
        return sum(tally.calls - tally.verdicts["forwarded"] for tally in self.functions.values())

    def count(self, verdict: str) -> int:
        return sum(tally.verdicts[verdict] for tally in self.functions.values())

    def above(self, limit: float) -> list[str]:
        """What is worse than a relative deviation of ``limit`` where both answers are sound, or sbot's is not."""
        found = (
            [f"{_counted(self.count('sbot at fault'), 'call')} where sbot is at fault"]
            if self.count("sbot at fault")
            else []
        )
        for name, tally in self.functions.items():
            worst = max((gaps[1] for kind, gaps in tally.deviations.items() if kind != "potentials"), default=0.0)
            if worst > limit:
                found.append(f"{name} deviates by {worst:.1e}")
        return found

    def nothing(self) -> str:
        """Why nothing was compared; "" where something was."""
        if self.compared:
            return ""
        if not self.processes:
            return "no Python process was seen: the command is not Python, or runs it with -I, -E or -S, which hide the check"
        if self.troubles and not self.swapped:
            return next(iter(self.troubles))
        if self.swapped:
            return (
                "nothing was compared: the program imported "
                f"{' and '.join(self.swapped)}, and called no function that sbot covers"
            )
        if self.missing:
            name, python = next(iter(self.missing))
            package = "pot" if name == "ot" else "geomloss"
            return f"the program asked for {name!r}, which is not installed for {python}: pip install {package}"
        return "nothing was swapped: the program imported neither ot (POT) nor geomloss"

    def data(self) -> dict[str, Any]:
        """Plain data; numbers that are not finite are strings."""
        return _finite(
            {
                "command": self.command,
                "exit_code": self.status,
                "returned": self.returned,
                "seconds": self.seconds,
                "processes": self.processes,
                "swapped": self.swapped,
                "functions": {name: tally.data() for name, tally in sorted(self.functions.items())},
                "not_covered": dict(self.others.most_common()),
                "calls": self.told,
                "missing": [{"name": name, "python": python} for name, python in self.missing],
                "troubles": dict(self.troubles),
                "nothing": self.nothing(),
            }
        )

    def text(self) -> str:
        """The report as people read it."""
        return "\n".join(line.rstrip() for line in self._lines())

    def _lines(self) -> Iterator[str]:
        libraries = ", ".join(f"{NAMES.get(name, name)} {version}" for name, version in sorted(self.swapped.items()))
        yield (
            f"sbot migrate: {_counted(self.compared, 'call')} made on both sides, in "
            f"{_counted(len(self.processes), 'process', 'es')}{f' ({libraries})' if libraries else ''}; "
            f"the program had the results of {'the originals' if self.returned == 'original' else 'sbot'}, "
            f"exit code {self.status}"
        )
        if self.nothing():
            yield self.nothing()
        rows = [
            (name, tally) for name, tally in sorted(self.functions.items()) if tally.calls > tally.verdicts["forwarded"]
        ]
        if rows:
            yield ""
            yield from _table(rows)
            yield ""
            yield "Deviations: the largest of calls both of whose answers are sound; absolute (relative to the largest entry)."
            first = [sum(tally.first[side] for _, tally in rows) for side in SIDES]
            whole = [sum(tally.seconds[side] for _, tally in rows) for side in SIDES]
            yield (
                f"Seconds: {whole[0]:.3g} and {whole[1]:.3g} in all, of which {first[0]:.3g} and {first[1]:.3g} in the "
                "first call of each function, which also loads what it needs."
            )
        for verdict in TOLD:
            yield from self._calls(verdict)
        yield from self._elsewhere()
        for what, count in self.troubles.items():
            yield f"trouble ({count}): {what}"

    def _calls(self, verdict: str) -> Iterator[str]:
        total = self.count(verdict)
        if not total:
            return
        yield ""
        kinds = Counter(kind for tally in self.functions.values() for kind in tally.kinds.elements())
        told = (
            ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) if verdict == "defect avoided" else ""
        )
        yield f"{HEADINGS[verdict]}: {total}{f' ({told})' if told else ''}"
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for call in self.told:
            if call["verdict"] == verdict:
                groups.setdefault((call["name"], call["where"], call["kind"]), []).append(call)
        for (name, where, _), calls in list(groups.items())[:SHOWN]:
            worst = max(calls, key=lambda call: _worst(call))
            options = ", ".join(f"{key}={value}" for key, value in worst["options"].items())
            yield f"  {name}, {where}, {_counted(len(calls), 'call')}; {options or 'defaults'}"
            yield f"    {_account(worst)}"
        if len(groups) > SHOWN:
            yield f"  and at {len(groups) - SHOWN} more places; --json has them"

    def _elsewhere(self) -> Iterator[str]:
        forwarded = [(name, tally) for name, tally in sorted(self.functions.items()) if tally.reasons]
        if forwarded or self.others:
            yield ""
            yield "not solved by sbot, and left to the original:"
        for name, tally in forwarded:
            for reason, count in tally.reasons.items():
                yield f"  {name}: {_counted(count, 'call')}; {reason}"
        for name, count in self.others.most_common():
            yield f"  {name}: {_counted(count, 'call')}; not covered"


NAMES = {"ot": "POT", "geomloss": "GeomLoss", "geomloss.ot": "geomloss.ot"}
HEADINGS = {
    "sbot at fault": "SBOT AT FAULT (the original's answer is sound and sbot's is not)",
    "differ": "different, and neither shown to be wrong",
    "both at fault": "neither answer is sound",
    "defect avoided": "defects avoided (the original's answer is not sound and sbot's is)",
}


def _events(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # cut off in the middle, by the end of the process
            continue


def _counted(number: int, what: str, many: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else many}"


def _worst(call: dict[str, Any]) -> float:
    return max((gaps[1] for gaps in call["deviations"].values()), default=0.0)


def _account(call: dict[str, Any]) -> str:
    """What is wrong on either side, and how far they are apart."""
    said = []
    for side, fault, error in zip(SIDES, call["faults"], call["errors"], strict=True):
        if fault:
            said.append(f"{side}: {fault}")
        elif error is not None:
            said.append(f"{side}: marginal error {error:.1e}")
    said += [f"{kind} {_gaps(gaps)}" for kind, gaps in call["deviations"].items() if kind != "potentials"]
    return "; ".join(said)


def _gaps(gaps: list[float] | None) -> str:
    return "-" if gaps is None else f"{gaps[0]:.1e} ({gaps[1]:.1e})"


def _table(rows: list[tuple[str, Tally]]) -> Iterator[str]:
    head = [
        "function",
        "calls",
        "agree",
        "differ",
        "defects",
        "value",
        "plan or map",
        "seconds",
        "sbot",
        "peak MB",
        "sbot",
    ]
    lines = [head]
    for name, tally in rows:
        verdicts = tally.verdicts
        counts = [
            tally.calls - verdicts["forwarded"],
            verdicts["agree"],
            verdicts["differ"],
            verdicts["defect avoided"],
        ]
        deviations = [_gaps(tally.worst("value", "value_linear")), _gaps(tally.worst("plan", "array"))]
        seconds = [f"{tally.seconds[side]:.3g}" for side in SIDES]
        peaks = ["-" if tally.bytes[side] is None else f"{(tally.bytes[side] or 0) / 1e6:.1f}" for side in SIDES]
        lines.append([name, *map(str, counts), *deviations, seconds[0], seconds[1], peaks[0], peaks[1]])
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    for line in lines:
        yield "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
