"""Dynamic layers: each row is quantized by itself; which layers are dynamic, and what refuses to be."""

import pytest
import torch
from torch import nn

from qk.errors import QkError
from qk.ops.dequantize import reference as dequantize
from qk.ops.quantize_rows import reference as quantize_rows
from qk.options import Sparq
from qk.prepare import apply_plan, prepare
from qk.prepare.rows import RowQuantizer
from qk.spec import Plan, QuantSpec, Recipe
from small_nets import Net, encoder, inputs, residual_net

LARGEST = torch.finfo(torch.float32).max
AWKWARD = {
    "no row": torch.empty(0, 5),
    "no batch": torch.empty(2, 0, 5),
    "one row": inputs(1, 5),
    "a vector": inputs(5),
    "three axes": inputs(2, 3, 5),
    "zeros among others": torch.tensor([[0.0, 0.0], [1.0, -3.0], [-0.0, 0.0]]),
    "huge": torch.tensor([[LARGEST, -LARGEST, 1.0], [1e-30, 1e30, 0.0]]),
    "tiny": torch.tensor([[1e-45, 0.0], [2.0**-126, -1e-40]]),
    "not finite": torch.tensor([[1.0, float("nan"), float("inf")], [float("-inf"), -2.0, 0.5]]),
    "other strides": inputs(3, 7, 6).transpose(1, 2)[..., ::2],
}


@pytest.mark.parametrize("bits", [2, 5, 8])
@pytest.mark.parametrize("name", AWKWARD)
def test_a_row_gets_the_values_of_its_own_codes(name, bits, device):
    x = AWKWARD[name].to(device)
    found, expected = RowQuantizer(bits)(x), dequantize(*quantize_rows(x, bits)) if x.numel() else x
    assert found.shape == x.shape
    assert torch.equal(found, expected)


def test_rows_do_not_depend_on_each_other():
    x, quantizer = inputs(4, 3, 8), RowQuantizer(4)
    whole = quantizer(x)
    x[1] *= 1000
    assert torch.equal(quantizer(x)[0], whole[0])
    assert torch.equal(quantizer(x[2, 1]), whole[2, 1])


def test_the_gradient_passes_straight_through_to_every_value():
    x, slope = inputs(3, 8).requires_grad_(), inputs(3, 8) + 1
    RowQuantizer(4)(x).backward(slope)
    assert torch.equal(x.grad, slope)  # the ends of a row too, which a clipped range would cut off


def test_it_passes_and_mixes_as_other_quantizers_do():
    x, quantizer = inputs(3, 8), RowQuantizer(4)
    quantizer.mix = lambda x, quantized: x - quantized
    assert 0 < quantizer(x).abs().max() < x.abs().max()
    quantizer.passes = True
    assert quantizer(x) is x


def test_a_dynamic_recipe_is_for_linear_layers_alone_the_last_too():
    plan = prepare(residual_net(), inputs(2, 4, 6, 6), Recipe(dynamic=True)).plan
    assert {name for name, spec in plan.layers.items() if spec.dynamic} == {"4"}
    assert (plan["4"].describe(), plan["0"].describe()) == ("W8A8 dynamic", "W8A8")


def test_overrides_and_skipped_layers_need_not_be_dynamic():
    recipe = Recipe(dynamic=True, skip=("down",), overrides={"up": {"dynamic": False}})
    plan = prepare(encoder(), inputs(2, 3, 16), recipe).plan
    assert {name for name, spec in plan.layers.items() if spec.dynamic} == {"query", "key", "head"}
    assert plan["down"].is_float
    alone = prepare(encoder(), inputs(2, 3, 16), Recipe(overrides={"up": {"dynamic": True}})).plan
    assert [name for name, spec in alone.layers.items() if spec.dynamic] == ["up"]


def test_a_dynamic_layer_of_a_sparq_recipe_keeps_its_whole_codes():
    recipe = Recipe(sparq="5opt", overrides={"up": {"dynamic": True}})
    plan = prepare(encoder(), inputs(2, 3, 16), recipe).plan
    assert (plan["up"].sparq, plan["down"].sparq) == (None, Sparq())


@pytest.mark.parametrize("overrides", [{}, {"key": {"dynamic": False}}])
def test_layers_that_read_one_tensor_share_a_quantizer_if_they_quantize_alike(overrides):
    p = prepare(encoder(), inputs(2, 3, 16), Recipe(dynamic=True, overrides=overrides))
    layers = p.quant_layers()
    assert p.links == [("query", "key")]
    assert (layers["query"].input is layers["key"].input) == (not overrides)
    assert isinstance(layers["query"].input, RowQuantizer)


def test_what_cannot_be_dynamic_is_refused():
    with pytest.raises(QkError, match="dynamic must be false with sparq, whose windows are those of a step"):
        QuantSpec(dynamic=True, sparq="5opt")
    with pytest.raises(QkError, match="dynamic must be false with sparq; overrides can give single layers either"):
        Recipe(dynamic=True, sparq="5opt")
    x = inputs(2, 4, 6, 6)
    with pytest.raises(QkError, match=r"qk\.prepare: dynamic must be false for what is no Linear, got true for 0, 1.a"):
        prepare(residual_net(), x, Recipe(overrides={"*": {"dynamic": True}}))
    p = prepare(residual_net(), x)
    with pytest.raises(QkError, match=r"qk\.apply_plan: dynamic must be false for what is no Linear"):
        apply_plan(p, Plan(p.plan.layers | {"0": QuantSpec(dynamic=True)}))
    assert not p.plan["0"].dynamic


def test_a_convolution_and_a_linear_of_one_tensor_go_their_own_ways():
    net = Net(lambda m, x: m.conv(x).sum() + m.linear(x), conv=nn.Conv2d(4, 4, 1), linear=nn.Linear(6, 6))
    p = prepare(net, inputs(2, 4, 6, 6), Recipe(dynamic=True))
    assert p.plan["linear"].dynamic
    assert not p.plan["conv"].dynamic
    assert p.quant_layers()["linear"].input is not p.quant_layers()["conv"].input
