"""SPARQ values at rest back to codes."""

import pytest
import torch

import qk
from qk.ops.conv2d import reference as conv2d_reference
from qk.ops.gemm import reference as gemm_reference
from qk.ops.sparq import FAMILIES
from qk.ops.sparq import reference as sparq_reference
from qk.ops.sparq_pack import row_bytes
from qk.ops.sparq_unpack import reference

unpack = torch.ops.qk.sparq_unpack
family = pytest.mark.parametrize("family", FAMILIES)
pairs_or_not = pytest.mark.parametrize("pairs", [True, False])


def problem(rows, cols, family, pairs, device, seed=0):
    """Any bytes: what pack never writes is defined too."""
    g = torch.Generator().manual_seed(seed)
    shape = rows, row_bytes(cols, *FAMILIES[family], pairs)
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).to(device)


@family
@pairs_or_not
@pytest.mark.parametrize("shape", [(1, 1), (5, 67), (3, 64), (2, 4097), (70, 9), (0, 7), (7, 0), (2, 16)])
def test_codes_equal_the_definition_whatever_the_bytes_are(shape, family, pairs, device):
    packed = problem(*shape, family, pairs, device)
    found = unpack(packed, shape[1], *FAMILIES[family], pairs)
    assert torch.equal(found, reference(packed, shape[1], *FAMILIES[family], pairs))


@family
@pairs_or_not
@pytest.mark.parametrize("cols", [1, 2, 3, 15, 16, 17, 33, 1001])
def test_it_undoes_pack(cols, family, pairs, device):
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(-255, 256, (3, cols), generator=g).clamp(min=0).to(torch.uint8).to(device)
    cut = torch.ops.qk.sparq(codes, *FAMILIES[family], True, pairs)
    packed = torch.ops.qk.sparq_pack(cut, *FAMILIES[family], pairs)
    assert torch.equal(unpack(packed, cols, *FAMILIES[family], pairs), cut)


@family
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_products_of_unpacked_codes_are_the_definitions(bits, family, device, make_weight):
    """Codes at rest, read again and multiplied, against every step's definition on the codes as they were."""
    g = torch.Generator().manual_seed(2)
    codes = torch.randint(-255, 256, (30, 40), generator=g).clamp(min=0).to(torch.uint8)
    cut = sparq_reference(codes, *FAMILIES[family], round=True, pairs=True)
    packed = torch.ops.qk.sparq_pack(torch.ops.qk.sparq(codes.to(device), *FAMILIES[family], True), *FAMILIES[family])
    x = unpack(packed, 40, *FAMILIES[family])
    step, zero = torch.tensor([0.02]), torch.zeros(1, dtype=torch.int32)
    w = make_weight((33, 40), bits, device)
    found = qk.ops.gemm(x, step.to(device), zero.to(device), w.prepacked, w.step, None, bits)
    assert torch.equal(found, gemm_reference(cut.to(device), step.to(device), zero.to(device), w.codes, w.zero, w.step))
    w = make_weight((17, 3, 3, 40), bits, device)
    image, expected = x.reshape(1, 5, 6, 40), cut.reshape(1, 5, 6, 40).to(device)
    found = qk.ops.conv2d(
        image, step.to(device), zero.to(device), w.prepacked, w.step, None, bits, (3, 3), padding=(1, 1)
    )
    inputs = expected, step.to(device), zero.to(device), w.codes, w.zero, w.step
    assert torch.equal(found, conv2d_reference(*inputs, padding=(1, 1)))


def test_any_strides_work(device):
    packed = problem(64, 100, "6opt", True, device)
    seen = packed.t()[:, :26]
    assert torch.equal(unpack(seen, 32, 3), reference(seen.contiguous(), 32, 3))


@pairs_or_not
def test_registration(pairs, device):
    torch.library.opcheck(unpack.default, (problem(5, 67, "7opt", pairs, device), 67, 2, 1, pairs))


def test_bad_input_is_named():
    packed = torch.zeros(4, 30, dtype=torch.uint8)
    for args, message in [
        ((packed.int(), 32, 4), r"qk::sparq_unpack: packed must be Byte, got Int \[4, 30\]"),
        ((packed[0], 32, 4), r"packed must be \[rows, row_bytes\], got Byte \[30\]"),
        ((packed, 32, 5), "bits must be 2, 3 or 4, got 5"),
        ((packed, 32, 2, 2), "stride must be 1, or with 4 bits 1, 2 or 4, got 2"),
        ((packed, 33, 4), "cols must be the length of rows that pack into 30 bytes, got 33"),
        ((packed, 16, 4), "cols must be the length of rows that pack into 30 bytes, got 16"),
        ((packed, -1, 4), "cols must be the length"),
        ((packed, 2**62, 4), "cols must be the length"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.sparq_unpack(*args)
