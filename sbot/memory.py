"""How much memory there is, asked before it is taken."""

from __future__ import annotations

import os

import torch

#: Bytes that are there for certain: to ask costs more than to fill them.
SURE = 2**24


def available_bytes(device: torch.device) -> int | None:
    """Free bytes on the device, or None where the system does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    limits = []
    try:
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        if soft != resource.RLIM_INFINITY:
            with open("/proc/self/statm", encoding="ascii") as file:
                limits.append(soft - int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE"))
    except (ImportError, OSError, ValueError):
        pass
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            limits += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")]
    except OSError:
        pass
    return min(limits) if limits else None


def lacking(needed: int, device: torch.device) -> str | None:
    """How much is needed and how much is free, in words, where ``needed`` bytes are not to be had."""
    if needed <= SURE:
        return None
    free = available_bytes(device)
    if free is None or needed <= free:
        return None
    return f"needs {needed / 2**30:.2f} GiB and {max(free, 0) / 2**30:.2f} GiB are free"


def require_memory(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Raise `MemoryError` with the number and the remedy where ``needed`` bytes are not to be had."""
    short = lacking(needed, device)
    if short is not None:
        raise MemoryError(f"{what} {short}; {remedy}")
