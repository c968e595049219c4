"""What stays in float, and the reason for it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from qk.prepare import prepare
from small_nets import Net, assert_same, convs, inputs


class Doubling(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[2].weight
    return model


def hooked():
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda module, args, result: result + 1)
    return layer


def through_another_reference():
    layer = nn.Linear(4, 4)
    return Net(lambda m, x: m.refs[0](m.layer(x)), layer=layer, refs=[layer])


IN_4 = (2, 4)
KEPT = {
    "Conv1d": (lambda: nn.Conv1d(4, 4, 3), (2, 4, 5), "", "Conv1d has no integer kernel"),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 4, 3), (2, 4, 5, 5), "", "ConvTranspose2d has no integer kernel"),
    "Conv3d": (lambda: nn.Conv3d(4, 4, 1), (2, 4, 2, 2, 2), "", "Conv3d has no integer kernel"),
    "a subclass": (lambda: Doubling(4, 4), IN_4, "", "Doubling has its own forward"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4, bias=False)),
        IN_4,
        "",
        "its weight is computed by a parametrization; remove that first",
    ),
    "pruned": (
        lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 3),
        IN_4,
        "",
        "its weight is computed by a parametrization; remove that first",
    ),
    "weight norm by hooks": (
        lambda: nn.utils.weight_norm(nn.Linear(4, 4)),
        IN_4,
        "",
        "its weight is computed by a parametrization; remove that first",
    ),
    "tied": (tied, IN_4, ".1", "its weight is shared with another module"),
    "hooked": (hooked, IN_4, "", "it has hooks, which a replaced layer would lose"),
    "half": (
        lambda: Net(lambda m, x: m.fc(x.half()).float(), fc=nn.Linear(4, 4).half()),
        IN_4,
        ".fc",
        "its weight is float16, not float32",
    ),
    "read as a parameter": (
        lambda: Net(lambda m, x: F.linear(m.fc(x), m.fc.weight), fc=nn.Linear(4, 4)),
        IN_4,
        ".fc",
        "its weight is read by part without a call of the layer",
    ),
    "reflected padding": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        (2, 4, 5, 5),
        "",
        "padding_mode 'reflect' has no integer kernel",
    ),
    "uneven padding": (
        lambda: nn.Conv2d(4, 4, 2, padding="same"),
        (2, 4, 5, 5),
        "",
        "padding 'same' of an even kernel is not symmetric",
    ),
    "unbatched": (lambda: nn.Conv2d(4, 4, 3), (4, 5, 5), "", "its input has no batch axis"),
    "never run": (
        lambda: Net(lambda m, x: x, fc=nn.Linear(4, 4)),
        IN_4,
        ".fc",
        "it did not run on the example",
    ),
    "called by another reference": (
        through_another_reference,
        IN_4,
        ".layer",
        "the model calls it through another reference, so that a replaced layer would be passed by",
    ),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:`torch.nn.utils.weight_norm`")
@pytest.mark.parametrize("case", KEPT)
def test_kept_in_float_with_the_reason(case):
    make, shape, name, reason = KEPT[case]
    part = make()
    model = Net(lambda m, x: (m.part(x), m.head(x.flatten()[:3])), part=part, head=nn.Linear(3, 2))
    p = prepare(model, inputs(*shape))
    assert p.kept[f"part{name}"] == reason
    assert list(p.quant_layers())[-1] == "head"
    assert f"part{name}" not in p.quant_layers()
    assert_same(p.model, model, inputs(*shape))


def test_even_kernels_with_even_dilation_keep_same_padding():
    model = nn.Sequential(nn.Conv2d(4, 4, (2, 3), padding="same", dilation=2), nn.Conv2d(4, 4, 1, padding="valid"))
    p = prepare(model, inputs())
    assert len(p.quant_layers()) == 2
    assert_same(p.model, model, inputs())


def test_the_parameters_of_the_model_itself_are_accounted_for():
    model = Net(lambda m, x: m.conv1(x) * m.scale, **convs(1), scale=nn.Parameter(torch.ones(1)))
    assert prepare(model, inputs()).kept == {"": "Net holds parameters of its own, which have no integer kernel"}
