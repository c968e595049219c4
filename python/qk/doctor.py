"""Looks at the installation: versions, what was built, what can run here, and whether a kernel meets its definition."""

from __future__ import annotations

from typing import Any

import torch

from qk import _native, machine, ops
from qk.ops.gemm import reference as gemm_definition
from qk.ops.lsq import reference as lsq_definition
from qk.tables import Table

PACKAGES = ["torch", "numpy", "safetensors", "pydantic", "rich", "typer", "matplotlib", "scikit-learn", "torchvision"]


def examine() -> tuple[dict[str, Any], list[Table], bool]:
    """Facts for JSON, tables to show, and whether every check passed."""
    checks = {isa: _check(isa) for isa in _native.usable_isas()}
    facts = {
        "versions": {name: machine.installed_version(name) for name in PACKAGES},
        "machine": machine.fingerprint(),
        "build": _native.build_facts(),
        "instruction sets": {"usable": _native.usable_isas(), "active": _native.active_isa()},
        "cuda": _cuda(),
        "checks": checks,
    }
    build = facts["build"]
    rows = [
        ["qk built by", build["compiler"]],
        ["qk built against torch", build["torch"]],
        [
            "CUDA kernels built with",
            f"nvcc {build['cuda']} for {build['cuda_archs']}" if build["cuda"] else "not built",
        ],
        ["CUDA", facts["cuda"]],
        ["instruction sets", ", ".join(f"{i} (used)" if i == _native.active_isa() else i for i in checks)],
        *([name, value] for name, value in facts["machine"].items() if name not in ("compiler", "instruction set")),
    ]
    versions = [[name, value or "not installed"] for name, value in facts["versions"].items()]
    results = [[f"kernels on {isa}", result] for isa, result in checks.items()]
    shown = [Table("", ["this installation", ""], rows), Table("", ["package", "version"], versions)]
    shown.append(Table("", ["check against the definitions", "result"], results))
    return facts, shown, all(result == "equal" for result in checks.values())


def _cuda() -> str:
    """ "usable on NAME", or why it is not."""
    if _native.cuda_error is not None:
        return f"not usable: {_native.cuda_error}"
    if not torch.cuda.is_available():
        return "not usable: torch finds no GPU (is there a driver? nvidia-smi shows it)"
    return f"usable on {torch.cuda.get_device_name()}"


def _check(isa: str) -> str:
    """A float and an integer kernel on inputs of odd sizes beside their definitions; "equal", or what went wrong."""
    before = _native.active_isa()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 77, generator=generator)
    step, zero = torch.rand(3, generator=generator) * 0.2 + 0.05, torch.tensor([3, 8, 0], dtype=torch.int32)
    weight = torch.randint(0, 16, (3, 77), generator=generator, dtype=torch.uint8)
    inputs = torch.randint(0, 256, (5, 77), generator=generator, dtype=torch.uint8), step[:1], zero[:1]
    try:
        _native.force_isa(isa)
        same = torch.equal(ops.lsq(x, step, zero, 4, 1.0), lsq_definition(x, step, zero, 4))
        packed = ops.prepack(ops.pack(weight, 4), zero, 4, (3, 77))
        product = ops.gemm(*inputs, packed, step, None, 4)
        same = same and torch.equal(product, gemm_definition(*inputs, weight, zero, step))
    except RuntimeError as error:
        return str(error)
    finally:
        _native.force_isa(before)
    return "equal" if same else "differs"
