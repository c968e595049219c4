"""Which layers read the same tensor, and what they share then."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qk.prepare import prepare
from qk.spec import Recipe
from small_nets import Net, assert_same, convs, inputs

LINKS = {
    "siblings": (lambda m, x: m.conv1(x) + m.conv2(x), [("conv1", "conv2")]),
    "siblings in the other order": (lambda m, x: m.conv2(x) + m.conv1(x), [("conv2", "conv1")]),
    "a chain": (lambda m, x: m.conv2(m.conv1(x)), []),
    "one written in place between": (lambda m, x: (m.conv1(x) + 0) + m.conv2(x.relu_()), []),
    "another view": (lambda m, x: m.conv1(x) + m.conv2(x.flip(-1)), []),
    "an identity, a dropout and a detach": (
        lambda m, x: m.conv1(nn.Identity()(x)) + m.conv2(F.dropout(x, 0.5, m.training)) + m.conv3(x.detach()),
        [("conv1", "conv2", "conv3")],
    ),
    "a layer that runs twice links both inputs' readers": (
        lambda m, x: m.conv1(x) + m.conv2(y := x * 2) + m.conv3(x) + m.conv3(y),
        [("conv1", "conv2", "conv3")],
    ),
    "equal values in two tensors": (lambda m, x: m.conv1(x) + m.conv2(x.clone()), []),
    "freed tensors whose memory is used again": (lambda m, x: m.conv1(x + 1).sum() + m.conv2(x + 2).sum(), []),
    "an in-place activation before both": (
        lambda m, x: m.conv2(y := F.relu(m.conv1(x), inplace=True)) + m.conv3(y),
        [("conv2", "conv3")],
    ),
    "a concatenation": (
        lambda m, x: m.conv2(y := torch.cat([m.conv1(x[:1]), x[1:]])) + m.conv3(y),
        [("conv2", "conv3")],
    ),
    "inference mode": (
        lambda m, x: torch.inference_mode()(lambda y: m.conv2(y) + m.conv1(y) + m.conv3(y.relu_()))(x + 1),
        [("conv2", "conv1")],
    ),
}


@pytest.mark.parametrize("case", LINKS)
def test_layers_are_linked_exactly_when_they_read_the_same_tensor(case):
    wiring, links = LINKS[case]
    model = Net(wiring, **convs(3))
    p = prepare(model, inputs())
    assert p.links == links
    assert_same(p.model, model, inputs())


def test_linked_layers_take_the_widest_activations_asked_for():
    model = Net(lambda m, x: m.conv4(m.conv1(x) + m.conv2(x) + m.conv3(x)), **convs(4))
    p = prepare(model, inputs(), Recipe(activations=4, first_last=None, overrides={"conv2": {"activations": 6}}))
    assert [spec.activations for spec in p.plan.layers.values()] == [6, 6, 6, 4]
    layers = p.quant_layers()
    assert layers["conv1"].input is layers["conv2"].input is layers["conv3"].input
    assert layers["conv1"].input.bits == 6
    assert layers["conv4"].input is not layers["conv1"].input


def test_a_float_layer_of_a_link_does_not_widen_the_others():
    model = Net(lambda m, x: m.conv3(m.conv1(x) + m.conv2(x)), **convs(3))
    p = prepare(model, inputs(), Recipe(activations=4, skip=("conv1",)))
    assert p.plan["conv1"].is_float
    assert p.plan["conv2"].activations == 4
