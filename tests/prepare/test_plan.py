"""Widths: from the recipe, and from another plan."""

import pytest
import torch
from torch import nn

from qk.calibrate import calibrate
from qk.errors import QkError
from qk.prepare import apply_plan, leave_in_float, prepare
from qk.spec import Plan, QuantSpec, Recipe
from small_nets import assert_same, inputs, residual_net


def test_first_and_last_layers_take_their_own_width():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    p = prepare(model, inputs(), Recipe(weights=2, activations=4))
    assert [spec.describe() for spec in p.plan.layers.values()] == ["W8A8", "W2A4", "W8A8"]
    p = prepare(model, inputs(), Recipe(weights=2, activations=4, first_last=None))
    assert {spec.describe() for spec in p.plan.layers.values()} == {"W2A4"}


def test_the_output_of_the_first_layer_can_take_the_width_of_the_first_and_last():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), *[nn.Conv2d(4, 4, 1) for _ in range(3)])
    p = prepare(model, inputs(), Recipe(weights=2, activations=4, first_output="first_last"))
    assert [spec.describe() for spec in p.plan.layers.values()] == ["W8A8", "W2A8", "W2A4", "W8A8"]
    p = prepare(model, inputs(), Recipe(weights=2, activations=4, first_last=None, first_output="first_last"))
    assert {spec.describe() for spec in p.plan.layers.values()} == {"W2A4"}


def test_another_plan_can_be_applied_and_float_layers_come_back():
    model = residual_net()
    p = prepare(model, inputs(), Recipe(weights=4))
    specs = dict(p.plan.layers) | {"1.a": QuantSpec(None, None, reason="measured slower"), "2.a": QuantSpec(2, 2)}
    p.calibrated = True
    apply_plan(p, Plan(specs))
    assert not p.calibrated
    assert isinstance(p.model.get_submodule("1.a"), nn.Conv2d)
    assert p.kept == {"1.a": "measured slower"}
    assert p.units[1].layers == ("1.b",)
    assert p.quant_layers()["2.a"].input.bits == 2
    assert_same(p.model, model, inputs())
    apply_plan(p, Plan(specs | {"1.a": QuantSpec(4, 4)}))
    assert p.kept == {}
    assert p.units[1].layers == ("1.a", "1.b")
    assert_same(p.model, model, inputs())


def test_layers_can_be_left_in_float_without_a_new_calibration():
    model = residual_net()
    p = prepare(model, inputs(), Recipe(weights=4))
    calibrate(p, [inputs()])
    before = {name: (layer.codes.clone(), layer.input.step.item()) for name, layer in p.quant_layers().items()}
    leave_in_float(p, {"1.a": "slow", "2.b": "slow"})
    assert p.calibrated
    assert p.kept == {"1.a": "slow", "2.b": "slow"}
    assert [unit.layers for unit in p.units] == [("0",), ("1.b",), ("2.a",), ("4",)]
    after = p.quant_layers()
    assert list(after) == ["0", "1.b", "2.a", "4"]
    for name, layer in after.items():
        assert torch.equal(layer.codes, before[name][0])
        assert layer.input.step.item() == before[name][1]
    assert_same(p.model, model, inputs())
    plan = p.plan
    for names, message in (after, "one that quantizes a layer"), (["fc"], "got unknown fc"):
        with pytest.raises(QkError, match=f"qk.leave_in_float: plan must be .*{message}"):
            leave_in_float(p, dict.fromkeys(names, "slow"))
    assert p.plan is plan


def test_k_is_counted_in_kernel_order_for_groups():
    model = nn.Sequential(nn.Conv2d(8, 4, 3, groups=2), nn.Conv2d(4, 4, 1))
    recipe = Recipe(overrides={"0": {"group_size": 12}})
    p = prepare(model, inputs(2, 8, 6, 6), recipe)
    assert p.quant_layers()["0"].groups_along_k == 3
    assert p.quant_layers()["0"].weight_rows().shape == (12, 12)


def test_too_long_a_sum_stays_in_float_with_the_reason():
    # 65793 = floor((2^31 - 1) / (255 * 128)); 4-bit weights allow 561425 = floor((2^31 - 1) / (255 * 15)).
    model = nn.Sequential(nn.Linear(65794, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.randn(1, 65794)
    p = prepare(model, x)
    assert p.kept == {"0": "K = 65794 could overflow int32 at W8A8; it holds up to 65793"}
    assert list(p.quant_layers()) == ["1", "2"]
    assert not prepare(model, x, Recipe(first_last=None)).kept
    assert not prepare(model, x, Recipe(overrides={"0": {"group_size": 65794 // 2}})).kept
    with pytest.raises(QkError, match=r"plan must be one whose sums stay in int32, got 0: K = 65794 could overflow"):
        apply_plan(p, Plan(dict.fromkeys(p.layers, QuantSpec(8, 8))))


def test_plans_for_other_models_are_refused():
    p = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), inputs(2, 4))
    spec = QuantSpec(4, 4)
    with pytest.raises(QkError, match="got unknown fc"):
        apply_plan(p, Plan({"0": spec, "1": spec, "fc": spec}))
    with pytest.raises(QkError, match="got nothing for 1"):
        apply_plan(p, Plan({"0": spec}))
    with pytest.raises(QkError, match="plan must be one that quantizes a layer, got float for all: slow"):
        apply_plan(p, Plan(dict.fromkeys("01", QuantSpec(None, None, reason="slow"))))
    with pytest.raises(QkError, match=r"group_size must be a divisor of K.*got 3 for 1 with K = 4"):
        apply_plan(p, Plan({"0": spec, "1": QuantSpec(4, 4, group_size=3)}))
    assert p.plan["1"].group_size is None


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(skip=("conv*",)), r"recipe.skip must be patterns that match layers, got 'conv\*'. The layers: 0, 1"),
        (Recipe(overrides={"fc": {"weights": 8}}), r"recipe.overrides must be patterns that match layers, got 'fc'"),
        (
            Recipe(skip=("*",)),
            r"plan must be one that quantizes a layer, got float for all: named in the recipe's skip",
        ),
        (Recipe(group_size=32), r"group_size must be a divisor of K.*got 32 for 0 with K = 4, 32 for 1 with K = 4"),
        (Recipe(overrides={"0": {"weights": 5}}), r"recipe: overrides for 0: weights must be 2, 3, 4 or 8, got 5"),
    ],
)
def test_recipes_that_fit_no_layer_are_refused(recipe, message):
    with pytest.raises(QkError, match=message):
        prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), inputs(2, 4), recipe)
