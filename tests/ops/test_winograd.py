"""Winograd's algorithm against conv2d's definition: equal bit for bit, or refused (docs/winograd.md)."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import qk
from qk import _core
from qk.ops.conv2d import reference
from threads import threads

AXES = {"bits": [2, 3, 4], "x_bits": [2, 4, 6]}
ISAS = ("generic", "avx2", "avx512vnni", "amx")


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param not in qk.usable_isas():
        pytest.skip(f"{request.param}: this CPU does not have it")
    before = qk.active_isa()
    qk.force_isa(request.param)
    yield request.param
    qk.force_isa(before)


def winograd(w, groups=1):
    return qk.ops.prepack(w.packed, w.zero, w.bits, tuple(w.codes.shape), groups, algorithm="winograd")


def inside(make_weight, shape, bits, groups=1, extreme=False, seed=0):
    """A weight whose zeros leave room for every sum of nine taps."""
    w = make_weight(shape, bits, groups=groups, extreme=extreme, seed=seed)
    if bits == 4:
        w.zero.clamp_(1, 14)
    return w


def same(x, x_zero, w, padding, groups, x_bits, **epilogue):
    n = w.codes.shape[0]
    x_step, bias = torch.tensor([0.03]), torch.randn(n) * 100
    places = ((1, 1), padding, (1, 1), groups)
    got = qk.ops.conv2d(
        x, x_step, x_zero, winograd(w, groups), w.step, bias, w.bits, (3, 3), *places, x_bits, **epilogue
    )
    want = reference(x, x_step, x_zero, w.codes, w.zero, w.step, bias, *places, **epilogue)
    assert torch.equal(got, want)


def codes_of(shape, x_bits, seed, extreme=False):
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2**x_bits, shape, generator=random, dtype=torch.uint8)
    return (x >= 2 ** (x_bits - 1)).to(torch.uint8) * (2**x_bits - 1) if extreme else x


# batch, H, W, [N, 3, 3, C / groups], padding, groups
CASES = {
    "one output": (1, 1, 1, (1, 3, 3, 4), (1, 1), 1),
    "one pixel, wide padding": (1, 1, 1, (17, 3, 3, 5), (4, 3), 1),
    "no padding": (2, 6, 9, (16, 3, 3, 16), (0, 0), 1),
    "odd": (3, 7, 5, (40, 3, 3, 20), (1, 1), 1),
    "groups": (2, 6, 5, (72, 3, 3, 18), (1, 1), 3),
    "whole vectors": (1, 14, 14, (64, 3, 3, 64), (1, 1), 1),
    "many channels": (1, 7, 7, (33, 3, 3, 260), (1, 1), 1),
    "padding beyond the image": (1, 2, 3, (20, 3, 3, 8), (5, 0), 1),
    "many tiles": (2, 30, 29, (48, 3, 3, 32), (1, 2), 1),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bits", AXES["bits"])
def test_result_is_the_definition(isa, name, bits, make_weight):
    batch, h, width, shape, padding, groups = CASES[name]
    for x_bits in AXES["x_bits"]:
        for extreme in (False, True):
            w = inside(make_weight, shape, bits, groups, extreme)
            x = codes_of((batch, h, width, shape[3] * groups), x_bits, 1, extreme)
            for x_zero in (0, 2**x_bits - 1):
                same(x, torch.tensor([x_zero], dtype=torch.int32), w, padding, groups, x_bits)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape_is_the_definition(isa, data, make_weight):
    batch, h, width = (data.draw(st.integers(1, top)) for top in (3, 12, 12))
    padding = tuple(data.draw(st.integers(max(0, (3 - size + 1) // 2), 4)) for size in (h, width))
    groups, c, n = data.draw(st.integers(1, 3)), data.draw(st.integers(2, 140)), data.draw(st.integers(1, 40))
    bits, x_bits, seed = (
        data.draw(st.sampled_from([2, 3, 4])),
        data.draw(st.integers(2, 6)),
        data.draw(st.integers(0, 99)),
    )
    w = inside(make_weight, (n * groups, 3, 3, c), bits, groups, data.draw(st.booleans()), seed)
    x = codes_of((batch, h, width, c * groups), x_bits, seed, data.draw(st.booleans()))
    x_zero = torch.tensor([data.draw(st.integers(0, 2**x_bits - 1))], dtype=torch.int32)
    epilogue = {"activation": data.draw(st.sampled_from(["none", "relu", "relu6"]))}
    if data.draw(st.booleans()):
        zero = torch.tensor([data.draw(st.integers(0, 63))], dtype=torch.int32)
        epilogue |= {"out_step": torch.tensor([5.0]), "out_zero": zero, "out_bits": 6}
    kind = data.draw(st.sampled_from(["none", "float", "codes"]))
    shape = (batch, h + 2 * padding[0] - 2, width + 2 * padding[1] - 2, n * groups)
    if kind == "float":
        epilogue["residual"] = torch.randn(shape) * 100
    if kind == "codes":
        epilogue |= {"residual": codes_of(shape, 8, seed), "residual_step": torch.tensor([2.5])}
        epilogue["residual_zero"] = torch.tensor([77], dtype=torch.int32)
    with threads(data.draw(st.integers(1, 8))):
        same(x, x_zero, w, padding, groups, x_bits, **epilogue)


def test_threads_and_instruction_sets_change_no_bit(each_isa_and_threads, make_weight):
    for shape, size, batch in (((64, 3, 3, 64), 30, 1), ((128, 3, 3, 128), 7, 1), ((40, 3, 3, 72), 9, 5)):
        w = inside(make_weight, shape, 4)
        prepacked, x = winograd(w), codes_of((batch, size, size, shape[3]), 6, 3)
        scale = (torch.tensor([0.1]), torch.tensor([5], dtype=torch.int32))

        def run(x=x, scale=scale, p=prepacked, w=w):
            return [qk.ops.conv2d(x, *scale, p, w.step, None, 4, (3, 3), padding=(1, 1), x_bits=6)]

        each_isa_and_threads(run)


def test_no_images_give_no_images(isa, make_weight):
    w = inside(make_weight, (16, 3, 3, 16), 4)
    same(codes_of((0, 5, 5, 16), 6, 0), torch.tensor([3], dtype=torch.int32), w, (1, 1), 1, 6)


@pytest.mark.parametrize("bits", [2, 4])
def test_prepacked_weight_holds_the_weight(bits, make_weight):
    n, c = 37, 21
    w = inside(make_weight, (n, 3, 3, c), bits)
    layout = _core.packed_layout((n, 3, 3, c), bits, winograd=True)
    prepacked, per, blocks = winograd(w), 8 // bits, layout["blocks"]
    assert prepacked.numel() == layout["bytes"]
    codes = prepacked[layout["codes_at"] : layout["sums_at"]].reshape(blocks, -1, 9, 16, 4)
    steps = torch.stack([codes >> (i * bits) & (2**bits - 1) for i in range(per)], 2)  # [b, vectors, step, 9, 16, 4]
    values = steps.permute(0, 4, 3, 1, 2, 5).reshape(blocks * 16, 9, -1)
    want = w.codes.reshape(n, 9, c)
    assert torch.equal(values[:n, :, :c], want)
    assert torch.equal(values[:n, :, c:], w.zero.to(torch.uint8).reshape(n, 1, 1).expand(n, 9, values.shape[2] - c))
    g = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]])
    taps = (want.long() - w.zero.reshape(n, 1, 1)).sum(2).reshape(n, 3, 3)
    sums = prepacked[layout["sums_at"] : layout["zeros_at"]].view(torch.int32).reshape(blocks, 16, 16)
    assert torch.equal(sums.permute(0, 2, 1).reshape(-1, 4, 4)[:n], (g @ taps @ g.t()).to(torch.int32))


@pytest.mark.parametrize("bits", [2, 4])
def test_weights_whose_pairs_fit_16_bits_are_marked(isa, bits, make_weight):
    # 255 (|a| + |b|) < 2^15 for neighbouring channels; AVX2 then multiplies without widening.
    x, x_zero = codes_of((1, 9, 7, 18), 6, 0, True), torch.tensor([63], dtype=torch.int32)
    w = make_weight((20, 3, 3, 18), bits)
    w.zero.fill_(2 ** (bits - 1))
    for spread, code in ((0, 2 ** (bits - 1)), (1, 0)):  # random codes, then one pair of channels of -8 at every tap
        if spread:
            w.codes[3, :, :, 4:6] = code
        w.packed = qk.ops.pack(w.codes.reshape(20, -1), bits)
        fits = winograd(w)[60:64].view(torch.int32).item()
        assert fits == (0 if spread and bits == 4 else 1)
        same(x, x_zero, w, (1, 1), 1, 6)


def test_affine_weights_whose_taps_fit_are_taken(isa, make_weight):
    w = make_weight((20, 3, 3, 16), 4)
    w.zero[::2], w.zero[1::2] = 0, 15
    w.codes.copy_(torch.where(torch.arange(20).reshape(-1, 1, 1, 1) % 2 == 0, w.codes // 2, 15 - w.codes // 2))
    w.packed = qk.ops.pack(w.codes.reshape(20, -1), 4)
    same(codes_of((1, 6, 6, 16), 6, 0, True), torch.tensor([0], dtype=torch.int32), w, (1, 1), 1, 6)


@pytest.mark.parametrize(
    ("code", "zero", "fits"),
    [(15, 0, False), (14, 0, True), (0, 15, False), (1, 15, True), (15, 1, True), (0, 14, True)],
)
def test_taps_that_leave_int8_are_refused(isa, code, zero, fits, make_weight):
    w = make_weight((3, 3, 3, 5), 4)
    w.codes.fill_(8)
    w.codes[1, :, :, 3], w.zero[:] = code, 8
    w.zero[1] = zero
    w.codes[1, :, :, :3] = w.codes[1, :, :, 4:] = zero
    w.packed = qk.ops.pack(w.codes.reshape(3, -1), 4)
    if fits:
        same(codes_of((1, 5, 4, 5), 6, 0, True), torch.tensor([63], dtype=torch.int32), w, (1, 1), 1, 6)
    else:
        with pytest.raises(RuntimeError, match=r"a sum of code - zero within int8 for winograd, got -?135.*direct"):
            winograd(w)


@pytest.mark.parametrize(
    ("shape", "bits", "options", "message"),
    [
        ((8, 3, 3, 8), 8, {}, "bits must be 2 or 4 for winograd"),
        ((8, 3, 1, 8), 4, {}, r"shape must be \[N, 3, 3, C / groups\] for winograd"),
        ((8, 72), 4, {}, r"shape must be \[N, 3, 3, C / groups\] for winograd"),
        ((8, 3, 3, 1), 4, {"groups": 8}, "groups must be not depthwise for winograd"),
        ((8, 3, 3, 8), 4, {"k_groups": 2}, r"zero must be int32 \[N\] for winograd"),
    ],
)
def test_weights_that_do_not_fit_are_refused(shape, bits, options, message, make_weight):
    w = make_weight(shape, bits, **options)
    with pytest.raises(RuntimeError, match=message):
        winograd(w, options.get("groups", 1))
    with pytest.raises(RuntimeError, match="algorithm must be direct or winograd, got fft"):
        qk.ops.prepack(w.packed, w.zero, bits, shape, options.get("groups", 1), algorithm="fft")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x_bits": 7}, "x_bits must be at most 6, got 7.*direct"),
        ({"x_bits": 8}, "x_bits must be at most 6"),
        ({"stride": (2, 1)}, "stride must be 1"),
        ({"dilation": (1, 2)}, "dilation must be 1"),
        ({"kernel": (3, 2)}, "weight must be of the kernel and bits given"),
        ({"bits": 2}, "weight must be prepacked from"),
        ({"bits": 8}, "weight must be of the kernel and bits given"),
        ({"weight_step": torch.ones(6, 2)}, "weight must be of the kernel and bits given"),
        ({"x": torch.zeros(1, 8, 8, 8, dtype=torch.uint8)}, "weight must be prepacked from"),
    ],
)
def test_uses_that_do_not_fit_are_refused(changed, message, make_weight):
    w = inside(make_weight, (6, 3, 3, 4), 4)
    arguments = {
        "x": torch.zeros(1, 8, 8, 4, dtype=torch.uint8),
        "x_step": torch.ones(1),
        "x_zero": torch.zeros(1, dtype=torch.int32),
        "weight": winograd(w),
        "weight_step": w.step,
        "bias": None,
        "bits": 4,
        "kernel": (3, 3),
        "x_bits": 6,
    }
    qk.ops.conv2d(**arguments)
    with pytest.raises(RuntimeError, match=message):
        qk.ops.conv2d(**(arguments | changed))


def test_gemm_refuses_the_weight_of_a_convolution(make_weight):
    w = inside(make_weight, (6, 3, 3, 4), 4)
    x, one, zero = torch.zeros(2, 36, dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(RuntimeError, match="weight must be prepacked from"):
        qk.ops.gemm(x, one, zero, winograd(w), w.step, None, 4)


def test_registration(make_weight):
    w = inside(make_weight, (24, 3, 3, 20), 4)
    x, step, zero = codes_of((2, 7, 6, 20), 6, 0), torch.tensor([0.1]), torch.tensor([3], dtype=torch.int32)
    torch.library.opcheck(torch.ops.qk.prepack.default, (w.packed, w.zero, 4, [24, 3, 3, 20], 1, "winograd"))
    arguments = (x, step, zero, winograd(w), w.step, None, 4, [3, 3], [1, 1], [1, 1], [1, 1], 1, 6, "relu")
    torch.library.opcheck(torch.ops.qk.conv2d.default, arguments)
