"""Child processes with a clock: a job that passes its limit is killed, and the next one gets a new process."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from .measure import SLACK

ROOT = Path(__file__).resolve().parents[2]
#: Seconds for imports, compilation, making the problem and judging the plan: whatever is not timed.
SETUP = 300.0


class Worker:
    """One child; it is started when a job comes and lives until it is killed."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.child: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()

    def run(self, job: dict[str, Any], limit: float) -> dict[str, Any]:
        """The result of a job, or "beyond the limit" where one solve took more than ``limit`` seconds."""
        child = self._started()
        assert child.stdin is not None
        child.stdin.write(json.dumps(job) + "\n")
        child.stdin.flush()
        last: dict[str, Any] = {}
        ends, clock = time.monotonic() + SETUP, False
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, ends - time.monotonic()))
            except queue.Empty:
                self.stop()
                if not clock:
                    return {"status": "failed", "note": f"not ready after {SETUP:.0f} s", **last}
                return _cut(last, job["tol"], limit)
            if line is None:
                self.stop()
                return {"status": "failed", "note": "the process died (memory?)", **last}
            event = json.loads(line)
            kind = event.pop("event")
            if kind == "result":
                return dict(event)
            if kind == "tried":
                last = event
            clock = kind == "start"
            ends = time.monotonic() + (limit if clock else SETUP)

    def _started(self) -> subprocess.Popen[str]:
        if self.child is None or self.child.poll() is not None:
            count = str(self.threads)
            names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
            env = {**os.environ, **dict.fromkeys(names, count), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
            self.lines = queue.Queue()
            command = [sys.executable, "-m", "benchmarks.speed.worker", count]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.child = subprocess.Popen(command, cwd=ROOT, env=env, text=True, **pipes)
            threading.Thread(target=_read, args=(self.child, self.lines), daemon=True).start()
        return self.child

    def stop(self) -> None:
        """Kill the child."""
        if self.child is not None:
            self.child.kill()
            self.child.wait()
            for pipe in (self.child.stdin, self.child.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            self.child = None


def _read(child: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert child.stdout is not None
    with contextlib.suppress(ValueError):  # closed
        for line in child.stdout:
            lines.put(line)
    lines.put(None)


def _cut(last: dict[str, Any], tol: float, limit: float) -> dict[str, Any]:
    """What is left of a job that was killed: an earlier setting that was exact enough, timed once, or nothing."""
    good = [step for step in last.get("tried", ()) if step["error"] <= SLACK * tol]
    if not good:
        return {"status": "beyond the limit", "limit": limit, **last}
    return {"status": "reached", **max(good, key=lambda step: step["error"]), "repeats": 1, **last}


class Pool:
    """A worker for each library, so that none pays for another's threads or memory."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.workers: dict[str, Worker] = {}

    def run(self, job: dict[str, Any], library: str, limit: float, fresh: bool = False) -> dict[str, Any]:
        """Run a job; ``fresh`` gives it a process that has solved nothing before."""
        worker = Worker(self.threads) if fresh else self.workers.setdefault(library, Worker(self.threads))
        try:
            return worker.run(job, limit)
        finally:
            if fresh:
                worker.stop()

    def __enter__(self) -> Pool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.workers.values():
            worker.stop()
