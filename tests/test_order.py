"""Folder order is data flow: a module imports only from modules before it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "python"

# The longest name that a module starts with gives its place; modules of one place may import from each other.
ORDER = (
    ("qk._core", "qk.errors"),
    ("qk.fields",),
    ("qk._native", "qk.files", "qk.inputs", "qk.progress", "qk.tables", "qk.timing"),
    ("qk.options",),
    ("qk.spec",),
    ("qk.ops", "qk.machine"),
    ("qk.prepare",),
    ("qk.calibrate",),
    ("qk.methods",),
    ("qk.deploy",),
    ("qk.search",),
    ("qk.hago",),
    ("qk.page", "qk.report"),
    ("qk.flow",),
    ("qk.curve", "qk.curve_page"),
    ("qk.judge",),
    ("qk.pareto",),
    ("qk.cheapest",),
    ("qk.demo.digits",),
    ("qk.sources", "qk.words"),
    ("qk.inspection", "qk.doctor", "qk.demo"),
    ("qk.bench.harness",),
    ("qk.bench",),
    ("qk.search_command", "qk.hago_command"),
    ("qk.cli",),
)


def place(module: str) -> int:
    """Of a module's dotted name; `qk` itself is the shop window and comes last."""
    if module == "qk":
        return len(ORDER)
    found = {len(n): i for i, names in enumerate(ORDER) for n in names if module == n or module.startswith(n + ".")}
    assert found, f"{module} has no place in ORDER"
    return found[max(found)]


def imported(text: str, root: Path) -> set[str]:
    """Dotted names of qk's modules that a source imports, anywhere in it; `from a import b` may be a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if is_module(name, root) else node.module for name in inside}
    return {name for name in names if name.split(".")[0] == "qk"}


def is_module(name: str, root: Path) -> bool:
    path = root / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file() or name == "qk._core"


def backwards(root: Path) -> list[str]:
    """ "module imports later module" for each import against the order."""
    found = []
    for file in sorted((root / "qk").rglob("*.py")):
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        later = sorted(n for n in imported(file.read_text(), root) if place(n) > place(module))
        found += [f"{module} imports {name}" for name in later]
    return found


def test_no_stage_imports_from_a_later_one():
    assert backwards(ROOT) == ["qk.cli imports qk"]  # the command line uses the public names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from qk.deploy import convert", ["qk.prepare.fold imports qk.deploy.convert"]),
        ("def f():\n    from qk import report", ["qk.prepare.fold imports qk.report"]),
        ("import qk.calibrate.ranges", ["qk.prepare.fold imports qk.calibrate.ranges"]),
        ("from qk.prepare import links\nfrom qk import ops\nimport torch", []),
    ],
)
def test_an_import_against_the_order_is_named(tmp_path, text, expected):
    for file in ("report.py", "deploy/convert.py", "calibrate/ranges.py", "prepare/links.py", "ops/lsq.py"):
        (tmp_path / "qk" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "qk" / file).write_text("")
    (tmp_path / "qk" / "prepare" / "fold.py").write_text(text)
    assert backwards(tmp_path) == expected
