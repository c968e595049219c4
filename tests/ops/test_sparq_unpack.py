"""SPARQ values at rest back to codes."""

import pytest
import torch

import qk
from qk.ops.sparq import FAMILIES
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
