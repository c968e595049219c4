"""Every operator of csrc/schema.cpp has all of its parts under its own name."""

import re
from pathlib import Path

import pytest
import torch

import qk

ROOT = Path(__file__).parents[1]
FILES = {
    "face": "csrc/ops/{}.cpp",
    "CPU kernel": "csrc/cpu/{}.simd.cpp",
    "CUDA kernel": "csrc/cuda/{}.cu",
    "Python side": "python/qk/ops/{}.py",
    "test": "tests/ops/test_{}.py",
    "benchmark": "benchmarks/ops/bench_{}.py",
}
# It calls the kernels of the others and has none of its own.
COMPOSED = {"network": ("CPU kernel", "CUDA kernel")}


def declared(root: Path) -> list[str]:
    """Names of all operators on the schema page."""
    return re.findall(r'm\.def\(\s*"(\w+)\(', (root / "csrc/schema.cpp").read_text())


def operators(root: Path) -> list[str]:
    """The operators that have files of their own: a backward lives in those of its forward."""
    return [name for name in declared(root) if not name.endswith("_backward")]


def missing(root: Path, op: str) -> list[str]:
    """What `op` lacks under root, in words."""
    files = {part: path.format(op) for part, path in FILES.items() if part not in COMPOSED.get(op, ())}
    gaps = [f"{part}: {path}" for part, path in files.items() if not (root / path).is_file()]
    python = root / FILES["Python side"].format(op)
    names = [name for name in declared(root) if name in (op, f"{op}_backward")]
    for name in names:
        definition = "reference" + name.removeprefix(op)
        if python.is_file() and not re.search(rf"^def {definition}\(", python.read_text(), re.MULTILINE):
            gaps.append(f"definition: {definition} in {python.relative_to(root)}")
    return gaps


def unregistered(names: list[str]) -> list[str]:
    """What the dispatcher lacks for these operators."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return [
        f"{what} of {n}" for n in names for what, key in (("CPU", "CPU"), ("fake", "Meta")) if not has(f"qk::{n}", key)
    ]


@pytest.mark.parametrize("op", operators(ROOT))
def test_operator_is_complete(op):
    names = [name for name in declared(ROOT) if name in (op, f"{op}_backward")]
    assert missing(ROOT, op) + unregistered(names) == []


def test_every_python_side_is_an_operator_and_exported():
    files = {path.stem for path in (ROOT / "python/qk/ops").glob("[!_]*.py")}
    assert files <= set(operators(ROOT))
    assert files <= set(qk.ops.__all__)


@pytest.fixture
def tree(tmp_path):
    """A complete operator `twice` with a backward."""
    parts = {path.format("twice"): "" for path in FILES.values()}
    parts["csrc/schema.cpp"] = (
        '  m.def("twice(Tensor x) -> Tensor");\n  m.def(\n      "twice_backward(Tensor g) -> Tensor");\n'
    )
    parts["python/qk/ops/twice.py"] = "def reference(x):\n    ...\n\n\ndef reference_backward(g):\n    ...\n"
    for path, text in parts.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    return tmp_path


def test_a_complete_operator_lacks_nothing(tree):
    assert operators(tree) == ["twice"]
    assert missing(tree, "twice") == []


@pytest.mark.parametrize("part", FILES)
def test_a_part_that_is_gone_is_named(part, tree):
    (tree / FILES[part].format("twice")).unlink()
    assert missing(tree, "twice") == [f"{part}: {FILES[part].format('twice')}"]


def test_a_definition_that_is_gone_is_named(tree):
    (tree / "python/qk/ops/twice.py").write_text("def reference(x):\n    ...\n")
    assert missing(tree, "twice") == ["definition: reference_backward in python/qk/ops/twice.py"]


def test_a_fake_that_is_gone_is_named():
    library = torch.library.Library("qk_complete_test", "DEF")
    library.define("bare(Tensor x) -> Tensor")
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert not has("qk_complete_test::bare", "Meta")
    torch.library.register_fake("qk_complete_test::bare", torch.empty_like, lib=library)
    assert has("qk_complete_test::bare", "Meta")
