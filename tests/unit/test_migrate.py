"""The migration check: every binding is reached, both sides are judged, and the program does not notice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import sbot
from sbot.cli import commands
from sbot.compat.swap import Bindings, targets
from sbot.errors import InvalidProblem
from sbot.migrate.compare import deviations, parts
from sbot.migrate.judge import Question, examine, higher, question
from sbot.migrate.report import Report
from sbot.migrate.run import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """POT looks for other libraries; without them a program starts in half the time."""
    for name in ("JAX", "TENSORFLOW", "CUPY"):
        monkeypatch.setenv(f"POT_BACKEND_DISABLE_{name}", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def script(folder: Path, text: str) -> list[str]:
    path = folder / "program.py"
    text = textwrap.dedent(text)
    if "geomloss" not in text:  # which POT imports, for nothing here
        text = 'import sys; sys.modules["geomloss"] = None' + text
    path.write_text(text, encoding="utf-8")
    return [sys.executable, str(path)]


# ---- the program does not notice ---------------------------------------------------------------------------------------

#: Every way to bind one function; draws from all generators; children; an end by os._exit and one by a signal.
EVERYTHING = """
    import os, random, subprocess, sys, json
    import numpy as np, torch
    import sitecustomize
    import ot.backend
    from ot import sinkhorn as a
    from ot.bregman import sinkhorn as b
    from ot.bregman._sinkhorn import sinkhorn as c
    import ot as library, ot.bregman as module
    from ot.da import SinkhornTransport

    if sys.argv[1:] == ["child"]:
        a([], [], np.eye(4), 0.5)
        os.kill(os.getpid(), 9)
    random.seed(0); np.random.seed(0); torch.manual_seed(0)
    M = np.random.rand(6, 7)
    kept = M.copy()
    plans = [f([], [], M, 0.5) for f in (a, b, c, library.sinkhorn, module.sinkhorn)]
    tensor = torch.rand(5, 6, dtype=torch.float64, requires_grad=True)
    empty = torch.zeros(0, dtype=torch.float64)
    library.sinkhorn2(empty, empty, tensor, 0.5).backward()
    model = SinkhornTransport(reg_e=1.0).fit(Xs=np.random.rand(8, 2), Xt=np.random.rand(9, 2))
    model.transform(np.random.rand(3, 2))
    if os.fork() == 0:
        a([], [], M, 0.5)
        os._exit(0)
    os.wait()
    if "--alone" not in sys.argv:
        subprocess.run([sys.executable, sys.argv[0], "child"])
    print(json.dumps({
        "plans": [plan.tolist() for plan in plans], "kept": bool((M == kept).all()), "slope": tensor.grad.tolist(),
        "drawn": [random.random(), np.random.rand(), float(torch.rand(()))], "type": type(model).__module__,
        "mark": sitecustomize.MARK, "path": [p for p in sys.path if "sbot-migrate" in p],
    }))
    raise SystemExit(7)
"""


def test_every_binding_is_reached_and_the_program_does_not_notice(tmp_path, capfd, monkeypatch):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("MARK = 'theirs'\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    command = script(tmp_path, EVERYTHING)
    subprocess.run([*command, "--alone"], check=False)
    plain = capfd.readouterr().out
    report = run(command)
    checked = capfd.readouterr().out
    assert json.loads(plain)["mark"] == "theirs"
    assert json.loads(plain)["path"] == []
    assert checked == plain  # to the last bit of the plans, the gradient and all three generators
    assert report.status == 7
    calls = {name: tally.calls for name, tally in report.functions.items()}
    assert calls == {
        "ot.bregman.sinkhorn": 7,  # five bindings, a forked child, a child that was killed
        "ot.bregman.sinkhorn2": 1,
        "ot.da.SinkhornTransport.fit": 1,  # and not the sinkhorn within it
        "ot.da.SinkhornTransport.transform": 1,
    }
    assert report.count("agree") == report.compared == 10, report.text()
    assert len(report.processes) == 3
    assert not report.troubles


def test_generators_of_its_own_and_results_of_sbot(tmp_path, capfd):
    command = script(
        tmp_path,
        """
        import numpy as np, ot
        rng = np.random.default_rng(0)
        x, y = rng.random((20, 2)), rng.random((20, 2)) + 1
        ot.solve_sample(x, y, reg=0.5, random_state=rng)
        result = ot.solve(ot.dist(x, y), reg=0.5)
        model = ot.da.SinkhornTransport(reg_e=1.0).fit(Xs=x, Xt=y)
        print(type(result).__module__, type(model).__module__, rng.random(), model.coupling_.sum().round(6))
        """,
    )
    report = run(command, "sbot")
    assert capfd.readouterr().out == (f"sbot.compat.pot.utils ot.da {np.random.default_rng(0).random(81)[-1]} 1.0\n"), (
        report.text()
    )
    assert report.count("agree") == 3


# ---- what is found -------------------------------------------------------------------------------------------------


FINDINGS = """
    import random, warnings, numpy as np, torch
    import sbot.compat.pot as ours

    def changed(a, b, M, reg, *args, **kwargs):
        print("noise", random.random(), np.random.rand(), torch.rand(()))
        warnings.warn("noise")
        if reg == 0.06:
            raise RuntimeError("no such luck")
        plan = right(a, b, M, reg, *args, **kwargs)
        return np.outer(plan.sum(1), plan.sum(0)) if reg == 0.05 else plan

    right = ours.bregman.sinkhorn
    ours.bregman.sinkhorn = changed
    import ot
    rng = np.random.default_rng(0)
    M = ot.dist(rng.random((30, 2)), rng.random((35, 2)))
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    ot.sinkhorn([], [], M, 0.1)
    ot.sinkhorn([], [], M, 0.01, numItermax=20)  # line 20: far from converged
    ot.sinkhorn([], [], M + 1000, 1.0)  # zeros
    ot.sinkhorn2([], [], M, 0.01, numItermax=20)  # only a value
    ot.solve(M, reg=0.1, unbalanced=1.0)  # the objective without its mass terms
    ot.solve(M)  # exact
    ot.emd([], [], M)
    plan = ot.sinkhorn([], [], M, 0.05)
    assert abs(plan - np.outer(plan.sum(1), plan.sum(0))).max() > 1e-3  # the original's
    assert ot.sinkhorn([], [], M, 0.06).shape == (30, 35)
    assert random.random() == random.Random(3).random()
    assert np.random.rand() == np.random.RandomState(3).rand()
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(3))
"""


def test_what_is_found(tmp_path, monkeypatch, capfd):
    """Defects of POT, a wrong drop-in, one that raises, draws and prints, and what did not reach sbot."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out = tmp_path / "report.json"
    command = ["migrate", "--json", str(out), "--fail-above", "1e-6", "--", *script(tmp_path, FINDINGS)]
    told = CliRunner().invoke(commands, command)
    assert told.exit_code == 3, told.output
    program = capfd.readouterr()
    assert "noise" not in program.out + program.err
    data = json.loads(out.read_text(encoding="utf-8"))
    functions, calls = data["functions"], data["calls"]
    sinkhorn = functions["ot.bregman.sinkhorn"]
    assert sinkhorn["verdicts"] == {"agree": 1, "defect avoided": 2, "sbot at fault": 2}, told.stderr
    assert sinkhorn["defects_avoided"] == {"marginals missed": 1, "no mass": 1}
    assert functions["ot.bregman.sinkhorn2"]["defects_avoided"] == {"marginals missed": 1}
    assert functions["ot.solvers.solve"]["defects_avoided"] == {"known defect": 1}
    assert functions["ot.solvers.solve"]["forwarded"] == {"reg=None: not regularised": 1}
    assert data["not_covered"] == {"ot.emd": 1}
    assert sinkhorn["deviations"]["plan"]["relative"] < 1e-6  # of the sound calls
    assert sinkhorn["deviations_of_all_calls"]["plan"]["relative"] == "inf"
    assert all(seconds > 0 for seconds in sinkhorn["seconds"].values())
    if Path("/proc/self/clear_refs").exists():
        assert all(peak is not None for peak in sinkhorn["peak_bytes"].values())
    first = calls[0]
    assert first["where"].endswith("program.py:20")
    assert first["errors"][0] > 1e-3 > 1e-6 > first["errors"][1]
    wrong, raised = (call for call in calls if call["verdict"] == "sbot at fault")
    assert "is reached" in wrong["faults"][1]  # it has the marginals, and a higher objective
    assert raised["faults"] == ["", "raised RuntimeError: no such luck"]
    assert "SBOT AT FAULT (the original's answer is sound and sbot's is not): 2\n" in told.stderr
    assert "2 calls where sbot is at fault" in told.stderr
    assert "ot.emd: 1 call; not covered" in told.stderr


def test_a_limit_is_on_sound_answers(tmp_path):
    """A deviation from an answer that is at fault is no failure."""
    sides = {side: {"seconds": 1.0, "bytes": None} for side in ("original", "sbot")}
    call = {
        "event": "call",
        "name": "f",
        "where": "x:1",
        "options": {},
        "faults": ["", ""],
        "errors": [None, None],
        **sides,
    }
    events = [
        {**call, "verdict": "defect avoided", "kind": "no mass", "deviations": {"plan": [1.0, 1.0]}},
        {**call, "verdict": "differ", "kind": "", "deviations": {"plan": [0.1, 0.2], "potentials": [9.0, 9.0]}},
    ]
    (tmp_path / "1.jsonl").write_text("\n".join(map(json.dumps, events)), encoding="utf-8")
    report = Report(tmp_path, ["x"], "original", 0, 1.0)
    assert report.above(0.3) == []
    assert report.above(0.1) == ["f deviates by 2.0e-01"]
    assert "1.0e-01 (2.0e-01)" in report.text()


def test_geomloss(tmp_path):
    pytest.importorskip("geomloss")
    report = run(
        script(
            tmp_path,
            """
            import torch
            from geomloss import SamplesLoss
            from geomloss.ot import solve
            generator = torch.Generator().manual_seed(0)
            x, y = torch.rand(30, 2, generator=generator), torch.rand(40, 2, generator=generator)
            x.requires_grad_()
            SamplesLoss(blur=0.5, scaling=0.99)(x, y).backward()
            SamplesLoss(blur=0.05)(x, y)  # its ladder ends early
            SamplesLoss("energy")(x, y)
            solve(torch.cdist(x, y).detach(), reg=0.5, max_iter=500)
            """,
        )
    )
    loss = report.functions["geomloss.SamplesLoss"]
    assert loss.verdicts == {"agree": 1, "defect avoided": 1, "forwarded": 1}, report.text()
    assert loss.reasons == {"loss='energy' is not transport": 1}
    assert report.functions["geomloss.ot.solve"].verdicts == {"agree": 1}, report.text()


# ---- nothing to find -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (None, "no Python process was seen"),
        ("1", "nothing was swapped"),
        ("import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; import ot", "pip install pot"),
        ("import os, sys; sys.path.insert(0, os.getcwd()); import ot", "is not that of the library"),
    ],
)
def test_nothing_compared_is_said(code, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ot.py").write_text("", encoding="utf-8")
    command = ["true"] if code is None else [sys.executable, "-c", code]
    if "site-packages" in str(code):
        (tmp_path / "ot.py").unlink()
    told = CliRunner().invoke(commands, ["migrate", "--", *command])
    assert told.exit_code == 1
    assert says in told.stderr
    assert "Traceback" not in told.stderr


def test_bad_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text("", encoding="utf-8")
    for command, says in (([], "write it after --"), (["no-such"], "not found"), (["program.py"], "python program.py")):
        with pytest.raises(InvalidProblem, match=says):
            run(command)
    with pytest.raises(InvalidProblem, match="returned"):
        run(["true"], "both")


@pytest.fixture
def attentive():
    """SIGINT as at a terminal: what a shell starts in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("attentive")
def test_ctrl_c_is_the_programs_and_there_is_a_report(tmp_path):
    """A terminal sends the signal to both."""
    report = run(
        script(
            tmp_path,
            """
            import os, signal, time
            os.kill(os.getppid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)
            """,
        )
    )
    assert report.status == 130
    assert "0 calls made on both sides, in 1 process" in report.text()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler  # as it was


# ---- the parts -----------------------------------------------------------------------------------------------------


def test_a_line_cut_off_is_left_out(tmp_path):
    (tmp_path / "1.jsonl").write_text('{"event": "other", "name": "ot.emd"}\n{"event": "oth', encoding="utf-8")
    report = Report(tmp_path, ["x"], "original", 0, 1.0)
    assert report.others == {"ot.emd": 1}


def test_bindings_are_put_back():
    import ot

    before = ot.sinkhorn, ot.da.sinkhorn
    target = next(target for target in targets("ot") if target.name == "ot.bregman.sinkhorn")
    bindings = Bindings()
    assert bindings.replace(target.theirs, target.mine, "ot") >= 4
    assert ot.sinkhorn is ot.da.sinkhorn is target.mine
    bindings.set(ot.da.SinkhornTransport, "transform_labels", None)  # inherited
    bindings.undo()
    assert (ot.sinkhorn, ot.da.sinkhorn) == before
    assert "transform_labels" not in vars(ot.da.SinkhornTransport)


def test_deviations():
    one, other = parts(np.full((2, 2), 0.25)), parts(np.array([[0.25, 0.25], [0.2, 0.3]]))
    assert deviations(one, other)["plan"] == pytest.approx((0.05, 0.05 / 0.3))
    assert deviations(one, parts(np.full((2, 2), np.nan)))["plan"] == (np.inf, np.inf)
    assert deviations(one, parts(np.ones((2, 3))))["plan"] == (np.inf, np.inf)
    shifted = tuple(torch.zeros(3) + c for c in (1.0, -1.0))
    assert deviations(parts(shifted), parts((torch.zeros(3), torch.zeros(3))))["potentials"][0] == 0
    moved = (torch.tensor([0.0, 0.5]), torch.tensor([0.0, -0.25]))
    assert deviations(parts(moved), parts((torch.zeros(2), torch.zeros(2))))["potentials"][0] == 0.5


def test_the_judge_goes_by_the_problem():
    rng = np.random.default_rng(0)
    a, b, M = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(5)), rng.random((4, 5))
    asked = question("ot.bregman.sinkhorn", {"a": a, "b": b, "M": M, "reg": 0.1, "stopThr": 1e-9})
    assert isinstance(asked, Question)
    product = a[:, None] * b
    assert examine(asked, {"plan": product}).fault == ""
    assert examine(asked, {"plan": product * np.nan}).kind == "not finite"
    assert examine(asked, {"plan": product * 1e-6}).kind == "no mass"
    assert examine(asked, {"plan": product * 0.9}).kind == "marginals missed"
    best = sbot.solve_bridge(a, b, 0.1, cost=M).plan().numpy()
    found = examine(asked, {"plan": product}), examine(asked, {"plan": best})
    assert higher(found[0], found[1], asked) > 0
    assert higher(found[1], found[0], asked) == 0
    relaxed = question("ot.unbalanced.sinkhorn_unbalanced", {"a": a, "b": b, "M": M, "reg": 0.1, "reg_m": 1.0})
    found = examine(relaxed, {"plan": best * 0.5}), examine(relaxed, {"plan": best})
    assert found[0].fault == ""  # any mass is allowed
    assert higher(found[0], found[1], relaxed) > 0
