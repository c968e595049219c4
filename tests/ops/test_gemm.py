import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qk
from ops.conftest import weight
from qk.ops.gemm import reference
from threads import threads

# Odd sizes miss every tile, block and vector; 29 rows are two panels and a bit.
SIZES = [(1, 1, 1), (1, 64, 48), (2, 7, 17), (5, 3, 1), (13, 65, 33), (29, 257, 100), (100, 300, 47), (3, 1030, 16)]


def problem(m, k, w, device, x_bits=8, per_row=False, bias=True, seed=1):
    random = torch.Generator().manual_seed(seed)
    rows, n = m if per_row else 1, w.codes.shape[0]
    x = torch.randint(0, 2**x_bits, (m, k), generator=random, dtype=torch.uint8)
    x_step = 0.01 + torch.rand(rows, generator=random)
    x_zero = torch.randint(0, 2**x_bits, (rows,), generator=random, dtype=torch.int32)
    b = torch.randn(n, generator=random) * 100
    return [t.to(device) for t in (x, x_step, x_zero)], b.to(device) if bias else None


def both(inputs, w, bias, x_bits=8, **epilogue):
    got = qk.ops.gemm(*inputs, w.prepacked, w.step, bias, w.bits, x_bits, **epilogue)
    return got, reference(*inputs, w.codes, w.zero, w.step, bias, **epilogue)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("x_bits", [2, 4, 6, 8])
def test_result_is_the_definition(bits, x_bits, device, make_weight):
    for m, k, n in SIZES:
        w = make_weight((n, k), bits, device)
        inputs, bias = problem(m, k, w, device, x_bits)
        got, want = both(inputs, w, bias, x_bits)
        assert torch.equal(got, want), (m, k, n)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_few_rows(bits, device, make_weight):
    """Kernels for few rows share K among their warps and keep several tiles of it on their way: less, and more."""
    for k, n in ((64, 17), (640, 150), (2240, 40)):
        w = make_weight((n, k), bits, device)
        for m in (1, 8, 9, 16, 17, 31, 33):
            inputs, bias = problem(m, k, w, device)
            got, want = both(inputs, w, bias)
            assert torch.equal(got, want), (m, k, n)


@pytest.mark.parametrize("x_bits", [3, 5, 7])
def test_any_width_of_codes(x_bits, device, make_weight):
    w = make_weight((33, 130), 4, device)
    inputs, bias = problem(9, 130, w, device, x_bits)
    got, want = both(inputs, w, bias, x_bits)
    assert torch.equal(got, want)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_largest_codes_do_not_saturate(bits, device, make_weight):
    w = make_weight((17, 512), bits, device, extreme=True)
    for x in (torch.full((15, 512), 255), torch.randint(0, 2, (15, 512)) * 255):
        for zero in (0, 255):
            inputs = [x.to(torch.uint8), torch.tensor([0.1]), torch.tensor([zero], dtype=torch.int32)]
            got, want = both([t.to(device) for t in inputs], w, None)
            assert torch.equal(got, want)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_all_products_of_one_sign_and_the_largest_size(bits, device, make_weight):
    # One row, a tile that is alone, several tiles; sums in 16 bits meet their limits (csrc/cpu/tile_avx2.h).
    for m, k in ((1, 130), (6, 515), (23, 515)):
        x = torch.full((m, k), 255, dtype=torch.uint8)
        for code, zero in ((2**bits - 1, 0), (0, 2**bits - 1), (2**bits - 1, 2 ** (bits - 1)), (0, 2 ** (bits - 1))):
            w = make_weight((21, k), bits, device)
            w.codes.fill_(code)
            w.zero.fill_(128 if bits == 8 else zero)
            w.packed = qk.ops.pack(w.codes, bits)
            w.prepacked = qk.ops.prepack(w.packed, w.zero, bits, (21, k))
            inputs = [x, torch.tensor([0.1]), torch.tensor([0], dtype=torch.int32)]
            got, want = both([t.to(device) for t in inputs], w, None)
            assert torch.equal(got, want), (m, k, code, zero)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_results_far_beyond_codes_or_not_numbers(bits, activation, device, make_weight):
    # Kernels round before they limit only where no result can leave int32.
    w = make_weight((40, 64), bits, device)
    inputs, bias = problem(11, 64, w, device)
    far = torch.tensor([1e9, -1e9, 1e20, -1e20, float("inf"), -float("inf"), float("nan"), 3e38], device=device)
    out = {"out_step": torch.tensor([0.01], device=device), "activation": activation}
    for at, zero in ((0, 0), (5, 255), (17, 3), (31, 128)):
        bias[at : at + 7] = far[:7]
        w.step[at + 7] = far[7]
        out["out_zero"] = torch.tensor([zero], dtype=torch.int32, device=device)
        got, want = both(inputs, w, bias, **out)
        assert torch.equal(got, want), at


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [1, 3, 5, 32, 64, 100])
def test_groups_along_k(bits, group, device, make_weight):
    for m, n, groups in [(1, 17, 4), (6, 33, 2), (30, 20, 7)]:
        k = group * groups
        w = make_weight((n, k), bits, device, k_groups=groups)
        inputs, bias = problem(m, k, w, device)
        got, want = both(inputs, w, bias)
        assert torch.equal(got, want), (m, n, groups)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_step_for_each_row(bits, device, make_weight):
    for m, groups in [(1, 1), (16, 1), (31, 3)]:
        w = make_weight((40, 96), bits, device, k_groups=groups)
        inputs, bias = problem(m, 96, w, device, per_row=True)
        got, want = both(inputs, w, bias)
        assert torch.equal(got, want)


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("out_bits", [None, 2, 4, 8])
def test_activation_and_codes(activation, out_bits, device, make_weight):
    w = make_weight((37, 50), 4, device)
    (x, x_step, x_zero), bias = problem(21, 50, w, device)
    w.step, bias = w.step * 0.01, bias * 0.05
    for zero in (0, 3):
        out = {}
        if out_bits:
            out = {"out_step": torch.tensor([0.7]), "out_zero": torch.tensor([zero], dtype=torch.int32)}
            out = {name: t.to(device) for name, t in out.items()} | {"out_bits": out_bits}
        got, want = both([x, x_step, x_zero], w, bias, activation=activation, **out)
        assert got.dtype == (torch.uint8 if out_bits else torch.float32)
        assert torch.equal(got, want)


def residual_of(kind, shape, device, seed=2):
    random = torch.Generator().manual_seed(seed)
    if kind == "float":
        return {"residual": torch.randn(shape, generator=random).to(device) * 50}
    codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    step_zero = {"residual_step": torch.tensor([0.37]), "residual_zero": torch.tensor([9], dtype=torch.int32)}
    return {name: t.to(device) for name, t in ({"residual": codes} | step_zero).items()}


@pytest.mark.parametrize("kind", ["float", "codes"])
@pytest.mark.parametrize("out_bits", [None, 4, 8])
@pytest.mark.parametrize(("bits", "groups"), [(8, 1), (4, 2), (2, 1)])
def test_a_residual_is_added_before_the_activation(kind, out_bits, bits, groups, device, make_weight):
    for m, k, n in [(1, 8, 1), (3, 20, 33), (21, 50, 37), (15, 64, 48)]:
        w = make_weight((n, k), bits, device, k_groups=groups)
        inputs, bias = problem(m, k, w, device, per_row=m == 3)
        w.step = w.step * 0.01
        epilogue = {"activation": "relu"} | residual_of(kind, (m, n), device)
        if out_bits:
            out = {"out_step": torch.tensor([0.9]), "out_zero": torch.tensor([3], dtype=torch.int32)}
            epilogue |= {name: t.to(device) for name, t in out.items()} | {"out_bits": out_bits}
        got, want = both(inputs, w, bias, **epilogue)
        assert torch.equal(got, want), (m, k, n)


def test_no_rows_give_no_rows(device, make_weight):
    w = make_weight((5, 8), 4, device)
    x = torch.empty(2, 0, 8, dtype=torch.uint8, device=device)
    inputs = [x, torch.ones(1, device=device), torch.zeros(1, dtype=torch.int32, device=device)]
    assert qk.ops.gemm(*inputs, w.prepacked, w.step, None, 4).shape == (2, 0, 5)


def test_leading_axes_and_strides(device, make_weight):
    w = make_weight((24, 40), 4, device)
    (x, x_step, x_zero), bias = problem(42, 40, w, device)
    want = reference(x, x_step, x_zero, w.codes, w.zero, w.step, bias)
    got = qk.ops.gemm(x.reshape(2, 3, 7, 40), x_step, x_zero, w.prepacked, w.step, bias, 4)
    assert torch.equal(got, want.reshape(2, 3, 7, 24))
    strided = x.t().contiguous().t()
    assert torch.equal(qk.ops.gemm(strided, x_step, x_zero, w.prepacked, w.step, bias, 4), want)
    assert torch.equal(qk.ops.gemm(x[5], x_step, x_zero, w.prepacked, w.step, bias, 4), want[5])


@pytest.mark.parametrize("groups", [1, 2])
def test_a_result_that_underflows_keeps_its_sign(groups, device, make_weight):
    # No bias is no addition: 0 added to -0 would be +0.
    w = make_weight((17, 24), 4, device, k_groups=groups)
    (x, _, x_zero), _ = problem(5, 24, w, device)
    w.step = w.step * 1e-30
    got, want = both([x, torch.full((1,), 1e-30, device=device), x_zero], w, None)
    assert want.signbit().any()
    assert torch.equal(got.signbit(), want.signbit())


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_weight_may_begin_at_any_byte(offset, make_weight):
    w = make_weight((24, 40), 4)
    inputs, bias = problem(5, 40, w, "cpu")
    moved = torch.cat([torch.zeros(offset, dtype=torch.uint8), w.prepacked])[offset:]
    want = reference(*inputs, w.codes, w.zero, w.step, bias)
    assert torch.equal(qk.ops.gemm(*inputs, moved, w.step, bias, 4), want)


def test_threads_and_instruction_sets_change_no_bit(each_isa_and_threads, make_weight):
    for m, n in [(1, 4096), (700, 20), (150, 300)]:
        w = make_weight((n, 400), 4)
        inputs, bias = problem(m, 400, w, "cpu")
        want = reference(*inputs, w.codes, w.zero, w.step, bias)
        each_isa_and_threads(lambda a=(*inputs, w.prepacked, w.step, bias, 4): (qk.ops.gemm(*a),))
        assert torch.equal(qk.ops.gemm(*inputs, w.prepacked, w.step, bias, 4), want)


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 40),
    n=st.integers(1, 150),
    group=st.integers(1, 130),
    groups=st.sampled_from([1, 1, 1, 2, 3, 17]),
    bits=st.sampled_from([2, 4, 8]),
    x_bits=st.sampled_from([4, 8]),
    count=st.integers(1, 8),
    per_row=st.booleans(),
    with_bias=st.booleans(),
    added=st.sampled_from([None, "float", "codes"]),
    out_bits=st.sampled_from([None, 4, 8]),
    activation=st.sampled_from(["none", "relu", "relu6"]),
)
def test_any_product_is_the_definition(
    m, n, group, groups, bits, x_bits, count, per_row, with_bias, added, out_bits, activation
):
    w = weight((n, group * groups), bits, k_groups=groups)
    inputs, bias = problem(m, group * groups, w, "cpu", x_bits, per_row, with_bias)
    w.step = w.step * 0.01
    epilogue = {"activation": activation} | (residual_of(added, (m, n), "cpu") if added else {})
    if out_bits:
        epilogue |= {"out_step": torch.tensor([0.9]), "out_zero": torch.tensor([3], dtype=torch.int32)}
        epilogue["out_bits"] = out_bits
    before = qk.active_isa()
    for isa in qk.usable_isas():
        qk.force_isa(isa)
        with threads(count):
            got, want = both(inputs, w, bias, x_bits, **epilogue)
        qk.force_isa(before)
        assert torch.equal(got, want), isa


@pytest.mark.parametrize("out_bits", [None, 8])
def test_values_that_are_not_finite(out_bits, device, make_weight):
    w = make_weight((33, 20), 4, device)
    inputs, bias = problem(11, 20, w, device)
    bias[0], bias[5], bias[20] = torch.nan, torch.inf, -torch.inf
    residual = residual_of("float", (11, 33), device)
    residual["residual"][2, 1:4] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    residual["residual"][3, 5] = -torch.inf  # and the bias is inf
    for activation in ("none", "relu", "relu6"):
        epilogue = {"activation": activation} | residual
        if out_bits:
            out = {"out_step": torch.tensor([0.9]), "out_zero": torch.tensor([3], dtype=torch.int32)}
            epilogue |= {name: t.to(device) for name, t in out.items()} | {"out_bits": out_bits}
        got, want = both(inputs, w, bias, **epilogue)
        assert torch.equal(got.nan_to_num() if not out_bits else got, want.nan_to_num() if not out_bits else want)
        assert torch.equal(got.isnan(), want.isnan())


def test_a_sum_of_codes_that_16_bit_terms_cannot_hold(each_isa_and_threads):
    k = 2**26 // 255 + 100
    w = weight((17, k), 4)
    x = torch.full((2, k), 255, dtype=torch.uint8)
    inputs = [x, torch.tensor([0.001]), torch.tensor([0], dtype=torch.int32)]
    got, want = both(inputs, w, None)
    assert torch.equal(got, want)
    each_isa_and_threads(lambda: (both(inputs, w, None)[0],))


def test_registration(device, make_weight):
    w = make_weight((9, 20), 4, device, k_groups=2)
    inputs, bias = problem(3, 20, w, device, per_row=True)
    out = (torch.tensor([2.0], device=device), torch.tensor([1], dtype=torch.int32, device=device))
    torch.library.opcheck(torch.ops.qk.gemm.default, (*inputs, w.prepacked, w.step, bias, 4))
    torch.library.opcheck(torch.ops.qk.gemm.default, (*inputs, w.prepacked, w.step, None, 4, 8, "relu", *out, 4))
    added = residual_of("codes", (3, 9), device)
    torch.library.opcheck(torch.ops.qk.gemm.default, (*inputs, w.prepacked, w.step, None, 4), added)


def arguments(w, **changed):
    n, k = w.codes.shape
    values = {
        "x": torch.zeros(3, k, dtype=torch.uint8),
        "x_step": torch.ones(1),
        "x_zero": torch.zeros(1, dtype=torch.int32),
        "weight": w.prepacked,
        "weight_step": w.step,
        "bias": torch.zeros(n),
        "bits": w.bits,
    }
    return values | changed


I32 = torch.int32
RESIDUAL = {
    "residual": torch.zeros(3, 9, dtype=torch.uint8),
    "residual_step": torch.ones(1),
    "residual_zero": torch.zeros(1, dtype=I32),
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(3, 21, dtype=torch.uint8)}, r"weight must be prepacked from \[9, 21\] with bits 4"),
        (
            {"x": torch.zeros(3, 24, dtype=torch.uint8)},
            r"weight must be prepacked from \[9, 24\].*got one made from \[9,",
        ),
        ({"x": torch.zeros(3, 20)}, "x must be Byte, got Float"),
        ({"x": torch.zeros(3, 0, dtype=torch.uint8)}, r"x must be codes \[\.\.\., K\]"),
        ({"x": torch.tensor(1, dtype=torch.uint8)}, r"x must be codes \[\.\.\., K\]"),
        ({"x_step": torch.ones(2)}, "x_step must be one value, or one for each of 3 rows"),
        ({"x_step": torch.zeros(1)}, "x_step must be positive and finite"),
        ({"x_step": torch.tensor([torch.nan])}, "x_step must be positive and finite"),
        ({"x_zero": torch.zeros(3, dtype=I32)}, "x_zero must be as many values as x_step"),
        ({"x_zero": torch.tensor([256], dtype=I32)}, "x_zero must be a code from 0 to 255"),
        ({"x_zero": torch.tensor([-1], dtype=I32)}, "x_zero must be a code from 0 to 255"),
        ({"weight_step": torch.ones(8)}, r"bias must be float32 \[8\]"),
        ({"weight_step": torch.ones(9, 3)}, r"weight_step must be float32 \[N\]"),
        ({"weight_step": torch.ones(9, 2)}, "weight must be prepacked from"),
        ({"weight_step": torch.ones(0), "bias": None}, r"weight_step must be float32 \[N\]"),
        ({"weight": torch.zeros(7, dtype=torch.uint8)}, "weight must be prepacked from"),
        ({"bits": 2}, "weight must be prepacked from"),
        ({"bits": 3}, "bits must be 2, 4 or 8, got 3"),
        ({"x_bits": 9}, "x_bits must be a width from 2 to 8"),
        ({"bias": torch.zeros(8)}, r"bias must be float32 \[9\]"),
        ({"activation": "gelu"}, "activation must be none, relu or relu6, got gelu"),
        ({"out_step": torch.ones(1)}, "out_step and out_zero must be given together"),
        ({"out_step": torch.ones(2), "out_zero": torch.zeros(1, dtype=I32)}, "out_step must be one value"),
        (
            {"out_step": torch.ones(1), "out_zero": torch.tensor([4], dtype=I32), "out_bits": 2},
            "out_zero must be a code",
        ),
        ({"out_step": torch.zeros(1), "out_zero": torch.zeros(1, dtype=I32)}, "out_step must be positive"),
        ({"residual": torch.zeros(3, 8)}, r"residual must be of the result's shape \[3, 9\]"),
        ({"residual": torch.zeros(3, 9, dtype=torch.uint8)}, "residual must be Float, got Byte"),
        ({"residual_step": torch.ones(1)}, "residual_step and residual_zero must be given together"),
        (
            {"residual_step": torch.ones(1), "residual_zero": torch.zeros(1, dtype=I32)},
            "residual_step must be left out without a residual",
        ),
        (RESIDUAL | {"residual": torch.zeros(3, 9)}, "residual must be Byte, got Float"),
        (RESIDUAL | {"residual_step": torch.zeros(1)}, "residual_step must be positive"),
        (RESIDUAL | {"residual_step": torch.ones(2)}, "residual_step must be one value"),
        (RESIDUAL | {"residual_zero": torch.full((1,), 256, dtype=I32)}, "residual_zero must be a code"),
    ],
)
def test_bad_input_is_refused(changed, message, make_weight):
    w = make_weight((9, 20), 4)
    with pytest.raises(RuntimeError, match="qk::gemm: " + message):
        qk.ops.gemm(**arguments(w, **changed))


def test_weight_bytes_of_another_origin_are_refused(make_weight):
    w = make_weight((9, 20), 4)
    with pytest.raises(RuntimeError, match="got bytes that prepack did not make"):
        qk.ops.gemm(**arguments(w, weight=torch.zeros_like(w.prepacked)))


@pytest.mark.parametrize(("bits", "far"), [(2, 16), (4, 8)])
@pytest.mark.parametrize("m", [1, 2, 7])
@pytest.mark.parametrize("code", [0, 255])
def test_longest_sums_of_few_rows_are_exact(bits, far, m, code, make_weight, device):
    """Rows that share no weights with others multiply codes of weights 16 or 64 times too large, as long as such sums
    stay in int32: K up to (2^31 - 1) / (128 * 255). At it and beyond it, with every code at its end."""
    longest = (2**31 - 1) // (128 * 255)
    for k in (longest, longest + 1, far * longest):
        w = make_weight((3, k), bits, device, extreme=True)
        for per_row in (False, True):
            inputs, bias = problem(m, k, w, device, per_row=per_row)
            inputs[0].fill_(code)
            inputs[2].fill_(255 - code)
            got, want = both(inputs, w, bias)
            assert torch.equal(got, want)


def test_sum_that_could_leave_int32_is_refused(make_weight):
    longest = (2**31 - 1) // (255 * 128)
    w = make_weight((1, longest), 8, extreme=True)
    inputs, _ = problem(1, longest, w, "cpu")
    inputs[0].fill_(255)
    inputs[2].fill_(0)
    got, want = both(inputs, w, None)
    assert torch.equal(got, want)
    w = make_weight((1, longest + 1), 8)
    inputs, _ = problem(1, longest + 1, w, "cpu")
    with pytest.raises(RuntimeError, match="K must be short enough for a sum in int32"):
        qk.ops.gemm(*inputs, w.prepacked, w.step, None, 8)
    # Codes of 7 bits would fit; then no code may be larger.
    inputs[2].fill_(0)
    with pytest.raises(RuntimeError, match="x must be codes below 2"):
        qk.ops.gemm(*inputs, w.prepacked, w.step, None, 8, x_bits=7)
    inputs[0] &= 127
    got, want = both(inputs, w, None, x_bits=7)
    assert torch.equal(got, want)
