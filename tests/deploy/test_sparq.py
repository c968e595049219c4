"""Integer layers whose inputs SPARQ cuts: the simulation's sums, the definition's bits, files and fused networks."""

import copy
import pickle

import pytest
import torch
from torch import nn

import qk
from deploy.small import minmax, small_images, small_model, small_prepared
from prepare.test_windows import SETTINGS, sparse
from qk import ops
from qk.deploy import definition, fuse, unfused
from qk.deploy.modules import integer_layers
from qk.errors import QkError
from qk.ops.sparq import FAMILIES
from qk.options import Sparq
from qk.prepare import prepare
from qk.spec import Recipe

settings = pytest.mark.parametrize("sparq", SETTINGS, ids=lambda s: f"{s.window} {s.pairs}")


def prepared(sparq, **fields):
    """small_model with windows everywhere; 2:4 sparse where they pair by weights."""
    model = small_model()
    if sparq.pairs == "weights":
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer is not model.out:
                layer.weight.data = sparse(layer.weight.data)
    recipe = {"weights": 4, "skip": ("plain",), "method": "nearest", "sparq": sparq, "first_last": None} | fields
    x = small_images()
    return minmax(prepare(model, x, Recipe(**recipe)), [x])


def run(model, x):
    with torch.no_grad():
        return model(x)


@settings
def test_integer_layers_compute_the_simulation_and_the_definition(sparq):
    p, x = prepared(sparq), small_images()
    model = qk.convert(p)
    layers = integer_layers(model)
    assert sum(layer.cuts == sparq for layer in layers.values()) >= 2
    with definition():
        expected = run(model, x)
    assert torch.equal(run(model, x), expected)
    seen = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, y, name=name: seen.setdefault(name, []).append((args[0], y)))
        for name, layer in layers.items()
    ]
    run(model, x)
    for hook in hooks:
        hook.remove()
    for name, simulated in p.quant_layers().items():
        with p.quantized({name}), torch.no_grad():
            for x, y in seen[name]:
                # Both sum the same integers; the simulation in float32, each product and sum rounded.
                torch.testing.assert_close(simulated(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", qk.usable_isas())
@settings
def test_every_instruction_set_gives_the_definitions_bits(sparq, isa):
    model, x = qk.convert(prepared(sparq)), small_images()
    with definition():
        expected = run(model, x)
    before = qk.active_isa()
    try:
        qk.force_isa(isa)
        for layer in integer_layers(model).values():
            layer.prepack()
        assert torch.equal(run(model, x), expected)
    finally:
        qk.force_isa(before)


@settings
def test_saved_loaded_copied_and_pickled_ones_give_the_same_bits(sparq, tmp_path):
    model, x = qk.convert(prepared(sparq)), small_images()
    expected = run(model, x)
    loaded = qk.load(qk.save(model, tmp_path), small_model())
    assert loaded.qk_info.plan == model.qk_info.plan
    assert loaded.qk_info.plan["left"].sparq == sparq
    layers = {name: pickle.loads(pickle.dumps(layer)) for name, layer in integer_layers(model).items()}
    assert all(layer.cuts == integer_layers(model)[name].cuts for name, layer in layers.items())
    for other in (loaded, copy.deepcopy(model)):
        assert torch.equal(run(other, x), expected)


def test_a_state_with_another_zero_decides_anew():
    model = qk.convert(prepared(Sparq("5opt")))
    left = model.left
    assert left.cuts == Sparq("5opt")
    state = left.state_dict() | {"input_zero": torch.tensor([3], dtype=torch.int32)}
    left.load_state_dict(state)
    assert left.cuts is None


@pytest.mark.parametrize(
    ("sparq", "tensors"),
    [(SETTINGS[0], 8), (SETTINGS[1], None), (SETTINGS[3], 8), (SETTINGS[3], None), (SETTINGS[5], 8)],
)
def test_a_fused_network_gives_the_bits_of_the_unfused_one(sparq, tensors):
    model, x = qk.convert(prepared(sparq)), small_images()
    fused, one_by_one = fuse(model, x, tensors=tensors), unfused(model, x, tensors=tensors)
    for size in (3, 1, 5):
        assert torch.equal(run(fused, small_images(size)), run(one_by_one, small_images(size)))
    if tensors is None:
        assert torch.equal(run(fused, x), run(model, x))
    steps = [op for region in fused.regions for op, _ in region.steps]
    if sparq.pairs == "weights":  # versions of values are made by torch: such layers stand between regions
        assert any("has no integer form here" in reason for name, reason in fused.report if name.startswith("left"))
    else:
        assert "sparq" in steps
        assert not any(name.startswith("left") for name, _ in fused.report)


def test_layers_of_one_tensor_share_the_cut_in_a_fused_network():
    p = small_prepared(sparq="5opt")
    steps = [op for region in fuse(qk.convert(p), small_images()).regions for op, _ in region.steps]
    assert steps.count("sparq") == 1  # left and right read the same
    qk.set_windows(p, {"right": Sparq("2opt")})
    steps = [op for region in fuse(qk.convert(p), small_images()).regions for op, _ in region.steps]
    assert steps.count("sparq") == 2


def test_the_cut_codes_are_what_is_multiplied():
    """One layer by hand: quantize, cut, multiply, with the operators alone."""
    model = qk.convert(small_prepared(sparq="3opt"))
    layer, x = model.right, torch.relu(torch.randn(2, 12, 5, 6, generator=torch.Generator().manual_seed(0)))
    codes = ops.quantize(x.permute(0, 2, 3, 1).contiguous(), layer.input_step, layer.input_zero, 8)
    cut = ops.sparq(codes, *FAMILIES["3opt"])
    assert not torch.equal(cut, codes)
    expected = ops.conv2d(
        cut, layer.input_step, layer.input_zero, layer.prepacked, layer.weight_step, layer.bias, 4, (1, 1)
    )
    assert torch.equal(run(layer, x), expected.permute(0, 3, 1, 2))


def test_exported_and_compiled_layers_give_the_same_bits():
    model, x = qk.convert(prepared(Sparq("5opt", signed=True))), small_images()
    expected = run(model, x)
    exported = torch.export.export(model, (x,)).module()
    assert torch.equal(run(exported, x), expected)


def test_quantize_reports_what_was_cut(tmp_path):
    recipe = Recipe(weights=8, method="nearest", sparq="5opt", sparq_bits=6.6, match_statistics=True, first_last=None)
    result = qk.quantize(small_model(), [small_images()], recipe, out=tmp_path, measure=False, progress=False)
    inputs = result.report.inputs
    assert (inputs["stem"].window, inputs["stem"].reason) == ("whole", "its input has values below 0")
    assert inputs["left"].window in FAMILIES
    assert {"choose windows", "match statistics"} <= set(result.report.seconds)
    again = qk.report.Report.from_dict(result.report.to_dict())
    assert again.inputs["left"] == inputs["left"]
    assert ["left", inputs["left"].window] in [row[:2] for row in result.report.inputs_table().rows]
    assert "SPARQ" in result.report.section()
    assert torch.equal(run(qk.load(tmp_path, small_model()), small_images()), run(result.model, small_images()))


def test_an_edited_window_is_refused(tmp_path):
    qk.save(qk.convert(small_prepared(sparq="5opt")), tmp_path)
    manifest = tmp_path / "qk.json"
    manifest.write_text(manifest.read_text().replace('"window": "5opt"', '"window": "4opt"'))
    with pytest.raises(QkError, match="window"):
        qk.load(tmp_path, small_model())
