"""Equalization: equal ranges on both sides of a channel, the same function, and words on what was left."""

import math

import pytest
import torch
from torch import nn

import qk
from qk.calibrate import calibrate
from qk.deploy import convert, load
from qk.errors import QkError
from qk.prepare import leave_in_float, prepare
from qk.prepare.equalize import equal_factor, equalize
from qk.prepare.scaling import made_ranges, read_ranges, scale
from qk.prepare.unclip import unclip
from qk.spec import Recipe


class Mobile(nn.Module):
    """An inverted residual unit: 1x1, depthwise, 1x1, with norms and ReLU6 or ReLU; then a head."""

    def __init__(self, relu=nn.ReLU):
        super().__init__()
        self.up = nn.Sequential(nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12), relu())
        self.deep = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12), relu())
        self.down = nn.Sequential(nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.down(self.deep(self.up(x))).mean((2, 3)))


def net(relu=nn.ReLU, seed=0):
    """Channels differ by factors of up to 100 in what makes them, as norms make them."""
    torch.manual_seed(seed)
    model = Mobile(relu).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.copy_(10 ** (2 * torch.rand(len(module.weight)) - 1))
                module.bias.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
    return model


def images(count=24):
    return list(torch.randn(count, 3, 9, 7, generator=torch.Generator().manual_seed(0)).split(8))


def prepared(relu=nn.ReLU, **fields):
    recipe = Recipe(**{"weights": 8, "activations": 8, "method": "nearest", "first_last": None, **fields})
    return prepare(net(relu), images()[0], recipe)


def outputs(model):
    with torch.no_grad():
        return torch.cat([model(x) for x in images()])


def decibels(found, expected):
    return 10 * math.log10(float(expected.square().sum() / (found - expected).square().sum()))


def test_the_factor_of_two_ranges():
    made, read = torch.tensor([4.0, 1.0, 0.0, 3.0]).double(), torch.tensor([1.0, 4.0, 2.0, 0.0]).double()
    factor = equal_factor(made, read)
    assert factor.tolist() == [2.0, 0.5, 1.0, 1.0]
    assert torch.equal((made / factor)[:2], (read * factor)[:2])


def test_all_ranges_along_a_chain_become_equal_and_the_function_stays():
    p = prepared()
    before = outputs(p.model)
    scaled = equalize(p)
    assert scaled.done == {"up.0": ("deep.0",), "deep.0": ("down.0",), "down.0": ("head",)}
    assert scaled.skipped == {"head": "its output is returned"}
    for path in p.paths:  # settled: within 1 % of s, so 2 % of the ratio, and what later paths of the round moved
        ratio = made_ranges(p, path) / read_ranges(p, path)
        assert float((ratio.log().abs()).max()) < 0.05
    # Each weight is rounded once in each round on both its sides: far below 1e-4 of the output's size.
    assert decibels(outputs(p.model), before) > 100


def test_ranges_that_are_equal_already_stay():
    p = prepared()
    equalize(p)
    first = [layer.weight.clone() for layer in p.originals.values()]
    equalize(p)
    for weight, layer in zip(first, p.originals.values(), strict=True):
        torch.testing.assert_close(layer.weight, weight, rtol=0.05, atol=0)


@pytest.mark.parametrize(("weights", "activations"), [(8, 8), (4, 8), (4, 4)])
def test_channels_that_were_scaled_apart_come_together_again(weights, activations):
    found = {}
    for kind in ("as it was", "apart", "equalized"):
        p = prepared(weights=weights, activations=activations)
        expected = outputs(p.model)
        generator = torch.Generator().manual_seed(1)
        for path in p.paths if kind != "as it was" else ():
            scale(p, path, 10 ** (2 * torch.rand(path.channels, generator=generator).double() - 1))
        if kind == "equalized":
            equalize(p)
        calibrate(p, images(), "minmax")
        with p.quantized():
            found[kind] = decibels(outputs(p.model), expected)
    assert found["equalized"] > found["apart"] + 6
    assert found["equalized"] > found["as it was"] - 6


def test_a_channel_that_is_a_constant_does_not_grow():
    # A norm that training switched off leaves a row near 0 and a bias: divided by the row's range, the bias would be
    # what sets the step of all channels.
    model = net()
    with torch.no_grad():
        model.up[1].weight[3], model.up[1].bias[3] = 1e-9, 0.5
    p = prepare(model, images()[0], Recipe(weights=8, activations=8))
    equalize(p)
    bias = p.originals["up.0"].bias.detach().abs()
    assert float(bias[3]) < 5 * float(p.originals["deep.0"].weight.detach().abs().max())


def test_a_channel_that_nothing_makes_or_reads_stays_finite():
    model = net()
    with torch.no_grad():
        model.up[1].weight[2] = model.up[1].bias[2] = 0
        model.deep[0].weight[5] = 0
    p = prepare(model, images()[0], Recipe())
    before = outputs(p.model)
    equalize(p)
    assert all(torch.isfinite(layer.weight).all() for layer in p.originals.values())
    assert decibels(outputs(p.model), before) > 100


def test_the_users_model_stays_as_it_is():
    model = net()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    equalize(prepare(model, images()[0], Recipe()))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_relu6_is_left_and_named_or_replaced_and_measured():
    p = prepared(nn.ReLU6)
    scaled = equalize(p)
    assert scaled.done == {"down.0": ("head",)}
    assert "ReLU6" in scaled.skipped["up.0"]
    p = prepared(nn.ReLU6)
    before = outputs(p.model)
    changed = unclip(p, images())
    assert changed == pytest.approx(decibels(outputs(p.model).double(), before.double()), abs=1e-6)
    assert sorted(p.unclipped) == ["deep.2", "up.2"]
    assert type(p.model.up[2]) is nn.ReLU
    assert set(equalize(p).done) == {"up.0", "deep.0", "down.0"}
    calm = prepare(_calm(), images()[0], Recipe())
    assert unclip(calm, images()) == math.inf


def _calm():
    """Nothing reaches 6."""
    model = net(nn.ReLU6)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(0.1)
    return model


@pytest.mark.parametrize("relu", [nn.ReLU, nn.ReLU6])
def test_it_is_deployed_saved_loaded_and_reported(relu, tmp_path):
    recipe = Recipe(weights=4, method="nearest", equalize=True, relu6="relu")
    model = net(relu)
    result = qk.quantize(model, images(), recipe, out=tmp_path, measure=False, progress=False)
    p = prepare(model, images()[0], recipe)
    unclip(p, images())
    equalize(p)
    calibrate(p, images())
    with torch.no_grad():
        expected = convert(p)(images()[0])
        assert torch.equal(result.model(images()[0]), expected)
        assert torch.equal(load(tmp_path, net(relu, seed=1))(images()[0]), expected)
        assert torch.equal(result.fused(images()[0]), qk.deploy.unfused(result.model, images())(images()[0]))
    notes = "\n".join(result.report.notes)
    assert "Equalized: up.0 -> deep.0; deep.0 -> down.0; down.0 -> head." in notes
    assert "Not equalized: head: its output is returned." in notes
    assert ("ReLU in place of ReLU6: " + ("nowhere" if relu is nn.ReLU else "up.2, deep.2")) in notes
    if relu is nn.ReLU6:
        with pytest.raises(QkError, match=r"modules.(up|deep).2 must be ReLU"):
            load(tmp_path, net(nn.ReLU))


def test_layers_in_float():
    p = prepared(overrides={}, skip=("deep.0",))
    assert equalize(p).skipped["up.0"] == "what reads its output stays in float"
    p = prepared(skip=("up.0",))
    assert "up.0" in equalize(p).done


def test_a_layer_that_goes_back_to_float_computes_as_before():
    p = prepared()
    before = outputs(p.model)
    equalize(p)
    calibrate(p, images())
    leave_in_float(p, {"deep.0": "for a test"})
    with p.quantized(set()):
        assert decibels(outputs(p.model), before) > 100


def test_it_must_come_before_calibration():
    p = prepared()
    calibrate(p, images())
    weight = p.originals["up.0"].weight.clone()
    for call in (equalize, lambda p: unclip(p, images())):
        with pytest.raises(QkError, match=r"p must be not calibrated yet, .*between qk.prepare and qk.calibrate"):
            call(p)
    assert torch.equal(p.originals["up.0"].weight, weight)
    with pytest.raises(QkError, match=r"qk.equalize: p must be the result of qk.prepare"):
        equalize(net())
