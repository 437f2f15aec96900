"""sbot.compat.pot against POT: signatures, values, logs, warm starts, warnings, dtypes, and the calls where POT fails."""

from __future__ import annotations

import contextvars
import copy
import inspect
import pickle
import warnings

import numpy as np
import ot as theirs
import pytest
import torch

import sbot.compat.pot as ot
from sbot import InvalidProblem, Sinkhorn, Unsupported, solve_bridge

MODULES = ("bregman", "unbalanced", "solvers", "batch", "da", "utils", "partial")
PLANS = ("sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling", "greenkhorn")
UNBALANCED = ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_translation_invariant")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def problem(rng):
    """Weights, weights, cost: 30 and 40 atoms, the largest cost 1."""
    a, b = rng.random(30) + 0.1, rng.random(40) + 0.1
    M = theirs.dist(rng.normal(size=(30, 2)), rng.normal(size=(40, 2)) + 1)
    return a / a.sum(), b / b.sum(), M / M.max()


def pairs():
    for name in MODULES:
        module = getattr(ot, name)
        for covered in getattr(module, "COVERED", ()):
            yield f"{name}.{covered}"
    yield from ("dist", "unif", "sinkhorn", "sinkhorn2", "solve", "solve_sample", "solve_batch", "solve_sample_batch")


def find(module, path):
    for part in path.split("."):
        module = getattr(module, part)
    return module


def close(x, y, tolerance=1e-8):
    x, y = np.asarray(x), np.asarray(y)
    assert x.shape == y.shape
    assert np.abs(x - y).max() <= tolerance * np.abs(y).max()


# ---- the face ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", list(pairs()))
def test_signatures_are_those_of_pot(path):
    ours = inspect.signature(find(ot, path)).parameters.values()
    pot = inspect.signature(find(theirs, path)).parameters.values()
    assert [(p.name, p.kind) for p in ours] == [(p.name, p.kind) for p in pot]
    for one, other in zip(ours, pot, strict=True):
        if callable(one.default) and one.default is not inspect.Parameter.empty:
            assert one.default.__name__ == other.default.__name__
        else:
            assert one.default == other.default or one.default is other.default


def test_what_is_not_covered_is_pots():
    assert ot.emd is theirs.emd
    assert ot.gromov is theirs.gromov
    assert ot.bregman.barycenter is theirs.bregman.barycenter
    assert ot.utils.tic is theirs.utils.tic
    with pytest.raises(AttributeError, match="no_such_function"):
        _ = ot.no_such_function


def test_without_pot_the_rest_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ot", None)
    with pytest.raises(AttributeError, match="POT is not installed"):
        _ = ot.emd
    assert ot.sinkhorn([], [], np.eye(2), 1.0).shape == (2, 2)


def test_importing_does_not_load_pot():
    import subprocess
    import sys

    code = "import sys, sbot.compat.pot as ot; ot.sinkhorn([], [], [[0., 1.], [1., 0.]], 1); print('ot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# ---- plans and values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PLANS)
@pytest.mark.parametrize("reg", [1.0, 0.05])
def test_plans(problem, method, reg):
    a, b, M = problem
    plan, log = ot.sinkhorn(a, b, M, reg, method=method, log=True)
    other, pot = theirs.sinkhorn(a, b, M, reg, method=method, log=True, stopThr=1e-12, numItermax=100_000)
    close(plan, other)
    assert set(log) == set(pot)
    assert np.linalg.norm(plan.sum(0) - b) <= 1e-9


@pytest.mark.parametrize("method", PLANS)
def test_scalings_make_the_plan(problem, method):
    a, b, M = problem
    plan, log = ot.sinkhorn(a, b, M, 0.1, method=method, log=True)
    if "u" in log:
        close(log["u"][:, None] * np.exp(-M / 0.1) * log["v"], plan)
    if "log_u" in log:
        close(np.exp(log["log_u"][:, None] - M / 0.1 + log["log_v"]), plan)
    if "alpha" in log:
        close(np.exp((log["alpha"][:, None] + log["beta"] - M) / 0.1), plan)
        assert all(x is y for x, y in zip(log["warmstart"], (log["alpha"], log["beta"]), strict=True))
    if "logu" in log:
        close(log["logu"] * 0.1, log["alpha"])


@pytest.mark.parametrize("method", PLANS[:3])
def test_values_and_several_targets(problem, rng, method):
    a, b, M = problem
    close(ot.sinkhorn2(a, b, M, 0.1, method=method), theirs.sinkhorn2(a, b, M, 0.1, method=method, stopThr=1e-12))
    targets = np.stack([b, b[::-1], np.full(40, 1 / 40)], 1)
    values, log = ot.sinkhorn(a, targets, M, 0.1, method=method, log=True)
    close(values, [ot.sinkhorn2(a, targets[:, k], M, 0.1, method=method) for k in range(3)])
    assert next(v for key, v in log.items() if "u" in key).shape == (30, 3)
    with pytest.raises(ValueError, match="takes one target"):
        ot.sinkhorn(a, targets, M, 0.1, method="greenkhorn")


@pytest.mark.parametrize("reg", [0.5, 0.05])
@pytest.mark.parametrize("method", PLANS[:3])
def test_several_targets_are_one_solve_and_as_each_by_itself(problem, method, reg, monkeypatch):
    """Values, logs, warnings and gradients, with targets of other masses too."""
    a, b, M = (torch.from_numpy(part) for part in problem)
    targets = torch.stack([b, b.flip(0), torch.full_like(b, 1.1 / 40)], 1)
    solved, whole = [], Sinkhorn.solved
    monkeypatch.setattr(Sinkhorn, "solved", lambda *args, **more: solved.append(1) or whole(*args, **more))
    leaves = [part.clone().requires_grad_() for part in (a, targets, M, torch.tensor(reg, dtype=torch.float64))]
    with pytest.warns(UserWarning, match="a has the mass 1 and b 1.1") as told:
        values, log = ot.sinkhorn(*leaves, method=method, log=True)
    assert len(solved) == 1 and len(told) == 1
    at = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    got = torch.autograd.grad((at * values).sum(), leaves)
    alone = [part.detach().clone().requires_grad_() for part in leaves]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        each = [ot.sinkhorn2(alone[0], alone[1][:, k], *alone[2:], method=method, log=True) for k in range(3)]
    close(values.detach(), [value.detach() for value, _ in each])
    for one, two in zip(
        got, torch.autograd.grad(sum(w * value for w, (value, _) in zip(at, each, strict=True)), alone), strict=True
    ):
        close(one, two, 1e-7)
    key = next(key for key in ("u", "log_u", "logu") if key in log)
    close(log[key].detach(), torch.stack([parts[key] for _, parts in each], 1).detach(), 1e-6)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("width", ["32", "64"])
@pytest.mark.parametrize("method", PLANS)
def test_dtype_and_library_come_back(problem, kind, width, method):
    arrays = [part.astype(f"float{width}") for part in problem]
    if kind == "torch":
        arrays = [torch.from_numpy(part) for part in arrays]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # float32 reaches what it can, and that is not a failure
        plan, log = ot.sinkhorn(*arrays, 0.05, method=method, log=True)
    assert type(plan) is type(arrays[0])
    assert plan.dtype == arrays[0].dtype
    for part in log.values():
        if hasattr(part, "dtype"):
            assert part.dtype == arrays[0].dtype
    value = ot.sinkhorn2(*arrays, 0.05)
    assert value.dtype == arrays[0].dtype
    assert isinstance(value, torch.Tensor if kind == "torch" else np.generic)


def test_lists_empty_weights_mixed_widths_and_integers(problem):
    a, b, M = problem
    uniform = theirs.sinkhorn([], [], M, 0.1, stopThr=1e-13)
    close(ot.sinkhorn([], [], M, 0.1), uniform)
    close(ot.sinkhorn(ot.unif(30).tolist(), [], M, 0.1), uniform)
    assert ot.sinkhorn(a, b, M.astype(np.float32), 0.1).dtype == np.float64
    whole = np.array([[0, 2], [2, 0]])
    assert ot.sinkhorn([], [], whole, 1).dtype == np.float64
    frozen = M.copy()
    frozen.flags.writeable = False
    close(ot.sinkhorn([], [], frozen, 0.1), uniform)
    close(ot.sinkhorn([], [], M[::-1], 0.1), uniform[::-1])


def test_zero_weights_and_forbidden_pairs(problem):
    a, b, M = problem
    a = a.copy()
    a[3] = 0
    a /= a.sum()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = ot.sinkhorn(a, b, M, 0.1)
    assert (plan[3] == 0).all()
    np.testing.assert_allclose(plan.sum(0), b)
    M = M.copy()
    M[0, 0] = np.inf
    assert ot.sinkhorn(a, b, M, 0.1)[0, 0] == 0
    assert np.isfinite(ot.sinkhorn2(a, b, M, 0.1))


# ---- where POT fails -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("method", PLANS)
def test_small_reg(rng, dtype, method):
    x = rng.normal(size=(60, 2))
    M = theirs.dist(x, rng.normal(size=(60, 2)))
    M = (M / M.max()).astype(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan = ot.sinkhorn([], [], M, 5e-4, method=method)
    assert np.isfinite(plan).all()
    assert np.abs(plan.sum(0) - 1 / 60).sum() < (1e-8 if dtype == np.float64 else 1e-3)
    assert np.abs(plan.sum(1) - 1 / 60).sum() < (1e-8 if dtype == np.float64 else 1e-3)


def test_reg_zero_is_exact_and_says_so(problem):
    a, b, M = problem
    with pytest.warns(UserWarning, match="unregularised"):
        plan = ot.sinkhorn(a, b, M, 0, warn=False)
    close(plan, theirs.emd(a, b, M))
    with pytest.warns(UserWarning, match="unregularised"):
        close(ot.sinkhorn2(a, b, M, 0), theirs.emd2(a, b, M))


def test_unequal_masses_are_told_and_end_where_pot_ends(problem):
    a, b, M = problem
    with pytest.warns(UserWarning, match="rescaled to the mass of a"):
        plan = ot.sinkhorn(a, 2 * b, M, 0.1)
    with pytest.warns(UserWarning, match="did not converge"):
        close(plan, theirs.sinkhorn(a, 2 * b, M, 0.1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ot.sinkhorn(a, b * (1 + 1e-10), M, 0.1)


def test_float32_weights_read_as_float64(problem):
    a, b, M = problem
    single = (a.astype(np.float32) * np.float32(1 + 3e-7)).astype(np.float64)
    with pytest.warns(UserWarning, match="rescaled"):
        plan = ot.sinkhorn(single, b, M, 0.1)
    np.testing.assert_allclose(plan.sum(1), single)


# ---- stopping and warnings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PLANS)
def test_warnings(problem, method):
    a, b, M = problem
    with pytest.warns(UserWarning, match="did not converge"):
        ot.sinkhorn(a, b, M, 0.01, method=method, numItermax=1, stopThr=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ot.sinkhorn(a, b, M, 0.01, method=method, numItermax=1, stopThr=0, warn=False)
        ot.sinkhorn(a, b, M, 0.1, method=method)


@pytest.mark.parametrize("most", [1, 3, 10, 50])
@pytest.mark.parametrize("reg", [0.1, 0.01, 0.002])
def test_cut_short_it_is_no_further_off_than_pot(problem, most, reg):
    a, b, M = problem
    ours = ot.sinkhorn(a, b, M, reg, numItermax=most, warn=False)
    pot = theirs.bregman.sinkhorn_log(a, b, M, reg, numItermax=most, warn=False)
    assert np.abs(ours.sum(0) - b).sum() <= np.abs(pot.sum(0) - b).sum() * 1.01 + 1e-9
    np.testing.assert_allclose(ours.sum(1), a, rtol=1e-9)


def test_stopping_threshold_is_the_two_norm_of_the_column_error(problem):
    a, b, M = problem
    for threshold in (1e-2, 1e-4, 1e-6):
        plan, log = ot.sinkhorn(a, b, M, 0.01, stopThr=threshold, log=True)
        error = np.linalg.norm(plan.sum(0) - b)
        assert error <= threshold
        assert log["err"][-1] == pytest.approx(error, rel=1e-4, abs=1e-15)


@pytest.mark.parametrize("method", PLANS)
def test_warm_starts(problem, method):
    a, b, M = problem
    plan, log = ot.sinkhorn(a, b, M, 0.02, method=method, log=True)
    key = "niter" if "niter" in log else "n_iter"
    start = log["warmstart"] if "warmstart" in log else (np.log(log["u"]), np.log(log["v"]))
    again, warm = ot.sinkhorn(a, b, M, 0.02, method=method, log=True, warmstart=start)
    close(again, plan, 1e-7)
    assert warm[key] <= 1 < log[key]
    with pytest.raises(ValueError, match="warmstart"):
        ot.sinkhorn(a, b, M, 0.02, method=method, warmstart=(start[1], start[0]))


def test_verbose_prints_a_table(problem, capsys):
    ot.sinkhorn(*problem, 0.1, verbose=True)
    assert capsys.readouterr().out.startswith("It.  |Err")


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a, b, M: ot.sinkhorn(a, b, M, 0.1, method="new"), "Unknown method 'new'. Give one of: sinkhorn,"),
        (lambda a, b, M: ot.sinkhorn2(a, b, M, 0.1, method="greenkhorn"), "Unknown method"),
        (lambda a, b, M: ot.sinkhorn(b, a, M, 0.1), "give a of shape"),
        (lambda a, b, M: ot.sinkhorn(a, b, M[0], 0.1), "give a cost matrix"),
        (lambda a, b, M: ot.sinkhorn(a, b, M, -1.0), "reg is -1"),
        (lambda a, b, M: ot.sinkhorn(a, b, M, "auto"), "reg is the string"),
        (lambda a, b, M: ot.sinkhorn(a, b, M, float("nan")), "reg is NaN"),
        (lambda a, b, M: ot.sinkhorn(a, b, M * np.nan, 1.0), "NaN"),
        (lambda a, b, M: ot.sinkhorn(-a, b, M, 1.0), "a has weights"),
        (lambda a, b, M: ot.sinkhorn(a, torch.from_numpy(b), M, 1.0), "one library"),
        (lambda a, b, M: ot.sinkhorn(a, b, M, 1.0, numItermax=0), "numItermax"),
        (lambda a, b, M: ot.solve(M, reg=1.0, method="new"), "Unknown method"),
        (lambda a, b, M: ot.solve(M, reg=1.0, grad="new"), "Unknown grad"),
        (lambda a, b, M: ot.solve(M.tolist(), reg=1.0), "M is a list"),
        (lambda a, b, M: ot.solve(M, reg=1.0, plan_init=M), "plan_init"),
        (lambda a, b, M: ot.solve(M, reg=1.0, potentials_init="zeros"), "potentials_init"),
        (lambda a, b, M: ot.solve_sample(M, M, reg=1.0, method="new"), "Unknown method"),
        (lambda a, b, M: ot.solve_batch(M[None], reg=1.0, method="new"), "Unknown method"),
        (lambda a, b, M: ot.sinkhorn_unbalanced(a, b, M, 1.0, 1.0, method="new"), "Unknown method"),
        (lambda a, b, M: ot.sinkhorn_unbalanced(a, b, M, 1.0, [1, 2, 3]), "reg_m has 3 entries"),
        (lambda a, b, M: ot.sinkhorn_unbalanced2(a, b, M, 1.0, 1.0, returnCost="all"), "returnCost"),
    ],
)
def test_wrong_arguments(problem, call, message):
    with pytest.raises(ValueError, match=message):
        call(*problem)


def test_unknown_keywords_are_errors_that_list_the_known_ones(problem):
    with pytest.raises(TypeError, match=r"unknown argument 'numIter'; .*strict"):
        ot.sinkhorn(*problem, 0.1, numIter=3)
    ot.sinkhorn(*problem, 0.1, tau=100.0, print_period=3)


def test_unknown_types_raise_what_pot_raises(problem):
    _, _, M = problem
    for call in (ot.solve, theirs.solve):
        with pytest.raises(NotImplementedError):
            call(M, reg=1.0, reg_type="cryptic")
        with pytest.raises(NotImplementedError):
            call(M, reg=1.0, unbalanced=1.0, unbalanced_type="cryptic")
    with pytest.raises(Unsupported, match="sqeuclidean, euclidean, cityblock"):
        ot.solve_sample(np.ones((3, 2)), np.ones((3, 2)), reg=1.0, metric="chebyshev", lazy=True)


# ---- gradients -----------------------------------------------------------------------------------------------------


def tensors(problem):
    return [torch.from_numpy(part).requires_grad_() for part in problem]


def centred(g):
    return g - g.mean()


def test_gradients_of_plans_and_linear_values(problem):
    direction = torch.from_numpy(np.random.default_rng(1).normal(size=(30, 40)))
    grads = {}
    for name, library in (("ours", ot), ("theirs", theirs)):
        a, b, M = tensors(problem)
        plan = library.sinkhorn(a, b, M, 0.1, stopThr=1e-13, numItermax=5000)
        value = library.sinkhorn2(a, b, M, 0.1, stopThr=1e-13, numItermax=5000)
        ((plan * direction).sum() + value).backward()
        grads[name] = centred(a.grad), centred(b.grad), M.grad
    for one, other in zip(grads["ours"], grads["theirs"], strict=True):
        close(one, other, 1e-6)


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
@pytest.mark.parametrize("grad", ["autodiff", "envelope"])
def test_gradient_of_the_value_of_solve(problem, reg_type, grad):
    grads = {}
    for name, library, kind in (("ours", ot, grad), ("theirs", theirs, "autodiff")):
        a, b, M = tensors(problem)
        library.solve(M, a, b, reg=0.1, reg_type=reg_type, grad=kind, tol=1e-13, max_iter=5000).value.backward()
        grads[name] = centred(a.grad), centred(b.grad), M.grad
    for one, other in zip(grads["ours"], grads["theirs"], strict=True):
        close(one, other, 1e-6)


SECOND = {
    "plan": lambda library, a, b, M: library.sinkhorn(a, b, M, 0.1, stopThr=1e-14, numItermax=5000).square().sum(),
    "linear": lambda library, a, b, M: library.sinkhorn2(a, b, M, 0.1, stopThr=1e-14, numItermax=5000),
    "value": lambda library, a, b, M: library.solve(M, a, b, reg=0.1, tol=1e-14, max_iter=5000).value,
    "linear of solve": lambda library, a, b, M: library.solve(M, a, b, reg=0.1, tol=1e-14, max_iter=5000).value_linear,
    "unbalanced": lambda library, a, b, M: library.unbalanced.sinkhorn_unbalanced2(
        a, b, M, 0.1, 1.0, stopThr=1e-14, numItermax=5000
    ).sum(),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives(name, problem):
    """POT's go through its iterations, which have converged."""
    a, b, M = tensors(problem)
    way = torch.rand(M.shape, generator=torch.Generator().manual_seed(0), dtype=M.dtype)
    products = []
    for library in (ot, theirs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (first,) = torch.autograd.grad(SECOND[name](library, a, b, M), M, create_graph=True)
        products.append(torch.autograd.grad((first * way).sum(), M)[0])
    assert float(products[1].abs().max()) > 1e-6
    close(*products, 1e-7)


def test_what_grad_attaches(problem):
    a, b, M = tensors(problem)
    assert not ot.solve(M, a, b, reg=0.1, grad="detach").value.requires_grad
    held = ot.solve(M, a, b, reg=0.1, grad="envelope")
    assert held.value.requires_grad
    assert not held.plan.requires_grad
    assert not held.value_linear.requires_grad
    assert ot.solve(M, a, b, reg=0.1, grad="last_step").plan.requires_grad
    with torch.no_grad():
        assert not ot.sinkhorn(a, b, M, 0.1).requires_grad


# ---- solve ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reg_type", ["KL", "entropy"])
def test_solve(problem, reg_type):
    a, b, M = problem
    ours = ot.solve(M, a, b, reg=0.1, reg_type=reg_type)
    pot = theirs.solve(M, a, b, reg=0.1, reg_type=reg_type, tol=1e-13)
    for name in ("plan", "value", "value_linear", "marginal_a", "marginal_b"):
        close(getattr(ours, name), getattr(pot, name))
    close(ours.sparse_plan.toarray(), ours.plan)
    close(np.exp(ours.potential_a[:, None] + ours.potential_b - M / 0.1), ours.plan)
    assert ours.status == "Converged"
    assert ours.report.converged
    assert ours.value_quad is None
    assert ours.lazy_plan is None
    with pytest.raises(NotImplementedError):
        _ = ours.a_to_b


def test_solve_scales_with_the_mass(problem):
    a, b, M = problem
    ours, pot = (lib.solve(M, 3 * a, 3 * b, reg=0.1, tol=1e-13) for lib in (ot, theirs))
    close(ours.value, pot.value)


def test_solve_uses_potentials_init_and_c(problem, rng):
    a, b, M = problem
    first = ot.solve(M, a, b, reg=0.02)
    assert ot.solve(M, a, b, reg=0.02, potentials_init=first.potentials).report.iterations <= 2
    c = rng.random((30, 40)) + 0.5
    ours = ot.solve(M, a, b, reg=0.1, c=c)
    close(ours.plan, theirs.sinkhorn(a, b, M - 0.1 * np.log(c), 0.1, stopThr=1e-13))
    close(ours.value_linear, (ours.plan * M).sum())
    close(ours.value, (ours.plan * M).sum() + 0.1 * (ours.plan * np.log(ours.plan / c)).sum())


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cityblock"])
@pytest.mark.parametrize("unbalanced", [None, 1.0])
def test_solve_sample(rng, lazy, metric, unbalanced):
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(25, 3))
    ours = ot.solve_sample(x, y, metric=metric, reg=0.5, unbalanced=unbalanced, lazy=lazy)
    M = theirs.dist(x, y, metric=metric)
    pot = theirs.solve(M, reg=0.5, unbalanced=unbalanced, tol=1e-13, max_iter=10_000)
    close(ours.lazy_plan[:] if lazy else ours.plan, pot.plan)
    close(ours.value_linear, pot.value_linear)
    u, v = ours.potentials
    close(u[:, None] + v, pot.potentials[0][:, None] + pot.potentials[1], 1e-6)
    if unbalanced is None:
        close(ours.value, pot.value)
    else:
        close(ours.value, objective(pot.plan, M, 0.5, np.full(20, 1 / 20), np.full(25, 1 / 25), 1.0, 1.0), 1e-7)
    if lazy:
        assert ours.plan is None
        close(ours.lazy_plan[3:5, 2], pot.plan[3:5, 2:3])
        close(ours.marginal_b, pot.marginal_b)


def test_methods_named_sinkhorn_have_values_and_plans(rng):
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(25, 3))
    assert theirs.solve_sample(x, y, reg=0.5, method="sinkhorn").value is None
    result = ot.solve_sample(x, y, reg=0.5, method="sinkhorn")
    close(result.value, theirs.solve_sample(x, y, reg=0.5, tol=1e-13).value)
    assert result.plan.shape == (20, 25)


@pytest.mark.parametrize("lazy", [False, True])
def test_debiased(rng, lazy):
    x, y = rng.normal(size=(20, 2)), rng.normal(size=(20, 2)) + 1
    result = ot.solve_sample(x, y, reg=0.5, debias=True, lazy=lazy)
    close(result.value, theirs.solve_sample(x, y, reg=0.5, debias=True, tol=1e-13).value)
    assert abs(ot.solve_sample(x, x, reg=0.5, debias=True, lazy=lazy).value) < 1e-12
    assert set(result.log) == {"res_aa", "res_bb", "res_ab"}


def test_a_scaler_scales_both(rng):
    x, y = rng.normal(size=(20, 2)), rng.normal(size=(20, 2)) + 1
    close(ot.solve_sample(x, y, reg=1.0, scaler=lambda z: 0 * z).value_linear, 0.0, 1.0)
    with ot.strict():
        close(
            ot.solve_sample(x, y, reg=1.0, scaler=lambda z: 0 * z).value,
            theirs.solve_sample(x, y, reg=1.0, scaler=lambda z: 0 * z).value,
        )


def test_gradients_of_samples(rng):
    for lazy in (False, True):
        x, y = (torch.from_numpy(rng.normal(size=(12, 2))).requires_grad_() for _ in range(2))
        ot.solve_sample(x, y, reg=0.5, lazy=lazy, tol=1e-12).value.backward()
        z, w = (part.detach().clone().requires_grad_() for part in (x, y))
        theirs.solve_sample(z, w, reg=0.5, tol=1e-13, max_iter=5000).value.backward()
        close(x.grad, z.grad, 1e-6)
        close(y.grad, w.grad, 1e-6)


# ---- batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["auto", "sinkhorn", "log_sinkhorn"])
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
def test_batches(rng, method, reg_type):
    M = rng.random((4, 10, 12))
    ours = ot.solve_batch(M, reg=0.1, method=method, reg_type=reg_type, tol=1e-12)
    pot = theirs.solve_batch(M, reg=0.1, method=method, reg_type=reg_type, tol=1e-13, max_iter=10_000)
    for name in ("plan", "value", "value_linear"):
        close(getattr(ours, name), getattr(pot, name))
    assert list(ours.log) == list(pot.log)
    x = rng.random(size=(3, 5, 2))
    close(
        ot.solve_sample_batch(x, x + 1, reg=1.0, tol=1e-12).value,
        theirs.solve_sample_batch(x, x + 1, reg=1.0, tol=1e-13).value,
    )
    for metric in ("sqeuclidean", "euclidean", "minkowski"):
        np.testing.assert_allclose(
            ot.dist_batch(x, x + 1, metric=metric), theirs.dist_batch(x, x + 1, metric=metric), atol=1e-12
        )


def test_gradients_of_batches_are_right_in_the_weights_too(rng):
    grads = {}
    for name, library, grad in (("ours", ot, "envelope"), ("theirs", theirs, "autodiff")):
        M = torch.from_numpy(np.random.default_rng(1).random((2, 5, 6))).requires_grad_()
        a, b = (torch.softmax(torch.arange(2.0 * k).double().reshape(2, k), 1) for k in (5, 6))
        a, b = a.requires_grad_(), b.requires_grad_()
        out = library.solve_batch(M, reg=0.1, a=a, b=b, reg_type="entropy", grad=grad, tol=1e-13, max_iter=5000)
        grads[name] = torch.autograd.grad(out.value.sum(), (M, a, b))
    close(grads["ours"][0], grads["theirs"][0], 1e-6)
    for k in (1, 2):
        ours, pot = (grads[name][k] for name in ("ours", "theirs"))
        close(ours - ours.mean(1, keepdim=True), pot - pot.mean(1, keepdim=True), 1e-6)


# ---- relaxed marginals -----------------------------------------------------------------------------------------------


def kl(p, q):
    return (p * np.log(p / q) - p + q).sum()


def objective(P, M, reg, a, b, rho_a, rho_b, c=None):
    c = a[:, None] * b if c is None else c
    return (P * M).sum() + reg * kl(P, c) + rho_a * kl(P.sum(1), a) + rho_b * kl(P.sum(0), b)


@pytest.mark.parametrize("method", UNBALANCED)
@pytest.mark.parametrize("reg_type", ["kl", "entropy"])
@pytest.mark.parametrize("reg_m", [1.0, (0.5, 2.0), (float("inf"), 1.0)])
@pytest.mark.filterwarnings("ignore:If reg_type")
def test_unbalanced_plans(problem, method, reg_type, reg_m):
    a, b, M = problem
    ours, log = ot.sinkhorn_unbalanced(a, 2 * b, M, 0.1, reg_m, method=method, reg_type=reg_type, log=True)
    pot, other = theirs.sinkhorn_unbalanced(
        a, 2 * b, M, 0.1, reg_m, reg_type=reg_type, log=True, stopThr=1e-15, numItermax=20_000
    )
    close(ours, pot)
    assert set(log) == set(other)
    close(log["logu"][:, None] + log["logv"], other["logu"][:, None] + other["logv"], 1e-6)
    close(log["cost"], other["cost"])


def test_the_objective_has_its_mass_terms(problem, rng):
    a, b, M = problem
    P = ot.sinkhorn_unbalanced(a, b, M, 0.1, 1.0)
    total = ot.sinkhorn_unbalanced2(a, b, M, 0.1, 1.0, returnCost="total")
    close(total, objective(P, M, 0.1, a, b, 1.0, 1.0))
    close(ot.solve(M, a, b, reg=0.1, unbalanced=1.0).value, total)
    c = rng.random((30, 40)) + 0.5
    P, log = ot.sinkhorn_unbalanced(a, b, M, 0.1, 1.0, c=c, log=True)
    close(log["total_cost"], objective(P, M, 0.1, a, b, 1.0, 1.0, c))
    close(P, theirs.sinkhorn_unbalanced(a, b, M, 0.1, 1.0, c=c, stopThr=1e-15, numItermax=20_000))


def test_strict_leaves_the_mass_terms_out(problem):
    a, b, M = problem
    pot = theirs.sinkhorn_unbalanced2(a, b, M, 0.1, 1.0, returnCost="total", stopThr=1e-15)
    ours = ot.sinkhorn_unbalanced2(a, b, M, 0.1, 1.0, returnCost="total", strict=True)
    assert abs(pot) < 1e-9
    assert abs(ours) < 1e-9
    with ot.strict():
        assert abs(ot.solve(M, a, b, reg=0.1, unbalanced=1.0).value) < 1e-9
        assert abs(ot.sinkhorn_unbalanced2(a, b, M, 0.1, 1.0, returnCost="total", strict=False)) > 1e-3


def test_unbalanced_targets_warm_starts_and_gradients(problem):
    a, b, M = problem
    targets = np.stack([b, 2 * b], 1)
    with pytest.warns(UserWarning, match="Use entropy"):
        ours = ot.sinkhorn_unbalanced2(a, targets, M, 0.1, 1.0)
    with pytest.warns(UserWarning, match="Use entropy"):
        close(ours, theirs.sinkhorn_unbalanced2(a, targets, M, 0.1, 1.0, stopThr=1e-15, numItermax=20_000))
    plan, log = ot.sinkhorn_unbalanced(a, b, M, 0.1, 1.0, log=True)
    again = ot.sinkhorn_unbalanced(a, b, M, 0.1, 1.0, warmstart=(log["logu"], log["logv"]), numItermax=1)
    close(again, plan)
    grads = {}
    for name, library in (("ours", ot), ("theirs", theirs)):
        tracked = tensors(problem)
        library.sinkhorn_unbalanced2(*tracked, 0.1, 1.0, stopThr=1e-14, numItermax=5000).backward()
        grads[name] = [part.grad for part in tracked]
    for one, other in zip(grads["ours"], grads["theirs"], strict=True):
        close(one, other, 1e-6)


def test_unbalanced_at_small_reg_is_finite(problem):
    a, b, M = problem
    plan = ot.sinkhorn_unbalanced(a, b, M, 1e-4, 1.0)
    assert np.isfinite(plan).all()
    assert 0.1 < plan.sum() < 1.5


def test_unbalanced_that_is_cut_short_says_so(problem):
    with pytest.warns(UserWarning, match="did not converge"):
        ot.sinkhorn_unbalanced(*problem, 1e-3, 10.0, numItermax=1, stopThr=1e-12)


# ---- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", [False, True])
def test_empirical(rng, lazy):
    x, y = rng.normal(size=(20, 2)), rng.normal(size=(25, 2)) + 1
    M = theirs.dist(x, y)
    pot = theirs.sinkhorn([], [], M, 1.0, stopThr=1e-13)
    out = ot.bregman.empirical_sinkhorn(x, y, 1.0, isLazy=lazy)
    close(np.exp(out[0][:, None] + out[1] - M) if lazy else out, pot)
    value, log = ot.bregman.empirical_sinkhorn2(x, y, 1.0, isLazy=lazy, log=True)
    close(value, (pot * M).sum())
    _, other = theirs.bregman.empirical_sinkhorn2(x, y, 1.0, isLazy=lazy, log=True)
    assert set(log) == set(other)
    if lazy:
        close(log["lazy_plan"][:], pot)
        with pytest.raises(ValueError, match="Batch size"):
            ot.bregman.empirical_sinkhorn(x, y, 1.0, isLazy=True, batchSize="large")


def test_divergence_is_the_published_one(rng):
    x, y = rng.normal(size=(20, 2)), rng.normal(size=(20, 2)) + 1
    truth = theirs.solve_sample(x, y, reg=1.0, debias=True, tol=1e-13).value
    for lazy in (False, True):
        value, log = ot.bregman.empirical_sinkhorn_divergence(x, y, 1.0, log=True, isLazy=lazy)
        close(value, truth)
        parts = log["sinkhorn_loss_ab"] - (log["sinkhorn_loss_a"] + log["sinkhorn_loss_b"]) / 2
        close(value, parts)
    pot = theirs.bregman.empirical_sinkhorn_divergence(x, y, 1.0, stopThr=1e-13)
    close(ot.bregman.empirical_sinkhorn_divergence(x, y, 1.0, strict=True), pot)
    assert ot.bregman.empirical_sinkhorn_divergence(x, x, 1.0) < 1e-12


# ---- domain adaptation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "median", "max", "log", "loglog"])
@pytest.mark.parametrize("kind", ["continuous", "ferradans"])
def test_sinkhorn_transport(rng, norm, kind):
    x, y, new = rng.normal(size=(20, 2)), rng.normal(size=(25, 2)) + 2, rng.normal(size=(7, 2))
    labels = rng.integers(0, 3, 20)
    options = {"norm": norm, "out_of_sample_map": kind, "tol": 1e-12}
    ours = ot.da.SinkhornTransport(**options).fit(Xs=x, Xt=y)
    pot = theirs.da.SinkhornTransport(**options).fit(Xs=x, Xt=y)
    for name in ("cost_", "coupling_", "mu_s", "mu_t"):
        close(getattr(ours, name), getattr(pot, name))
    for method, points in (("transform", x), ("transform", new)):
        close(getattr(ours, method)(points), getattr(pot, method)(points))
    for points in (y, new):
        close(ours.inverse_transform(Xt=points), pot.inverse_transform(Xt=points))
    close(ours.transform_labels(labels), pot.transform_labels(labels))
    close(ours.inverse_transform_labels(y[:, 0] > 2), pot.inverse_transform_labels((y[:, 0] > 2).astype(int)))


def test_labels_on_both_sides(rng):
    x, y = rng.normal(size=(20, 2)), rng.normal(size=(25, 2)) + 2
    ys, yt = rng.integers(0, 2, 20), rng.integers(-1, 2, 25)
    for limit in (np.inf, 10):
        options = {"limit_max": limit, "tol": 1e-12, "out_of_sample_map": "ferradans", "method": "sinkhorn"}
        ours = ot.da.SinkhornTransport(**options).fit(x, ys, y, yt)
        pot = theirs.da.SinkhornTransport(**options).fit(x, ys, y, yt)
        np.testing.assert_allclose(ours.cost_, pot.cost_)
        close(ours.coupling_, pot.coupling_)
        assert ours.limit_max == limit


@pytest.mark.parametrize("name", ["SinkhornTransport", "SinkhornLpl1Transport"])
def test_nan_is_no_label(rng, name):
    """skada masks the targets of a regression with it; POT takes it for a label that fits no other, and returns NaN."""
    x, y, ys = rng.normal(size=(20, 2)), rng.normal(size=(25, 2)) + 2, np.arange(20) % 4 / 2
    without, masked = (getattr(ot.da, name)().fit(Xs=x, ys=ys, Xt=y, yt=yt) for yt in (None, np.full(25, np.nan)))
    np.testing.assert_array_equal(masked.cost_, without.cost_)
    close(masked.coupling_, without.coupling_)


def test_unbalanced_and_class_transports(rng):
    x, y, ys = rng.normal(size=(20, 2)), rng.normal(size=(25, 2)) + 2, rng.integers(0, 2, 20)
    ours = ot.da.UnbalancedSinkhornTransport(max_iter=1000).fit(Xs=x, Xt=y)
    pot = theirs.da.UnbalancedSinkhornTransport(max_iter=5000, tol=1e-15).fit(Xs=x, Xt=y)
    close(ours.coupling_, pot.coupling_)
    close(ours.transform(x), pot.transform(x))
    options = {"max_inner_iter": 5000, "tol": 1e-13}
    ours, pot = (lib.da.SinkhornLpl1Transport(**options).fit(Xs=x, ys=ys, Xt=y) for lib in (ot, theirs))
    close(ours.coupling_, pot.coupling_)


def test_transports_in_torch_and_their_parameters(rng):
    x = torch.from_numpy(rng.normal(size=(10, 2))).float()
    transport = ot.da.SinkhornTransport()
    assert transport.get_params() == {**theirs.da.SinkhornTransport().get_params(), **changed(transport)}
    moved = transport.set_params(reg_e=0.5).fit_transform(Xs=x, Xt=x + 1)
    assert moved.dtype == torch.float32
    with pytest.raises(ValueError, match="Invalid parameter reg "):
        transport.set_params(reg=1)
    with pytest.raises(ValueError, match="Xt must be given"):
        transport.fit(Xs=x)
    with pytest.raises(ValueError, match="continuous"):
        ot.da.SinkhornTransport(out_of_sample_map="nearest")
    with pytest.warns(UserWarning, match="method has been set"):
        ot.da.SinkhornTransport(method="sinkhorn").fit(Xs=x, Xt=x)


def changed(transport):
    return {"distribution_estimation": transport.distribution_estimation}


# ---- distances, strictness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["sqeuclidean", "euclidean", "cityblock", "cosine"])
def test_distances(rng, metric):
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(25, 3))
    np.testing.assert_allclose(ot.dist(x, y, metric=metric), theirs.dist(x, y, metric=metric), atol=1e-12)
    np.testing.assert_allclose(ot.dist(x, metric=metric), theirs.dist(x, metric=metric), atol=1e-7)
    tracked = torch.from_numpy(x).requires_grad_()
    if metric != "cosine":
        ot.dist(tracked, tracked, metric=metric).sum().backward()
        assert torch.isfinite(tracked.grad).all()
    assert ot.unif(3, type_as=x.astype(np.float32)).dtype == np.float32


def test_distances_far_from_the_origin(rng):
    x, y = rng.normal(size=(20, 3)), rng.normal(size=(25, 3))
    np.testing.assert_allclose(ot.dist(x + 1e6, y + 1e6), theirs.dist(x, y), rtol=1e-6)


def test_strictness_is_of_the_context_alone():
    seen = []
    with ot.strict():
        contextvars.Context().run(lambda: seen.append(ot.solvers.is_strict()))
        assert ot.solvers.is_strict()
        with ot.strict(False):
            assert not ot.solvers.is_strict()
    assert seen == [False]
    assert not ot.solvers.is_strict()


def test_arrays_of_other_libraries_go_to_pot(problem):
    class Foreign:
        __module__ = "jax.somewhere"

    a, b, _ = problem
    with pytest.raises((ValueError, TypeError)):  # POT's own refusal
        ot.sinkhorn(a, b, Foreign(), 0.1)
    with pytest.raises(ValueError, match="NumPy arrays, torch tensors and lists"):
        ot.sinkhorn(a, b, object(), 0.1)
    assert issubclass(InvalidProblem, ValueError)


def test_unbalanced_transport_gets_the_iterations_it_needs():
    """Its default of ten, of POT's, is far too few at small reg; what they stand for here is not."""
    rng = np.random.default_rng(0)
    xs, xt = rng.normal(size=(120, 2)), 0.7 * rng.normal(size=(110, 2)) + 1
    top = ((xs[:, None] - xt) ** 2).sum(-1).max()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made = ot.da.UnbalancedSinkhornTransport(reg_e=1e-4 * top, reg_m=0.1 * top).fit(Xs=xs, Xt=xt)
    cost = torch.from_numpy(((xs[:, None] - xt) ** 2).sum(-1))
    want = solve_bridge(
        torch.full((120,), 1 / 120, dtype=torch.float64),
        torch.full((110,), 1 / 110, dtype=torch.float64),
        1e-4 * float(top),
        cost=cost,
        relax=0.1 * float(top),
        solver=Sinkhorn(tol=1e-11),
    ).plan()
    np.testing.assert_allclose(made.coupling_, want.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", ["sinkhorn", "sinkhorn_log"])
def test_parts_of_different_masses_end_where_the_iterations_do(method):
    """Classes of other shares on the two sides: rows are met, columns have the mass of the rows of their part."""
    draw = np.random.default_rng(0)
    M = draw.random((6, 7))
    M[:3, :4] = M[3:, 4:] = np.inf
    a, b = draw.random(6) + 0.1, draw.random(7) + 0.1
    a, b = a / a.sum(), b / b.sum()
    with pytest.warns(UserWarning, match="each part"):
        plan = ot.sinkhorn(a, b, M, 0.1, method=method)
    np.testing.assert_allclose(plan.sum(1), a, rtol=1e-9)
    shares = plan.sum(0) / b
    np.testing.assert_allclose(
        shares, np.repeat([a[3:].sum() / b[:4].sum(), a[:3].sum() / b[4:].sum()], [4, 3]), rtol=1e-9
    )
    with pytest.warns(UserWarning, match="did not converge"):
        other = theirs.sinkhorn(a, b, M, 0.1)
    np.testing.assert_allclose(plan, other, rtol=1e-7)


def test_a_part_with_mass_on_one_side_only_is_refused():
    M = np.array([[0.0, 1.0, np.inf], [1.0, 0.0, np.inf]])
    with pytest.raises(ValueError, match="column 2"):
        ot.sinkhorn([0.5, 0.5], [0.3, 0.3, 0.4], M, 1.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_distances_within_a_cloud_are_symmetric_to_the_bit(dtype):
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(dtype)
    x[0] *= 1e4
    for metric in ("sqeuclidean", "euclidean", "cityblock"):
        apart = ot.dist(x, x.copy(), metric=metric)
        assert (apart == apart.T).all()
        assert (np.diag(apart) == 0).all()


def test_labels_may_be_strings():
    x = np.random.default_rng(0).normal(size=(4, 2))
    plans = [
        library.da.SinkhornLpl1Transport(reg_e=3.0).fit(Xs=x, ys=np.array(labels), Xt=x + 1).coupling_
        for library, labels in ((ot, ["u", "u", "v", "v"]), (ot, [0, 0, 1, 1]), (theirs, ["u", "u", "v", "v"]))
    ]
    np.testing.assert_array_equal(plans[0], plans[1])
    np.testing.assert_allclose(plans[0], plans[2], rtol=1e-6)


def half_steps(a, b, M, most=10_000):
    """The plan after so many, rows last, in logarithms."""
    log_a, log_b, log_k = (torch.from_numpy(part) for part in (np.log(a), np.log(b), -M))
    u = torch.zeros_like(log_a)
    for _ in range(most):
        v = log_b - torch.logsumexp(log_k + u[:, None], 0)
        u = log_a - torch.logsumexp(log_k + v, 1)
    return (u[:, None] + log_k + v).exp().numpy()


@pytest.mark.parametrize("seed", range(12))
def test_where_no_plan_is_left_it_is_the_end_of_the_iterations(seed):
    """Any pattern in which every atom has a partner: the plan that half-steps tend to, rows last; a warning where they miss b."""
    draw = np.random.default_rng(seed)
    n, m = draw.integers(2, 9, 2)
    allowed = draw.random((n, m)) < 0.2 + 0.5 * draw.random()
    allowed[np.arange(n), draw.integers(0, m, n)] = allowed[draw.integers(0, n, m), np.arange(m)] = True
    M = np.where(allowed, draw.random((n, m)), np.inf)
    a, b = draw.random(n) + 0.05, draw.random(m) + 0.05
    a, b = a / a.sum(), b / b.sum()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        plan = ot.sinkhorn(a, b, M, 0.3)
    want = half_steps(a, b, M / 0.3)
    np.testing.assert_allclose(plan, want, rtol=0, atol=1e-6)
    missed = np.abs(plan.sum(0) - b).sum() > 1e-6
    assert any("leave no plan" in str(warning.message) for warning in told) == missed


def test_classes_and_targets_without_a_label():
    """More of one class among the targets than the sources have, and some without a label: POT's plan."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(10, 2)), draw.normal(size=(12, 2))
    labels = {"ys": np.array([0] * 8 + [1] * 2), "yt": np.array([0] * 2 + [1] * 6 + [-1] * 4)}
    with pytest.warns(UserWarning, match="leave no plan"):
        plan = ot.da.SinkhornTransport(reg_e=1.0).fit(Xs=x, Xt=y, **labels).coupling_
    np.testing.assert_allclose(plan.sum(1), 0.1, rtol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = theirs.da.SinkhornTransport(reg_e=1.0, max_iter=200, tol=1e-14).fit(Xs=x, Xt=y, **labels).coupling_
    np.testing.assert_allclose(plan, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lazy", [False, True])
def test_results_can_be_sent_between_processes(problem, rng, lazy):
    a, b, M = problem
    x, y = rng.normal(size=(len(a), 2)), rng.normal(size=(len(b), 2))
    results = [ot.solve_sample(x, y, reg=1.0, lazy=lazy)] + [ot.solve(M, a, b, reg=0.1)] * (not lazy)
    for made in results:
        back = pickle.loads(pickle.dumps(made))
        for name in ("value", "value_linear", "plan", "potentials", "status", "marginals"):
            np.testing.assert_equal(getattr(back, name), getattr(made, name))
        if lazy:
            np.testing.assert_equal(back.lazy_plan[:], made.lazy_plan[:])


@pytest.mark.parametrize("kind", [np.int32, np.uint8, torch.int64])
def test_squares_of_integers_are_integers(kind):
    draw = np.random.default_rng(0).integers(0, 250, (2, 5, 3))
    x, y = (torch.from_numpy(part) if kind is torch.int64 else part.astype(kind) for part in draw)
    want = ((draw[0][:, None] - draw[1]) ** 2).sum(-1)
    got = ot.dist(x, y)
    assert got.dtype in (np.int64, torch.int64)
    np.testing.assert_array_equal(np.asarray(got), want)
    # far off, where floating precision has no such numbers
    far = draw[0] * 2**22
    got = ot.dist(torch.from_numpy(far), torch.from_numpy(draw[1]))
    np.testing.assert_array_equal(np.asarray(got), ((far[:, None] - draw[1]) ** 2).sum(-1))
    assert ot.dist(torch.from_numpy(draw[0] > 100), torch.from_numpy(draw[1] > 100)).dtype.is_floating_point


@pytest.mark.filterwarnings("ignore:scipy.optimize:DeprecationWarning")
@pytest.mark.parametrize("reg_m", [0.1, 1.0, 10.0])
def test_relaxed_with_the_plain_entropy(problem, reg_m):
    """The minimiser, where POT's descent stops on its way; its objective, by the definition; a start is POT's affair."""
    a, b, M = problem
    options = {"reg": 0.1, "reg_type": "entropy", "unbalanced": reg_m}
    made, other = ot.solve(M, a, b, **options), theirs.solve(M, a, b, **options)

    def value(P):
        penalty = kl(P.sum(1), a) + kl(P.sum(0), b)
        return (P * M).sum() + 0.1 * (P * np.log(np.maximum(P, 1e-300)) - P).sum() + reg_m * penalty

    close(made.value, value(made.plan), 1e-10)
    assert value(made.plan) <= value(other.plan)
    close(made.value, other.value, 0.1)
    # at the minimum the slope is 0 in every entry
    slope = (
        M
        + 0.1 * np.log(made.plan)
        + reg_m * np.log(made.plan.sum(1) / a)[:, None]
        + reg_m * np.log(made.plan.sum(0) / b)
    )
    assert np.abs(slope).max() < 1e-7
    start = np.outer(a, b)
    close(ot.solve(M, a, b, **options, plan_init=start).plan, theirs.solve(M, a, b, **options, plan_init=start).plan)


REGULAR = {
    "sinkhorn": lambda library, a, b, M, reg: (
        library.sinkhorn(a, b, M, reg, stopThr=1e-14, numItermax=5000).square().sum()
    ),
    "sinkhorn2": lambda library, a, b, M, reg: library.sinkhorn2(a, b, M, reg, stopThr=1e-14, numItermax=5000),
    "log_u": lambda library, a, b, M, reg: (
        library.sinkhorn(a, b, M, reg, method="sinkhorn_log", stopThr=1e-14, numItermax=5000, log=True)[1]["log_u"]
        .diff()
        .square()
        .sum()
    ),
    "value": lambda library, a, b, M, reg: library.solve(M, a, b, reg, tol=1e-14, max_iter=5000).value,
    "entropy": lambda library, a, b, M, reg: (
        library.solve(M, a, b, reg, reg_type="entropy", tol=1e-14, max_iter=5000).value
    ),
    "unbalanced": lambda library, a, b, M, reg: (
        library.unbalanced.sinkhorn_unbalanced(a, b, M, reg, 1.0, stopThr=1e-14, numItermax=5000).square().sum()
    ),
}


@pytest.mark.parametrize("name", REGULAR)
@pytest.mark.parametrize("alone", [True, False])
def test_gradients_in_reg(name, alone, problem):
    """A learned temperature, whether anything else wants a gradient or not."""
    slopes = []
    for library in (ot, theirs):
        a, b, M = (part if not alone else part.detach() for part in tensors(problem))
        reg = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            slopes.append(torch.autograd.grad(REGULAR[name](library, a, b, M, reg), reg)[0])
    assert abs(float(slopes[1])) > 1e-6
    close(*slopes, 1e-6)


def test_reg_in_one_entry_and_reg_m_with_a_gradient(problem):
    a, b, M = tensors(problem)
    one, number = (ot.sinkhorn(a, b, M, reg).detach() for reg in (torch.tensor([0.1], dtype=torch.float64), 0.1))
    close(one, number)
    with pytest.raises(NotImplementedError, match="reg_m wants a gradient"):
        ot.unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, torch.tensor(1.0, requires_grad=True))
    with torch.no_grad():
        ot.unbalanced.sinkhorn_unbalanced(a, b, M, 0.1, torch.tensor(1.0, requires_grad=True))


def test_a_plan_may_be_written_into_before_backward(problem):
    _, _, M = tensors(problem)
    plan = ot.sinkhorn([], [], M, 0.1)
    want = torch.autograd.grad((2 * plan).square().sum(), M, retain_graph=True)[0]
    plan *= 2
    close(torch.autograd.grad(plan.square().sum(), M)[0], want)


def test_costs_of_labels_are_finite(rng):
    x, y = rng.normal(size=(8, 2)), rng.normal(size=(8, 2))
    labels = {"ys": np.array([0, 1] * 4), "yt": np.array([0] * 4 + [1] * 4)}
    made, other = (
        library.da.SinkhornTransport(reg_e=3.0, max_iter=5000, tol=1e-13).fit(Xs=x, Xt=y, **labels)
        for library in (ot, theirs)
    )
    close(made.coupling_, other.coupling_)
    close((made.coupling_ * made.cost_).sum(), (other.coupling_ * other.cost_).sum())


def test_warn_is_obeyed(problem):
    a, b, M = problem
    apart = M.copy()
    apart[:10, :20] = apart[10:, 20:] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ot.sinkhorn(2 * a, b, M, 0.1, warn=False)
        ot.sinkhorn(a, b, apart, 0.1, warn=False)
    with pytest.warns(UserWarning, match="1e-06 apart"):
        ot.sinkhorn(a * (1 + 1e-6), b, M, 0.1)


def test_masks_are_refused_and_messages_are_in_pots_words(problem):
    a, b, M = problem
    with pytest.raises(ValueError, match="masked"):
        ot.sinkhorn(a, b, np.ma.masked_greater(M, 0.5), 0.1)
    closed = M.copy()
    closed[3] = np.inf
    with pytest.raises(ValueError, match=r"or use ot\.unbalanced"):
        ot.sinkhorn(a, b, closed, 0.1)


def test_results_are_copied_as_constants(problem):
    a, b, M = tensors(problem)
    made = ot.solve(M, a, b, reg=0.1)
    for back in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        close(back.value, made.value.detach())
        assert not back.plan.requires_grad
    assert made.value.requires_grad
