"""The grid mid-rise: worked numbers of LAPQ's released code, codes one bit wider, refused where codes are learned."""

import pytest
import torch
from torch import nn

import qk
from qk import ops
from qk.calibrate import ranges
from qk.deploy import definition
from qk.errors import QkError
from qk.prepare.mid_rise import codes_of, middle
from qk.spec import QuantSpec, Recipe

X = torch.tensor([[-2, -0.9, -0.4, -0.1, 0, 0.1, 0.4, 0.9, 2]], dtype=torch.float64)  # 0.4 is a tie in float32
THIRD = 1 / 3


def values_and_levels(end, bits):
    """What X becomes with levels from -end to end, and which level each is, counted from the lowest."""
    step = torch.tensor([end / (2**bits - 1)], dtype=torch.float64)
    distance = codes_of(X, step, bits).int() - middle(bits)
    return distance * step, (distance + 2**bits - 1) // 2


@pytest.mark.parametrize(
    ("end", "bits", "levels", "values"),
    [
        (1.0, 2, (0, 0, 1, 1, 2, 2, 2, 3, 3), (-1, -1, -THIRD, -THIRD, THIRD, THIRD, THIRD, 1, 1)),
        (1.5, 4, (0, 3, 6, 7, 8, 8, 9, 12, 15), (-1.5, -0.9, -0.3, -0.1, 0.1, 0.1, 0.3, 0.9, 1.5)),
    ],
)
def test_worked_numbers_of_the_sheet(end, bits, levels, values):
    found, which = values_and_levels(end, bits)
    assert which.tolist() == [list(levels)]
    torch.testing.assert_close(found, torch.tensor([values], dtype=torch.float64))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("power", [2.0, 2.4, 4.0])
def test_the_step_is_the_best_of_those_tried(bits, power):
    rows = torch.randn(5, 200, generator=torch.Generator().manual_seed(bits))

    def error(step):
        zero = torch.full((5,), middle(bits), dtype=torch.int32)
        return (ops.dequantize(codes_of(rows, step, bits), step, zero) - rows).abs().pow(power).sum(1)

    step, zero = ranges.mid_rise(rows, bits, power)
    widest, _ = ranges.mid_rise(rows, bits, torch.inf)
    torch.testing.assert_close(widest * (2**bits - 1), rows.abs().amax(1))
    assert zero.unique().tolist() == [middle(bits)]
    least = torch.stack([error(widest * (1 - 0.01 * i)) for i in range(ranges.SHRINKS)]).amin(0)
    torch.testing.assert_close(error(step), least, rtol=1e-5, atol=0)  # the search sums in float64


def test_rows_of_nothing_but_zeros_get_a_step():
    step, _ = ranges.mid_rise(torch.zeros(2, 3), 2)
    assert (step > 0).all()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8)
        self.c, self.d = nn.Conv2d(8, 16, 1), nn.Linear(16, 5)

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x).relu()).relu()).relu().mean((2, 3)))


def images():
    return list(torch.randn(16, 4, 9, 9, generator=torch.Generator().manual_seed(0)).split(8))


def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 4])
def test_a_model_on_it_is_saved_loaded_fused_and_equals_its_definition(bits, group_size, tmp_path):
    overrides = {"a": {"group_size": None}, "b": {"group_size": None}}
    recipe = Recipe(
        bits, 8, first_last=None, method="nearest", grid="mid-rise", group_size=group_size, overrides=overrides
    )
    model, batches = net(), images()
    result = qk.quantize(model, batches, recipe, out=tmp_path / "out", measure=False, progress=False)
    loaded = qk.load(tmp_path / "out", model=model)
    x = batches[0]
    with torch.no_grad():
        found = result.model(x)
        assert torch.equal(loaded(x), found)
        with definition():
            assert torch.equal(result.model(x), found)
        assert result.fused is not None
        with result.prepared.quantized() as simulated:
            torch.testing.assert_close(found, simulated(x), rtol=0, atol=1e-4)  # float sums in another order
    for name, layer in result.prepared.quant_layers().items():
        distance = layer.codes.int() - middle(bits)
        assert (distance % 2 == 1).all(), name
        assert int(distance.abs().max()) <= 2**bits - 1
        assert layer.spec.storage_bits == {2: 4, 3: 4, 4: 8}[bits]
    assert f"W{bits}A8 mid-rise" in result.report.title


@pytest.mark.parametrize("learn", ["reconstruct", "gptq", "trainable"])
def test_nothing_that_learns_takes_it(learn):
    p = qk.prepare(net(), images()[0], Recipe(weights=4, method="nearest", grid="mid-rise"))
    qk.calibrate(p, images())
    with pytest.raises(QkError, match="grid must be mid-tread where codes are learned, got mid-rise in b, c"):
        getattr(qk, learn)(p, *(() if learn == "trainable" else (images(),)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weights": 8, "grid": "mid-rise"}, "grid mid-rise needs weights of 2 to 4 bits"),
        ({"weights": 4, "symmetric": True, "points": 2, "grid": "mid-rise"}, "and points 1"),
    ],
)
def test_widths_that_have_none(fields, words):
    with pytest.raises(QkError, match=words):
        QuantSpec(**fields)


def test_a_recipe_that_learns_refuses_it():
    with pytest.raises(QkError, match="method must be nearest with grid mid-rise, got brecq"):
        Recipe(grid="mid-rise")
