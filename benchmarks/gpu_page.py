"""Fills docs/gpu.md from tests/cuda/budget.json and what `make gpu` wrote: benchmarks/results/gpu-*.json.

PYTHONPATH=python:benchmarks python -m gpu_page
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pages import fill
from qk.tables import Table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "gpu.md"
BUDGET = ROOT / "tests" / "cuda" / "budget.json"
ARCHITECTURES = ("80", "90a", "120")
# Files whose kernels several operators run; any other is of the operator of its name.
OPERATORS = {
    "convolve": ("gemm", "conv2d"),
    "few_tokens": ("gemm", "conv2d"),
    "first_layer": ("conv2d",),
    "warp_groups": ("gemm", "conv2d"),
}
ONLY_ON = {"warp_groups": "9.0"}  # the compute capability without which a file's kernels do not run


def runs() -> list[dict[str, Any]]:
    """Of a GPU, the oldest first; the script that writes them can also be tried on a CPU."""
    found = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks" / "results").glob("gpu-*.json"))]
    return [run for run in found if run["machine"]["device"] == "cuda"]


def verified(name: str, of: Iterable[dict[str, Any]]) -> str:
    """The GPUs on which the tests of all of a file's operators passed."""
    operators = OPERATORS.get(name, (name,))
    able = [run for run in of if ONLY_ON.get(name) in (None, run["machine"]["cc"])]
    passed = [run for run in able if run.get("check", {}).get("status") in (0, 1)]
    gpus = [r["machine"]["gpu"] for r in passed if not any(o in r["check"]["failed"] for o in operators)]
    return ", ".join(dict.fromkeys(gpus)) or "unverified"


def kernels(of: list[dict[str, Any]]) -> str:
    budget: dict[str, dict[str, list[int]]] = json.loads(BUDGET.read_text())
    rows = []
    for name in sorted({kernel.partition(":")[0] for kernel in budget}):
        own = [use for kernel, use in budget.items() if kernel.partition(":")[0] == name]
        registers = [max(use[arch][0] for use in own) for arch in ARCHITECTURES]
        shared = max(use[arch][1] for use in own for arch in ARCHITECTURES)
        rows.append([f"{name}.cu", len(own), *registers, shared, verified(name, of)])
    head = ["file", "kernels", *(f"registers, sm_{arch}" for arch in ARCHITECTURES), "shared bytes", "verified on"]
    return Table("", head, rows).markdown()


def measured(run: dict[str, Any]) -> str:
    """One run: the machine, what its checks said, and its cases."""
    facts = run["machine"]
    text = f"### {facts['gpu']}\n\nCompute capability {facts['cc']}, torch {facts['torch']}, "
    text += f"commit {facts['commit'][:12]}.\n"
    for step in ("check", "memcheck"):
        text += f"{step}: {run.get(step, {}).get('summary', 'not run')}.\n"
    rows = []
    for case in run.get("cases", []):
        if "median" not in case:
            rows.append([case.get("case", case.get("operator")), None, None, None, case.get("error", "failed")[:60]])
            continue
        share = f"{100 * case['floor'] / case['median']:.0f}" if case["floor"] else None
        peers = ", ".join(f"{peer} {time / case['median']:.2f}" for peer, time in case["peers"].items())
        rows.append([case["case"], f"{1e6 * case['median']:.2f}", f"{1e6 * case['cold']:.2f}", share, peers])
    head = ["case", "µs, warm", "µs, cold", "% of the limit", "peers' time over ours"]
    return text + "\n" + Table("", head, rows).markdown()


def main() -> None:
    found = runs()
    fill(PAGE, "kernels", kernels(found))
    none = "No GPU has run these kernels: there is no figure to show."
    fill(PAGE, "runs", "\n\n".join(map(measured, found)) or none)


if __name__ == "__main__":
    main()
