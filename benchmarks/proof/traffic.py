"""Clicks drawn from a hidden model: categories with long tails, dense numbers, a label; and a network that learns them.

A value of a feature is drawn by its rank (Zipf), so that most rows of a large table are seen a few times or never. The
logit of a click is the sum of a bias for each value, of products of hidden vectors of values, and of the dense numbers.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor, nn

from proof import networks

ROWS = (100_000, 50_000, 20_000, 10_000, 5_000, 2_000, 1_000)  # of the tables with one value a sample
BAG_ROWS, BAG_MOST = 20_000, 8  # of the table with several, from 1 to so many a sample
DENSE, WIDTH, HIDDEN = 6, 32, 8
TRAINED_ON, TESTED_ON = 600_000, 100_000
SEED = 5  # of the data


@dataclass(frozen=True)
class Traffic:
    """dense float32 [n, DENSE]; ids int64 [n, tables]; values int64, those of the bags one after another, offsets int64
    [n], where each begins; clicks float32 [n], 0 or 1."""

    dense: Tensor
    ids: Tensor
    values: Tensor
    offsets: Tensor
    clicks: Tensor

    def __len__(self) -> int:
        return len(self.clicks)

    def batch(self, begin: int, end: int) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the network and clicks of the samples begin to end."""
        first, last = self.offsets[begin], self.offsets[end] if end < len(self) else len(self.values)
        offsets = self.offsets[begin:end] - first
        inputs = {"dense": self.dense[begin:end], "ids": self.ids[begin:end]}
        return inputs | {"values": self.values[first:last], "offsets": offsets}, self.clicks[begin:end]


@cache
def drawn() -> tuple[Traffic, Traffic]:
    """To train on, to test on."""
    rng = np.random.default_rng(SEED)
    tables = [*ROWS, BAG_ROWS]
    biases = [0.5 * rng.standard_normal(n).astype(np.float32) for n in tables]
    vectors = [rng.standard_normal((n, HIDDEN)).astype(np.float32) / HIDDEN**0.25 for n in tables]
    slopes = 0.3 * rng.standard_normal(DENSE).astype(np.float32)
    return _draw(rng, TRAINED_ON, biases, vectors, slopes), _draw(rng, TESTED_ON, biases, vectors, slopes)


def _draw(
    rng: np.random.Generator, n: int, biases: list[np.ndarray], vectors: list[np.ndarray], slopes: np.ndarray
) -> Traffic:
    dense = rng.standard_normal((n, DENSE)).astype(np.float32)
    ids = np.stack([_ranked(rng, len(bias), n) for bias in biases[:-1]], 1)
    sizes = rng.integers(1, BAG_MOST + 1, n)
    values, offsets = _ranked(rng, len(biases[-1]), sizes.sum()), np.cumsum(sizes) - sizes
    mean = np.add.reduceat(vectors[-1][values], offsets) / np.sqrt(sizes)[:, None]
    bag_bias = np.add.reduceat(biases[-1][values], offsets) / np.sqrt(sizes)
    parts = [*(vector[ids[:, i]] for i, vector in enumerate(vectors[:-1])), mean]
    total = sum(parts)
    pairs = ((total**2).sum(1) - sum((part**2).sum(1) for part in parts)) / 2  # of all products of two features
    logit = -1.5 + sum(bias[ids[:, i]] for i, bias in enumerate(biases[:-1])) + bag_bias + dense @ slopes + 0.25 * pairs
    clicks = rng.random(n) < 1 / (1 + np.exp(-logit))
    found = (dense, ids, values, offsets, clicks.astype(np.float32))
    return Traffic(*(torch.from_numpy(np.ascontiguousarray(x)) for x in found))


def _ranked(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Rows by Zipf's law, the places of the ranks in the table at random."""
    share = np.cumsum((np.arange(rows) + 2.0) ** -1.05)
    rank = np.searchsorted(share / share[-1], rng.random(count)).clip(max=rows - 1)
    return np.random.default_rng(rows).permutation(rows)[rank]


class Ranker(nn.Module):
    """Like DLRM: products of all pairs of the looked-up vectors and one made of the dense numbers, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, WIDTH, sparse=True) for rows in ROWS)
        self.bag = nn.EmbeddingBag(BAG_ROWS, WIDTH, mode="mean", sparse=True)
        for table in (*self.tables, self.bag):
            nn.init.normal_(table.weight, std=0.05)
        self.bottom = nn.Sequential(nn.Linear(DENSE, 64), nn.ReLU(), nn.Linear(64, WIDTH), nn.ReLU())
        vectors = len(ROWS) + 2
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1), persistent=False)
        self.top = nn.Sequential(nn.Linear(WIDTH + self.pairs.shape[1], 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, dense: Tensor, ids: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        """The logit of each sample."""
        x = self.bottom(dense)
        looked_up = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        vectors = torch.stack([x, *looked_up, self.bag(values, offsets)], 1)
        products = (vectors @ vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([x, products], 1)).squeeze(1)


@dataclass(frozen=True)
class Training:
    """How a ranker is trained: one pass over the data, as clicks are; a cached one is bound to these values."""

    seed: int = 0
    batch_size: int = 256
    lr: float = 2e-3
    table_lr: float = 0.05


def train(config: Training) -> nn.Module:
    """The caller's random state is left as it was."""
    data, _ = drawn()
    with torch.random.fork_rng(devices=[]), torch.sparse.check_sparse_tensor_invariants(False):
        torch.manual_seed(config.seed)
        model = Ranker()
        tables = [*model.tables.parameters(), *model.bag.parameters()]
        dense = [*model.bottom.parameters(), *model.top.parameters()]
        optimizers = [torch.optim.Adagrad(tables, lr=config.table_lr), torch.optim.Adam(dense, lr=config.lr)]
        began, total = time.perf_counter(), 0.0
        starts = torch.arange(0, len(data), config.batch_size)
        for step, begin in enumerate(starts[torch.randperm(len(starts))].tolist(), 1):
            inputs, clicks = data.batch(begin, min(begin + config.batch_size, len(data)))
            loss = F.binary_cross_entropy_with_logits(model(**inputs), clicks)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            total += loss.item()
            if step % 400 == 0:
                networks.say(f"seed {config.seed}: {step} of {len(starts)}, loss {total / 400:.4f}")
                total = 0.0
        networks.say(f"seed {config.seed}: {time.perf_counter() - began:.0f} s")
    return model


def trained(seed: int, folder: str | Path) -> nn.Module:
    """A ranker of this seed, from the folder where it is there."""
    config = Training(seed)
    data = {"rows": ROWS, "bag": [BAG_ROWS, BAG_MOST], "data": [SEED, TRAINED_ON, DENSE, WIDTH, HIDDEN]}
    return networks.kept(folder, "ranker", asdict(config) | data, Ranker, lambda: train(config))


def batches(count: int, rows: int = 256) -> list[dict[str, Tensor]]:
    """The inputs of the first training samples, to calibrate."""
    data, _ = drawn()
    return [data.batch(begin, begin + rows)[0] for begin in range(0, count, rows)]


@torch.no_grad()
def scores(model: nn.Module) -> tuple[float, float]:
    """Area under the ROC curve and mean log loss on the test samples."""
    _, data = drawn()
    logits = [model(**data.batch(begin, begin + 5000)[0]) for begin in range(0, len(data), 5000)]
    logits, clicks = torch.cat(logits).double(), data.clicks.double()
    rank, clicked = torch.from_numpy(rankdata(logits.numpy())), clicks > 0
    positive = clicked.sum()
    area = (rank[clicked].sum() - positive * (positive + 1) / 2) / (positive * (len(clicks) - positive))
    return area.item(), F.binary_cross_entropy_with_logits(logits, clicks).item()
