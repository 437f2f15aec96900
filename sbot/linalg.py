"""Small linear algebra for Gaussian measures and linear references.

An *operator* is a tensor that acts on the last dimension of ``(..., d)``: 0-dimensional or ``(..., 1, 1)`` for a multiple of
the identity, ``(..., d, d)`` for a matrix.  Multiples of the identity stay scalars, so that a Brownian reference costs
nothing in dimension 784.

``eps`` is a number, or a tensor with one for each problem of a batch; `along` and `scaled` are how it meets other tensors.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch
from torch import Tensor

#: a number for all problems, or ``(*b,)`` with one for each of a batch
Eps = float | Tensor


def along(eps: Eps, dims: int) -> Eps:
    """``eps`` as it multiplies and divides what has ``dims`` dimensions beyond the batch."""
    return eps.reshape(eps.shape + (1,) * dims) if isinstance(eps, Tensor) else eps


def plus(total: Tensor, factor: Eps, part: Tensor) -> Tensor:
    """``total + factor part``, in one operation where the factor is a number."""
    return total + factor * part if isinstance(factor, Tensor) else torch.add(total, part, alpha=factor)


def scaled(eps: Eps, op: Tensor) -> Tensor:
    """``eps`` times an operator, each problem of a batch its own."""
    return along(eps, 2) * op


def as_eps(eps: Eps, like: Tensor) -> Tensor:
    """``eps`` as a tensor with the dtype and device of ``like``."""
    return eps.to(like) if isinstance(eps, Tensor) else torch.tensor(eps, dtype=like.dtype, device=like.device)


def plain(eps: Eps) -> Eps:
    """``eps`` without its graph; a number where there is one."""
    if not isinstance(eps, Tensor):
        return eps
    return eps.detach() if eps.ndim else float(eps.detach())


@cache
def _switches() -> list[Any]:
    """Torch's switches of precision; asking for them is slow."""
    candidates = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [matmul for matmul in candidates if hasattr(matmul, "fp32_precision")]


def full_precision() -> AbstractContextManager[None]:
    """Keep products in their dtype: no TF32, no bfloat16 and no autocast inside; the caller's settings are restored.

    The switches of torch are process-wide: a thread that wants TF32 elsewhere does not get it while another is in here.
    """
    return _FullPrecision()


class _FullPrecision(AbstractContextManager[None]):
    """What is as it should be is left alone: to enter a context, or to set a switch, costs as much as a small product."""

    def __enter__(self) -> None:
        self._set = [(one, value) for one in _switches() if (value := one.fp32_precision) not in ("none", "ieee")]
        self._off = [
            torch.autocast(device, enabled=False) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
        ]
        for context in self._off:
            context.__enter__()  # type: ignore[no-untyped-call]
        for switch, _ in self._set:
            switch.fp32_precision = "ieee"

    def __exit__(self, *fault: object) -> None:
        for switch, value in self._set:
            switch.fp32_precision = value
        for context in reversed(self._off):
            context.__exit__(*fault)


class _SqrtPSD(torch.autograd.Function):
    """Square root of a positive semi-definite matrix; the backward pass solves the Sylvester equation.

    Differentiating through `eigh` fails when eigenvalues repeat (the identity!); the square root itself does not.
    """

    @staticmethod
    def forward(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.clamp(min=0).sqrt()
        return (vectors * roots[..., None, :]) @ vectors.mT, roots, vectors

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*output[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        sums = roots[..., :, None] + roots[..., None, :]
        inner = vectors.mT @ ((grads[0] + grads[0].mT) / 2) @ vectors
        return vectors @ torch.where(sums > 0, inner / sums, torch.zeros_like(inner)) @ vectors.mT


def sqrtm(matrix: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix ``(..., d, d)``; singular is legal, differentiable."""
    root: Tensor = _SqrtPSD.apply(symmetrise(matrix))[0]  # type: ignore[no-untyped-call]
    return root


def symmetrise(matrix: Tensor) -> Tensor:
    """``(M + M') / 2``."""
    return matrix / 2 + matrix.mT / 2


def cholesky(cov: Tensor) -> Tensor | None:
    """Lower Cholesky factor of covariances ``(..., d, d)``, or None where one of them is singular to rounding."""
    values = torch.linalg.eigvalsh(cov.detach())
    rounding = 4 * cov.shape[-1] * torch.finfo(cov.dtype).eps
    if bool((values[..., 0] <= rounding * values[..., -1]).any()):
        return None
    return torch.linalg.cholesky(cov)


# ---- operators: scalars or matrices --------------------------------------------------------------------------------


def apply(op: Tensor, x: Tensor) -> Tensor:
    """``op @ x`` for points ``(..., n, d)``; a matrix may carry the leading batch dimensions of ``x``."""
    return op * x if is_scalar(op) else x @ op.mT


def is_scalar(op: Tensor) -> bool:
    """Whether the operator is a multiple of the identity in any dimension."""
    return op.ndim == 0 or op.shape[-1] == 1


def compose(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``."""
    return a * b if is_scalar(a) or is_scalar(b) else a @ b


def transpose(op: Tensor) -> Tensor:
    """``op'``."""
    return op if op.ndim == 0 else op.mT


def add(a: Tensor, b: Tensor) -> Tensor:
    """``a + b``, where a scalar means a multiple of the identity."""
    if is_scalar(a) and not is_scalar(b):
        a = matrix(a, b.shape[-1])
    if is_scalar(b) and not is_scalar(a):
        b = matrix(b, a.shape[-1])
    return a + b


def inverse(op: Tensor) -> Tensor:
    """``op^-1``."""
    return 1 / op if is_scalar(op) else torch.linalg.inv(op)


def root(op: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite operator."""
    return op.clamp(min=0).sqrt() if is_scalar(op) else sqrtm(op)


def logdet(op: Tensor, d: int) -> Tensor:
    """``log |det op|`` in dimension ``d``, without the dimensions of the matrix."""
    if is_scalar(op):
        return d * (op if op.ndim == 0 else op[..., 0, 0]).abs().log()
    return torch.linalg.slogdet(op)[1]


def matrix(op: Tensor, d: int) -> Tensor:
    """The operator as a ``(..., d, d)`` matrix."""
    return op * torch.eye(d, dtype=op.dtype, device=op.device) if is_scalar(op) else op


def log_gaussian_constant(cov: Tensor, d: int) -> Tensor:
    """``log sqrt(det(2 pi cov))``, the normaliser of a Gaussian density."""
    return (d * math.log(2 * math.pi) + logdet(cov, d)) / 2


def product(matrix: Tensor, vector: Tensor) -> Tensor:
    """Of a matrix ``(*b, n, m)``, or one ``(n, m)`` for all, with a vector ``(*b, m)``, for each of a batch."""
    if matrix.ndim == 2:
        return torch.mv(matrix, vector) if vector.ndim == 1 else vector @ matrix.mT
    # from the left: ten times faster on a CPU than with a column
    return (vector[..., None, :] @ matrix.mT)[..., 0, :]


def add_product(total: Tensor, matrix: Tensor, vector: Tensor) -> None:
    """Add `product` to ``total``, ``(*b, n)``, in place."""
    if matrix.ndim == 2:
        total.addmv_(matrix, vector)
    else:
        total += product(matrix, vector)
