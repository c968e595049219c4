"""Smoothing: the paper's factors, the same function, less error where channels differ, and integers that agree."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qk
from models import minilm, tokens
from qk.calibrate import calibrate
from qk.calibrate.smooth import SILENT, output_error, smooth, smooth_factor
from qk.deploy import convert, load, save
from qk.errors import QkError
from qk.methods import reconstruct
from qk.methods.gptq import gptq
from qk.prepare import leave_in_float, prepare
from qk.prepare.equalize import equalize
from qk.prepare.scaling import within_clip
from qk.spec import Recipe
from small_nets import Net

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A transformer layer: queries, keys and values read one norm's output, which a residual reads too where `post`."""

    def __init__(self, post: bool):
        super().__init__()
        self.post, self.norm, self.norm2 = post, nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (f(y).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)) + (y if self.post else x)
        return y + self.down(F.gelu(self.up(self.norm2(y))))


def net(post=True, seed=0):
    """With outlying channels, as trained transformers have them."""
    torch.manual_seed(seed)
    model = nn.Sequential(Block(post), nn.Linear(16, 5)).eval()
    with torch.no_grad():
        for norm in (model[0].norm, model[0].norm2):
            norm.weight.copy_(10 ** (2 * torch.rand(16) - 1))
            norm.bias.normal_()
    return model


def batches(count=3):
    return list(torch.randn(8 * count, 6, 16, generator=torch.Generator().manual_seed(1)).split(8))


def prepared(post=True, **fields):
    recipe = Recipe(**{"weights": 8, "activations": 8, "first_last": None, "method": "nearest", **fields})
    return prepare(net(post), batches()[0], recipe)


def outputs(model):
    with torch.no_grad():
        return torch.cat([model(x) for x in batches()])


def decibels(found, expected):
    return 10 * math.log10(float(expected.square().sum() / (found - expected).square().sum()))


def test_the_factor_of_the_paper():
    inputs, read = torch.tensor([16.0, 2.0, 0.0, 9.0]).double(), torch.tensor([1.0, 2.0, 2.0, 0.0]).double()
    assert smooth_factor(inputs, read, 0.5).tolist() == [4.0, 1.0, 1.0, 1.0]
    assert smooth_factor(inputs, read, 1.0).tolist() == [16.0, 2.0, 1.0, 1.0]
    assert smooth_factor(inputs, read, 0.0).tolist() == [1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "search"])
@pytest.mark.parametrize("post", [True, False])
def test_the_function_stays(post, alpha):
    p = prepared(post)
    before, bias = outputs(p.model), p.model[0].norm.bias.clone()
    done = smooth(p, batches(), alpha)
    assert decibels(outputs(p.model), before) > 100  # roundings of 2^-24 of each weight and input
    sources = [source.partition(" (")[0] for source in done.done]
    if alpha != "search":
        expected = [] if post else ["0.norm"]
        assert [s for s in sources if s.startswith("0.")] == [*expected, "0.v", "0.norm2"]
        assert ("the input of 0.q, 0.k, 0.v" in sources) == post
        assert "the input of 0.down" in sources
    assert torch.equal(p.model[0].norm.bias, bias) == post or alpha == "search"


def test_one_alpha_gives_inputs_and_weights_their_shares():
    p = prepared()
    layer = p.quant_layers()["0.down"]
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(layer.taken(args[0])))
    outputs(p.model)
    x, w = torch.cat(seen).flatten(0, 1).abs().amax(0), layer.weight.detach().abs().amax(0)
    smooth(p, batches(), 0.75)
    seen.clear()
    outputs(p.model)
    handle.remove()
    ours, weights = torch.cat(seen).flatten(0, 1).abs().amax(0), layer.weight.detach().abs().amax(0)
    torch.testing.assert_close(ours, (x * w) ** 0.25)  # max |x| / s = |x|^(1 - alpha) |w|^(1 - alpha)
    torch.testing.assert_close(weights, (x * w) ** 0.75)


@pytest.mark.parametrize("post", [True, False])
def test_outlying_channels_lose_less(post):
    found = {}
    for kind in ("not", "search", 0.5):
        p = prepared(post)
        expected = outputs(p.model)
        if kind != "not":
            smooth(p, batches(), kind)
        calibrate(p, batches())
        with p.quantized():
            found[kind] = decibels(outputs(p.model), expected)
    assert found["search"] > found["not"] + 3
    assert found[0.5] > found["not"]


def test_the_search_takes_the_least_error_or_leaves_it():
    p = prepared(weights=4, activations=8)
    for norm in (p.model[0].norm, p.model[0].norm2):  # without outliers
        nn.init.ones_(norm.weight)
        nn.init.zeros_(norm.bias)
    x = [torch.cat(batches()).flatten(0, 1)]
    done = smooth(p, batches())
    assert "err less as it is" in done.skipped["the input of 0.q, 0.k, 0.v"]
    assert done.done
    layer = prepared().quant_layers()["1"]
    one = torch.ones(16)
    assert output_error(layer, x[0], one) < output_error(layer, x[0], torch.logspace(-3, 3, 16))


@pytest.mark.parametrize("kind", ["linear", "conv", "depthwise", "groups"])
def test_the_error_is_that_of_the_simulated_layer(kind):
    torch.manual_seed(0)
    layers = {
        "linear": (nn.Linear(6, 5), (40, 6)),
        "conv": (nn.Conv2d(6, 4, 3, padding=1), (5, 6, 7, 6)),
        "depthwise": (nn.Conv2d(6, 6, 3, groups=6), (5, 6, 7, 6)),
        "groups": (nn.Conv2d(6, 4, 1, groups=2), (5, 6, 7, 6)),
    }
    model, shape = layers[kind]
    x = torch.randn(*shape)
    p = prepare(model, x, Recipe(weights=4, activations=4, first_last=None))
    layer = p.quant_layers()[""]
    calibrate(p, [x])
    with torch.no_grad():
        bias = 0 if model.bias is None else model.bias.reshape(-1, *[1] * (x.dim() - 2))
        expected = model(x)
        with p.quantized():
            channels = 1 if x.dim() == 4 else -1
            lost, power = (
                y.square().movedim(channels, 0).flatten(1).mean(1) for y in (layer(x) - expected, expected - bias)
            )
            error = float((lost / (power + SILENT * power.mean())).mean())
    assert output_error(layer, x, torch.ones(6)) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("method", ["nearest", "brecq", "gptq"])
def test_integers_are_those_of_the_simulation_with_every_method(method, tmp_path):
    p = prepared(weights=4)
    smooth(p, batches(), 0.6)
    assert p.quant_layers()["0.q"].input_scale is p.quant_layers()["0.k"].input_scale
    calibrate(p, batches())
    if method == "brecq":
        reconstruct(p, batches(), Recipe(iterations=5, batch_size=4), progress="off")
    if method == "gptq":
        gptq(p, batches(), progress="off")
    integer = convert(p)
    with p.quantized():
        simulated = outputs(p.model)
    found = outputs(integer)
    torch.testing.assert_close(found, simulated, rtol=0, atol=0.05)  # a value on an edge may fall to either side
    for name, layer in p.quant_layers().items():
        module, x = integer.get_submodule(name), torch.randn(9, layer.weight.shape[1])
        codes = qk.ops.quantize(layer.taken(x), layer.input.step, layer.input.zero, layer.input.bits)
        taken = x if module.input_scale is None else x * module.input_scale
        assert torch.equal(qk.ops.quantize(taken, module.input_step, module.input_zero, module.input_bits), codes)
    with qk.deploy.definition():
        assert torch.equal(outputs(integer), found)
    assert torch.equal(outputs(load(save(integer, tmp_path), net(seed=1))), found)
    fused = qk.fuse(integer, batches()[0])
    assert torch.equal(outputs(fused), outputs(qk.deploy.unfused(integer, batches()[0])))
    half = integer(batches()[0].half().float().half()) if method == "nearest" else None
    assert half is None or half.dtype == torch.float16


def test_gptq_and_calibration_see_what_the_layer_takes_in():
    p = prepared()
    smooth(p, batches(), 0.6)
    calibrate(p, batches(), "minmax")
    layer = p.quant_layers()["0.down"]
    seen = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(layer.taken(args[0])))
    outputs(p.model)
    handle.remove()
    ends = torch.cat(seen).aminmax()
    assert layer.input.step.item() == pytest.approx(float(ends.max.clamp(min=0) - ends.min.clamp(max=0)) / 255)


def test_training_goes_on_from_divided_inputs():
    p = prepared()
    before = outputs(p.model)
    smooth(p, batches(), 0.6)
    calibrate(p, batches())
    with torch.no_grad():
        trained = torch.cat([qk.trainable(p)(x) for x in batches()])
    assert decibels(trained, before) > 30
    assert decibels(outputs(convert(p)), trained) > 60  # the same codes; sums in another order
    assert convert(p).get_submodule("0.q").input_scale is not None


def test_left_in_float_a_layer_takes_its_own_input_again():
    p = prepared()
    before = outputs(p.model)
    smooth(p, batches(), 0.6)
    calibrate(p, batches())
    leave_in_float(p, {"0.down": "for a test", "0.q": "for a test"})
    assert decibels(outputs(p.model), before) > 100


def test_equalizing_after_smoothing_keeps_the_function():
    p = prepared()
    before = outputs(p.model)
    smooth(p, batches(), 0.6)
    equalize(p)
    smooth(p, batches(), 0.8)
    assert decibels(outputs(p.model), before) > 100


def test_convolutions_are_smoothed_along_paths_alone():
    torch.manual_seed(0)
    parts = {
        "a": nn.Conv2d(3, 6, 3),
        "b": nn.Conv2d(6, 6, 3, groups=6),
        "c": nn.Conv2d(6, 4, 1),
        "d": nn.Conv2d(4, 4, 1),
    }
    model = Net(lambda m, x: m.d((y := m.c(m.b(m.a(x).relu()).relu())) + y.abs()), **parts).eval()
    images = torch.randn(4, 3, 8, 8)
    p = prepare(model, images, Recipe(weights=8, activations=8))
    before = p.model(images)
    done = smooth(p, [images], 0.5)
    assert list(done.done) == ["a (alpha 0.5)", "b (alpha 0.5)"]
    assert "costs a pass" in done.skipped["the input of a"]
    torch.testing.assert_close(p.model(images), before, rtol=0, atol=1e-5)


def clipped(pool=None):
    """An inverted residual without the residual. Its channels differ in size and count alike; some are clipped."""
    torch.manual_seed(0)
    last = [nn.Conv2d(16, 8, 1), nn.Flatten(), nn.Linear(8 * (36 if pool is None else 9), 5)]
    first = [nn.Conv2d(3, 16, 1), nn.ReLU6(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6()]
    model = nn.Sequential(*first, *([] if pool is None else [pool]), *last).eval()
    wide, deep = (torch.logspace(-2, 1, 16)[torch.randperm(16)] for _ in range(2))
    with torch.no_grad():
        model[0].weight.mul_(4 * wide.reshape(-1, 1, 1, 1))
        model[2].weight.mul_((deep / wide).reshape(-1, 1, 1, 1))
        model[-3].weight.div_(deep.reshape(1, -1, 1, 1))
    return model


def pictures(size=1.0):
    return list(size * torch.randn(4, 8, 3, 6, 6, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "search"])
@pytest.mark.parametrize("pool", [None, nn.AvgPool2d(2), nn.MaxPool2d(2)])
def test_relu6_stays_and_clips_what_it_clipped(pool, alpha):
    model = clipped(pool)
    p = prepare(model, pictures()[0], Recipe(weights=4, activations=4, first_last=None, method="nearest"))
    found = smooth(p, pictures(), alpha)
    assert alpha == "search" or {"0", "2"} <= {key.split()[0] for key in found.done}
    assert [type(module) for module in p.model[1:4:2]] == [nn.ReLU6, nn.ReLU6]
    with torch.no_grad(), p.quantized(set()):
        for x in pictures():
            before = model[0](x)
            assert (before > 6).any()
            assert (before.amax((0, 2, 3)) < 1).any()
            # Rounding of each weight, 2^-24 relative, at most as large as channels that cancel in a sum: 100 dB
            assert decibels(p.model(x), model(x)) > 100
        large = torch.cat(pictures(3.0))  # above all that the batches showed: clipped earlier, never later
        assert (p.model[1](p.model[0](large)) <= 6).all()


def test_factors_keep_what_a_relu6_clips():
    factor, made = torch.tensor([4.0, 2.0, 1.0, 0.5, 9.0]).double(), torch.tensor([7.0, 6.0, 0.6, 4.5, 0.0]).double()
    assert within_clip(factor, made).tolist() == [1.0, 1.0, 0.25, 0.75, 1.0]
    assert within_clip(factor, torch.zeros(5).double()).tolist() == [1.0] * 5


def test_narrow_activations_lose_less_behind_relu6():
    model, errors = clipped(), []
    for alpha in (None, 1.0):
        p = prepare(model, pictures()[0], Recipe(weights=8, activations=4, first_last=None, method="nearest"))
        if alpha is not None:
            smooth(p, pictures(), alpha)
        calibrate(p, pictures())
        with torch.no_grad(), p.quantized() as quantized:
            errors.append(decibels(quantized(torch.cat(pictures())), model(torch.cat(pictures()))))
    assert errors[1] > errors[0] + 3


def test_the_recipe_asks_for_it_and_the_report_says_what_came_of_it(tmp_path):
    recipe = Recipe(weights=8, activations=8, first_last=None, method="nearest", smooth="search")
    result = qk.quantize(net(), batches(), recipe, out=tmp_path, measure=True, progress=False)
    notes = "\n".join(result.report.notes)
    assert "Smoothed: " in notes
    assert "the input of 0.q, 0.k, 0.v (alpha " in notes
    assert "Not smoothed: 0.norm" in notes
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict({"smooth": 0.5}).smooth == 0.5
    with pytest.raises(QkError, match="smooth"):
        Recipe(smooth=1.5)
    expected = prepared(smooth="search")
    smooth(expected, batches())
    calibrate(expected, batches())
    assert torch.equal(outputs(result.model), outputs(convert(expected)))


def test_bad_input_leaves_it_as_it_was():
    p = prepared()
    before = {name: t.clone() for name, t in p.model.state_dict().items()}
    for bad, alpha, words in [
        ([], 0.5, "at least one batch"),
        (batches(), 1.5, "alpha must be from 0 to 1, or 'search', got 1.5"),
        (batches(), "fast", "alpha must be from 0 to 1"),
        ([torch.zeros(2, 6, 15)], 0.5, "batch 0 must be input that the model accepts"),
        ([torch.full((2, 6, 16), torch.nan)], 0.5, "must be finite"),
    ]:
        with pytest.raises(QkError, match=words):
            smooth(p, bad, alpha)
        assert all(torch.equal(t, before[name]) for name, t in p.model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in p.model.modules())
    calibrate(p, batches())
    with pytest.raises(QkError, match=r"qk.smooth: p must be not calibrated yet"):
        smooth(p, batches())


@pytest.mark.slow
def test_a_trained_encoder_keeps_its_output():
    p = prepare(minilm(), tokens(), Recipe(weights=8, activations=8))
    with torch.no_grad():
        before = p.model(**tokens()).last_hidden_state
        done = smooth(p, [tokens()], 0.7)
        assert decibels(p.model(**tokens()).last_hidden_state, before) > 90
    assert sum(name.startswith("the input of") for name in done.done) == 19
    assert sum(name.endswith("attention.self.value (alpha 0.7)") for name in done.done) == 6 + 6
