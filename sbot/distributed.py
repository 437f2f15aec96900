"""Data parallel over processes: every process draws the same numbers and works on its own rows of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InvalidProblem


@final
@dataclass(frozen=True)
class Group:
    """Where this process stands among those that solve one problem together."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and shows progress."""
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """This process's share of ``n`` rows."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        _all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def gather(self, part: Tensor, n: int) -> Tensor:
        """All ``n`` rows from every process's `rows` of them."""
        if self.size == 1:
            return part
        whole = torch.zeros((n, *part.shape[1:]), dtype=part.dtype, device=part.device)
        whole[self.rows(n)] = part
        _all_reduce(whole)  # shares differ in length; zeros elsewhere make a sum a concatenation
        return whole

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.size == 1:
            return flag
        told = torch.tensor([float(flag)], device=device)
        _all_reduce(told)
        return bool(told > 0)

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by that of the first process."""
        for tensor in tensors if self.size > 1 else ():
            plain = tensor.detach().contiguous() if self.first else torch.zeros_like(tensor).contiguous()
            _all_reduce(plain)
            with torch.no_grad():
                tensor.copy_(plain)

    def agree(self, value: float, device: torch.device) -> float:
        """The first process's ``value``, in every process."""
        if self.size == 1:
            return value
        told = torch.tensor([value if self.first else 0.0], dtype=torch.float64, device=device)
        _all_reduce(told)
        return float(told)

    def same(self, text: str, device: torch.device) -> bool:
        """Whether ``text`` is the same in every process."""
        if self.size == 1:
            return True
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        told = torch.tensor([number, -number], dtype=torch.float64, device=device)  # 48 bits are exact
        _all_reduce(told, dist.ReduceOp.MAX)
        return bool(told[0] == -told[1])


def _all_reduce(tensor: Tensor, how: Any = None) -> None:
    try:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if how is None else how)
    except RuntimeError as fault:
        said = str(fault).splitlines()[0]
        raise RuntimeError(
            f"another process of the group is gone, or did not answer in time ({said}); look for its own error, then "
            "start all of them again: with folder= they go on from the last checkpoint"
        ) from fault


def current() -> Group:
    """The default process group of torch where one is initialised, else this process alone."""
    if dist.is_available() and dist.is_initialized():
        return Group(dist.get_rank(), dist.get_world_size())
    return Group()


@contextmanager
def together(backend: str | None = None, *, timeout: float = 120.0) -> Iterator[Group]:
    """Join the processes that ``torchrun`` started, and leave them at the end.

    ``backend`` is "nccl" where there is a GPU and "gloo" elsewhere; ``timeout``, in seconds and at least 60, is how long a
    process waits for the others before it raises.  Outside of ``torchrun`` it is a group of one.  Raises `InvalidProblem`
    inside another group.

    Examples
    --------
    >>> import sbot
    >>> with sbot.together() as group:
    ...     group.size
    1
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Group()
        return
    if dist.is_initialized():
        raise InvalidProblem("a process group is initialised already; call solve_bridge in it without together()")
    chosen = backend or ("nccl" if torch.cuda.is_available() else "gloo")
    if chosen == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group(chosen, timeout=timedelta(seconds=max(timeout, 60.0)))
    try:
        yield current()
    finally:
        dist.destroy_process_group()
