"""Running order, calls, and what is reconstructed together."""

import pytest
from torch import nn

from qk.errors import QkError
from qk.prepare import QuantLayer, prepare
from qk.spec import Recipe
from small_nets import Net, Residual, assert_same, convs, inputs, residual_net


def test_layers_are_listed_as_they_run_with_their_work():
    model = Net(
        lambda m, x: m.fc(m.b(m.a(x)).mean((2, 3))),
        fc=nn.Linear(6, 5),
        b=nn.Conv2d(4, 6, 3, groups=2),
        a=nn.Conv2d(4, 4, 1),
    )
    p = prepare(model, inputs())
    assert list(p.layers) == ["a", "b", "fc"]
    assert [layer.macs for layer in p.layers.values()] == [2 * 4 * 36 * 4, 2 * 6 * 16 * 2 * 9, 2 * 6 * 5]
    assert p.layers["b"].input_shape == (2, 4, 6, 6)
    assert p.layers["b"].output_shape == (2, 6, 4, 4)
    assert p.layers["b"].weight_shape == (6, 2, 3, 3)
    assert [(layer.kind, layer.order) for layer in p.layers.values()] == [("conv2d", 0), ("conv2d", 1), ("linear", 2)]


def test_a_layer_that_runs_twice_is_one_layer_with_two_calls():
    model = Net(lambda m, x: m.conv1(m.conv1(x)), **convs(1))
    p = prepare(model, inputs())
    assert p.layers["conv1"].calls == 2
    assert p.layers["conv1"].macs == 2 * 2 * 4 * 36 * 36
    assert_same(p.model, model, inputs())


def test_a_module_under_two_names_is_replaced_under_both():
    layer = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    p = prepare(model, inputs())
    assert list(p.layers) == ["0"]
    assert p.model[0] is p.model[2]
    assert isinstance(p.model[2], QuantLayer)


def test_repeated_residual_modules_are_blocks():
    model = residual_net()
    p = prepare(model, inputs())
    assert [(u.name, u.layers) for u in p.units] == [
        ("0", ("0",)),
        ("1", ("1.a", "1.b")),
        ("2", ("2.a", "2.b")),
        ("4", ("4",)),
    ]
    assert [u.name for u in p.blocks] == ["1", "2"]
    assert_same(p.model, model, inputs())


def test_a_module_that_occurs_once_is_no_block():
    p = prepare(residual_net(1), inputs())
    assert p.blocks == []


def test_a_stage_of_blocks_is_not_one_block():
    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.Sequential(Residual(), Residual())

        def forward(self, x):
            return self.parts(x)

    p = prepare(nn.Sequential(Stage(), Stage()), inputs())
    assert [u.name for u in p.units] == ["0.parts.0", "0.parts.1", "1.parts.0", "1.parts.1"]


def chains(model, x=None):
    return {u.name: u.chain for u in prepare(model, inputs() if x is None else x).units}


def test_a_layer_takes_its_activation_function_along():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1), nn.SiLU())
    assert chains(model) == {"0": ("0", "2"), "3": ("3", "4")}


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.act(m.act(x) + m.conv1(x)),  # its first call is another tensor's
        lambda m, x: m.act(m.conv1(x).abs()),
        lambda m, x: [y := m.conv1(x), m.act(y)],  # the model gives it out as well
        lambda m, x: (y := m.conv1(x)) * m.act(y),
        lambda m, x: m.conv1(x).relu(),  # no module
    ],
)
def test_a_layer_stays_alone_where_something_else_reads_its_output(forward):
    assert chains(Net(forward, act=nn.ReLU(), **convs(1))) == {"conv1": ()}


def stages(model, x=None, **more):
    return [(u.name, len(u.layers), u.chain) for u in prepare(model, inputs() if x is None else x, **more).stages]


def test_blocks_that_hand_on_their_output_are_one_stage():
    class Stage(nn.Sequential):
        pass

    model = nn.Sequential(Stage(Residual(), Residual()), nn.Conv2d(4, 4, 1), Residual())
    assert stages(model) == [("0", 4, ()), ("1", 1, ()), ("2", 2, ())]


def test_a_stage_without_a_module_of_its_own_is_a_chain():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Residual(), Residual(), nn.Flatten(), nn.Linear(144, 3))
    assert stages(model) == [("0", 1, ()), ("1 to 2", 4, ("1", "2")), ("4", 1, ())]


def test_a_change_of_resolution_begins_a_stage():
    class Unit(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride, padding=1)

        def forward(self, x):
            return self.b(self.a(x).relu())

    model = nn.Sequential(Unit(1), Unit(2), Unit(1), Unit(1))
    assert stages(model) == [("0", 2, ()), ("1 to 3", 6, ("1", "2", "3"))]


def test_blocks_with_something_between_are_no_stage():
    model = Net(lambda m, x: m.two(m.one(x) + 1), one=Residual(), two=Residual())
    assert stages(model) == [("one", 2, ()), ("two", 2, ())]


def test_blocks_that_take_several_tensors_stay_apart_unless_a_module_holds_them():
    class Masked(Residual):
        def forward(self, x, mask):
            return super().forward(x * mask)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([Masked(), Masked()])

        def forward(self, x, mask):
            for part in self.parts:
                x = part(x, mask)
            return x

    example = (inputs(), inputs() > 0)
    parts = nn.ModuleList([Masked(), Masked()])
    flat = Net(lambda m, x, mask: m.head(m.parts[1](m.parts[0](x, mask), mask)), parts=parts, head=nn.Conv2d(4, 4, 1))
    assert stages(flat, example) == [("parts.0", 2, ()), ("parts.1", 2, ()), ("head", 1, ())]
    whole = Net(lambda m, x, mask: m.head(m.encoder(x, mask)), encoder=Encoder(), head=nn.Conv2d(4, 4, 1))
    assert stages(whole, example) == [("encoder", 4, ()), ("head", 1, ())]


def test_a_stage_keeps_its_quantized_layers_alone():
    model = nn.Sequential(Residual(), Residual(), nn.Conv2d(4, 4, 1))
    assert stages(model, recipe=Recipe(skip=("0.*",))) == [("0 to 1", 2, ("0", "1")), ("2", 1, ())]


def test_two_parts_of_one_class_with_something_between_are_one_block():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = Residual(), Residual(), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.three(self.two(self.one(x) + x))

    p = prepare(nn.Sequential(Decoder(), Decoder()), inputs())
    assert [(u.name, len(u.layers)) for u in p.units] == [("0", 5), ("1", 5)]


def test_a_block_that_runs_twice_gives_single_layers():
    p = prepare(Net(lambda m, x: m.b(m.a(m.a(x))), a=Residual(), b=Residual()), inputs())
    assert [(u.name, len(u.layers)) for u in p.units] == [("a.a", 1), ("a.b", 1), ("b", 2)]


def test_a_layer_shared_by_two_blocks_is_in_neither():
    model = Net(lambda m, x: m.two(m.one(x)), one=Residual(), two=Residual())
    model.one.c, model.one.d = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)  # never run
    model.two.b = model.one.b
    p = prepare(model, inputs())
    assert [u.layers for u in p.units] == [("one.a",), ("one.b",), ("two.a",)]
    assert p.kept["one.c"] == "it did not run on the example"


def test_blocks_can_be_given():
    model = residual_net()
    p = prepare(model, inputs(), blocks=["2"])
    assert [(u.name, len(u.layers)) for u in p.units] == [("0", 1), ("1.a", 1), ("1.b", 1), ("2", 2), ("4", 1)]
    assert prepare(model, inputs(), blocks=[]).blocks == []


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["nine"], r"blocks must be names of modules, got 'nine'"),
        (
            ["1.relu"],
            r"blocks must be modules that run once, take a tensor and return one, got '1.relu', which ran 2 times",
        ),
        ("1", r"blocks must be a list of names, got '1'"),
        (["3"], r"blocks must be modules that hold layers to quantize, got '3'"),
        (["1", "1.a"], r"blocks must be apart from each other, got '1.a' inside '1'"),
    ],
)
def test_blocks_that_cannot_be_reconstructed_are_refused(blocks, message):
    with pytest.raises(QkError, match=message):
        prepare(residual_net(), inputs(), blocks=blocks)
