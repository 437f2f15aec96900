"""The documentation is run: every Python block of README.md and docs/*.md, in order, with warnings as errors."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import sbot
from sbot import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PRINTS = re.compile(r"# prints (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]*)(?:#([^)]*))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def blocks(page: Path) -> list[tuple[int, str]]:
    """The first line number and the text of each Python block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)
        warnings.simplefilter("error")
        for line, source in blocks(page):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                # blank lines in front, so that a traceback shows the line of the page
                exec(compile("\n" * line + source, str(page), "exec"), namespace)
            expected = [said.strip() for said in PRINTS.findall(source)]
            assert printed.getvalue().splitlines() == expected, f"{page.name}, block at line {line + 1}"


def test_commands_of_the_readme_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    np.save("x.npy", torch.randn(40, 2, generator=generator).numpy())
    np.save("y.npy", torch.randn(50, 2, generator=generator).numpy() + 3)
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## The command line")[1].split("```")[1]
    commands = [shlex.split(line)[3:] for line in text.splitlines() if line.startswith("python -m sbot")]
    assert [command[0] for command in commands] == ["solve", "info", "sample", "transport", "plot", "demo"]
    for command in commands[:-1]:  # the demo has tests of its own
        with pytest.raises(SystemExit) as done:
            cli.commands.main(command)
        assert done.value.code == 0, capsys.readouterr().err
    assert "converged    yes" in capsys.readouterr().out
    assert np.load("half.npy").shape == (1000, 2)
    assert np.loadtxt("moved.csv", delimiter=",").shape == (40, 2)
    assert (tmp_path / "paths.png").stat().st_size > 1000


def test_options_in_the_readme_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## The command line")[1].split("\n## ")[0]
    known = {option for command in cli.commands.commands.values() for param in command.params for option in param.opts}
    assert set(re.findall(r"--[a-z-]+", text)) - {"--help"} <= known


def test_pages_have_blocks():
    names = {page.name for page in PAGES}
    assert names >= {"README.md", "quickstart.md", "conventions.md", "choose-a-solver.md", "extend.md"}
    assert all(blocks(page) for page in PAGES if page.name not in {"architecture.md", "api.md"})


def test_first_example_is_short_and_early():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    line, source = blocks(ROOT / "README.md")[0]
    code = [row for row in source.splitlines() if row.strip()]
    assert "solve_bridge" in source
    assert len(code) == 5
    assert line + len(source.splitlines()) + 1 <= 20
    claim = text.split("```")[0].split("\n", 1)[1]
    assert len(re.findall(r"\.(?:\s|$)", claim)) == 3


@pytest.mark.parametrize(
    "page", [*PAGES, *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = HEADING.findall(re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.M | re.S))
            slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


def test_version_is_the_same_everywhere():
    assert f"\nversion: {sbot.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {sbot.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
