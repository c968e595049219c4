import math

import pytest
import torch

import qk
from qk.ops.range_error import reference

SHAPES = [(5, 67), (1, 1), (3, 0), (2, 9001), (64, 9), (0, 4)]


def problem(shape, bits, candidates=7, device="cpu"):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=random)
    step = (0.05 + torch.rand(shape[0], candidates, generator=random)) * 2 / 2**bits
    zero = torch.randint(0, 2**bits, (shape[0], candidates), generator=random, dtype=torch.int32)
    return x.to(device), step.to(device), zero.to(device)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("power", [1.0, 2.0, 2.4, 0.5, 4.0])
def test_errors_are_the_definition(bits, power, device):
    for shape in SHAPES:
        x, step, zero = problem(shape, bits, device=device)
        got, want = qk.ops.range_error(x, step, zero, bits, power), reference(x, step, zero, bits, power)
        # A term's power within (4 + power * 24) 2^-23 for errors from 2^-24 to 2^24, 4096 / 16 additions of a lane.
        bound = (2 * (4 + power * 24) + 4096 / 16 + 16) * 2.0**-24
        assert ((got - want).abs() <= bound * want + 1e-30).all(), shape


@pytest.mark.parametrize("power", [0.4, 2.4, 3.0, 20.0])
def test_powers_stay_within_their_bound_of_float64(power, device):
    # With a step so large that every code is zero, the error of a row with one value is that value's power.
    a = torch.logspace(-5, 1, 200_001, dtype=torch.float64).float()
    x = torch.cat([a, -a, torch.tensor([0.0, 1.0, 2.0, 0.5])])[:, None].to(device)
    step, zero = torch.full_like(x, 1e30), torch.zeros_like(x, dtype=torch.int32)
    got = qk.ops.range_error(x, step, zero, 4, power).double()
    want = x.double().abs().pow(power)
    bound = (4 + power * x.double().abs().log2().abs().nan_to_num(0, 0, 0)) * 2.0**-23
    ok = ((got - want).abs() <= bound * want) | ((want < 2.0**-126) & (got < 2.0**-125)) | (want > 3e38)
    assert ok.all()


def test_worked_search_of_the_sheet(device):
    """The published search: both ends shrink by 1 % a time, power 2.4, the first of the smallest errors wins."""
    x = torch.tensor([[-0.9, -0.42, -0.2, -0.11, -0.03, 0.02, 0.07, 0.15, 0.24, 0.31, 0.5, 1.4]], device=device)
    found = {2: (14, 0.659333, 1, 0.01757870), 3: (3, 0.31871429, 3, 0.00385473), 4: (0, 0.15333333, 6, 0.00047730)}
    for bits, (best, step, zero, error) in found.items():
        shrink = 1 - 0.01 * torch.arange(80, device=device)
        low, high = -0.9 * shrink, 1.4 * shrink
        steps = (high - low) / (2**bits - 1)
        zeros = torch.round(-low / steps).int()
        got = qk.ops.range_error(x, steps[None], zeros[None], bits, 2.4)[0] / x.numel()
        assert got.argmin().item() == best
        assert steps[best].item() == pytest.approx(step, rel=1e-6)
        assert zeros[best].item() == zero
        assert got[best].item() == pytest.approx(error, abs=5e-9)


def test_nan_and_infinity_show(device):
    x = torch.tensor([[1.0, torch.nan, 2.0], [1.0, torch.inf, 2.0], [1.0, -torch.inf, 2.0], [1.0, 3e38, 2.0]])
    step, zero = torch.ones(4, 1, device=device), torch.zeros(4, 1, dtype=torch.int32, device=device)
    for power in (1.0, 2.0, 2.4):
        got = qk.ops.range_error(x.to(device), step, zero, 4, power)[:, 0]
        assert got.isnan().tolist() == [True, False, False, False]
        assert got[1:3].isinf().all()


def test_strides_do_not_matter(device):
    x, step, zero = problem((5, 67), 4, device=device)
    turned = [t.t().contiguous().t() for t in (x, step, zero)]
    assert torch.equal(qk.ops.range_error(*turned, 4, 2.4), qk.ops.range_error(x, step, zero, 4, 2.4))


def test_no_candidates_give_no_errors(device):
    x, step, zero = problem((5, 67), 4, candidates=0, device=device)
    assert qk.ops.range_error(x, step, zero, 4).shape == (5, 0)


@pytest.mark.parametrize("power", [1.0, 2.0, 2.4])
def test_threads_and_instruction_sets_change_no_bit(power, each_isa_and_threads):
    x, step, zero = problem((3, 50_003), 4)
    each_isa_and_threads(lambda: (qk.ops.range_error(x, step, zero, 4, power),))


def test_registration(device):
    torch.library.opcheck(torch.ops.qk.range_error.default, (*problem((5, 67), 4, device=device), 4, 2.4))


X, STEP, ZERO = torch.ones(5, 8), torch.ones(5, 3), torch.zeros(5, 3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.double()}, r"qk::range_error: x must be float32, float16 or bfloat16, got Double \[5, 8\]"),
        ({"x": X[0]}, r"x must be \[rows, cols\], got Float \[8\]. Reshape a tensor with one range to \[1, -1\]"),
        ({"step": STEP[:4]}, r"step must be \[rows of x, candidates\], got Float \[4, 3\]"),
        ({"step": STEP - 1}, r"step must be positive and finite"),
        ({"zero": ZERO[:, :2]}, r"zero must be of the shape of step, Float \[5, 3\], got Int \[5, 2\]"),
        ({"zero": ZERO - 1}, r"zero must be a code from 0 to 15, got -1 at 0"),
        ({"bits": 1}, r"bits must be a width from 2 to 8, got 1"),
        ({"power": 0.0}, r"power must be positive and finite in float32, got 0"),
        ({"power": math.nan}, r"power must be positive and finite in float32, got nan"),
        ({"power": 1e39}, r"power must be positive and finite in float32, got 1e\+39"),
        ({"power": 1e-50}, r"power must be positive and finite in float32, got 1e-50"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(RuntimeError, match=message):
        qk.ops.range_error(**({"x": X, "step": STEP, "zero": ZERO, "bits": 4, "power": 2.0} | change))
