"""Time and memory of one call.

Memory is the highest resident set during the call above the one before it: the kernel's own mark, which counts whatever
allocates (NumPy, torch, threads) and costs microseconds.  Freed memory is given back to the kernel before, so that a call does
not live on what the last one left.  On a GPU the peak of torch's allocator is added.  The mark is that of the process: of calls
in several threads at once it has the sum.
"""

from __future__ import annotations

import contextlib
import ctypes
import time

import torch

RESET, STATUS = "/proc/self/clear_refs", "/proc/self/status"


class Meter:
    """``with Meter() as m: ...``, then ``m.seconds`` and ``m.bytes`` (None where the system does not tell)."""

    seconds = 0.0
    bytes: int | None = None

    def __enter__(self) -> Meter:
        self._device = _device_peak()
        self._before = _resident() if _reset() else None
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        device = _device_peak(self._device)
        self.seconds = time.perf_counter() - self._start
        if self._before is not None:
            self.bytes = max(_status()["VmHWM"] - self._before, 0) + device


def _reset() -> bool:
    """Give freed memory back and set the mark to what is resident; whether that is possible here."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return False
    try:
        with open(RESET, "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _resident() -> int:
    return _status()["VmRSS"]


def _status() -> dict[str, int]:
    found = {}
    with open(STATUS, encoding="ascii", errors="replace") as file:
        for line in file:
            if line.startswith(("VmHWM", "VmRSS")):
                name, _, rest = line.partition(":")
                found[name] = 1024 * int(rest.split()[0])
    return found


def _device_peak(before: int | None = None) -> int:
    """What is allocated on the GPU now, with the mark set to it; or, after a call, how far the mark has risen above that."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return 0
    with contextlib.suppress(RuntimeError):
        torch.cuda.synchronize()
        if before is not None:
            return max(int(torch.cuda.max_memory_allocated()) - before, 0)
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    return 0
