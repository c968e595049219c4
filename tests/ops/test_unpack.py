"""Packed bytes back to codes."""

import pytest
import torch

import qk
from qk.ops.pack import row_bytes
from qk.ops.unpack import reference

unpack = torch.ops.qk.unpack
WIDTHS = [2, 4, 8]


def problem(rows, cols, bits, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (rows, row_bytes(cols, bits)), generator=g, dtype=torch.uint8).to(device)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(1, 1), (5, 67), (3, 64), (2, 65537), (700, 9), (0, 7), (7, 0), (2, 127)])
def test_codes_equal_the_definition_whatever_the_padding_holds(shape, bits, device):
    packed = problem(*shape, bits, device)
    assert torch.equal(unpack(packed, bits, shape[1]), reference(packed, bits, shape[1]))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("cols", [1, 2, 3, 4, 5, 63, 64, 65, 1001])
def test_it_undoes_pack(bits, cols, device):
    g = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 2**bits, (3, cols), generator=g, dtype=torch.uint8).to(device)
    assert torch.equal(unpack(torch.ops.qk.pack(codes, bits), bits, cols), codes)


def test_any_strides_work(device):
    packed = problem(64, 100, 4, device)
    seen = packed.t()[:, ::2]
    assert torch.equal(unpack(seen, 4, 64), reference(seen, 4, 64))


@pytest.mark.parametrize("bits", WIDTHS)
def test_registration(bits, device):
    torch.library.opcheck(unpack.default, (problem(5, 67, bits, device), bits, 67))


def test_bad_input_is_named():
    packed = torch.ones(4, 16, dtype=torch.uint8)
    for args, message in [
        ((packed.int(), 4, 32), r"qk::unpack: packed must be Byte, got Int \[4, 16\]"),
        ((packed[0], 4, 32), r"packed must be \[rows, row_bytes\], got Byte \[16\]"),
        ((packed, 3, 32), "bits must be 2, 4 or 8, got 3"),
        ((packed, 4, 33), "cols must be the length of rows that pack into 16 bytes, got 33"),
        ((packed, 4, 0), "cols must be the length of rows that pack into 16 bytes, got 0"),
        ((packed, 4, -1), "cols must be the length"),
        ((packed, 4, 2**62), "cols must be the length"),
        ((packed[:, :15], 4, 30), "cols must be the length of rows that pack into 15 bytes"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.unpack(*args)
