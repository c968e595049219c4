"""What is measured: layers of named networks, as codes, steps and the float32 result that every candidate must meet."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from qk import _native

# Without a dot product of bytes (VNNI) the peers add two products in 16 bits and saturate: their makers advise weights
# of 7 bits there, and with 8 their results are wrong. Ours are exact, and keep all 8 (ours.py).
LARGEST_WEIGHT = 127 if "avx512vnni" in _native.usable_isas() else 63


@dataclass(frozen=True)
class Gemm:
    """y[m, n] = x[m, k] w[n, k]^T + bias, the shape of a layer of `name`."""

    name: str
    m: int
    k: int
    n: int

    @property
    def title(self) -> str:
        return f"{self.name} {self.m}x{self.k}x{self.n}"

    @property
    def operations(self) -> int:
        return 2 * self.m * self.k * self.n

    @cached_property
    def data(self) -> GemmData:
        return GemmData(self)


@dataclass(frozen=True)
class Conv:
    """A square NHWC convolution with "same" padding."""

    name: str
    channels: int
    outputs: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    batch: int = 1

    @property
    def title(self) -> str:
        kind = "dw" if self.groups > 1 else ""
        shape = f"{self.channels}->{self.outputs} @{self.size}"
        return f"{self.name} {kind}{self.kernel}x{self.kernel}/{self.stride} {shape} b{self.batch}"

    @property
    def padding(self) -> int:
        return self.kernel // 2

    @property
    def out_size(self) -> int:
        return (self.size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def k(self) -> int:
        return self.kernel**2 * self.channels // self.groups

    @property
    def operations(self) -> int:
        return 2 * self.batch * self.out_size**2 * self.outputs * self.k

    @cached_property
    def data(self) -> ConvData:
        return ConvData.draw(self)


class GemmData:
    """Codes of x with x_step and zero 0 (a peer that takes a float32 x gets their values), int8 weights with a step for
    each channel, a bias, and the result; and weights of fewer bits with steps in blocks along K."""

    def __init__(self, p: Gemm):
        self.p, self.rng = p, torch.Generator().manual_seed(p.m * 7 + p.k * 3 + p.n)
        self.x_codes = torch.randint(0, 256, (p.m, p.k), generator=self.rng, dtype=torch.uint8)
        self.x_step = 1 / 64
        top = LARGEST_WEIGHT
        self.w_codes = torch.randint(-top, top + 1, (p.n, p.k), generator=self.rng, dtype=torch.int8)
        self.w_step = self._steps(p.n, 1)[:, 0, 0] / 64
        self.bias = torch.randn(p.n, generator=self.rng)
        self.y = F.linear(self.x, self.w, self.bias)
        self.out_step = float(self.y.max()) / 255
        self.made: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def _steps(self, n: int, blocks: int) -> Tensor:
        return (0.5 + 0.5 * torch.rand(n, blocks, 1, generator=self.rng)) * self.p.k**-0.5

    @property
    def x(self) -> Tensor:
        return self.x_codes.float() * self.x_step

    @property
    def w(self) -> Tensor:
        return self.w_codes.float() * self.w_step[:, None]

    def blocks(self, bits: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
        """Signed codes [N, K / block, block] int8, steps [N, K / block, 1], and x times what they stand for [M, N]."""
        if (bits, block) not in self.made:
            n, k, half = self.p.n, self.p.k, 2 ** (bits - 1)
            codes = torch.randint(-half, half, (n, k // block, block), generator=self.rng, dtype=torch.int8)
            step = self._steps(n, k // block)
            self.made[bits, block] = codes, step, self.x @ (codes * step).reshape(n, k).t()
        return self.made[bits, block]


def _symmetric(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes and a step for each output channel."""
    step = w.flatten(1).abs().amax(1) / LARGEST_WEIGHT
    codes = (w / step.reshape(-1, *[1] * (w.dim() - 1))).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT).to(torch.int8)
    return codes, step


@dataclass(frozen=True)
class ConvData:
    """NHWC codes of x, zero 0; w as [outputs, channels / groups, kernel, kernel]; y NCHW (channels last)."""

    x_codes: Tensor
    x_step: float
    w_codes: Tensor
    w_step: Tensor
    bias: Tensor
    out_step: float
    y: Tensor

    @property
    def x(self) -> Tensor:
        """NCHW values, channels last in memory."""
        return (self.x_codes.float() * self.x_step).permute(0, 3, 1, 2)

    @property
    def w(self) -> Tensor:
        return (self.w_codes.float() * self.w_step[:, None, None, None]).to(memory_format=torch.channels_last)

    @classmethod
    def draw(cls, p: Conv) -> ConvData:
        rng = torch.Generator().manual_seed(p.channels * 7 + p.size * 3 + p.kernel)
        x_codes = torch.randint(0, 256, (p.batch, p.size, p.size, p.channels), generator=rng, dtype=torch.uint8)
        w = torch.randn(p.outputs, p.channels // p.groups, p.kernel, p.kernel, generator=rng) * p.k**-0.5
        w_codes, w_step = _symmetric(w)
        bias = torch.randn(p.outputs, generator=rng)
        x_step = 1 / 64
        x = (x_codes.float() * x_step).permute(0, 3, 1, 2)
        y = F.conv2d(x, w_codes.float() * w_step[:, None, None, None], bias, p.stride, p.padding, 1, p.groups)
        return cls(x_codes, x_step, w_codes, w_step, bias, float(y.max()) / 255, y)


@dataclass(frozen=True)
class Bag:
    """Sums of rows of a table: `bags` bags of `fewest` to `most` rows each."""

    rows: int
    cols: int
    bags: int
    fewest: int
    most: int

    @property
    def title(self) -> str:
        return f"{self.rows} rows of {self.cols}, {self.bags} bags of {self.fewest} to {self.most}"

    @cached_property
    def data(self) -> BagData:
        return BagData(self)


class BagData:
    """Tables as torch and fbgemm store them: codes, then scale and offset (float16; float32 behind 8-bit codes)."""

    def __init__(self, p: Bag):
        self.p, rng = p, torch.Generator().manual_seed(0)
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        sizes = torch.randint(p.fewest, p.most + 1, (p.bags,), generator=rng)
        self.offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)[:-1]])
        self.indices = torch.randint(0, p.rows, (int(sizes.sum()),), generator=rng)

    @property
    def lookups(self) -> int:
        return self.indices.numel()

    def halves(self, bits: int) -> tuple[Tensor, Tensor]:
        """Packed codes [rows, bytes] and, as bytes, scale and offset of each row in float16."""
        if bits not in self.made:
            rng = torch.Generator().manual_seed(bits)
            shape = (self.p.rows, self.p.cols * bits // 8)
            codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=rng)
            numbers = torch.rand(self.p.rows, 2, generator=rng).sub_(0.5).mul_(0.1).half()
            self.made[bits] = codes, numbers.view(torch.uint8)
        return self.made[bits]

    def table(self, bits: int) -> Tensor:
        codes, numbers = self.halves(bits)
        return torch.cat([codes, numbers.view(torch.half).float().view(torch.uint8) if bits == 8 else numbers], 1)

    def values(self, bits: int, rows: Tensor | None = None) -> Tensor:
        """What the table (or these rows of it) stands for."""
        codes, numbers = (t if rows is None else t[rows] for t in self.halves(bits))
        parts = [(codes >> shift & (2**bits - 1)).float() for shift in range(0, 8, bits)]
        scale, offset = numbers.view(torch.half).float().split(1, 1)
        return torch.stack(parts, 2).flatten(1) * scale + offset

    def expected(self, bits: int) -> Tensor:
        return F.embedding_bag(torch.arange(self.lookups), self.values(bits, self.indices), self.offsets, mode="sum")


BERT = [(768, 768), (768, 3072), (3072, 768)]
LLM = [(4096, 4096), (4096, 11008)]
GEMMS = [
    *(Gemm("bert", m, k, n) for m in (128, 512) for k, n in BERT),
    *(Gemm("llm", m, k, n) for m in (128, 512) for k, n in LLM),
    *(Gemm("bert", 16, k, n) for k, n in BERT),
    *(Gemm("llm", 16, k, n) for k, n in LLM),
    Gemm("small", 1, 512, 512),
    Gemm("bert", 1, 768, 3072),
    Gemm("bert", 1, 3072, 768),
    *(Gemm("llm", 1, k, n) for k, n in LLM),
]

CONVS = [
    Conv("resnet18 stem", 3, 64, 224, 7, 2),
    Conv("resnet18 layer1", 64, 64, 56, 3),
    Conv("resnet18 layer2", 128, 128, 28, 3),
    Conv("resnet18 layer3", 256, 256, 14, 3),
    Conv("resnet18 layer4", 512, 512, 7, 3),
    Conv("resnet18 layer2.0", 64, 128, 56, 3, 2),
    Conv("resnet18 downsample", 64, 128, 56, 1, 2),
    Conv("mobilenet_v2 stem", 3, 32, 224, 3, 2),
    Conv("mobilenet_v2", 96, 96, 112, 3, 2, 96),
    Conv("mobilenet_v2", 144, 144, 56, 3, 1, 144),
    Conv("mobilenet_v2", 384, 384, 14, 3, 1, 384),
    Conv("mobilenet_v2", 960, 960, 7, 3, 1, 960),
    Conv("mobilenet_v2 expand", 24, 144, 56, 1),
    Conv("mobilenet_v2 project", 144, 24, 56, 1),
    Conv("mobilenet_v2 expand", 64, 384, 14, 1),
    Conv("mobilenet_v2 project", 384, 64, 14, 1),
    Conv("mobilenet_v2 expand", 160, 960, 7, 1),
    Conv("mobilenet_v2 project", 960, 160, 7, 1),
]

BAGS = [Bag(1_000_000, 128, 512, 32, 64)]

# Of a run that only shows that everything works.
SMALL_GEMMS = [Gemm("small", m, 128, 32) for m in (1, 16)]
SMALL_CONVS = [Conv("small", 16, 16, 8, 3), Conv("small", 16, 16, 8, 3, 1, 16), Conv("small", 16, 32, 8, 1)]
SMALL_BAGS = [Bag(100, 16, 4, 2, 5)]
