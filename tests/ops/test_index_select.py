"""Columns of codes: equal to the definition."""

import pytest
import torch

import qk
from qk.ops.index_select import reference

index_select = torch.ops.qk.index_select


def given(shape, count, device):
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)
    return codes.to(device), torch.randint(0, shape[-1], (count,), generator=g, dtype=torch.int32).to(device)


@pytest.mark.parametrize("shape", [(1,), (70,), (3, 1), (2, 5, 7, 130), (700, 64), (2, 0, 8), (3, 300), (2, 70000)])
@pytest.mark.parametrize("count", [0, 1, 13, 64, 200])
def test_columns_equal_the_definition(shape, count, device):
    args = given(shape, count, device)
    assert torch.equal(index_select(*args), reference(*args))


def test_any_strides_work(device):
    codes, index = given((9, 5, 7), 12, device)
    args = (codes.permute(2, 1, 0), (index % 9).repeat_interleave(2)[::2])
    assert index_select(*args).is_contiguous()
    assert torch.equal(index_select(*args), reference(*args))


def test_registration(device):
    torch.library.opcheck(index_select.default, given((2, 3, 33), 40, device))


def test_threads_change_nothing(each_isa_and_threads):
    args = given((3001, 71), 19, torch.device("cpu"))
    each_isa_and_threads(lambda: [index_select(*args)])


def test_bad_input_is_named():
    codes, index = given((2, 4), 3, torch.device("cpu"))
    for args, message in [
        ((codes, index * 0 + 4), "qk::index_select: index must be a column from 0 to 3, got 4 at 0"),
        ((codes, index * 0 - 1), "index must be a column from 0 to 3, got -1 at 0"),
        ((codes, index.long()), "index must be Int"),
        ((codes, index[None]), r"index must be \[count\]"),
        ((codes.float(), index), "codes must be Byte"),
        ((codes[0, 0], index), r"codes must be \[..., C\]"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.index_select(*args)
