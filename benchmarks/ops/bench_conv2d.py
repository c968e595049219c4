"""conv2d: integer convolutions, codes to codes, against torch's float32 (NHWC) and int8 (oneDNN).

The limit is the peak of products (1 thread). Set ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI for an int8 peer with the
instructions of avx512vnni.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _integer import at_peak, weight

import qk
from harness import Case, main, options
from qk.ops.conv2d import reference

SHAPES = {  # channels, output channels, size, kernel, stride, groups
    "resnet18 conv1": (3, 64, 224, 7, 2, 1),
    "resnet18 layer1.0.conv1": (64, 64, 56, 3, 1, 1),
    "resnet18 layer2.0.conv1": (64, 128, 56, 3, 2, 1),
    "resnet18 layer2.0.downsample": (64, 128, 56, 1, 2, 1),
    "resnet18 layer2.1.conv1": (128, 128, 28, 3, 1, 1),
    "resnet18 layer3.1.conv1": (256, 256, 14, 3, 1, 1),
    "resnet18 layer4.1.conv1": (512, 512, 7, 3, 1, 1),
    "mobilenet_v2 features.0": (3, 32, 224, 3, 2, 1),
    "mobilenet_v2 features.2 depthwise": (96, 96, 112, 3, 2, 96),
    "mobilenet_v2 features.3 expand": (24, 144, 56, 1, 1, 1),
    "mobilenet_v2 features.3 depthwise": (144, 144, 56, 3, 1, 144),
    "mobilenet_v2 features.3 project": (144, 24, 56, 1, 1, 1),
    "mobilenet_v2 features.8 depthwise": (384, 384, 14, 3, 1, 384),
    "mobilenet_v2 features.8 expand": (64, 384, 14, 1, 1, 1),
    "mobilenet_v2 features.15 expand": (160, 960, 7, 1, 1, 1),
    "mobilenet_v2 features.15 depthwise": (960, 960, 7, 3, 1, 960),
    "mobilenet_v2 features.16 project": (960, 160, 7, 1, 1, 1),
    "efficientnet_b0 depthwise 5x5": (240, 240, 28, 5, 1, 240),
    "regnet_x_400mf groups of 16": (64, 64, 56, 3, 1, 4),
}


def int8(x, w, bias, places):
    """torch's quantized convolution, codes to codes."""
    torch.backends.quantized.engine = "onednn"
    _, stride, padding, dilation, groups = places
    codes = torch.quantize_per_tensor(x, 0.02, 128, torch.quint8)
    n = w.shape[0]
    weights = torch.quantize_per_channel(w, torch.full((n,), 0.02), torch.zeros(n, dtype=torch.long), 0, torch.qint8)
    packed = torch.ops.quantized.conv2d_prepack(weights, bias, stride, padding, dilation, groups)
    return lambda: torch.ops.quantized.conv2d(codes, packed, 0.3, 128)


def cases(args):
    torch.manual_seed(0)
    for name, (c, n, size, kernel, stride, groups) in SHAPES.items():
        k, places = kernel * kernel * c // groups, ((kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
        x = torch.randint(0, 256, (args.batch, size, size, c), dtype=torch.uint8)
        x_step, x_zero, bias = torch.tensor([0.02]), torch.tensor([0], dtype=torch.int32), torch.randn(n)
        out = {"out_step": torch.tensor([2.0 * k**0.5]), "out_zero": torch.tensor([128], dtype=torch.int32)}
        channels_last = {"memory_format": torch.channels_last}
        x_float = torch.randn(args.batch, c, size, size).to(**channels_last)
        w_float = torch.randn(n, c // groups, kernel, kernel).to(**channels_last)
        for bits in (8, 4, 2):
            codes, zero, step = weight(n, k, bits)
            shape = (n, kernel, kernel, c // groups)
            prepacked = qk.ops.prepack(qk.ops.pack(codes, bits), zero, bits, shape, groups)
            codes = codes.reshape(shape)
            inputs = (x, x_step, x_zero)

            def ours(inputs=inputs, p=prepacked, step=step, bias=bias, bits=bits, places=places, out=out):
                return qk.ops.conv2d(*inputs, p, step, bias, bits, *places, **out)

            def check(ours=ours, inputs=inputs, codes=codes, zero=zero, step=step, bias=bias, at=places, out=out):
                assert torch.equal(ours(), reference(*inputs, codes, zero, step, bias, *at[1:], **out))

            def peer(x=x_float, w=w_float, b=bias, at=places):
                return torch.nn.functional.conv2d(x, w, b, *at[1:])

            operations = 2 * ours()[..., 0].numel() * n * k
            yield Case(
                name=f"{name} {kernel}x{kernel}/{stride} {c}->{n} @{size}, batch {args.batch}, W{bits}A8",
                check=check,
                ours=ours,
                peers={"torch float32 (NHWC)": peer, "torch int8 (oneDNN)": int8(x_float, w_float, bias, places)},
                limit=at_peak(operations),
                operations=operations,
            )


if __name__ == "__main__":
    parser = options("Times conv2d.")
    parser.add_argument("--batch", type=int, default=1)
    main("conv2d", cases, parser)
