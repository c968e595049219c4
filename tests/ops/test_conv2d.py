import pytest
import torch

import qk
from qk import _core
from qk.ops.conv2d import reference

PLAIN = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
# batch, H, W, weight [N, kh, kw, C / groups], what differs from PLAIN
CASES = {
    "one of everything": (1, 1, 1, (1, 1, 1, 1), {}),
    "first layer, 3 channels": (2, 13, 11, (17, 7, 7, 3), {"stride": (2, 2), "padding": (3, 3)}),
    "3x3": (2, 9, 7, (33, 3, 3, 20), {"padding": (1, 1)}),
    "3x3 on whole tiles": (1, 14, 14, (64, 3, 3, 64), {"padding": (1, 1)}),
    "few pixels of whole tiles": (1, 5, 5, (70, 3, 3, 64), {"padding": (1, 1)}),
    "few pixels, few channels, groups": (2, 5, 4, (20, 3, 2, 128), {"groups": 2, "stride": (2, 1), "padding": (2, 1)}),
    "1x1": (2, 5, 6, (24, 1, 1, 40), {}),
    "1x1 with stride": (1, 7, 9, (20, 1, 1, 16), {"stride": (2, 3)}),
    "dilation": (1, 12, 10, (16, 3, 2, 5), {"dilation": (2, 3), "padding": (2, 0)}),
    "kernel as large as the input": (3, 4, 5, (10, 4, 5, 6), {}),
    "padding beyond the kernel": (1, 3, 2, (5, 2, 3, 4), {"padding": (4, 7)}),
    "padding with stride and dilation": (
        1,
        6,
        6,
        (7, 3, 3, 2),
        {"padding": (5, 4), "dilation": (3, 2), "stride": (3, 2)},
    ),
    "groups": (2, 6, 5, (36, 3, 3, 5), {"groups": 4, "padding": (1, 1)}),
    "groups of 24 channels": (1, 7, 7, (48, 3, 3, 24), {"groups": 2, "padding": (1, 1), "stride": (2, 2)}),
    "depthwise": (2, 8, 9, (37, 3, 3, 1), {"groups": 37, "padding": (1, 1)}),
    "depthwise with stride": (1, 9, 9, (96, 5, 5, 1), {"groups": 96, "padding": (2, 2), "stride": (2, 2)}),
    "depthwise with dilation": (1, 9, 8, (64, 3, 3, 1), {"groups": 64, "padding": (2, 0), "dilation": (2, 1)}),
    "depthwise, even kernel": (1, 5, 5, (130, 2, 2, 1), {"groups": 130}),
    "two outputs of each channel": (1, 6, 6, (20, 3, 3, 1), {"groups": 10, "padding": (1, 1)}),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def problem(batch, h, w, channels, n, device, x_bits=8, seed=1):
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2**x_bits, (batch, h, w, channels), generator=random, dtype=torch.uint8)
    x_step = 0.01 + torch.rand(1, generator=random)
    x_zero = torch.randint(1, 2**x_bits, (1,), generator=random, dtype=torch.int32)
    bias = torch.randn(n, generator=random) * 100
    return [t.to(device) for t in (x, x_step, x_zero)], bias.to(device)


def both(inputs, w, bias, geometry, x_bits=8, **epilogue):
    geometry = PLAIN | geometry
    kernel = tuple(w.codes.shape[1:3])
    got = qk.ops.conv2d(*inputs, w.prepacked, w.step, bias, w.bits, kernel, x_bits=x_bits, **geometry, **epilogue)
    return got, reference(*inputs, w.codes, w.zero, w.step, bias, **geometry, **epilogue)


def case(name, bits, device, make_weight, x_bits=8, k_groups=1, batch=None):
    default, h, width, shape, geometry = CASES[name]
    groups = geometry.get("groups", 1)
    w = make_weight(shape, bits, device, groups=groups, k_groups=k_groups)
    batch = default if batch is None else batch
    inputs, bias = problem(batch, h, width, shape[3] * groups, shape[0], device, x_bits)
    return inputs, w, bias, geometry


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_result_is_the_definition(name, bits, device, make_weight):
    for x_bits in (4, 8):
        inputs, w, bias, geometry = case(name, bits, device, make_weight, x_bits)
        got, want = both(inputs, w, bias, geometry, x_bits)
        assert torch.equal(got, want), x_bits


# H, W, weight, what differs from PLAIN
FEW_CHANNELS = {
    "parts of tiles of pixels and of channels": (19, 37, (70, 7, 7, 3), {"stride": (2, 2), "padding": (3, 3)}),
    "one channel": (10, 17, (16, 3, 3, 1), {"padding": (1, 1)}),
    "two channels and strides": (23, 50, (33, 5, 3, 2), {"stride": (3, 1), "padding": (4, 0)}),
    "four channels": (9, 16, (128, 4, 4, 4), {"stride": (4, 4)}),
    "a window of two steps": (8, 40, (20, 3, 11, 3), {"padding": (1, 5)}),
    "rows apart": (20, 20, (20, 3, 3, 3), {"dilation": (3, 1), "padding": (3, 1)}),
    "columns apart": (12, 20, (20, 3, 3, 3), {"dilation": (1, 2)}),
    "a window of many rows": (20, 20, (20, 11, 11, 3), {"stride": (4, 4), "padding": (2, 2)}),
    "strides too wide to share pixels": (70, 300, (20, 3, 3, 3), {"stride": (30, 40), "padding": (1, 1)}),
}


@pytest.mark.parametrize("name", FEW_CHANNELS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_images_of_few_channels(name, bits, device, make_weight):
    h, width, shape, geometry = FEW_CHANNELS[name]
    w = make_weight(shape, bits, device)
    inputs, bias = problem(2, h, width, shape[3], shape[0], device)
    out = {"out_step": torch.tensor([9.0], device=device), "out_zero": inputs[2], "out_bits": 8, "activation": "relu"}
    for epilogue in ({}, out):
        got, want = both(inputs, w, bias, geometry, **epilogue)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_activation_and_codes(name, device, make_weight):
    inputs, w, bias, geometry = case(name, 4, device, make_weight)
    out = {"out_step": torch.tensor([9.0], device=device), "out_bits": 6}
    out["out_zero"] = torch.tensor([5], dtype=torch.int32, device=device)
    for activation in ("none", "relu", "relu6"):
        for epilogue in ({}, out):
            got, want = both(inputs, w, bias, geometry, activation=activation, **epilogue)
            assert torch.equal(got, want), activation


@pytest.mark.parametrize("name", ["3x3", "groups", "depthwise", "1x1"])
@pytest.mark.parametrize("kind", ["float", "codes"])
def test_a_residual_is_added_before_the_activation(name, kind, device, make_weight):
    inputs, w, bias, geometry = case(name, 4, device, make_weight)
    random = torch.Generator().manual_seed(2)
    shape = reference(*inputs, w.codes, w.zero, w.step, bias, **(PLAIN | geometry)).shape
    epilogue = {"activation": "relu", "residual": torch.randn(shape, generator=random) * 500}
    if kind == "codes":
        epilogue["residual"] = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
        epilogue |= {"residual_step": torch.tensor([7.3]), "residual_zero": torch.tensor([9], dtype=torch.int32)}
    out = {"out_step": torch.tensor([9.0]), "out_zero": torch.tensor([5], dtype=torch.int32), "out_bits": 8}
    for more in ({}, out):
        moved = {name: v.to(device) if torch.is_tensor(v) else v for name, v in (epilogue | more).items()}
        got, want = both(inputs, w, bias, geometry, **moved)
        assert torch.equal(got, want)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("name", "k_groups"), [("3x3", 3), ("3x3", 9), ("groups", 5), ("depthwise", 3), ("1x1", 2)])
def test_groups_along_k(name, k_groups, bits, device, make_weight):
    inputs, w, bias, geometry = case(name, bits, device, make_weight, k_groups=k_groups)
    got, want = both(inputs, w, bias, geometry)
    assert torch.equal(got, want)


def test_no_images_give_no_images(device, make_weight):
    for name in ("3x3", "depthwise"):
        inputs, w, bias, geometry = case(name, 4, device, make_weight, batch=0)
        got, want = both(inputs, w, bias, geometry)
        assert got.shape == want.shape
        assert got.shape[0] == 0


@pytest.mark.parametrize("name", ["3x3", "depthwise"])
def test_a_result_that_underflows_keeps_its_sign(name, device, make_weight):
    inputs, w, _, geometry = case(name, 4, device, make_weight)
    inputs[1], w.step = inputs[1] * 1e-30, w.step * 1e-30
    got, want = both(inputs, w, None, geometry)
    assert want.signbit().any()
    assert torch.equal(got.signbit(), want.signbit())


def test_channels_first_strides(device, make_weight):
    inputs, w, bias, geometry = case("3x3", 4, device, make_weight)
    inputs[0] = inputs[0].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    got, want = both(inputs, w, bias, geometry)
    assert torch.equal(got, want)


def test_threads_and_instruction_sets_change_no_bit(each_isa_and_threads, make_weight):
    for name in ("3x3 on whole tiles", "depthwise", "groups", "first layer, 3 channels"):
        inputs, w, bias, geometry = case(name, 4, "cpu", make_weight, batch=5)
        each_isa_and_threads(lambda a=(inputs, w, bias, geometry): both(*a))
        got, want = both(inputs, w, bias, geometry)
        assert torch.equal(got, want), name


def test_one_number_stands_for_both_axes(make_weight):
    inputs, w, bias, _ = case("3x3", 4, "cpu", make_weight)
    got = torch.ops.qk.conv2d(*inputs, w.prepacked, w.step, bias, 4, [3, 3], 2, 1)
    assert torch.equal(got, reference(*inputs, w.codes, w.zero, w.step, bias, (2, 2), (1, 1)))


def test_registration(device, make_weight):
    for name in ("3x3", "depthwise", "groups"):
        inputs, w, bias, geometry = case(name, 4, device, make_weight)
        kernel = list(w.codes.shape[1:3])
        places = [list(v) if isinstance(v, tuple) else v for v in (PLAIN | geometry).values()]
        torch.library.opcheck(
            torch.ops.qk.conv2d.default, (*inputs, w.prepacked, w.step, bias, 4, kernel, *places, 8, "relu")
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(1, 8, 8, 4)}, "x must be Byte, got Float"),
        ({"x": torch.zeros(8, 8, 4, dtype=torch.uint8)}, r"x must be codes \[B, H, W, C\]"),
        ({"x": torch.zeros(1, 8, 8, 5, dtype=torch.uint8)}, "weight must be prepacked from"),
        ({"x": torch.zeros(1, 0, 8, 4, dtype=torch.uint8)}, "H of x must be"),
        ({"x": torch.zeros(1, 8, 1, 4, dtype=torch.uint8)}, "W of x must be at least as large as the kernel's reach 3"),
        ({"kernel": (9, 1)}, "H of x must be at least as large as the kernel's reach 9"),
        ({"kernel": (1, 9)}, "W of x must be"),
        ({"kernel": (3, 2)}, "weight must be prepacked from.*got one made from"),
        ({"kernel": (0, 3)}, "kernel must be positive"),
        ({"stride": (0, 1)}, "stride must be positive"),
        ({"dilation": (1, -1)}, "dilation must be positive"),
        ({"padding": (0, -1)}, "padding must be 0 or more"),
        ({"padding": (2**31, 0)}, "padding must be 0 or more and below 2"),
        ({"padding": (2**30, 2**30)}, "the result must be at most"),
        ({"dilation": (2**31 - 1, 1)}, "H of x must be at least"),
        ({"groups": 3}, "groups must be a divisor of the channels"),
        ({"groups": 0}, "groups must be positive"),
        ({"groups": 4}, "groups must be a divisor of the output channels"),
        ({"x_step": torch.ones(8)}, "x_step must be one value, got"),
        ({"weight_step": torch.ones(6, 5)}, r"weight_step must be float32 \[N\]"),
        ({"bits": 8}, "weight must be prepacked from"),
        ({"activation": "silu"}, "activation must be none, relu or relu6"),
    ],
)
def test_bad_input_is_refused(changed, message, make_weight):
    w = make_weight((6, 3, 3, 4), 4)
    arguments = {
        "x": torch.zeros(1, 8, 8, 4, dtype=torch.uint8),
        "x_step": torch.ones(1),
        "x_zero": torch.zeros(1, dtype=torch.int32),
        "weight": w.prepacked,
        "weight_step": w.step,
        "bias": torch.zeros(6),
        "bits": 4,
        "kernel": (3, 3),
    }
    with pytest.raises(RuntimeError, match="qk::conv2d: " + message):
        qk.ops.conv2d(**(arguments | changed))


@pytest.mark.parametrize(
    ("shape", "size", "geometry", "k_groups", "rows"),
    [
        ((64, 3, 3, 64), (56, 56), {"padding": (1, 1)}, 1, "lines"),
        ((64, 7, 7, 3), (224, 224), {"padding": (3, 3), "stride": (2, 2)}, 1, "lines"),
        ((144, 1, 1, 24), (56, 56), {}, 1, "in place"),
        ((128, 1, 1, 64), (56, 56), {"stride": (2, 2)}, 1, "in place"),
        ((16, 1, 1, 6), (5, 5), {}, 1, "packed"),  # steps of four codes would read beyond x
        ((64, 1, 1, 4096), (7, 7), {}, 1, "packed"),  # every pixel in the same cache sets
        ((64, 1, 1, 64), (7, 7), {"padding": (1, 1)}, 1, "lines"),
        ((48, 3, 3, 24), (7, 7), {"padding": (1, 1), "groups": 2}, 1, "lines"),
        ((16, 3, 3, 16), (14, 14), {"dilation": (2, 1)}, 1, "lines"),
        ((16, 3, 3, 16), (14, 14), {"dilation": (1, 2)}, 1, "packed"),
        ((16, 3, 3, 16), (14, 14), {}, 3, "packed"),
        ((5, 2, 3, 4), (3, 2), {"padding": (1000, 1000)}, 1, "packed"),
    ],
)
def test_rows_are_read_where_they_can_be(shape, size, geometry, k_groups, rows):
    g = PLAIN | geometry
    got = _core.conv_rows(shape, g["groups"], k_groups, size, g["stride"], g["padding"], g["dilation"])
    assert got == rows
