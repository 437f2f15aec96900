"""The folder of a training: checkpoints that survive a crash, one process at a time, clean stops on signals."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch
from torch import Tensor

from .. import io
from ..distributed import Group
from ..errors import InvalidFile, InvalidProblem

try:
    import fcntl
except ImportError:  # no such locks on Windows; the number of the process in the file has to do
    fcntl = None  # type: ignore[assignment]

LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"


@final
class Run:
    """A folder with the last two checkpoints and the best, locked while it is in use; None is no folder at all.

    A checkpoint appears whole or not at all (see `sbot.io`), and a damaged one is passed over for the one before it.  While
    the folder is open SIGINT and SIGTERM only ask for a stop, at the next step, after a checkpoint.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, group: Group) -> None:
        self.folder = None if folder is None else Path(folder)
        self.group = group
        self.signal: int | None = None
        self._lock: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Run:
        if self.folder is None:
            return self
        if self.group.first:
            self._open(self.folder)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # a folder that cannot be written is found now, not after an hour
            self._lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)
            io.write_bytes(folder / "run.probe", b"")
            (folder / "run.probe").unlink()
        except OSError as fault:
            self.__exit__()
            raise InvalidProblem(f"the folder {folder} cannot be written ({fault}); give another folder=") from None
        if fcntl is not None:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                who = os.read(self._lock, 32).decode(errors="replace").strip() or "unknown"
                self.__exit__()
                raise InvalidProblem(
                    f"the folder {folder} is in use by process {who}; wait for it, or give another folder="
                ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        for orphan in folder.glob(".*.tmp"):  # of a process that died while it wrote
            orphan.unlink(missing_ok=True)

    def save(self, header: dict[str, Any], tensors: dict[str, Tensor], *, best: bool = False) -> None:
        """Write a checkpoint; the last one becomes the previous."""
        if self.folder is None or not self.group.first:
            return
        last = self.folder / LAST
        if best:
            io.write(self.folder / BEST, "checkpoint", header, tensors)
            return
        if last.exists():
            os.replace(last, self.folder / PREVIOUS)
        io.write(last, "checkpoint", header, tensors)

    def load(self, identity: dict[str, Any], resume: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The newest checkpoint that can be read, or None in a fresh folder.

        Raises `InvalidFile` where there are checkpoints and none is intact, `InvalidProblem` where they are of another run.
        """
        if self.folder is None:
            return None
        files = [self.folder / name for name in (LAST, PREVIOUS) if (self.folder / name).exists()]
        if not files:
            return None
        if resume == "never":
            raise InvalidProblem(
                f"the folder {self.folder} holds a run already; give another folder=, or resume='auto'"
            )
        faults = []
        for file in files:
            try:
                header, tensors = io.read(file, "checkpoint")
            except InvalidFile as fault:
                faults.append(str(fault))
                continue
            if faults:
                warnings.warn(f"{faults[0]}; going on from {file.name}, the checkpoint before it", stacklevel=2)
            self._compare(header, identity, resume)
            return header, tensors
        raise InvalidFile("no checkpoint can be read: " + "; ".join(faults))

    def _compare(self, header: dict[str, Any], identity: dict[str, Any], resume: str) -> None:
        there, here = _flat(header.get("identity", {})), _flat(identity)
        keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        if not keys:
            return
        listed = "\n".join(f"  {key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys)
        if resume != "force":
            raise InvalidProblem(
                f"the folder {self.folder} holds a run of another problem or other settings:\n{listed}\n"
                "give another folder=, or resume='force' to go on from it all the same"
            )
        warnings.warn(f"going on from a run that differs:\n{listed}", stacklevel=2)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        return {key: v for name, value in data.items() for key, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): data}


def generator_state(generator: torch.Generator) -> Tensor:
    """The state of a generator, which is a tensor of bytes."""
    return generator.get_state().clone()
