from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deploy.small import tensors_for
from qk import ops
from qk.deploy import QConv2d, QLinear, definition
from qk.errors import QkError
from qk.spec import QuantSpec, float_spec

WIDTHS = [(2, 4), (3, 5), (4, 4), (4, 8), (8, 8)]
CONVS = {
    "plain": {"shape": (9, 3, 3, 5), "padding": (1, 1)},
    "strided": {"shape": (7, 3, 2, 3), "stride": (2, 3), "padding": (0, 1)},
    "dilated": {"shape": (6, 3, 3, 4), "dilation": (2, 1), "padding": (2, 1)},
    "grouped": {"shape": (8, 3, 3, 3), "groups": 4, "padding": (1, 1)},
    "depthwise": {"shape": (11, 5, 3, 1), "groups": 11, "padding": (2, 1)},
    "pointwise": {"shape": (19, 1, 1, 17)},
}


def linear(weights=4, activations=8, group_size=None, bias=True, n=21, k=36):
    spec = QuantSpec(weights, activations, group_size)
    tensors, codes = tensors_for((n, k), spec, bias)
    return QLinear(tensors, spec, (n, k)), codes


def conv(name="plain", weights=4, activations=8, group_size=None, bias=True):
    config = dict(CONVS[name])
    shape = config.pop("shape")
    spec = QuantSpec(weights, activations, group_size)
    tensors, codes = tensors_for(shape, spec, bias)
    return QConv2d(tensors, spec, shape, **config), codes


def image(module, batch=2, height=9, width=8):
    g = torch.Generator().manual_seed(5)
    return torch.randn(batch, module.in_channels, height, width, generator=g)


def float_twin(module, codes):
    """The float layer with the dequantized weight, in float64: what the integer layer approximates in its epilogue."""
    weight = ops.dequantize(codes, module.weight_step, module.weight_zero).double()
    bias = None if module.bias is None else module.bias.double()

    def run(x):
        x = ops.dequantize(
            ops.quantize(x, module.input_step, module.input_zero, module.input_bits),
            module.input_step,
            module.input_zero,
        ).double()
        if isinstance(module, QLinear):
            return nn.functional.linear(x, weight, bias)
        weight_nchw = weight.permute(0, 3, 1, 2)
        return nn.functional.conv2d(x, weight_nchw, bias, module.stride, module.padding, module.dilation, module.groups)

    return run


@pytest.mark.parametrize(("weights", "activations"), WIDTHS)
@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_equals_its_definition_and_the_float_layer(name, weights, activations, device):
    module, codes = conv(name, weights, activations)
    x = image(module)
    y = module.to(device)(x.to(device)).cpu()
    with definition():
        assert torch.equal(module.cpu()(x), y)
    # Two roundings in float32 of a product and a sum, and the rounded product of the steps: 3 * 2^-24 of the parts.
    torch.testing.assert_close(y.double(), float_twin(module, codes)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [None, 12, 36])
@pytest.mark.parametrize(("weights", "activations"), WIDTHS)
def test_a_linear_equals_its_definition_and_the_float_layer(weights, activations, group_size, device):
    module, codes = linear(weights, activations, group_size)
    x = torch.randn(3, 2, 36, generator=torch.Generator().manual_seed(5))
    y = module.to(device)(x.to(device)).cpu()
    with definition():
        assert torch.equal(module.cpu()(x), y)
    torch.testing.assert_close(y.double(), float_twin(module, codes)(x), rtol=1e-5, atol=1e-5)


def test_a_convolution_with_groups_of_k_equals_its_definition():
    module, codes = conv("plain", group_size=15)
    x = image(module)
    y = module(x)
    with definition():
        assert torch.equal(module(x), y)
    torch.testing.assert_close(y.double(), float_twin(module, codes)(x), rtol=1e-5, atol=1e-5)


def test_shapes_are_those_of_the_float_layers():
    module, _ = linear(bias=False)
    for shape in [(36,), (0, 36), (1, 36), (2, 3, 4, 36)]:
        assert module(torch.ones(shape)).shape == (*shape[:-1], 21)
    module, _ = conv("strided", bias=False)
    twin = nn.Conv2d(3, 7, (3, 2), (2, 3), (0, 1), bias=False)
    for shape in [(3, 9, 8), (0, 3, 9, 8), (1, 3, 3, 2), (5, 3, 4, 31)]:
        assert module(torch.ones(shape)).shape == twin(torch.ones(shape)).shape
    x = image(module)
    assert torch.equal(module(x[0]), module(x)[0])


class Copies(TorchDispatchMode):
    """Counts float tensors that are written anew before quantize."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def test_channels_last_goes_through_without_a_copy():
    module, _ = conv("plain")
    x = image(module)
    last = x.contiguous(memory_format=torch.channels_last)
    with Copies() as seen:
        y = module(last)
    assert seen.ops == [
        "aten.permute.default",
        "qk.quantize.default",
        "qk.conv2d.default",
        "aten.permute.default",
    ]
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, module(x))
    strided = torch.randn(2, 5, 9, 16)[..., ::2]
    assert torch.equal(module(strided), module(strided.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_widened_and_the_result_cast_back(dtype):
    for module, x in [(linear()[0], torch.randn(3, 36)), (conv()[0], torch.randn(2, 5, 9, 8))]:
        y = module(x.to(dtype))
        assert y.dtype == dtype
        assert torch.equal(y, module(x.to(dtype).float()).to(dtype))


def test_half_and_double_leave_the_numbers_in_float32():
    module, _ = linear()
    x = torch.randn(3, 36)
    y = module(x)
    model = nn.Sequential(module, nn.Linear(21, 2)).half()
    assert model[1].weight.dtype == torch.float16
    assert torch.equal(module(x), y)
    assert torch.equal(model.double()[0](x), y)


def test_copies_pickles_and_state_give_the_same_bits():
    module, _ = conv()
    x = image(module)
    y = module(x)
    assert torch.equal(copy.deepcopy(module)(x), y)
    data = pickle.dumps(module)
    assert torch.equal(pickle.loads(data)(x), y)
    assert module.prepacked is not None  # untouched by the pickling
    assert set(module.state_dict()) == {
        "packed",
        "weight_step",
        "weight_zero",
        "bias",
        "input_step",
        "input_zero",
    }

    other = QConv2d({n: t.clone() for n, t in module.state_dict().items()}, module.spec, module.shape, padding=(1, 1))
    other.packed.zero_()
    other.prepack()
    assert not torch.equal(other(x), y)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), y)


@pytest.mark.parametrize("assign", [False, True])
def test_meta_and_back_through_the_state(assign):
    module, _ = linear()
    x = torch.randn(3, 36)
    y, state = module(x), {n: t.clone() for n, t in module.state_dict().items()}
    module.to("meta")
    assert module(x.to("meta")).shape == (3, 21)
    if not assign:
        module.to_empty(device="cpu")
    module.load_state_dict(state, assign=assign)
    assert torch.equal(module(x), y)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 4, 9, 8), r"QConv2d: x must be \[B, 5, H, W\] or \[5, H, W\], got \[2, 4, 9, 8\]"),
        (torch.ones(4, 9, 8), r"QConv2d: x must be \[B, 5, H, W\]"),
        (torch.ones(5, 9), r"QConv2d: x must be \[B, 5, H, W\]"),
        (torch.ones(2, 5, 9, 8, dtype=torch.float64), r"x must be float32, .*got float64. Convert it with x.float\(\)"),
        (torch.ones(2, 5, 9, 8, dtype=torch.int64), r"x must be float32, .*got int64"),
        (torch.ones(2, 5, 0, 8), r"kernel|output|H"),
        (torch.ones(2, 5, 0, 0), r"kernel|output|H"),
    ],
)
def test_a_bad_image_is_refused(x, message):
    with pytest.raises((QkError, RuntimeError), match=message):
        conv()[0](x)
    with definition(), pytest.raises((QkError, RuntimeError)):
        conv()[0](x)


def test_a_bad_row_is_refused():
    module, _ = linear()
    for x in (torch.ones(2, 35), torch.tensor(1.0)):
        with pytest.raises(QkError, match=r"QLinear: x must be \[\.\.\., 36\], got"):
            module(x)
    with pytest.raises(QkError, match="x must be float32"):
        module(torch.ones(2, 36, dtype=torch.int32))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("packed", torch.zeros(21, 16, dtype=torch.uint8), r"packed must be torch.uint8 \[21, 32\], got .*\[21, 16\]"),
        ("packed", None, "packed must be .* got nothing"),
        ("weight_step", torch.ones(21, dtype=torch.float64), "weight_step must be torch.float32"),
        ("weight_step", torch.zeros(21), "weight_step must be positive"),
        ("input_step", torch.tensor([torch.nan]), "input_step must be positive"),
        ("input_zero", torch.tensor([256], dtype=torch.int32), "input_zero must be within 0 and 255"),
        ("weight_zero", torch.full((21,), -1, dtype=torch.int32), "weight_zero must be within 0 and 15"),
        ("bias", torch.ones(20), "bias must be"),
    ],
)
def test_a_tensor_that_does_not_fit_is_refused(name, value, message):
    spec = QuantSpec(4, 8)
    tensors, _ = tensors_for((21, 36), spec)
    with pytest.raises(QkError, match=message):
        QLinear(tensors | {name: value}, spec, (21, 36))


def test_a_float_spec_and_a_group_that_does_not_fit_are_refused():
    tensors, _ = tensors_for((21, 36), QuantSpec(4, 8))
    with pytest.raises(QkError, match="spec must be widths"):
        QLinear(tensors, float_spec("it is slower"), (21, 36))
    with pytest.raises(QkError, match="group_size must be a divisor of K = 36"):
        QLinear(tensors, QuantSpec(4, 8, 7), (21, 36))


def test_the_definition_is_of_one_thread_and_ends():
    module, _ = linear()
    x = torch.randn(3, 36)
    seen = {}

    def other():
        with Copies() as mode:
            module(x)
        seen["other"] = mode.ops

    with definition():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with Copies() as mode:
            module(x)
    assert "qk.gemm.default" in seen["other"]
    assert not any(op.startswith("qk.") for op in mode.ops)
    with pytest.raises(KeyError), definition():
        raise KeyError
    with Copies() as mode:
        module(x)
    assert mode.ops == ["qk.quantize.default", "qk.gemm.default"]


def test_repr_shows_the_widths():
    assert repr(linear(group_size=12)[0]) == "QLinear(36, 21, bias=True, W4A8, group_size=12)"
    assert "W2A4" in repr(conv("grouped", 2, 4)[0])
    assert "groups=4" in repr(conv("grouped", 2, 4)[0])


@pytest.fixture
def network():
    first, _ = conv("plain")
    tail, _ = linear(k=36, n=4, bias=False)
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), tail).eval()


def test_compiles_as_one_graph(network):
    x = torch.randn(2, 5, 9, 8)
    torch._dynamo.reset()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), network(x))
    with definition():
        y = network(x)
    assert torch.equal(compiled(x), y)


def test_exports_with_a_dynamic_batch(network):
    x = torch.randn(2, 5, 9, 8)
    exported = torch.export.export(network, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 5, 9, 8)
        assert torch.equal(exported.module()(x), network(x))
