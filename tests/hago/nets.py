"""Small networks with what devices differ in: joins, pools, depthwise layers, gates, flattened images, LayerNorm."""

import torch
from torch import nn


class Residual(nn.Module):
    """BatchNorm, two branches of a sum, max pool, depthwise, ReLU6, mean."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.dw, self.clip = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6()
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.b(torch.relu(self.a(x))))
        x = self.clip(self.dw(nn.functional.max_pool2d(x, 2)))
        return self.fc(x.mean((2, 3)))


class Mixed(nn.Module):
    """Concatenation, hard-swish, a gate, grouped layer, average pool, both operands of a sum from layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.gate, self.c, self.d = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 12, 1), nn.Conv2d(16, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = nn.functional.hardswish(self.grouped(torch.cat([self.a(x), self.b(x).relu()], 1)))
        x = x * torch.sigmoid(self.gate(nn.functional.adaptive_avg_pool2d(x, 1)))
        x = nn.functional.avg_pool2d(x, 2)
        return self.fc((self.c(x) + self.d(x)).relu().mean((2, 3)))


class Flat(nn.Module):
    """As VGG ends: an image with steps of its channels becomes a row."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.fc1, self.fc2 = nn.Linear(8 * 4 * 4, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.a(x))))
        x = nn.functional.max_pool2d(x, 2).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


class Encoder(nn.Module):
    """Layers on rows between LayerNorms that no device here has."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.norm(x + self.last(nn.functional.gelu(self.first(x)))))


class Preactivated(nn.Module):
    """A sum of a layer's own result and of what becomes of it; view instead of flatten; GroupNorm behind tables."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, 8, 3, padding="same") for i in (3, 8, 8))
        self.norm, self.fc = nn.GroupNorm(2, 8), nn.Linear(8 * 8 * 8, 5)

    def forward(self, x):
        y = self.a(x)
        y = y + self.b(torch.relu(y))
        y = self.c(self.norm(nn.functional.silu(y)))
        y = torch.relu(nn.functional.max_pool2d(y, 2))
        return self.fc(y.view(y.size(0), -1)), torch.relu(y.flatten(1))


class Queries(nn.Module):
    """Layers and joins that read parameters, a tied weight, a linear layer's image, x + x."""

    def __init__(self):
        super().__init__()
        self.queries, self.token = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.randn(1, 1, 16))
        self.first, self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        x = torch.cat([self.first(x), self.token.expand(x.shape[0], 1, 16)], 1) + self.first(self.queries).mean(0)
        y = torch.relu(self.second(x))
        y = (y + y).reshape(-1, 4, 2, 16)
        image = nn.functional.max_pool2d(self.second(y), (2, 1))
        return {"out": self.last(image.mean((1, 2))), "rows": torch.relu(self.first(y).reshape(-1, 8, 4, 4))}


class Norms(nn.Module):
    """As DenseNet: BatchNorm of what lies side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(10)
        self.c, self.fc = nn.Conv2d(10, 4, 1), nn.Linear(4, 3)
        with torch.no_grad():
            self.norm.running_mean.normal_()
            self.norm.weight.uniform_(-1, 2)

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = self.c(torch.relu(self.norm(torch.cat([x, torch.relu(self.b(x))], 1))))
        return self.fc(x.mean((2, 3)))


IMAGES = {"norms": Norms, "preactivated": Preactivated, "residual": Residual, "mixed": Mixed, "flat": Flat}


ROWS = {"encoder": Encoder, "queries": Queries}


def build(name):
    """The network in eval mode and three batches."""
    torch.manual_seed(0)
    if name in ROWS:
        return ROWS[name]().eval(), [torch.randn(3, 7, 16) for _ in range(3)]
    return IMAGES[name]().eval(), [torch.randn(4, 3, 16, 16) for _ in range(3)]
