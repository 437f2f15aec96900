"""Files of points: .npy, .npz, .csv and .safetensors, read and written by suffix; nothing in them is executed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from . import io
from .arrays import as_tensor
from .errors import InvalidFile, InvalidProblem, SbotError

ARRAYS = (".npy", ".npz", ".csv", ".safetensors")


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The numbers in a file, by name; a file without names has one array, called "points"."""
    _check_suffix(path, ARRAYS)
    try:
        found = _READERS[path.suffix.lower()](path)
    except (SbotError, OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make the parsers raise almost anything, tokenize.TokenError included
        raise InvalidFile(f"{path} cannot be read as {path.suffix} ({error}); write it again") from None
    return {name: as_tensor(array, f"{path.name} {name}") for name, array in found.items()}


def _read_npy(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"points": np.lib.format.read_array(file, allow_pickle=False)}


def _read_npz(path: Path) -> dict[str, Any]:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InvalidFile(f"{path} is not a .npz archive; write it with numpy.savez")
        return {name: archive[name] for name in archive.files}


def _read_csv(path: Path) -> dict[str, Any]:
    """Numbers between commas; the first line may name the columns instead."""
    with path.open(encoding="utf-8-sig") as file:
        lines = [line for line in file if line.strip() and not line.startswith("#")]
    if lines and not any(
        _is_number(cell) for cell in lines[0].split(",")
    ):  # one slip in a row is an error, not a header
        lines = lines[1:]
    if not lines:
        raise InvalidFile(f"{path} holds no numbers; give one point a line, its coordinates between commas")
    return {"points": np.loadtxt(lines, delimiter=",", ndmin=2)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".npy": _read_npy,
    ".npz": _read_npz,
    ".csv": _read_csv,
    ".safetensors": lambda path: safetensors.torch.load(path.read_bytes()),
}


def read_points(path: Path) -> tuple[Tensor, Tensor | None]:
    """Points and weights: the arrays "points" and, where there is one, "weights"; or the only array of the file."""
    found = read_arrays(path)
    if "points" in found and set(found) <= {"points", "weights"}:
        return found["points"], found.get("weights")
    if len(found) == 1:
        return next(iter(found.values())), None
    names = ", ".join(sorted(found)[:5]) or "nothing"
    raise InvalidFile(f"{path} holds {names}; give 'points' and optionally 'weights', or exactly one array")


def write_points(path: Path, points: Tensor, weights: Tensor | None = None) -> None:
    """Write by suffix; the formats without names hold the points only."""
    buffer, suffix = BytesIO(), path.suffix.lower()
    named = {"points": points.detach().cpu().contiguous()} | ({} if weights is None else {"weights": weights.cpu()})
    if suffix == ".safetensors":
        buffer.write(safetensors.torch.save(named))
    else:
        # NumPy has no bfloat16
        plain = {name: (part.float() if part.dtype == torch.bfloat16 else part).numpy() for name, part in named.items()}
        if suffix == ".npz":
            np.savez(buffer, **plain)  # type: ignore[arg-type]
        elif suffix == ".npy":
            np.save(buffer, plain["points"], allow_pickle=False)
        elif points.ndim > 2:
            raise InvalidProblem(f"{path.name} holds one table, not an array of shape {tuple(points.shape)}; use .npy")
        else:
            digits = "%.17g" if points.dtype == torch.float64 else "%.9g"
            np.savetxt(buffer, plain["points"], delimiter=",", fmt=digits)
    io.write_bytes(path, buffer.getvalue())


def _check_suffix(path: Path, allowed: tuple[str, ...]) -> None:
    if path.suffix.lower() not in allowed:
        listed = ", ".join(suffix or "no suffix" for suffix in allowed)
        raise InvalidProblem(f"{path} ends in {path.suffix!r}; give {listed}")


def check_output(path: Path, allowed: tuple[str, ...]) -> None:
    """Find out now, and not after the work, that a file cannot be written."""
    _check_suffix(path, allowed)
    if path.is_dir():
        raise InvalidProblem(f"{path} is a directory; give the name of a file")
    if not path.parent.is_dir():
        raise InvalidProblem(f"there is no directory {path.parent}; create it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InvalidProblem(f"cannot write into {path.parent} ({error.strerror}); choose another directory") from None
