"""The process that a contender runs in: jobs as JSON lines in, events and a result out.  It may be killed at any time."""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
import warnings
from typing import Any, TextIO


def main(threads: int) -> None:
    if hasattr(os, "sched_setaffinity"):  # what holds for every library, whatever its own setting is called
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    _hold_back()
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print
    import torch

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    for line in sys.stdin:
        serve(json.loads(line), out)


def _hold_back() -> None:
    """Three fourths of the memory at most: a solver that needs more fails by itself, and nothing else is killed for it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = 3 * total // 4
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard < 0 else min(wanted, hard), hard))


def serve(job: dict[str, Any], out: TextIO) -> None:
    """Run one job and say what came of it."""

    def tell(event: dict[str, Any]) -> None:
        print(json.dumps(event), file=out, flush=True)

    try:
        tell({"event": "result", **run(job, tell)})
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        traceback.print_exc()
        tell({"event": "result", "status": "failed", "note": said})


def run(job: dict[str, Any], tell: Any) -> dict[str, Any]:
    """Dispatch on the part and the kind of job."""
    if job["part"] == "dropin":
        from ..dropin.measure import run as both

        return both(job, tell)
    from . import contenders, gradients, large, memory
    from .measure import REPEATED, measure
    from .tasks import make

    kind = job["kind"]
    others = {"large": large.run, "gradient": gradients.run, "check": gradients.check, "memory": memory.run}
    if kind in others:
        return others[kind](job, tell)
    table = contenders.BATCH if kind == "batch" else contenders.SINGLE
    task = make(job)
    return measure(task, table[job["contender"]](task, job["tol"]), job["tol"], tell, job.get("repeated", REPEATED))


if __name__ == "__main__":
    main(int(sys.argv[1]))
