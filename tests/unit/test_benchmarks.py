"""The benchmarks run, and what they hold the libraries against is itself right."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import contenders, problems, report, run
from benchmarks.__main__ import main

GRID = [
    problems.Cell(12, 9, 2, cost, weights, kind, ratio)
    for cost in ("quadratic", "matrix")
    for weights in ("uniform", "zeros")
    for kind in problems.KINDS
    for ratio in (5e-2, 1.0)
]


def extended(task: problems.Task) -> np.ndarray:
    """The plan by plain half-steps in 80-bit numbers, without a single trick to share with anybody."""
    a, b, cost = (part.astype(np.longdouble) for part in (task.a, task.b, task.cost))
    eps = np.longdouble(task.eps)
    lam = [np.longdouble(1) if math.isinf(rho) else rho / (rho + eps) for rho in task.rho]
    f, g = np.zeros_like(a), np.zeros_like(b)
    for _ in range(40_000):
        before = g
        f = -lam[0] * eps * np.log(np.exp((g - cost) / eps) @ b)
        g = -lam[1] * eps * np.log(a @ np.exp((f[:, None] - cost) / eps))
        if abs(g - before).max() < 1e-17 * abs(g).max():
            break
    return (a[:, None] * np.exp((f[:, None] + g - cost) / eps) * b).astype(np.float64)


@pytest.mark.parametrize("cell", GRID, ids=str)
def test_the_oracle_is_the_answer_in_80_bits(cell):
    task = problems.make(cell)
    plan = extended(task)
    exact = contenders.oracle(task)
    assert exact.error < 1e-13
    assert abs(exact.plan - plan).max() < 1e-12 * plan.max()
    # its plan is that of its potentials, so that they are held to the same account
    with np.errstate(over="ignore"):
        made = np.outer(task.a, task.b) * np.exp((exact.f[:, None] + exact.g - task.cost) / task.eps)
    live = np.ix_(task.a > 0, task.b > 0)
    assert abs(made - exact.plan)[live].max() < 1e-12 * plan.max()


@pytest.mark.parametrize("cell", GRID, ids=str)
def test_contenders_agree_with_the_oracle(cell):
    task = problems.make(cell)
    exact = contenders.oracle(task)
    answers = [contenders.sbot_sinkhorn(task, 1e-12, 1.0), contenders.pot(task, 1e-12, 1.0)]
    if cell.kind == "balanced" and cell.weights != "zeros":
        answers.append(contenders.pot_plain(task, 1e-12, 1.0))
    for answer in answers:
        assert answer.status == "converged", answer
        assert answer.error <= 2e-12
        assert run.plan_difference(answer, exact) < 1e-10
        assert run.potential_difference(task, answer, exact) < 1e-9
        assert answer.value == pytest.approx(exact.value, rel=1e-10)


def test_the_objective_is_least_at_the_oracle_and_its_dual_meets_it():
    for cell in GRID:
        task = problems.make(cell)
        exact = contenders.oracle(task)
        wrong = exact.plan * np.random.default_rng(0).uniform(0.99, 1.01, exact.plan.shape)
        if cell.kind == "balanced":  # back to the marginals: a rank-one correction of what is missing
            wrong *= 0.9
            left, right = task.a - wrong.sum(1), task.b - wrong.sum(0)
            wrong += np.outer(left, right) / left.sum()
        if cell.kind == "semi-relaxed":
            wrong *= (task.a / np.maximum(wrong.sum(1), 1e-300))[:, None]
        assert problems.objective(task, wrong) > exact.value
        assert exact.value == pytest.approx(dual(task, exact), rel=1e-9)


def dual(task, answer):
    total = task.eps * (task.a.sum() * task.b.sum() - answer.plan.sum())
    for rho, weights, potential in zip(task.rho, (task.a, task.b), (answer.f, answer.g), strict=True):
        total += weights @ (potential if math.isinf(rho) else -rho * np.expm1(-potential / rho))
    return total


def test_marginal_error_of_a_relaxed_problem_needs_the_potentials():
    task = problems.make(problems.Cell(12, 9, kind="unbalanced"))
    exact = contenders.oracle(task)
    assert problems.marginal_error(task, exact.plan, exact.f, exact.g) < 1e-13
    assert problems.marginal_error(task, exact.plan, exact.f + 0.1, exact.g) > 1e-3
    balanced = problems.make(problems.Cell(2, 2))
    plan = np.array([[0.5, 0.0], [0.25, 0.25]])
    assert problems.marginal_error(balanced, plan, np.zeros(2), np.zeros(2)) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", problems.KINDS)
def test_a_problem_is_what_its_cell_says(kind):
    task = problems.make(problems.Cell(30, 20, 3, "quadratic", "zeros", kind, 0.1, "float32"))
    assert task.a.dtype == task.cost.dtype == np.float32
    assert (task.a == 0).sum() == 6
    assert (task.b == 0).sum() == 4
    assert task.a.sum() == pytest.approx(1, rel=1e-6)
    assert task.b.sum() == pytest.approx(1 if kind == "balanced" else 1.3, rel=1e-6)
    assert task.eps == pytest.approx(0.1 * task.cost.mean(), rel=1e-6)
    brute = ((task.x[:, None].astype(float) - task.y[None]) ** 2).sum(2) / 2
    assert abs(task.cost - brute).max() < 1e-6 * brute.max()
    assert (task.rho == (math.inf, math.inf)) == (kind == "balanced")


def test_a_failure_is_called_one():
    task = problems.make(problems.Cell(30, 20, kind="unbalanced", ratio=1e-3))
    assert contenders.pot(task, 1e-12, 0.5).status == "failed"  # its kernel underflows
    zeros = problems.make(problems.Cell(30, 20, weights="zeros"))
    assert contenders.pot_plain(zeros, 1e-12, 0.5).status == "failed"  # inf * 0 where both sides have zeros
    slow = problems.make(problems.Cell(30, 20, ratio=1e-3))
    stopped = contenders.pot_log(slow, 1e-12, 0.05)
    assert stopped.status == "not converged"
    assert stopped.error > 1e-11
    assert contenders.sbot_sinkhorn(slow, 1e-12, 1.0, max_iter=20).status == "not converged"


def test_pot_quick_writes_what_it_says(tmp_path):
    done = CliRunner().invoke(main, ["pot", "--quick", "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    rows = list(csv.DictReader((tmp_path / "pot.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(run.pot_cells(True, 0))
    for row in rows:
        assert row["status_sbot"] == row["status_pot"] == "converged"
        bound = 1e-10 if row["dtype"] == "float64" else 1e-4
        for key in ("plan_sbot_pot", "plan_sbot", "value_sbot_pot"):
            assert float(row[key]) < bound
    meta = json.loads((tmp_path / "pot.json").read_text(encoding="utf-8"))
    assert {"date", "cpu", "cores", "threads", "versions"} <= set(meta["environment"])
    assert meta["settings"]["seed"] == 0
    assert {t["contender"] for t in meta["times"]} >= {"sbot", "POT sinkhorn_log", "POT sinkhorn"}
    page = (tmp_path / "pot.md").read_text(encoding="utf-8")
    assert "read ratios" in page
    assert "POT 0." in page
    assert (tmp_path / "pot.png").read_bytes().startswith(b"\x89PNG")


def test_the_full_grid_covers_every_pair_of_factors():
    cells = run.pot_cells(False, 0)
    assert len(set(cells)) == len(cells)
    for kind in problems.KINDS:
        for weights in problems.WEIGHTS:
            for cost in problems.COSTS:
                some = [c for c in cells if (c.kind, c.weights, c.cost) == (kind, weights, cost)]
                assert {c.ratio for c in some} == set(problems.RATIOS)
                assert {c.dtype for c in some} == set(run.TOLERANCE)
                assert {c.d for c in some} >= ({1} if cost == "matrix" else {1, 2, 50})
    assert {(c.n, c.m) for c in cells} == {(48, 36), (20, 90), (200, 150), (300, 300)}


def test_the_report_names_who_is_wrong():
    row = dict.fromkeys(
        ["plan_sbot_pot", "plan_sbot", "plan_pot", "potential_sbot_pot", "value_sbot_pot", "error_sbot", "error_pot"],
        1e-13,
    )
    row |= {"dtype": "float64", "kind": "balanced", "ratio": 0.1, "status_sbot": "converged", "status_pot": "converged"}
    row |= {"cost": "l1", "d": 2, "n": 4, "m": 5, "weights": "random", "mean_cost": 2.0, "tolerance": 1e-12}
    row |= {"note_sbot": "", "note_pot": "", "solver_pot": "POT sinkhorn_log"}
    time = {"kind": "balanced", "ratio": 0.1, "contender": "sbot", "seconds": 0.1, "iterations": 3}
    time |= {"status": "converged", "error": 1e-7, "n": 10}
    env = report.environment()
    quiet = report.pot_page([row], [time], env, {})
    assert "float64: none of the 1 cells" in quiet
    wrong = {**row, "plan_sbot_pot": 2e-8, "plan_pot": 3e-8}
    loud = report.pot_page([row, wrong], [time], env, {})
    assert "float64: 1 of the 2 cells" in loud
    assert "| 2.0e-08 | 1.0e-13 | 3.0e-08 | sinkhorn_log |" in loud
