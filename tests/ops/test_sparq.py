"""SPARQ against the published family tables, and every kernel against the definition."""

import pytest
import torch

import qk
from qk.ops.sparq import FAMILIES, reference, window

sparq = torch.ops.qk.sparq
family = pytest.mark.parametrize("family", FAMILIES)

# a -> (cut off, rounded), each value alone in its window
FOUR_BITS = ("5opt", "3opt", "2opt")
FOUR_BIT_VALUES = {
    15: ((15, 15), (15, 15), (15, 15)),
    17: ((16, 16), (16, 16), (16, 16)),
    24: ((24, 24), (24, 24), (16, 32)),
    27: ((26, 28), (24, 28), (16, 32)),
    31: ((30, 30), (28, 32), (16, 32)),
    33: ((32, 32), (32, 32), (32, 32)),
    47: ((44, 48), (44, 48), (32, 48)),
    63: ((60, 60), (60, 60), (48, 64)),
    90: ((88, 88), (80, 96), (80, 96)),
    100: ((96, 96), (96, 96), (96, 96)),
    119: ((112, 120), (112, 112), (112, 112)),
    127: ((120, 120), (112, 128), (112, 128)),
    136: ((128, 128), (128, 128), (128, 128)),
    171: ((160, 176), (160, 176), (160, 176)),
    200: ((192, 192), (192, 192), (192, 192)),
    243: ((240, 240), (240, 240), (240, 240)),
    248: ((240, 240), (240, 240), (240, 240)),
    255: ((240, 240), (240, 240), (240, 240)),
}
FEWER = ("6opt", "7opt", "pair window of 6opt")
FEWER_VALUES = {
    9: ((8, 8), (8, 8), (9, 9)),
    27: ((24, 28), (24, 24), (27, 27)),
    90: ((80, 96), (64, 96), (90, 90)),
    119: ((112, 112), (96, 96), (118, 120)),
    171: ((160, 160), (128, 192), (168, 172)),
    243: ((224, 224), (192, 192), (240, 244)),
    255: ((224, 224), (192, 192), (252, 252)),
}
# sums over a = 0..255 of |error|, error^2, error
ERRORS = {
    ("5opt", False): (1240, 11160, -1240),
    ("5opt", True): (750, 4160, -170),
    ("3opt", False): (1512, 15048, -1512),
    ("3opt", True): (874, 5104, -136),
    ("2opt", False): (1800, 18600, -1800),
    ("2opt", True): (1016, 6056, -120),
    ("6opt", False): (2604, 47244, -2604),
    ("6opt", True): (1674, 21204, -682),
    ("7opt", False): (5334, 194310, -5334),
    ("7opt", True): (4032, 122142, -2730),
    ("pair window of 6opt", False): (224, 480, -224),
    ("pair window of 6opt", True): (162, 232, -10),
}
# sums of the four pairs of the worked example: cut off, rounded
PAIRS = {
    "5opt": ((81, -944, 0, 28560), (81, -1056, 0, 28560)),
    "3opt": ((81, -960, 0, 28560), (81, -1040, 0, 28560)),
    "2opt": ((81, -960, 0, 28560), (81, -1040, 0, 28560)),
    "6opt": ((81, -960, 0, 26656), (81, -928, 0, 26656)),
    "7opt": ((78, -768, 0, 22848), (84, -1152, 0, 22848)),
}


def alone(values, name, round, device):
    """The values cut as if none had a partner of 0; the pair window by giving each a partner of 0."""
    codes = torch.tensor(values, dtype=torch.uint8, device=device)
    if name == "pair window of 6opt":
        return sparq(torch.stack([codes, torch.zeros_like(codes)], -1), 3, 1, round, True)[:, 0].tolist()
    return sparq(codes, *FAMILIES[name], round, False).tolist()


@pytest.mark.parametrize("round", [False, True])
@pytest.mark.parametrize(("names", "table"), [(FOUR_BITS, FOUR_BIT_VALUES), (FEWER, FEWER_VALUES)])
def test_the_worked_values(names, table, round, device):
    for i, name in enumerate(names):
        assert alone(list(table), name, round, device) == [row[i][round] for row in table.values()], name


@pytest.mark.parametrize(("name", "round"), ERRORS)
def test_the_error_sums_over_all_bytes(name, round, device):
    errors = torch.tensor(alone(list(range(256)), name, round, device)) - torch.arange(256)
    assert (errors.abs().sum(), errors.square().sum(), errors.sum()) == ERRORS[name, round]


@pytest.mark.parametrize("round", [False, True])
@family
def test_the_pair_example(family, round, device):
    codes = torch.tensor([27, 0, 171, 90, 0, 0, 15, 248], dtype=torch.uint8, device=device)
    weights = torch.tensor([3, -5, -7, 2, 9, 1, -128, 127])
    assert (codes.cpu().int() * weights).sum() == 28640
    products = sparq(codes, *FAMILIES[family], round, True).cpu().int() * weights
    assert tuple(products.reshape(4, 2).sum(1).tolist()) == PAIRS[family][round]


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("round", [False, True])
@family
def test_every_pair_of_bytes_equals_the_definition(family, round, pairs, device):
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    codes = torch.cartesian_prod(byte, byte)
    assert torch.equal(sparq(codes, *FAMILIES[family], round, pairs), reference(codes, *FAMILIES[family], round, pairs))


@pytest.mark.parametrize("zero", [1, 35, 128])
@pytest.mark.parametrize("round", [False, True])
@family
def test_distances_from_a_zero_that_is_not_code_0_are_cut(family, round, zero, device):
    byte = torch.arange(256, dtype=torch.uint8, device=device)
    at = torch.tensor([zero], dtype=torch.int32, device=device)
    codes = torch.cartesian_prod(byte, at.to(torch.uint8) + torch.arange(-2, 1, device=device).to(torch.uint8))
    for pairs in (False, True):
        found = sparq(codes, *FAMILIES[family], round, pairs, at)
        assert torch.equal(found, reference(codes, *FAMILIES[family], round, pairs, at))
        distance, kept = (codes.int() - zero), (found.int() - zero)
        assert ((kept.sign() == distance.sign()) | (kept == 0)).all()
        plain = sparq(distance.abs().to(torch.uint8), *FAMILIES[family], round, pairs).int()
        cut_off = sparq(distance.abs().to(torch.uint8), *FAMILIES[family], False, pairs).int()
        fits = plain <= torch.where(distance < 0, zero, 255 - zero)
        assert torch.equal(kept.abs(), torch.where(fits, plain, cut_off))  # never past the last code


def test_a_code_that_is_zero_leaves_its_partner_whole(device):
    codes = torch.tensor([[128, 255, 255, 254]], dtype=torch.uint8, device=device)
    zero = torch.tensor([128], dtype=torch.int32, device=device)
    assert sparq(codes, 4, 1, True, True, zero).tolist() == [[128, 255, 248, 248]]


def problem(shape, device, seed=0):
    """Half of the values are 0, as after a ReLU."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-255, 256, shape, generator=g).clamp(min=0)
    return codes.to(torch.uint8).to(device)


@pytest.mark.parametrize("shape", [(1,), (2, 1), (5, 67), (3, 5, 7, 64), (2, 8193), (16_385,), (0, 5), (5, 0)])
@pytest.mark.parametrize("pairs", [False, True])
@family
def test_any_shape_equals_the_definition(family, shape, pairs, device):
    codes = problem(shape, device)
    assert torch.equal(sparq(codes, *FAMILIES[family], True, pairs), reference(codes, *FAMILIES[family], True, pairs))


def test_the_last_of_an_odd_row_keeps_the_pair_window(device):
    codes = torch.tensor([[255, 255, 255], [255, 255, 255]], dtype=torch.uint8, device=device)
    assert sparq(codes, 4).tolist() == [[240, 240, 255], [240, 240, 255]]


def test_any_strides_work(device):
    codes = problem((4, 6, 8, 10), device)
    for seen in (codes.permute(0, 2, 3, 1), codes[..., ::2], codes[..., 1:], codes[:1].expand(3, 6, 8, 10)):
        assert torch.equal(sparq(seen, 4), reference(seen, 4))


@family
def test_a_window_value_is_kept_when_it_is_cut_again(family, device):
    codes = sparq(problem((5, 67), device), *FAMILIES[family], True, False)
    assert torch.equal(sparq(codes, *FAMILIES[family], True, False), codes)


@pytest.mark.parametrize("round", [False, True])
@family
def test_window_values_have_no_more_significant_bits_than_the_window(family, round):
    bits, stride = FAMILIES[family]
    values = window(torch.arange(1, 256).float(), bits, stride, round).int()
    lowest_bit = values & -values
    assert (values // lowest_bit < 2**bits).all()
    assert (values <= 255).all()


@pytest.mark.parametrize("shape", [(5, 67), (0, 3)])
def test_registration(shape, device):
    torch.library.opcheck(sparq.default, (problem(shape, device), 4, 2, True, True))
    zero = torch.tensor([7], dtype=torch.int32, device=device)
    torch.library.opcheck(sparq.default, (problem(shape, device), 3, 1, False, True, zero))


def test_bad_input_is_named():
    codes = torch.ones(4, 6, dtype=torch.uint8)
    for args, message in [
        ((codes.int(), 4), r"qk::sparq: codes must be Byte, got Int \[4, 6\]"),
        ((codes[0, 0], 4), r"qk::sparq: codes must be \[..., cols\]"),
        ((codes, 5), "bits must be 2, 3 or 4, got 5"),
        ((codes, 3, 2), "stride must be 1, or with 4 bits 1, 2 or 4, got 2"),
        ((codes, 4, 3), "stride must be 1, or with 4 bits 1, 2 or 4, got 3"),
        ((codes, 4, 0), "stride must be"),
        ((codes, 4, 1, True, True, torch.ones(1)), "zero must be Int, got Float"),
        ((codes, 4, 1, True, True, torch.ones(2, dtype=torch.int32)), "zero must be one value"),
        ((codes, 4, 1, True, True, torch.tensor([256], dtype=torch.int32)), "zero must be a code from 0 to 255"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            qk.ops.sparq(*args)
