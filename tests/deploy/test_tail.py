"""Extra rows of integer layers: one meaning in kernels, definition, simulation and checkpoint."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import qk
from deploy.checkpoints import edit, tensor_file
from deploy.small import small_images, small_model, small_prepared, tensors_for
from deploy.test_modules import CONVS, image
from qk import ops
from qk.bench.networks import Network
from qk.deploy import QConv2d, QLinear, convert, definition, fuse, load, save, unfused
from qk.deploy.convert import deployed_weight
from qk.deploy.modules import integer_layers
from qk.deploy.tail import slots_for
from qk.errors import QkError
from qk.methods import multipoint, overhead
from qk.prepare.insert import from_kernel_order
from qk.spec import QuantSpec

SHAPES = {**CONVS, "doubled": {"shape": (12, 3, 3, 1), "groups": 6, "padding": (1, 1)}}
OWNERS = ((0, 2, 5), (0, 1, 2, 3, 4, 5, 2, 5), (5,))


def with_tail(shape, owners, weights=4, activations=8, bias=True):
    """Tensors of a layer whose channels have points, and its spec."""
    spec = QuantSpec(weights, activations, symmetric=True, points=3)
    tensors, _ = tensors_for(shape, spec, bias)
    rows, _ = tensors_for((len(owners), *shape[1:]), spec, seed=1)
    tensors["weight_zero"] = torch.full((shape[0],), 2 ** (weights - 1), dtype=torch.int32)
    tensors |= {"tail_packed": rows["packed"], "tail_step": rows["weight_step"]}
    tensors["tail_owners"] = torch.tensor(owners)
    return tensors, spec


def conv(name="plain", owners=OWNERS[1], **widths):
    config = dict(SHAPES[name])
    shape = config.pop("shape")
    return QConv2d(*with_tail(shape, owners, **widths), shape, **config)


def linear(owners=OWNERS[1], **widths):
    return QLinear(*with_tail((21, 36), owners, **widths), (21, 36))


def twin(module):
    """The float layer whose weight is the sum of the points, in float64."""
    weight = from_kernel_order(deployed_weight(module)).double()
    bias = None if module.bias is None else module.bias.double()

    def run(x):
        step, zero = module.input_step, module.input_zero
        x = ops.dequantize(ops.quantize(x, step, zero, module.input_bits), step, zero).double()
        if isinstance(module, QLinear):
            return nn.functional.linear(x, weight, bias)
        return nn.functional.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)

    return run


CASES = [(name, OWNERS[1], *widths) for name in SHAPES for widths in ((2, 4), (3, 5), (4, 8))]
CASES += [(name, owners, 4, 8) for name in ("plain", "grouped", "depthwise", "doubled") for owners in OWNERS[::2]]


@pytest.mark.parametrize(("name", "owners", "weights", "activations"), CASES)
def test_a_convolution_equals_its_definition_and_the_float_layer(name, owners, weights, activations, device):
    module = conv(name, owners, weights=weights, activations=activations)
    x = image(module)
    y = module.to(device)(x.to(device)).cpu()
    with definition():
        assert torch.equal(module.cpu()(x), y)
    # Each of three products is rounded thrice, as in test_modules; sums of them twice.
    torch.testing.assert_close(y.double(), twin(module)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_equals_its_definition_and_the_float_layer(owners, bias, device):
    module = linear(owners, bias=bias)
    x = torch.randn(3, 2, 36, generator=torch.Generator().manual_seed(5))
    y = module.to(device)(x.to(device)).cpu()
    with definition():
        assert torch.equal(module.cpu()(x), y)
    torch.testing.assert_close(y.double(), twin(module)(x), rtol=1e-5, atol=1e-5)
    assert module(x[0, 0]).shape == (21,)
    assert module(x[:0]).shape == (0, 2, 21)


def test_the_sum_has_one_order():
    """Of each channel the first row with its bias, then the second, then the third: float32, each sum rounded."""
    module = linear((3, 7, 3))
    x = torch.randn(4, 36, generator=torch.Generator().manual_seed(5))
    codes = ops.quantize(x, module.input_step, module.input_zero, 8).double() - module.input_zero

    def product(rows, steps):
        sums = codes @ (rows.double() - 8).T
        return sums.float() * (module.input_step * steps)

    y = product(module.weight_codes(), module.weight_step) + module.bias
    tail = product(module.tail_codes(), module.tail_step)
    expected = y.clone()
    expected[:, 3] = (y[:, 3] + tail[:, 0]) + tail[:, 2]
    expected[:, 7] = y[:, 7] + tail[:, 1]
    assert torch.equal(module(x), expected)


def test_the_rows_of_a_group_stay_in_it():
    """An extra row of an owner reads the inputs of the owner's group alone."""
    for name in ("grouped", "depthwise", "doubled"):
        module = conv(name, (1, 5))
        module.bias.zero_()
        x = image(module)
        per_out, per_in = module.out_features // module.groups, module.in_channels // module.groups
        only = torch.zeros_like(x)
        group = 5 // per_out
        only[:, group * per_in : (group + 1) * per_in] = x[:, group * per_in : (group + 1) * per_in]
        assert torch.equal(module(only)[:, 5], module(x)[:, 5])


def test_slots_of_a_tail():
    plain = slots_for(torch.tensor([1, 5]), 8, 1, 4)
    assert plain == (1, 2, None, None)
    deep = slots_for(torch.tensor([1, 5, 5]), 8, 8, 1)
    assert (deep.groups, deep.rows, deep.reads.tolist(), deep.places) == (3, 3, [1, 5, 5], None)
    some = slots_for(torch.tensor([0, 1, 5, 1]), 8, 4, 3)  # groups 0 and 2 of two channels each
    assert (some.groups, some.rows, some.places.tolist()) == (2, 6, [0, 1, 3, 2])
    assert some.reads.tolist() == [0, 1, 2, 6, 7, 8]
    whole = slots_for(torch.tensor([0, 2, 4, 6]), 8, 4, 3)
    assert (whole.groups, whole.rows, whole.reads) == (4, 4, None)


@pytest.mark.parametrize("make", [linear, lambda: conv("grouped"), lambda: conv("depthwise")])
def test_copies_pickles_and_other_dtypes_keep_the_tail(make):
    module = make()
    x = image(module) if isinstance(module, QConv2d) else torch.randn(3, 36)
    y = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.deepcopy(module).half()):
        assert torch.equal(other(x), y)
        assert other.tail_step.dtype == torch.float32
    again = make()
    with torch.no_grad():
        again.tail_packed.zero_()
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(x), y)
    assert not any("prepacked" in n or "reads" in n or "places" in n or "steps" in n for n in module.state_dict())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tail_owners": torch.tensor([0, 21])}, r"tail_owners must be channels, from 0 to 20"),
        ({"tail_owners": torch.tensor([4, 2])}, r"tail_owners must be third points of channels"),
        ({"tail_owners": torch.tensor([4, 2]).int()}, r"tail_owners must be torch.int64 \[2\], got torch.int32 \[2\]"),
        ({"tail_owners": torch.zeros(0, dtype=torch.int64)}, r"tail_packed must be"),
        ({"tail_step": torch.tensor([1.0, 0.0])}, r"tail_step must be positive and finite"),
        ({"tail_step": torch.ones(3)}, r"tail_step must be torch.float32 \[2\], got torch.float32 \[3\]"),
        ({"tail_packed": None}, r"the tail must be whole: tail_packed, tail_step, tail_owners, got tail_step"),
    ],
)
def test_a_tail_that_does_not_fit_is_refused(change, words):
    tensors, spec = with_tail((21, 36), (2, 4))
    with pytest.raises(QkError, match=f"QLinear: {words}"):
        QLinear(tensors | change, spec, (21, 36))
    with pytest.raises(QkError, match="the tail must be absent in a layer of one point, got 2 rows"):
        QLinear(tensors, QuantSpec(4, 8, symmetric=True), (21, 36))


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared():
    p = small_prepared(weights=3, points=3)
    multipoint(p, [small_images()], budget=0.5)
    assert overhead(p).extra_rows > 5
    return p


@pytest.fixture(scope="module")
def model(prepared):
    return convert(prepared)


@pytest.fixture
def folder(model, tmp_path):
    return save(model, tmp_path / "out")


def test_a_small_model_equals_its_definition_and_its_simulation(prepared, model):
    x = small_images(2)
    layers = {name: layer for name, layer in integer_layers(model).items() if layer.tail_owners is not None}
    assert {"left", "depth"} <= set(layers)  # grouped and depthwise
    with torch.no_grad():
        y = model(x)
        with definition():
            assert torch.equal(model(x), y)
    for name, layer in layers.items():
        simulated = prepared.quant_layers()[name]
        assert torch.equal(from_kernel_order(deployed_weight(layer)), simulated.quantized_weight())
        # The same integers: sums in float64 of the simulated layer's codes are those of the kernel but for the
        # rounding of float32 (three products, four sums).
        shape = (2, *prepared.layers[name].input_shape[1:])
        inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        simulated.quantized = True
        with torch.no_grad():
            torch.testing.assert_close(layer(inputs), simulated(inputs), rtol=1e-5, atol=1e-5)
        simulated.quantized = False


def test_a_loaded_model_gives_the_same_bits(model, folder, tmp_path):
    x = small_images()
    loaded = load(folder, small_model(seed=7))
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}
    again = save(loaded, tmp_path / "again")
    assert (again / "qk.json").read_bytes() == (folder / "qk.json").read_bytes()
    fields = json.loads((folder / "qk.json").read_text())
    layers = integer_layers(model).items()
    rows = {name: layer.tail_owners.numel() for name, layer in layers if layer.tail_owners is not None}
    assert rows
    assert {name: c["extra_rows"] for name, c in fields["layers"].items() if c["extra_rows"]} == rows
    assert load_file(tensor_file(folder))["left.tail_owners"].dtype == torch.int64


def test_wrong_checkpoints_are_refused(folder):
    def lies(fields):
        fields["layers"]["left"]["extra_rows"] += 1

    def too_many(fields):
        fields["layers"]["left"]["extra_rows"] = 25

    def unplanned(fields):
        fields["plan"]["layers"]["left"]["points"] = 1

    before = (folder / "qk.json").read_text()
    for change, words in [
        (lies, r"left.tail_owners must be \d+ rows, got \d+"),
        (too_many, "extra_rows must be from 0 to 2 for each row"),
        (unplanned, "left has extra_rows, for which the plan has no points"),
    ]:
        edit(folder, change)
        with pytest.raises(QkError, match=words):
            load(folder, small_model())
        (folder / "qk.json").write_text(before)


def test_owners_that_were_edited_are_refused(model, tmp_path):
    other = copy.deepcopy(model)
    other.left.tail_owners[-1] = 12
    folder = save(other, tmp_path)
    with pytest.raises(
        QkError, match=r"layer left: QConv2d: tail_owners must be channels, from 0 to 11, got \d+ to 12"
    ):
        load(folder, small_model())


def test_it_is_exported_and_compiled(model):
    x = small_images()
    with torch.no_grad():
        y = model(x)
        program = torch.export.export(model, (x,), strict=False)
        assert torch.equal(program.module()(x), y)
        assert torch.equal(program.run_decompositions({}).module()(x), y)
        module = conv("grouped")
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(image(module)), module(image(module)))


def test_fused_layers_of_several_points_end_as_others_do(model, prepared):
    """Residual, activation and codes belong to both products and to what puts the one into the other."""
    x = small_images()
    fused, plain = fuse(model, x), fuse(convert(small_prepared(weights=3)), x)
    with torch.no_grad():
        assert torch.equal(fused(x), unfused(model, x)(x))
        assert torch.equal(fuse(model, x, tensors=None)(x), model(x))
    assert fused.report == plain.report
    assert len(fused.regions) == len(plain.regions)
    added = {"conv2d", "gemm", "index_put", "index_select"}
    assert {op: n for op, n in fused.steps.items() if op not in added} == {
        op: n for op, n in plain.steps.items() if op not in added
    }
    layers = [layer for layer in integer_layers(model).values() if layer.tail_owners is not None]
    runs = len(layers) + ("twice" in prepared.quant_layers())  # which runs twice
    assert fused.steps["index_put"] == runs
    assert fused.steps["index_select"] > 0
    products = sum(fused.steps[op] - plain.steps[op] for op in ("conv2d", "gemm"))
    assert products == runs
    tails = [line for region in fused.regions for line in region.program.splitlines() if line.startswith("index_put")]
    assert sum("out_scale" in line for line in tails) >= 3  # others are read in float


def test_flattened_images_are_read_right():
    """fuse puts the columns of a Linear behind a flatten in another order, which a tail would have to follow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5), nn.ReLU(), nn.Linear(5, 3)
        )
    x = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    p = qk.prepare(net, x, qk.Recipe(weights=2, points=2, first_last=None))
    qk.calibrate(p, [x])
    multipoint(p, [x], budget=1)
    model = convert(p)
    assert model.get_submodule("3").tail_owners is not None
    with torch.no_grad():
        assert torch.equal(fuse(model, x, tensors=None)(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "regnet_x_400mf", "mobilenet_v2", "mobilenet_v3_small"])
def test_networks_with_several_points_are_one_region(name):
    network = Network(f"torchvision:{name}", 2, 64)
    x = network.inputs[0]
    recipe = qk.Recipe(method="nearest", symmetric=True, points=3, points_budget=0.1)
    model = qk.quantize(network.model, [x], recipe, measure=False, fused=False, progress=False).model
    fused = fuse(model, x)
    with torch.no_grad():
        assert torch.equal(fused(x), unfused(model, x)(x))
    assert len(fused.regions) == 1
    assert fused.steps["index_put"] > 10
