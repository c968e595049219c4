"""SPARQ values at rest: worked bytes, and every kernel against the definition."""

import pytest
import torch

import qk
from qk.methods.sparq import stored_bits
from qk.ops.sparq import FAMILIES
from qk.ops.sparq_pack import reference, row_bytes
from qk.ops.sparq_unpack import reference as unpack_reference
from qk.options import Sparq

pack = torch.ops.qk.sparq_pack
family = pytest.mark.parametrize("family", FAMILIES)
pairs_or_not = pytest.mark.parametrize("pairs", [True, False])


def cut(shape, family, pairs, device, round=True, seed=0):
    """Window values; half of the codes were 0."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-255, 256, shape, generator=g).clamp(min=0).to(torch.uint8).to(device)
    return torch.ops.qk.sparq(codes, *FAMILIES[family], round, pairs)


def test_the_worked_bytes(device):
    """15 at shift 0 and 15 at shift 4; 27 beside a 0: its 8 bits, of the first; a 0 beside 171: of the second."""
    codes = torch.tensor([[15, 240, 27, 0, 0, 171, 0, 0]], dtype=torch.uint8, device=device)
    windows = [0xFF, 0x1B, 0xAB, 0, 0, 0, 0, 0]
    shifts = 4 << 3 | 0 << 6 | 0 << 9 | 0 << 12 | 1 << 15
    assert pack(codes, 4, 1, True).tolist() == [[*windows, *shifts.to_bytes(6, "little"), 0b0110]]
    # 3 bits: 7 << 5 and 6 << 5; 27 beside a 0 is 27 << 0 in 6 bits: 3 and 3; 180 is 45 << 2: 5 and 5, of the second.
    codes = torch.tensor([[224, 192, 27, 0, 0, 180]], dtype=torch.uint8, device=device)
    windows = 7 | 6 << 3 | 3 << 6 | 3 << 9 | 5 << 12 | 5 << 15
    shifts = 5 | 5 << 3 | 0 << 6 | 0 << 9 | 2 << 12 | 1 << 15
    expected = [*windows.to_bytes(6, "little"), *shifts.to_bytes(6, "little"), 0b110]
    assert pack(codes, 3, 1, True).tolist() == [expected]


@family
@pairs_or_not
def test_every_pair_of_window_values_comes_back(family, pairs, device):
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    codes = torch.ops.qk.sparq(torch.cartesian_prod(byte, byte), *FAMILIES[family], True, pairs).reshape(256, -1)
    packed = pack(codes, *FAMILIES[family], pairs)
    assert torch.equal(packed, reference(codes, *FAMILIES[family], pairs))
    assert torch.equal(unpack_reference(packed, codes.shape[1], *FAMILIES[family], pairs), codes)
    assert packed.numel() * 8 == codes.numel() * stored_bits(Sparq(family, pairs="channels" if pairs else "none"))


@family
@pairs_or_not
@pytest.mark.parametrize("shape", [(1, 1), (5, 67), (3, 64), (2, 4097), (70, 9), (0, 7), (7, 0), (2, 16)])
def test_any_shape_equals_the_definition(shape, family, pairs, device):
    codes = cut(shape, family, pairs, device, round=False)
    packed = pack(codes, *FAMILIES[family], pairs)
    assert packed.shape == (shape[0], row_bytes(shape[1], *FAMILIES[family], pairs))
    assert torch.equal(packed, reference(codes, *FAMILIES[family], pairs))


def test_any_strides_work(device):
    codes = cut((64, 100), "5opt", False, device)
    for seen in (codes.t(), codes[:, ::2], codes[1:, 1:]):
        assert torch.equal(pack(seen, 4, 1, False), reference(seen, 4, 1, False))


@pairs_or_not
def test_registration(pairs, device):
    torch.library.opcheck(pack.default, (cut((5, 67), "3opt", pairs, device), 4, 2, pairs))


def test_values_of_another_window_are_refused():
    """Not on CUDA, where a check would wait for the device."""
    codes = torch.zeros(3, 40, dtype=torch.uint8)
    codes[1, 36:38] = torch.tensor([17, 1], dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="sparq_pack: codes must be values of the windows, got another one in row 1"):
        pack(codes, 4, 1, True)
    codes[1, 37] = 0  # alone in its pair 17 has 8 bits
    assert torch.equal(unpack_reference(pack(codes, 4, 1, True), 40, 4), codes)
    with pytest.raises(RuntimeError, match="in row 1"):
        pack(codes, 4, 1, False)
    with pytest.raises(RuntimeError, match="in row 1"):
        pack(torch.where(codes > 0, 65, 0).to(torch.uint8), 3, 1, True)  # 7 significant bits of 6


def test_bad_input_is_named():
    codes = torch.zeros(4, 16, dtype=torch.uint8)
    for args, message in [
        ((codes.int(), 4), r"qk::sparq_pack: codes must be Byte, got Int \[4, 16\]"),
        ((codes[0], 4), r"codes must be \[rows, cols\], got Byte \[16\]"),
        ((codes, 5), "bits must be 2, 3 or 4, got 5"),
        ((codes, 3, 2), "stride must be 1, or with 4 bits 1, 2 or 4, got 2"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.sparq_pack(*args)


@pytest.mark.parametrize(("bits", "stride"), [(4, 0), (4, 3), (3, 2), (5, 1), (0, 1)])
def test_where_no_kernel_runs_other_families_are_refused_too(bits, stride):
    codes = torch.zeros(4, 16, dtype=torch.uint8, device="meta")
    ops = {"sparq": (codes, bits, stride), "sparq_pack": (codes, bits, stride)}
    for name, args in (ops | {"sparq_unpack": (codes, 16, bits, stride)}).items():
        with pytest.raises(RuntimeError, match=rf"qk::{name}: bits and stride must be .*, got {bits} and {stride}"):
            getattr(torch.ops.qk, name)(*args)
