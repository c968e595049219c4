"""Sums, means and maxima over packed rows: equal to the definition, bit for bit."""

import itertools

import pytest
import torch

import qk
from qk.ops.embedding_bag import DTYPES, reference, row_bytes

embedding_bag = torch.ops.qk.embedding_bag
FORMATS = [
    *itertools.product([2, 4, 8], ["affine"], DTYPES, [True, False]),
    *itertools.product([2, 4], ["codebook"], DTYPES, [True, False]),
    (2, "shared", "float16", True),
    (4, "shared", "float16", False),
]
COLS = [1, 3, 8, 15, 16, 31, 32, 33, 64, 65, 100, 128, 130, 256, 300]


def table(count, bits, cols, kind, dtype, codes_first, device, seed=0):
    """Rows of random codes with sensible numbers, and their books."""
    g = torch.Generator().manual_seed(seed)
    code_size, number_size = row_bytes(cols, bits, kind, dtype)
    codes = torch.randint(0, 256, (count, code_size), generator=g, dtype=torch.uint8)
    books = torch.randn(7, 2**bits, generator=g) if kind == "shared" else None
    if kind == "shared":
        numbers = torch.randint(0, 7, (count, 1), generator=g, dtype=torch.int32)
    else:
        numbers = torch.randn(count, number_size // DTYPES[dtype].itemsize, generator=g).to(DTYPES[dtype])
    parts = [codes, numbers.view(torch.uint8)]
    rows = torch.cat(parts if codes_first else parts[::-1], 1)
    return rows.to(device), None if books is None else books.to(device)


def bags(count, device, dtype=torch.int64, lengths=(3, 0, 1, 17, 40, 2, 0), seed=1):
    g = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    indices = torch.randint(0, count, (int(ends[-1]),), generator=g)
    return indices.to(dtype).to(device), ends.to(dtype).to(device)


@pytest.mark.parametrize("cols", COLS)
@pytest.mark.parametrize("form", FORMATS)
def test_bags_equal_the_definition(form, cols, device):
    bits, kind, dtype, codes_first = form
    rows, books = table(50, bits, cols, kind, dtype, codes_first, device)
    indices, ends = bags(50, device)
    weights = torch.randn(indices.shape, generator=torch.Generator().manual_seed(2)).to(device)
    for mode, per_sample in (("sum", None), ("sum", weights), ("mean", None), ("max", None)):
        args = (rows, indices, ends, bits, cols, kind, dtype, codes_first, books, mode, per_sample, True)
        assert torch.equal(embedding_bag(*args), reference(*args))


@pytest.mark.parametrize("index", list(itertools.product([torch.int32, torch.int64], repeat=2)))
@pytest.mark.parametrize("padding", [None, 0, 3, -1])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_indices_offsets_and_padding(index, padding, mode, device):
    rows, _ = table(5, 4, 40, "affine", "float16", True, device)
    indices, ends = bags(5, device, index[0])
    ends = ends.to(index[1])
    for offsets, include_last in ((ends, True), (ends[:-1], False)):
        args = (rows, indices, offsets, 4, 40, "affine", "float16", True, None, mode, None, include_last, padding)
        assert torch.equal(embedding_bag(*args), reference(*args))
    two = indices[:60].reshape(5, 12)
    args = (rows, two, None, 4, 40, "affine", "float16", True, None, mode, None, False, padding)
    assert torch.equal(embedding_bag(*args), reference(*args))


def test_it_is_torchs_embedding_bag(device):
    rows, _ = table(20, 8, 24, "affine", "float32", True, device)
    weight = qk.ops.embedding_bag(rows, torch.arange(20, device=device).unsqueeze(1), None, 8, 24, dtype="float32")
    indices, ends = bags(20, device)
    for mode in ("sum", "mean", "max"):
        ours = qk.ops.embedding_bag(
            rows, indices, ends, 8, 24, dtype="float32", mode=mode, include_last_offset=True, padding_idx=4
        )
        theirs = torch.nn.functional.embedding_bag(
            indices, weight, ends, mode=mode, include_last_offset=True, padding_idx=4
        )
        # Sums of at most 40 values of at most 5 * 255 in another order: 40 additions of 2^-24 each.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=40 * 40 * 1500 * 2**-24)


@pytest.mark.parametrize(("bits", "prepack"), [(8, "byte"), (4, "4bit"), (2, "2bit")])
def test_torchs_packed_tables_are_read_as_they_are(bits, prepack):
    w = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    rows = getattr(torch.ops.quantized, f"embedding_bag_{prepack}_prepack")(w)
    values = getattr(torch.ops.quantized, f"embedding_bag_{prepack}_unpack")(rows)
    dtype = "float32" if bits == 8 else "float16"
    ours = qk.ops.embedding_bag(rows, torch.arange(30).unsqueeze(1), None, bits, 64, dtype=dtype)
    # torch may fuse code * scale + offset, which then rounds once.
    torch.testing.assert_close(ours, values, rtol=0, atol=2**-22 * float(w.abs().max()))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_may_lie_apart(bits, device):
    rows, _ = table(50, bits, 65, "affine", "float16", True, device)
    wide = torch.zeros(50, rows.shape[1] + 13, dtype=torch.uint8, device=device)
    wide[:, : rows.shape[1]] = rows
    indices, ends = bags(50, device)
    for seen in (wide[:, : rows.shape[1]], rows.t().contiguous().t(), rows[:1].expand(50, -1), rows[::2]):
        args = (seen, indices % seen.shape[0], ends, bits, 65)
        args = (*args, "affine", "float16", True, None, "sum", None, True)
        assert torch.equal(embedding_bag(*args), reference(*args))


@pytest.mark.parametrize("mode", ["sum", "max"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("bits", "kind"), [(2, "affine"), (4, "affine"), (8, "affine"), (2, "codebook"), (4, "codebook")]
)
def test_numbers_that_are_not_finite(bits, kind, dtype, mode, device):
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 6e-8, 65504.0, -0.0, 1e-4, -6e-8])
    numbers = torch.cartesian_prod(odd, odd)
    if kind == "codebook":
        numbers = numbers.repeat(1, 2 ** (bits - 1)).roll(1, 1)
    codes = torch.tensor([[0, 0x0E, 0x1E, 0xFF]], dtype=torch.uint8).expand(64, 4)
    rows = torch.cat([codes, numbers.to(DTYPES[dtype]).view(torch.uint8)], 1).to(device)
    indices = torch.randint(0, 64, (100, 3), generator=torch.Generator().manual_seed(0)).to(device)
    args = (rows, indices, None, bits, 32 // bits, kind, dtype, True, None, mode)
    ours, wanted = embedding_bag(*args), reference(*args)
    assert torch.equal(ours.nan_to_num(nan=123.0), wanted.nan_to_num(nan=123.0))


def test_nothing_to_look_up(device):
    rows, _ = table(5, 4, 40, "affine", "float16", True, device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    assert qk.ops.embedding_bag(rows, none, none, 4, 40).shape == (0, 40)
    two = torch.zeros(2, dtype=torch.int64, device=device)
    assert torch.equal(qk.ops.embedding_bag(rows, none, two, 4, 40), torch.zeros(2, 40, device=device))
    assert torch.equal(qk.ops.embedding_bag(rows, none.reshape(3, 0), None, 4, 40), torch.zeros(3, 40, device=device))
    assert qk.ops.embedding_bag(rows[:0], none, two, 4, 40).abs().sum() == 0


@pytest.mark.parametrize("form", [(4, "affine", "float16", True), (2, "shared", "float16", False)])
def test_registration(form, device):
    rows, books = table(20, form[0], 33, *form[1:], device)
    indices, ends = bags(20, device)
    weights = torch.ones(indices.shape, device=device)
    torch.library.opcheck(
        embedding_bag.default, (rows, indices, ends, form[0], 33, *form[1:], books, "sum", weights, True, 2)
    )
    torch.library.opcheck(
        embedding_bag.default, (rows, indices[:12].reshape(3, 4), None, form[0], 33, *form[1:], books)
    )


def test_threads_change_nothing(each_isa_and_threads):
    rows, _ = table(1000, 4, 128, "affine", "float16", True, torch.device("cpu"))
    indices, ends = bags(1000, torch.device("cpu"), lengths=tuple(range(60)))
    weights = torch.randn(indices.shape)
    each_isa_and_threads(
        lambda: [
            qk.ops.embedding_bag(rows, indices, ends, 4, 128, per_sample_weights=weights, include_last_offset=True)
        ]
    )


def test_what_names_no_row_is_named(device):
    rows, books = table(5, 4, 40, "shared", "float16", True, device)
    for wrong in (5, -1, 2**40, -(2**62)):
        indices = torch.tensor([[0, 1], [wrong, 2]], device=device)
        if device.type == "cuda":
            found = qk.ops.embedding_bag(rows, indices, None, 4, 40, "shared", books=books)
            assert found.isnan().any(1).tolist() == found.isnan().all(1).tolist() == [False, True]
        else:
            with pytest.raises(
                RuntimeError, match=f"indices must be from 0 to 4, the numbers of rows, got {wrong} at 2"
            ):
                qk.ops.embedding_bag(rows, indices, None, 4, 40, "shared", books=books)
    rows[3, -4:] = torch.tensor([7, 0, 0, 0], dtype=torch.uint8, device=device)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="rows must be with the number of one of 7 books each, got 7 in row 3"):
            qk.ops.embedding_bag(rows, torch.tensor([[2, 3]]), None, 4, 40, "shared", books=books)


def test_bad_input_is_named():
    rows, books = table(5, 4, 40, "shared", "float16", True, torch.device("cpu"))
    plain, _ = table(5, 4, 40, "affine", "float16", True, torch.device("cpu"))
    indices, ends = bags(5, torch.device("cpu"))
    call = qk.ops.embedding_bag
    for run, message in [
        (lambda: call(plain.int(), indices, ends, 4, 40), "qk::embedding_bag: rows must be Byte, got Int"),
        (lambda: call(plain[0], indices, ends, 4, 40), r"rows must be \[N, bytes of a row\], got Byte \[24\]"),
        (lambda: call(plain, indices, ends, 3, 40), "bits must be 2, 4 or 8, got 3"),
        (lambda: call(plain, indices, ends, 4, 0), "cols must be positive"),
        (lambda: call(plain, indices, ends, 4, 42), r"rows must be \[N, 25\]: 21 bytes of codes and 4 of numbers"),
        (lambda: call(plain, indices, ends, 4, 40, "lut"), "kind must be affine, codebook or shared, got lut"),
        (lambda: call(plain, indices, ends, 4, 40, "affine", "half"), "dtype must be float16, bfloat16 or float32"),
        (lambda: call(plain, indices, ends, 8, 20, "codebook"), "bits must be 2 or 4 for rows with codebooks, got 8"),
        (lambda: call(rows, indices, ends, 4, 40, "shared"), "books must be given for kind shared, and only then"),
        (lambda: call(rows, indices, ends, 4, 40, "shared", books=books[:, 1:]), r"books must be \[books, 2\^bits\]"),
        (lambda: call(plain, indices.float(), ends, 4, 40), "indices must be int32 or int64, got Float"),
        (lambda: call(plain, indices, None, 4, 40), r"indices must be \[bags, bag_size\] without offsets"),
        (lambda: call(plain, indices.reshape(1, -1), ends, 4, 40), r"indices must be \[count\] beside offsets"),
        (lambda: call(plain, indices, ends.float(), 4, 40), "offsets must be int32 or int64"),
        (lambda: call(plain, indices, ends + 1, 4, 40), "offsets must be 0 first, never falling"),
        (lambda: call(plain, indices, ends.flip(0), 4, 40), "offsets must be 0 first, never falling"),
        (lambda: call(plain, indices, ends * 2, 4, 40), "offsets must be 0 first, never falling, at most 63"),
        (lambda: call(plain, indices, ends[:-2], 4, 40, include_last_offset=True), "offsets must be up to 63"),
        (lambda: call(plain, indices, ends[:0], 4, 40), "offsets must be one for each bag, got none"),
        (lambda: call(plain, indices[:0], ends[:0], 4, 40, include_last_offset=True), "one more than there are bags"),
        (lambda: call(plain, indices, ends, 4, 40, mode="prod"), "mode must be sum, mean or max, got prod"),
        (
            lambda: call(plain, indices, ends, 4, 40, mode="max", per_sample_weights=indices.float()),
            "mode must be sum with per_sample_weights, got max",
        ),
        (
            lambda: call(plain, indices, ends, 4, 40, per_sample_weights=indices.float()[1:]),
            "per_sample_weights must be of the shape of indices",
        ),
        (lambda: call(plain, indices, ends, 4, 40, padding_idx=5), "padding_idx must be the number of one of 5 rows"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            run()
