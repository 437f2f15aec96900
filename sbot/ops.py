"""Sinkhorn normalisation as a layer: many small matrices at once, differentiable, in the log domain.

Each function alternates ``u_i = log a_i - logsumexp_j(Z_ij + v_j)`` and the same for ``v``.  With a number of iterations
gradients go through them.  Without one it goes on to the fixed point, and gradients are implicit: with ``P = exp(Z + u + v)``
and a gradient ``G`` in ``log P``, the one in Z is ``G - P (alpha_i + beta_j)``, where

    diag(a) alpha + P beta = G 1,    P' alpha + diag(b) beta = G' 1.

Half precisions are computed in float32 and cast back.  Entries of ``-inf`` are masked pairs.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from .arrays import HALF, as_count, as_number, as_tensor
from .errors import InvalidProblem, NotConverged

#: Iterations of a solve without a given number, and what a Newton step may move, in logarithms.
LIMIT, REACH = 500, 1.0


def log_sinkhorn_iterations(
    Z: Tensor, log_mu: Tensor, log_nu: Tensor, iters: int | None = None, *, tol: float | None = None
) -> Tensor:
    """``log P = Z + u_i + v_j`` with marginals ``exp(log_mu)`` and ``exp(log_nu)``, ``(*b, n, m)``.

    Parameters
    ----------
    Z : scores ``(*b, n, m)``, in units of the regularisation.
    log_mu, log_nu : log-weights ``(*b, n)`` and ``(*b, m)``.
    iters : pairs of half-steps, the last on columns; None goes on until the relative L1 error of the rows is ``tol``.
    tol : None is 1e-5 in float32 and 1e-12 in float64.

    Raises
    ------
    InvalidProblem : shapes that do not fit; without ``iters`` also NaN, ``+inf``, empty rows and unequal masses.

    Warns
    -----
    NotConverged : the tolerance was not reached.

    Examples
    --------
    >>> import torch
    >>> from sbot.ops import log_sinkhorn_iterations
    >>> w = torch.full((2,), 0.5).log()
    >>> log_sinkhorn_iterations(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), w, w).exp()
    tensor([[0.3655, 0.1345],
            [0.1345, 0.3655]])
    """
    given = Z.dtype
    scores, left, right = (_wide(as_tensor(part, name)) for part, name in zip((Z, log_mu, log_nu), _NAMES, strict=True))
    if scores.ndim < 2:
        raise InvalidProblem(f"Z has shape {tuple(scores.shape)}; give (n, m) or (*b, n, m)")
    for part, size, name in ((left, scores.shape[-2], "log_mu"), (right, scores.shape[-1], "log_nu")):
        if part.ndim == 0 or part.shape[-1] != size or part.shape[:-1] not in (scores.shape[:-2], ()):
            raise InvalidProblem(
                f"{name} has shape {tuple(part.shape)} for scores {tuple(scores.shape)}; give {size} a row"
            )
    left, right = left.expand(scores.shape[:-1]), right.expand(*scores.shape[:-2], scores.shape[-1])
    if iters is None:
        out = _Converged.apply(scores, left, right, _tolerance(tol, scores.dtype))  # type: ignore[no-untyped-call]
    elif tol is not None:
        raise InvalidProblem("iters and tol are both given; give a number of iterations or a tolerance")
    else:
        out = _unrolled(scores, left, right, as_count(iters, "iters", least=0))
    return out.to(given) if given in HALF else out


def log_optimal_transport(
    scores: Tensor, bin_score: Any, iterations: int | None = None, *, tol: float | None = None
) -> Tensor:
    """Matching with dustbins: the log-plan ``(*b, n + 1, m + 1)`` for ``scores (*b, n, m)``, as in SuperGlue.

    One row and one column of score ``bin_score`` are added; they take ``m`` and ``n`` units of mass, the others one each.
    ``bin_score`` is a number or a tensor that broadcasts with ``(*b, 1, 1)``; ``iterations`` and ``tol`` as in
    `log_sinkhorn_iterations`.

    Raises
    ------
    InvalidProblem : as `log_sinkhorn_iterations`.

    Examples
    --------
    >>> import torch
    >>> from sbot.ops import log_optimal_transport
    >>> log_optimal_transport(torch.randn(8, 5, 7), torch.tensor(1.0), iterations=100).shape
    torch.Size([8, 6, 8])
    """
    z = as_tensor(scores, "scores")
    if z.ndim < 2:
        raise InvalidProblem(f"scores have shape {tuple(z.shape)}; give (n, m) or (*b, n, m)")
    *batch, n, m = z.shape
    alpha = as_tensor(bin_score, "bin_score", like=z).to(z)
    alpha = alpha.expand(*batch, 1, 1)
    wide = torch.cat([z, alpha.expand(*batch, n, 1)], -1)
    wide = torch.cat([wide, alpha.expand(*batch, 1, m + 1)], -2)
    one = -math.log(n + m)
    like = _wide(wide)
    log_mu = torch.cat([like.new_full((n,), one), like.new_full((1,), one + math.log(m))])
    log_nu = torch.cat([like.new_full((m,), one), like.new_full((1,), one + math.log(n))])
    out = log_sinkhorn_iterations(wide, log_mu, log_nu, iterations, tol=tol)
    return out - one


def sinkhorn_normalize(
    logits: Tensor, *, iterations: int | None = None, tol: float | None = None, dim: tuple[int, int] = (-1, -2)
) -> Tensor:
    """The matrix ``diag(u) exp(logits) diag(v)`` whose rows sum to 1 and whose columns sum to ``n / m``, ``(*b, n, m)``.

    Doubly stochastic for n = m.  For a positive matrix A give ``A.log()``.

    Parameters
    ----------
    logits : ``(*b, n, m)``.
    iterations : pairs of normalisations; None goes on to the fixed point and has implicit gradients.
    tol : relative L1 error to stop at where ``iterations`` is None, see `log_sinkhorn_iterations`.
    dim : the dimension that is summed over first and the one that is summed over last, and is exact: ``(-1, -2)`` is rows,
        then columns; ``(-2, -1)`` columns, then rows, as in SwaV.

    Raises
    ------
    InvalidProblem : as `log_sinkhorn_iterations`, and another ``dim``.

    Examples
    --------
    >>> import torch
    >>> from sbot.ops import sinkhorn_normalize
    >>> mixing = sinkhorn_normalize(torch.randn(1000, 4, 4), iterations=20)
    >>> bool(torch.allclose(mixing.sum(-2), torch.ones(1000, 4)))
    True
    >>> codes = sinkhorn_normalize(torch.randn(64, 10) / 0.05, iterations=3, dim=(-2, -1))
    """
    z = as_tensor(logits, "logits")
    if z.ndim < 2:
        raise InvalidProblem(f"logits have shape {tuple(z.shape)}; give (n, m) or (*b, n, m)")
    order = tuple(k - z.ndim if k >= 0 else k for k in dim)
    if order not in ((-1, -2), (-2, -1)):
        raise InvalidProblem(f"dim is {dim}; give (-1, -2), rows then columns, or (-2, -1)")
    n, m = z.shape[-2:]
    like = _wide(z)
    log_mu, log_nu = like.new_zeros(n), like.new_full((m,), math.log(n / m))
    if order == (-1, -2):
        return log_sinkhorn_iterations(z, log_mu, log_nu, iterations, tol=tol).exp()
    return log_sinkhorn_iterations(z.mT, log_nu, log_mu, iterations, tol=tol).exp().mT


_NAMES = ("Z", "log_mu", "log_nu")


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def _tolerance(tol: float | None, dtype: torch.dtype) -> float:
    if tol is None:
        return 1e-12 if dtype == torch.float64 else 1e-5
    number = as_number(tol, "tol")
    if not 0 <= number < math.inf:
        raise InvalidProblem(f"tol is {number}; give a finite number >= 0")
    return max(number, 8 * torch.finfo(dtype).eps)


def _unrolled(z: Tensor, log_mu: Tensor, log_nu: Tensor, iters: int) -> Tensor:
    u, v = torch.zeros_like(log_mu), torch.zeros_like(log_nu)
    for _ in range(iters):
        u = log_mu - torch.logsumexp(z + v[..., None, :], -1)
        v = log_nu - torch.logsumexp(z + u[..., :, None], -2)
    return z + u[..., :, None] + v[..., None, :]


def _check(z: Tensor, log_mu: Tensor, log_nu: Tensor) -> None:
    if bool((torch.isnan(z) | (z == math.inf)).any()):
        raise InvalidProblem("the scores have NaN or +inf; -inf masks a pair")
    if bool((z == -math.inf).all(-1).any()) or bool((z == -math.inf).all(-2).any()):
        raise InvalidProblem("a row or a column is masked as a whole; leave each a pair")
    if not bool(torch.isfinite(log_mu).all()) or not bool(torch.isfinite(log_nu).all()):
        raise InvalidProblem("log-weights must be finite; leave out what has no mass")
    a, b = log_mu.double().logsumexp(-1), log_nu.double().logsumexp(-1)
    if bool(((a - b).abs() > 1e-4).any()):
        raise InvalidProblem("log_mu and log_nu have unequal masses: no fixed point; normalise them, or give iters")


def _newton(p: Tensor, a: Tensor, b: Tensor, residual: Tensor) -> Tensor:
    """``S^-1 residual`` for the Schur complement ``S = diag(b) - P' diag(a)^-1 P``, whose kernel is the constants.

    A plan that is a permutation to rounding has more of a kernel; a machine epsilon on the diagonal keeps it out.
    """
    s = torch.diag_embed(b * (1 + 8 * torch.finfo(b.dtype).eps)) - p.mT @ (p / a[..., None])
    weight = b / b.sum(-1, keepdim=True)
    whole = s + weight[..., :, None] * b[..., None, :]
    return torch.linalg.solve_ex(whole, residual[..., None])[0][..., 0]


def _fixed_point(z: Tensor, log_mu: Tensor, log_nu: Tensor, tol: float) -> Tensor:
    """Half-steps, and every second time a Newton step in v, not too far; ends with rows exact."""
    b = log_nu.exp()
    v = torch.zeros_like(log_nu)
    error = math.inf
    for k in range(LIMIT):
        log_p = z + v[..., None, :]
        log_p = log_p + (log_mu - log_p.logsumexp(-1))[..., None]
        columns = log_p.logsumexp(-2)
        rest = b - columns.exp()
        error = float((rest.abs().sum(-1) / b.sum(-1)).max())
        if error <= tol:
            return log_p
        if not math.isfinite(error):
            raise InvalidProblem("masked pairs leave no plan with these marginals; allow more pairs")
        step = log_nu - columns
        if k % 2:
            p = log_p.exp()
            newton = _newton(p, p.sum(-1), p.sum(-2), rest)
            newton = newton - newton.mean(-1, keepdim=True)
            newton = newton * (REACH / newton.abs().amax(-1, keepdim=True).clamp(min=REACH))
            step = torch.where(torch.isfinite(newton).all(-1, keepdim=True), newton, step)
        v = v + step
    warnings.warn(
        f"the marginal error is {error:.1e}, above {tol:.1e}, after {LIMIT} iterations; give a larger tol or divide the scores",
        NotConverged,
        stacklevel=5,
    )
    return log_p


class _Converged(torch.autograd.Function):
    """The fixed point and its implicit derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, log_mu: Tensor, log_nu: Tensor, tol: float) -> Tensor:
        _check(z, log_mu, log_nu)
        log_p = _fixed_point(z, log_mu, log_nu, tol)
        ctx.save_for_backward(log_p)
        return log_p

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (log_p,) = ctx.saved_tensors
        p = log_p.exp()
        a, b = p.sum(-1), p.sum(-2)
        rows, columns = grad.sum(-1), grad.sum(-2)
        beta = _newton(p, a, b, columns - (p.mT @ (rows / a)[..., None])[..., 0])
        alpha = (rows - (p @ beta[..., None])[..., 0]) / a
        # shifting alpha against beta changes nothing; the log-weights share the total between them
        return grad - p * (alpha[..., :, None] + beta[..., None, :]), a * alpha, b * beta, None
