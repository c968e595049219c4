"""Bias correction: mean outputs become those of the float model, and what is deployed is what is simulated."""

import pytest
import torch
from torch import nn

import qk
from qk.calibrate import calibrate, correct_bias
from qk.deploy import convert, load, save
from qk.errors import QkError
from qk.prepare import prepare
from qk.spec import Recipe


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.twice = nn.Linear(8, 8)
        self.out = nn.Linear(8, 5, bias=False)

    def forward(self, x):
        x = self.deep(self.norm(self.conv(x)).relu()).mean((2, 3))
        return self.out(self.twice(self.twice(x).relu()).relu())


def batches():
    return list(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)).split(8))


def net():
    torch.manual_seed(0)
    model = Net()
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def prepared(**fields):
    p = prepare(net(), batches()[0], Recipe(**{"weights": 2, "activations": 4, "method": "nearest", **fields}))
    calibrate(p, batches())
    return p


def means(p, quantized):
    """Of the output of every layer, and of each call of it."""
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda m, a, y, n=name: seen.setdefault(n, []).append(y.double()))
        for name, layer in p.quant_layers().items()
    ]
    with p.quantized(None if quantized else set()), torch.no_grad():
        for x in batches():
            p.model(x)
    for hook in hooks:
        hook.remove()
    return {n: torch.cat([y.movedim(1, -1).reshape(-1, y.shape[1]) for y in ys]).mean(0) for n, ys in seen.items()}


def test_every_mean_output_becomes_the_float_models():
    p = prepared()
    expected, before = means(p, False), means(p, True)
    assert any(float((before[name] - expected[name]).abs().max()) > 1e-2 for name in before)
    correct_bias(p, batches())
    found = means(p, True)
    for name in found:
        if name != "twice":  # its second call reads what its first gave, which the correction changes
            # The bias is float32: half a unit of the largest summand, and the layer's own rounding.
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-5)
    assert all(layer.corrected_bias is not None for layer in p.quant_layers().values())


def test_the_float_model_stays_and_a_second_call_changes_nothing():
    p = prepared()
    with p.quantized(set()), torch.no_grad():
        before = p.model(batches()[0])
    correct_bias(p, batches())
    first = [layer.corrected_bias for layer in p.quant_layers().values()]
    correct_bias(p, batches())
    assert all(torch.equal(a, b.corrected_bias) for a, b in zip(first, p.quant_layers().values(), strict=True))
    with p.quantized(set()), torch.no_grad():
        assert torch.equal(p.model(batches()[0]), before)
    calibrate(p, batches())
    assert all(layer.corrected_bias is None for layer in p.quant_layers().values())


def test_it_is_deployed_saved_and_loaded(tmp_path):
    p = prepared()
    correct_bias(p, batches())
    integer = convert(p)
    for name, layer in p.quant_layers().items():
        assert torch.equal(integer.get_submodule(name).bias, layer.corrected_bias)
    loaded = load(save(integer, tmp_path), net())
    with torch.no_grad():
        assert torch.equal(loaded(batches()[0]), integer(batches()[0]))


def test_the_recipe_asks_for_it(tmp_path):
    recipe = Recipe(weights=2, activations=4, method="nearest", bias_correction=True)
    result = qk.quantize(net(), batches(), recipe, measure=False, progress=False)
    assert "correct biases" in result.report.seconds
    expected = prepared()
    correct_bias(expected, batches())
    for name, layer in expected.quant_layers().items():
        assert torch.equal(result.model.get_submodule(name).bias, layer.corrected_bias)
    assert result.fused is not None
    with torch.no_grad():
        assert result.fused(batches()[0]).isfinite().all()


def test_bad_input_leaves_it_as_it_was():
    p = prepare(net(), batches()[0], Recipe())
    with pytest.raises(QkError, match=r"qk.correct_bias: p must be calibrated"):
        correct_bias(p, batches())
    p = prepared()
    correct_bias(p, batches())
    before = [layer.corrected_bias for layer in p.quant_layers().values()]
    for bad, words in [
        ([], "at least one batch"),
        ([torch.zeros(1, 4, 8, 8)], "batch 0 must be input that the model accepts"),
        ([torch.full((1, 3, 8, 8), torch.inf)], "the mean output of .* must be finite"),
    ]:
        with pytest.raises(QkError, match=words):
            correct_bias(p, bad)
        assert all(a is b.corrected_bias for a, b in zip(before, p.quant_layers().values(), strict=True))
