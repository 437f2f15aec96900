"""From POT's arrays to tensors and back: NumPy and torch, with dtype and device kept; others go to POT itself."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...errors import Unsupported

#: Packages whose arrays only POT itself can take.
FOREIGN = ("jax", "jaxlib", "tensorflow", "cupy")
SUPPORTED = "NumPy arrays, torch tensors and lists"

F = TypeVar("F", bound=Callable[..., Any])


def pot(name: str = "") -> Any:
    """POT, or its module or function of that dotted name; `Unsupported` where POT is not installed or has no such thing."""
    try:
        found = importlib.import_module("ot")
    except ImportError:
        raise Unsupported(
            f"ot.{name} is not covered by sbot.compat.pot and POT is not installed; pip install pot, or use what "
            "`dir(sbot.compat.pot)` lists"
        ) from None
    for part in filter(None, name.split(".")):
        found = getattr(found, part) if hasattr(found, part) else _imported(found, part)
    # where functions of POT have been swapped for these, what they were before
    return getattr(found, "__original__", found)


def _imported(module: Any, part: str) -> Any:
    try:
        return importlib.import_module(f"{module.__name__}.{part}")
    except ImportError:
        raise AttributeError(f"neither sbot.compat.pot nor {module.__name__} has {part!r}") from None


def forwarder(prefix: str) -> Callable[[str], Any]:
    """A module's ``__getattr__``: what is not defined there is POT's, where POT is installed."""

    def get(name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"sbot.compat.pot has no {name!r}")
        try:
            return pot(f"{prefix}.{name}" if prefix else name)
        except Unsupported as fault:
            raise AttributeError(str(fault)) from None

    return get


def covers(name: str) -> Callable[[F], F]:
    """Mark a function that stands for ``ot.<name>``; calls with arrays of another library go to POT."""

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            for value in (*args, *kwargs.values()):
                if type(value).__module__.split(".", 1)[0] in FOREIGN:
                    kwargs.pop("strict", None)
                    return pot(name)(*args, **kwargs)
            return function(*args, **kwargs)

        call.__stands_for__ = name  # type: ignore[attr-defined]
        return call  # type: ignore[return-value]

    return wrap


@dataclass(frozen=True)
class Home:
    """Where results go: NumPy, or torch."""

    numpy: bool

    def back(self, value: Tensor) -> Any:
        """A tensor as the caller's kind of array; without dimensions, as NumPy's scalar."""
        return value.detach().cpu().numpy()[()] if self.numpy else value

    def number(self, value: float, like: Tensor) -> Any:
        """A number of the dtype of ``like``."""
        return self.back(torch.as_tensor(value, dtype=like.dtype, device=like.device))


def enter(*arrays: Any) -> tuple[Home, list[Tensor]]:
    """Tensors that share memory with ``arrays`` where that is possible.  Lists take dtype and device of the first array.

    Raises ValueError for a mixture of NumPy and torch, and for what is neither.
    """
    first = next((x for x in arrays if isinstance(x, Tensor)), None)
    plain = [x for x in arrays if isinstance(x, np.ndarray) and x.size]
    if first is not None and plain:
        raise ValueError("all arrays must be of one library; here are both NumPy arrays and torch tensors")
    like = first if first is not None else _from_numpy(plain[0]) if plain else None
    return Home(first is None), [_tensor(x, like) for x in arrays]


def _tensor(x: Any, like: Tensor | None) -> Tensor:
    if isinstance(x, Tensor):
        return x if x.dtype.is_floating_point or x.dtype.is_complex else x.to(torch.get_default_dtype())
    if hasattr(x, "to_numpy"):
        x = x.to_numpy()
    if isinstance(x, np.ma.MaskedArray):
        raise ValueError("a masked array is given, and masks are not looked at here; fill it first: x.filled(value)")
    if isinstance(x, np.ndarray) and x.size:
        return _from_numpy(x)
    if isinstance(x, (list, tuple, np.ndarray)):
        values = torch.as_tensor(np.asarray(x, dtype=np.float64))
        return values if like is None else values.to(like)
    raise ValueError(f"an array of type {type(x).__name__} is not supported; give {SUPPORTED}")


def _from_numpy(x: np.ndarray[Any, Any]) -> Tensor:
    if x.dtype.kind in "iub":
        x = x.astype(np.float64)
    elif x.dtype.kind != "f" or x.dtype.itemsize > 8 or not x.dtype.isnative:
        x = np.asarray(x, dtype=np.float64)
    elif not x.flags.writeable or any(step < 0 for step in x.strides):
        x = x.copy()
    return torch.from_numpy(x)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is on and one of them asks for a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
