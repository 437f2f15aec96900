"""``ot.utils``: `dist`, `unif`, `cost_normalization` and the result class; what is not defined here is POT's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ._arrays import Home, covers, enter, forwarder, pot
from ._costs import dist, unif

__all__ = ["OTResult", "cost_normalization", "dist", "unif"]

__getattr__ = forwarder("utils")


@covers("utils.cost_normalization")
def cost_normalization(C: Any, norm: Any = None, return_value: bool = False, value: Any = None) -> Any:
    """The cost divided by its median or maximum (or by ``value``), or its logarithm once or twice; C itself is left alone."""
    home, (c,) = enter(C)
    factor = None if value is None else enter([value] if not isinstance(value, Tensor) else value)[1][0].reshape(())
    if norm in ("median", "max"):
        if factor is None:
            factor = _median(c) if norm == "median" else c.max()
            value = home.back(factor)
        c = c / factor.to(c)
    elif norm in ("log", "loglog"):
        c = torch.log1p(c) if norm == "log" else torch.log1p(torch.log1p(c))
    elif norm is not None:
        raise ValueError(f"Norm {norm} is not a valid option; give None, 'median', 'max', 'log' or 'loglog'.")
    return (home.back(c), value) if return_value else home.back(c)


def _median(c: Tensor) -> Tensor:
    """The mean of the two in the middle, as NumPy has it."""
    ordered = c.flatten().sort().values
    n = len(ordered)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def _constant(part: Any) -> Any:
    if isinstance(part, tuple):
        return tuple(_constant(each) for each in part)
    return part.detach() if isinstance(part, Tensor) else part


class OTResult:
    """What ``ot.solve`` and its like return: values, plan and potentials, each computed when it is first asked for.

    The attributes are POT's; `report` is sbot's account of the solve.  What does not exist for a problem is None.
    """

    def __init__(
        self,
        home: Home,
        *,
        report: Any = None,
        status: str | None = None,
        log: dict[str, Any] | None = None,
        lazy_plan: Any = None,
        parts: dict[str, Callable[[], Any]],
    ) -> None:
        self._home, self.report, self.status, self.log, self.lazy_plan = home, report, status, log, lazy_plan
        self._parts = parts

    def __getstate__(self) -> dict[str, Any]:
        """With all parts made, as constants, and without what makes them: as results are copied, or sent between processes."""
        made = {name: _constant(getattr(self, name)) for name in ("value", "value_linear", "plan", "potentials")}
        return {**self.__dict__, **made, "_parts": {}}

    def _get(self, name: str) -> Any:
        made = self._parts.get(name)
        out = None if made is None else made()
        if isinstance(out, tuple):
            return tuple(self._home.back(part) if isinstance(part, Tensor) else part for part in out)
        return self._home.back(out) if isinstance(out, Tensor) else out

    @cached_property
    def value(self) -> Any:
        return self._get("value")

    @cached_property
    def value_linear(self) -> Any:
        return self._get("value_linear")

    @property
    def value_quad(self) -> None:
        return None

    @cached_property
    def plan(self) -> Any:
        return self._get("plan")

    @cached_property
    def potentials(self) -> Any:
        return self._get("potentials")

    @property
    def potential_a(self) -> Any:
        return None if self.potentials is None else self.potentials[0]

    @property
    def potential_b(self) -> Any:
        return None if self.potentials is None else self.potentials[1]

    @property
    def sparse_plan(self) -> Any:
        """The plan as a matrix of compressed rows."""
        if self.plan is None:
            return None
        if not self._home.numpy:
            return self.plan.to_sparse_csr()
        from scipy import sparse

        return sparse.csr_matrix(self.plan)

    @property
    def marginal_a(self) -> Any:
        return self._sums(-1)

    @property
    def marginal_b(self) -> Any:
        return self._sums(-2)

    @property
    def marginals(self) -> Any:
        return None if self._sums(-1) is None else (self.marginal_a, self.marginal_b)

    def _sums(self, axis: int) -> Any:
        plan = self.plan
        if plan is None and self.lazy_plan is not None:
            plan = self.lazy_plan[:]
        return None if plan is None else plan.sum(axis)

    @property
    def a_to_b(self) -> Any:
        raise NotImplementedError("use plan, or sbot.solve_bridge(...).transport(x)")

    @property
    def b_to_a(self) -> Any:
        raise NotImplementedError("use plan, or sbot.solve_bridge(...).transport(x) the other way")

    @property
    def _backend(self) -> Any:
        return pot("backend.get_backend")(self._home.back(torch.zeros(1)))

    @property
    def citation(self) -> str:
        return "sbot, see CITATION.cff; the interface is that of POT, https://pythonot.github.io"

    def __repr__(self) -> str:
        shown = [f"{name}={getattr(self, name)}" for name in ("value", "value_linear") if name in self._parts]
        return f"OTResult({', '.join([*shown, f'status={self.status!r}'])})"
