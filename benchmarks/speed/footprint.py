"""Resident memory of this process, in bytes."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident() -> int:
    return _status("VmRSS")


def peak() -> int:
    """The largest since the start of the process, or since `forget_peak`."""
    # not ru_maxrss: it is inherited from the parent that forked
    return _status("VmHWM")


def forget_peak() -> None:
    """Start the peak anew at what is resident now, where the system can."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5", encoding="ascii")


def _status(key: str) -> int:
    try:
        for line in STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
