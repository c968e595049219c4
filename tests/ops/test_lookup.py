"""Codes through a table."""

import pytest
import torch

import qk
from qk.ops.lookup import reference

lookup = torch.ops.qk.lookup
SHAPES = [(1,), (31,), (64,), (65,), (2, 3, 5, 67), (100_003,), (7, 0), ()]


def problem(shape, dtype, device):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    table = torch.randint(0, 256, (256,), generator=g).to(dtype) if dtype == torch.uint8 else torch.randn(256)
    return codes.to(device), table.to(device)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_entries_equal_the_definition(shape, dtype, device):
    args = problem(shape, dtype, device)
    assert torch.equal(lookup(*args), reference(*args))


def test_every_code_finds_its_own_entry(device):
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    for shift in (1, 77, 128):
        assert torch.equal(lookup(codes.roll(shift), codes), codes.roll(shift))
        assert torch.equal(lookup(codes, codes.roll(shift)), codes.roll(shift))


def test_any_strides_work(device):
    codes, table = problem((4, 6, 8, 10), torch.uint8, device)
    seen = codes.permute(0, 2, 3, 1)[:, ::2]
    assert torch.equal(lookup(seen, table.flip(0)), reference(seen, table.flip(0)))
    spread = table.repeat_interleave(2)[::2]
    assert torch.equal(lookup(seen, spread), reference(seen, spread))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_registration(dtype, device):
    torch.library.opcheck(lookup.default, problem((5, 67), dtype, device))


def test_bad_input_is_named():
    codes, table = problem((2, 3), torch.uint8, torch.device("cpu"))
    for args, message in [
        ((codes.int(), table), r"qk::lookup: codes must be Byte, got Int \[2, 3\]"),
        ((codes, table.int()), r"table must be uint8 or float32 \[256\], got Int \[256\]"),
        ((codes, table[:255]), r"table must be uint8 or float32 \[256\], got Byte \[255\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.lookup(*args)
