"""Tables that are quantized from file to file, a piece at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qk.deploy import load_table, quantize_table, quantize_table_file
from qk.errors import QkError
from resident import measured, needs_proc


@pytest.fixture(scope="module")
def x():
    return torch.randn(1000, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def npy(x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    return tmp_path / "x.npy"


def same(found, table):
    assert torch.equal(found.rows, table.rows)
    assert (found.bits, found.cols) == (table.bits, table.cols)
    number = torch.arange(len(table.rows))
    assert torch.equal(found(number), table.values())


@pytest.mark.parametrize(
    ("bits", "method", "dtype"),
    [(4, "greedy", "float16"), (2, "histogram", "bfloat16"), (8, "asymmetric", "float32"), (4, "kmeans", "float16")],
)
@pytest.mark.parametrize("mapped", [False, True])
def test_the_file_holds_what_the_table_in_memory_would(x, npy, tmp_path, bits, method, dtype, mapped):
    path = quantize_table_file(npy, tmp_path / "q", bits, method, dtype, chunk_rows=77)
    same(load_table(path, mapped), quantize_table(x, bits, method, dtype))


def test_two_tier_too(x, npy, tmp_path):
    path = quantize_table_file(npy, tmp_path / "q", 4, "two-tier", chunk_rows=77, books=5)
    same(load_table(path), quantize_table(x, 4, "two-tier", books=5))
    same(load_table(path, mapped=True), quantize_table(x, 4, "two-tier", books=5))


def test_every_kind_of_source(x, npy, tmp_path):
    save_file({"a": x, "b": x.half()}, tmp_path / "x.safetensors")
    save_file({"a": x}, tmp_path / "one.safetensors")
    expected = quantize_table(x)
    sources = [npy, str(npy), np.load(npy, mmap_mode="r"), x, tmp_path / "one.safetensors"]
    for source in sources:
        same(load_table(quantize_table_file(source, tmp_path / "q", chunk_rows=300)), expected)
    same(load_table(quantize_table_file(tmp_path / "x.safetensors", tmp_path / "q", tensor="a")), expected)
    half = load_table(quantize_table_file(tmp_path / "x.safetensors", tmp_path / "q", tensor="b"))
    same(half, quantize_table(x.half()))


def test_bytes_of_numbers_may_come_in_either_order(x, tmp_path):
    np.save(tmp_path / "big.npy", x.numpy().astype(">f4"))
    same(load_table(quantize_table_file(tmp_path / "big.npy", tmp_path / "q")), quantize_table(x))


def test_a_source_that_gives_fewer_rows_than_it_says_leaves_what_was_there(x, tmp_path):
    class Short:
        shape = (1100, 24)

        def __getitem__(self, rows):
            return x[rows]

    quantize_table_file(x, tmp_path / "q")
    before = (tmp_path / "q").read_bytes()
    with pytest.raises(
        QkError, match=r"rows 900 to 1100 of source must be as many .* \[1100, 24\], got a piece \[100, 24"
    ):
        quantize_table_file(Short(), tmp_path / "q", chunk_rows=300)
    assert (tmp_path / "q").read_bytes() == before


@pytest.mark.parametrize("rows", [0, 1])
def test_short_tables(rows, tmp_path):
    x = torch.ones(rows, 5)
    for mapped in (False, True):
        same(load_table(quantize_table_file(x, tmp_path / "q"), mapped), quantize_table(x))


def test_rows_are_read_a_piece_at_a_time(x, tmp_path):
    pieces = []

    class Watched:
        shape = tuple(x.shape)

        def __getitem__(self, which):
            pieces.append(which.stop - which.start)
            return x[which]

    quantize_table_file(Watched(), tmp_path / "q", 4, "asymmetric", chunk_rows=100)
    assert pieces == [100] * 10


MEMORY = Path(__file__).with_name("memory.py")
# Arrays of a piece that are there at once, in its own size (32 columns of float32), rounded up. By a range: the piece,
# its columns side by side and one more for the walk, and two while codes are rounded. k-means: the piece, it again in
# float64 (2), the number of each value's nearest in int64 (2), and of half as many centres float64, float32, and
# float64 again with the middles between them (1 + 0.5 + 2).
AT_ONCE = {"asymmetric": 5, "greedy": 5, "kmeans": 10}
ASIDE = 2  # MB; the dynamic program of k-means has 64 rows at once, twice [32, 32, 64] float64


@needs_proc
@pytest.mark.parametrize("method", AT_ONCE)
def test_memory_is_that_of_a_piece(method, tmp_path):
    found = measured(MEMORY, tmp_path, method, 1 << 11)
    bound = AT_ONCE[method] * found["piece"] + ASIDE
    assert found["peak"] < bound < 0.75 * found["table"]


@pytest.mark.slow
@needs_proc
def test_the_measure_sees_a_table_in_memory(tmp_path):
    found = measured(MEMORY, tmp_path, "asymmetric", 1 << 16)
    assert found["peak"] > found["table"] == found["piece"]


def test_interrupted_it_leaves_what_was_there(x, tmp_path):
    out = tmp_path / "q"
    quantize_table_file(x, out)
    before = out.read_bytes()

    class Interrupted:
        shape = (5000, 24)

        def __getitem__(self, which):
            if which.start > 2000:
                raise KeyboardInterrupt
            return torch.zeros(which.stop - which.start, 24)

    with pytest.raises(KeyboardInterrupt):
        quantize_table_file(Interrupted(), out, chunk_rows=500)
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["q"]


def test_a_value_that_is_not_finite_leaves_nothing(x, tmp_path):
    spoilt = x.clone()
    spoilt[900, 3] = torch.inf
    with pytest.raises(QkError, match=r"qk.quantize_table_file: weight must be finite"):
        quantize_table_file(spoilt, tmp_path / "q", chunk_rows=100)
    assert not list(tmp_path.iterdir())


def test_values_too_small_for_float16_leave_nothing_unless_others_are_larger(x, tmp_path):
    small = x * 1e-8
    with pytest.raises(QkError, match=r"qk.quantize_table_file: weight must be with a value of at least 1e-06"):
        quantize_table_file(small, tmp_path / "q", chunk_rows=100)
    assert not list(tmp_path.iterdir())
    small[-1] = x[-1]
    quantize_table_file(small, tmp_path / "q", chunk_rows=100)


def test_bad_arguments_are_named(x, npy, tmp_path):
    save_file({"a": x, "b": x + 1}, tmp_path / "two.safetensors")
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "cut.npy").write_bytes(npy.read_bytes()[:50])
    for source, more, words in [
        (npy, {"chunk_rows": 0}, "chunk_rows must be a whole number of at least 1, got 0"),
        (npy, {"bits": 3}, "bits must be 2, 4 or 8, got 3"),
        (npy, {"method": "best"}, "method must be symmetric or"),
        (npy, {"books": 4}, "options must be bins, ratio for greedy, got books"),
        (tmp_path / "x.bin", {}, "must be a .npy or .safetensors file, got .bin"),
        (tmp_path / "none.npy", {}, "must be a readable .npy"),
        (tmp_path / "cut.npy", {}, "must be a readable .npy"),
        (tmp_path / "two.safetensors", {}, "tensor must be one of a, b, got None"),
        (x[0], {}, r"source must be a float table \[N, cols\]"),
        (x.int(), {}, r"source must be a float table"),
        (object(), {}, r"source must be a float table"),
    ]:
        with pytest.raises(QkError, match=words):
            quantize_table_file(source, tmp_path / "q", **more)
    with pytest.raises(QkError, match="must be a file that can be written"):
        quantize_table_file(x, npy / "q")


def test_a_file_that_is_no_table_is_refused(x, npy, tmp_path):
    path = quantize_table_file(x, tmp_path / "q")
    content = path.read_bytes()
    save_file({"rows": x}, tmp_path / "other")
    (tmp_path / "cut").write_bytes(content[:-10])
    (tmp_path / "edited").write_bytes(content.replace(b'"bits":"4"', b'"bits":"8"'))
    for name in ("none", "other", "cut", "edited", "x.npy"):
        for mapped in (False, True):
            with pytest.raises(QkError, match=r"qk.load_table: .* Write it again"):
                load_table(tmp_path / name, mapped)
