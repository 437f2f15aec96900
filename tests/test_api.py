"""The public face: names, docstrings, imports, layers, and what may never appear in the package."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sbot
from sbot import metrics, plot

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sbot"

#: Public names that need no example of their own: one does not call them.
ABSTRACT = {"Bridge", "Cost", "LinearReference", "Measure", "Reference", "Solver"}
ERRORS = {
    "InvalidFile",
    "InvalidProblem",
    "NotConverged",
    "NumericalError",
    "PrecisionWarning",
    "SbotError",
    "Unsupported",
}
RESULTS = {"DualPotential", "PotentialBridge", "Potentials", "Problem", "Progress", "Report"}
TUPLES = {"AUTO", "SOLVERS"}

#: Imports upwards that are allowed, inside a function only.
LAZY_UPWARDS = {("sbot.bridge", "sbot.plot")}
#: Heavy or optional packages that `import sbot` must not load.
HEAVY = ("matplotlib", "ot", "sklearn", "click", "scipy")


# ---- names and docstrings ------------------------------------------------------------------------------------------


def case(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions; each in alphabetical order."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_all_is_sorted_unique_and_there():
    assert sbot.__all__ == sorted(set(sbot.__all__), key=case)
    missing = [name for name in sbot.__all__ if not hasattr(sbot, name)]
    assert not missing


def test_star_import():
    namespace: dict[str, object] = {}
    exec("from sbot import *", namespace)
    assert set(sbot.__all__) <= set(namespace)


def test_exceptions_to_the_docstring_rule_are_public():
    assert set(sbot.__all__) >= ABSTRACT | ERRORS | RESULTS | TUPLES
    for name in ABSTRACT:
        assert inspect.isabstract(getattr(sbot, name)), f"{name} is not abstract: give it an example"
    for name in ERRORS:
        assert issubclass(getattr(sbot, name), (sbot.SbotError, UserWarning))
    for name in TUPLES:
        assert isinstance(getattr(sbot, name), tuple)


@pytest.mark.parametrize("name", sorted(set(sbot.__all__) - TUPLES))
def test_docstring(name):
    doc = inspect.getdoc(getattr(sbot, name)) or ""
    assert doc.split("\n")[0].strip(), f"{name} has no docstring"
    if name not in ABSTRACT | ERRORS | RESULTS:
        assert ">>>" in doc, f"{name} has no example"


@pytest.mark.parametrize("name", sorted({*sbot.__all__} - TUPLES - ERRORS))
def test_public_methods_have_docstrings(name):
    cls = getattr(sbot, name)
    if not inspect.isclass(cls):
        return
    for method, value in vars(cls).items():
        if not method.startswith("_") and callable(getattr(cls, method)) and inspect.isfunction(value):
            assert inspect.getdoc(getattr(cls, method)), f"{name}.{method} has no docstring, nor has what it overrides"


def test_errors_are_what_one_would_catch():
    assert issubclass(sbot.InvalidProblem, ValueError)
    assert issubclass(sbot.Unsupported, NotImplementedError)
    assert issubclass(sbot.NumericalError, ArithmeticError)
    assert issubclass(sbot.InvalidFile, ValueError)
    assert issubclass(sbot.NotConverged, UserWarning)


def test_api_page_lists_the_public_names():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").split("## Modules")[0]
    listed = re.findall(r"^\| `(\w+)` \| .+ \|$", page, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == set(sbot.__all__)


@pytest.mark.parametrize("module", [metrics, plot], ids=["metrics", "plot"])
def test_api_page_lists_the_functions_of_a_module(module):
    name = module.__name__.removeprefix("sbot.")
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    rows = "".join(re.findall(rf"^\| `{name}` \|([^|]*)\|", page, re.MULTILINE))
    functions = inspect.getmembers(module, inspect.isfunction)
    public = {key for key, value in functions if value.__module__ == module.__name__ and not key.startswith("_")}
    assert set(re.findall(r"`(\w+)`", rows)) == public


def test_api_page_lists_the_methods_of_a_bridge():
    table = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").split("## A bridge's methods")[1]
    rows = "".join(line.split("|")[1] for line in table.splitlines() if line.startswith("| `"))
    listed = set(re.findall(r"`(\w+)\(", rows))
    public = {name for name in vars(sbot.Bridge) if not name.startswith("_") and callable(getattr(sbot.Bridge, name))}
    assert listed == public - {"state"}


# ---- importing -----------------------------------------------------------------------------------------------------


def test_import_is_silent_and_light(tmp_path):
    code = f"import sys, sbot; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
    assert run.stderr == ""


# ---- the source ----------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def documented_order() -> list[str]:
    """The modules in the order of their layers, as the tree in docs/architecture.md has them."""
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```text\nsbot/\n")[1].split("```")[0]
    names = ["sbot." + line.split()[0].removesuffix(".py").replace("/", ".") for line in tree.splitlines()]
    return [name.removesuffix(".__init__") for name in names]


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """The modules of the package that ``name`` imports, and whether it does so inside a function."""
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node, lazy in _import_nodes(TREES[name], False):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names if alias.name.split(".")[0] == "sbot")
            continue
        base = node.module or ""
        if node.level:
            above = package.split(".")
            base = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
        if base.split(".")[0] != "sbot":
            continue
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield (inner if inner in MODULES else base), lazy


def _import_nodes(node: ast.AST, lazy: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, lazy
        yield from _import_nodes(child, lazy or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))


def test_tree_in_the_documentation_is_the_tree():
    order = documented_order()
    assert len(order) == len(set(order))
    assert set(order) == set(MODULES), "docs/architecture.md: give each module one line in the tree, at its layer"


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_from_layers_below(name):
    rank = {module: k for k, module in enumerate(documented_order())}
    for target, lazy in imports(name):
        assert target in MODULES, f"{name} imports {target}, which is not a module"
        if (name, target) in LAZY_UPWARDS:
            assert lazy, f"{name} must import {target} inside a function"
        else:
            assert rank[target] < rank[name], f"{name} imports {target}, which is not below it in docs/architecture.md"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_unsafe(name):
    tree = TREES[name]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            bad = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
            assert not bad & {root.split(".")[0] for root in roots}, f"{name}, line {node.lineno}: {roots}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "torch.save"}, f"{name}, line {node.lineno}: {called}"
            pickles = [ast.unparse(word.value) for word in node.keywords if word.arg == "allow_pickle"]
            assert pickles in ([], ["False"]), f"{name}, line {node.lineno}: allow_pickle={pickles}"


@pytest.mark.parametrize("name", MODULES)
def test_global_generator_is_never_seeded(name):
    tree = TREES[name]
    sheltered = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"np.random.seed", "numpy.random.seed", "random.seed"}, f"{name}, line {node.lineno}"
        # a generator of one's own may be seeded; torch's and numpy's may not
        if called in {"torch.manual_seed", "torch.random.manual_seed", "torch.seed", "torch.cuda.manual_seed_all"}:
            assert id(node) in sheltered, f"{name}, line {node.lineno}: {called} outside fork_rng"


@pytest.mark.parametrize("name", MODULES)
def test_global_settings_are_left_alone(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            forbidden = {"torch.set_default_dtype", "torch.set_default_device", "torch.set_num_threads"}
            assert called not in forbidden, f"{name}, line {node.lineno}: {called}"
