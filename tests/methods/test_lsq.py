"""LSQ: a trainable model that is an ordinary one for PyTorch and an exact one for convert."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qk
from deploy.small import one_layer, small_images, small_model, small_prepared
from models import images, minilm, tokens, vision_model
from qk.calibrate.objective import first_tensor
from qk.calibrate.ranges import mse
from qk.deploy import definition
from qk.errors import QkError
from qk.inputs import feed
from qk.methods.lsq import (
    LearnedActivation,
    LsqLayer,
    param_groups,
    top,
    trainable,
)
from qk.ops.lsq import grad_scale_for, reference, reference_backward
from qk.options import Tuning
from qk.prepare import prepare
from qk.prepare.insert import from_kernel_order, to_kernel_order
from qk.spec import Recipe

PAPER = Tuning(start="paper")


def by_hand(p, first=None, tuning=None, steps=3, lr=0.05):
    """A loop as a user would write it: pulls the outputs to fixed targets."""
    model = trainable(p, tuning, first).train()
    targets = torch.randn(3, 10, generator=torch.Generator().manual_seed(5))
    optimizer = torch.optim.SGD(param_groups(model), lr=lr, momentum=0.9)
    for _ in range(steps):
        loss = (model(small_images()) - targets).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


# --- the layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", ["channel", "tensor"])
@pytest.mark.parametrize("group_size", [None, 6])
def test_a_layers_weight_and_its_gradients_are_the_definitions(steps, group_size):
    p = small_prepared(overrides={"left": {"group_size": group_size}})
    trainable(p, Tuning(steps=steps))
    layer = p.quant_layers()["left"]
    weight = to_kernel_order(layer.weight.detach())
    rows = {"channel": 12 if group_size is None else 12 * 6, "tensor": 1}[steps]
    step, zero = layer.raw_step.detach().reshape(-1), torch.full((rows,), 8, dtype=torch.int32)
    assert step.numel() == rows
    assert torch.equal(to_kernel_order(layer.quantized_weight()), reference(weight, step, zero, 4))
    grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    layer.quantized_weight().backward(from_kernel_order(grad))
    scale = grad_scale_for(weight.numel() // rows, 7)
    grad_weight, grad_step = reference_backward(grad, weight, step, zero, 4, scale)
    assert torch.equal(to_kernel_order(layer.weight.grad), grad_weight)
    torch.testing.assert_close(layer.raw_step.grad.reshape(-1), grad_step, rtol=1e-5, atol=1e-6)


def test_steps_start_where_calibration_put_them():
    p = small_prepared(symmetric=True, overrides={"left": {"group_size": 6}})
    before = {name: (layer.weight_step, layer.input.step) for name, layer in p.quant_layers().items()}
    with p.quantized() as model:
        expected = model(small_images())
    assert torch.equal(trainable(p)(small_images()), expected)
    for name, layer in p.quant_layers().items():
        assert torch.equal(layer.raw_step, before[name][0])
        assert torch.equal(layer.input.step, before[name][1])


@pytest.mark.parametrize("steps", ["channel", "tensor"])
def test_steps_of_weights_with_other_zeros_are_found_anew(steps):
    p = small_prepared(weights=2)
    trainable(p, Tuning(steps=steps))
    layer = p.quant_layers()["left"]
    rows = layer.weight_rows() if steps == "channel" else layer.weight.detach().reshape(1, -1)
    assert torch.equal(layer.raw_step, mse(rows, 2, symmetric=True)[0])


@pytest.mark.parametrize("steps", ["channel", "tensor"])
def test_steps_start_where_the_paper_puts_them(steps):
    p, x = small_prepared(), small_images()
    trainable(p, Tuning(start="paper", steps=steps), x)
    layers = p.quant_layers()
    stem, left = layers["stem"], layers["left"]
    assert stem.input.step.item() == pytest.approx(2 * x.abs().mean().item() / top(8, int(stem.input.zero)) ** 0.5)
    with p.quantized(set()) as model:
        seen = torch.relu(model.stem(x))
    assert left.input.step.item() == pytest.approx(2 * seen.abs().mean().item() / 255**0.5, rel=1e-5)
    mean = left.weight.abs().mean() if steps == "tensor" else left.weight[3].abs().mean()
    step = left.raw_step[0] if steps == "tensor" else left.raw_step[3]
    assert step.item() == pytest.approx(2 * mean.item() / 7**0.5, rel=1e-5)


def test_n_counts_features_of_a_sample_or_values_of_a_batch():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    gradient = {}
    for count in ("features", "values"):
        torch.manual_seed(0)
        layer = trainable(one_layer()[1], Tuning(count=count))
        layer(x).sum().backward()
        gradient[count] = layer.input.raw_step.grad.item()
    assert gradient["features"] == pytest.approx(gradient["values"] * 8**0.5, rel=1e-5)


def test_layers_that_read_one_tensor_share_one_parameter():
    model = trainable(small_prepared())
    assert model.left.input is model.right.input
    assert sum(p is model.left.input.raw_step for p in model.parameters()) == 1


def test_weights_become_symmetric_and_the_plan_says_so():
    p = small_prepared(weights=2)
    trainable(p)
    assert all(spec.symmetric for spec in p.plan.layers.values() if not spec.is_float)
    integer = qk.convert(p)
    assert (integer.left.weight_zero == 2).all()
    assert integer.qk_info.plan == p.plan


# --- deployment -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", [Tuning(), Tuning(steps="tensor"), PAPER])
@pytest.mark.parametrize("weights", [2, 3, 4, 8])
def test_what_was_trained_by_hand_is_deployed_exactly(tuning, weights):
    p, x = small_prepared(weights=weights, activations=4), small_images()
    model = by_hand(p, x, tuning)
    integer = qk.convert(p)
    for name, layer in p.quant_layers().items():
        module = integer.get_submodule(name)
        weight = qk.ops.dequantize(module.weight_codes(), module.weight_step, module.weight_zero)
        assert torch.equal(from_kernel_order(weight), layer.quantized_weight())
        assert torch.equal(module.input_step, layer.input.step)
    with torch.no_grad():
        found = integer(x)
        with definition():
            assert torch.equal(found, integer(x))
        # Sums of the simulation round in float32 where the integers' do not; a code that flips there moves little.
        torch.testing.assert_close(found, model(x), rtol=0.05, atol=0.05 * float(found.abs().max()))


def test_where_floats_are_exact_the_simulation_is_the_integer_model():
    # Steps that are powers of two make every product and sum of the simulation exact in float32.
    p = small_prepared(overrides={"left": {"group_size": 6}})
    by_hand(p)
    with torch.no_grad():
        for layer in p.quant_layers().values():
            for raw in (layer.raw_step, layer.input.raw_step):
                raw.copy_(torch.exp2(torch.round(torch.log2(raw.abs()))))
            if layer.bias is not None:
                layer.bias.copy_((layer.bias * 64).round() / 64)
    integer = qk.convert(p)
    for name, layer in p.quant_layers().items():
        x = torch.randn(p.layers[name].input_shape, generator=torch.Generator().manual_seed(1))
        assert torch.equal(integer.get_submodule(name)(x), layer(x)), name


def test_steps_that_went_below_zero_are_deployed_as_they_are_simulated():
    _, p, x = one_layer()
    model = trainable(p)
    with torch.no_grad():
        expected = model(x)
        model.raw_step.neg_()
        model.input.raw_step.neg_()
        assert torch.equal(model(x), expected)
    integer = qk.convert(p)
    assert (integer.weight_step > 0).all()
    torch.testing.assert_close(integer(x), expected, rtol=1e-5, atol=1e-5)


def test_saved_and_loaded_it_is_the_same_with_the_float_layers_that_were_trained(tmp_path):
    p, x = small_prepared(), small_images()
    by_hand(p)
    integer = qk.convert(p)
    assert not torch.equal(integer.plain.weight, small_prepared().model.plain.weight)
    qk.save(integer, tmp_path)
    assert torch.equal(qk.load(tmp_path, small_model())(x), integer(x))


def test_biases_can_be_corrected_afterwards():
    p, x = small_prepared(), small_images()
    by_hand(p)
    qk.correct_bias(p, [x])
    assert torch.equal(qk.convert(p).left.bias, p.quant_layers()["left"].corrected_bias)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "minilm"])
def test_whole_networks_are_trained_and_deployed_exactly(name):
    model, batch = (minilm(), tokens()) if name == "minilm" else (vision_model(name), images())
    p = prepare(model, batch, Recipe(weights=4, activations=4))
    qk.calibrate(p, [batch])
    net = trainable(p).train()
    optimizer = torch.optim.SGD(param_groups(net), lr=1e-3, momentum=0.9)
    for _ in range(2):
        loss = first_tensor(feed(net, batch)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    integer = qk.convert(p)
    with torch.no_grad():
        found = first_tensor(feed(integer, batch))
        with definition():
            assert torch.equal(found, first_tensor(feed(integer, batch)))


# --- an ordinary module -----------------------------------------------------------------------------------------------


def test_the_input_model_stays_as_it_is():
    model, x = small_model(), small_images()
    before = copy.deepcopy(model.state_dict())
    p = prepare(model, x, Recipe())
    qk.calibrate(p, [x])
    by_hand(p)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_state_dict_is_complete():
    p, x = small_prepared(), small_images()
    model = by_hand(p)
    other = small_prepared()
    with torch.no_grad():
        for quantizer in {layer.input for layer in other.quant_layers().values()}:
            quantizer.set_range(torch.ones(1), torch.zeros(1))
    fresh = trainable(other).eval()
    assert not torch.equal(fresh(x), model(x))
    assert not fresh.load_state_dict(copy.deepcopy(model.state_dict())).missing_keys
    assert torch.equal(fresh(x), model(x))
    assert torch.equal(qk.convert(other)(x), qk.convert(p)(x))


def test_it_starts_from_the_same_numbers_every_time():
    first, second = (trainable(small_prepared(), PAPER, small_images()).state_dict() for _ in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_second_call_changes_nothing():
    p = small_prepared()
    model = by_hand(p)
    before = copy.deepcopy(model.state_dict())
    assert trainable(p, PAPER) is model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_copies_train_by_themselves():
    model = trainable(small_prepared())
    other = copy.deepcopy(model)
    other(small_images()).sum().backward()
    assert model.left.raw_step.grad is None
    assert other.left.input is other.right.input


def test_parameters_are_sorted_by_weight_decay():
    p = small_prepared(weights=2, overrides={"right": {"weights": 3}, "depth": {"weights": 4}})
    model = trainable(p)
    steps, none, *rest = param_groups(model)
    layers = p.quant_layers()
    assert {id(s) for s in steps["params"]} == {id(r) for x in layers.values() for r in (x.raw_step, x.input.raw_step)}
    assert len({id(s) for s in steps["params"]}) == len(steps["params"])
    assert steps["weight_decay"] == none["weight_decay"] == 0
    assert all(t.dim() == 1 for t in none["params"])
    decay = {id(t): group["weight_decay"] for group in rest for t in group["params"]}
    of = {name: decay[id(layers[name].weight)] for name in layers}
    assert of == {"stem": 1e-4, "left": 0.25e-4, "right": 0.5e-4, "depth": 1e-4, "twice": 0.25e-4, "head": 1e-4}
    assert decay[id(model.plain.weight)] == 1e-4
    groups = param_groups(model, weight_decay=0.3)
    assert [group["weight_decay"] for group in groups] == [0, 0, 0.3]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_what_is_frozen_gets_no_group():
    model = trainable(small_prepared())
    model.left.weight.requires_grad_(False)
    model.left.raw_step.requires_grad_(False)
    trained = {id(t) for group in param_groups(model) for t in group["params"]}
    assert {id(t) for t in model.parameters() if t.requires_grad} == trained


def test_autocast_leaves_steps_and_their_gradients_in_float32():
    p, x = small_prepared(), small_images()
    model = trainable(p).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for module in model.modules():
        if isinstance(module, (LsqLayer, LearnedActivation)):
            assert module.raw_step.dtype == module.raw_step.grad.dtype == torch.float32
            assert module.raw_step.grad.isfinite().all()
    torch.testing.assert_close(y.float(), model(x), rtol=0.1, atol=0.1 * float(y.detach().abs().max()))


def test_two_processes_train_one_model():
    script = Path(__file__).with_name("distributed.py")
    found = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert found.stdout.replace("\n", "") == "equalequal"  # the two may print into one line


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_is_not_ready_is_refused():
    p = prepare(small_model(), small_images(), Recipe())
    with pytest.raises(QkError, match=r"qk.trainable: p must be calibrated"):
        trainable(p)
    with pytest.raises(QkError, match=r"qk.trainable: p must be the result of qk.prepare"):
        trainable(p.model)
    p = small_prepared()
    plan = p.plan
    with pytest.raises(QkError, match=r"first must be a batch of inputs for start='paper'"):
        trainable(p, PAPER)
    with pytest.raises(QkError, match=r"batch 0 must be input that the model accepts"):
        trainable(p, PAPER, torch.ones(2, 5))
    assert p.plan == plan
    assert not any(isinstance(layer, LsqLayer) for layer in p.quant_layers().values())


def test_what_was_learned_is_not_thrown_away():
    p = small_prepared()
    qk.correct_bias(p, [small_images()])
    with pytest.raises(QkError, match=r"p must be as calibrated, .* got corrected biases in stem, left, .* lost"):
        trainable(p)
    qk.calibrate(p, [small_images()])
    qk.reconstruct(p, [small_images()], Recipe(iterations=2, batch_size=2), progress="off")
    with pytest.raises(QkError, match=r"p must be as calibrated, .* got learned codes, which would be lost"):
        trainable(p)
    qk.calibrate(p, [small_images()])
    trainable(p)


@pytest.mark.parametrize("what", ["weight", "bias", "raw_step"])
def test_what_a_loop_has_spoilt_is_not_deployed(what):
    p = small_prepared()
    model = trainable(p)
    with torch.no_grad():
        getattr(model.left, what).view(-1)[0] = torch.nan
    with pytest.raises(QkError, match=f"{what} of layer left must be finite, got NaN or infinity, which have codes"):
        qk.convert(p)
    other = small_prepared()
    trainable(other).half()
    with pytest.raises(QkError, match=r"weight of layer stem must be float32, got torch.float16. Call .float\(\)"):
        qk.convert(other)


def test_other_methods_refuse_what_is_in_training():
    p, x = small_prepared(), small_images()
    model = by_hand(p)
    before = copy.deepcopy(model.state_dict())
    for ranges in ("mse", "lapq"):
        with pytest.raises(QkError, match=r"qk.calibrate: p must be as prepared, got one in training"):
            qk.calibrate(p, [x, x], ranges)
    with pytest.raises(QkError, match=r"qk.reconstruct: p must be as prepared and calibrated"):
        qk.reconstruct(p, [x])
    with pytest.raises(QkError, match=r"in training"):
        p.quant_layers()["left"].set_weight_range(torch.ones(12), torch.ones(12))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
