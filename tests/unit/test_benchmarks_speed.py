"""The speed benchmark: units of every library, the judgement of plans, limits, and what counts as a missed goal."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.special import logsumexp

from benchmarks.__main__ import main
from benchmarks.speed import contenders, figures, goals, gradients, grids, large, page, runner
from benchmarks.speed.measure import Solve, ladder, measure, scaled
from benchmarks.speed.pool import Worker, _cut
from benchmarks.speed.records import Records
from benchmarks.speed.tasks import Answer, Task, judge, make, mean_cost

JOB = {"part": "accuracy", "kind": "single", "cloud": "gaussians", "n": 30, "d": 2, "ratio": 0.1, "seed": 0}
JOB |= {"dtype": "float64", "tol": 1e-8, "contender": "sbot"}
#: Accelerated variants share the units of the plain one, and each takes seconds to compile.
LEFT_OUT = ("OTT momentum 1.5", "OTT Anderson 5", "OTT vmap momentum 1.5")


def needed(name: str) -> None:
    library = contenders.library(name)
    if importlib.util.find_spec(runner.PACKAGES[library]) is None:
        pytest.skip(f"{library} is not installed")


def plain(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Potentials and plan by log-domain half-steps, in the units of the page: half squares, KL to the product."""
    x, y = task.x.astype(np.float64), task.y.astype(np.float64)
    cost = ((x[:, None] - y) ** 2).sum(-1) / 2
    f, g, a, b = np.zeros(len(x)), np.zeros(len(y)), task.a.astype(np.float64), task.b.astype(np.float64)
    for _ in range(1000):
        before, f = f, -task.eps * logsumexp((g - cost) / task.eps, b=b, axis=1)
        g = -task.eps * logsumexp((f[:, None] - cost) / task.eps, b=a[:, None], axis=0)
        if abs(f - before).max() < 1e-13:
            break
    return f, g, a[:, None] * b * np.exp((f[:, None] + g - cost) / task.eps)


def cost_of(task: Task) -> np.ndarray:
    return ((task.x[:, None].astype(np.float64) - task.y) ** 2).sum(-1) / 2


def plans(task: Task, answer: Answer) -> np.ndarray:
    """The plan that an answer says, by its definition; ``(*b, n, m)``."""
    if answer.plan is not None:
        return np.asarray(answer.plan, dtype=np.float64)
    f, g = (np.asarray(part, dtype=np.float64) for part in (answer.f, answer.g))
    return task.a[:, None] * task.b * np.exp((f[..., :, None] + g[..., None, :] - task.cost) / task.eps)


def solved(solve: Solve, tries: int = 6) -> Answer:
    """With the knob turned towards exact."""
    knob, answer = solve.first, Answer()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(tries):
            answer = solve.read(solve.setup(knob)())
            following = solve.following(knob, 1.0, 1e-1)
            if following is None or solve.following is scaled:
                break
            knob = following
    return answer


@pytest.mark.parametrize("name", [name for name in contenders.SINGLE if name not in LEFT_OUT])
def test_every_library_has_our_units(name):
    needed(name)
    task = make(JOB)
    exact = plain(task)[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = solved(contenders.SINGLE[name](task, 1e-8))
    # GeomLoss ends its annealing with an error of its own, mdot-tnt as it comes too
    near = {"GeomLoss": 2e-2, "mdot-tnt as it comes": 0.1}.get(name, 1e-4)
    assert abs(plans(task, answer) - exact).max() < near * exact.max()
    verdict = judge(task, answer)
    assert verdict.error < near
    assert verdict.linear_cost == pytest.approx((exact * task.cost).sum(), rel=near)
    # half or twice the eps is farther away than what is allowed: the test sees a wrong unit
    for factor in (0.5, 2.0):
        assert abs(plain(replace(task, eps=factor * task.eps))[2] - exact).max() > 0.1 * exact.max()


@pytest.mark.parametrize("name", [name for name in contenders.BATCH if name not in LEFT_OUT])
def test_every_batch_has_our_units(name):
    needed(name)
    task = make({**JOB, "n": 16, "batch": 3})
    exact = np.stack([plain(Task(x, y, task.eps))[2] for x, y in zip(task.x, task.y, strict=True)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answer = solved(contenders.BATCH[name](task, 1e-8))
    near = 0.1 if name.startswith("mdot") else 1e-4
    assert abs(plans(task, answer) - exact).max() < near * exact.max()
    assert judge(task, answer).error < near


# ---- judgement -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_judge_sums_the_plan(dtype, monkeypatch):
    task = make({**JOB, "dtype": dtype})
    f, g, plan = plain(task)
    assert task.eps == pytest.approx(0.1 * ((task.x[:, None] - task.y) ** 2).sum(-1).mean() / 2, rel=1e-6)
    exact = Answer(f, g, matrix=False)
    assert judge(task, exact).error < 1e-12
    assert judge(task, Answer(plan=plan)).error < 1e-12
    # a known deviation, in blocks of any size
    monkeypatch.setattr("benchmarks.speed.tasks.BLOCK", 70)
    moved = plan.copy()
    moved[3, 4] += 1e-3
    assert judge(task, Answer(plan=moved)).error == pytest.approx(2e-3)
    assert judge(task, replace(exact, f=f + task.eps * math.log(1.01))).error == pytest.approx(0.02)
    moved[0, 0] = math.nan
    assert math.isnan(judge(task, Answer(plan=moved)).error)
    # some rows and columns instead of all
    monkeypatch.setattr("benchmarks.speed.tasks.WHOLE", 100)
    monkeypatch.setattr("benchmarks.speed.tasks.DRAWN", 20)
    rough = judge(task, replace(exact, f=f + task.eps * math.log(1.01)))
    assert rough.error == pytest.approx(0.02)
    assert rough.linear_cost == pytest.approx(1.01 * (plan * cost_of(task)).sum(), rel=0.3)
    # the worst of a batch, not the last
    both = Task(np.stack([task.x] * 2), np.stack([task.y] * 2), task.eps)
    wrong = Answer(np.stack([f + task.eps * math.log(1.01), f]), np.stack([g, g]), matrix=False)
    assert judge(both, wrong).error == pytest.approx(0.02)
    assert mean_cost(both.x, both.y) == pytest.approx(mean_cost(task.x, task.y))


def fake(errors, following, first=1.0) -> Solve:
    """A library whose error is a function of its knob: the plan of mass 1 + error / 2."""
    task = make(JOB)
    f, g, _ = plain(task)
    shift = {"f": f, "g": g, "eps": task.eps}

    def read(knob: float) -> Answer:
        return Answer(shift["f"] + shift["eps"] * np.log1p(errors(knob) / 2), shift["g"], matrix=False)

    return Solve(lambda knob: lambda: knob, read, first, following)


def test_the_knob_is_turned_until_the_error_is_just_below():
    told = []
    task = make(JOB)
    loose = measure(task, fake(lambda knob: 30 * knob, scaled), 1e-6, told.append)
    assert loose["status"] == "reached" and 0.3e-6 < loose["error"] <= 1.02e-6
    tight = measure(task, fake(lambda knob: knob / 30, scaled, 1e-6), 1e-6, told.append)
    assert tight["status"] == "reached" and 0.3e-6 < tight["error"] <= 1.02e-6
    assert {event["event"] for event in told} == {"start", "stop", "tried"}
    steps = measure(task, fake(lambda knob: 10.0**-knob, ladder(1.0, 4.0, 7.0, 9.0)), 1e-6, told.append)
    assert steps["status"] == "reached" and steps["knob"] == 7.0
    short = measure(task, fake(lambda knob: 10.0**-knob, ladder(1.0, 4.0)), 1e-6, told.append)
    assert short["status"] == "not reached" and short["error"] == pytest.approx(1e-4, rel=1e-3)
    floor = measure(task, fake(lambda knob: max(knob, 1e-3), scaled), 1e-6, told.append)
    assert floor["status"] == "not reached" and floor["error"] == pytest.approx(1e-3, rel=1e-3)
    broken = measure(task, fake(lambda knob: math.nan, scaled), 1e-6, told.append)
    assert broken["status"] == "failed"


def test_gradients_are_held_to_central_differences(monkeypatch):
    job = {**JOB, "n": 12, "tol": 1e-13}
    for name in gradients.VALUES:
        if name.startswith("sbot"):
            errors = gradients.check({**job, "contender": name}, lambda event: None)
            assert max(error for key, error in errors.items() if key.startswith("error")) < 1e-7
    true = gradients.VALUES["sbot points and weights, stored"]

    def wrong(task, tol):
        value = true(task, tol)
        return lambda x, y, a, b: value(x, y, a, b) + 1e-3 * (x.detach().sum() - x.sum())

    monkeypatch.setitem(gradients.VALUES, "sbot points and weights, stored", wrong)
    spoilt = gradients.check({**job, "contender": "sbot points and weights, stored"}, lambda event: None)
    assert spoilt["error_x"] > 1e-4


@pytest.mark.parametrize("name", list(gradients.VALUES))
def test_values_have_our_units(name):
    needed(name)
    task = make(JOB)
    _, _, plan = plain(task)
    reference = np.outer(task.a, task.b)
    expected = (plan * task.cost).sum() + task.eps * (plan * np.log(plan / reference)).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = gradients.VALUES[name](task, 1e-9)(*gradients.inputs(task, name))
    assert float(value) == pytest.approx(expected, rel=1e-2 if name.startswith("GeomLoss") else 1e-6)


def test_a_large_problem_is_measured_with_its_memory():
    job = {**JOB, "n": 300, "d": 3, "dtype": "float32", "tol": 1e-3, "kind": "large"}
    result = large.run(job, lambda event: None)
    assert result["status"] == "reached" and result["error"] <= 1.02e-3
    assert result["peak_above_inputs"] >= 0 and result["inputs"] == 2 * 300 * 3 * 4


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_a_child_is_killed_at_the_limit_and_another_takes_over():
    worker = Worker(1)
    slow = {**JOB, "n": 400, "ratio": 1e-4, "contender": "POT sinkhorn_log on arrays"}
    try:
        row = worker.run(slow, 0.2)
        assert row["status"] == "beyond the limit" and row["limit"] == 0.2
        assert worker.child is None
        assert worker.run(JOB, 60.0)["status"] == "reached"
        lost = worker.run({**JOB, "kind": "single", "cloud": "nowhere", "contender": "nobody"}, 60.0)
        assert lost["status"] == "failed" and "KeyError" in lost["note"]
    finally:
        worker.stop()


def test_what_was_reached_before_a_kill_counts():
    steps = [{"knob": 1.0, "seconds": 2.0, "error": 1e-7}, {"knob": 5.0, "seconds": 1.5, "error": 5e-7}]
    kept = _cut({"tried": steps}, 1e-6, 3.0)
    assert (kept["status"], kept["seconds"], kept["repeats"]) == ("reached", 1.5, 1)
    assert _cut({"tried": steps}, 1e-8, 3.0)["status"] == "beyond the limit"


def row(**more):
    outcome = {"status": "reached", "seconds": 1.0, "error": 1e-6, "linear_cost": 2.0, "run": "r"}
    return {**JOB, "tol": 1e-6, "n": 500, **outcome, **more}


def stopped(limit, **more):
    return {**row(**more), "status": "beyond the limit", "limit": limit, "seconds": None, "error": None}


def test_rivals_have_a_multiple_of_our_time_and_are_not_run_when_beaten(tmp_path):
    limits = runner.Limits(100.0, 12.0, 3.0)
    rival = row(contender="OTT", ratio=1e-2)
    assert limits.of(rival, row(seconds=2.0)) == 24.0
    assert limits.of(rival, row(seconds=0.01)) == 3.0
    assert limits.of(rival, row(seconds=50.0)) == 100.0
    online = row(kind="large", contender="GeomLoss online")
    assert limits.of(online, row(seconds=60.0)) == 330.0
    assert limits.of(rival, None) == 100.0 == limits.of(row(), row(seconds=0.01))
    records = Records(tmp_path / "rows.jsonl")
    records.add(stopped(12.0, contender="OTT", ratio=1e-1))
    near, far = row(ratio=1e-2, seconds=1.0), row(ratio=1e-2, seconds=2.0)
    known = runner.beaten(rival, records, limits, near)
    assert known["status"] == "not run" and "already beyond the limit (12 s) at eps / mean cost = 0.1" in known["note"]
    assert runner.beaten(rival, records, limits, far) is None  # 12 s would not be ten times as long
    assert runner.beaten({**rival, "n": 2000}, records, limits, near) is None
    assert runner.beaten({**rival, "ratio": 1.0}, records, limits, near) is None
    assert runner.beaten({**rival, "contender": "GeomLoss"}, records, limits, near) is None


def test_records_are_resumed_and_a_torn_line_is_run_again(tmp_path):
    path = tmp_path / "rows.jsonl"
    records = Records(path)
    records.add({"run": "r", "environment": {"cpu": "x"}})
    records.add(row(seconds=math.nan))
    records.add(row(contender="OTT"))
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    again = Records(path)
    assert again.find(row()) is not None and again.find(row())["seconds"] is None
    assert again.find(row(contender="OTT")) is None and again.runs == {"r": {"cpu": "x"}}
    again.forget("accuracy")
    assert Records(path).rows == {} == Records(path).runs


# ---- goals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "rivals", "said"),
    [
        (0.1, [row(contender="OTT", seconds=0.9)], ["0.9 (OTT) x the time of the best rival, 1 wanted"]),
        (0.1, [row(contender="OTT", seconds=1.5)], []),
        (0.01, [row(contender="OTT", seconds=9.0)], ["9 (OTT) x the time of the best of POT"]),
        (0.01, [row(contender="OTT", seconds=9.0, status="not reached")], []),
        (0.01, [row(contender="OTT", seconds=15.0), stopped(12.0, contender="POT sinkhorn")], []),
        (0.01, [stopped(8.0, contender="POT sinkhorn")], ["not shown, since it was stopped: > 8"]),
        (0.01, [row(contender="mdot-tnt", seconds=1.5)], []),
        (1e-3, [row(contender="mdot-tnt", seconds=1.5)], ["1.5 (mdot-tnt) x the time of mdot-tnt, 2 wanted"]),
        (
            1e-3,
            [row(contender="mdot-tnt as it comes", seconds=1.5, status="not reached")],
            ["1.5 (mdot-tnt as it comes)"],
        ),
    ],
)
def test_missed_goals(ratio, rivals, said):
    found = goals.judge_cell(row(ratio=ratio), rivals)
    assert len(found) == len(said)
    assert all(part in whole for part, whole in zip(said, found, strict=True))


def test_missed_goals_of_precision_and_of_another_plan(tmp_path):
    records = Records(tmp_path / "rows.jsonl")
    records.add(row())
    records.add(row(dtype="float32", tol=1e-4, seconds=1.5))
    records.add(row(contender="OTT", linear_cost=2.2, seconds=30.0))
    assert goals.missed(records) == [["gaussians", "500", "2", "0.1", "float32", "1.50 x the time of float64"]]
    assert [line[-2:] for line in goals.apart(records)] == [["OTT", "+1.0e-01"]]
    records.add(row(status="not reached", error=1e-3))
    assert "sbot: not reached" in goals.missed(records)[0][-1]


def test_missed_goals_of_the_other_parts(tmp_path):
    records = Records(tmp_path / "rows.jsonl")
    big = {"part": "large", "kind": "large", "n": 100_000, "tol": 1e-3, "dtype": "float32"}
    records.add(row(**big, peak_above_inputs=2e9))
    records.add(row(**big, contender="GeomLoss online", seconds=4.0))
    records.add(stopped(6.0, **big, contender="GeomLoss multiscale"))
    many = {"part": "batch", "kind": "batch", "batch": 256, "n": 64}
    records.add(row(**many))
    records.add(row(**many, contender="POT loop sinkhorn", seconds=9.0))
    records.add(row(**many, contender="POT solve_batch", seconds=2.0))
    slope = {"part": "gradients", "kind": "gradient", "peak_value": 100.0}
    records.add(row(**slope, contender="sbot points", seconds_value=1.0, seconds=1.2, peak=160.0))
    records.add(row(**{**slope, "kind": "check"}, contender="sbot points", error_x=1e-9, error_a=2e-6))
    assert [line[-1] for line in goals.others(records)] == [
        "peak 2.00 GB above the inputs, 1 wanted",
        "4 (GeomLoss online), 5 wanted",
        "9 (POT loop sinkhorn), 10 wanted",
        "1.60 x the memory of the value, 1.5 wanted",
        "error 2.0e-06, 1e-6 wanted",
    ]


def test_page_and_pictures_from_rows(tmp_path):
    records = Records(tmp_path / "rows.jsonl")
    for ratio in (0.1, 0.01):
        records.add(row(ratio=ratio))
        records.add(row(ratio=ratio, contender="OTT", seconds=20.0))
    records.add(stopped(12.0, contender="POT sinkhorn"))
    records.add({**stopped(12.0, contender="POT sinkhorn", ratio=0.01), "status": "not run", "note": "already"})
    records.add(row(part="large", kind="large", n=1000, peak_above_inputs=2**20))
    text = page.page(records, ["speed_accuracy.png"], True)
    assert "| 20 | 12" not in text and "> 12 (POT sinkhorn)" in text and "> 12*" in text and "No cell misses" in text
    figures.accuracy(records).savefig(tmp_path / "a.png")
    figures.large(records).savefig(tmp_path / "b.png")


def test_the_grids_are_those_of_the_targets():
    options = grids.Options()
    cells = {(j["cloud"], j["n"], j["d"], j["ratio"], j["dtype"]) for j in grids.accuracy(options)}
    every = itertools.product(("gaussians",), (500, 2000, 5000), (2, 50), grids.RATIOS, grids.TOLERANCE)
    assert set(every) <= cells
    assert {j["n"] for j in grids.large(replace(options, million=True))} == {10_000, 30_000, 100_000, 1_000_000}
    assert {(j["n"], j["batch"]) for j in grids.batch(options) if j["kind"] == "batch"} == {(64, 256)}


def test_command_goes_on_where_it_stopped(tmp_path, monkeypatch):
    job = {**grids.memory(grids.Options(quick=True))[0], "n": 100}
    monkeypatch.setitem(grids.PARTS, "memory", lambda options: [job])
    ask = ["speed", "--only", "memory", "--quick", "--threads", "1", "--out", str(tmp_path)]
    first = CliRunner().invoke(main, ask, catch_exceptions=False)
    assert first.exit_code == 0 and "0 of 1 jobs are left" in first.output
    lines = (tmp_path / "speed_quick.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert "versions" in rows[0]["environment"] and {r["status"] for r in rows[1:]} == {"reached"}
    assert all(r["peak_solve"] > 0 and r["entries"] > 0 for r in rows[1:])
    again = CliRunner().invoke(main, ask, catch_exceptions=False)
    assert "[1/" not in again.output
    assert (tmp_path / "speed_quick.jsonl").read_text(encoding="utf-8").splitlines() == lines
    assert "sparse_plan" in (tmp_path / "speed.md").read_text(encoding="utf-8")
    refused = CliRunner().invoke(main, ["speed", "--only", "nothing", "--out", str(tmp_path)])
    assert refused.exit_code == 2
