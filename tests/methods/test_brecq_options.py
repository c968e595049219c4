"""What a recipe may choose of BRECQ: what is learned together, by which loss, in which order and what is dropped."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from methods.digits import quantized_digits, same, state
from qk.calibrate import calibrate
from qk.calibrate.objective import task_loss
from qk.methods import brecq, reconstruct
from qk.methods.cache import Room, Sample
from qk.methods.engine import (
    fill_cache,
    fisher,
    frozen,
    full_fisher,
    loss_on_all,
    loss_scale,
    outputs_of,
    power_of,
    weighted_square,
)
from qk.prepare import prepare, product
from qk.spec import Recipe
from small_nets import Residual

pytestmark = pytest.mark.usefixtures("one_thread")


# --- granularities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["stage", "net"])
def test_a_stage_and_the_whole_net_are_matched_at_their_ends(digits, batches, granularity):
    recipe = Recipe(weights=3, activations=4, iterations=100, granularity=granularity, weight_lr=1e-2)
    p = quantized_digits(digits, batches, recipe)
    expected = digits.model(digits.test_images).detach()
    with p.quantized(), torch.no_grad():
        nearest = (p.model(digits.test_images) - expected).square().mean().item()
    reconstruct(p, batches, recipe, progress="off")
    assert list(p.history) == ([u.name for u in p.stages] if granularity == "stage" else [""])
    with p.quantized(), torch.no_grad():
        assert (p.model(digits.test_images) - expected).square().mean().item() < 0.8 * nearest


def test_a_chain_is_learned_as_the_module_that_holds_the_same_blocks(batches):
    # The same two blocks, once inside a module of their own and once beside others: the same bits.
    class Stage(nn.Sequential):
        pass

    torch.manual_seed(0)
    stem, one, two = nn.Conv2d(1, 4, 1), Residual(), Residual()
    recipe = Recipe(weights=3, activations=4, iterations=20, granularity="stage", weight_lr=1e-2)
    found = []
    for model in (nn.Sequential(stem, Stage(one, two)), nn.Sequential(stem, one, two)):
        p = prepare(model, batches[0][:2], recipe)
        calibrate(p, batches)
        reconstruct(p, batches, recipe, progress="off")
        assert p.history[p.stages[-1].name][-1]["kept"] == "learned"
        found.append(state(p))
    assert [unit.chain for unit in p.stages] == [(), ("1", "2")]
    assert same(*found)


# --- losses -----------------------------------------------------------------------------------------------------------


def test_the_full_fisher_loss_and_its_slope_are_as_written():
    torch.manual_seed(0)
    output = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randn_like(output).detach(), torch.rand_like(output).detach()
    by_hand = ((weight.sqrt() * (output - target).abs()).sum((1, 2)).square() / 10).sum()
    loss, slope = full_fisher(output, Sample((), {}, target, weight), 0.7)
    torch.testing.assert_close(loss, 0.7 * by_hand.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(0.7 * by_hand, output)[0])
    # At most the weighted square, by Cauchy and Schwarz, and equal where all errors of a sample weigh the same.
    square = weighted_square(output.detach().float(), Sample((), {}, target.float(), weight.float()), 0.7)[0]
    assert loss < square
    even = Sample((), {}, output.detach() - 2, torch.ones_like(weight))
    torch.testing.assert_close(full_fisher(output, even, 0.7)[0], 0.7 * torch.tensor(4.0 * 30, dtype=torch.float64))


def test_the_loss_of_a_power_and_its_slope_are_as_written():
    torch.manual_seed(0)
    output = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randn_like(output).detach()
    by_hand = 0.3 * (output - target).abs().pow(2.4).sum()
    loss, slope = power_of(2.4)(output, Sample((), {}, target, None), 0.3)
    torch.testing.assert_close(loss, by_hand.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(by_hand, output)[0])


def test_full_fisher_learns(digits, batches):
    recipe = Recipe(weights=3, activations=4, iterations=60, loss="fisher_full", weight_lr=1e-2)
    p = quantized_digits(digits, batches, recipe)
    reconstruct(p, batches, recipe, progress="off")
    kept = [entries[-1]["kept"] for entries in p.history.values()]
    assert kept.count("learned") >= 3
    with p.quantized():
        assert digits.accuracy(p.model) > digits.accuracy(digits.model) - 3.0


def test_a_unit_beside_the_output_that_is_compared_learns_by_plain_errors():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 3)

        def forward(self, x):
            x = self.body(x).relu()
            return self.first(x), self.second(x)

    data = list(torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(0)
    p = prepare(TwoHeads(), data[0], Recipe(first_last=None))
    calibrate(p, data)
    outputs = outputs_of(p, data, Room(1))
    found = {unit.name: fill_cache(p, unit, set(), data, Room(1), outputs).parts[0].weight for unit in p.units}
    assert (found["second"] == 1).all()
    assert not (found["first"] == 1).all()
    reconstruct(p, data, Recipe(first_last=None, loss="fisher", iterations=2), progress="off")


def test_fisher_is_the_squared_gradient_of_each_sample(digits, batches):
    p = quantized_digits(digits, batches, Recipe(weights=2, activations=4))
    unit, batch = p.units[1], batches[0][:4]
    module = p.model.get_submodule(unit.name)
    with frozen(p.model):
        (expected,) = outputs_of(p, [batch], Room(1))
        with p.quantized(set(p.units[0].layers) | set(unit.layers)):
            together = fisher(p, module, batch, 0, expected)
            for i in range(4):
                alone = fisher(p, module, batch[i : i + 1], 0, expected[i : i + 1])
                torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-3, atol=1e-8)
            # By hand: the rest of the model, from the unit's own output.
            seen = []
            handle = module.register_forward_hook(lambda _, args, output: seen.append(output.detach()))
            p.model(batch)
            handle.remove()
        output = seen[0].requires_grad_()
        rest = p.model.fc(p.model.layers[1:](output).mean((2, 3)))
        task_loss(rest, expected).backward()
        torch.testing.assert_close(together, output.grad.square())


def test_the_task_loss_is_a_divergence_for_logits_and_a_square_otherwise():
    a, b = torch.randn(3, 5), torch.randn(3, 5)
    by_hand = (b.softmax(1) * (b.log_softmax(1) - a.log_softmax(1))).sum()
    torch.testing.assert_close(task_loss(a, b), by_hand)
    a, b = torch.randn(3, 5, 2, 2), torch.randn(3, 5, 2, 2)
    torch.testing.assert_close(task_loss(a, b), 0.5 * (a - b).square().sum())


def test_the_loss_is_summed_over_channels_and_averaged_over_the_rest(digits, batches):
    p = quantized_digits(digits, batches, Recipe())
    layers = list(p.quant_layers().values())
    assert loss_scale(torch.zeros(2, 16, 3, 5), layers[:1]) == pytest.approx(1 / (2 * 15))
    assert loss_scale(torch.zeros(2, 10), layers[-1:]) == pytest.approx(1 / 2)
    assert loss_scale(torch.zeros(2, 7, 10), layers[-1:]) == pytest.approx(1 / 14)


# --- orders and dropping ----------------------------------------------------------------------------------------------


def test_weights_first_learns_rounding_with_float_activations_and_then_steps(digits, batches, monkeypatch):
    recipe = Recipe(weights=3, activations=4, iterations=40, order="weights_first", weight_lr=1e-2, act_lr=1e-3)
    p = quantized_digits(digits, batches, recipe)
    calibrated = {name: layer.input.step.item() for name, layer in p.quant_layers().items()}
    seen = []
    step = brecq.Learner.step

    def watched(self, sample, iteration):
        floats = all(layer.input.passes for layer in self.layers)
        seen.append((floats, bool(self.roundings), bool(self.steps)))
        return step(self, sample, iteration)

    monkeypatch.setattr(brecq.Learner, "step", watched)
    reconstruct(p, batches, recipe, progress="off")
    units = len(p.units)
    assert seen == [(True, True, False)] * 40 * units + [(False, False, True)] * 10 * units
    assert list(p.history) == [u.name for u in p.units] + [f"{u.name} (steps)" for u in p.units]
    assert all(entries[-1]["kept"] in ("learned", "calibrated") for entries in list(p.history.values())[units:])
    assert not any(layer.input.passes for layer in p.quant_layers().values())
    moved = [calibrated[name] != layer.input.step.item() for name, layer in p.quant_layers().items()]
    assert sum(moved) >= len(moved) - 1  # the first reads the image, which no weight changes
    with p.quantized():
        assert digits.accuracy(p.model) > digits.accuracy(digits.model) - 3.0


def test_weights_first_interrupted_in_either_phase_resumes_with_the_same_bits(digits, batches, interrupted):
    recipe = Recipe(weights=3, activations=4, iterations=8, order="weights_first", weight_lr=1e-1, act_lr=1e-2)
    whole = quantized_digits(digits, batches, recipe)
    reconstruct(whole, batches, recipe, progress="off")
    for stop in (8 + 3, 8 * 5 + 1, 8 * 5 + 2 + 1):  # in the second unit; in the first and second of the steps
        p = quantized_digits(digits, batches, recipe)
        interrupted(stop, p, recipe)
        reconstruct(p, batches, recipe, progress="off", resume=True)
        assert same(state(p), state(whole))


def test_dropping_inside_mixes_at_every_quantizer_while_learning(digits, batches):
    recipe = Recipe(weights=3, activations=2, iterations=20, weight_lr=1e-2, drop=0.5, drop_inside=True)
    found = []
    for given in (recipe, recipe, replace(recipe, drop_inside=False)):
        p = quantized_digits(digits, batches, given)
        reconstruct(p, batches, given, progress="off")
        assert all(layer.input.mix is None for layer in p.quant_layers().values())
        found.append(state(p))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_mixed_value_is_the_quantized_or_the_float_one(digits, batches):
    recipe = Recipe(weights=3, activations=2, drop=0.25, drop_inside=True)
    p = quantized_digits(digits, batches, recipe)
    layer = p.quant_layers()["layers.0.conv2"]
    x = torch.rand(8, 16, 8, 8) * 3
    quantized = layer.input(x)
    learner = brecq.Learner(layer, [layer], [layer.input], recipe, generator=torch.Generator().manual_seed(0))
    with learner:
        mixed = layer.input(x)
    taken = mixed == quantized
    assert torch.equal(mixed, torch.where(taken, quantized, x))
    share = taken[quantized != x].float().mean().item()
    assert abs(share - 0.25) < 0.03  # 8,192 draws: a deviation is 0.005


# --- precision --------------------------------------------------------------------------------------------------------


def test_products_of_bfloat16_learn_as_well_and_judge_in_float32(digits, batches, monkeypatch):
    monkeypatch.setattr(product, "MACS", 0)  # the layers of this network are too small otherwise
    recipe = Recipe(weights=3, activations=4, iterations=100, batch_size=32)
    expected = digits.model(digits.test_images).detach()
    errors, codes = {}, {}
    for precision in ("float32", "bfloat16"):
        given = replace(recipe, precision=precision)
        p = quantized_digits(digits, batches, given)
        with p.quantized(), torch.no_grad():
            errors["nearest"] = (p.model(digits.test_images) - expected).square().mean().item()
        reconstruct(p, batches, given, progress="off")
        assert all(layer.narrow is None for layer in p.quant_layers().values())
        with p.quantized(), torch.no_grad():
            errors[precision] = (p.model(digits.test_images) - expected).square().mean().item()
        codes[precision] = state(p)
        cache = fill_cache(p, p.units[-1], set(p.quant_layers()) - set(p.units[-1].layers), batches, Room(64))
        with p.quantized(set(p.quant_layers())):
            judged = loss_on_all(
                p.units[-1].module(p.model), cache, 32, [p.quant_layers()[n] for n in p.units[-1].layers]
            )
        assert judged == p.history[p.units[-1].name][-1]["after"]
    assert not same(codes["float32"], codes["bfloat16"])
    assert errors["bfloat16"] < 0.8 * errors["nearest"]


@pytest.mark.parametrize(
    ("precision", "isa", "expected"),
    [
        ("auto", "amx", torch.bfloat16),
        ("auto", "avx512vnni", None),
        ("float32", "amx", None),
        ("bfloat16", "generic", torch.bfloat16),
    ],
)
def test_auto_asks_for_bfloat16_where_there_are_tiles(monkeypatch, precision, isa, expected):
    monkeypatch.setattr("qk._native.active_isa", lambda: isa)
    assert brecq.narrow_of(Recipe(precision=precision), torch.device("cpu")) is expected
    if precision == "auto":
        assert brecq.narrow_of(Recipe(precision=precision), torch.device("meta")) is None


# --- decided roundings ------------------------------------------------------------------------------------------------


def test_what_is_decided_leaves_no_subnormal_averages_and_no_other_codes(digits, batches, monkeypatch):
    recipe = Recipe(weights=3, activations=4, iterations=1000, warmup=0, weight_lr=0.1, act_lr=0)
    found = {}
    for every in (brecq.SWEEP, 10**9):
        monkeypatch.setattr(brecq, "SWEEP", every)
        p = quantized_digits(digits, batches, recipe)
        layer = p.quant_layers()["fc"]
        x = torch.randn(16, layer.weight.shape[1], generator=torch.Generator().manual_seed(0)).relu()
        sample = Sample((x,), {}, x @ layer.weight.detach().t(), None)
        with p.quantized({"fc"}), frozen(p.model), brecq.Learner(layer, [layer], [], recipe) as learner:
            for iteration in range(recipe.iterations):
                learner.step(sample, iteration)
            (average,) = (state["exp_avg"] for state in learner.optimizer.state.values())
            (rounding,) = learner.roundings
            tiny = (average != 0) & (average.abs() < torch.finfo(torch.float32).tiny)
            found[every] = int(tiny.sum()), rounding.codes()
    swept, left = found.values()
    assert swept[0] == 0 < left[0]
    assert torch.equal(swept[1], left[1])
