from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import qk
from deploy.small import minmax, one_layer, small_images, small_model, small_prepared
from models import VISION, images, minilm, tokens, vision_model
from qk import ops
from qk.deploy import QConv2d, QLinear, convert, definition, file_bytes, layer_errors, measure_layers
from qk.deploy.modules import integer_layers
from qk.errors import QkError
from qk.inputs import feed
from qk.prepare import prepare
from qk.prepare.insert import from_kernel_order
from qk.spec import Recipe

WIDTHS = [(2, 4), (4, 4), (4, 8), (8, 8)]
MODELS = (*VISION, "minilm")
ISAS = ("generic", "avx2", "avx512vnni", "amx")


def outputs(model, batch):
    with torch.no_grad():
        y = feed(model, batch)
    return y.last_hidden_state if hasattr(y, "last_hidden_state") else y


def integer_model(name, weights, activations):
    batch = tokens() if name == "minilm" else images()
    model = minilm() if name == "minilm" else vision_model(name)
    recipe = Recipe(weights=weights, activations=activations, first_last=None, method="nearest")
    p = minmax(prepare(model, batch, recipe), [batch])
    return p, convert(p), batch


def fast(name, widths, isa):
    return (name, widths, isa) in {
        ("resnet18", (2, 4), "avx512vnni"),
        ("mobilenet_v2", (4, 8), "avx2"),
        ("regnet_x_400mf", (8, 8), "avx512vnni"),
        ("minilm", (4, 4), "avx512vnni"),
    }


CASES = [
    pytest.param(name, *widths, isa, marks=[] if fast(name, widths, isa) else pytest.mark.slow)
    for name in MODELS
    for widths in WIDTHS
    for isa in ISAS
]


@pytest.mark.parametrize(("name", "weights", "activations", "isa"), CASES)
def test_the_integer_output_is_the_definitions(name, weights, activations, isa):
    if isa not in qk.usable_isas():
        pytest.skip(f"{isa}: this CPU does not have it")
    before = qk.active_isa()
    qk.force_isa(isa)
    try:
        p, model, batch = integer_model(name, weights, activations)
        assert set(integer_layers(model)) == set(p.quant_layers())
        assert {layer.spec.describe() for layer in integer_layers(model).values()} == {f"W{weights}A{activations}"}
        y = outputs(model, batch)
        with definition():
            expected = outputs(model, batch)
        assert torch.isfinite(y).all()
        assert torch.equal(y, expected)
    finally:
        qk.force_isa(before)


@pytest.mark.parametrize(("weights", "activations"), [(2, 4), (3, 4), (4, 8), (8, 8)])
@pytest.mark.parametrize("group_size", [None, 3])
def test_a_small_model_equals_its_definition_and_its_simulation(weights, activations, group_size, device):
    overrides = {"stem": {"group_size": group_size}, "right": {"group_size": group_size}}
    p = small_prepared(weights=weights, activations=activations, overrides=overrides)
    x = small_images()
    model = convert(p).to(device)
    y = model(x.to(device)).cpu()
    model = model.cpu()
    if device.type == "cpu":
        with definition():
            assert torch.equal(model(x), y)
    for name, layer in p.quant_layers().items():
        module = model.get_submodule(name)
        shape = p.layers[name].input_shape
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        layer.quantized = True
        # The same products; the simulation rounds each of K sums in float32, the integer layer none.
        torch.testing.assert_close(module(x), layer(x), rtol=1e-4, atol=1e-4)


def test_names_stay_and_everything_else_too():
    p = small_prepared()
    before = {name: tensor.clone() for name, tensor in p.model.state_dict().items()}
    model = convert(p)
    assert [name for name, _ in model.named_modules()] == [
        name for name, _ in small_model().named_modules()
    ]  # quantizers of the prepared model are gone
    kinds = {name: type(model.get_submodule(name)) for name in p.layers}
    assert {n for n, kind in kinds.items() if kind is QConv2d} == {"stem", "left", "right", "depth"}
    assert {n for n, kind in kinds.items() if kind is QLinear} == {"twice", "head"}
    assert kinds["plain"] is nn.Conv2d
    assert model.alias is model.twice
    assert model.out.weight is model.embedding.weight
    assert torch.equal(model.left.input_step, model.right.input_step)
    assert not model.training
    after = p.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not {t.data_ptr() for t in model.state_dict().values()} & {t.data_ptr() for t in after.values()}
    with torch.no_grad():
        p.model.stem.weight_step.mul_(2)
        p.model.stem.input.step.mul_(2)
    assert not torch.equal(model.stem.weight_step, p.model.stem.weight_step)


def test_the_packed_weight_is_the_simulated_one():
    for recipe in ({}, {"weights": 2}, {"weights": 3}, {"overrides": {"left": {"group_size": 6}}}):
        p = small_prepared(**recipe)
        model = convert(p)
        for name, layer in p.quant_layers().items():
            module = model.get_submodule(name)
            weight = ops.dequantize(module.weight_codes(), module.weight_step, module.weight_zero)
            assert torch.equal(from_kernel_order(weight), layer.quantized_weight())


def test_the_result_knows_where_it_comes_from():
    p = small_prepared()
    p.history = {"stem": [{"iteration": 10, "loss": 2.0}, {"iteration": 20, "loss": math.nan}], "head": []}
    info = convert(p).qk_info
    assert info.plan == p.plan
    assert info.folds == p.folds
    assert info.kept["plain"] == "named in the recipe's skip"
    assert ("left", "right") in info.links
    assert info.history == {"stem": {"iterations": 20, "first_loss": 2.0, "last_loss": None}}
    assert info.fingerprint == convert(small_prepared(weights=2)).qk_info.fingerprint
    with torch.no_grad():
        p.quant_layers()["head"].weight[0, 0] += 1
    p.quant_layers()["head"].set_weight_range(torch.ones(10), torch.full((10,), 128))
    assert convert(p).qk_info.fingerprint != info.fingerprint


def test_a_model_that_is_one_layer():
    layer, p, x = one_layer()
    model = convert(p)
    assert isinstance(model, QLinear)
    assert model.qk_info.plan.layers.keys() == {""}
    torch.testing.assert_close(model(x), layer(x), rtol=0.05, atol=0.05)


def test_what_is_not_ready_is_refused():
    x = small_images()
    p = prepare(small_model(), x, Recipe(method="nearest"))
    with pytest.raises(QkError, match=r"qk.convert: p must be calibrated.*qk.calibrate"):
        convert(p)
    p.calibrated = True
    with pytest.raises(QkError, match="layer stem must be calibrated"):
        convert(p)
    p = small_prepared()
    p.quant_layers()["left"].rounding = torch.zeros(12, 3, 3, 4)
    with pytest.raises(QkError, match="layer left must be done with learning"):
        convert(p)
    p = small_prepared()
    with torch.no_grad():
        p.quant_layers()["left"].input.step.fill_(-1)
    with pytest.raises(QkError, match="input_step must be positive"):
        convert(p)
    p = small_prepared()
    p.quant_layers()["left"].codes[0, 0, 0, 0] = 16
    with pytest.raises((QkError, RuntimeError), match=r"code|differ"):
        convert(p)


def test_errors_of_layers_are_in_db():
    x = small_images()
    fine, coarse = (layer_errors(small_prepared(weights=bits, first_last=None), [x]) for bits in (8, 2))
    assert fine.keys() == coarse.keys() == small_prepared().quant_layers().keys()
    assert all(30 < fine[name] < 80 for name in fine)
    assert all(coarse[name] < 25 for name in coarse)
    with pytest.raises(QkError, match="batches must be at least one batch"):
        layer_errors(small_prepared(), [])


def test_an_error_is_that_of_one_layer_on_the_float_input():
    p = small_prepared()
    x = small_images()
    stem, float_stem = p.quant_layers()["stem"], copy.deepcopy(p.quant_layers()["stem"])
    stem.quantized = True
    y = float_stem(x).double()
    expected = 10 * torch.log10(y.square().sum() / (stem(x).double() - y).square().sum())
    stem.quantized = False
    assert layer_errors(p, [x])["stem"] == pytest.approx(expected.item(), rel=1e-9)
    assert layer_errors(p, [x[:1], x[1:]])["stem"] == pytest.approx(expected.item(), rel=1e-6)


def test_measures_are_of_every_quantized_layer():
    p = small_prepared()
    rows = measure_layers(p, convert(p), [small_images()], rounds=2)
    assert [row.name for row in rows] == list(p.quant_layers())
    left = rows[1]
    assert left.widths == "W4A8"
    assert left.float_bytes == (12 * 4 * 9 + 12) * 4
    # 36 codes of 4 bits in rows of 32 bytes, then step, zero and bias of each channel and of the input
    assert left.integer_bytes == 12 * 32 + 3 * 12 * 4 + 8
    assert all(row.times.float_ms > 0 and row.times.integer_ms > 0 for row in rows)
    assert not any(layer.quantized for layer in p.quant_layers().values())
    assert file_bytes(small_model()) > 4 * sum(v.numel() for v in small_model().parameters())
