"""What 2, 4 and 8 bits for embedding tables cost a click-through network trained here.

Tables alone are quantized, by qk.quantize, but for one case that has integer layers too. A row is a case and the seed
of a training: area under the ROC curve (AUC), log loss, the length of the tables' error over that of the tables, bytes,
and whether the integer model agrees with the definition of its operators. Rows are kept; a study goes on where it was.
"""

from __future__ import annotations

import argparse
import copy
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import mean

import torch
from torch import nn

import qk
from pages import fill
from proof import traffic
from proof.ledger import Ledger, Row, said
from qk.deploy import definition
from qk.options import Embeddings
from qk.spec import Recipe
from qk.tables import Table

ROOT = Path(__file__).parents[2]
LAYERS = ("bottom.*", "top.*")
ORDER = ("kmeans", "greedy", "asymmetric", "symmetric")  # from the least error to the most, as the paper has it
METHODS = {8: ("asymmetric",), 4: (*reversed(ORDER), "two-tier"), 2: (*reversed(ORDER), "two-tier")}
CASES = {
    f"{bits} bits {method}": Recipe(method="nearest", embeddings=Embeddings(bits, method), skip=LAYERS)
    for bits, methods in METHODS.items()
    for method in methods
}
CASES["4 bits greedy, layers W8A8"] = Recipe(weights=8, method="nearest", embeddings=Embeddings(4, "greedy"))


@cache
def ranker(seed: int) -> nn.Module:
    return traffic.trained(seed, ROOT / ".cache" / "proof")


def tables_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]


def floating(seed: int) -> Row:
    """The trained network, and what is left of it without its tables: with every value 0."""
    model = ranker(seed)
    area, loss = traffic.scores(model)
    blind = copy.deepcopy(model)
    for table in tables_of(blind):
        nn.init.zeros_(table.weight)
    size = sum(table.weight.nbytes for table in tables_of(model))
    return {"auc": area, "log loss": loss, "without tables": traffic.scores(blind)[0], "bytes": size}


def measure(seed: int, recipe: Recipe) -> Row:
    model = ranker(seed)
    result = qk.quantize(model, traffic.batches(1024), recipe, measure=False, fused=False, progress=False)
    area, loss = traffic.scores(result.model)
    inputs, _ = traffic.drawn()[1].batch(0, 256)
    with torch.no_grad(), result.prepared.quantized() as simulated:
        found = result.model(**inputs)
        apart = (simulated(**inputs) - found).abs().max().item()
        with definition():
            same = torch.equal(found, result.model(**inputs))
    errors = {name: table.error for name, table in result.prepared.quant_tables().items()}
    squares = {name: model.get_submodule(name).weight.double().square().sum().item() for name in errors}
    noise = sum(errors[name] ** 2 * squares[name] for name in errors)
    return {
        "auc": area,
        "log loss": loss,
        "error": (noise / sum(squares.values())) ** 0.5,
        "errors": errors,
        "equals definition": same,
        "from simulation": apart,
        "bytes": sum(table.integer_bytes for table in result.report.embeddings),
        "quantizing": round(result.report.seconds["calibrate"], 1),
    }


def spread(values: list[float], form: str) -> str:
    return f"{min(values):{form}} to {max(values):{form}}"


def ordering(found: dict[str, list[Row]]) -> str:
    """How many tables have their errors in the order of the paper, in words."""
    lines = []
    for bits in (4, 2):
        cases = [found[f"{bits} bits {method}"] for method in ORDER]
        kept = [
            all(better < worse for better, worse in pairwise(row["errors"][table] for row in rows))
            for rows in zip(*cases, strict=True)  # of one seed
            for table in rows[0]["errors"]
        ]
        lines.append(f"{sum(kept)} of {len(kept)} tables at {bits} bits")
    return f"Errors rise in the order {', '.join(ORDER)} for {', '.join(lines)} (all seeds)."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "proof-clicks.json")
    parser.add_argument("--seeds", type=int, default=3, help="of training")
    options = parser.parse_args()
    ledger, seeds = Ledger(options.out), range(options.seeds)
    base = [ledger.row({"case": "float", "seed": seed}, lambda seed=seed: floating(seed)) for seed in seeds]
    area, loss = mean(row["auc"] for row in base), mean(row["log loss"] for row in base)
    size = base[0]["bytes"]
    rows = [["float", f"{area:.4f}", "", "", f"{loss:.4f}", "", "", f"{size / 1e6:.2f}", "", ""]]
    found: dict[str, list[Row]] = {}
    for name, recipe in CASES.items():
        facts = {"case": name, "recipe": said(recipe)}
        some = found[name] = [
            ledger.row(facts | {"seed": seed}, lambda seed=seed, recipe=recipe: measure(seed, recipe)) for seed in seeds
        ]
        lost = [1e4 * (row["auc"] - floats["auc"]) for row, floats in zip(some, base, strict=True)]
        more = [100 * (row["log loss"] / floats["log loss"] - 1) for row, floats in zip(some, base, strict=True)]
        small, same = some[0]["bytes"], all(row["equals definition"] for row in some)
        cells = [f"{mean(row['auc'] for row in some):.4f}", f"{mean(lost):+.2f}", spread(lost, "+.2f")]
        cells += [f"{mean(row['log loss'] for row in some):.4f}", f"{mean(more):+.3f}"]
        cells += [f"{mean(row['error'] for row in some):.4f}", f"{small / 1e6:.2f}", f"{100 * small / size:.1f}"]
        rows.append([name, *cells, "yes" if same else "NO"])
    head = [
        "tables",
        "AUC",
        "AUC from float (1e-4)",
        "lowest to highest",
        "log loss",
        "% from float",
        "error of tables",
    ]
    head += ["MB of tables", "% of float", "equals definition"]
    machine = base[0]["machine"]
    text = f"{traffic.TRAINED_ON:,} samples to train on, {traffic.TESTED_ON:,} to test; "
    text += f"seeds of training 0 to {seeds[-1]}; AUC in float {spread([row['auc'] for row in base], '.4f')}, "
    text += f"with all tables 0 {mean(row['without tables'] for row in base):.4f}. {ordering(found)}\n"
    text += f"Machine: {machine['cpu']}, threads {machine['threads']}.\n\n"
    fill(ROOT / "docs" / "results.md", "clicks", text + Table("", head, rows).markdown())


if __name__ == "__main__":
    main()
