import pytest
import torch

import qk
from qk.ops.lsq import grad_scale_for, reference, reference_backward

SHAPES = [(5, 67), (1, 1), (3, 0), (2, 20011), (64, 9)]  # miss every vector width; 20011 makes three chunks
LANE_TERMS = 8192 / 16 + 16  # additions that one term of a chunk goes through, then chunks are added in float64


def problem(shape, bits, device="cpu", per_row=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = shape[0] if per_row else 1
    x = torch.randn(shape, generator=random)
    grad = torch.randn(shape, generator=random)
    step = 0.05 + torch.rand(rows, generator=random)
    zero = torch.randint(0, 2**bits, (rows,), generator=random, dtype=torch.int32)
    return [t.to(device) for t in (x, step, zero, grad)]


def close_sum(got, want, terms):
    """want is a float64 sum of terms [rows, n]; each float32 addition may be wrong by half an ulp of what it has."""
    bound = LANE_TERMS * 2.0**-24 * terms.double().abs().sum(1) + 1e-30
    return bool(((got.double() - want.double()).abs() <= bound).all())


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("per_row", [True, False])
def test_forward_equals_the_definition(bits, per_row, device):
    for shape in SHAPES:
        x, step, zero, _ = problem(shape, bits, device, per_row)
        assert torch.equal(qk.ops.lsq(x, step, zero, bits), reference(x, step, zero, bits)), shape


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("boundary", ["paper", "torch"])
def test_gradients_equal_the_definition(bits, boundary, device):
    for shape in SHAPES:
        x, step, zero, grad = problem(shape, bits, device)
        x.requires_grad_()
        step.requires_grad_()
        out = qk.ops.lsq(x, step, zero, bits, 0.5, boundary)
        grad_x, grad_step = torch.autograd.grad(out, (x, step), grad)
        x, step = x.detach(), step.detach()
        want_x, want_step = reference_backward(grad, x, step, zero, bits, 0.5, boundary)
        assert torch.equal(grad_x, want_x), shape
        assert close_sum(grad_step, want_step, grad * 2**bits), shape


def test_ties_infinities_and_nan_go_where_the_definition_says(device):
    half_steps = torch.arange(-40, 41, dtype=torch.float32) / 2  # every tie and every limit of 4 bits at zero 5
    x = torch.cat([half_steps, torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30, -1e30, 0.0, -0.0])]).to(device)
    step, zero = torch.ones(1, device=device), torch.full((1,), 5, dtype=torch.int32, device=device)
    assert torch.equal(qk.ops.lsq(x, step, zero, 4), reference(x, step, zero, 4))
    grad = torch.ones_like(x)
    for boundary in ("paper", "torch"):
        finite = x.isfinite()
        got = torch.ops.qk.lsq_backward(grad, x, step, zero, 4, 1.0, boundary)
        want = reference_backward(grad, x, step, zero, 4, 1.0, boundary)
        assert torch.equal(got[0], want[0]), boundary
        got = torch.ops.qk.lsq_backward(grad[finite], x[finite], step, zero, 4, 1.0, boundary)
        want = reference_backward(grad[finite], x[finite], step, zero, 4, 1.0, boundary)
        assert torch.equal(got[1], want[1]), boundary  # small multiples of 1/2: exact in any order


# The worked numbers follow from the paper's section 2.1 by hand.
SIGNED = {"x": [-1.5, -0.6, -0.2, 0.1, 0.3, 0.9], "zero": 2, "out": [-1, -0.5, 0, 0, 0.5, 0.5], "top": 1}
UNSIGNED = {"x": [0, 0.05, 0.26, 0.74, 0.76, 1.9], "zero": 0, "out": [0, 0, 0.5, 0.5, 1, 1.5], "top": 3}


UPSTREAM = [0.5, 0.1, 0.2, -0.1, 0.2, -0.4]


@pytest.mark.parametrize(
    ("case", "boundary", "slopes", "passes", "total", "grad_step"),
    [
        (SIGNED, "paper", [-2, 0.2, 0.4, -0.2, 0.4, 1], [0, 1, 1, 1, 1, 0], -0.2, -0.08164966),
        (SIGNED, "torch", [-2, 0.2, 0.4, -0.2, 0.4, 1], [0, 1, 1, 1, 1, 0], -0.2, -0.08164966),
        (UNSIGNED, "paper", [0, -0.1, 0.48, -0.48, 0.48, 3], [0, 1, 1, 1, 1, 0], 3.38, 0.79667364),
        (UNSIGNED, "torch", [0, -0.1, 0.48, -0.48, 0.48, 3], [1, 1, 1, 1, 1, 0], 3.38, 0.79667364),
    ],
)
def test_worked_numbers_of_the_paper(case, boundary, slopes, passes, total, grad_step, device):
    x = torch.tensor(case["x"], dtype=torch.float32, device=device)
    step = torch.tensor([0.5], device=device)
    zero = torch.tensor([case["zero"]], dtype=torch.int32, device=device)
    assert qk.ops.lsq(x, step, zero, 2).tolist() == case["out"]
    ones = torch.ones_like(x)
    scale = grad_scale_for(x.numel(), case["top"])
    got_x, got_step = torch.ops.qk.lsq_backward(ones, x, step, zero, 2, scale, boundary)
    assert got_x.tolist() == passes
    assert got_step.item() == pytest.approx(grad_step, rel=1e-6)
    plain = torch.ops.qk.lsq_backward(ones, x, step, zero, 2, 1.0, boundary)[1]
    assert plain.item() == pytest.approx(total, rel=2e-6)  # six sums of numbers up to 3.4, each half an ulp off
    for i, slope in enumerate(slopes):
        one = torch.ops.qk.lsq_backward(ones[:1], x[i : i + 1], step, zero, 2, 1.0, boundary)[1]
        assert one.item() == pytest.approx(slope, abs=1e-6)


def test_worked_numbers_with_gradients_from_above(device):
    x, above = torch.tensor(SIGNED["x"], device=device), torch.tensor(UPSTREAM, device=device)
    step, zero = torch.tensor([0.5], device=device), torch.tensor([2], dtype=torch.int32, device=device)
    got_x, got_step = torch.ops.qk.lsq_backward(above, x, step, zero, 2, 1.0, "paper")
    assert got_x.tolist() == pytest.approx([0, 0.1, 0.2, -0.1, 0.2, 0])
    assert got_step.item() == pytest.approx(-1.2, rel=2e-6)


def test_step_gradient_of_the_papers_own_error(device):
    x = torch.tensor(SIGNED["x"], device=device)
    step, zero = torch.tensor([0.5], device=device), torch.tensor([2], dtype=torch.int32, device=device)
    error = qk.ops.lsq(x, step, zero, 2) - x
    got = torch.ops.qk.lsq_backward(error, x, step, zero, 2, grad_scale_for(6, 1), "paper")[1]
    assert got.item() == pytest.approx(-0.48989795, rel=1e-6)


def test_ties_go_to_even(device):
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5], device=device)
    step, zero = torch.ones(1, device=device), torch.full((1,), 8, dtype=torch.int32, device=device)
    assert qk.ops.lsq(x, step, zero, 4).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize(
    ("x", "boundary", "slope", "passes"),
    [
        (0.65, "paper", 1, 0),
        (0.65, "torch", -0.3, 1),
        (0.5, "paper", 1, 0),
        (0.5, "torch", 0, 1),
        (-1.0, "paper", -2, 0),
        (-1.0, "torch", 0, 1),
    ],
)
def test_the_two_boundaries_differ_where_rounding_leaves_the_limits(x, boundary, slope, passes, device):
    one, step = torch.ones(1, device=device), torch.tensor([0.5], device=device)
    zero = torch.tensor([2], dtype=torch.int32, device=device)
    got = torch.ops.qk.lsq_backward(one, one * x, step, zero, 2, 1.0, boundary)
    assert got[0].item() == passes
    assert got[1].item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_boundary_torch_is_torchs_own_learnable_fake_quantize(bits, device):
    if device.type == "cuda":
        pytest.skip("cuda: torch divides there where the CPU multiplies with the reciprocal")
    x, step, _, grad = problem((5, 1003), bits, device, per_row=False)
    zero = torch.full((1,), 2 ** (bits - 1), dtype=torch.int32)
    x.requires_grad_()
    step.requires_grad_()
    top = 2**bits - 1
    theirs = torch._fake_quantize_learnable_per_tensor_affine(x, step, zero.float(), 0, top, 1.0)
    ours = qk.ops.lsq(x, step, zero, bits, boundary="torch")
    assert torch.equal(ours, theirs)
    got, want = (torch.autograd.grad(out, (x, step), grad) for out in (ours, theirs))
    assert torch.equal(got[0], want[0])
    assert close_sum(got[1], want[1], 2 * (grad * top).reshape(1, -1))  # theirs is a float32 sum, too


def test_groups_are_rows(device):
    x, step, zero, _ = problem((6 * 4, 16), 4, device)
    grouped = qk.ops.lsq(x.reshape(6, 64), step.reshape(6, 4), zero.reshape(6, 4), 4)
    assert torch.equal(grouped, qk.ops.lsq(x, step, zero, 4).reshape(6, 64))


def test_strides_do_not_matter(device):
    x, step, zero, grad = problem((5, 67), 4, device)
    turned, grad_turned = x.t().contiguous().t(), grad.t().contiguous().t()
    out = qk.ops.lsq(turned, step, zero, 4)
    assert out.is_contiguous()
    assert torch.equal(out, qk.ops.lsq(x, step, zero, 4))
    got = torch.ops.qk.lsq_backward(grad_turned, turned, step, zero, 4, 1.0, "paper")
    want = torch.ops.qk.lsq_backward(grad, x, step, zero, 4, 1.0, "paper")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_threads_and_instruction_sets_change_no_bit(each_isa_and_threads):
    x, step, zero, grad = problem((3, 100_003), 4)
    each_isa_and_threads(
        lambda: (qk.ops.lsq(x, step, zero, 4), *torch.ops.qk.lsq_backward(grad, x, step, zero, 4, 1.0, "paper"))
    )


@pytest.mark.parametrize("boundary", ["paper", "torch"])
def test_registration(boundary, device):
    x, step, zero, _ = problem((5, 67), 4, device)
    args = (x.requires_grad_(), step.requires_grad_(), zero, 4, 0.5, boundary)
    torch.library.opcheck(torch.ops.qk.lsq.default, args)
    x, step, zero, grad = problem((5, 67), 4, device)
    torch.library.opcheck(torch.ops.qk.lsq_backward.default, (grad, x, step, zero, 4, 0.5, boundary))


X, STEP, ZERO = torch.ones(5, 8), torch.ones(5), torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": X.double()}, r"qk::lsq: x must be float32, float16 or bfloat16, got Double \[5, 8\]"),
        ({"step": torch.ones(3)}, r"step must be one value, or one for each row of x .*, got Float \[3\] for x"),
        ({"step": STEP.double()}, r"step must be Float"),
        ({"step": STEP * 0}, r"step must be positive and finite, got 0.0+ at 0"),
        ({"step": STEP * torch.nan}, r"step must be positive and finite, got nan at 0"),
        ({"step": STEP * torch.inf}, r"step must be positive and finite, got inf at 0"),
        ({"zero": ZERO[:4]}, r"zero must be one value for each step, Float \[5\], got Int \[4\]"),
        ({"zero": ZERO.long()}, r"zero must be Int"),
        ({"zero": ZERO - 1}, r"zero must be a code from 0 to 15, got -1 at 0"),
        ({"zero": ZERO + 16}, r"zero must be a code from 0 to 15, got 16 at 0"),
        ({"bits": 1}, r"bits must be a width from 2 to 8, got 1"),
        ({"bits": 9}, r"bits must be a width from 2 to 8, got 9"),
        ({"boundary": "mine"}, r"boundary must be paper or torch, got mine"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(RuntimeError, match=message):
        qk.ops.lsq(**({"x": X, "step": STEP, "zero": ZERO, "bits": 4} | change))


@pytest.mark.parametrize("zero", [-(2**31), -1, 16, 2**31 - 1])
def test_zero_that_is_no_code_has_no_gradient(zero):
    with pytest.raises(RuntimeError, match=r"qk::lsq_backward: zero must be a code from 0 to 15"):
        torch.ops.qk.lsq_backward(X, X, STEP, torch.full_like(ZERO, zero), 4, 1.0, "paper")


def test_gradient_of_another_shape_is_refused():
    with pytest.raises(RuntimeError, match=r"qk::lsq_backward: grad must be of the shape of x"):
        torch.ops.qk.lsq_backward(X.t(), X, STEP, ZERO, 4, 1.0, "paper")
