"""How a matrix product is cut into tiles, blocks of rows and shares of threads (csrc/core/cut.h)."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qk import _core

TILES = {"avx512vnni": (9, 3, 6, 4), "avx2": (6, 1, 6, 1), "amx": (32, 2, 32, 2)}
WORK_PER_THREAD = 1 << 19


def make(rows, n, k, threads, tile="avx512vnni", row_unit=1, groups=1):
    return _core.cut(rows, row_unit, n, k, groups, TILES[tile], threads)


def shares(c):
    """Units of each worker, as igemm.simd.cpp hands them out."""
    return [c["units"] * (i + 1) // c["workers"] - c["units"] * i // c["workers"] for i in range(c["workers"])]


@settings(max_examples=500, deadline=None)
@given(
    rows=st.integers(1, 5000),
    n=st.integers(1, 12000),
    k=st.integers(1, 12000),
    threads=st.integers(1, 128),
    tile=st.sampled_from(sorted(TILES)),
    unit=st.sampled_from([1, 1, 7, 14, 56, 112]),
    groups=st.sampled_from([1, 1, 1, 2, 5]),
)
def test_every_row_and_block_is_computed_once(rows, n, k, threads, tile, unit, groups):
    unit = min(unit, rows)
    n = (n + 1) * groups  # one output channel of each group would be depthwise, which is not a product
    c = make(rows, n, k, threads, tile, unit, groups)
    most_rows, most_blocks, few_rows, few_blocks = TILES[tile]
    blocks = -(-n // groups // 16)
    assert 1 <= c["tile_rows"] <= most_rows
    assert c["tile_blocks"] <= (few_blocks if c["tile_rows"] <= few_rows else most_blocks)
    assert (c["row_blocks"] - 1) * c["block_rows"] < rows <= c["row_blocks"] * c["block_rows"]
    assert c["block_rows"] % unit == 0
    widths = [blocks * (i + 1) // c["columns"] - blocks * i // c["columns"] for i in range(c["columns"])]
    assert sum(widths) == blocks
    assert min(widths) >= 1
    assert max(widths) <= c["tile_blocks"]
    assert c["units"] == groups * c["row_blocks"] * c["columns"]
    assert 1 <= c["workers"] <= min(threads, c["units"])
    assert min(shares(c)) >= 1


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("threads", [2, 4, 16, 64])
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [
        (1, 4096, 4096),
        (1, 11008, 4096),
        (1, 50000, 1024),
        (16, 768, 3072),
        (49, 2048, 512),
        (128, 512, 512),
        (128, 11008, 4096),
        (300, 1000, 2048),
        (512, 768, 3072),
        (3136, 64, 64),
        (5000, 16, 576),
        (12544, 64, 147),
    ],
)
def test_threads_are_busy(rows, n, k, threads, tile):
    c = make(rows, n, k, threads, tile)
    work = rows * -(-n // 16) * 16 * k
    useful = max(1, min(threads, work // WORK_PER_THREAD))
    all_tiles = -(-rows // TILES[tile][0]) * -(-n // 16)
    assert c["workers"] >= min(useful, all_tiles)
    assert max(shares(c)) <= 1.5 * c["units"] / c["workers"]


def test_small_products_stay_on_one_thread():
    assert make(1, 512, 512, 64)["workers"] == 1


def test_a_row_times_a_layer_of_bert_takes_both_threads():
    assert make(1, 768, 3072, 2)["workers"] == make(1, 3072, 768, 2)["workers"] == 2


def test_rows_in_one_block_when_they_fit():
    for rows, k in [(128, 512), (128, 4096), (512, 768)]:
        assert make(rows, 3072, k, 1)["row_blocks"] == 1


def test_few_rows_take_wide_tiles_of_equal_height():
    assert [make(rows, 3072, 768, 1)["tile_rows"] for rows in (1, 6, 9, 10, 16, 18, 128)] == [1, 6, 9, 5, 8, 9, 9]
    assert [make(rows, 3072, 768, 1)["tile_blocks"] for rows in (1, 6, 9, 10, 16)] == [4, 4, 3, 4, 3]


@pytest.mark.parametrize("bad", [{"rows": 0}, {"threads": 0}, {"n": 0}, {"k": 2**31}, {"row_unit": 0}])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="cut's arguments"):
        make(**({"rows": 4, "n": 16, "k": 16, "threads": 1} | bad))
