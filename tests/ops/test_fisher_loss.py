import math

import pytest
import torch

import qk
from qk.ops.fisher_loss import fisher_loss_and_slope, reference

SHAPES = [(5, 67), (1,), (0,), (2, 3, 50, 70), ()]


def problem(shape, weighted, device="cpu"):
    random = torch.Generator().manual_seed(0)
    output, target, weight = (torch.randn(shape, generator=random).to(device) for _ in range(3))
    return output, target, weight.square() if weighted else None


@pytest.mark.parametrize("weighted", [True, False])
def test_value_is_the_definition(weighted, device):
    for shape in SHAPES:
        output, target, weight = problem(shape, weighted, device)
        got = qk.ops.fisher_loss(output, target, weight, 0.25)
        wide = [None if t is None else t.double() for t in (output, target, weight)]
        want = reference(*wide, 0.25)[0]
        assert got.shape == ()
        # Three roundings of a term, one of the result, and the additions of a lane (8192 / 16), all of one sign.
        assert (got.double() - want).abs() <= (8192 / 16 + 16 + 4) * 2.0**-24 * want, shape


@pytest.mark.parametrize("weighted", [True, False])
def test_gradient_is_the_definition_and_target_and_weight_have_none(weighted, device):
    for shape in SHAPES:
        output, target, weight = problem(shape, weighted, device)
        leaves = [t.requires_grad_() for t in (output, target, weight) if t is not None]
        loss = qk.ops.fisher_loss(output, target, weight, 0.25)
        got = torch.autograd.grad(loss * 3, leaves, allow_unused=True)
        output, target, weight = (None if t is None else t.detach() for t in (output, target, weight))
        slope = reference(output, target, weight, 0.25)[1]
        torch.testing.assert_close(got[0], 3 * slope, rtol=4 * 2.0**-23, atol=0)  # products in another order
        torch.testing.assert_close(
            fisher_loss_and_slope(output, target, weight, 0.25)[1], slope, rtol=4 * 2.0**-23, atol=0
        )
        assert got[1:] == (None,) * (len(leaves) - 1)


@pytest.mark.parametrize("weighted", [True, False])
def test_the_definitions_slope_is_that_of_its_loss(weighted):
    output, target, weight = (None if t is None else t.double() for t in problem((5, 17), weighted))

    class Definition(torch.autograd.Function):
        @staticmethod
        def forward(ctx, output):
            loss, slope = reference(output, target, weight, 0.25)
            ctx.save_for_backward(slope)
            return loss

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    assert torch.autograd.gradcheck(Definition.apply, output.requires_grad_())


def test_worked_numbers(device):
    g = torch.tensor([[0.2, -0.1], [0.05, 0.4]], device=device)
    difference = torch.tensor([[1, 2], [-1, 0.5]], device=device)
    target = torch.tensor([[4.0, -8.0], [0.25, 1.0]], device=device)
    for weight, loss in [(g.square(), 0.06125), ((g.abs() + 1).square(), 3.93625), (None, 3.125)]:
        got = qk.ops.fisher_loss(target + difference, target, weight, 1 / 2)
        assert got.item() == pytest.approx(loss, rel=1e-6)


def test_strides_do_not_matter(device):
    output, target, weight = problem((2, 3, 5, 7), True, device)
    turned = [t.to(memory_format=torch.channels_last) for t in (output, target, weight)]
    got, want = fisher_loss_and_slope(*turned), fisher_loss_and_slope(output, target, weight)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nan_shows(device):
    assert qk.ops.fisher_loss(torch.full((3,), torch.nan, device=device), torch.zeros(3, device=device)).isnan()


def test_threads_and_instruction_sets_change_no_bit(each_isa_and_threads):
    output, target, weight = problem((300_007,), True)
    each_isa_and_threads(
        lambda: [t.reshape(-1) for w in (weight, None) for t in fisher_loss_and_slope(output, target, w, 0.1)]
    )


@pytest.mark.parametrize("weighted", [True, False])
def test_registration(weighted, device):
    output, target, weight = problem((5, 67), weighted, device)
    torch.library.opcheck(torch.ops.qk.fisher_loss.default, (output.requires_grad_(), target, weight, 0.5))


ONES = torch.ones(5, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"output": ONES.double()},
            r"qk::fisher_loss: output must be float32, float16 or bfloat16, got Double \[5, 8\]",
        ),
        ({"target": ONES.int()}, r"target must be of the type of output"),
        ({"target": ONES[:1]}, r"target must be of the shape of output, Float \[5, 8\], got Float \[1, 8\]"),
        ({"weight": ONES[0]}, r"weight must be of the shape of output, Float \[5, 8\], got Float \[8\]"),
        ({"scale": math.nan}, r"scale must be finite in float32, got nan"),
        ({"scale": 1e39}, r"scale must be finite in float32, got 1e\+39"),
    ],
)
def test_bad_input_is_refused(change, message):
    with pytest.raises(RuntimeError, match=message):
        qk.ops.fisher_loss(**({"output": ONES, "target": ONES, "weight": ONES, "scale": 1.0} | change))


def test_the_slope_has_no_gradient_of_its_own():
    loss, slope = torch.ops.qk.fisher_loss(ONES.clone().requires_grad_(), ONES, None, 1.0)
    assert loss.requires_grad
    assert not slope.requires_grad
