"""Files: one safetensors file with a JSON header and a digest of every byte; nothing in it is ever executed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import InvalidFile

FORMAT = "sbot"
VERSION = 1
_BLANK = "0" * 64


def write(path: str | PathLike[str], kind: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write ``header`` (plain JSON data) and ``tensors``; the file appears whole or not at all."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    meta = {
        "format": FORMAT,
        "version": str(VERSION),
        "kind": kind,
        "header": json.dumps(header, allow_nan=False),
        "sha256": _BLANK,
    }
    data = safetensors.torch.save(plain, metadata=meta)
    digest = hashlib.sha256(data).hexdigest()
    write_bytes(path, data.replace(_BLANK.encode(), digest.encode(), 1))


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Replace the file at ``path``: temporary file beside it, fsync, rename; an error leaves the old file as it was."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target} cannot be written: there is no folder {target.parent}; make it first")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read(path: str | PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a file that `write` made; raises `InvalidFile` for anything that is not one, byte for byte."""
    data = Path(path).read_bytes()
    meta = _metadata(path, data)
    if meta.get("format") != FORMAT:
        raise InvalidFile(f"{path} is not an sbot file; save one with bridge.save(path)")
    version = str(meta.get("version"))
    if not (version.isascii() and version.isdigit()) or int(meta["version"]) > VERSION:
        raise InvalidFile(
            f"{path} has format version {meta.get('version')!r} and this release reads up to {VERSION}; upgrade sbot"
        )
    digest = str(meta.get("sha256"))
    if data.count(digest.encode()) != 1 or _digest(data, digest) != digest:
        raise InvalidFile(f"{path} is damaged (its digest does not match); restore it from a copy or save it again")
    if meta.get("kind") != kind:
        raise InvalidFile(f"{path} holds a {meta.get('kind')}, not a {kind}; load it with the function that made it")
    try:
        return json.loads(meta["header"]), safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as problem:
        raise InvalidFile(f"{path} cannot be read ({problem}); save it again") from None


def _digest(data: bytes, digest: str) -> str:
    return hashlib.sha256(data.replace(digest.encode(), _BLANK.encode(), 1)).hexdigest()


def _metadata(path: str | PathLike[str], data: bytes) -> dict[str, str]:
    size = int.from_bytes(data[:8], "little") if len(data) >= 8 else -1
    if not 0 < size <= len(data) - 8:
        raise InvalidFile(f"{path} is not a safetensors file, or only the beginning of one; save it again")
    try:
        header = json.loads(data[8 : 8 + size])
    except (ValueError, RecursionError):
        raise InvalidFile(f"{path} is not a safetensors file; save one with bridge.save(path)") from None
    meta = header.get("__metadata__") if isinstance(header, dict) else None
    return meta if isinstance(meta, dict) else {}
