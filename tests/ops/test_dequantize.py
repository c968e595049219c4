"""Codes to float: equal to the definition, bit for bit."""

import pytest
import torch

import qk
from qk.ops.dequantize import reference

dequantize = torch.ops.qk.dequantize


def problem(shape, device, rows=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    step = 0.01 + torch.rand(rows, generator=g)
    zero = torch.randint(0, 256, (rows,), generator=g, dtype=torch.int32)
    return codes.to(device), step.to(device), zero.to(device)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1,), 1), ((5, 67), 5), ((3, 5, 7), 3), ((4, 66), 12), ((2, 16385), 2), ((100_003,), 1), ((7, 0), 7), ((), 1)],
)
def test_values_equal_the_definition(shape, rows, device):
    args = problem(shape, device, rows)
    assert torch.equal(dequantize(*args), reference(*args))


@pytest.mark.parametrize("bits", range(2, 9))
def test_quantizing_a_value_again_gives_its_code(bits, device):
    codes, _, zero = problem((3, 1000), device, rows=3)
    top = 2**bits - 1
    codes, zero = codes & top, zero & top
    step = torch.tensor([0.3, 1e-6, 7e5], device=device)
    assert torch.equal(torch.ops.qk.quantize(dequantize(codes, step, zero), step, zero, bits), codes)


def test_any_strides_work(device):
    codes, step, zero = problem((4, 6, 8, 10), device)
    for seen in (codes.permute(0, 2, 3, 1), codes[:, ::2], codes[:1].expand(3, 6, 8, 10)):
        out = dequantize(seen, step, zero)
        assert out.is_contiguous()
        assert torch.equal(out, reference(seen, step, zero))


@pytest.mark.parametrize("channels", [1, 3, 16, 19, 64, 70])
@pytest.mark.parametrize("image", [(1, 1), (4, 4), (9, 15), (8, 16)])
def test_nhwc_codes_become_nchw_values(channels, image, device):
    codes, step, zero = problem((2, *image, channels), device)
    seen = codes.permute(0, 3, 1, 2)
    out = dequantize(seen, step, zero)
    assert out.is_contiguous()
    assert torch.equal(out, reference(seen, step, zero))


def test_registration(device):
    torch.library.opcheck(dequantize.default, problem((5, 67), device, rows=5))


def test_bad_input_is_named():
    codes, step, zero = torch.ones(4, 6, dtype=torch.uint8), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for args, message in [
        ((codes.int(), step, zero), r"qk::dequantize: codes must be Byte, got Int \[4, 6\]"),
        ((codes, torch.ones(5), zero), "step must be one value, or one for each row"),
        ((codes, torch.tensor([-1.0]), zero), "step must be positive and finite"),
        ((codes, step, zero + 256), "zero must be a code from 0 to 255, got 256 at 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.dequantize(*args)
