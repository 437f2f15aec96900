"""The documentation is run: every Python block of README.md and docs/*.md, in order, with warnings as errors."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from pathlib import Path

import pytest
import torch

import sbot

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
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
