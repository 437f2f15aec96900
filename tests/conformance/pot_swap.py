"""POT with its entropic functions swapped for those of sbot, in every module that has bound them; also a pytest plugin.

Modes: "pot" (nothing is swapped), "sbot", "differential" (each call is made on both and compared) and "wrong" (sbot that
returns the independent coupling, and is compared: it must fail).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import os
import sys
import warnings
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

import sbot.compat.pot as ours
from sbot.compat.pot import _solve
from sbot.compat.swap import POT_MODULES, Bindings, targets
from sbot.solvers import Sinkhorn
from tests.conformance import pot_truth

MODES = ("pot", "sbot", "differential", "wrong")
#: Relative difference of plans and values that counts as none, in float64.
CLOSE = 1e-8
#: Values below it are held against it: an objective that is 0 up to rounding has no relative error.
SMALL = 1e-3
#: What a call is repeated with where the two differ: POT has often stopped early.
TIGHT = {"stopThr": 1e-15, "tol": 1e-15, "numItermax": 5_000, "max_iter": 5_000, "numIterMax": 5_000}
#: Iterations of partial plans: POT's are cheap, and slow to converge where most entries underflow.
MANY = 100_000
#: Costs above it join no classes.
FORBIDDEN = 1e300
#: Log entries that are compared, beside plans and values.
LOGS = (("log_u", "log_v"), ("logu", "logv"))


class Swap:
    """Functions of POT replaced, with a count of what was called and of what reached the solver of sbot."""

    def __init__(self, mode: str) -> None:
        assert mode in MODES, mode
        self.mode = mode
        self.calls: Counter[str] = Counter()
        self.solves = 0
        self.verdicts: Counter[str] = Counter()
        self.differences: list[dict[str, Any]] = []
        self._bindings = Bindings()
        self._theirs = 0

    def __enter__(self) -> Swap:
        for module in (*POT_MODULES, "gromov", "lp"):
            importlib.import_module(f"ot.{module}")
        if self.mode == "pot":
            return self
        solved = Sinkhorn.solved

        def counted(solver: Any, *args: Any, **kwargs: Any) -> Any:
            self.solves += 1
            return solved(solver, *args, **kwargs)

        self._set(Sinkhorn, "solved", counted)
        if self.mode == "wrong":
            self._set(_solve.Solved, "plan", property(_independent))
            self._set(_solve.Solved, "linear", property(_independent_cost))
        for target in targets("ot"):
            self._replace(target.name.removeprefix("ot."), target.theirs, target.mine)
        return self

    def __exit__(self, *_: object) -> None:
        self._bindings.undo()

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._bindings.set(owner, name, value)

    def _replace(self, name: str, theirs: Any, mine: Any) -> None:
        """In every module of POT, and in those that have taken it from there."""
        if inspect.isclass(theirs):
            fit = mine.fit

            @functools.wraps(fit)
            def counted(estimator: Any, *args: Any, **kwargs: Any) -> Any:
                self.calls[name] += 1
                given = {**kwargs, **estimator.get_params()}  # as they are before the fit, which changes some
                made = fit(estimator, *args, **kwargs)
                if self.mode != "sbot":
                    both = fitted(theirs, theirs.fit), fitted(mine, fit)
                    self._compare(name, *both, args, given, fitted_parts(made))
                return made

            self._set(mine, "fit", counted)
            new = mine
        else:
            new = self._wrapped(name, theirs, mine)
        self._bindings.replace(theirs, new, "ot")

    def _wrapped(self, name: str, theirs: Any, mine: Any) -> Any:
        @functools.wraps(theirs)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._theirs:  # POT among itself, while it is compared
                return theirs(*args, **kwargs)
            self.calls[name] += 1
            if self.mode == "sbot":
                return mine(*args, **kwargs)
            with ours.strict():
                out = mine(*args, **kwargs)
            self._compare(name, theirs, mine, args, kwargs, out)
            return out

        call.__original__ = theirs  # what forwarded calls are to find
        return call

    # ---- both, side by side --------------------------------------------------------------------------------------

    def _compare(self, name: str, theirs: Any, mine: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not _double(out):
            self.verdicts["not compared: not float64"] += 1
            return
        try:
            other, complained = self._pure(theirs, args, kwargs)
        except Exception as fault:
            self._note("POT raised", name, kwargs, detail=f"{type(fault).__name__}: {fault}")
            return
        gap = difference(out, other)
        if gap <= CLOSE:
            self.verdicts["agree"] += 1
            return
        if any("umerical errors" in text for text in complained):
            self._note("POT failed numerically", name, kwargs, gap)
            return
        bound = inspect.signature(theirs).bind(*args, **kwargs)
        known = inspect.signature(theirs).parameters
        tight = {key: value for key, value in TIGHT.items() if key in known}
        if name.startswith("partial."):
            tight["numItermax"] = MANY
        if "max_inner_iter" in known:  # there max_iter counts problems, not iterations
            tight["max_inner_iter"] = tight.pop("max_iter")
        bound.arguments.update(tight)
        try:
            with ours.strict():
                fine, _ = _quiet(mine, bound.args, bound.kwargs)
            ended, complained = self._pure(theirs, bound.args, bound.kwargs)
        except Exception as fault:
            self._note("POT raised", name, kwargs, gap, f"{type(fault).__name__}: {fault}")
            return
        left = difference(fine, ended)
        if left <= CLOSE:
            self.verdicts["agree where POT is run to the end"] += 1
        elif any("umerical errors" in text for text in complained):
            self._note("POT failed numerically", name, kwargs, left)
        else:
            self._note(pot_truth.verdict(name, bound.arguments, fine, ended, complained), name, kwargs, left)

    def _pure(self, theirs: Any, args: Any, kwargs: Any) -> tuple[Any, list[str]]:
        """A call of POT in which POT calls nothing but itself."""
        self._theirs += 1
        try:
            return _quiet(theirs, args, kwargs)
        finally:
            self._theirs -= 1

    def _note(self, verdict: str, name: str, kwargs: Any, gap: float = float("nan"), detail: str = "") -> None:
        self.verdicts[verdict] += 1
        shown = {key: repr(value)[:40] for key, value in kwargs.items() if not hasattr(value, "shape")}
        test = os.environ.get("PYTEST_CURRENT_TEST", "").split(" ")[0]
        self.differences.append(
            {"verdict": verdict, "name": name, "gap": gap, "options": shown, "detail": detail, "test": test}
        )

    def report(self) -> dict[str, Any]:
        """Everything counted, as plain data."""
        return {
            "mode": self.mode,
            "calls": dict(self.calls.most_common()),
            "solves": self.solves,
            "verdicts": dict(self.verdicts),
            "differences": self.differences,
        }


def _independent(solved: Any) -> Any:
    problem = solved.bridge.problem
    return problem.mu.weights[..., :, None] * problem.nu.weights[..., None, :]


def _independent_cost(solved: Any) -> Any:
    problem = solved.bridge.problem
    return (_independent(solved) * problem.cost.matrix(*problem.sites)).sum((-2, -1))


def _quiet(function: Any, args: Any, kwargs: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as caught, open(os.devnull, "w") as sink:
        warnings.simplefilter("always")
        out, sys.stdout = sys.stdout, sink
        try:
            result = function(*args, **{key: value for key, value in kwargs.items() if key != "strict"})
        finally:
            sys.stdout = out
    return result, [str(warning.message) for warning in caught]


def parts(out: Any) -> dict[str, Any]:
    """What is compared of a result: plans, values, and log-scalings up to their constant."""
    if isinstance(out, tuple) and out and isinstance(out[-1], dict):
        return {**parts(out[0] if len(out) == 2 else out[:-1]), **_scalings(out[-1])}
    if isinstance(out, tuple) and len(out) == 2:
        return _scalings({"log_u": out[0], "log_v": out[1]})
    if hasattr(out, "value_linear"):
        names = ("value", "value_linear", "plan")
        return {name: getattr(out, name) for name in names if getattr(out, name) is not None}
    return {"": out}


def _scalings(log: dict[str, Any]) -> dict[str, Any]:
    for u, v in LOGS:
        if u in log and getattr(log[u], "ndim", 0) == 1:
            return {"u + v": log[u][:, None] + log[v][None, :]}
    return {}


def fitted(kind: Any, fit: Any) -> Any:
    """A fit of a class as a function of the samples and of the constructor's arguments."""

    def function(Xs: Any = None, ys: Any = None, Xt: Any = None, yt: Any = None, **params: Any) -> Any:
        made, names = kind(**params), vars(sys.modules[kind.__module__])
        swapped, names[kind.__name__] = names[kind.__name__], kind  # its methods find their class by name
        try:
            fit(made, Xs=Xs, ys=ys, Xt=Xt, yt=yt)
            return fitted_parts(made)
        finally:
            names[kind.__name__] = swapped

    own = list(inspect.signature(function).parameters.values())[:-1]
    more = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(kind).parameters.values()]
    function.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    return function


def fitted_parts(made: Any) -> Any:
    """The plan of a transport and where it takes its samples, as the parts of a result.

    Labels that part a plan leave a constant between the classes free, and a continuous map depends on it: there only the plan.
    """
    parted = float(made.cost_.max()) > FORBIDDEN and getattr(made, "out_of_sample_map", "") == "continuous"
    moved = None if parted else made.transform(Xs=made.xs_)
    return SimpleNamespace(value=moved, value_linear=None, plan=made.coupling_)


def _plain(value: Any) -> np.ndarray[Any, Any]:
    return np.asarray(value.detach().numpy() if isinstance(value, torch.Tensor) else value)


def _double(out: Any) -> bool:
    first = next(iter(parts(out).values()), None)
    return first is not None and _plain(first).dtype == np.float64


def difference(one: Any, other: Any) -> float:
    """The largest relative difference of what both have, in the maximum norm; infinite for NaN and other shapes."""
    first, second = parts(one), parts(other)
    worst = 0.0
    for name in set(first) & set(second):
        x, y = _plain(first[name]), _plain(second[name])
        if x.shape != y.shape:
            return float("inf")
        if name == "u + v":
            live = np.isfinite(x) & np.isfinite(y) & (y > -600)
            x, y = x[live], y[live]
        gap = np.abs(x - y).max(initial=0.0)
        worst = max(
            worst,
            float(gap / max(np.abs(y).max(initial=0.0), 0.0 if y.ndim else SMALL, 1e-300))
            if np.isfinite(gap)
            else float("inf"),
        )
    return worst


# ---- the plugin ----------------------------------------------------------------------------------------------------


class Plugin:
    """Swaps for the length of a session, and writes what happened to SBOT_CONFORMANCE_OUT."""

    def __init__(self, mode: str) -> None:
        self.swap, self.outcomes = Swap(mode), {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self) -> None:
        self.swap.__exit__()
        self._write()

    def pytest_runtest_logfinish(self) -> None:
        self._write()  # what there is, should the run be cut short

    def _write(self) -> None:
        path = os.environ.get("SBOT_CONFORMANCE_OUT")
        if path:
            with open(path, "w", encoding="utf-8") as file:
                json.dump({**self.swap.report(), "outcomes": self.outcomes}, file, indent=1)


def pytest_configure(config: Any) -> None:
    plugin = Plugin(os.environ.get("SBOT_CONFORMANCE_MODE", "sbot"))
    plugin.swap.__enter__()
    config.pluginmanager.register(plugin, "sbot-swap")
