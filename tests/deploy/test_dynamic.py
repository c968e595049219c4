"""Dynamic integer layers: the simulation's codes, the definition's bits, files and fused networks."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn

import qk
from deploy.checkpoints import edit
from deploy.small import tensors_for
from prepare.test_rows import AWKWARD
from qk import inspection, ops
from qk.deploy import QConv2d, QLinear, definition, fuse, unfused
from qk.deploy.modules import integer_layers
from qk.errors import QkError
from qk.spec import QuantSpec
from small_nets import encoder, inputs

STATIC = {"up": {"dynamic": False}}


def linear(k, weights=4, activations=8, group_size=None, n=7):
    spec = QuantSpec(weights, activations, group_size, dynamic=True)
    tensors, _ = tensors_for((n, k), spec)
    return QLinear(tensors | {"input_step": None, "input_zero": None}, spec, (n, k))


def prepared(**fields):
    recipe = {"weights": 4, "dynamic": True, "method": "nearest"} | fields
    p = qk.prepare(encoder(), inputs(4, 6, 16), qk.Recipe(**recipe))
    qk.calibrate(p, [inputs(4, 6, 16)])
    return p


def run(model, x):
    with torch.no_grad():
        return model(x)


def assert_defined(model, x):
    found = run(model, x)
    with definition():
        assert torch.equal(found.nan_to_num(), run(model, x).nan_to_num())
    return found


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize(("weights", "activations"), [(2, 4), (4, 8), (8, 5)])
def test_every_input_gives_the_definitions_bits(name, weights, activations, device):
    x = AWKWARD[name].to(device)
    module = linear(x.shape[-1], weights, activations).to(device)
    assert assert_defined(module, x).shape == (*x.shape[:-1], 7)


def test_rows_of_half_inputs_are_widened_first():
    x, module = inputs(3, 12).half(), linear(12, group_size=4)
    assert torch.equal(run(module, x), run(module, x.float()).half())


@pytest.mark.parametrize("fields", [{}, {"group_size": 8}, {"points": 3}, {"weights": 8, "activations": 6}])
def test_integer_layers_multiply_the_codes_of_the_simulation(fields):
    p = prepared(**fields)
    if "points" in fields:
        qk.multipoint(p, [inputs(4, 6, 16)], budget=0.5)
        assert p.quant_layers()["up"].extra_rows
    model = qk.convert(p)
    x = inputs(2, 5, 16)
    assert_defined(model, x)
    for name, layer in integer_layers(model).items():
        simulated = p.quant_layers()[name]
        x = inputs(3, layer.k)
        codes, step, zero = ops.quantize_rows(x, layer.input_bits)
        assert torch.equal(simulated.input(x), ops.dequantize(codes, step, zero))
        with p.quantized({name}):
            # Sums of at most 32 products in float32 in place of exact ones: 32 roundings of 2^-24 of their sizes.
            torch.testing.assert_close(run(layer, x), run(simulated, x), rtol=1e-5, atol=1e-5)


def test_a_layer_without_step_is_saved_loaded_copied_and_inspected(tmp_path):
    model, x = qk.convert(prepared(overrides=STATIC)), inputs(2, 5, 16)
    expected = run(model, x)
    folder = qk.save(model, tmp_path / "out")
    loaded = qk.load(folder, model=encoder())
    assert [name for name, spec in loaded.qk_info.plan.layers.items() if not spec.dynamic] == ["up"]
    for twin in (loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded)), loaded.half().float()):
        assert torch.equal(run(twin, x), expected)
    assert {name for name in loaded.state_dict() if name.endswith("input_step")} == {"up.input_step"}
    facts, _ = inspection.of_checkpoint(folder)
    assert {layer["name"]: layer["width"] for layer in facts["layers"]}["down"] == "W4A8 dynamic"
    meta = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    meta.load_state_dict(model.state_dict())
    assert torch.equal(run(meta, x), expected)


def test_a_checkpoint_from_before_there_was_the_field_is_static(tmp_path):
    model, x = qk.convert(prepared(dynamic=False)), inputs(2, 5, 16)
    folder = qk.save(model, tmp_path / "out")

    def without(fields):
        for spec in fields["plan"]["layers"].values():
            assert spec.pop("dynamic") is False

    edit(folder, without)
    assert "dynamic" not in json.dumps(json.loads((folder / "qk.json").read_text()))
    assert torch.equal(run(qk.load(folder, model=encoder()), x), run(model, x))


def test_a_plan_and_tensors_that_disagree_are_refused(tmp_path):
    folder = qk.save(qk.convert(prepared(overrides=STATIC)), tmp_path / "out")
    edit(folder, lambda fields: fields["plan"]["layers"]["up"].update(dynamic=True))
    with pytest.raises(QkError, match="layer up: QLinear: input_step must be absent in a dynamic layer"):
        qk.load(folder, model=encoder())
    edit(folder, lambda fields: fields["plan"]["layers"]["up"].update(dynamic=False))
    edit(folder, lambda fields: fields["plan"]["layers"]["down"].update(dynamic=False))
    with pytest.raises(QkError, match=r"layer down: QLinear: input_step must be torch.float32 \[1\], got nothing"):
        qk.load(folder, model=encoder())


def test_a_dynamic_convolution_is_refused():
    spec = QuantSpec(4, 8, dynamic=True)
    with pytest.raises(QkError, match=r"QConv2d: spec.dynamic must be false"):
        QConv2d(tensors_for((3, 1, 1, 4), spec)[0], spec, (3, 1, 1, 4))


@pytest.mark.parametrize("overrides", [{}, STATIC, {"down": {"dynamic": False}}, {"key": {"dynamic": False}}])
def test_a_fused_network_gives_the_same_bits_and_names_its_dynamic_layers(overrides):
    model, batches = qk.convert(prepared(overrides=overrides)), [inputs(4, 6, 16)]
    fast, exact, plain = fuse(model, batches), fuse(model, batches, tensors=None), unfused(model, batches)
    for x in (batches[0], inputs(1, 9, 16)):
        assert torch.equal(run(exact, x), run(model, x))
        assert torch.equal(run(fast, x), run(plain, x))
    reason = "each row of its input has a step of its own, which no fused step finds"
    dynamic = {name for name, layer in integer_layers(model).items() if layer.spec.dynamic}
    assert {name.removesuffix(": gemm") for name, why in fast.report if why == reason} == dynamic
    assert len(fast.regions) == (1 if overrides else 0)
    assert "regions" in repr(fast)


def test_queries_and_keys_of_a_fused_network_share_the_codes_of_their_rows():
    fast = fuse(qk.convert(prepared()), inputs(4, 6, 16))
    counts = [str(node.target) for node in fast.body.graph.nodes]
    assert counts.count("qk.quantize_rows.default") == 4  # of the input, and in front of up, down and head
    assert "aten.relu.default" not in counts  # it is the end of the product


def test_the_bits_stay_when_it_is_compiled_and_exported():
    model, x = qk.convert(prepared()), inputs(2, 5, 16)
    expected = run(model, x)
    assert torch.equal(run(torch.compile(model, fullgraph=True, backend="aot_eager"), x), expected)
    free = ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = torch.export.export(model, (x,), dynamic_shapes=free).module()
    for some in (x, inputs(3, 5, 16)):
        assert torch.equal(run(exported, some), run(model, some))


def test_the_model_itself_may_be_the_layer():
    p = qk.prepare(nn.Linear(6, 3), inputs(4, 6), qk.Recipe(dynamic=True))
    qk.calibrate(p, [inputs(4, 6)])
    assert_defined(qk.convert(p), inputs(2, 6))
