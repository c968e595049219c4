"""Time of an integer layer of which a tenth of the channels have two points, against the same layer without; and of
fused networks whose points cost at most a tenth more, against the same ones without.

    python benchmarks/multipoint_layers.py [--threads 1]

Both are called in turn on one input. The time of a side is one that a twentieth of its calls do not exceed: what else
runs on the machine can only add to it. Results are compared first.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import qk
from qk.bench.networks import Network
from qk.deploy import QConv2d, QLinear, definition
from qk.tables import Table
from qk.timing import alternate, quantile

LAYERS: dict[str, tuple[tuple[int, ...], int, dict[str, Any]]] = {  # shape in kernel order, height and width, the rest
    "resnet18 layer1 3x3": ((64, 3, 3, 64), 56, {"padding": (1, 1)}),
    "resnet18 layer2 3x3": ((128, 3, 3, 128), 28, {"padding": (1, 1)}),
    "resnet18 layer3 3x3": ((256, 3, 3, 256), 14, {"padding": (1, 1)}),
    "resnet18 layer4 3x3": ((512, 3, 3, 512), 7, {"padding": (1, 1)}),
    "resnet50 layer3 1x1": ((256, 1, 1, 1024), 14, {}),
    "regnet_x_400mf grouped": ((160, 3, 3, 16), 14, {"padding": (1, 1), "groups": 10}),
    "mobilenet_v2 depthwise": ((192, 3, 3, 1), 28, {"padding": (1, 1), "groups": 192}),
    "transformer 384 -> 1536": ((1536, 384), 128, {}),
}


def layer(shape: tuple[int, ...], bits: int, config: dict[str, Any], share: float) -> QConv2d | QLinear:
    g = torch.Generator().manual_seed(0)
    n, k = shape[0], torch.Size(shape[1:]).numel()
    rows = int(n * share)

    def packed(count: int) -> Tensor:
        return qk.ops.pack(torch.randint(1, 2**bits, (count, k), generator=g, dtype=torch.uint8), bits)

    tensors = {
        "packed": packed(n),
        "weight_step": torch.rand(n, generator=g) + 0.1,
        "weight_zero": torch.full((n,), 2 ** (bits - 1), dtype=torch.int32),
        "bias": torch.randn(n, generator=g),
        "input_step": torch.tensor([0.03]),
        "input_zero": torch.tensor([0], dtype=torch.int32),
    }
    if rows:
        owners = torch.randperm(n, generator=g)[:rows].sort().values
        tensors |= {
            "tail_packed": packed(rows),
            "tail_step": torch.rand(rows, generator=g) + 0.1,
            "tail_owners": owners,
        }
    spec = qk.QuantSpec(bits, 8, symmetric=True, points=2)
    return QLinear(tensors, spec, shape) if len(shape) == 2 else QConv2d(tensors, spec, shape, **config)


def case(name: str, bits: int) -> list[str]:
    shape, size, config = LAYERS[name]
    g = torch.Generator().manual_seed(1)
    if len(shape) == 2:
        x = torch.rand(size, shape[1], generator=g)
    else:
        x = torch.rand(1, shape[3] * config.get("groups", 1), size, size, generator=g)
        x = x.contiguous(memory_format=torch.channels_last)
    plain, pointed = layer(shape, bits, config, 0), layer(shape, bits, config, 0.1)
    with torch.inference_mode():
        found = pointed(x)
        with definition():
            assert torch.equal(found, pointed(x)), name
        times = alternate([lambda: plain(x), lambda: pointed(x)], seconds=3.0)
    before, after = (quantile(side, 0.05) for side in times)
    return [f"W{bits} {name}", f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}"]


def network(name: str) -> list[str]:
    """Random weights, a 224 x 224 image."""
    source = Network(f"torchvision:{name}", 1)
    x = source.inputs[0]
    plain = qk.Recipe(weights=4, activations=8, method="nearest", symmetric=True)
    fused = []
    for recipe in (plain, replace(plain, points=3, points_budget=0.1)):
        model = qk.quantize(source.model, [x], recipe, measure=False, fused=False, progress=False).model
        fused.append(qk.fuse(model, x))
        with torch.inference_mode():
            assert torch.equal(fused[-1](x), qk.deploy.unfused(model, x)(x)), name
    with torch.inference_mode():
        times = alternate([lambda: fused[0](x), lambda: fused[1](x)], seconds=5.0)
    before, after = (quantile(side, 0.05) for side in times)
    put = fused[1].steps["index_put"]
    return [f"{name} W4A8", str(put), f"{before:.3f}", f"{after:.3f}", f"{after / before:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [case(name, bits) for bits in (4, 2) for name in LAYERS]
    print(f"threads {options.threads}, {qk.active_isa()}, torch {torch.__version__}\n")
    print(Table("", ["layer", "without (ms)", "with (ms)", "with / without"], rows).markdown() + "\n")
    networks = [network(name) for name in ("resnet18", "resnet50", "mobilenet_v2")]
    head = ["network, fused", "layers with points", "without (ms)", "with (ms)", "with / without"]
    print(Table("", head, networks).markdown())


if __name__ == "__main__":
    main()
