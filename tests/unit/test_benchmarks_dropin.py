"""The drop-in benchmark: errors that know a wrong plan, ratios and reasons, and a quick run from the command line."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import ot
import pytest
from click.testing import CliRunner

from benchmarks.__main__ import main
from benchmarks.dropin import goals, grids, measure, page
from benchmarks.dropin.calls import CALLS, MASS, MODULES, Data
from benchmarks.speed.records import Records

JOB = {"part": "dropin", "kind": "sinkhorn", "cloud": "gaussians", "n": 20, "d": 2, "ratio": 0.1, "dtype": "float64"}
JOB |= {"tol": 0.0, "seed": 0, "contender": "POT"}


@pytest.mark.parametrize("name", CALLS)
def test_every_call_solves_its_problem_on_both_sides(name):
    call = CALLS[name]
    package = MODULES[call.library][0].split(".")[0]
    sides = [True, False] if importlib.util.find_spec(package) is not None else [True]
    job = {**JOB, "kind": name, "dtype": call.dtypes[0], **({"batch": call.batch} if call.batch else {})}
    data = Data.of(job, call.tensors)
    for ours in sides:
        side = measure.first(call, call.module(ours), data, lambda event: None)
        assert not side.fault
        # in float32 the tolerance that is aimed at by default is 3.5e-4
        aim = 1e-4 if job["dtype"] == "float64" else 4e-4
        assert side.error < (aim if ours else measure.FAILED), (ours, side.error)


def test_a_wrong_plan_is_seen():
    data = Data.of({**JOB, "ratio": 0.01}, False)
    independent = np.outer(data.a, data.b)
    assert measure.error("balanced", data, independent) < 1e-12  # its marginals are right
    assert measure.error("balanced", data, 0.9 * independent) == pytest.approx(0.2)
    assert measure.error("relaxed", data, independent) > 0.1
    rho, reg = measure.RELAX * float(data.top), data.reg
    solved = ot.unbalanced.sinkhorn_unbalanced(
        data.a, data.b, data.M, reg, rho, method="sinkhorn_translation_invariant", numItermax=100_000, stopThr=1e-14
    )
    assert measure.error("relaxed", data, solved) < 1e-7
    assert measure.error("relaxed", data, 1.01 * solved) == pytest.approx(0.01, abs=1e-6)
    assert measure.error("partial", data, MASS * independent) < 1e-12
    assert measure.error("partial", data, independent) == pytest.approx((1 - MASS) / MASS)
    assert np.isnan(measure.error("balanced", data, np.nan * independent))


def row(**more):
    return {
        **JOB,
        "status": "reached",
        "seconds": 2.0,
        "error": 1e-9,
        "ours": 1.0,
        "ours_error": 1e-9,
        "run": "r",
        **more,
    }


def records_of(tmp_path, *rows):
    records = Records(tmp_path / "rows.jsonl")
    for one in rows:
        records.add(one)
        records.add({**one, "contender": "sbot", "status": "reached", "seconds": 1.0, "error": 1e-9})
    return records


def test_ratios_reasons_and_failures(tmp_path):
    rows = [
        row(),
        row(ratio=0.01, seconds=0.5),
        row(ratio=0.001, seconds=0.5, error=1e-3),
        row(ratio=1e-4, status="failed", error=None, note="not numbers", seconds=0.1),
        row(kind="solve", status="beyond the limit", limit=12.0, seconds=None, error=None, ours=None),
    ]
    records = records_of(tmp_path, *rows)
    assert [goals.said(*pair) for pair in goals.pairs(records)] == ["2", "0.5", "~0.5", "fails", "> 12"]
    slower = goals.slower(records)
    assert [line[3:5] for line in slower] == [["0.01", "2"], ["0.001", "2"]]
    assert "fixed kernel" in slower[0][5] and "stops at an error of 1e-03" in slower[1][5]
    assert [line[0] for line in goals.failed(records)] == ["sinkhorn", "solve"]
    text = page.page(records, [], False)
    assert "| sinkhorn | float64 | 20 | 2 | 0.5 | ~0.5 | fails |" in text
    assert page.figure(records) is not None
    assert len(page.flat(records)) == 5


def test_the_grid_has_sbot_first():
    jobs = grids.jobs(["sinkhorn", "OTPlanSampler exact"], 0, False)
    assert [job["contender"] for job in jobs[:2]] == ["sbot", "POT"]
    assert {job["dtype"] for job in jobs if job["kind"] == "sinkhorn"} == {"float64", "float32"}
    assert len([job for job in jobs if job["kind"] == "OTPlanSampler exact"]) == 2 * 3


def test_a_quick_run_and_its_continuation(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        asked = ["dropin", "--quick", "--only", "sinkhorn;solve, unbalanced", "--out", str(tmp_path)]
        first = CliRunner().invoke(main, asked)
        assert first.exit_code == 0, first.output
        assert "0 of 4 jobs are left" in first.output
        again = CliRunner().invoke(main, asked)
    assert "[1/" not in again.output
    assert {path.name for path in tmp_path.iterdir()} == {
        "dropin.md",
        "dropin.csv",
        "dropin.png",
        "dropin_quick.jsonl",
    }
    assert "no number here means anything" in (tmp_path / "dropin.md").read_text(encoding="utf-8")
    wrong = CliRunner().invoke(main, ["dropin", "--only", "sinkhron", "--out", str(tmp_path)])
    assert wrong.exit_code == 2 and "sinkhron" in wrong.output
