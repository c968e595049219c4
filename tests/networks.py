"""Programs for tests: a builder that remembers what its weights were made from, single steps and random networks."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import qk
from qk.deploy.program import Builder, Scale, encode, interpret
from qk.ops._program import keeps_scale, score_bits
from qk.ops._shapes import step_shape

WINDOW = {"kernel": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
POOL = WINDOW | {"ceil_mode": 0, "count_include_pad": 0}
GLOBAL = POOL | {"kernel": (0, 0), "padding": (0, 0)}


def equal(got, want):
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert torch.equal(one, other)


class Net(Builder):
    """A builder on one device with random numbers of its own."""

    def __init__(self, make_weight, device="cpu", seed=0):
        super().__init__()
        self.make_weight, self.device = make_weight, device
        self.random, self.rnd = torch.Generator().manual_seed(seed), random.Random(seed)
        self.weights, self.inputs = {}, []
        self.shape, self.scales = {}, {}  # of values

    def given(self, x: Tensor, scale: Scale | None = None) -> int:
        """An input, and the tensor that it will be."""
        id = self.input(scale)
        self.inputs.append(x)
        self.shape[id], self.scales[id] = tuple(x.shape), scale
        return id

    def step(self, op, *inputs, **named) -> int:
        out = super().step(op, *inputs, **named)
        step = self._steps[-1]
        self.shape[out] = step_shape(step, [self.shape[v] for v in inputs])
        self.scales[out] = self.scales[inputs[0]] if keeps_scale(step.op, step.attributes) else step.scale
        return out

    def new_scale(self, bits=8, step=None) -> Scale:
        step = 0.02 + 0.1 * self.rnd.random() if step is None else step
        zero = self.rnd.randrange(2**bits)
        return self.scale(torch.tensor([step]), torch.tensor([zero], dtype=torch.int32), bits)

    def layer(self, op, *inputs, shape, bits=4, k_groups=1, bias=True, activation="none", scale=None, **more) -> int:
        """conv2d or gemm with random codes of `shape`."""
        groups = more.get("groups", 1)
        w = self.make_weight(shape, bits, self.device, groups=groups, k_groups=k_groups, seed=self.rnd.getrandbits(30))
        k = torch.Size(shape[1:]).numel()
        w.step = w.step * (0.5 / (k**0.5 * 2**bits))
        if more.pop("winograd", False):
            w.zero = w.zero.clamp(1, 2**bits - 2)  # a zero at an end may be refused
            w.prepacked = qk.ops.prepack(w.packed, w.zero, w.bits, shape, groups, "winograd")
        offset = torch.randn(shape[0], generator=self.random).to(self.device) if bias else None
        if op == "conv2d":
            more = WINDOW | {"groups": 1} | more | {"kernel": tuple(shape[1:3])}
        out = self.step(
            op,
            *inputs,
            weight=w.prepacked,
            weight_step=w.step,
            bias=offset,
            bits=w.bits,
            activation=activation,
            scale=scale,
            **more,
        )
        self.weights[self._steps[-1].constants["weight"]] = (w.codes, w.zero)
        return out

    def table(self, scale=None) -> Tensor:
        if scale is None:
            return torch.randn(256, generator=self.random).to(self.device)
        return torch.randint(0, 2**scale.bits, (256,), generator=self.random, dtype=torch.uint8).to(self.device)

    def codes(self, *shape: int, scale: Scale) -> Tensor:
        return torch.randint(0, 2**scale.bits, shape, generator=self.random, dtype=torch.uint8)

    def call(self) -> tuple[list[Tensor], list[Tensor], str]:
        """Arguments of the operator."""
        move = lambda tensors: [t.to(self.device) for t in tensors]  # noqa: E731
        return move(self.inputs), move(self.constants()), encode(self.program())

    def run(self) -> tuple[list[Tensor], list[Tensor]]:
        """Results of the operator and of the definition."""
        inputs, constants, text = self.call()
        return qk.ops.network(inputs, constants, text), interpret(self.program(), inputs, constants, self.weights)


def random_net(make_weight, device, seed, steps=12) -> Net:
    """A network with steps of many kinds on random images."""
    net = Net(make_weight, device, seed)
    rnd = net.rnd
    batch, c, h, w = rnd.choice((0, 1, 1, 2, 3)), rnd.choice((1, 3, 8, 17)), *rnd.choices((1, 4, 7, 9), k=2)
    image = net.given(torch.randn(batch, c, h, w, generator=net.random))
    scale = net.new_scale(rnd.choice((5, 8)))
    codes = net.given(net.codes(batch, h, w, rnd.choice((2, 16)), scale=scale), scale)
    values = [codes, net.step("quantize", image, layout="nchw", scale=net.new_scale(rnd.choice((4, 8))))]
    for _ in range(steps):
        values.append(random_step(net, rnd, values))
    made = [step.out for step in net._steps if step.op != "reshape"]
    for v in rnd.sample(made, 2) + made[-1:]:
        if v not in [o.value for o in net._outputs]:
            net.output(v, rnd.choice(("same", "nchw")) if len(net.shape[v]) == 4 else "same")
    return net


def random_step(net: Net, rnd: random.Random, values: list[int]) -> int:
    x = rnd.choice([v for v in values if net.scales[v] is not None][-3:])
    c = net.shape[x][-1]
    scale = rnd.choice((None, net.new_scale(rnd.choice((4, 6, 8)))))
    out = {"scale": scale}
    if rnd.random() < 0.1:
        return net.step("reshape", x, shape=(0, 0, 0, -1))
    activation = rnd.choice(("none", "relu", "relu6"))
    same = [v for v in values if net.shape[v] == net.shape[x]]
    op = rnd.choice(
        (
            *("conv2d", "conv2d", "depthwise", "gemm", "add", "multiply", "max", "average", "lookup", "sparq"),
            *("concat", "attention", "index_put", "index_select"),
        )
    )
    if op == "conv2d":
        side = rnd.choice((1, 3))
        stride, n = rnd.choice(((1, 1), (2, 2))), rnd.choice((c, c, 5, 33))
        residual = [rnd.choice(same)] * (stride == (1, 1) and n == c)
        more = {
            "padding": (side // 2,) * 2,
            "stride": stride,
            "bits": rnd.choice((2, 4, 8)),
            "bias": rnd.random() < 0.5,
        }
        return net.layer("conv2d", x, *residual, shape=(n, side, side, c), activation=activation, **more, **out)
    if op == "depthwise":
        return net.layer("conv2d", x, shape=(c, 3, 3, 1), groups=c, activation=activation, **out)
    if op == "gemm":
        return net.layer("gemm", x, *same[:1], shape=(c, c), activation=activation, **out)
    if op == "add":
        return net.step("add", rnd.choice(same), rnd.choice(same), activation=activation, **out)
    if op == "multiply":
        gate = net.step("pool", x, mode="average", **GLOBAL, scale=rnd.choice((None, net.new_scale())))
        return net.step("multiply", x, gate, activation=activation, **out)
    if op == "index_put":
        into = net.step("lookup", x, table=net.table(scale), **out)
        added = net.step("dequantize", x)
        count = rnd.randint(1, c)
        index = torch.randperm(c, generator=net.random)[:count].int()
        source = torch.randint(-1, c, (rnd.randint(1, 3), count), generator=net.random, dtype=torch.int32)
        residual = [rnd.choice(same)] * rnd.randint(0, 1)
        return net.step("index_put", into, added, *residual, index=index, source=source, activation=activation, **out)
    if op == "index_select":
        return net.step("index_select", x, index=torch.randint(0, c, (c,), generator=net.random, dtype=torch.int32))
    if op in ("max", "average"):
        window = POOL | {"stride": rnd.choice(((1, 1), (2, 1))), "ceil_mode": rnd.choice((0, 1))}
        return net.step("pool", x, mode=op, **window, scale=None if op == "max" else scale)
    if op == "lookup":
        return net.step("lookup", x, table=net.table(scale), **out)
    if op == "sparq":
        family = rnd.choice(("5opt", "3opt", "2opt", "6opt", "7opt"))
        return net.step("sparq", x, family=family, round=rnd.choice((0, 1)), pairs=rnd.choice((0, 1)))
    if op == "attention":  # the pixels of an image are its tokens
        sides = rnd.choices([v for v in same if net.scales[v] is not None], k=3)
        _, height, width, _ = net.shape[x]
        tokens = [net.step("reshape", v, shape=(0, height * width, c)) for v in sides]
        heads = rnd.choice([n for n in (1, 2, 4) if c % n == 0])
        seen = net.step("attention", *tokens, heads=heads, score_scale=score_bits(rnd.choice((1e-3, 0.1))), **out)
        return net.step("reshape", seen, shape=(0, height, width, c))
    alike = [v for v in values if net.scales[v] is not None and net.shape[v][:3] == net.shape[x][:3]]
    return net.step("concat", *rnd.choices(alike, k=rnd.choice((1, 2, 3))), scale=net.new_scale())


def image(net, *shape):
    return torch.randn(*shape, generator=net.random)


def coded(net, *shape, bits=8):
    scale = net.new_scale(bits)
    return net.given(net.codes(*shape, scale=scale), scale), scale


def chain(make_weight, device="cpu", batch=2, seed=0):
    """A small residual network."""
    net = Net(make_weight, device, seed)
    x = net.step("quantize", net.given(image(net, batch, 3, 12, 12)), layout="nchw", scale=net.new_scale())
    x = net.layer("conv2d", x, shape=(24, 3, 3, 3), activation="relu", scale=net.new_scale())
    for _ in range(3):
        y = net.layer("conv2d", x, shape=(24, 3, 3, 24), activation="relu", scale=net.new_scale())
        x = net.layer("conv2d", y, x, shape=(24, 3, 3, 24), activation="relu", scale=net.new_scale())
    y = net.step("lookup", x, table=net.table(net.scales[x]), scale=net.scales[x])
    x = net.step("add", x, y, activation="none", scale=net.new_scale())
    x = net.step("pool", x, mode="average", **GLOBAL, scale=net.new_scale())
    net.output(net.layer("gemm", net.step("reshape", x, shape=(0, -1)), shape=(10, 24)))
    return net
