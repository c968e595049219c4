import copy
import pickle

import pytest
import torch
from torch import nn

import qk
from qk.deploy import QConv2d, tune_kernels
from qk.spec import QuantSpec


def convolution(c, n, weights=4, activations=6, stride=(1, 1), zero=8):
    random = torch.Generator().manual_seed(0)
    k, spec = 9 * c, QuantSpec(weights=weights, activations=activations)
    codes = torch.randint(0, 2**weights, (n, k), generator=random, dtype=torch.uint8)
    tensors = {
        "packed": qk.ops.pack(codes, spec.storage_bits),
        "weight_step": torch.full((n,), 0.02),
        "weight_zero": torch.full((n,), zero, dtype=torch.int32),
        "bias": torch.randn(n, generator=random),
        "input_step": torch.tensor([0.05]),
        "input_zero": torch.tensor([3], dtype=torch.int32),
    }
    return QConv2d(tensors, spec, (n, 3, 3, c), stride=stride, padding=(1, 1))


def network():
    layers = {
        "plain": convolution(16, 24),
        "strided": convolution(24, 24, stride=(2, 2)),
        "wide": convolution(24, 32, activations=8),
        "eight": convolution(32, 16, weights=8, zero=128),
        "last": convolution(16, 16, weights=2, zero=2),
    }
    return nn.ModuleDict(layers)


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = network()

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return x


def test_forced_choice_goes_to_the_layers_that_can_have_it():
    model, x = Chain(), torch.randn(2, 16, 9, 8)
    before = model(x)
    got = tune_kernels(model, x, algorithm="winograd")
    winograd = {"layers.plain", "layers.last"}
    assert got == {f"layers.{name}": "winograd" if f"layers.{name}" in winograd else "direct" for name in model.layers}
    assert torch.equal(model(x), before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.layers["plain"].algorithm == "winograd"
        assert torch.equal(other(x), before)
    assert set(tune_kernels(model, x, algorithm="direct").values()) == {"direct"}
    assert torch.equal(model(x), before)


def test_measured_choice_changes_no_bit():
    model, x = Chain(), torch.randn(1, 16, 9, 8)
    before = model(x)
    got = tune_kernels(model, x)
    assert set(got.values()) <= {"direct", "winograd"}
    assert got["layers.wide"] == got["layers.eight"] == "direct"
    assert torch.equal(model(x), before)


def test_a_weight_that_does_not_fit_stays_direct():
    layer = convolution(16, 16, zero=0)
    layer.packed.fill_(255)  # nine taps of 15 - 0
    layer.prepack()
    assert tune_kernels(layer, torch.randn(1, 16, 5, 5), algorithm="winograd") == {"": "direct"}


def test_unknown_algorithm_is_refused():
    with pytest.raises(qk.QkError, match="algorithm must be direct, winograd or None, got fft"):
        tune_kernels(Chain(), torch.randn(1, 16, 9, 8), algorithm="fft")
