"""Multipoint on models: a budget is kept and spent, errors fall, and the last point is what is learned."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import qk
from qk.calibrate import calibrate, correct_bias
from qk.calibrate.moments import second_moments
from qk.deploy import layer_errors
from qk.errors import QkError
from qk.methods import overhead, reconstruct
from qk.methods.multipoint import costs_of, multipoint
from qk.prepare import prepare
from qk.prepare.insert import to_kernel_order
from qk.spec import QuantSpec, Recipe
from small_nets import inputs, residual_net


def batches():
    return list(torch.randn(4, 5, 4, 6, 6, generator=torch.Generator().manual_seed(1)))


def prepared(bits=2, points=3, **fields):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = residual_net()
    p = prepare(model, batches()[0], Recipe(weights=bits, points=points, first_last=None, **fields))
    calibrate(p, batches())
    return p


def output_errors(p):
    """Of each layer, as a part of its mean square, with float inputs."""
    return {name: 10 ** (-db / 10) for name, db in layer_errors(p, batches()).items()}


@pytest.mark.parametrize("cost", ["both", "macs", "rows"])
def test_a_budget_is_kept_and_spent(cost):
    p = prepared()
    multipoint(p, batches(), budget=0.3, cost=cost)
    spent = sum(
        layer.extra_rows * c
        for layer, c in zip(p.quant_layers().values(), costs_of(p, list(p.layers), cost), strict=True)
    )
    assert 0.25 < spent <= 0.3
    found = overhead(p)
    assert found.extra_rows == sum(layer.extra_rows for layer in p.quant_layers().values())
    assert found.rows == 4 * 5 + 3
    if cost == "macs":
        assert found.extra_macs == pytest.approx(spent)
    assert 2 < found.bits <= 6


def test_a_fifth_of_the_channels_with_two_points_of_4_bits_has_4_8_bits_a_weight():
    model, x = nn.Linear(6, 10), torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
    p = prepare(model, x, Recipe(weights=4, points=3, first_last=None))
    calibrate(p, [x])
    multipoint(p, [x], budget=0.2, cost="rows")
    found = overhead(p)
    assert (found.rows, found.extra_rows, found.extra_macs, found.bits) == (10, 2, pytest.approx(0.2), 4.8)


def test_the_error_of_every_layer_falls_with_its_rows():
    errors = []
    for budget in (1e-9, 0.3, 1.0, 9.0):
        p = prepared()
        multipoint(p, batches(), budget=budget)
        errors.append(sum(output_errors(p).values()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.2 * errors[0]


def test_every_channel_stays_below_the_error_asked_for_where_three_points_reach_it():
    p = prepared(bits=3)
    multipoint(p, batches(), error=0.01)
    seen = set()
    for name, moments in second_moments(p, list(p.layers), batches(), "stage", 100):
        layer = p.quant_layers()[name]
        w = layer.weight_rows()
        products = moments.between(torch.stack([w, w - rows_of(layer)]))
        share = products[:, 1, 1] / products[:, 0, 0]
        owners = [] if layer.tail_owners is None else layer.tail_owners.tolist()
        count = torch.tensor([1 + owners.count(c) for c in range(len(w))])
        assert bool(((share <= 0.01 * (1 + 1e-3)) | (count == 3)).all())
        seen |= set(count.tolist())
    assert seen >= {1, 2}


def rows_of(layer):
    return to_kernel_order(layer.quantized_weight().contiguous()).reshape(layer.weight.shape[0], -1)


def test_the_simulated_weight_is_the_sum_of_the_points_and_code_0_is_unused():
    p = prepared(bits=3)
    multipoint(p, batches(), budget=0.5)
    layers = [layer for layer in p.quant_layers().values() if layer.extra_rows]
    assert layers
    for layer in layers:
        assert layer.weight_zero.unique().tolist() == [4]
        assert min(int(layer.codes.min()), int(layer.tail_codes.min())) >= 1
        expected = ((layer.codes.float() - 4).flatten(1) * layer.weight_step[:, None]).clone()
        for i, owner in enumerate(layer.tail_owners.tolist()):
            expected[owner] += (layer.tail_codes[i].float() - 4).flatten() * layer.tail_step[i]
        assert torch.equal(rows_of(layer), expected)


def test_equal_calls_give_equal_bits_and_the_options_differ():
    def run(**options):
        p = prepared()
        multipoint(p, batches(), budget=0.3, **options)
        state = p.model.state_dict()
        return {name: t for name, t in state.items() if "tail" in name or "weight_step" in name}

    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())

    first = run()
    assert same(first, run())
    assert same(first, run(memory_mb=1))
    for options in ({"search": "grid"}, {"inputs": "quantized"}, {"fit": "none"}, {"fit": "weights"}):
        assert not same(first, run(**options))


def test_layers_of_8_bits_keep_one_point():
    p = prepared(overrides={"0": {"weights": 8}, "4": {"points": 1}})
    before = {name: p.quant_layers()[name].codes for name in ("0", "4")}
    assert [spec.points for spec in p.plan.layers.values()] == [1, 3, 3, 3, 3, 1]
    multipoint(p, batches())
    assert all(torch.equal(p.quant_layers()[name].codes, codes) for name, codes in before.items())
    assert overhead(p).extra_rows > 0


def test_calibration_takes_the_rows_away():
    p = prepared()
    multipoint(p, batches())
    assert overhead(p).extra_rows > 0
    calibrate(p, batches())
    assert overhead(p).extra_rows == 0


def test_means_are_corrected_with_all_points():
    p = prepared()
    multipoint(p, batches())
    correct_bias(p, batches())
    assert overhead(p).extra_rows > 0
    first = p.quant_layers()["0"]
    x = torch.cat(batches())
    with torch.no_grad():
        plain = first(x).mean((0, 2, 3))
        first.quantized = True
        torch.testing.assert_close(first(x).mean((0, 2, 3)), plain, rtol=0, atol=1e-5)


def test_reconstruction_learns_the_last_point_alone(tmp_path):
    def run(folder):
        p = prepared()
        multipoint(p, batches(), budget=0.6)
        before = {name: (x.codes, x.tail_codes, x.last_codes) for name, x in p.quant_layers().items()}
        reconstruct(p, batches(), Recipe(iterations=60, batch_size=8, weight_lr=1e-2), progress="off", folder=folder)
        return p, before

    p, before = run(tmp_path)
    assert sum(h[-1]["kept"] == "learned" for h in p.history.values()) >= 2
    moved = 0
    for name, layer in p.quant_layers().items():
        codes, tail, last = before[name]
        moved += int((layer.last_codes != last).sum())
        if layer.tail_owners is None:
            continue
        owners = layer.tail_owners
        assert torch.equal(layer.codes[owners], codes[owners])
        third = owners[torch.arange(len(owners)) >= len(owners.unique())]
        seconds = torch.isin(owners[: len(owners.unique())], third)
        assert torch.equal(layer.tail_codes[: len(seconds)][seconds], tail[: len(seconds)][seconds])
    assert moved > 0
    again, _ = run(tmp_path)  # from the files of finished units
    for name, layer in p.quant_layers().items():
        assert torch.equal(layer.quantized_weight(), again.quant_layers()[name].quantized_weight())


def test_what_does_not_fit_is_refused_and_changes_nothing():
    p = prepared()
    before = {name: t.clone() for name, t in p.model.state_dict().items()}
    for options, words in [
        ({"budget": 0}, "budget must be a number above 0, or None, got 0"),
        ({"error": -1.0}, "error must be a number above 0, or None"),
        ({"error": math.nan}, "error must be a number above 0, or None"),
        ({"budget": "a tenth"}, "budget must be a number above 0, or None, got 'a tenth'"),
        ({"cost": "time"}, "cost must be one of both, macs, rows"),
        ({"inputs": "integer"}, "inputs must be one of float, quantized"),
        ({"search": "random"}, "search must be one of exact, grid"),
        ({"fit": "yes"}, "fit must be one of outputs, weights, none"),
        ({"memory_mb": 0.0001}, "room for the second moments"),
    ]:
        with pytest.raises(QkError, match=words):
            multipoint(p, batches(), **options)
    with pytest.raises(QkError, match="batch 0 must be input that the model accepts"):
        multipoint(p, [torch.zeros(1, 3, 8, 8)])
    assert all(torch.equal(t, before[name]) for name, t in p.model.state_dict().items())
    with pytest.raises(QkError, match="p must be a model with a layer of several points"):
        multipoint(prepared(points=1), batches())
    with pytest.raises(QkError, match="p must be calibrated"):
        multipoint(prepare(nn.Linear(3, 2), torch.zeros(1, 3), Recipe()), [torch.zeros(1, 3)])


def test_gptq_rounds_the_last_point_alone():
    p = prepared()
    multipoint(p, batches(), budget=0.6)
    before = {name: layer.fixed_weight() for name, layer in p.quant_layers().items()}
    errors = sum(output_errors(p).values())
    qk.gptq(p, batches(), Recipe(prefix="float"), progress="off")
    assert overhead(p).extra_rows > 0
    for name, layer in p.quant_layers().items():
        after = layer.fixed_weight()
        assert (after is None) == (before[name] is None)
        assert after is None or torch.equal(after, before[name])
    assert sum(output_errors(p).values()) < errors


def test_training_is_refused():
    p = prepared()
    multipoint(p, batches())
    with pytest.raises(QkError, match="p must be with one row for each channel, got several points in"):
        qk.trainable(p)
    train = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in batches()]
    with pytest.raises(QkError, match="points must be 1 with the method lsq"):
        qk.quantize(residual_net(), batches(), Recipe(method="lsq", points=2), train=train)


def test_specs_that_no_points_fit_are_refused():
    for fields in (
        {"weights": 8, "symmetric": True},
        {"weights": 4},
        {"weights": 4, "symmetric": True, "group_size": 8},
    ):
        with pytest.raises(QkError, match="points above 1 need symmetric weights of 2 to 4 bits without group_size"):
            QuantSpec(points=2, **fields)
    assert QuantSpec(4, 8, symmetric=True, points=2).describe() == "W4A8 in up to 2 points"
    with pytest.raises(QkError, match="points"):
        Recipe(points=4)
    with pytest.raises(QkError, match="points_budget"):
        Recipe(points=2, points_budget=0)


def test_the_recipe_asks_for_it(tmp_path):
    model = residual_net()
    recipe = Recipe(weights=2, points=3, points_budget=0.4, method="nearest")
    result = qk.quantize(model, batches(), recipe, out=tmp_path, progress=False, latency_batches=())
    assert "choose points" in result.report.seconds
    extra = {r.name: r.extra_rows for r in result.report.layers}
    assert sum(extra.values()) == overhead(result.prepared).extra_rows > 0
    assert extra["0"] == 0  # 8 bits
    note = next(n for n in result.report.notes if "rows more than the 16 of the layers" in n)
    assert "bits a weight on average" in note
    name = max(extra, key=extra.get)
    assert f", 4 + {extra[name]} rows, " in next(r.width for r in result.report.layers if r.name == name)
    assert "in up to 3 points" in result.report.title
    with torch.no_grad():
        x = inputs(3, 4, 6, 6)
        assert torch.equal(qk.load(tmp_path, model)(x), result.model(x))
    rows = qk.quantize(model, batches(), replace(recipe, points_cost="rows"), progress=False, measure=False)
    spent = overhead(rows.prepared)
    assert 0.4 * spent.rows - 1 < spent.extra_rows <= 0.4 * spent.rows
    with pytest.raises(QkError, match="p must be a model with a layer of several points"):
        qk.quantize(model, batches(), Recipe(points_error=0.1, method="nearest"), progress=False)


class Apart(nn.Module):
    """Two layers that err alike, of which the second hardly counts."""

    def __init__(self):
        super().__init__()
        self.counts, self.idles = nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        return self.counts(x) + 1e-3 * self.idles(x)


def test_rows_go_to_the_layer_that_the_loss_feels():
    torch.manual_seed(0)
    model, data = Apart(), list(torch.randn(4, 16, 8))
    found = {}
    for compare in ("loss", "power"):
        p = prepare(model, data[0], Recipe(weights=3, points=2, first_last=None))
        calibrate(p, data)
        multipoint(p, data, budget=0.4, compare=compare)
        found[compare] = [layer.extra_rows for layer in p.quant_layers().values()]
    assert found["loss"] == [4, 0]
    assert min(found["power"]) > 0


class Boxes(nn.Module):
    """As many rows as lie above 0."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x):
        y = self.layer(x)
        return y[y[:, 0] > 0]


def test_an_output_of_no_fixed_shape_is_compared_by_power():
    torch.manual_seed(1)
    model, data = Boxes(), list(torch.randn(4, 256, 8))
    counts = []
    for compare in ("loss", "power"):
        p = prepare(model, data[0], Recipe(weights=2, points=2, first_last=None))
        calibrate(p, data)
        multipoint(p, data, compare=compare, budget=0.4)
        counts.append(p.quant_layers()["layer"].codes)
        with p.quantized({"layer"}) as quantized:
            shapes = {quantized(x).shape for x in data} ^ {model(x).shape for x in data}
        assert shapes
    assert torch.equal(*counts)
