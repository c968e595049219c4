"""A small model with everything that deployment meets, and the plainest calibration: minimum and maximum."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from qk.inputs import feed
from qk.prepare import Prepared, QuantLayer, prepare
from qk.spec import QuantSpec, Recipe


class Small(nn.Module):
    """Folded norms, linked layers, an addition, depthwise, a layer of two names, a tied pair, a float one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.left = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=3)
        self.right = nn.Conv2d(12, 12, 1)
        self.depth = nn.Conv2d(12, 12, (3, 5), padding=(1, 2), groups=12, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.plain = nn.Conv2d(12, 7, 3, bias=False)
        self.norm3 = nn.BatchNorm2d(7)
        self.twice = nn.Linear(7, 7)
        self.alias = self.twice
        self.embedding = nn.Embedding(5, 7)
        self.out = nn.Linear(7, 5, bias=False)
        self.out.weight = self.embedding.weight
        self.head = nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.left(x) + self.right(x))
        x = torch.relu(self.norm3(self.plain(torch.relu(self.norm2(self.depth(x))))))
        x = self.alias(torch.tanh(self.twice(x.mean((2, 3)))))
        return self.head(x + self.embedding.weight.sum(0)) + self.out(x).sum(-1, keepdim=True)


def small_model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Small()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
                nn.init.uniform_(module.running_mean, -0.2, 0.2)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
        return model.eval()


def small_images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 13, 11, generator=torch.Generator().manual_seed(3))


def small_prepared(**recipe: Any) -> Prepared:
    """Float layers: `plain`, by the recipe, and `out`, whose weight is the embedding's."""
    recipe = {"weights": 4, "activations": 8, "skip": ("plain",), "method": "nearest"} | recipe
    x = small_images()
    return minmax(prepare(small_model(), x, Recipe(**recipe)), [x])


def one_layer() -> tuple[nn.Module, Prepared, Tensor]:
    """A model that is itself the layer, prepared."""
    layer, x = nn.Linear(6, 3), torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    p = prepare(layer, x, Recipe(weights=8, method="nearest"))
    return layer, minmax(p, [x]), x


def same(a: nn.Module, b: nn.Module, x: Tensor) -> bool:
    """Whether two models give the same bits."""
    with torch.no_grad():
        return torch.equal(a(x), b(x))


def minmax(p: Prepared, batches: Iterable[Any]) -> Prepared:
    """Steps from the smallest and largest value, zero included; codes are the nearest."""
    seen: dict[nn.Module, list[Tensor]] = {}
    layers = p.quant_layers()

    def watch(layer: QuantLayer, inputs: tuple[Tensor]) -> None:
        seen.setdefault(layer.input, []).append(inputs[0].detach().reshape(1, -1).aminmax(dim=1))

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers.values()]
    with p.quantized(set()) as model, torch.no_grad():
        for batch in batches:
            feed(model, batch)
    for hook in hooks:
        hook.remove()
    for quantizer, ranges in seen.items():
        low, high = (
            torch.stack([r.min for r in ranges]).min(0).values,
            torch.stack([r.max for r in ranges]).max(0).values,
        )
        quantizer.set_range(*affine(low, high, quantizer.bits))
    for layer in layers.values():
        rows = layer.weight_rows()
        if layer.spec.weight_symmetric:
            bits, top = layer.spec.weights, rows.abs().amax(1)
            step = (top / (2 ** (bits - 1) - 1)).clamp_min(1e-8)
            layer.set_weight_range(step, torch.full_like(step, 2 ** (bits - 1), dtype=torch.int32))
        else:
            layer.set_weight_range(*affine(rows.amin(1), rows.amax(1), layer.spec.weights))
    p.calibrated = True
    return p


def affine(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    low, high = low.clamp_max(0), high.clamp_min(0)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-8)
    return step, torch.round(-low / step).clamp(0, 2**bits - 1).to(torch.int32)


def tensors_for(
    shape: tuple[int, ...], spec: QuantSpec, bias: bool = True, seed: int = 0
) -> tuple[dict[str, Tensor | None], Tensor]:
    """Tensors of an integer layer with random codes, and these codes in kernel order."""
    from qk import ops

    g = torch.Generator().manual_seed(seed)
    n, k = shape[0], torch.Size(shape[1:]).numel()
    steps = (n,) if spec.group_size in (None, k) else (n, k // spec.group_size)
    codes = torch.randint(0, 2**spec.weights, shape, generator=g, dtype=torch.uint8)
    zero = torch.full(steps, 128) if spec.weights == 8 else torch.randint(0, 2**spec.weights, steps, generator=g)
    tensors = {
        "packed": ops.pack(codes.reshape(n, k), spec.storage_bits),
        "weight_step": torch.rand(steps, generator=g) * 0.1 + 0.01,
        "weight_zero": zero.to(torch.int32),
        "bias": torch.randn(n, generator=g) if bias else None,
        "input_step": torch.tensor([0.031]),
        "input_zero": torch.tensor([2**spec.activations // 3], dtype=torch.int32),
    }
    return tensors, codes
