import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qk
from ops.conftest import weight
from qk.ops.gemm_weight_only import reference
from threads import threads

# Odd sizes miss every tile, block and vector; 29 rows are several tiles and a bit.
SIZES = [(1, 1, 1), (1, 64, 48), (2, 7, 17), (5, 3, 1), (13, 65, 33), (29, 257, 100), (100, 300, 47), (3, 1030, 16)]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def exact(m, k, w, dtype, device="cpu", bias=True, seed=1):
    """x and a bias whose sums, with steps that are powers of two, are exact in float32 in any order.

    |x| < 8 in halves, |code - zero| < 256: K of 2^12 stays below 2^24 halves. Changes the steps of w.
    """
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-15, 16, (m, k), generator=random).to(device, dtype) / 2
    w.step = torch.exp2(torch.randint(-9, -6, w.step.shape, generator=random).float()).to(device)
    b = torch.randint(-20, 21, (w.codes.shape[0],), generator=random).float().to(device)
    return x, b if bias else None


def both(x, w, bias):
    got = qk.ops.gemm_weight_only(x, w.prepacked, w.step, bias, w.bits)
    return got, reference(x, w.codes, w.zero, w.step, bias)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_result_is_the_definition_where_sums_are_exact(bits, dtype, device, make_weight):
    for m, k, n in SIZES:
        w = make_weight((n, k), bits, device)
        got, want = both(*(lambda x, b, w=w: (x, w, b))(*exact(m, k, w, dtype, device)))
        assert got.dtype == dtype
        assert torch.equal(got, want), (m, k, n)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_and_many_rows(bits, dtype, device, make_weight):
    for k, n in ((64, 17), (640, 150), (2240, 40)):
        w = make_weight((n, k), bits, device)
        for m in (1, 4, 8, 9, 16, 17, 33, 70):
            x, bias = exact(m, k, w, dtype, device)
            got, want = both(x, w, bias)
            assert torch.equal(got, want), (m, k, n)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [1, 3, 32, 64, 100, 128])
def test_groups_along_k(bits, group, dtype, device, make_weight):
    for m, n, groups in [(1, 17, 4), (6, 33, 2), (30, 20, 7)]:
        w = make_weight((n, group * groups), bits, device, k_groups=groups)
        x, bias = exact(m, group * groups, w, dtype, device)
        got, want = both(x, w, bias)
        assert torch.equal(got, want), (m, n, groups)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_one_zero_for_all(bits, groups, device, make_weight):
    for zero in (0, 2 ** (bits - 1), 2**bits - 1) if bits < 8 else (128,):
        w = make_weight((70, 96), bits, device, k_groups=groups)
        w.zero.fill_(zero)
        w.prepacked = qk.ops.prepack(w.packed, w.zero, bits, (70, 96))
        x, bias = exact(5, 96, w, torch.float32, device)
        got, want = both(x, w, bias)
        assert torch.equal(got, want), zero


def bound(x, w, bias, want):
    """Of the error: sums of K products in float32, the steps' products and sums, the rounding to x's type.

    K + 2 groups + 2 operations, each within 2^-24 of its result, which is at most sum |x| |w| + |bias|. Tensor cores
    cut what they add at 2^-22, and add each of the three parts of a float32.
    """
    n, k = w.codes.shape
    groups = w.step.numel() // n
    units = (w.codes.reshape(n, groups, -1).double() - w.zero.reshape(n, groups, 1)).abs()
    size = x.double().abs() @ (units * w.step.reshape(n, groups, 1)).reshape(n, k).t() + bias.abs()
    terms, unit = (3 * k, 2**-22) if x.device.type == "cuda" else (k, 2**-24)
    return (terms + 2 * groups + 2) * unit * size + torch.finfo(x.dtype).eps * want.double().abs() + 1e-7


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("bits", "groups"), [(2, 1), (4, 1), (4, 8), (8, 2)])
def test_real_values_are_within_the_error_of_float32(bits, groups, dtype, device, make_weight):
    for m, n in ((1, 40), (21, 33), (80, 70)):
        w = make_weight((n, 512), bits, device, k_groups=groups)
        random = torch.Generator().manual_seed(0)
        x = torch.randn(m, 512, generator=random).to(device, dtype)
        w.step, bias = w.step * 0.01, torch.randn(n, generator=random).to(device)
        got, want = both(x, w, bias)
        assert bool(((got.double() - want.double()).abs() <= bound(x, w, bias, want)).all()), (m, n)


def test_no_rows_give_no_rows(device, make_weight):
    w = make_weight((5, 8), 4, device)
    x = torch.empty(2, 0, 8, device=device)
    assert qk.ops.gemm_weight_only(x, w.prepacked, w.step, None, 4).shape == (2, 0, 5)


def test_leading_axes_and_strides(device, make_weight):
    w = make_weight((24, 40), 4, device)
    x, bias = exact(42, 40, w, torch.float32, device)
    want = reference(x, w.codes, w.zero, w.step, bias)
    args = (w.prepacked, w.step, bias, 4)
    assert torch.equal(qk.ops.gemm_weight_only(x.reshape(2, 3, 7, 40), *args), want.reshape(2, 3, 7, 24))
    assert torch.equal(qk.ops.gemm_weight_only(x.t().contiguous().t(), *args), want)
    assert torch.equal(qk.ops.gemm_weight_only(x[5], *args), want[5])
    odd = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)  # begins at no vector
    assert torch.equal(qk.ops.gemm_weight_only(odd, *args), want)
    for dtype in (torch.float16, torch.bfloat16):
        odd = torch.cat([x.new_zeros(1), x.flatten()]).to(dtype)[1:].view_as(x)
        assert torch.equal(qk.ops.gemm_weight_only(odd, *args), reference(odd, w.codes, w.zero, w.step, bias))


@pytest.mark.parametrize("dtype", TYPES)
def test_values_that_are_not_finite(dtype, device, make_weight):
    w = make_weight((33, 20), 4, device)
    x, bias = exact(11, 20, w, dtype, device)
    x[2, 3], x[4, 19], x[9, 0] = torch.nan, torch.inf, -torch.inf
    got, want = both(x, w, bias)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_are_rounded_to_the_type(dtype, make_weight):
    """Ties, denormals and what lies beyond the type: x is 1 once, so that a result is step * code."""
    steps = torch.exp2(torch.arange(-32, 20).float())
    w = make_weight((len(steps), 1), 8)
    for value in (*range(0, 256, 5), 127, 129, 255):
        w.codes.fill_(value)
        w.prepacked = qk.ops.prepack(qk.ops.pack(w.codes, 8), w.zero, 8, tuple(w.codes.shape))
        for more in (0.0, 2.0**-10, 3 * 2.0**-11, 2.0**-12):
            w.step = steps * (1 + more)
            got, want = both(torch.ones(1, 1, dtype=dtype), w, None)
            assert torch.equal(got, (w.step * (value - 128.0)).to(dtype)[None]), value
            assert torch.equal(got, want)


@pytest.mark.parametrize("isa", qk.usable_isas())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_value_of_16_bits_is_read(dtype, isa, make_weight):
    w = make_weight((3, 1), 8)
    w.codes.fill_(129)
    w.prepacked, w.step = qk.ops.prepack(qk.ops.pack(w.codes, 8), w.zero, 8, (3, 1)), torch.ones(3)
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
    before = qk.active_isa()
    qk.force_isa(isa)
    got = qk.ops.gemm_weight_only(x, w.prepacked, w.step, None, 8)
    qk.force_isa(before)
    if isa == "amx" and dtype == torch.bfloat16:  # its tiles take denormals for 0
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0, x)
    assert torch.equal(got.isnan(), x.isnan().expand(-1, 3))
    assert torch.equal(got.nan_to_num(), x.expand(-1, 3).nan_to_num())


def test_denormals_of_float16_are_read_where_those_of_float32_are_flushed(make_weight):
    w = make_weight((3, 1), 8)
    w.codes.fill_(129)
    w.prepacked, w.step = qk.ops.prepack(qk.ops.pack(w.codes, 8), w.zero, 8, (3, 1)), torch.ones(3)
    x = torch.tensor([[3e-5], [6e-8], [-6e-5]], dtype=torch.float16)
    want = x.double().expand(-1, 3)
    assert torch.set_flush_denormal(True)
    try:
        with threads(1):  # others have a mode of their own
            got = qk.ops.gemm_weight_only(x, w.prepacked, w.step * 1024, None, 8)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(got.double() / 1024, want)


def test_rows_threads_and_instruction_sets_change_no_bit(each_isa_and_threads, make_weight):
    random = torch.Generator().manual_seed(0)
    for n, groups in ((300, 1), (1000, 4)):
        w = make_weight((n, 400), 4, k_groups=groups)
        x, bias = torch.randn(300, 400, generator=random), torch.randn(n, generator=random)
        args = (w.prepacked, w.step, bias, 4)
        each_isa_and_threads(lambda x=x, args=args: (qk.ops.gemm_weight_only(x, *args),))
        whole = qk.ops.gemm_weight_only(x, *args)
        for m in (1, 2, 3, 5, 8, 11, 40):
            assert torch.equal(qk.ops.gemm_weight_only(x[:m], *args), whole[:m]), m


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_weight_may_begin_at_any_byte(offset, make_weight):
    w = make_weight((24, 40), 4)
    x, bias = exact(5, 40, w, torch.float32)
    moved = torch.cat([torch.zeros(offset, dtype=torch.uint8), w.prepacked])[offset:]
    assert torch.equal(qk.ops.gemm_weight_only(x, moved, w.step, bias, 4), both(x, w, bias)[1])


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 150),
    group=st.integers(1, 130),
    groups=st.sampled_from([1, 1, 1, 2, 3, 17]),
    bits=st.sampled_from([2, 4, 8]),
    dtype=st.sampled_from(TYPES),
    count=st.integers(1, 8),
    with_bias=st.booleans(),
)
def test_any_product_is_the_definition(m, n, group, groups, bits, dtype, count, with_bias):
    w = weight((n, group * groups), bits, k_groups=groups)
    x, bias = exact(m, group * groups, w, dtype, bias=with_bias)
    before = qk.active_isa()
    for isa in qk.usable_isas():
        qk.force_isa(isa)
        with threads(count):
            got, want = both(x, w, bias)
        qk.force_isa(before)
        assert torch.equal(got, want), isa


def test_opcheck(device, make_weight):
    for dtype in TYPES:
        for m in (0, 5):
            w = make_weight((17, 24), 4, device, k_groups=2)
            x, bias = exact(m, 24, w, dtype, device)
            torch.library.opcheck(torch.ops.qk.gemm_weight_only.default, (x, w.prepacked, w.step, bias, 4))


def test_bad_input_is_refused(device, make_weight):
    w = make_weight((17, 24), 4, device)
    x, bias = exact(5, 24, w, torch.float32, device)
    good = {"x": x, "weight": w.prepacked, "weight_step": w.step, "bias": bias, "bits": 4}
    other = make_weight((17, 32), 4, device)
    cases = [
        ({"x": x.double()}, "x must be float32, float16 or bfloat16, got Double"),
        ({"x": x[0, 0]}, "x must be .*K of 1 or more"),
        ({"x": x[:, :20]}, "weight must be prepacked from"),
        ({"bits": 3}, "bits must be 2, 4 or 8"),
        ({"bits": 8}, "weight must be prepacked from"),
        ({"weight": other.prepacked}, "weight must be prepacked from"),
        ({"weight": w.prepacked.float()}, "weight must be Byte"),
        ({"weight_step": w.step.double()}, "weight_step must be Float"),
        ({"weight_step": w.step.reshape(1, 17)[:, :5]}, "weight_step must be"),
        ({"bias": bias[:3]}, "bias must be float32"),
        ({"bias": bias.half()}, "bias must be float32"),
    ]
    for wrong, message in cases:
        with pytest.raises(RuntimeError, match=f"qk::gemm_weight_only: {message}"):
            torch.ops.qk.gemm_weight_only(**(good | wrong))
