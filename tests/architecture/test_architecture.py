"""The shape of the code base: layers, sizes, import weight, no pickle."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "polyrank"
FILES = sorted(SOURCE.rglob("*.py"))

# Each module may import from its own layer and the layers before it.
LAYERS = [
    ["errors", "schema", "seed", "measures"],
    ["durable"],
    ["tables"],
    ["adapter", "recipes", "device"],
    ["importance"],
    ["messages"],
    ["state", "data", "models", "fused"],
    ["wire", "sampling", "voting", "allocation", "aggregation", "lowrank", "cost"],
    ["accountant", "changes", "evaluation", "clock", "gate"],
    ["generation"],
    ["charges"],
    ["robust", "privacy"],
    ["session", "received", "grouping"],
    ["client"],
    ["engine"],
    ["collect"],
    ["round"],
    ["config", "ledger", "checkpoint"],
    ["commit", "site", "kit", "streams"],
    ["export", "card", "report", "doctor", "progress", "calibrate", "assemble"],
    ["experiment", "samples"],
    ["restart"],
    ["compare", "plan", "replay", "speak", "memory", "network"],
    ["remote"],
    ["provision"],
    ["cli", "cli_network"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(path: Path) -> set[str]:
    """First-level polyrank modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("polyrank."):
            names.add((node.module or "").split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("polyrank.")}
    return names


def top(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_no_arrow_goes_back(path):
    if top(path) == "__init__":
        return  # the lazy front door
    for name in imports(path):
        assert LEVEL[name] <= LEVEL[top(path)], f"{top(path)} must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(SOURCE).as_posix())
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name
            parameters = node.args.args + node.args.kwonlyargs
            assert len([p for p in parameters if p.arg not in ("self", "cls")]) <= 7, node.name
            assert not node.name.startswith(("do_", "process_", "handle_")), node.name


def test_method_files_begin_with_a_card():
    for folder in ("aggregation", "allocation"):
        for path in (SOURCE / folder).glob("*.py"):
            if path.stem in ("__init__", "base", "product", "error"):
                continue
            card = ast.get_docstring(ast.parse(path.read_text())) or ""
            assert card.startswith(f"{path.stem}: "), path
            assert "Source: " in card, path


def test_no_pickle_and_no_foreign_code():
    for path in FILES:
        tree = ast.parse(path.read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
        assert names.isdisjoint({"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"}), path
        calls = {ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        assert calls.isdisjoint({"torch.load", "torch.save", "np.load", "eval", "exec"}), path
        assert "trust_remote_code" not in path.read_text()


def test_help_is_quick_and_light():
    code = """
import sys
from polyrank.cli import main
sys.argv = ["polyrank", "--help"]
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "transformers", "pydantic", "matplotlib", "datasets", "numpy", "scipy", "pyarrow", "peft"}
assert heavy.isdisjoint(sys.modules), heavy & set(sys.modules)
"""

    def cpu_s(code: str) -> tuple[float, str]:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout

    assert "Fine-tune one language model" in cpu_s(code)[1]
    turns = [(cpu_s(code)[0], cpu_s("import typer.rich_utils")[0]) for _ in range(3)]
    ours, least = (min(column) for column in zip(*turns, strict=True))
    assert ours < 2 * least  # of what any command with such a help takes


def test_importing_polyrank_is_light():
    code = "import sys, polyrank; assert 'torch' not in sys.modules; assert polyrank.Config().rounds"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
