"""The front door: one call from two measures to a bridge."""

from __future__ import annotations

from os import PathLike
from typing import Any

from . import io
from .bridge import Bridge
from .errors import InvalidProblem, Unsupported
from .linalg import full_precision
from .measures import Sampler, as_measure
from .problem import Problem
from .reference import Reference, as_reference
from .solvers import DSB, DSBM, ClosedForm, LightSB, PlugIn, Sinkhorn, Solver
from .unpack import unpack_bridge

#: What "auto" tries, in this order: the first that accepts the problem.
AUTO: tuple[Solver, ...] = (ClosedForm(), Sinkhorn(), DSB())
#: Every solver that can be asked for by name.
SOLVERS: tuple[Solver, ...] = (*AUTO, DSBM(), LightSB(), PlugIn())


def solve_bridge(
    mu: Any,
    nu: Any,
    eps: float | str,
    *,
    reference: Reference | None = None,
    cost: Any = None,
    relax: Any = None,
    solver: str | Solver = "auto",
    init: Bridge | None = None,
    progress: Any = None,
) -> Bridge:
    r"""Solve the Schrödinger bridge (entropic optimal transport) problem from ``mu`` to ``nu``.

    .. math:: \min_P \langle P, C\rangle + \varepsilon\, KL(P \,|\, \mu\otimes\nu)

    over plans with marginals mu and nu, where ``C(x, y) = -eps log p(X_1 = y | X_0 = x)`` is what the reference process
    ``dX = b dt + sqrt(eps) B dW`` charges; Brownian motion charges ``|x - y|^2 / 2``.

    Parameters
    ----------
    mu, nu : points ``(*b, n, d)`` and ``(*b, m, d)`` as tensors or arrays, ``(points, weights)``, any `Measure`, a
        distribution of torch, or, with a cost matrix, the weights ``(n,)`` and ``(m,)`` of two histograms.
    eps : variance of the reference path over [0, 1], in the units of the cost; > 0.  "auto" takes a twentieth of the standard
        deviation of the cost under mu x nu: ``bridge.problem.eps`` is the number, and a note in the report says it.
    reference : `Brownian` (the default), `OrnsteinUhlenbeck`, `LinearSDE`, or `Static`.
    cost : a `Cost`, a function ``(x, y) -> (n, m)`` or a matrix; short for ``reference=Static(cost)``.
    relax : ``(rho_mu, rho_nu)`` or one number: the marginals are then only encouraged, by ``rho KL``; infinite is hard.
    solver : "auto", a name ("sinkhorn", "closedform"), or an object with its options, ``Sinkhorn(tol=1e-9)``.
    init : a bridge to start from.
    progress : None, True for a progress bar, or a function of `Progress`.

    Returns
    -------
    Bridge : its ``report`` says whether and how well it converged.

    Raises
    ------
    InvalidProblem : an argument is wrong; the message names it and says what to do.
    Unsupported : no solver takes this combination; the message has a line for each.

    Examples
    --------
    >>> import torch, sbot
    >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    >>> bridge = sbot.solve_bridge(x, x + 1, eps=0.1)
    >>> bridge.plan()
    tensor([[0.4967, 0.0033],
            [0.0033, 0.4967]], dtype=torch.float64)
    """
    with full_precision():
        problem = Problem.of(mu, nu, eps, reference, cost, relax)
        return choose_solver(problem, solver).solve(problem, init=init, progress=progress)


def choose_solver(problem: Problem, solver: str | Solver = "auto") -> Solver:
    """The solver that would run; raises `Unsupported` with a reason for each one where none accepts.

    Examples
    --------
    >>> import torch, sbot
    >>> sbot.choose_solver(sbot.Problem.of(torch.zeros(2, 1), torch.ones(2, 1), 1.0)).__class__.__name__
    'Sinkhorn'
    """
    if not isinstance(problem, Problem):
        raise InvalidProblem(f"problem is {type(problem).__name__}; make one with sbot.Problem.of(mu, nu, eps)")
    candidates = _candidates(solver)
    sampled = any(isinstance(side, Sampler) for side in (problem.mu, problem.nu))
    refusals = []
    for candidate in candidates:
        refusal = candidate.accepts(problem)
        if refusal is None and isinstance(candidate, DSB) and candidates is AUTO and not sampled:
            refusal = "trains networks, which is done unasked for a Sampler only; ask for it with solver='dsb'"
        if refusal is None:
            return candidate
        refusals.append(f"{type(candidate).__name__}: {refusal}")
    raise Unsupported("no solver takes this problem:\n" + "\n".join(refusals))


def _candidates(solver: str | Solver) -> tuple[Solver, ...]:
    if isinstance(solver, Solver):
        return (solver,)
    names = {type(known).__name__.lower(): known for known in SOLVERS}
    if isinstance(solver, str):
        if solver.lower() == "auto":
            return AUTO
        if solver.lower() in names:
            return (names[solver.lower()],)
    listed = ", ".join(repr(name) for name in ("auto", *names))
    raise InvalidProblem(f"solver is {solver!r}; give {listed}, or an object such as sbot.Sinkhorn(tol=1e-9)")


def load(
    path: str | PathLike[str],
    *,
    reference: Reference | None = None,
    cost: Any = None,
    mu: Any = None,
    nu: Any = None,
    net: Any = None,
    score: Any = None,
) -> Bridge:
    """Read a bridge that `Bridge.save` wrote; nothing in the file is executed.

    ``reference`` or ``cost`` gives again what a file cannot hold: a class or a function of your own; ``mu`` or ``nu`` the
    measure where it was a `Sampler`, without which all works that does not draw from it; ``net`` and ``score`` networks of your
    own, of the shapes that were trained.  Raises `InvalidFile` for a file
    that is damaged, foreign or of a newer version, `InvalidProblem` where what is given does not fit the file,
    `FileNotFoundError` where there is none.

    Examples
    --------
    >>> import os, tempfile, torch, sbot
    >>> path = os.path.join(tempfile.mkdtemp(), "bridge.safetensors")
    >>> sbot.solve_bridge(torch.zeros(1, 2), torch.ones(1, 2), 0.5).save(path)
    >>> sbot.load(path).cost()
    tensor(1.)
    """
    if not isinstance(path, (str, PathLike)):
        raise InvalidProblem(f"path is {path!r}; give the name of a file")
    given = None if reference is None and cost is None else as_reference(reference, cost)
    header, tensors = io.read(path, "bridge")
    ends = (None if mu is None else as_measure(mu, "mu"), None if nu is None else as_measure(nu, "nu"))
    return unpack_bridge(header, tensors, given, ends, net, score)
