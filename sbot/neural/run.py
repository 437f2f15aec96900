"""The folder of a training: checkpoints that survive a crash, one process at a time, clean stops on signals."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, final

from torch import Tensor

from .. import io
from ..distributed import Group
from ..errors import InvalidFile, InvalidProblem

try:
    import fcntl
except ImportError:  # no such locks on Windows
    fcntl = None  # type: ignore[assignment]

LAST, PREVIOUS, BEST = "last.safetensors", "previous.safetensors", "best.safetensors"
PROBE = "run.probe"
#: Seconds after which a second signal does not wait for the next step; launchers send the first one twice at once.
IMPATIENT = 5.0


@final
class Run:
    """A folder with the last two checkpoints and the best, locked while it is in use; None is no folder at all.

    A checkpoint appears whole or not at all (see `sbot.io`), and a damaged one is passed over for the one before it.  While
    the folder is open SIGINT and SIGTERM only ask for a stop, at the next step, after a checkpoint; one that comes five
    seconds after another stops at once.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, group: Group) -> None:
        self.folder = None if folder is None else Path(folder)
        self.group = group
        self.signal = 0
        self._since = 0.0
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
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not of Python
        self._handlers = {}
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal and time.monotonic() - self._since > IMPATIENT:
            leave(number)
        if not self.signal:
            self._since = time.monotonic()
        self.signal = number

    def _open(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o666)
            self._take(folder, self._lock)
            # a folder that cannot be written is found now, not after an hour
            io.write_bytes(folder / PROBE, b"")
            (folder / PROBE).unlink()
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
            for name in (LAST, PREVIOUS, BEST, PROBE):
                for orphan in folder.glob(f".{name}.*.tmp"):  # of a process that died while it wrote
                    orphan.unlink(missing_ok=True)
        except (OSError, ValueError) as fault:  # ValueError: a name with a null character
            self.__exit__()
            if isinstance(fault, InvalidProblem):
                raise
            raise InvalidProblem(f"the folder {folder} cannot be written ({fault}); give another folder=") from None

    @staticmethod
    def _take(folder: Path, lock: int) -> None:
        """The system drops the lock of a process that dies: a lock file that was left behind locks nothing."""
        if fcntl is None:
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
            raise InvalidProblem(
                f"the folder {folder} is in use by process {who}; wait for it, or give another folder="
            ) from None
        except OSError as fault:  # some network file systems
            warnings.warn(
                f"the folder {folder} cannot be locked ({fault}); see to it that no other process uses it", stacklevel=2
            )

    def save(self, header: dict[str, Any], tensors: dict[str, Tensor], *, best: bool = False) -> None:
        """Write a checkpoint; the last one becomes the previous."""
        if self.folder is None or not self.group.first:
            return
        target = self.folder / (BEST if best else LAST)
        try:
            if not best and target.exists():
                os.replace(target, self.folder / PREVIOUS)
            io.write(target, "checkpoint", header, tensors)
        except OSError as fault:
            raise OSError(
                fault.errno,
                f"the checkpoint {target} cannot be written ({fault.strerror or fault}); the one before it is kept: make "
                "room and run again, which goes on from there",
            ) from fault

    def load(self, identity: dict[str, Any], resume: str) -> tuple[dict[str, Any], dict[str, Tensor], bool] | None:
        """The newest checkpoint that can be read, and whether it is of the same run; None in a fresh folder.

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
            except (InvalidFile, OSError) as fault:
                faults.append(str(fault))
                continue
            if not isinstance(header, dict):
                raise InvalidFile(f"{file} is not a checkpoint of a training; give another folder=")
            if faults:
                warnings.warn(f"{faults[0]}; going on from {file.name}, the checkpoint before it", stacklevel=2)
            return header, tensors, self._compare(header, identity, resume)
        raise InvalidFile("no checkpoint can be read: " + "; ".join(faults) + "; give another folder= to start anew")

    def _compare(self, header: dict[str, Any], identity: dict[str, Any], resume: str) -> bool:
        """Whether the checkpoint is of the same run; raises `InvalidProblem` where that is needed and is not so."""
        there, here = _flat(header.get("identity", {})), _flat(identity)
        keys = sorted(key for key in there.keys() | here.keys() if there.get(key) != here.get(key))
        if not keys:
            return True
        listed = "\n".join(f"  {key}: {there.get(key)!r} there, {here.get(key)!r} here" for key in keys)
        if resume != "force":
            raise InvalidProblem(
                f"the folder {self.folder} holds a run of another problem or other settings:\n{listed}\n"
                "give another folder=, or resume='force' to go on from it all the same"
            )
        warnings.warn(f"going on from a run that differs:\n{listed}", stacklevel=2)
        return False


def leave(number: int) -> NoReturn:
    """Stop as the signal would have it."""
    if number == signal.SIGTERM:
        raise SystemExit(128 + signal.SIGTERM)
    raise KeyboardInterrupt


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(data, dict):
        return {key: v for name, value in data.items() for key, v in _flat(value, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): data}
