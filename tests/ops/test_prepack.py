import pytest
import torch

import qk
from qk import _core
from qk.ops.prepack import reference


def parts(codes, bits):
    """[...] -> [..., 8 / bits] codes of a byte."""
    return torch.stack([codes >> (i * bits) & (2**bits - 1) for i in range(8 // bits)], -1)


def rows_of_vectors(codes, bits):
    """Vectors of 16 channels x 4 codes: [blocks, bytes] -> [blocks, 16, K]."""
    steps = parts(codes.reshape(len(codes), -1, 16, 4), bits)  # [block, vector, channel, 4, step]
    return steps.permute(0, 2, 1, 4, 3).flatten(2)


def rows_of_tiles(codes, bits):
    """Tiles of 16 channels x 64 codes in the registers of CUDA's lanes: [blocks, bytes] -> [blocks, 16, K]."""
    blocks = len(codes)
    if bits == 8:
        found = codes.reshape(blocks, -1, 2, 8, 4, 2, 2, 4)  # tile, step, g, t, half of K, half of channels, byte
    elif bits == 4:
        found = parts(codes.reshape(blocks, -1, 8, 4, 2, 2, 4), 4).permute(0, 1, 4, 2, 3, 5, 7, 6)
    else:
        found = parts(codes.reshape(blocks, -1, 8, 4, 2, 4), 2).unflatten(-1, (2, 2)).permute(0, 1, 4, 2, 3, 6, 7, 5)
    return found.permute(0, 6, 3, 1, 2, 5, 4, 7).reshape(blocks, 16, -1)


@pytest.fixture
def cuda_layout(request):
    return request.node.callspec.params["device"] in ("emulated", "cuda")


def read_back(prepacked, shape, bits, groups=1, k_groups=1, cuda=False):
    """code - zero of a weight without depthwise groups, from the layout's own description (core/layout.h)."""
    layout = _core.packed_layout(shape, bits, groups, k_groups, cuda)
    n, k = shape[0], torch.Size(shape[1:]).numel()
    blocks, k_padded = layout["blocks"], layout["k_padded"]
    codes = prepacked[layout["codes_at"] : layout["sums_at"]].reshape(blocks, -1)
    segments, segment_k, padded = layout["segments"], layout["segment_k"], layout["segment_padded"]
    rows = (rows_of_tiles if cuda else rows_of_vectors)(codes, bits)
    rows = rows.reshape(blocks * 16, k_groups, segments // k_groups, padded)
    assert not rows[..., segment_k:].any()  # what fills a segment up is bytes of 0
    rows = rows[..., :segment_k].to(torch.int32)
    if bits == 8:
        values = (rows ^ 128) - 128
    else:
        zeros = prepacked[layout["zeros_at"] :][: blocks * k_groups * 16].reshape(blocks, k_groups, 16)
        values = rows - zeros.permute(0, 2, 1).reshape(blocks * 16, k_groups, 1, 1).to(torch.int32)
    sums = prepacked[layout["sums_at"] : layout["zeros_at"]].view(torch.int32).reshape(blocks, k_groups, 16)
    assert torch.equal(values.sum((2, 3), dtype=torch.int32), sums.permute(0, 2, 1).reshape(blocks * 16, k_groups))
    assert k_padded == segments * padded
    values = values.reshape(groups, -1, k)[:, : n // groups]
    return values.reshape(shape)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    ("shape", "groups", "k_groups"),
    [
        ((1, 1), 1, 1),
        ((17, 20), 1, 1),
        ((40, 200), 1, 1),
        ((33, 96), 1, 3),
        ((16, 35), 1, 7),
        ((5, 3, 3, 7), 1, 1),
        ((48, 3, 3, 8), 2, 1),
        ((12, 1, 5, 3), 4, 5),
    ],
)
def test_layout_holds_the_weight(shape, groups, k_groups, bits, device, cuda_layout, make_weight):
    w = make_weight(shape, bits, device, groups=groups, k_groups=k_groups)
    want = reference(w.codes.reshape(shape[0], -1), w.zero, bits, shape, groups)
    assert torch.equal(read_back(w.prepacked.cpu(), shape, bits, groups, k_groups, cuda_layout), want.cpu())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_depthwise_weights_are_differences(bits, device, make_weight):
    w = make_weight((37, 3, 3, 1), bits, device, groups=37)
    layout = _core.packed_layout((37, 3, 3, 1), bits, 37)
    assert layout["stored_bits"] == 8
    codes = w.prepacked.cpu()[layout["codes_at"] : layout["sums_at"]].view(torch.int8).reshape(3, 3, 16, 4)
    assert not codes[..., 3].any()  # a vector has a column of the kernel
    rows = codes[..., :3].permute(0, 2, 3, 1).reshape(48, 9)[:37].to(torch.int32)
    assert torch.equal(rows, reference(w.codes.reshape(37, 9), w.zero, bits, (37, 9)).cpu())


def test_every_instruction_set_makes_the_same_bytes(make_weight):
    before, made = qk.active_isa(), []
    for isa in qk.usable_isas():
        qk.force_isa(isa)
        made.append([make_weight((35, 77), bits, k_groups=7).prepacked for bits in (2, 4, 8)])
    qk.force_isa(before)
    assert all(torch.equal(a, b) for other in made[1:] for a, b in zip(made[0], other, strict=True))


def test_bits_behind_the_last_code_mean_nothing(make_weight):
    w = make_weight((3, 5), 4)
    dirty = w.packed.clone()
    dirty[:, 3:] = 255
    dirty[:, 2] |= 0xF0
    assert torch.equal(qk.ops.prepack(dirty, w.zero, 4, (3, 5)), w.prepacked)


def test_size_is_that_of_the_layout(make_weight):
    # 8 bits: 2 blocks of 16 channels, 64 codes each. 4 bits: half the codes and a zero for each channel.
    assert _core.packed_layout((17, 30), 8)["bytes"] == 64 + 2 * 64 * 16 + 2 * 16 * 4
    assert _core.packed_layout((17, 30), 4)["bytes"] == 64 + 2 * 64 * 8 + 2 * 16 * 4 + 64
    # A row of a kernel fills 64 codes, a group of K a vector.
    assert _core.packed_layout((16, 3, 3, 3), 8)["bytes"] == 64 + 3 * 64 * 16 + 16 * 4
    assert _core.packed_layout((16, 24), 8, k_groups=2)["bytes"] == 64 + 2 * 12 * 16 + 2 * 16 * 4
    assert make_weight((17, 30), 4).prepacked.numel() == _core.packed_layout((17, 30), 4)["bytes"]


def test_registration(device, make_weight):
    w = make_weight((9, 20), 4, device, k_groups=2)
    torch.library.opcheck(torch.ops.qk.prepack.default, (w.packed, w.zero, 4, [9, 20]))
    w = make_weight((8, 3, 3, 1), 2, device, groups=8)
    torch.library.opcheck(torch.ops.qk.prepack.default, (w.packed, w.zero, 2, [8, 3, 3, 1], 8))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"packed": torch.zeros(9, 16, dtype=torch.int32)}, "packed must be Byte"),
        ({"packed": torch.zeros(9, 32, dtype=torch.uint8)}, r"packed must be uint8 \[9, 16\] for this shape"),
        ({"packed": torch.zeros(8, 16, dtype=torch.uint8)}, r"packed must be uint8 \[9, 16\]"),
        ({"packed": torch.zeros(144, dtype=torch.uint8)}, r"packed must be uint8 \[9, 16\]"),
        ({"zero": torch.zeros(8, dtype=torch.int32)}, r"zero must be int32 \[9\]"),
        ({"zero": torch.zeros(9, 3, dtype=torch.int32)}, r"zero must be int32 \[9\], or"),
        ({"zero": torch.zeros(9)}, "zero must be Int"),
        ({"zero": torch.full((9,), 16, dtype=torch.int32)}, "zero must be a code from 0 to 15"),
        ({"zero": torch.full((9,), -1, dtype=torch.int32)}, "zero must be a code from 0 to 15"),
        ({"bits": 8, "packed": torch.zeros(9, 32, dtype=torch.uint8)}, "zero must be 128 for 8-bit weights, got 3"),
        ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
        ({"shape": (9,)}, "shape must be"),
        ({"shape": (9, 0)}, "every size of shape must be positive"),
        ({"shape": (9, -20)}, "every size of shape must be positive"),
        ({"shape": (9, 2**30, 2**30, 2**30)}, "K must be at most"),
        (
            {"shape": (9, 2**26)},
            "K must be short enough for a sum in int32, got 67108864. Use zeros and",
        ),
        ({"shape": (9, 2**62)}, "every size of shape must be positive and below"),
        ({"groups": 3}, "groups must be 1 for a weight"),
        ({"algorithm": "fft"}, "algorithm must be direct or winograd, got fft"),
        ({"shape": (9, 1, 1, 20), "groups": 2}, "groups must be a divisor of N"),
        ({"shape": (9, 1, 1, 20), "groups": 0}, "groups must be positive"),
    ],
)
def test_bad_input_is_refused(changed, message):
    arguments = {
        "packed": torch.zeros(9, 16, dtype=torch.uint8),
        "zero": torch.full((9,), 3, dtype=torch.int32),
        "bits": 4,
        "shape": (9, 20),
    }
    with pytest.raises(RuntimeError, match="qk::prepack: " + message):
        qk.ops.prepack(**(arguments | changed))
