import pytest
import torch

import qk
from qk.ops.soft_round import fraction, penalty_slope, reference, reference_backward, start

SHAPES = [(5, 67), (1, 1), (3, 0), (2, 20011), (64, 9)]
# h: the kernel's polynomial and the definition's float32 sigmoid are each within 2^-23 of the real one.
H_ERROR = 2.0**-22


def problem(shape, bits, device="cpu", per_row=True, seed=0):
    random = torch.Generator().manual_seed(seed)
    rows = shape[0] if per_row else 1
    weight, v, grad = (torch.randn(shape, generator=random) * scale for scale in (1, 2, 1))
    step = 0.05 + torch.rand(rows, generator=random)
    zero = torch.randint(0, 2**bits, (rows,), generator=random, dtype=torch.int32)
    return [t.to(device) for t in (weight, v, step, zero, grad)]


def one_value(v, device, step=1.0):
    """Arguments for which the result is step * h(v)."""
    v = torch.as_tensor(v, dtype=torch.float32, device=device)
    steps = torch.tensor([step], device=device)
    return torch.zeros_like(v), v, steps, torch.zeros(1, dtype=torch.int32, device=device), 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_row", [True, False])
def test_forward_is_the_definition(bits, per_row, device):
    for shape in SHAPES:
        weight, v, step, zero, _ = problem(shape, bits, device, per_row)
        got, want = qk.ops.soft_round(weight, v, step, zero, bits), reference(weight, v, step, zero, bits)
        # floor + h is rounded at the size of a code, twice in all: in either result once.
        bound = step.reshape(-1, 1) * (H_ERROR + 2 * 2**bits * 2.0**-24)
        assert ((got - want).abs().reshape(step.numel(), -1) <= bound).all(), shape


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_gradient_is_the_definition(bits, device):
    for shape in SHAPES:
        weight, v, step, zero, grad = problem(shape, bits, device)
        v.requires_grad_()
        (got,) = torch.autograd.grad(qk.ops.soft_round(weight, v, step, zero, bits), v, grad)
        want = reference_backward(grad, weight, v.detach(), step, zero, bits)
        # Where a clamp begins, the last bit of h decides whether the gradient passes: either is right there.
        sigmoid = torch.sigmoid(v.detach())
        h, slope = 1.2 * sigmoid - 0.1, 1.2 * sigmoid * (1 - sigmoid)
        code = torch.floor(weight / step.reshape(-1, 1)) + h + zero.reshape(-1, 1)
        edges = torch.stack([h, h - 1, code, code - (2**bits - 1)]).abs().amin(0) < H_ERROR + 2**bits * 2.0**-23
        passed = grad * step.reshape(-1, 1) * slope
        bound = 4 * H_ERROR * (grad * step.reshape(-1, 1)).abs()
        assert (((got - want).abs() <= bound) | (edges & ((got == 0) | ((got - passed).abs() <= bound)))).all(), shape
        assert edges.sum() <= 1 + 0.01 * edges.numel()


@pytest.mark.parametrize("beta", [1.0, 2.0, 15.5])
def test_with_the_penalty_it_is_the_sum_of_both_gradients(beta, device):
    """Bit for bit: the same two numbers are added. The definition's is within the sum of their own tolerances."""
    for shape in SHAPES:
        weight, v, step, zero, grad = problem(shape, 4, device)
        own = torch.ops.qk.soft_round_backward(grad, weight, v, step, zero, 4)
        penalty = torch.ops.qk.rounding_penalty_backward(torch.tensor(0.3, device=device), v, beta)
        got = torch.ops.qk.soft_round_backward(grad, weight, v, step, zero, 4, torch.tensor([0.3, beta], device=device))
        assert torch.equal(got, own + penalty), shape
        want = reference_backward(grad, weight, v, step, zero, 4, torch.tensor([0.3, beta], device=device))
        assert torch.equal(want, reference_backward(grad, weight, v, step, zero, 4) + 0.3 * penalty_slope(v, beta))


def test_the_definitions_gradient_is_its_autograd():
    weight, v, step, zero, grad = problem((5, 67), 4)
    v.requires_grad_()
    (want,) = torch.autograd.grad(reference(weight, v, step, zero, 4), v, grad)
    got = reference_backward(grad, weight, v.detach(), step, zero, 4)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


V = [-3, -1, 0, 0.5, 1, 2, 3]
H = [0, 0.222730, 0.5, 0.646951, 0.777270, 0.956956, 1]
SLOPES = [0, 0.235934, 0.3, 0.282004, 0.235934, 0.125992, 0]


def test_worked_numbers(device):
    args = one_value(V, device)
    assert qk.ops.soft_round(*args).tolist() == pytest.approx(H, abs=5e-7)
    got = torch.ops.qk.soft_round_backward(torch.ones_like(args[1]), *args)
    assert got.tolist() == pytest.approx(SLOPES, abs=5e-7)


def test_a_value_that_is_decided_has_no_gradient(device):
    args = one_value([-2.397896, -2.397894, 2.397894, 2.397896], device)  # h ends at ln 11 = 2.3978953
    got = torch.ops.qk.soft_round_backward(torch.ones_like(args[1]), *args)
    assert got.tolist() == pytest.approx([0, 0.0916668, 0.0916668, 0], abs=1e-6)  # 1.2 sigmoid (1 - sigmoid) there


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("beta", [None, 2.0, 3.7, 20.0])
def test_the_definitions_gradient_is_that_of_the_definition(bits, beta):
    """By finite differences, in float64, of soft codes and of the penalty beside them."""
    random = torch.Generator().manual_seed(bits)
    weight, v = (torch.randn(4, 23, generator=random, dtype=torch.float64) for _ in range(2))
    step = (0.2 + torch.rand(4, generator=random)).double()
    zero = torch.tensor([2 ** (bits - 1), 0, 1, 2**bits - 1], dtype=torch.int32)
    penalty = None if beta is None else torch.tensor([0.3, beta], dtype=torch.float64)

    class Definition(torch.autograd.Function):
        @staticmethod
        def forward(ctx, v):
            ctx.save_for_backward(v)
            h = fraction(v)
            return reference(weight, v, step, zero, bits), 0.3 * (1 - (2 * h - 1).abs().pow(beta or 1)).sum()

        @staticmethod
        def backward(ctx, grad, grad_penalty):
            (v,) = ctx.saved_tensors
            given = None if penalty is None else penalty * torch.stack([grad_penalty, torch.ones_like(grad_penalty)])
            return reference_backward(grad, weight, v, step, zero, bits, given)

    def call(v):
        codes, summed = Definition.apply(v)
        return codes if beta is None else (codes, summed)

    assert torch.autograd.gradcheck(call, v.requires_grad_())


def test_h_stays_within_its_bound_of_float64(device):
    v = torch.linspace(-6, 6, 1_000_001)
    exact = torch.clamp(1.2 * torch.sigmoid(v.double()) - 0.1, 0, 1)
    got = qk.ops.soft_round(*one_value(v, device)).cpu().double()
    assert (got - exact).abs().max() <= 3 * 2.0**-24  # half of soft_sign's 5 * 2^-24, and the rounding of h
    assert (got >= 0).all()
    assert (got <= 1).all()
    assert (got[1:] - got[:-1]).min() >= -3 * 2.0**-24


def test_start_moves_nothing_but_what_is_clipped(device):
    weight = torch.tensor([0.83, -0.37, 0.05, -1.1, 0.5], device=device)
    step, zero = torch.tensor([0.25], device=device), torch.tensor([8], dtype=torch.int32, device=device)
    v = start(weight, step)
    assert v.tolist() == pytest.approx([-0.619039, 0.066691, -1.098612, 0.336472, -2.397895], abs=2e-6)
    torch.testing.assert_close(qk.ops.soft_round(weight, v, step, zero, 4), weight, rtol=0, atol=1e-6)
    hard = torch.floor(weight / step) + (fraction(v) >= 0.5)
    assert hard.tolist() == [3, -1, 0, -4, 2]


def test_decided_values_are_codes_exactly(device):
    weight, v, step, zero, _ = problem((5, 67), 4, device)
    decided = torch.where(v > 0, 10.0, -10.0)
    assert torch.equal(qk.ops.soft_round(weight, decided, step, zero, 4), reference(weight, decided, step, zero, 4))


def test_nan_shows_and_infinity_is_clamped(device):
    weight = torch.tensor([torch.nan, 1.0, torch.inf, -torch.inf, 1e30, 1.0, 1.0], device=device)
    v = torch.tensor([0, torch.nan, 0, 0, 0, torch.inf, -torch.inf], device=device)
    step, zero = torch.ones(1, device=device), torch.tensor([2], dtype=torch.int32, device=device)
    got = qk.ops.soft_round(weight, v, step, zero, 3)
    assert got.isnan().tolist() == [True, True, False, False, False, False, False]
    assert got[2:].tolist() == [5, -2, 5, 2, 1]
    gradient = torch.ops.qk.soft_round_backward(torch.ones_like(v), weight, v, step, zero, 3)
    assert gradient.tolist() == [0] * 7


def test_strides_do_not_matter(device):
    weight, v, step, zero, grad = problem((5, 67), 4, device)
    turned = [t.t().contiguous().t() for t in (grad, weight, v)]
    out = qk.ops.soft_round(turned[1], turned[2], step, zero, 4)
    assert out.is_contiguous()
    assert torch.equal(out, qk.ops.soft_round(weight, v, step, zero, 4))
    got = torch.ops.qk.soft_round_backward(*turned, step, zero, 4)
    assert torch.equal(got, torch.ops.qk.soft_round_backward(grad, weight, v, step, zero, 4))


def test_threads_and_instruction_sets_change_no_bit(each_isa_and_threads):
    weight, v, step, zero, grad = problem((3, 100_003), 4)
    each_isa_and_threads(
        lambda: (
            qk.ops.soft_round(weight, v, step, zero, 4),
            torch.ops.qk.soft_round_backward(grad, weight, v, step, zero, 4),
            torch.ops.qk.soft_round_backward(grad, weight, v, step, zero, 4, torch.tensor([0.01, 7.3])),
        )
    )


def test_registration(device):
    weight, v, step, zero, grad = problem((5, 67), 4, device)
    torch.library.opcheck(torch.ops.qk.soft_round.default, (weight, v.clone().requires_grad_(), step, zero, 4))
    for penalty in (None, torch.tensor([0.01, 7.3], device=device)):
        args = (grad, weight, v, step, zero, 4, penalty)
        torch.library.opcheck(torch.ops.qk.soft_round_backward.default, args)


W, STEP, ZERO = torch.ones(5, 8), torch.ones(5), torch.zeros(5, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": W.double()}, r"qk::soft_round: weight must be float32, float16 or bfloat16, got Double \[5, 8\]"),
        ({"v": W.half()}, r"v must be of the type of weight"),
        ({"v": W.t()}, r"v must be of the shape of weight, Float \[5, 8\], got Float \[8, 5\]"),
        ({"step": torch.ones(3)}, r"step must be one value, or one for each row of weight .*, got Float \[3\]"),
        ({"step": STEP * 0}, r"step must be positive and finite"),
        ({"zero": ZERO + 16}, r"zero must be a code from 0 to 15, got 16 at 0"),
        ({"bits": 9}, r"bits must be a width from 2 to 8, got 9"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(RuntimeError, match=message):
        qk.ops.soft_round(**({"weight": W, "v": W, "step": STEP, "zero": ZERO, "bits": 4} | change))


@pytest.mark.parametrize("zero", [-(2**31), -1, 16, 2**31 - 1])
def test_zero_that_is_no_code_has_no_gradient(zero):
    with pytest.raises(RuntimeError, match=r"qk::soft_round_backward: zero must be a code from 0 to 15"):
        torch.ops.qk.soft_round_backward(W, W, W, STEP, torch.full_like(ZERO, zero), 4)


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        (torch.tensor([torch.nan, 2.0]), r"penalty\[0\] must be finite, got nan"),
        (torch.tensor([0.1, 0.5]), r"penalty\[1\] must be finite and at least 1, got 0.5"),
        (torch.tensor([0.1, torch.inf]), r"penalty\[1\] must be finite and at least 1, got inf"),
        (torch.tensor([0.1]), r"penalty must be \[2\], a weight and an exponent, got Float \[1\]"),
        (torch.tensor([[0.1, 2.0]]), r"penalty must be \[2\], a weight and an exponent, got Float \[1, 2\]"),
        (torch.tensor([1, 2]), r"penalty must be Float, got Long \[2\]"),
    ],
)
def test_a_penalty_that_is_none_is_refused(penalty, message):
    with pytest.raises(RuntimeError, match=rf"qk::soft_round_backward: {message}"):
        torch.ops.qk.soft_round_backward(W, W, W, STEP, ZERO, 4, penalty)


def test_a_penalty_of_weight_0_adds_nothing(device):
    weight, v, step, zero, grad = problem((5, 67), 4, device)
    none = torch.ops.qk.soft_round_backward(grad, weight, v, step, zero, 4)
    assert torch.equal(torch.ops.qk.soft_round_backward(grad, weight, v, step, zero, 4, v.new_tensor([0, 9])), none)
