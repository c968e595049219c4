"""Multipoint: points are the paper's, channels are chosen by what they lose, and the last point is what is learned."""

import itertools
import math

import pytest
import torch
from torch import nn

import qk
from qk.calibrate import calibrate, correct_bias
from qk.calibrate.moments import SecondMoments, second_moments
from qk.deploy import layer_errors
from qk.errors import QkError
from qk.methods import overhead, reconstruct
from qk.methods.multipoint import (
    Candidates,
    best_step,
    candidates,
    costs_of,
    decompose,
    error_of,
    grid_step,
    left_after,
    multipoint,
    nearest,
    refit,
    spread,
    top_of,
)
from qk.prepare import prepare
from qk.prepare.insert import to_kernel_order
from qk.spec import QuantSpec, Recipe
from small_nets import inputs, residual_net

SEARCHES = [best_step, grid_step]


def rows(n=7, k=19, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def lengths(left):
    return left.norm(dim=2)


# --- decomposition ----------------------------------------------------------------------------------------------------


def test_the_worked_numbers_of_two_bits():
    w = torch.tensor([[1.0, 0.4, -0.3, 0.05]])
    for search in SEARCHES:
        codes, steps = decompose(w, 2, 3, search)
        assert codes[:, 0].tolist() == [[1, 0, 0, 0], [0, 1, -1, 0], [0, 1, 1, 1]]
        torch.testing.assert_close(steps[:, 0], torch.tensor([1.0, 0.35, 0.05]), rtol=1e-6, atol=0)
        # The last is 0 but for the rounding of steps to float32.
        expected = torch.tensor([[1.1191515], [0.50249378], [0.08660254], [0.0]], dtype=torch.float64)
        torch.testing.assert_close(lengths(left_after(w, codes, steps)), expected, rtol=1e-6, atol=1e-7)


def test_the_worked_numbers_of_three_bits():
    w = torch.tensor([[1.0, 0.4, -0.3, 0.05]])
    codes, steps = decompose(w, 3, 3, grid_step)
    assert codes[:, 0].tolist() == [[3, 1, -1, 0], [0, 3, 2, 2], [-1, 0, -1, 1]]
    torch.testing.assert_close(3 * steps[:, 0], torch.tensor([1.008, 0.06432, 0.0220]), rtol=1e-3, atol=0)
    found = lengths(left_after(w, codes, steps))[1:, 0]
    torch.testing.assert_close(found, torch.tensor([0.0891964, 0.0127331, 0.00089]).double(), rtol=1e-2, atol=0)
    exact = lengths(left_after(w, *decompose(w, 3, 1)))
    assert exact[1] < found[0]


@pytest.mark.parametrize("bits", [2, 3])
def test_the_exact_step_is_the_best_of_all_codes(bits):
    w = rows(5, 5, seed=bits).double()
    w[0, 1], w[1] = w[0, 0], torch.tensor([0.0, 0.0, 1.0, -1.0, 0.5])  # ties, zeros
    every = torch.tensor(list(itertools.product(range(-top_of(bits), top_of(bits) + 1), repeat=5))).double()
    gain = (w @ every.T).clamp(min=0).square() / every.square().sum(1).clamp(min=1)
    expected = w.square().sum(1) - gain.amax(1)
    step = best_step(w, bits)
    found = (w - step[:, None] * nearest(w, step, bits)).square().sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_exact_step_is_never_worse_than_the_grids(bits):
    w = rows(11, 37).double()
    errors = [(w - s[:, None] * nearest(w, s, bits)).square().sum(1) for s in (f(w, bits) for f in SEARCHES)]
    assert bool((errors[0] <= errors[1] + 1e-12).all())


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_point_leaves_less_until_nothing_is_left(bits, search):
    codes, steps = decompose(rows(), bits, 3, search)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) == top_of(bits)
    assert bool((steps > 0).all())
    assert bool((lengths(left_after(rows(), codes, steps)).diff(dim=0) < 0).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_nothing_is_added_to_a_row_that_is_met(bits):
    ended = torch.tensor([[4.0, -4.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    codes, steps = decompose(ended, bits, 3)
    assert not left_after(ended, codes, steps)[1].any()
    assert not codes[1:].any()
    assert steps[1:].unique().tolist() == [1.0]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_scale_and_sign_of_a_row_are_those_of_its_points(bits):
    codes, steps = decompose(rows(), bits, 3)
    assert torch.equal(decompose(rows() * 0.25, bits, 3)[0], codes)  # a power of two, so no rounding differs
    assert torch.equal(decompose(rows() * 0.25, bits, 3)[1], steps * 0.25)
    assert torch.equal(decompose(-rows(), bits, 3)[0], -codes)
    assert torch.equal(decompose(-rows(), bits, 3)[1], steps)


def test_a_row_does_not_depend_on_the_others():
    codes, steps = decompose(rows(), 4, 3)
    alone = decompose(rows()[2:3], 4, 3)
    assert torch.equal(alone[0], codes[:, 2:3])
    assert torch.equal(alone[1], steps[:, 2:3])


def test_the_error_falls_exponentially():
    codes, steps = decompose(rows(64, 200), 3, 3)
    left = lengths(left_after(rows(64, 200), codes, steps)).mean(1)
    assert bool((left[1:] < 0.5 * left[:-1]).all())


# --- steps fitted together --------------------------------------------------------------------------------------------


def moments_of(x, groups=1):
    moments = SecondMoments("", groups, x.shape[-1], 10**9)
    moments.add(x.reshape(groups, -1, x.shape[-1]))
    return moments


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_fit_is_that_of_least_squares(count):
    x, w = rows(40, 19, seed=1), rows()
    codes, steps = decompose(w, 3, 3)
    products = moments_of(x).between(left_after(w, codes, steps))
    factors = refit(products, count)
    errors = error_of(products, factors)
    for c in range(len(w)):
        points = (steps[:count, c, None] * codes[:count, c]).double()
        outputs, target = x.double() @ points.T, x.double() @ w[c].double()
        expected = torch.linalg.lstsq(outputs, target[:, None]).solution.flatten()
        # The products are float32 sums over 40 rows; least squares amplifies that by the points' condition, below 100.
        torch.testing.assert_close(factors[c], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(errors[c], (outputs @ expected - target).square().mean(), rtol=1e-3, atol=1e-9)


def test_equal_points_and_empty_ones_are_fitted_as_one():
    w = torch.tensor([[2.0, 4.0, -2.0]])
    codes = torch.tensor([[[1, 2, -1]], [[1, 2, -1]], [[0, 0, 0]]], dtype=torch.int8)
    left = left_after(w, codes, torch.tensor([[1.0], [0.5], [1.0]]))
    products = left.transpose(0, 1) @ left.permute(1, 2, 0)
    factors = refit(products, 3)
    assert error_of(products, factors).item() == pytest.approx(0, abs=1e-10)


def test_a_fit_that_would_turn_a_point_around_is_left_out():
    w = torch.tensor([[1.0, 1.0]])
    codes = torch.tensor([[[1, 0]], [[0, 1]]], dtype=torch.int8)
    x = torch.tensor([[1.0, 1.5], [1.0, 1.5], [-1.0, 0.5]])
    left = left_after(w, codes, torch.tensor([[3.0], [1.0]]))
    products = torch.einsum("vnk,mk,ml,wnl->nvw", left, x.double(), x.double(), left)
    assert refit(products, 1).item() > 0
    turned = products.clone()
    turned[:, 0, 1:] = turned[:, 1:, 0] = 10.0  # as if the rest pointed along the row
    assert refit(turned, 1).tolist() == [[1.0]]


def test_more_points_and_a_fit_never_raise_the_error_of_the_output():
    moments, w = moments_of(rows(200, 19, seed=1) + 0.5), rows(30, 19)
    found = {fit: candidates(w, 2, 3, moments, fit=fit) for fit in ("none", "weights", "outputs")}
    assert bool((found["outputs"].errors.diff(dim=0) <= 0).all())
    assert bool((found["outputs"].errors <= found["none"].errors * (1 + 1e-6)).all())
    assert torch.equal(found["none"].codes, found["outputs"].codes)
    for n in range(1, 4):  # of the weight itself
        left = [left_after(w, c.codes[:n], c.steps[n - 1, :n])[n].norm(dim=1) for c in found.values()]
        assert bool((left[1] <= left[0] * (1 + 1e-6)).all())


def test_errors_are_those_of_the_outputs():
    x, w = rows(50, 19, seed=1), rows()
    found = candidates(w, 3, 2, moments_of(x))
    for n in (1, 2):
        values = (found.steps[n - 1, :n, :, None] * found.codes[:n]).double().sum(0)
        expected = (x.double() @ (w - values).T).square().mean(0)
        torch.testing.assert_close(found.errors[n - 1], expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(found.power, (x.double() @ w.double().T).square().mean(0), rtol=1e-5, atol=0)


# --- which channels ---------------------------------------------------------------------------------------------------


def layer_of(errors, power):
    errors = torch.tensor(errors).double().T
    return Candidates(torch.empty(0), torch.empty(0), errors, torch.tensor(power).double())


def test_rows_go_where_they_take_off_most_for_their_cost():
    one = layer_of([[8, 3, 1], [6, 5, 4.9]], [50, 50])  # gains 5, 2 and 1, 0.1 in percent
    two = layer_of([[80, 70, 70], [20, 20, 20]], [500, 500])  # gains 1, 0 and 0, 0
    chosen = [
        (1.0, [[2, 1], [1, 1]]),
        (2.5, [[3, 1], [1, 1]]),
        (3.5, [[3, 2], [1, 1]]),  # 1 for a cost of 1, before two's 1 for a cost of 2
        (5.5, [[3, 2], [2, 1]]),
        (1e9, [[3, 3], [2, 1]]),
    ]
    for budget, expected in chosen:
        assert [c.tolist() for c in spread([one, two], [1.0, 2.0], budget=budget)] == expected


def test_what_is_too_dear_leaves_the_budget_to_the_rest():
    dear, cheap = layer_of([[9, 0]], [10]), layer_of([[1, 0]], [10])
    assert [c.tolist() for c in spread([dear, cheap], [5.0, 1.0], budget=2.0)] == [[1], [2]]


def test_channels_get_points_until_their_error_is_small_enough():
    layer = layer_of([[8, 3, 1], [0.4, 0.1, 0], [3, 0.5, 0.1], [0, 0, 0]], [10, 10, 10, 0])
    assert spread([layer], [1.0], error=0.05)[0].tolist() == [3, 1, 2, 1]
    assert spread([layer], [1.0], error=0.05, budget=2)[0].tolist() == [2, 1, 2, 1]


def test_a_point_that_raises_the_error_is_not_taken():
    assert spread([layer_of([[1, 2, 0]], [10])], [1.0])[0].tolist() == [1]


# --- the stage --------------------------------------------------------------------------------------------------------


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
        ({"budget": 0}, "budget must be above 0, or None, got 0"),
        ({"error": -1.0}, "error must be above 0, or None"),
        ({"error": math.nan}, "error must be above 0, or None"),
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
    with pytest.raises(QkError, match="p must be a model with a layer of several points"):
        qk.quantize(model, batches(), Recipe(points_error=0.1, method="nearest"), progress=False)
