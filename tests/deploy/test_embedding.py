"""Quantized embedding tables and the modules that look them up."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qk.deploy.embedding import QEmbedding, QEmbeddingBag, pack_table
from qk.deploy.pages import in_huge_pages
from qk.errors import QkError
from qk.ops.embedding_bag import values


def normal(rows, cols, seed=0):
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_value_is_at_most_half_a_step_off(bits, dtype):
    x = normal(50, 37)
    rows = pack_table(x, bits, dtype)
    step = (x.amax(1) - x.amin(1)) / (2**bits - 1)
    # Rounding scale and offset moves the ends of a row: by 2^-8 of its largest value for bfloat16.
    slack = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-20}[dtype] * x.abs().amax(1) * 2
    assert bool(((values(rows, bits, 37, dtype=dtype) - x).abs() <= (step / 2 + slack)[:, None]).all())


@pytest.mark.parametrize(("bits", "prepack"), [(4, "4bit"), (2, "2bit")])
def test_asymmetric_gives_torchs_bytes(bits, prepack):
    x = normal(100, 64)
    assert torch.equal(pack_table(x, bits), getattr(torch.ops.quantized, f"embedding_bag_{prepack}_prepack")(x))


def test_rows_without_extent():
    x = torch.tensor([[0.0] * 6, [2.5] * 6, [-1e-9] * 6])
    for method in ("asymmetric", "greedy"):
        assert torch.equal(values(pack_table(x, 4, "float16", method), 4, 6)[:2], x[:2])
        assert torch.equal(values(pack_table(x, 4, "float32", method), 4, 6, dtype="float32"), x)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_the_bag_module_is_the_float_one_on_the_tables_values(mode):
    float_module = nn.EmbeddingBag(30, 24, mode=mode, include_last_offset=True, padding_idx=3)
    module = QEmbeddingBag.from_float(float_module, 4)
    float_module.weight.data = values(module.rows, 4, 24)
    indices = torch.randint(0, 30, (40,), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([0, 5, 5, 20, 40])
    # Sums of 20 values of at most 4 in another order.
    torch.testing.assert_close(module(indices, ends), float_module(indices, ends), rtol=0, atol=20 * 20 * 4 * 2**-24)
    two = indices.reshape(8, 5)
    plain = QEmbeddingBag(module.rows, 4, 24, mode=mode)
    weight = float_module.weight.data
    wanted = nn.functional.embedding_bag(two, weight, mode=mode)
    torch.testing.assert_close(plain(two), wanted, rtol=0, atol=20 * 20 * 4 * 2**-24)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_plain_module_gives_the_tables_values(bits):
    module = QEmbedding.from_float(nn.Embedding(30, 24, padding_idx=0), bits, method="greedy")
    indices = torch.randint(0, 30, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    assert torch.equal(module(indices), values(module.rows, bits, 24)[indices])
    assert module(indices[:0]).shape == (0, 3, 4, 24)


def test_copies_pickles_and_states():
    module = QEmbedding.from_float(nn.Embedding(30, 24), 4)
    indices = torch.arange(30)
    other = QEmbedding.from_float(nn.Embedding(30, 24), 4)
    other.load_state_dict(module.state_dict())
    for same in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), other, copy.deepcopy(module).half()):
        assert torch.equal(same(indices), module(indices))


def test_books_stay_float32():
    module = QEmbedding(torch.zeros(3, 8, dtype=torch.uint8), 4, 8, "shared", books=normal(2, 16)).half()
    assert module.books.dtype == torch.float32
    assert module(torch.tensor([1])).shape == (1, 8)


def test_a_large_table_keeps_its_values():
    table = torch.randint(0, 256, (70_000, 68), dtype=torch.uint8)
    assert torch.equal(in_huge_pages(table), table)
    assert in_huge_pages(table[:10]).data_ptr() == table.data_ptr()  # small ones stay where they are


def test_bad_input_is_named():
    x = normal(4, 6)
    for run, message in [
        (lambda: pack_table(x, 3), "qk.pack_table: bits must be 2, 4 or 8, got 3"),
        (lambda: pack_table(x, 4, "half"), "scale_dtype must be float16 or bfloat16 or float32, got half"),
        (lambda: pack_table(x, 4, "float16", "median"), "method must be symmetric or .* or two-tier, got median"),
        (lambda: pack_table(x[0], 4), r"weight must be a float table \[N, cols\]"),
        (lambda: pack_table(x.int(), 4), r"weight must be a float table"),
        (lambda: pack_table(x / 0, 4), "weight must be finite, got NaN or Inf"),
        (lambda: pack_table(x * 1e6, 4), "weight must be within the range of float16"),
        (lambda: pack_table(x * 1e-7, 4), "weight must be with a value of at least 1e-06 for scales of float16, got"),
        (lambda: pack_table(x * 1e-7, 4, "float16", "kmeans"), "weight must be with a value of at least 1e-06"),
        (lambda: QEmbedding.from_float(nn.Embedding(3, 4, max_norm=1.0), 4), "max_norm must be None, got 1.0"),
    ]:
        with pytest.raises(QkError, match=message):
            run()
    small = torch.cat([x, x * 1e-7, x * 0])
    for table, dtype in ((small, "float16"), (x * 1e-7, "bfloat16"), (x * 1e-7, "float32"), (x * 0, "float16")):
        assert pack_table(table, 4, dtype).shape[0] == len(table)
    with pytest.raises(RuntimeError, match="indices must be from 0 to 3"):
        QEmbedding.from_float(nn.Embedding(4, 6), 4)(torch.tensor([4]))
