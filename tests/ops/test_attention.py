"""Attention on codes: equal to the definition, bit for bit, and near torch's attention on the values of the codes."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import qk
from qk.ops.attention import reference
from sides import target
from threads import threads

I32 = torch.int32
LENGTHS = (1, 5, 16, 17, 128, 129)
DEPTHS = [(1, 1), (3, 80), (32, 32), (33, 3), (64, 64), (80, 33)]
MASKS = (None, "keys", "rows", "shared keys", "shared rows")
LONGEST_DEPTH, MOST_KEYS = 16512, 33025


def codes(shape, random, device, step, zero):
    u = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
    return u.to(device), torch.tensor([step], device=device), torch.tensor([zero], dtype=I32, device=device)


def problem(batch, queries, keys, heads, depth, width, device="cpu", steps=(0.02, 0.017, 0.03), zeros=(120, 131, 99)):
    """q, k and v, each with step and zero, and the number of heads. The steps give weights from 0 to 255."""
    random = torch.Generator().manual_seed(batch + 3 * queries + 5 * keys + 7 * depth)
    shapes = (batch, queries, heads * depth), (batch, keys, heads * depth), (batch, keys, heads * width)
    sides = (codes(s, random, device, *scale) for s, *scale in zip(shapes, steps, zeros, strict=True))
    return [t for side in sides for t in side] + [heads]


def mask_of(kind, batch, queries, keys, device="cpu", dtype=torch.bool, share=0.6):
    """Some rows see nothing."""
    if kind is None:
        return None
    shape = (1 if "shared" in kind else batch, queries if "rows" in kind else 1, keys)
    random = torch.Generator().manual_seed(keys)
    seen = torch.rand(shape, generator=random) < share
    seen &= torch.rand(shape[:2], generator=random).unsqueeze(-1) < 0.8
    if dtype == torch.uint8:  # not 0 is seen
        return (seen * torch.randint(1, 256, shape, generator=random)).to(torch.uint8).to(device)
    return seen.to(device)


def assert_equal(*args, **more):
    got, want = qk.ops.attention(*args, **more), reference(*args, **more)
    assert got.dtype == want.dtype
    assert got.is_contiguous()
    assert torch.equal(got, want)
    return got


@pytest.mark.parametrize(("depth", "width"), DEPTHS)
def test_result_is_the_definition(depth, width, device):
    for queries in LENGTHS:
        for keys in LENGTHS:
            assert_equal(*problem(1, queries, keys, 2, depth, width, device))


@pytest.mark.parametrize("kind", MASKS[1:])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=["bool", "uint8"])
def test_masks(kind, dtype, device):
    for queries, keys in ((1, 1), (5, 17), (17, 16), (9, 129), (3, 1030)):
        args = problem(3, queries, keys, 2, 32, 33, device)
        assert_equal(*args, mask_of(kind, 3, queries, keys, device, dtype))


def test_a_query_that_sees_nothing_gives_0(device):
    args = problem(2, 5, 33, 2, 16, 7, device)
    seen = torch.ones(2, 5, 33, dtype=torch.bool, device=device)
    seen[0, 2], seen[1, :4] = False, False
    y = assert_equal(*args, seen)
    assert torch.equal((y == 0).all(-1), ~seen.any(-1))
    step, zero = target(device)
    u = assert_equal(*args, seen, out_step=step, out_zero=zero)
    assert (u[0, 2] == 93).all()
    assert_equal(*args, torch.zeros_like(seen))


@pytest.mark.parametrize("share", [0.0, 0.02, 1.0])
def test_few_keys_are_seen(share, device):
    args = problem(2, 9, 600, 1, 16, 16, device)
    assert_equal(*args, mask_of("rows", 2, 9, 600, device, share=share))


@pytest.mark.parametrize("sizes", [(0, 3, 5), (2, 0, 5), (2, 3, 0), (0, 0, 0)])
def test_empty(sizes, device):
    batch, queries, keys = sizes
    args = problem(batch, queries, keys, 2, 8, 5, device)
    for kind in MASKS:
        y = assert_equal(*args, mask_of(kind, batch, queries, keys, device))
        assert y.shape == (batch, queries, 10)
        assert (y == 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_as_result(bits, device):
    args = problem(2, 21, 40, 3, 32, 20, device)
    for step, zero in ((0.3, 2), (0.021, 3), (1e-39, 0), (1e30, 1)):
        out_step, out_zero = target(device, step, zero)
        for kind in (None, "rows"):
            mask = mask_of(kind, 2, 21, 40, device)
            u = assert_equal(*args, mask, out_step=out_step, out_zero=out_zero, out_bits=bits)
            assert u.dtype == torch.uint8
            assert u.int().max() < 2**bits


@pytest.mark.parametrize("scale", [1e-9, 0.05, 1.0, 3e4, 3e38])
def test_scale_given(scale, device):
    assert_equal(*problem(2, 9, 50, 2, 24, 16, device), scale=scale)


def test_scale_left_out_is_that_of_torch(device):
    args = problem(2, 9, 50, 2, 24, 16, device)
    assert torch.equal(qk.ops.attention(*args), qk.ops.attention(*args, scale=1 / math.sqrt(24)))


def test_all_codes_at_their_ends(device):
    for q, k, v in ((255, 255, 255), (0, 255, 0), (255, 0, 255), (0, 0, 0)):
        for zeros in ((0, 0, 0), (255, 255, 255), (255, 0, 255), (0, 255, 0)):
            args = problem(1, 5, 37, 1, 67, 19, device, zeros=zeros)
            for at, code in ((0, q), (3, k), (6, v)):
                args[at].fill_(code)
            assert_equal(*args)
            args[3][:, 1::3] = 255 - k  # scores as far apart as they can be
            assert_equal(*args)


@pytest.mark.parametrize("zero", [0, 255])
def test_longest_sums_stay_in_int32(zero, device):
    zeros = (zero, zero, zero)
    args = problem(1, 2, 3, 1, LONGEST_DEPTH, 2, device, steps=(1e-4, 1e-4, 0.1), zeros=zeros)
    args[0].fill_(255 - zero)
    args[3][0, 0], args[3][0, 1] = 0, 255
    assert_equal(*args)
    args = problem(1, 1, MOST_KEYS, 1, 3, 2, device, steps=(1e-20, 1e-20, 0.1), zeros=zeros)
    args[6].fill_(255 - zero)
    y = assert_equal(*args)  # each key has the weight 255: the largest sums there are
    assert (y.abs() > 25).all()
    assert_equal(*args, mask_of("keys", 1, 1, MOST_KEYS, device))


@pytest.mark.parametrize("step", [1e-45, 1e-25, 1e-10, 1.0, 1e10, 1e15, 1e19, 1e30, 3e38])
def test_steps_of_any_size(step, device):
    # Products of steps from 0 to inf; v's from the smallest to one whose sums overflow.
    for v_step in (1e-45, 3e38):
        args = problem(1, 9, 37, 2, 17, 5, device, steps=(step, step, v_step))
        y = assert_equal(*args)
        out_step, out_zero = target(device)
        assert_equal(*args, out_step=out_step, out_zero=out_zero)
        if step >= 1e30:  # 0 * inf: no score is near the largest, not even itself
            assert (y == 0).all()


def test_weights_halve(device):
    # As float32, ln 2 * log2(e) is 1: key i lies i halvings behind the first, and the values show the weights.
    n = 12
    one, zero = torch.ones(1, device=device), torch.zeros(1, dtype=I32, device=device)
    q = torch.ones(1, 1, 1, dtype=torch.uint8, device=device)
    k = torch.arange(n, 0, -1, dtype=torch.uint8, device=device).reshape(1, n, 1)
    v = torch.eye(n, dtype=torch.uint8, device=device).reshape(1, n, n)
    y = assert_equal(q, one, zero, k, one, zero, v, one, zero, 1, scale=math.log(2))
    weights = torch.tensor([255, 128, 64, 32, 16, 8, 4, 2, 1, 0, 0, 0], device=device)  # 127.5 goes to even
    assert weights.sum() == 510
    assert torch.equal(y.flatten(), weights * (one / 510))


def test_any_strides_work(device):
    args = problem(2, 10, 12, 2, 8, 8, device)
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    args[3] = args[3].transpose(1, 2).contiguous().transpose(1, 2)
    args[6] = args[6][:1].expand(2, 12, 16)
    mask = mask_of("rows", 2, 12, 20, device).transpose(1, 2)[:, ::2]
    assert_equal(*args, mask)
    assert_equal(*args, mask[:, :1].expand(2, 10, 12))


@pytest.mark.parametrize("offset", [1, 4, 16])
def test_codes_may_begin_at_any_byte(offset, device):
    args = problem(1, 9, 20, 2, 32, 32, device)
    want = reference(*args)
    for at in (0, 3, 6):
        flat = torch.cat([torch.zeros(offset, dtype=torch.uint8, device=device), args[at].flatten()])
        args[at] = flat[offset:].reshape(args[at].shape)
    assert torch.equal(qk.ops.attention(*args), want)


def test_near_the_attention_of_torch(device):
    """With p_j = exp(score - largest score) and weights w_j, let e_j = w_j / 255 - p_j. Rounding adds at most 0.5 / 255
    to |e_j|, the cubic 1.0e-4 (p_j <= 1), t, up to 16 halvings after six roundings of 2^-24, less than 1e-5; a weight
    left out beyond 16 halvings is below 2^-16. So |e_j| <= e = 0.5 / 255 + 1.1e-4.

    y = sum p_j v_j / sum p_j, ours is sum (p_j + e_j) v_j / sum (p_j + e_j), and sum p_j (v_j - y) = 0, so they differ
    by sum e_j (v_j - y) / sum (p_j + e_j): at most e sum |v_j - y| / max(1, sum p_j - n e) over the n keys seen, the
    largest of which has a weight of 1. Then the sum as float, the ratio and their product are rounded: 3 * 2^-24 of our
    result, below 4 * 2^-24 of |y| + the bound.
    """
    e = 0.5 / 255 + 1.1e-4
    for sizes in ((2, 17, 128, 3, 32, 32), (1, 5, 300, 2, 80, 33), (1, 3, 1, 1, 1, 1)):
        args, heads, depth = problem(*sizes, device), *sizes[3:5]
        q, k, v = (
            ((args[i].double() - args[i + 2]) * args[i + 1].double()).unflatten(-1, (heads, -1)).transpose(1, 2)
            for i in (0, 3, 6)
        )
        for share in (0.6, 1.0):
            mask = mask_of("rows", *sizes[:3], device, share=share)
            mask[..., 0] = True  # torch gives NaN where nothing is seen
            seen = mask.unsqueeze(1)
            want = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
            got = qk.ops.attention(*args, mask).unflatten(-1, (heads, -1)).transpose(1, 2).double()
            scores = (q @ k.transpose(-1, -2) / math.sqrt(depth)).masked_fill(~seen, -math.inf)
            total = (scores - scores.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
            apart = ((v.unsqueeze(2) - want.unsqueeze(3)).abs() * seen.unsqueeze(-1)).sum(3)
            bound = e * apart / (total - seen.sum(-1, keepdim=True) * e).clamp(min=1)
            assert ((got - want).abs() <= bound + 4 * 2**-24 * (want.abs() + bound)).all()


def test_registration(device):
    args = problem(2, 5, 9, 2, 8, 12, device)
    mask = mask_of("rows", 2, 5, 9, device)
    torch.library.opcheck(torch.ops.qk.attention.default, tuple(args))
    torch.library.opcheck(torch.ops.qk.attention.default, (*args, mask, 0.3, *target(device), 8))


def test_threads_and_instruction_sets_change_no_bit(each_isa_and_threads):
    for sizes in ((1, 129, 129, 1, 33, 33), (2, 67, 40, 3, 32, 80)):
        args = problem(*sizes)
        mask = mask_of("rows", *sizes[:3])
        each_isa_and_threads(lambda a=args, m=mask: (qk.ops.attention(*a), qk.ops.attention(*a, m)))


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 150),
    heads=st.integers(1, 4),
    depth=st.integers(1, 90),
    width=st.integers(1, 90),
    zeros=st.tuples(*[st.sampled_from([0, 1, 128, 254, 255])] * 3),
    scale=st.sampled_from([None, None, 1e-3, 1.0]),
    kind=st.sampled_from(MASKS),
    dtype=st.sampled_from([torch.bool, torch.uint8]),
    out_bits=st.sampled_from([None, 2, 4, 7, 8]),
    count=st.integers(1, 8),
)
def test_any_attention_is_the_definition(
    batch, queries, keys, heads, depth, width, zeros, scale, kind, dtype, out_bits, count
):
    args = problem(batch, queries, keys, heads, depth, width, zeros=zeros)
    more = {"mask": mask_of(kind, batch, queries, keys, dtype=dtype), "scale": scale}
    if out_bits:
        out_step, out_zero = target("cpu", 0.3, 2)
        more |= {"out_step": out_step, "out_zero": out_zero, "out_bits": out_bits}
    want = reference(*args, **more)
    before = qk.active_isa()
    for isa in qk.usable_isas():
        qk.force_isa(isa)
        with threads(count):
            got = qk.ops.attention(*args, **more)
        qk.force_isa(before)
        assert torch.equal(got, want), isa


def u8(*shape):
    return torch.zeros(shape, dtype=torch.uint8)


def i32(value):
    return torch.tensor([value], dtype=I32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.zeros(2, 3, 8)}, r"q must be uint8 codes, as it has a step, got Float \[2, 3, 8\]"),
        ({"k": torch.zeros(2, 5, 8)}, "k must be uint8 codes"),
        ({"v": torch.zeros(2, 5, 6)}, "v must be uint8 codes"),
        ({"q_step": torch.ones(2)}, "q_step must be one value"),
        ({"q_step": torch.ones(1, dtype=torch.float64)}, "q_step must be Float, got Double"),
        ({"k_step": torch.zeros(1)}, "k_step must be positive and finite"),
        ({"v_step": torch.tensor([math.inf])}, "v_step must be positive and finite"),
        ({"q_zero": torch.zeros(2, dtype=I32)}, "q_zero must be one value"),
        ({"q_zero": torch.zeros(1)}, "q_zero must be Int, got Float"),
        ({"k_zero": i32(256)}, "k_zero must be a code from 0 to 255, got 256"),
        ({"v_zero": i32(-1)}, "v_zero must be a code from 0 to 255, got -1"),
        ({"heads": 0}, "heads must be 1 or more, got 0"),
        ({"heads": 3}, r"q must be \[B, queries, heads \* D\], heads = 3, got \[2, 3, 8\]"),
        ({"heads": 9}, "q must be .* heads = 9"),
        ({"q": u8(3, 8)}, "q must be .* heads = 2"),
        ({"k": u8(2, 5, 6)}, r"k must be \[B, keys, heads \* D\], for q \[2, 3, 8\], got \[2, 5, 6\]"),
        ({"k": u8(1, 5, 8)}, "k must be .* for q"),
        ({"k": u8(5, 8)}, "k must be .* for q"),
        ({"v": u8(2, 4, 6)}, r"v must be \[B, keys, heads \* E\], for k \[2, 5, 8\], got \[2, 4, 6\]"),
        ({"v": u8(1, 5, 6)}, "v must be .* for k"),
        ({"v": u8(2, 5, 7)}, "v must be .* for k"),
        ({"v": u8(2, 5, 0)}, "v must be .* for k"),
        ({"v": u8(5, 6)}, "v must be .* for k"),
        (
            {"q": u8(2, 3, LONGEST_DEPTH + 1), "k": u8(2, 5, LONGEST_DEPTH + 1), "heads": 1},
            "D must be at most 16512, for scores in int32, got 16513",
        ),
        (
            {"k": u8(2, MOST_KEYS + 1, 8), "v": u8(2, MOST_KEYS + 1, 6)},
            "keys must be at most 33025, for sums in int32, got 33026",
        ),
        ({"mask": torch.ones(2, 3, 5)}, "mask must be bool or uint8, got Float"),
        (
            {"mask": u8(2, 2, 5)},
            r"mask must be \[B or 1, queries or 1, keys\], for q \[2, 3, 8\] and k \[2, 5, 8\], got \[2, 2, 5\]",
        ),
        ({"mask": u8(3, 3, 5)}, "mask must be"),
        ({"mask": u8(2, 3, 1)}, "mask must be"),
        ({"mask": u8(2, 5)}, "mask must be"),
        ({"scale": 0.0}, "scale must be positive and finite, got 0"),
        ({"scale": -1.0}, "scale must be positive and finite, got -1"),
        ({"scale": math.nan}, "scale must be positive and finite"),
        ({"scale": 1e39}, "scale must be positive and finite, got inf"),
        ({"scale": 1e-50}, "scale must be positive and finite, got 0"),
        ({"out_step": torch.ones(1)}, "out_step and out_zero must be given together"),
        ({"out_bits": 9}, "out_bits must be a width from 2 to 8"),
        ({"out_step": torch.ones(1), "out_zero": i32(4), "out_bits": 2}, "out_zero must be a code from 0 to 3"),
        ({"out_step": torch.zeros(1), "out_zero": i32(0)}, "out_step must be positive and finite"),
    ],
)
def test_bad_input_is_refused(changed, message):
    one, zero = torch.ones(1), i32(0)
    args = {"q": u8(2, 3, 8), "k": u8(2, 5, 8), "v": u8(2, 5, 6), "heads": 2}
    args |= {f"{name}_step": one for name in "qkv"} | {f"{name}_zero": zero for name in "qkv"}
    qk.ops.attention(**args)
    with pytest.raises(RuntimeError, match="qk::attention: " + message):
        qk.ops.attention(**args | changed)
