"""Tensors that layers and additions read, quantized once at the entry of the module in which they do."""

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

import qk
from qk import ops
from qk.calibrate import prefix
from qk.deploy import definition, unfused
from qk.methods import reconstruct
from qk.methods.lsq import trainable
from qk.prepare.joins import working
from qk.spec import Recipe
from small_nets import Net, Residual, convs, encoder, inputs, residual_net

RECIPE = Recipe(weights=4, activations=4, additions="quantized", iterations=6)


def shortcut(m, x):
    return m.conv2(torch.relu(m.conv1(x))) + x


def batches(*shape):
    return [x.abs() for x in inputs(*(shape or (8, 4, 6, 6))).split(4)]


def calibrated(model, recipe=RECIPE, given=None):
    given = given or batches()
    p = qk.prepare(model.eval(), given[0], recipe)
    qk.calibrate(p, given)
    return p


class Wrapped(nn.Module):
    """Takes its input by keyword, and has the layer that reads it two modules further in."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()), nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, image):
        return image + self.body(image)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Wrapped()

    def forward(self, x):
        return self.inner(image=x)


def aliased():
    """A layer of two names, the first beside the block that calls it; its own name is another layer's in the block."""
    shared = nn.Conv2d(4, 4, 3, padding=1)
    block = Net(lambda m, x: m.conv(torch.relu(m.proj(x))) + x, proj=shared, conv=nn.Conv2d(4, 4, 1))
    return Net(lambda m, x: m.head(m.blk(x)), conv=shared, blk=block, head=nn.Conv2d(4, 3, 1))


PLACES = {
    "residual units": (residual_net, {"1": ("a",), "2": ("a",)}),
    "the model itself": (lambda: Net(shortcut, **convs(2)), {"": ("conv1",)}),
    "the innermost of two modules": (Outer, {"inner": ("body.0.0",)}),
    "a tensor that is no module's input": (
        lambda: Net(lambda m, x: (lambda y: m.conv2(y) + y)(m.conv1(x)), **convs(2)),
        {},
    ),
    "a product": (lambda: Net(lambda m, x: m.conv1(x) * x, **convs(1)), {}),
    "an addition that writes over it": (lambda: Net(lambda m, x: x.add_(m.conv1(x)), **convs(1)), {}),
    "an addition that is written over": (lambda: Net(lambda m, x: m.conv1(x).add_(x), **convs(1)), {"": ("conv1",)}),
    "a product with a function of the input plus a number": (
        lambda: Net(lambda m, x: m.conv1(x) * torch.sigmoid(x + 3), **convs(1)),
        {},
    ),
    "a parameter": (lambda: Net(lambda m, x: m.conv1(x) * (x + m.conv1.bias.view(4, 1, 1)), **convs(1)), {}),
    "an argument that is written over later": (
        lambda: Net(lambda m, x: (m.conv1(x) + x, x.mul_(0))[0], **convs(1)),
        {},
    ),
    "a residual in a residual": (
        lambda: nn.Sequential(Net(lambda m, x: m.two(m.one(x)) + x, one=Residual(), two=Residual())),
        {"0": ("one.a",), "0.one": ("a",), "0.two": ("a",)},
    ),
    "a reader that was named elsewhere first": (aliased, {"blk": ("proj",)}),
    "a reader that is no part of the module with the addition": (
        lambda: Net(lambda m, x: m.blk(x, m.conv1), conv1=convs(1)["conv1"], blk=Net(lambda m, x, c: c(x) + x)),
        {"": ("conv1",)},
    ),
    "several readers": (
        lambda: Net(lambda m, x: m.conv1(x) + m.conv2(x) + x, **convs(2)),
        {"": ("conv1", "conv2")},
    ),
}


@pytest.mark.parametrize("case", PLACES)
def test_joins_are_where_a_layer_and_an_addition_read_what_a_module_takes(case):
    build, expected = PLACES[case]
    p = qk.prepare(build(), inputs(2, 4, 6, 6), RECIPE)
    assert p.joins == expected
    assert qk.prepare(build(), inputs(2, 4, 6, 6), Recipe()).joins == {}


def test_the_shortcut_carries_what_the_layer_reads():
    p = calibrated(Net(shortcut, **convs(2)))
    x, layers = batches()[0] * 2, p.quant_layers()
    with p.quantized(), torch.no_grad():
        found = p.model(x)
        values = layers["conv1"].input(x)
        expected = layers["conv2"](torch.relu(layers["conv1"](values))) + values
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert not torch.equal(values, x)
    with p.quantized({"conv2"}), torch.no_grad():  # its reader is in float
        torch.testing.assert_close(p.model(x), layers["conv2"](torch.relu(layers["conv1"](x))) + x, rtol=0, atol=0)


def test_the_step_gets_the_gradient_of_one_quantization():
    p = calibrated(Net(shortcut, **convs(2)))
    x, layers = batches()[0] * 2, p.quant_layers()
    step = layers["conv1"].input.step
    with p.quantized():
        p.model(x).square().sum().backward()
        found, step.grad = step.grad, None
        values = layers["conv1"].input(x)
        layers["conv1"].arrived = values
        (layers["conv2"](torch.relu(layers["conv1"](values))) + values).square().sum().backward()
    assert float(step.grad) != 0
    torch.testing.assert_close(found, step.grad, rtol=0, atol=0)


@pytest.mark.parametrize("build", [residual_net, lambda: nn.Sequential(Outer(), nn.Conv2d(4, 3, 1))])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_integers_are_those_of_the_simulation_through_all_stages(build, bits, tmp_path):
    recipe = Recipe(weights=4, activations=bits, first_last=None, additions="quantized", iterations=6)
    model, given = build(), batches()
    p = calibrated(model, recipe, given)
    reconstruct(p, given, recipe, progress="off")
    integer, x = qk.convert(p), given[1]
    assert integer.qk_info.joins == p.joins != {}
    with torch.no_grad():
        expected = integer(x)
        with definition():
            torch.testing.assert_close(integer(x), expected, rtol=0, atol=0)
        with p.quantized():
            simulated = p.model(x)
        # Both read the same codes, unless a float sum in another order crosses the middle between two.
        assert float((simulated - expected).abs().max()) < 1e-4 * float(expected.abs().max())
        loaded = qk.load(qk.save(integer, tmp_path), model)
        assert loaded.qk_info == integer.qk_info
        for other in (loaded, copy.deepcopy(integer), pickle.loads(pickle.dumps(integer))):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
        fast = qk.fuse(integer, given, tensors=None)
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=0)
        fast = qk.fuse(integer, given)
        torch.testing.assert_close(fast(x), unfused(integer, given)(x), rtol=0, atol=0)


def test_a_shortcut_in_codes_needs_no_range_of_its_own():
    """Fusing changes no number of a model all of whose additions read codes, but those that end the network."""
    p = calibrated(nn.Sequential(*[Residual() for _ in range(3)], nn.Conv2d(4, 4, 1)))
    integer, x = qk.convert(p), batches()[1]
    fast = qk.fuse(integer, batches())
    assert {step for region in fast.regions for step, _ in region.steps} == {"quantize", "conv2d"}
    assert len(fast.regions) == 1
    with torch.no_grad():
        torch.testing.assert_close(fast(x), integer(x), rtol=0, atol=0)


def test_a_layer_that_does_not_read_plain_codes_leaves_the_tensor_in_float():
    p = qk.prepare(encoder(), inputs(2, 5, 16), Recipe(additions="quantized"))
    assert p.joins == {"": ("query", "key")}
    for recipe in (Recipe(additions="quantized", dynamic=True), Recipe(additions="quantized", sparq="5opt")):
        p = calibrated(encoder(), recipe, [inputs(2, 5, 16)])
        expected = {"": ("query", "key")} if recipe.sparq else {}  # the first layer's input is never cut
        assert working(p.model, p.joins) == expected
        if not expected:
            with p.quantized({"query"}), torch.no_grad():
                p.model(inputs(2, 5, 16))
    report = qk.quantize(
        residual_net(), batches(), Recipe(method="nearest", additions="quantized"), measure=False, fused=False
    ).report
    assert any(note == "Quantized at the entry, for layers and additions: 1, 2." for note in report.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_goes_through(dtype):
    integer = qk.convert(calibrated(nn.Sequential(Residual(), nn.Conv2d(4, 4, 1))))
    with torch.no_grad():
        assert integer(batches()[0].to(dtype)).dtype == dtype


def test_a_call_that_fails_leaves_nothing_behind():
    p = calibrated(residual_net())
    block = p.model[1]
    with p.quantized(), torch.no_grad():
        expected = p.model(batches()[0])
        handle = block.b.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            p.model(batches()[0])
        handle.remove()
        assert block.a.arrived is None
        torch.testing.assert_close(p.model(batches()[0]), expected, rtol=0, atol=0)


def test_lapq_moves_the_entry_with_the_step(monkeypatch):
    """Kept outputs must not outlive a step at a module's entry: with and without them the search sees the same."""
    recipe = replace(RECIPE, weights=3, activations=3, first_last=None, method="nearest")
    blocks = [Net(lambda m, x: m.conv2(torch.relu(x - 0.1)) + m.conv1(x) + x, **convs(2)) for _ in range(2)]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(144, 3))  # conv2 runs before the one that has the step
    found = []
    for keeps in (True, False):
        with monkeypatch.context() as patch:
            if not keeps:
                patch.setattr(prefix.PrefixCache, "_keep", lambda *_: None)
            p = qk.prepare(model, batches()[0], recipe)
            qk.calibrate(p, batches(), "lapq")
        found.append({name: layer.input.step.item() for name, layer in p.quant_layers().items()})
    assert found[0] == found[1]


def test_training_reads_the_step_once():
    p = calibrated(residual_net())
    model = trainable(p)
    found = []
    handle = p.model[1].a.input.register_forward_hook(lambda *_: found.append(1))
    model(batches()[0]).sum().backward()
    handle.remove()
    assert len(found) == 1
    x = batches()[1]
    with torch.no_grad(), definition():
        simulated, integer = model(x), qk.convert(p)(x)
    assert float((simulated - integer).abs().max()) < 1e-4 * float(integer.abs().max())


def test_values_that_were_read_are_codes_again():
    """quantize(dequantize(codes)) == codes, so that the layer finds what arrived; for all codes and many steps."""
    codes = torch.arange(256, dtype=torch.uint8)
    for step in torch.logspace(-6, 3, 200):
        step, zero = step.reshape(1), torch.tensor([37], dtype=torch.int32)
        assert torch.equal(ops.quantize(ops.dequantize(codes, step, zero), step, zero, 8), codes)


def test_arguments_are_known_by_name():
    """In whatever order they are given, x alone is quantized."""
    model = Net(None, **convs(2))
    model.wiring = lambda m, x, y: m.conv2(torch.relu(m.conv1(x))) + x + y
    block = ByName(model)
    given = [(x, 10 * x) for x in batches()]
    for example in (given[0], {"x": given[0][0], "y": given[0][1]}, {"y": given[0][1], "x": given[0][0]}):
        assert qk.prepare(block, example, RECIPE).joins == {"": ("inner.conv1",)}
    integer, (x, y) = qk.convert(calibrated(block, given=given)), given[0]
    with torch.no_grad():
        expected = integer(x, y)
        torch.testing.assert_close(integer(y=y, x=x), expected, rtol=0, atol=0)
        torch.testing.assert_close(integer(x, y=y), expected, rtol=0, atol=0)


class ByName(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, y):
        return self.inner.wiring(self.inner, x, y)


def test_a_tensor_that_is_given_twice_is_quantized_in_both_places():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), Net(lambda m, x: m.b(x, x), b=Net(lambda m, x, y: m.c(x) + y, c=nn.Conv2d(4, 4, 1)))
    )
    p = calibrated(model, replace(RECIPE, first_last=None))
    assert p.joins == {"1.b": ("c",)}
    seen = []
    p.model.get_submodule("1.b").register_forward_pre_hook(lambda _, args: seen.append(args))
    with p.quantized(), torch.no_grad():
        p.model(batches()[0])
    assert seen[0][0] is seen[0][1]
    assert len(seen[0][0].unique()) <= 16


@pytest.mark.parametrize("other", [{"sparq": "7opt"}, {"dynamic": True}])
@pytest.mark.parametrize("name", ["a", "b"])
def test_readers_of_two_kinds(name, other):
    """One that cuts its codes, or has a step for each row, does so behind the values that the other one gives."""
    block = Net(lambda m, x: torch.relu(m.a(x) * m.b(x) + x), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    model, given = nn.Sequential(nn.Linear(8, 8), block, nn.Linear(8, 5)), [inputs(6, 8), inputs(7, 8)]
    fields = {"weights": 8, "activations": 8, "method": "nearest", "first_last": None, "additions": "quantized"}
    p = calibrated(model, Recipe(**fields, overrides={f"1.{name}": other}), given)
    integer = qk.convert(p)
    assert integer.qk_info.joins == {"1": ("a", "b")}
    with torch.no_grad():
        expected = integer(given[1])
        with definition():
            torch.testing.assert_close(integer(given[1]), expected, rtol=0, atol=0)
        with p.quantized():
            assert float((p.model(given[1]) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_nested_joins_quantize_once():
    model = nn.Sequential(Net(lambda m, x: m.two(m.one(x)) + x, one=Residual(), two=Residual()), nn.Conv2d(4, 3, 1))
    p = calibrated(model)
    found = []
    p.quant_layers()["0.one.a"].input.register_forward_hook(lambda *_: found.append(1))
    with p.quantized(), torch.no_grad():
        p.model(batches()[0])
    assert len(found) == 1
    assert all(layer.arrived is None for layer in p.quant_layers().values())
    integer = qk.convert(p)
    with torch.no_grad(), definition():
        expected = integer(batches()[1])
    with torch.no_grad():
        torch.testing.assert_close(integer(batches()[1]), expected, rtol=0, atol=0)


def test_an_image_keeps_its_layout_and_the_whole_is_one_graph():
    model = Net(lambda m, x: (m.conv1(x) + x).flatten(1) + x.view(len(x), -1), **convs(1))
    integer, x = qk.convert(calibrated(nn.Sequential(model))), batches()[1]
    with torch.no_grad():
        expected = integer(x)
        compiled = torch.compile(integer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0)
        fast = qk.fuse(integer, batches(), tensors=None)
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=0)
