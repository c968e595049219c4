"""Float to codes: every kernel gives the definition's integers."""

import pytest
import torch

import qk
from qk.ops.quantize import reference

quantize = torch.ops.qk.quantize


def problem(shape, bits, device, rows=1, seed=0):
    """Values that reach past both ends of the range, with ties among them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g) * 2**bits / 3
    step = 0.5 + torch.rand(rows, generator=g) if rows > 1 else torch.tensor([0.5])
    zero = torch.randint(0, 2**bits, (rows,), generator=g, dtype=torch.int32)
    if x.numel() > 3:
        x.view(-1)[:3] = torch.tensor([0.25, -0.25, 0.75])
    return x.to(device), step.to(device), zero.to(device)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    ("shape", "rows"),
    [((1,), 1), ((5, 67), 5), ((3, 5, 7), 3), ((4, 66), 12), ((2, 16385), 2), ((100_003,), 1), ((7, 0), 7), ((), 1)],
)
def test_codes_equal_the_definition(shape, rows, bits, device):
    args = (*problem(shape, bits, device, rows), bits)
    assert torch.equal(quantize(*args), reference(*args))


def test_ties_go_to_the_even_integer_before_zero_is_added(device):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 3.5], device=device)
    one, zero = torch.ones(1, device=device), torch.tensor([3], dtype=torch.int32, device=device)
    assert quantize(x, one, zero, 4).tolist() == [3, 5, 5, 3, 1, 7]


def test_nan_gives_zero_and_infinity_the_ends(device):
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 3e38, -3e38] * 9, device=device)
    step, zero = torch.tensor([1e-3], device=device), torch.tensor([5], dtype=torch.int32, device=device)
    assert quantize(x, step, zero, 4).tolist() == [5, 15, 0, 15, 0] * 9


def test_a_step_without_a_finite_reciprocal_follows_the_definition(device):
    x = torch.tensor([0.0, 1e-45, -1e-45, 1.0], device=device)
    step, zero = torch.tensor([1e-45], device=device), torch.tensor([2], dtype=torch.int32, device=device)
    assert torch.equal(quantize(x, step, zero, 4), reference(x, step, zero, 4))


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (1, 16, 8, 8), (2, 17, 13, 13), (3, 64, 7, 7), (1, 1, 9, 9), (2, 35, 1, 70)]
)
@pytest.mark.parametrize("bits", [2, 8])
def test_an_nchw_tensor_seen_as_nhwc_gives_nhwc_codes(shape, bits, device):
    x, step, zero = problem(shape, bits, device)
    seen = x.permute(0, 2, 3, 1)
    codes = quantize(seen, step, zero, bits)
    assert codes.is_contiguous()
    assert torch.equal(codes, reference(seen.contiguous(), step, zero, bits))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2],
        lambda x: x.transpose(1, 3),
        lambda x: x.permute(3, 0, 2, 1),
        lambda x: x[1:, :, 1:],
        lambda x: x[:, :1, :1, :1].expand(4, 6, 8, 10),
        lambda x: x.permute(0, 2, 3, 1)[:, ::2],
        lambda x: x.to(memory_format=torch.channels_last),
    ],
)
def test_any_strides_work(view, device):
    x, step, zero = problem((4, 6, 8, 10), 8, device)
    codes = quantize(view(x), step, zero, 8)
    assert codes.is_contiguous()
    assert torch.equal(codes, reference(view(x), step, zero, 8))


def test_instruction_sets_and_threads_do_not_change_a_code(each_isa_and_threads):
    args = (*problem((3, 40_001), 4, "cpu", rows=3), 4)
    seen = problem((2, 33, 50, 50), 8, "cpu")[0].permute(0, 2, 3, 1)
    each_isa_and_threads(lambda: (quantize(*args), quantize(seen, args[1][:1], args[2][:1], 8)))


@pytest.mark.parametrize(("rows", "shape"), [(1, (5, 67)), (5, (5, 67)), (1, (0, 3))])
def test_registration(rows, shape, device):
    torch.library.opcheck(quantize.default, (*problem(shape, 4, device, rows), 4))


def test_bad_input_is_named():
    x, step, zero = torch.ones(4, 6), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    for args, message in [
        ((x.double(), step, zero, 4), r"qk::quantize: x must be Float, got Double \[4, 6\]"),
        ((x, step.double(), zero, 4), "step must be Float"),
        ((x, step, zero.long(), 4), "zero must be Int"),
        ((x, torch.ones(5), zero, 4), "step must be one value, or one for each row"),
        ((x, torch.ones(0), zero, 4), "step must be one value, or one for each row"),
        ((x, torch.ones(4), zero, 4), "zero must be one value for each step"),
        ((x, torch.tensor([0.0]), zero, 4), "step must be positive and finite"),
        ((x, torch.tensor([float("nan")]), zero, 4), "step must be positive and finite"),
        ((x, step, zero + 16, 4), "zero must be a code from 0 to 15, got 16 at 0"),
        ((x, step, zero, 1), "bits must be a width from 2 to 8, got 1"),
        ((x, step, zero, 9), "bits must be a width from 2 to 8, got 9"),
        ((x, step.to("meta"), zero, 4), "tensors must be on one device, got cpu, meta"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.quantize(*args)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16, 19])
def test_images_become_nhwc(channels, device):
    x = torch.randn(2, channels, 17, 19, generator=torch.Generator().manual_seed(0)).to(device)
    step, zero = torch.tensor([0.03], device=device), torch.tensor([70], dtype=torch.int32, device=device)
    seen = x.permute(0, 2, 3, 1)
    assert torch.equal(torch.ops.qk.quantize(seen, step, zero, 8), reference(seen, step, zero, 8))
