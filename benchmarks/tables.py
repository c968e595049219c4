"""Fills the tables of operators in docs/results.md from the files under benchmarks/results.

for b in lsq soft_round rounding_penalty fisher_loss quantize gemm gemm_weight_only conv2d; do
    python benchmarks/ops/bench_$b.py --threads 1 --json benchmarks/results/$b.json; done
python benchmarks/bench_brecq_loop.py --json benchmarks/results/brecq_loop.json
python benchmarks/tables.py
"""

from __future__ import annotations

import json
from pathlib import Path

from pages import fill
from qk.tables import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
OPERATORS = ("lsq", "soft_round", "rounding_penalty", "fisher_loss", "quantize", "gemm", "gemm_weight_only", "conv2d")


def table(name: str) -> str:
    """One row a case: median and p10 to p90 of ours, each peer's median over ours, ours against the limit."""
    result = json.loads((RESULTS / f"{name}.json").read_text())
    machine, cases = result["machine"], result["cases"]
    peers = list(dict.fromkeys(peer for case in cases for peer in case["ratio"] if peer != "limit"))
    limited = any("limit" in case["ratio"] for case in cases)
    headers = ["case", "ms", "p10 to p90", *(f"{peer} / ours" for peer in peers)] + ["% of the limit"] * limited
    rows = []
    for case in cases:
        low, middle, high = case["ms"]["ours"]
        row = [case["name"], f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        row += [f"{case['ratio'][peer]:.2f}" if peer in case["ratio"] else "" for peer in peers]
        rows.append(row + [f"{100 * case['ratio']['limit']:.0f}" if "limit" in case["ratio"] else ""] * limited)
    facts = f"{machine['cpu']}, threads {machine['threads']}, {machine['instruction set']}, torch {machine['torch']}"
    return f"### {name}\n\n{facts}.\n\n{Table('', headers, rows).markdown()}"


def loop() -> str:
    cases = json.loads((RESULTS / "brecq_loop.json").read_text())["cases"]
    ours, eager = (sum(case["ms"][side][1] for case in cases) for side in ("ours", "eager"))
    together = f"All units together: {ours:.0f} ms against {eager:.0f} ms, {ours / eager:.2f} of eager."
    return f"{table('brecq_loop')}\n\n{together}"


if __name__ == "__main__":
    fill(ROOT / "docs" / "results.md", "operators", "\n\n".join([*map(table, OPERATORS), loop()]))
