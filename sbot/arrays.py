"""From whatever array a caller has to a finite, dense, real tensor: the one conversion at the door."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from .errors import InvalidProblem, Unsupported

HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)


def as_tensor(obj: Any, name: str, *, like: Tensor | None = None) -> Tensor:
    """Convert ``obj`` to a real floating tensor without changing ``obj``.

    Floating arrays keep their dtype.  Integers and Python lists carry no precision of their own: they take the
    dtype of ``like``, or torch's default dtype.  Raises `InvalidProblem` for anything else.
    """
    weak = like.dtype if like is not None else torch.get_default_dtype()
    if isinstance(obj, Tensor):
        return _from_tensor(obj, name, weak)
    _refuse(obj, name)
    if hasattr(obj, "to_numpy"):  # pandas, polars: by position, never by index
        obj = obj.to_numpy()
    listed = isinstance(obj, (list, tuple, numbers.Real)) and not isinstance(obj, np.generic)
    try:
        array = np.asarray(obj)
    except (ValueError, TypeError) as problem:
        raise InvalidProblem(f"{name} is not a rectangular array ({problem}); give every row the same length") from None
    if array.dtype.kind not in "fiu":
        raise InvalidProblem(
            f"{name} has dtype {array.dtype}, which is not real numbers; pass {name}.astype(float) if it holds numbers"
        )
    weak_dtype = listed or array.dtype.kind != "f"
    if array.dtype != np.float16:  # torch has no wide integers without a sign and no long double
        array = array.astype(np.float32 if array.dtype.itemsize == 4 and array.dtype.kind == "f" else np.float64)
    tensor = torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C", copy=True))
    if weak_dtype:
        tensor = tensor.to(weak)
    return tensor if like is None else tensor.to(like.device)


def wider(dtype: torch.dtype, words: str) -> str:
    """The words of advice to use float64, where that is not what is used."""
    return "" if dtype == torch.float64 else words


def _refuse(obj: Any, name: str) -> None:
    """What looks like an array and is none, by name."""
    kind = type(obj).__name__
    if isinstance(obj, np.ma.MaskedArray):
        raise InvalidProblem(f"{name} is a masked array; fill or drop the masked entries first")
    if isinstance(obj, (str, bytes, dict, set)) or obj is None or callable(obj):
        raise InvalidProblem(f"{name} must be an array of real numbers, not {kind}; pass a tensor or a NumPy array")
    if hasattr(obj, "tocoo") or hasattr(obj, "todense"):
        raise InvalidProblem(f"{name} is a sparse {kind}; pass {name}.toarray()")
    if isinstance(obj, (list, tuple)) and obj and all(isinstance(item, Tensor) for item in obj):
        raise InvalidProblem(f"{name} is a {kind} of tensors; pass torch.stack({name})")


def transformed() -> bool:
    """Whether a transform of torch.func is at work."""
    return torch._C._are_functorch_transforms_active()


def as_array(values: Any) -> Any:
    """The numbers of a tensor as an array, without copies where it can be; inside torch.func.grad and its like too."""
    if not isinstance(values, Tensor):
        return np.asarray(values)
    while _functorch.is_gradtrackingtensor(values):
        values = _functorch.get_unwrapped(values)
    # a transform would wrap whatever is made of a tensor, and what it wraps has no memory
    with torch._C._DisableFuncTorch() if transformed() else nullcontext():
        return values.detach().cpu().numpy()


def refuse_vmap(tensor: Tensor, name: str) -> None:
    """Raise `Unsupported` for a tensor that `torch.vmap` has taken a dimension of, under other transforms too."""
    while _functorch.is_functorch_wrapped_tensor(tensor) or _functorch.is_legacy_batchedtensor(tensor):
        if not _functorch.is_gradtrackingtensor(tensor):
            raise Unsupported(
                f"{name} is inside torch.vmap, and solves decide by their numbers when to stop; give the problems as a batch, "
                "(*b, n, d) points, and for a Jacobian take its rows one by one: torch.func.jacrev(f, chunk_size=1)"
            )
        tensor = _functorch.get_unwrapped(tensor)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Raise `Unsupported` for tensors with a tangent, under other transforms too."""
    for tensor in tensors:
        if tensor is not None and _has_tangent(tensor):
            raise Unsupported(
                "plans between atoms have reverse-mode derivatives only, not those of torch.func.jvp, jacfwd and hessian; use "
                "torch.func.grad, vjp or jacrev(f, chunk_size=1), the last one on a gradient for a Hessian"
            )


def _has_tangent(tensor: Tensor) -> bool:
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        return True
    if not _functorch.is_functorch_wrapped_tensor(tensor):
        return False
    # beneath another transform a tangent is out of sight, but not the transform that made it
    level = _functorch.maybe_get_level(tensor)
    stack = _functorch.get_interpreter_stack() or []
    if any(part.level() == level and part.key() == _functorch.TransformType.Jvp for part in stack):
        return True
    return _has_tangent(_functorch.get_unwrapped(tensor))


def _from_tensor(tensor: Tensor, name: str, weak: torch.dtype) -> Tensor:
    refuse_vmap(tensor, name)
    if tensor.layout != torch.strided:
        raise InvalidProblem(f"{name} is a sparse tensor; pass {name}.to_dense()")
    if tensor.dtype.is_complex or tensor.dtype == torch.bool or tensor.is_quantized:
        raise InvalidProblem(f"{name} has dtype {tensor.dtype}, which is not real numbers; pass {name}.double()")
    if tensor.is_nested:
        raise InvalidProblem(f"{name} is a nested tensor; pass one problem at a time")
    if tensor.dtype.is_floating_point and tensor.dtype not in DTYPES:
        raise InvalidProblem(f"{name} has dtype {tensor.dtype}, which has no arithmetic; pass {name}.float()")
    if tensor.device.type == "meta":
        raise InvalidProblem(f"{name} is on the meta device and holds no numbers; pass a tensor with data")
    return tensor if tensor.dtype.is_floating_point else tensor.to(weak)


def in_problem(index: Sequence[int]) -> str:
    """ " in problem 2 of the batch", for the leading indices of an entry; nothing where there are none."""
    return f" in problem {index[0] if len(index) == 1 else list(index)} of the batch" if len(index) else ""


def require_finite(tensor: Tensor, name: str, core: int | None = None) -> Tensor:
    """Return ``tensor``, or raise `InvalidProblem` that says how many entries are not finite and where the first is.

    Dimensions before the last ``core`` are those of a batch.
    """
    finite = torch.isfinite(tensor)
    if not bool(finite.all()):
        bad = torch.nonzero(~finite)
        first = bad[0].tolist()
        own = 0 if core is None else max(0, len(first) - core)
        raise InvalidProblem(
            f"{name} has {len(bad)} entries that are NaN or infinite, the first at {first[own:]}{in_problem(first[:own])}; "
            "drop or impute them"
        )
    return tensor


def as_number(value: Any, name: str) -> float:
    """Convert a real scalar (or 0-d array) to a float; raise `InvalidProblem` for anything else."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise InvalidProblem(f"{name} wants a gradient, and numbers have none here; pass float({name})")
    if isinstance(value, Tensor):
        refuse_vmap(value, name)
        refuse_forward_mode(value)
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (numbers.Real, np.number)):
        raise InvalidProblem(f"{name} must be a real number, not {type(value).__name__} {value!r}; pass a float")
    try:
        number = float(value)
    except OverflowError:
        raise InvalidProblem(f"{name} is beyond the range of a float; give a smaller number") from None
    if math.isnan(number):
        raise InvalidProblem(f"{name} is NaN; pass a number")
    return number


def as_count(value: Any, name: str, *, least: int = 1) -> int:
    """Convert to an int of at least ``least``; raise `InvalidProblem` for anything else."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)) or value < least:
        raise InvalidProblem(f"{name} must be an integer >= {least}, not {value!r}; pass such an integer")
    return int(value)


def as_index(obj: Any, n: int, name: str, device: torch.device) -> Tensor:
    """Convert row or atom numbers to ``(k,)`` int64; negative ones count from the end.  `InvalidProblem` otherwise."""
    if isinstance(obj, slice):
        try:
            return torch.arange(n, device=device)[obj]
        except (TypeError, ValueError) as fault:
            raise InvalidProblem(
                f"{name} is {obj!r} ({fault}); give a slice of integers with a positive step"
            ) from None
    try:
        index = (
            torch.as_tensor(obj, device=device)
            if isinstance(obj, Tensor)
            else torch.from_numpy(np.array(obj)).to(device)
        )
    except (TypeError, ValueError):
        raise InvalidProblem(f"{name} must be numbers; give a slice, an integer or a 1-D array of integers") from None
    if index.numel() == 0:
        index = index.flatten().long()
    kind = index.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool or index.ndim > 1:
        raise InvalidProblem(f"{name} must be numbers; give a slice, an integer or a 1-D array of integers")
    index = index.reshape(-1).long()
    if len(index) and (int(index.min()) < -n or int(index.max()) >= n):
        raise InvalidProblem(f"{name} go from {int(index.min())} to {int(index.max())} and there are {n}")
    return index % n


def once(tensor: Tensor, change: Callable[[Tensor], Tensor], keep: int) -> Tensor:
    """``change(tensor)``; leading dimensions, before the last ``keep``, that show one block many times stay views of one."""
    base = tensor
    while base.ndim > keep and base.stride(0) == 0 and not base.requires_grad:
        base = base[0]
    changed = change(base)
    return changed if base is tensor else changed.expand(tensor.shape)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precisions are computed in float32; everything else in itself."""
    return torch.float32 if dtype in HALF else dtype
