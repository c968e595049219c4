"""Columns that are sums of others: equal to the definition, bit for bit."""

import itertools

import pytest
import torch

import qk
from qk.ops.index_put import reference
from sides import side, target

index_put = torch.ops.qk.index_put


def columns(count, terms, cols, others, device, seed=0):
    """index and source, with places where there is no term."""
    g = torch.Generator().manual_seed(seed)
    index = torch.randperm(cols, generator=g)[:count].int()
    source = torch.randint(-1, others, (terms, count), generator=g, dtype=torch.int32)
    return index.to(device), source.to(device)


CASES = [
    ((1, 1), 1, 1, 1),
    ((3, 67), 5, 2, 9),
    ((2, 5, 7, 130), 130, 3, 40),
    ((301, 64), 17, 2, 34),
    ((4, 2000), 700, 3, 1500),
    ((70,), 33, 1, 33),
    ((2, 0, 8), 3, 2, 6),
    ((5, 8), 0, 2, 4),
]


@pytest.mark.parametrize(("shape", "count", "terms", "others"), CASES)
@pytest.mark.parametrize("kinds", list(itertools.product((None, True, False), (True, False))))
def test_columns_equal_the_definition(shape, count, terms, others, kinds, device):
    residual_codes, codes = kinds
    x = side(shape, device, codes, 0)[0]
    added = side((*shape[:-1], others), device, False, 1)[0]
    at = columns(count, terms, shape[-1], others, device)
    residual = (None, None, None) if residual_codes is None else side(shape, device, residual_codes, 2)
    for activation in ("none", "relu6"):
        args = (x, added, *at, *residual, activation, *(target(device) if codes else ()))
        assert torch.equal(index_put(*args), reference(*args))


def test_values_that_are_not_finite_and_zeros_with_a_sign(device):
    odd = torch.tensor([[torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e-40, -0.0, 0.0, 6.0]], device=device)
    index, none = torch.arange(9, dtype=torch.int32, device=device), torch.full((1, 9), -1, dtype=torch.int32)
    source = torch.cat([torch.arange(9)[None].int(), none, torch.tensor([[-1, 2, 1, 3, 4, 5, 6, 6, 8]]).int()])
    x = torch.zeros(1, 9, device=device)
    behind = torch.tensor([[-1] * 9, [6] * 9]).int()  # 0 + -0 = 0
    for rows in (source[:2], source, behind, source[:0]):
        found, expected = (f(x, odd, index, rows.to(device)) for f in (index_put, reference))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(found.signbit() & (found == 0), expected.signbit() & (expected == 0))
    out = target(device)
    args = (x.to(torch.uint8), odd, index, source.to(device), None, None, None, "relu", *out)
    assert torch.equal(index_put(*args), reference(*args))


def test_any_strides_work(device):
    x, added = side((4, 6, 8), device, True, 0)[0], side((5, 6, 8), device, False, 1)[0]
    index, source = columns(3, 2, 4, 5, device)
    residual = side((4, 6, 8), device, True, 2)
    seen = [t.permute(1, 2, 0) for t in (x, added, residual[0])]
    args = (*seen[:2], index.repeat_interleave(2)[::2], source.t().contiguous().t(), seen[2], *residual[1:], "relu")
    assert index_put(*args, *target(device)).is_contiguous()
    assert torch.equal(index_put(*args, *target(device)), reference(*args, *target(device)))


def test_the_input_stays_as_it_is(device):
    x, added = torch.zeros(3, 8, device=device), torch.ones(3, 4, device=device)
    index, source = columns(2, 1, 8, 4, device)
    index_put(x, added, index, source.clamp(min=0))
    assert not x.any()


def test_registration(device):
    x, added = side((5, 33), device, True, 0)[0], side((5, 7), device, False, 1)[0]
    args = (x, added, *columns(6, 2, 33, 7, device), *side((5, 33), device, True, 2), "relu", *target(device))
    torch.library.opcheck(index_put.default, args)
    torch.library.opcheck(index_put.default, (added, added, *columns(3, 2, 7, 7, device)))


def test_threads_change_nothing(each_isa_and_threads):
    cpu = torch.device("cpu")
    x, added = side((3001, 71), cpu, True, 0)[0], side((3001, 19), cpu, False, 1)[0]
    args = (x, added, *columns(9, 3, 71, 19, cpu), *side((3001, 71), cpu, False, 2), "relu", *target(cpu))
    each_isa_and_threads(lambda: [index_put(*args)])


def test_bad_input_is_named():
    x, added = torch.zeros(2, 4), torch.zeros(2, 3)
    index, source = torch.tensor([1, 3]).int(), torch.tensor([[0, 2], [-1, 1]]).int()
    step, zero = target(torch.device("cpu"))
    for args, message in [
        ((x, added, index + 1, source), "qk::index_put: index must be a column from 0 to 3, got 4 at 1"),
        ((x, added, index - 2, source), "index must be a column from 0 to 3, got -1 at 0"),
        ((x, added, index, source + 1), "source must be a column from -1 to 2, got 3 at 1"),
        ((x, added, index, source - 1), "source must be a column from -1 to 2, got -2 at 2"),
        ((x, added, index.long(), source), "index must be Int"),
        ((x, added, index, source[:, :1]), r"source must be \[terms, count\]"),
        ((x, added, index, source[0]), r"source must be \[terms, count\]"),
        ((x, added[:1], index, source), "added must be of the shape of x"),
        ((x, added[0], index, source), "added must be of the shape of x"),
        ((x, added.double(), index, source), "added must be Float"),
        ((x.byte(), added, index, source), "x must be float32, as the result has no step"),
        ((x, added, index, source, None, None, None, "none", step, zero), "x must be uint8 codes"),
        ((x, added, index, source, x[:, :2]), "residual must be"),
        ((x, added, index, source, None, step, zero), "residual must be given where it has a step"),
        ((x[0, 0], added, index, source), r"x must be \[..., N\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.index_put(*args)
