"""What models take and return, that they stay as they were, and what is refused."""

import contextlib
import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from qk.errors import QkError
from qk.prepare import prepare
from small_nets import Net, assert_same, convs, inputs


@dataclass
class Output:
    logits: torch.Tensor
    extra: tuple


OUTPUTS = {
    "a tuple": lambda m, x: (m.conv1(x), m.conv2(x)),
    "a dict": lambda m, x: {"a": m.conv1(x), "b": [m.conv2(x)]},
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_any_output_will_do(case):
    model = Net(OUTPUTS[case], **convs(2))
    assert_same(prepare(model, inputs()).model, model, inputs())


def test_a_dataclass_output_keeps_its_producer_from_being_folded():
    norm = nn.BatchNorm2d(4)
    model = Net(lambda m, x: Output(m.norm(y := m.conv1(x)), (y,)), **convs(1), norm=norm)
    p = prepare(model, inputs())
    assert p.folds == {}


def test_examples_are_tensors_tuples_lists_or_mappings():
    model = Net(lambda m, x, scale=None: m.conv1(x) * (1 if scale is None else scale), **convs(1))
    for example in (inputs(), (inputs(), torch.ones(1)), [inputs()], {"x": inputs(), "scale": torch.ones(1)}):
        assert list(prepare(model, example).layers) == ["conv1"]


def test_a_layer_called_by_keyword_is_quantized():
    model = Net(lambda m, x: m.conv1(input=x), **convs(1))
    p = prepare(model, inputs())
    assert list(p.quant_layers()) == ["conv1"]
    assert_same(p.model, model, inputs())


def test_a_model_that_writes_into_its_input_leaves_the_example_alone():
    x = inputs()
    prepare(Net(lambda m, y: m.conv1(y.mul_(2)), **convs(1)), x)
    assert torch.equal(x, inputs())


def test_what_a_model_asks_of_its_layers_stays_answered():
    model = Net(
        lambda m, x: m.fc(m.conv(x).mean((2, 3)))[:, : m.fc.out_features - m.conv.kernel_size[0]],
        conv=nn.Conv2d(4, 4, 1),
        fc=nn.Linear(4, 3),
    )
    assert_same(prepare(model, inputs()).model, model, inputs())


def test_an_exception_that_the_model_catches_does_not_confuse_the_watch():
    def wiring(m, x):
        with contextlib.suppress(RuntimeError):
            m.conv2(x[:, :1])
        return m.conv1(x)

    p = prepare(Net(wiring, **convs(2)), inputs())
    assert list(p.layers) == ["conv1"]
    assert p.kept["conv2"] == "it was not called with one tensor to return one"


def test_the_model_keeps_its_weights_mode_and_hooks():
    calls = []
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Conv2d(4, 2, 1)
    )
    model.train()
    model[3].eval()
    model[2].register_forward_hook(lambda module, args, result: calls.append(len(calls)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    p = prepare(model, inputs())
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [m.training for m in model] == [True, True, True, False, True]
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert not any(m.training for m in p.model.modules())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in p.model.modules()) == 1
    assert len(calls) == 3  # the model's own hook is a part of it


LAYERS = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(0, 4), r"example must be one batch with at least one value in every tensor, got float32 \[0, 4\]"),
        ((), r"at least one value in every tensor, got \(\)"),
        ({"x": 3}, r"at least one value in every tensor, got {x: int}"),
        ("digits", r"example must be a tensor, a tuple of arguments or a dict of keywords, got str"),
        (
            torch.tensor([[1.0, float("nan"), 3, float("inf")]]),
            r"example must be finite, got 2 NaN or Inf among 4 values",
        ),
        (
            torch.zeros(2, 5),
            r"example must be input that the model accepts, got float32 \[2, 5\], on which it raised Runt",
        ),
        ({"y": torch.zeros(2, 4)}, r"got {y: float32 \[2, 4\]}, on which it raised TypeError"),
    ],
)
def test_examples_that_tell_nothing_are_refused(example, message):
    with pytest.raises(QkError, match=rf"qk.prepare: .*{message}"):
        prepare(LAYERS, example)


def test_the_models_own_error_is_the_cause():
    with pytest.raises(QkError) as caught:
        prepare(LAYERS, torch.zeros(2, 5))
    assert "shapes cannot be multiplied" in str(caught.value.__cause__)


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("it holds a lock")


def with_nan(name):
    model = copy.deepcopy(LAYERS)
    nn.init.constant_(model.get_parameter(name), float("nan"))
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (3, "model must be an nn.Module, got int"),
        (
            nn.Sequential(nn.ReLU()),
            "model must be one with a Conv2d or Linear that can be quantized, got none with weights",
        ),
        (nn.Sequential(nn.LayerNorm(4)), "that can be quantized, got 0: LayerNorm has no integer kernel"),
        (nn.DataParallel(LAYERS), "model must be a plain module, got a DataParallel. Give model.module"),
        (
            nn.Sequential(nn.DataParallel(LAYERS)),
            "model.0 must be a plain module, got a DataParallel. Give model.0.module",
        ),
        (torch.compile(LAYERS), "model must be a plain module, got a OptimizedModule. Give model._orig_mod"),
        (torch.jit.trace(LAYERS, torch.zeros(1, 4)), "model must be a Python nn.Module, got a "),
        (nn.Sequential(nn.LazyLinear(3)), "model must be initialized, got lazy parameter 0.weight"),
        (nn.Linear(4, 4, device="meta"), "model must be on cpu or cuda, got weight on meta"),
        (
            Uncopyable(4, 4),
            "model must be a module that copy.deepcopy can copy, got Uncopyable, on which it raised TypeE",
        ),
        (with_nan("2.weight"), "the weight of 2 must be finite, got NaN or Inf in it"),
        (with_nan("0.bias"), "the bias of 0 must be finite, got NaN or Inf in it"),
    ],
)
def test_models_that_cannot_be_prepared_are_refused(model, message):
    with pytest.raises(QkError, match=message):
        prepare(model, inputs(2, 4))
