"""GPTQ of layers and whole models: what it is given, what it loses, and how it goes on."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qk
from qk import ops
from qk.calibrate import calibrate
from qk.deploy import convert, load, save
from qk.errors import QkError
from qk.methods.gptq import Moments, Runs, gptq, moments_of
from qk.prepare import prepare
from qk.prepare.insert import to_kernel_order
from qk.spec import Recipe
from small_nets import residual_net

pytestmark = pytest.mark.usefixtures("one_thread")


def moments_over(p, name, prefix, batches):
    block = next(unit for unit in p.units if name in unit.layers)
    return moments_of(Runs(p, block, prefix, batches), name)


SHAPES = {
    "linear": (lambda: nn.Linear(7, 5), (9, 7)),
    "linear of sequences": (lambda: nn.Linear(7, 5), (2, 3, 7)),
    "conv": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 7)),
    "1x1": (lambda: nn.Conv2d(4, 6, 1, stride=2), (2, 4, 5, 5)),
    "groups": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2, bias=False), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(5, 5, 3, groups=5), (3, 5, 6, 6)),
    "depthwise, two each": (lambda: nn.Conv2d(5, 10, 3, groups=5), (3, 5, 6, 6)),
    "same": (lambda: nn.Conv2d(3, 2, 3, padding="same"), (2, 3, 5, 6)),
}


def layer_of(kind, x=None, **fields):
    make, shape = SHAPES[kind]
    torch.manual_seed(0)
    x = torch.randn(*shape) if x is None else x
    recipe = Recipe(**{"weights": 3, "activations": 8, "first_last": None, "method": "gptq", **fields})
    p = prepare(make(), x, recipe)
    calibrate(p, [x])
    return p, x


@pytest.mark.parametrize("group_size", [None, "half"])
@pytest.mark.parametrize("kind", SHAPES)
def test_losses_are_those_of_the_output(kind, group_size):
    k = SHAPES[kind][0]().weight[0].numel()
    if group_size and k % 2:
        pytest.skip("K is odd")
    p, x = layer_of(kind, group_size=k // 2 if group_size else None)
    layer = p.quant_layers()[""]
    gptq(p, [x], Recipe(method="gptq"), progress="off")
    last = p.history[""][-1]
    found = []
    with torch.no_grad():
        for codes in (
            ops.quantize(to_kernel_order(layer.weight), layer.weight_step, layer.weight_zero, 3),
            layer.codes,
        ):
            layer.codes = codes
            change = layer.quantized_weight() - layer.weight
            x_hat = layer.input(x)
            out = F.linear(x_hat, change) if layer.conv_args is None else F.conv2d(x_hat, change, **layer.conv_args)
            out = out.movedim(1 if x.dim() == 4 else -1, -1)
            found.append(out.double().square().sum(-1).mean().item())
    assert last["before"] == pytest.approx(found[0], rel=1e-5)
    assert last["after"] == pytest.approx(found[1], rel=1e-5)
    assert last["after"] <= last["before"]
    assert last["kept"] == ("learned" if last["after"] < last["before"] else "nearest")


def test_a_long_row_is_solved_in_parts(monkeypatch):
    p, x = layer_of("conv")
    layer = p.quant_layers()[""]
    whole = moments_over(p, "", set(), [x]).parts[0]
    monkeypatch.setattr("qk.methods.gptq.LONGEST", 10)
    cut = Moments(layer)
    cut.add(layer.input(x))
    assert [part.shape[1] for part in cut.parts] == [10, 10, 4]
    torch.testing.assert_close(
        cut.parts[1], whole[:, 10:20, 10:20], rtol=1e-5, atol=1e-4
    )  # sums of 40 float32 products
    gptq(p, [x], progress="off")
    assert p.history[""][-1]["after"] <= p.history[""][-1]["before"]


class Net(nn.Module):
    """A stem, a branch with a depthwise layer, a layer that runs twice, a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.deep, self.side = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 8, 1)
        self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.deep(x) + self.side(x)).relu().mean((2, 3))
        return self.head(self.twice(self.twice(x).relu()).relu())


def net():
    torch.manual_seed(0)
    return Net().eval()


def images():
    return list(torch.randn(48, 3, 9, 8, generator=torch.Generator().manual_seed(0)).split(16))


def prepared(**fields):
    p = prepare(net(), images()[0], Recipe(**{"weights": 3, "activations": 6, "method": "gptq", **fields}))
    calibrate(p, images())
    return p


def solved(source=None, folder=None, **fields):
    p = prepared(**fields)
    gptq(p, source or images(), Recipe(method="gptq", **fields), progress="off", folder=folder)
    return p


def codes(p):
    return [layer.codes for layer in p.quant_layers().values()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(codes(a), codes(b), strict=True)) and a.history == b.history


@pytest.mark.parametrize("fields", [{}, {"group_size": 3, "first_last": None}, {"symmetric": True}, {"weights": 2}])
def test_a_whole_model_loses_less_and_is_deployed_bit_for_bit(fields, tmp_path):
    if "group_size" in fields:
        fields |= {"overrides": {name: {"group_size": 4} for name in ("side", "twice", "head")}}
    p = prepared(**fields)
    steps = [(layer.weight_step, layer.weight_zero, layer.input.step.clone()) for layer in p.quant_layers().values()]
    batch = images()[0]
    with torch.no_grad():
        expected = p.model(batch)
        with p.quantized():
            before = (p.model(batch) - expected).square().mean()
        gptq(p, images(), Recipe(**fields), progress="off")
        with p.quantized():
            simulated = p.model(batch)
        assert (simulated - expected).square().mean() < before
        assert torch.equal(p.model(batch), expected)  # in float it is as it was
        integer = convert(p)
        found = integer(batch)
        torch.testing.assert_close(found, simulated)
        assert torch.equal(load(save(integer, tmp_path), net())(batch), found)
        with qk.deploy.definition():
            assert torch.equal(integer(batch), found)
    assert list(p.history) == list(p.quant_layers())
    for (step, zero, input_step), layer in zip(steps, p.quant_layers().values(), strict=True):
        assert torch.equal(step, layer.weight_step)
        assert torch.equal(zero, layer.weight_zero)
        assert torch.equal(input_step, layer.input.step)
    assert not any(m._forward_hooks for m in p.model.modules())


def test_equal_calls_give_equal_bits_and_options_others():
    first = solved()
    assert same(first, solved())
    assert same(first, solved(source=iter(images())))
    assert not same(first, solved(act_order=False))
    assert not same(first, solved(prefix="float"))
    assert all(layer.codes.is_contiguous() for layer in first.quant_layers().values())


def test_inputs_come_from_the_quantized_prefix_or_from_the_float_model():
    p = prepared()
    batch = images()[:1]
    seen = []
    handle = p.quant_layers()["deep"].register_forward_hook(lambda layer, args, _: seen.append(args[0]))
    with p.quantized({"stem"}), torch.no_grad():
        p.model(batch[0])
    p.model(batch[0])
    handle.remove()
    layer = p.quant_layers()["deep"]
    for prefix, x in (({"stem"}, layer.input(seen[0])), (None, seen[1])):
        expected = Moments(layer)
        with torch.no_grad():
            expected.add(x)
            found = moments_over(p, "deep", prefix, batch)
        assert torch.equal(found.parts[0], expected.parts[0])
        assert found.positions == 16 * 7 * 6
    with torch.no_grad():
        assert moments_over(p, "twice", None, batch).positions == 2 * 16  # both calls


class Branches(nn.Module):
    """Readers of one tensor: two that take it alike, one that takes it with a stride; then two of another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c, self.d, self.e = nn.Conv2d(4, 4, 3, stride=2), nn.Linear(36, 3), nn.Linear(36, 3)

    def forward(self, x):
        y = (self.a(x) + self.b(x)).relu().flatten(1)
        return self.d(y) + self.e(y) + self.c(x).mean((2, 3))[:, :3]


def test_layers_that_read_one_tensor_alike_share_its_moments(monkeypatch):
    batches = list(torch.randn(4, 5, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    p = prepare(Branches(), batches[0], Recipe(weights=4, first_last=None))
    calibrate(p, batches)
    other, names = copy.deepcopy(p), []

    def seen(runs, name):
        names.append(name)
        return moments_of(runs, name)

    monkeypatch.setattr("qk.methods.gptq.moments_of", seen)
    gptq(p, batches, progress="off")
    assert names == ["a", "d", "c"]
    names.clear()
    monkeypatch.setattr("qk.methods.gptq._read", lambda p, name: name)
    gptq(other, batches, progress="off")
    assert names == ["a", "b", "d", "e", "c"]
    for mine, theirs in zip(p.quant_layers().values(), other.quant_layers().values(), strict=True):
        assert torch.equal(mine.codes, theirs.codes)


@pytest.mark.parametrize("prefix", ["quantized", "float"])
def test_a_block_goes_on_from_its_inputs_to_the_bits_of_whole_runs(prefix):
    batches = list(torch.randn(3, 5, 4, 6, 6, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    p = prepare(residual_net(), batches[0], Recipe(weights=3, first_last=None))
    assert [len(unit.layers) for unit in p.units] == [1, 2, 2, 1]
    calibrate(p, batches)
    other, calls = copy.deepcopy(p), []
    p.model.register_forward_pre_hook(lambda *_: calls.append(1))
    gptq(p, batches, Recipe(prefix=prefix), progress="off")
    assert len(calls) == 4 * 3  # for each unit and batch once, not for each layer
    alone = [replace(unit, name=name, layers=(name,)) for unit in other.units for name in unit.layers]
    other.units = alone
    gptq(other, batches, Recipe(prefix=prefix), progress="off")
    for mine, theirs in zip(p.quant_layers().values(), other.quant_layers().values(), strict=True):
        assert torch.equal(mine.codes, theirs.codes)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    whole, calls = solved(), []

    def interrupted(*args):
        calls.append(args[1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return moments_of(*args)

    monkeypatch.setattr("qk.methods.gptq.moments_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        solved(folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    calls += [""] * 10
    assert same(solved(folder=tmp_path), whole)
    assert len(calls) == 3 + 10 + 3
    with pytest.raises(QkError, match=r"^qk.gptq: .*recipe.act_order True instead of False.*Delete the folder"):
        solved(folder=tmp_path, act_order=False)


def test_the_recipe_asks_for_it(tmp_path):
    recipe = Recipe(weights=3, activations=6, method="gptq")
    result = qk.quantize(net(), images(), recipe, out=tmp_path, measure=False, progress=False)
    expected = convert(solved())
    with torch.no_grad():
        assert torch.equal(result.model(images()[0]), expected(images()[0]))
    assert all(len(points) == 2 and points[1]["loss"] <= points[0]["loss"] for points in result.report.losses.values())
    assert not (tmp_path / "unfinished").exists()


def test_the_last_of_several_points_is_chosen():
    p = prepared(points=2, points_error=1e-4)
    qk.multipoint(p, images(), error=1e-4)
    layer = p.quant_layers()["deep"]
    assert layer.extra_rows > 0
    first, fixed = layer.codes[layer.tail_owners.long()], layer.fixed_weight()
    gptq(p, images(), progress="off")
    assert torch.equal(layer.codes[layer.tail_owners.long()], first)
    assert torch.equal(layer.fixed_weight(), fixed)
    assert all(entries[-1]["after"] <= entries[-1]["before"] for entries in p.history.values())
    convert(p)


def test_bad_input_is_refused_before_anything_changes():
    with pytest.raises(QkError, match=r"qk.gptq: p must be calibrated"):
        gptq(prepare(net(), images()[0], Recipe()), images())
    p = prepared()
    before = codes(p)
    for bad, words in [
        ([], "batches must be at least one batch"),
        ([torch.zeros(1, 4, 8, 8)], "batch 0 must be input that the model accepts"),
        ([torch.full((1, 3, 8, 8), torch.inf)], "the input of stem must be finite"),
    ]:
        with pytest.raises(QkError, match=words):
            gptq(p, bad, Recipe(prefix="float"), progress="off")
        assert all(a is b for a, b in zip(before, codes(p), strict=True))
    with pytest.raises(QkError, match=r"prefix must be 'quantized' or 'float'"):
        Recipe(prefix="none")


def test_what_is_in_training_is_refused():
    p = prepared()
    qk.trainable(p)
    with pytest.raises(QkError, match=r"qk.gptq: p must be .* got stem, which is in training"):
        gptq(p, images(), progress="off")
