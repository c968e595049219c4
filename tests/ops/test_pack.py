"""Codes to packed bytes, the format at rest."""

import pytest
import torch

import qk
from qk.ops.pack import reference, row_bytes

pack = torch.ops.qk.pack
WIDTHS = [2, 4, 8]


def problem(shape, bits, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=g, dtype=torch.uint8).to(device)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 67), (3, 64), (2, 65537), (700, 9), (0, 7), (7, 0), (2, 127)])
def test_bytes_equal_the_definition(shape, bits, device):
    codes = problem(shape, bits, device)
    packed = pack(codes, bits)
    assert packed.shape == (shape[0], row_bytes(shape[1], bits))
    assert packed.shape[1] % 16 == 0
    assert torch.equal(packed, reference(codes, bits))


def test_the_first_value_has_the_lowest_bits_and_padding_is_zero(device):
    codes = torch.tensor([[1, 2, 3, 0, 3]], dtype=torch.uint8, device=device)
    assert pack(codes, 2).tolist() == [[0b00_11_10_01, 0b11] + 14 * [0]]
    assert pack(codes, 4).tolist() == [[0x21, 0x03, 0x03] + 13 * [0]]
    assert pack(codes, 8).tolist() == [[1, 2, 3, 0, 3] + 11 * [0]]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("col", [0, 33, 66])
def test_a_code_that_does_not_fit_is_refused_with_its_place(bits, col):
    for isa in qk.usable_isas():
        qk.force_isa(isa)
        codes = problem((5, 67), bits, "cpu")
        codes[3, col] = 2**bits
        message = rf"qk::pack: codes must be at most {2**bits - 1} to fit {bits} bits, got {2**bits} at \[3, {col}\]"
        with pytest.raises(RuntimeError, match=message):
            pack(codes, bits)
    qk.force_isa("")


@pytest.mark.parametrize("cols", [2**31, 2**61, 2**62])
def test_rows_that_are_not_there_may_have_any_length(cols):
    packed = pack(torch.empty(0, cols, dtype=torch.uint8), 4)
    assert packed.shape == (0, cols // 2)
    assert qk.ops.unpack(packed, 4, cols).shape == (0, cols)


def test_any_strides_work(device):
    codes = problem((40, 66), 4, device)
    for seen in (codes.t(), codes[:, ::2], codes[1:, 1:], codes[:1].expand(5, 66)):
        assert torch.equal(pack(seen, 4), reference(seen, 4))


@pytest.mark.parametrize("bits", WIDTHS)
def test_registration(bits, device):
    torch.library.opcheck(pack.default, (problem((5, 67), bits, device), bits))


def test_bad_input_is_named():
    codes = torch.ones(4, 6, dtype=torch.uint8)
    for args, message in [
        ((codes.int(), 4), r"qk::pack: codes must be Byte, got Int \[4, 6\]"),
        ((codes[0], 4), r"qk::pack: codes must be \[rows, cols\], got Byte \[6\]"),
        ((codes, 3), "bits must be 2, 4 or 8, got 3. 3-bit codes are stored in 4"),
        ((codes, 0), "bits must be 2, 4 or 8, got 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.pack(*args)
