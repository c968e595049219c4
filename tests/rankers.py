"""Small models with embedding tables, one for each thing that can be about a table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROWS = 40


class Ranker(nn.Module):
    """Two tables under three names, a bag of means, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(ROWS, 24, padding_idx=0), nn.Embedding(ROWS, 24, sparse=True)
        self.again = self.item
        self.bag = nn.EmbeddingBag(ROWS, 24, mode="mean", padding_idx=1, include_last_offset=True)
        self.first, self.last = nn.Linear(24, 16), nn.Linear(16, 1)

    def forward(self, ids: Tensor, values: Tensor, offsets: Tensor) -> Tensor:
        x = self.user(ids[:, 0]) * self.item(ids[:, 1]) + self.again(input=ids[:, 0]) + self.bag(values, offsets)
        return self.last(torch.relu(self.first(x)))


class Ties(nn.Module):
    """Tables that have to stay in float, each for its own reason, and one that need not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.tied, self.normed = (nn.Embedding(ROWS, 24, max_norm=n) for n in (None, None, 1.0))
        self.twin = nn.EmbeddingBag(ROWS, 24)
        self.twin_of = nn.EmbeddingBag(ROWS, 24)
        self.twin_of.weight = self.twin.weight
        self.low = nn.Embedding(ROWS, 24).half()
        self.narrow = nn.Embedding(ROWS, 1)
        self.own, self.read, self.idle = Doubled(ROWS, 24), nn.Embedding(ROWS, 24), nn.Embedding(ROWS, 24)
        self.hooked = nn.Embedding(ROWS, 24)
        self.hooked.register_forward_hook(lambda module, args, result: None)
        self.computed = nn.utils.parametrizations.weight_norm(nn.Embedding(ROWS, 24))
        self.head = nn.Linear(24, ROWS, bias=False)
        self.head.weight = self.tied.weight
        self.hidden = [nn.Embedding(ROWS, 24)]  # beyond the reach of names
        self.behind = self.hidden[0]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.plain(ids) + self.tied(ids) + self.normed(ids) + self.own(ids) + self.low(ids).float()
        x = x + self.twin(ids[:, None]) + self.twin_of(ids[:, None]) + self.narrow(ids) + self.read(ids)
        x = x + self.read.weight.mean(0) + self.hooked(ids) + self.computed(ids) + self.hidden[0](ids)
        return self.head(x)


class Doubled(nn.Embedding):
    """An embedding with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().eval()


def inputs(count: int = 6, seed: int = 1) -> dict[str, Tensor]:
    """Of a Ranker; the second bag is empty, the first holds the row that takes no part."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, 3, 3, *(3 + 2 * n for n in range(1, count - 1))])
    values = torch.randint(2, ROWS, (int(ends[-1]),), generator=generator)
    values[0] = 1
    return {"ids": torch.randint(0, ROWS, (count, 2), generator=generator), "values": values, "offsets": ends}
