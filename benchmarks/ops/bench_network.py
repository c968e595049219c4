"""A network of 60 small steps in one call, against one call for each step: what the calls themselves cost.

On a GPU whole networks too, of random weights, where torchvision and transformers are installed: fused, W4A8, beside
torch's float16. How they fare on a CPU is measured by `qk bench`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk import sources
from qk.deploy.fuse import fuse, unfused
from qk.deploy.program import Builder, encode, interpret

STEPS, CHANNELS = 60, 16
POINT = {"kernel": (1, 1), "stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}


def network(side: int, device: str):
    """Pointwise convolutions of 16 channels: the text, constants, plain weights, and the layers one by one."""
    random = torch.Generator().manual_seed(0)
    b, plain, layers = Builder(), [], []
    zero = torch.tensor([128], dtype=torch.int32, device=device)
    scale = (torch.tensor([0.05], device=device), zero)
    u = b.step("quantize", b.input(), layout="nchw", scale=b.scale(*scale, 8))
    for _ in range(STEPS):
        codes = torch.randint(0, 16, (CHANNELS, CHANNELS), generator=random, dtype=torch.uint8).to(device)
        middle = torch.full((CHANNELS,), 8, dtype=torch.int32, device=device)
        prepacked = qk.ops.prepack(qk.ops.pack(codes, 4), middle, 4, (CHANNELS, 1, 1, CHANNELS))
        step, bias = torch.full((CHANNELS,), 0.05, device=device), torch.zeros(CHANNELS, device=device)
        named = {"weight": prepacked, "weight_step": step, "bias": bias, "bits": 4, "activation": "relu"}
        u = b.step("conv2d", u, **named, **POINT, scale=b.scale(*scale, 8))
        plain.append((codes.reshape(CHANNELS, 1, 1, CHANNELS), middle))
        layers.append((prepacked, step, bias))
    b.output(b.step("dequantize", u), "nchw")
    offsets = [step.constants["weight"] for step in b.program().steps if step.op == "conv2d"]
    return b, dict(zip(offsets, plain, strict=True)), layers, scale


def cases(args):
    for side in (1, 7):
        b, weights, layers, scale = network(side, args.device)
        constants, text = b.constants(), encode(b.program())
        x = torch.randn(1, CHANNELS, side, side).to(args.device)

        def one_by_one(x=x, layers=layers, scale=scale):
            u = qk.ops.quantize(x.permute(0, 2, 3, 1), *scale, 8)
            for weight, step, bias in layers:
                u = qk.ops.conv2d(
                    u, *scale, weight, step, bias, 4, (1, 1), activation="relu", out_step=scale[0], out_zero=scale[1]
                )
            return qk.ops.dequantize(u, *scale).permute(0, 3, 1, 2)

        def check(x=x, b=b, constants=constants, text=text, weights=weights, one_by_one=one_by_one):
            got = qk.ops.network([x], constants, text)[0]
            assert torch.equal(got, interpret(b.program(), [x], constants, weights)[0])
            assert torch.equal(got, one_by_one())

        yield Case(
            name=f"network of {STEPS} steps on {side} x {side} x {CHANNELS}",
            check=check,
            ours=lambda x=x, constants=constants, text=text: qk.ops.network([x], constants, text),
            peers={"one call for each step": one_by_one},
        )

    if args.device == "cuda":
        for name in ("resnet18", "resnet50", "mobilenet_v2", "minilm"):
            for batch in (1, 32):
                yield whole(name, batch, args.device)


def model_of(name: str, batch: int):
    """A network with random weights, and an input."""
    torch.manual_seed(0)
    if name != "minilm":
        return getattr(sources.import_torchvision().models, name)().eval(), torch.randn(batch, 3, 224, 224)
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return BertModel(BertConfig(**sizes)).eval(), {"input_ids": torch.randint(0, 30000, (batch, 128))}


def whole(name: str, batch: int, device: str) -> Case:
    """The fused network, a call of which is one operator for each integer region."""
    model, x = model_of(name, batch)
    model, x = model.to(device), {k: v.to(device) for k, v in x.items()} if isinstance(x, dict) else x.to(device)
    recipe = qk.Recipe(weights=4, activations=8, method="nearest", ranges="minmax")
    integer = qk.quantize(model, [x], recipe, measure=False, fused=False, progress=False).model
    fast, slow = fuse(integer, x), unfused(integer, x)
    half = model.half() if device == "cuda" else model
    half_x = x.half() if torch.is_tensor(x) and device == "cuda" else x

    def call(network, given):
        with torch.inference_mode():
            return network(**given) if isinstance(given, dict) else network(given)

    def check():
        found = [call(network, x) for network in (fast, slow)]
        assert torch.equal(*(y if torch.is_tensor(y) else y[0] for y in found))

    name = f"{name}, batch {batch}, W4A8"
    return Case(name, check, lambda: call(fast, x), {"torch float": lambda: call(half, half_x)})


if __name__ == "__main__":
    main("network", cases)
