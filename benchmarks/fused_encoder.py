"""What fusing a sentence encoder costs: docstring retrieval with MiniLM (proof/retrieval.py) before and after qk.fuse.

    PYTHONPATH=benchmarks python benchmarks/fused_encoder.py

Prints the table of docs/fuse.md. tensors=None changes no bit of the integer model.
"""

from __future__ import annotations

import qk
from proof.retrieval import RECIPES, Retrieval

RANGES = 8  # batches of 32 texts


def main() -> None:
    task = Retrieval()

    def show(name: str, model: object) -> None:
        scores = task.scores(model)
        print(f"| {name} | {scores['mrr']:.4f} | {scores['turned']:.4f} |", flush=True)

    print("| | MRR | 1 - cosine |\n|---|---|---|")
    show("float", task.model)
    for name in ("W8A8 nearest", "W4A8 groups of 64, nearest"):
        model = qk.quantize(task.model, task.calibration, RECIPES[name], fused=False, measure=False).model
        example = task.calibration[:RANGES]
        show(f"{name}, tensors=None", qk.fuse(model, example, tensors=None))
        show(f"{name}, tensors=8", qk.fuse(model, example))
        show(f"{name}, tensors=8, percentile", qk.fuse(model, example, ranges="percentile"))


if __name__ == "__main__":
    main()
