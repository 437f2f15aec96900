"""What the derivatives of solutions share: a first derivative that streams, and a graph of it where one is wanted.

A backward pass runs with gradients enabled where its own derivatives may be asked for (``create_graph=True``).  There it is
written out densely, in operations that autograd follows; where that does not fit, the first derivative comes with a refusal to
be differentiated, which autograd finds wherever it finds the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from .arrays import transformed
from .errors import Unsupported
from .linalg import full_precision
from .memory import lacking

#: Arrays of the size of a plan that a graph of a first derivative holds, about.
DENSE = 24


def pulled_back(function: Callable[..., Any], at: Sequence[Tensor], grads: Any) -> tuple[Tensor | None, ...]:
    """Gradients in the arguments of ``function``, given those in what it returns; inside transforms of torch.func too."""
    if transformed():
        got: tuple[Tensor, ...] = torch.func.vjp(function, *at)[1](grads)
        return got
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in at]
        found = function(*leaves)
        return gradients(found, leaves, grads)


def gradients(found: Any, leaves: Sequence[Tensor], grads: Any) -> tuple[Tensor | None, ...]:
    """Gradients in ``leaves`` of what was found from them, one tensor or several, given those in it; used up by this."""
    pairs = zip(found, grads, strict=True) if isinstance(found, tuple) else ((found, grads),)
    with torch.enable_grad():
        # one number: given gradients of anything else, torch imports its symbolic shapes, and 30 MB of algebra with them
        number = sum(torch.dot(out.reshape(-1), grad.reshape(-1)) for out, grad in pairs)
    assert isinstance(number, Tensor)
    return torch.autograd.grad(number, leaves, allow_unused=True)


def filled(inputs: Sequence[Any], wanted: Sequence[bool], moved: Sequence[Any]) -> list[Any]:
    """``inputs`` with those that are ``wanted`` replaced by ``moved``."""
    rest = iter(moved)
    return [next(rest) if asked else part for part, asked in zip(inputs, wanted, strict=True)]


def of_number(
    number: Callable[..., Tensor],
    inputs: Sequence[Any],
    wanted: Sequence[bool],
    stream: Callable[[], Sequence[Tensor | None]],
    grads: Sequence[Tensor],
    entries: int,
) -> tuple[Tensor | None, ...]:
    """What a backward pass returns: gradients in those of the ``inputs`` that are ``wanted``, None for the others.

    Parameters
    ----------
    number : of the wanted inputs, densely: what the gradients are those of.  What else it depends on is held in the gradients,
        and followed in their graph.
    stream : the same gradients, for all inputs, without a graph.
    grads : what was given to the backward pass.
    entries : of the arrays that a graph holds.
    """
    moving = [part for part, asked in zip(inputs, wanted, strict=True) if asked]
    # views: the derivative is taken at them, and not through what else follows the inputs
    views = [part.view_as(part) for part in moving]
    if not _graph_wanted(views):
        with torch.no_grad():
            return tuple(stream())
    short = lacking(DENSE * 8 * entries, grads[0].device)
    if short is not None:
        with torch.no_grad():
            found = stream()
        why = f"what derivatives of a gradient are made of is dense, and {short}; take them of fewer atoms"
        return refused(found, [*moving, *grads], why)
    with full_precision():
        got = torch.autograd.grad(number(*views), views, create_graph=True, allow_unused=True)
    return tuple(filled([None] * len(inputs), wanted, got))


def _graph_wanted(parts: Sequence[Tensor]) -> bool:
    """Whether a graph of what is computed from ``parts`` is of use to anyone; where a transform has ended, there is none."""
    if not torch.is_grad_enabled():
        return False
    if not transformed():
        return any(part.requires_grad for part in parts)
    # torch.func enables gradients in any backward pass; a graph is of use to the transforms beneath this one
    beneath = [functorch.get_unwrapped(part) for part in parts if functorch.is_gradtrackingtensor(part)]
    return any(part.requires_grad or functorch.is_functorch_wrapped_tensor(part) for part in beneath)


class _Refused(torch.autograd.Function):
    """Its first argument, whose derivatives are refused in all of them."""

    @staticmethod
    def forward(why: str, part: Tensor, *inputs: Tensor) -> Tensor:
        return part.view_as(part)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.why = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise Unsupported(ctx.why)


def refused(parts: Sequence[Tensor | None], inputs: Sequence[Any], why: str) -> tuple[Tensor | None, ...]:
    """``parts``, functions of ``inputs`` without a graph, whose derivatives raise `Unsupported` that says ``why``."""
    moving = [part for part in inputs if isinstance(part, Tensor) and part.requires_grad]
    if not torch.is_grad_enabled() or not moving:
        return tuple(parts)
    return tuple(None if part is None else _Refused.apply(why, part, *moving) for part in parts)  # type: ignore[no-untyped-call]
