"""Matched statistics: layers that took up a BatchNorm give the float model's means and variances again."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import qk
from calibrate.test_bias import batches, net, prepared
from qk import flow
from qk.calibrate import correct_bias, match_statistics
from qk.calibrate.bias import Moments, moments
from qk.calibrate.statistics import scales
from qk.deploy import convert, load, save
from qk.errors import QkError
from qk.methods import brecq
from qk.methods.multipoint import multipoint
from qk.prepare import prepare
from qk.spec import Recipe


def found(p, quantized=True):
    with p.quantized(None if quantized else set()), torch.no_grad():
        return moments(p, ["conv"], batches(), "test")["conv"]


def test_means_and_variances_are_the_float_models():
    p = prepared(overrides={"conv": {"activations": 2}})
    expected, before = found(p, False), found(p)
    assert float((before.variance / expected.variance - 1).abs().max()) > 0.02
    codes = {name: layer.codes for name, layer in p.quant_layers().items()}
    match_statistics(p, batches())
    after = found(p)
    # Steps and bias are float32: 2^-24 of a value each, and sums of 27 products of them.
    torch.testing.assert_close(after.mean, expected.mean, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.variance, expected.variance, rtol=1e-5, atol=0)
    assert all(layer.codes is codes[name] for name, layer in p.quant_layers().items())
    assert p.quant_layers()["deep"].corrected_bias is None  # no BatchNorm went into it


def test_it_does_what_a_batchnorm_does_that_is_run_again():
    """The norm in front of the quantized layer's own output, its statistics taken anew from the same data."""
    p = prepared()
    layer, norm = p.quant_layers()["conv"], nn.BatchNorm2d(8, eps=1e-12)
    expected = found(p, False)
    x = torch.cat(batches())
    with p.quantized(), torch.no_grad():
        norm.weight.copy_(expected.variance.sqrt())
        norm.bias.copy_(expected.mean)
        again = norm.train()(layer(x))
        match_statistics(p, batches())
        torch.testing.assert_close(layer(x), again, rtol=0, atol=2e-5)  # the same numbers, otherwise rounded


def test_channels_of_several_points_are_matched_as_a_whole():
    p = prepared(overrides={"conv": {"weights": 4, "points": 3, "symmetric": True}})
    multipoint(p, batches(), error=1e-3)
    assert p.quant_layers()["conv"].extra_rows > 0
    expected = found(p, False)
    match_statistics(p, batches())
    torch.testing.assert_close(found(p).variance, expected.variance, rtol=1e-5, atol=0)
    with p.quantized() as simulated, torch.no_grad():
        x = batches()[0]
        torch.testing.assert_close(
            convert(p)(x), simulated(x), rtol=1e-4, atol=1e-5
        )  # their sums are rounded otherwise


def test_channels_that_hardly_vary_keep_their_scale():
    mean = torch.zeros(5, dtype=torch.float64)
    wanted = torch.tensor([1.0, 4.0, 0.0, 1e-9, 100.0], dtype=torch.float64)
    there = torch.tensor([4.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert scales(Moments(mean, wanted), Moments(mean, there)).tolist() == [0.5, 2.0, 1.0, 1.0, 2.0]
    assert scales(Moments(mean, wanted), Moments(mean, there * 0)).tolist() == [1.0] * 5


def test_it_is_deployed_saved_and_loaded_and_biases_may_follow(tmp_path):
    p = prepared()
    match_statistics(p, batches())
    step = p.quant_layers()["conv"].weight_step
    correct_bias(p, batches())
    assert p.quant_layers()["conv"].weight_step is step
    integer = convert(p)
    assert torch.equal(integer.conv.weight_step, step)
    loaded = load(save(integer, tmp_path), net())
    with torch.no_grad():
        assert torch.equal(loaded(batches()[0]), integer(batches()[0]))


def test_the_recipe_asks_for_it():
    recipe = Recipe(weights=2, activations=4, method="nearest", match_statistics=True)
    result = qk.quantize(net(), batches(), recipe, measure=False, progress=False, fused=False)
    expected = prepared()
    match_statistics(expected, batches())
    assert torch.equal(result.model.conv.weight_step, expected.quant_layers()["conv"].weight_step)


def test_bad_input_leaves_it_as_it_was():
    p = prepare(net(), batches()[0], Recipe())
    with pytest.raises(QkError, match=r"qk.match_statistics: p must be calibrated"):
        match_statistics(p, batches())
    p = prepared()
    match_statistics(p, batches())
    layer = p.quant_layers()["conv"]
    before = layer.weight_step, layer.corrected_bias
    for bad, words in [
        ([], "at least one batch"),
        ([torch.full((1, 3, 8, 8), torch.inf)], "the output of conv must be finite"),
    ]:
        with pytest.raises(QkError, match=words):
            match_statistics(p, bad)
        assert (layer.weight_step, layer.corrected_bias) == before
    plain = prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4))
    qk.calibrate(plain, [torch.randn(2, 4)])
    with pytest.raises(QkError, match="p must be a model with a quantized layer that took up a BatchNorm, got none"):
        match_statistics(plain, [torch.randn(2, 4)])
    p = prepared()
    qk.trainable(p)
    with pytest.raises(QkError, match="p must be with codes that stay, got one in training"):
        match_statistics(p, batches())


def test_nothing_is_learned_where_there_is_nothing_to_match(monkeypatch, tmp_path):
    plain, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(4, 8)
    monkeypatch.setattr(flow, "reconstruct", lambda *args, **kwargs: pytest.fail("learned"))
    with pytest.raises(QkError, match="p must be a model with a quantized layer that took up a BatchNorm, got none"):
        qk.quantize(plain, [x], Recipe(iterations=2, match_statistics=True), measure=False, out=tmp_path)


@pytest.mark.parametrize("field", ["match_statistics", "bias_correction"])
def test_what_comes_after_learning_does_not_make_it_another(field, monkeypatch, tmp_path):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    recipe = Recipe(iterations=3, batch_size=2)
    with monkeypatch.context() as patched:
        patched.setattr(flow, "convert", stopped)
        with pytest.raises(KeyboardInterrupt):
            qk.quantize(net(), batches(), recipe, measure=False, progress=False, out=tmp_path)
    assert list((tmp_path / "unfinished").iterdir())
    monkeypatch.setattr(brecq._Unit, "reconstruct", lambda *_: pytest.fail("learned again"))
    more = replace(recipe, **{field: True})
    qk.quantize(net(), batches(), more, measure=False, progress=False, fused=False, out=tmp_path)
