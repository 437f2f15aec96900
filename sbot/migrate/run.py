"""Run a program with both sides swapped in, in every Python process of it, and report.

The program is a process of its own, and so are its children: they find a ``sitecustomize`` first on ``PYTHONPATH``, which loads
`sbot.migrate.hook` and then whatever ``sitecustomize`` there was.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidProblem
from .hook import VARIABLE
from .report import Report

RETURNS = ("original", "sbot")
#: Runs before anything of the program; an error in it must not be the program's.
SITECUSTOMIZE = """\
import importlib.machinery, importlib.util, json, os, sys
_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [_path for _path in sys.path if os.path.abspath(_path or os.curdir) != _here]
try:
    _settings = json.loads(os.environ[{variable!r}])
    _spec = importlib.util.spec_from_file_location("_sbot_migrate_hook", os.path.join(_settings["package"], "migrate", "hook.py"))
    _hook = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_hook)
    _hook.install()
except Exception as _fault:
    sys.stderr.write("sbot migrate: this process is not seen: %s: %s\\n" % (type(_fault).__name__, _fault))
_next = importlib.machinery.PathFinder.find_spec("sitecustomize", sys.path)
if _next is not None and _next.loader is not None:
    _module = importlib.util.module_from_spec(_next)
    sys.modules["sitecustomize"] = _module
    _next.loader.exec_module(_module)
"""


def run(command: Sequence[str], returned: str = "original") -> Report:
    """Run ``command`` and report on its calls of POT and GeomLoss.

    ``returned`` says whose results the program has: "original" (it then behaves as without the check) or "sbot".

    Raises
    ------
    InvalidProblem : no command, one that is not found, or another ``returned``.
    """
    if returned not in RETURNS:
        raise InvalidProblem(f"returned is {returned!r}; give one of {', '.join(map(repr, RETURNS))}")
    if not command:
        raise InvalidProblem("there is no command; write it after --: python -m sbot migrate -- python my_pipeline.py")
    _check(command[0])
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sbot-migrate-") as name:
        folder = Path(name)
        (folder / "hook").mkdir()
        (folder / "records").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(SITECUSTOMIZE.format(variable=VARIABLE), encoding="utf-8")
        settings = {
            "folder": str(folder / "records"),
            "package": str(Path(__file__).resolve().parents[1]),
            "returned": returned,
        }
        path = [str(folder / "hook"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), VARIABLE: json.dumps(settings)}
        with _attended(command, environment) as process:
            status = process.wait()
        status = 128 - status if status < 0 else status  # ended by a signal, as shells say it
        return Report(folder / "records", list(command), returned, status, time.perf_counter() - start)


def _check(program: str) -> None:
    if shutil.which(program):
        return
    if program.endswith(".py") and Path(program).is_file():
        raise InvalidProblem(f"{program} is not executable; write: python {program}")
    raise InvalidProblem(f"the command {program!r} is not found; give one that your shell would find")


@contextlib.contextmanager
def _attended(command: Sequence[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[Any]]:
    """The program, running.  Ctrl-C is its own to answer; what ends this process ends it, and there is a report all the same."""
    process = subprocess.Popen(list(command), env=environment)  # noqa: S603 (the user's own command)

    def passed_on(number: int, _: object) -> None:
        process.send_signal(number)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread, where there are no handlers
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
        before[signal.SIGTERM] = signal.signal(signal.SIGTERM, passed_on)
    try:
        yield process
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if process.poll() is None:
            process.kill()
            process.wait()
