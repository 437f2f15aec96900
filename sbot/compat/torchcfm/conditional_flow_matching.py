"""TorchCFM's flow matchers: a pair of points, a Gaussian path between them, and its velocity.

Each matcher draws ``x_t = mu_t + sigma_t z`` on the path of a pair and gives the conditional velocity ``u_t`` there, the target
of a regression.  They differ in the path, and in where pairs come from: as given, or from a transport plan.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .optimal_transport import OTPlanSampler

#: What keeps the velocity and the weight finite at both ends; TorchCFM's number.
TINY = 1e-8


def pad_t_like_x(t: Any, x: Tensor) -> Any:
    """Times ``(n,)`` in the shape ``(n, 1, ...)`` that goes with ``x (n, *dim)``; numbers as they are.

    Examples
    --------
    >>> import torch
    >>> from sbot.compat.torchcfm import pad_t_like_x
    >>> pad_t_like_x(torch.rand(5), torch.rand(5, 3, 8, 8)).shape
    torch.Size([5, 1, 1, 1])
    """
    return t if isinstance(t, (float, int)) else t.reshape(-1, *([1] * (x.dim() - 1)))


class ConditionalFlowMatcher:
    """Pairs as given: ``x_t ~ N(t x1 + (1 - t) x0, sigma^2)``, ``u_t = x1 - x0``.

    Points are ``(n, *dim)``, times ``(n,)``.

    Examples
    --------
    >>> import torch
    >>> from sbot.compat.torchcfm import ConditionalFlowMatcher
    >>> x0, x1 = torch.zeros(4, 2), torch.ones(4, 2)
    >>> t, xt, ut = ConditionalFlowMatcher(sigma=0.0).sample_location_and_conditional_flow(x0, x1)
    >>> torch.equal(xt, t[:, None] * x1), torch.equal(ut, x1)
    (True, True)
    """

    def __init__(self, sigma: float = 0.0) -> None:
        self.sigma = sigma

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Any) -> Tensor:
        """The mean of the path at time t."""
        t = pad_t_like_x(t, x0)
        return t * x1 + (1 - t) * x0

    def compute_sigma_t(self, t: Any) -> Any:
        """The standard deviation of the path at time t."""
        return self.sigma

    def sample_xt(self, x0: Tensor, x1: Tensor, t: Any, epsilon: Tensor) -> Tensor:
        """The point of the path for the noise ``epsilon ~ N(0, 1)``."""
        return self.compute_mu_t(x0, x1, t) + pad_t_like_x(self.compute_sigma_t(t), x0) * epsilon

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Any, xt: Tensor) -> Tensor:
        """The velocity of the path at ``xt``."""
        return x1 - x0

    def sample_noise_like(self, x: Tensor) -> Tensor:
        """Standard normal noise."""
        return torch.randn_like(x)

    def sample_location_and_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: Tensor | None = None, return_noise: bool = False
    ) -> tuple[Tensor, ...]:
        """``t, x_t, u_t``, and the noise if asked for; times are uniform on [0, 1] unless given."""
        if t is None:
            t = torch.rand(x0.shape[0]).type_as(x0)
        if len(t) != x0.shape[0]:
            raise ValueError(f"t has {len(t)} times for {x0.shape[0]} points; give one time for each")
        noise = self.sample_noise_like(x0)
        xt = self.sample_xt(x0, x1, t, noise)
        ut = self.compute_conditional_flow(x0, x1, t, xt)
        return (t, xt, ut, noise) if return_noise else (t, xt, ut)

    def compute_lambda(self, t: Any) -> Any:
        """The weight ``2 sigma_t / sigma^2`` of a score regression."""
        return 2 * self.compute_sigma_t(t) / (self.sigma**2 + TINY)


class _PlannedFlowMatcher(ConditionalFlowMatcher):
    """Pairs from a transport plan between the two mini-batches; ``ot_sampler`` draws them."""

    ot_sampler: OTPlanSampler

    def sample_location_and_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: Tensor | None = None, return_noise: bool = False
    ) -> tuple[Tensor, ...]:
        """``t, x_t, u_t`` for pairs from the plan, and the noise if asked for."""
        x0, x1 = self.ot_sampler.sample_plan(x0, x1)
        return super().sample_location_and_conditional_flow(x0, x1, t, return_noise)

    def guided_sample_location_and_conditional_flow(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        t: Tensor | None = None,
        return_noise: bool = False,
    ) -> tuple[Any, ...]:
        """``t, x_t, u_t`` and the labels of both ends, which move with their points; then the noise if asked for."""
        x0, x1, y0, y1 = self.ot_sampler.sample_plan_with_labels(x0, x1, y0, y1)
        t, xt, ut, *noise = super().sample_location_and_conditional_flow(x0, x1, t, return_noise)
        return t, xt, ut, y0, y1, *noise


class ExactOptimalTransportConditionalFlowMatcher(_PlannedFlowMatcher):
    """Pairs from the permutation of least ``|x - y|^2``; paths as in `ConditionalFlowMatcher`.

    Examples
    --------
    >>> import torch
    >>> from sbot.compat.torchcfm import ExactOptimalTransportConditionalFlowMatcher
    >>> x = torch.linspace(0, 1, 9)[:, None]
    >>> t, xt, ut = ExactOptimalTransportConditionalFlowMatcher().sample_location_and_conditional_flow(x, x.flip(0) + 1)
    >>> bool(torch.allclose(ut, torch.ones(9, 1)))
    True
    """

    def __init__(self, sigma: float = 0.0) -> None:
        super().__init__(sigma)
        self.ot_sampler = OTPlanSampler(method="exact")


class TargetConditionalFlowMatcher(ConditionalFlowMatcher):
    """Noise to data: ``x_t ~ N(t x1, (1 - (1 - sigma) t)^2)``, whatever ``x0`` is."""

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Any) -> Tensor:
        return pad_t_like_x(t, x1) * x1

    def compute_sigma_t(self, t: Any) -> Any:
        return 1 - (1 - self.sigma) * t

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Any, xt: Tensor) -> Tensor:
        t = pad_t_like_x(t, x1)
        return (x1 - (1 - self.sigma) * xt) / (1 - (1 - self.sigma) * t)


class SchrodingerBridgeConditionalFlowMatcher(_PlannedFlowMatcher):
    """Brownian bridges of noise ``sigma`` between pairs from the entropic plan of ``eps = sigma^2``.

    ``x_t ~ N(t x1 + (1 - t) x0, sigma^2 t (1 - t))``.  Only with the entropic plan, the default here, is their mixture a
    Schrödinger bridge; ``ot_method="exact"``, the default of TorchCFM, is a mixture over another plan.

    Examples
    --------
    >>> import torch
    >>> from sbot.compat.torchcfm import SchrodingerBridgeConditionalFlowMatcher
    >>> matcher = SchrodingerBridgeConditionalFlowMatcher(sigma=0.5)
    >>> matcher.ot_sampler.method, matcher.ot_sampler.reg
    ('sinkhorn', 0.5)
    """

    def __init__(self, sigma: float = 1.0, ot_method: str = "sinkhorn") -> None:
        if not sigma > 0:
            raise ValueError(f"Sigma must be strictly positive, got {sigma}.")
        super().__init__(sigma)
        self.ot_method = ot_method
        self.ot_sampler = OTPlanSampler(method=ot_method, reg=2 * self.sigma**2)

    def compute_sigma_t(self, t: Any) -> Any:
        return self.sigma * torch.sqrt(t * (1 - t))

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Any, xt: Tensor) -> Tensor:
        t = pad_t_like_x(t, x0)
        slope = (1 - 2 * t) / (2 * t * (1 - t) + TINY)  # of log sigma_t
        return slope * (xt - self.compute_mu_t(x0, x1, t)) + x1 - x0


class VariancePreservingConditionalFlowMatcher(ConditionalFlowMatcher):
    """Trigonometric paths: ``mu_t = cos(pi t / 2) x0 + sin(pi t / 2) x1``, of constant variance for independent ends."""

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Any) -> Tensor:
        t = pad_t_like_x(t, x0)
        return torch.cos(math.pi / 2 * t) * x0 + torch.sin(math.pi / 2 * t) * x1

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Any, xt: Tensor) -> Tensor:
        t = pad_t_like_x(t, x0)
        return math.pi / 2 * (torch.cos(math.pi / 2 * t) * x1 - torch.sin(math.pi / 2 * t) * x0)
