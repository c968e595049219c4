"""Quantized embedding tables and the modules that look them up."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qk.deploy.embedding import QEmbedding, QEmbeddingBag, greedy_range, in_huge_pages, pack_table, row_loss
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
def test_minmax_gives_torchs_bytes(bits, prepack):
    x = normal(100, 64)
    assert torch.equal(pack_table(x, bits), getattr(torch.ops.quantized, f"embedding_bag_{prepack}_prepack")(x))


def test_greedy_finds_torchs_range():
    x = normal(40, 64)
    low, high = greedy_range(x, 4, torch.float16)
    for i, row in enumerate(x):
        high_torch, low_torch = torch.choose_qparams_optimized(row, 64, 200, 0.16, 4)
        ours = row_loss(row[None], low[i : i + 1], high[i : i + 1], 4, torch.float16)
        theirs = row_loss(row[None], low_torch.reshape(1), high_torch.reshape(1), 4, torch.float16)
        # torch sums the loss in another order, so of two nearly equal positions it may take the other one.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_greedy_on_worked_numbers():
    x = torch.tensor([[-1, -0.75, -0.5, -0.2, -0.05, 0, 0.1, 0.3, 0.35, 0.6, 0.8, 3]])
    low, high = greedy_range(x, 4, torch.float16)
    torch.testing.assert_close(torch.cat([low, high]), torch.tensor([-1.0, 2.96]))
    torch.testing.assert_close(row_loss(x, low, high, 4, torch.float16), torch.tensor([0.15098621]))


@pytest.mark.parametrize("bits", [2, 4])
def test_greedy_is_never_worse(bits):
    x = normal(100, 48)
    low, high = greedy_range(x, bits, torch.float16)
    greedy, minmax = row_loss(x, low, high, bits, torch.float16), row_loss(x, x.amin(1), x.amax(1), bits, torch.float16)
    assert bool((greedy <= minmax).all())
    assert greedy.mean() < 0.95 * minmax.mean()


def test_rows_without_extent():
    x = torch.tensor([[0.0] * 6, [2.5] * 6, [-1e-9] * 6])
    for method in ("minmax", "greedy"):
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
    assert in_huge_pages(table[:10]) is not None


def test_bad_input_is_named():
    x = normal(4, 6)
    for run, message in [
        (lambda: pack_table(x, 3), "qk.pack_table: bits must be 2, 4 or 8, got 3"),
        (lambda: pack_table(x, 4, "half"), "scale_dtype must be float16 or bfloat16 or float32, got half"),
        (lambda: pack_table(x, 4, "float16", "kmeans"), "method must be minmax or greedy, got kmeans"),
        (lambda: pack_table(x[0], 4), r"weight must be a float table \[N, cols\]"),
        (lambda: pack_table(x.int(), 4), r"weight must be a float table"),
        (lambda: pack_table(x / 0, 4), "weight must be finite, got NaN or Inf"),
        (lambda: pack_table(x * 1e6, 4), "weight must be within the range of float16"),
        (lambda: QEmbedding.from_float(nn.Embedding(3, 4, max_norm=1.0), 4), "max_norm must be None, got 1.0"),
    ]:
        with pytest.raises(QkError, match=message):
            run()
    with pytest.raises(RuntimeError, match="indices must be from 0 to 3"):
        QEmbedding.from_float(nn.Embedding(4, 6), 4)(torch.tensor([4]))
