"""LAPQ: the joint search lowers the loss, keeps the best, asks the other half, and the cache changes no bit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import import_torchvision, vision_model
from qk.calibrate import calibrate, lapq
from qk.calibrate.observe import Observer
from qk.calibrate.prefix import PrefixCache
from qk.deploy import convert, definition
from qk.errors import QkError
from qk.prepare import prepare
from qk.spec import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.b(F.relu(self.a(x))))


class Net(nn.Module):
    """With a module that runs twice, an in-place activation, and linked layers."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Block(), Block())
        self.twice, self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(8, 6)

    def forward(self, x):
        x = self.blocks(self.stem(x).relu_()).mean((2, 3))
        x = self.twice(self.twice(x).relu_())
        return self.left(x) + self.right(x)


def net():
    torch.manual_seed(0)
    return Net().eval()


def images(seed=0, count=32, size=8):
    return list(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).split(size))


def prepared(model=None, weights=3, activations=3, **fields):
    recipe = Recipe(weights=weights, activations=activations, first_last=None, method="nearest", **fields)
    return prepare(model or net(), images()[0], recipe)


def found(ranges="lapq", batches=None, **more):
    p = prepared()
    calibrate(p, batches or images(), ranges, **more)
    return p


def state(p):
    tensors = []
    for layer in p.quant_layers().values():
        tensors += [layer.codes, layer.weight_step, layer.weight_zero, layer.input.step.detach(), layer.input.zero]
    return [None if x is None else x.clone() for x in tensors]


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "least", "most"), [(1.0, 0.5, 1.2), (0.08, 0.625, 2.0), (0.9, 0.5, 4 / 3)])
def test_a_step_stays_within_parts_of_the_one_that_clips_nothing(part, least, most):
    """Moves by a factor of 2 at most, and not below 0.05 or above 1.2 of it."""
    layer = prepared().quant_layers()["stem"]
    steps = lapq.Steps({"stem": layer})
    observers = {layer.input: Observer("stem")}
    observers[layer.input].see(images()[0])
    steps.begin(
        {owner: (step * part, zero) for owner in steps.owners for step, zero in [lapq.widest(owner, observers)]}
    )
    lower, upper = (np.exp(ends) for ends in steps.bounds(observers))
    assert lower.tolist() == pytest.approx([least] * 2, rel=1e-6)
    assert upper.tolist() == pytest.approx([most] * 2, rel=1e-6)


def test_worked_parabola():
    fitted = np.polyfit((2, 2.5, 3, 3.5, 4), (1.9, 1.6, 1.5, 1.58, 1.85), 2)
    assert fitted.tolist() == pytest.approx([0.377143, -2.286857, 4.963714], abs=5e-7)
    assert lapq.lowest_of_parabola((2, 2.5, 3, 3.5, 4), (1.9, 1.6, 1.5, 1.58, 1.85)) == pytest.approx(3.0318182)


@pytest.mark.parametrize(
    "losses",
    [
        (1.0, 1.2, 1.3, 1.2, 1.0),  # downwards
        (1.0, 1.0, 1.0, 1.0, 1.0),  # flat
        (1.0, 2.0, 3.0, 4.0, 5.0),  # a line
        (1.2, 1.5, 2.0, 2.7, 3.6),  # its vertex lies below 2
        (1.0, math.inf, 1.0, 1.0, 1.0),
        (1.0, math.nan, 1.0, 1.0, 1.0),
    ],
)
def test_no_parabola_to_speak_of(losses):
    assert lapq.lowest_of_parabola(lapq.POWERS, losses) is None


def bowl(x):
    return float((x[0] - 0.3) ** 2 + 2 * (x[1] + 0.2) ** 2 + (x[0] - 0.3) * (x[1] + 0.2))


def test_powell_finds_the_bottom_and_asks_the_judge():
    bounds = np.full(2, -0.7), np.full(2, 0.7)
    x, accepted = lapq.powell(bowl, *bounds, bowl, sweeps=6)
    np.testing.assert_allclose(x, (0.3, -0.2), atol=2 * lapq.GRAIN)
    assert accepted >= 1


def test_powell_stays_between_the_bounds():
    tried = []
    lower, upper = np.array([-0.1, 0.0]), np.array([0.1, 0.4])
    x, _ = lapq.powell(lambda x: tried.append(x) or bowl(x), lower, upper, bowl, sweeps=3)
    assert all((lower <= t).all() and (t <= upper).all() for t in tried)
    np.testing.assert_allclose(x, (0.1, 0.0), atol=1e-12)


def test_powell_returns_the_start_where_the_judge_finds_nothing_better():
    x, accepted = lapq.powell(bowl, np.full(2, -0.7), np.full(2, 0.7), lambda x: float(np.abs(x).sum()))
    assert accepted == 0
    np.testing.assert_array_equal(x, (0, 0))


def test_powell_survives_losses_that_are_not_finite():
    spoilt = lambda x: math.nan if x[0] < 0.1 else bowl(x)  # noqa: E731
    x, _ = lapq.powell(spoilt, np.full(2, -0.7), np.full(2, 0.7), lambda x: 9 if x[0] == 0 else bowl(x), sweeps=6)
    np.testing.assert_allclose(x, (0.3, -0.2), atol=3 * lapq.GRAIN)


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_loss_falls_on_both_halves():
    p = found()
    seen = p.search
    assert seen.start == min(seen.by_power.values()) == seen.by_power[seen.power]
    assert {*lapq.POWERS, math.inf} <= set(seen.by_power)
    assert seen.sweeps >= 1
    assert seen.end < seen.start
    assert seen.judged_end < seen.judged_start
    assert seen.hits > 0


@pytest.mark.parametrize("ranges", ["minmax", "mse"])
def test_it_beats_ranges_of_single_tensors(ranges):
    def loss(p):
        total = 0.0
        for x in images(seed=7):  # none that either saw
            with torch.no_grad():
                with p.quantized(set()):
                    expected = p.model(x)
                with p.quantized():
                    total += float(lapq.task_loss(p.model(x), expected))
        return total

    assert loss(found()) < loss(found(ranges))


def test_rows_of_a_weight_keep_their_ratios_and_zeros():
    p = found()
    power = p.search.power
    for layer in p.quant_layers().values():
        step, zero = lapq.lp_ranges([layer], {}, power)[layer]
        ratio = layer.weight_step / step
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)
        assert float(ratio[0]) * 1.000001 >= 1 / lapq.REACH
        assert float(ratio[0]) <= lapq.REACH * 1.000001
        assert torch.equal(layer.weight_zero, zero)


def test_the_same_seed_gives_the_same_bits_with_and_without_the_cache():
    first = state(found())
    assert same(first, state(found()))
    without = found(memory_mb=0.03)  # for the outputs, not for what modules give
    assert without.search.hits < found().search.hits
    assert same(first, state(without))
    assert not same(first, state(found(seed=1)))


@pytest.mark.parametrize("grid", ["mid-tread", "mid-rise"])
def test_integers_are_those_of_the_simulation_and_of_the_definition(grid):
    p = prepared(grid=grid)
    calibrate(p, images(), "lapq")
    integer, x = convert(p), images(3)[0]
    for name, layer in p.quant_layers().items():
        assert torch.equal(integer.get_submodule(name).weight_codes(), layer.codes)
    with p.quantized(), torch.no_grad():
        torch.testing.assert_close(integer(x), p.model(x), rtol=0, atol=1e-4)  # float convolutions sum in another order
        found = integer(x)
        with definition():
            assert torch.equal(found, integer(x))


def test_steps_that_clip_nothing_are_among_the_starts():
    p = prepared()
    calibrate(p, images(), "minmax")
    expected = [layer.weight_step.clone() for layer in p.quant_layers().values()]
    calibrate(p, images(), "lapq")
    ranges = lapq.lp_ranges(list(p.quant_layers().values()), {}, math.inf)
    assert same([step for step, _ in ranges.values()], expected)
    assert p.search.start <= p.search.by_power[math.inf]


def test_what_was_seen_in_a_sentence():
    words = found().search.describe()
    assert words.startswith("LAPQ: p = ")
    assert "sweeps accepted" in words


def test_progress_names_the_starts_and_the_sweeps(capsys):
    found(progress="lines")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("[1/3] LAPQ starts: loss ")
    assert all(line.startswith(f"[{n}/3] LAPQ sweep {n - 1}: ") for n, line in enumerate(lines[1:], 2))
    assert "evaluations" in lines[-1]
    found()
    assert not capsys.readouterr().err
    with pytest.raises(QkError, match="progress must be one of auto, bar"):
        found(progress="loud")


def test_labels_and_a_loss_of_ones_own():
    batches = images()
    with torch.no_grad():
        labels = [net()(x).argmax(1) for x in batches]
    by_labels = found(labels=labels)
    assert by_labels.search.end <= by_labels.search.start
    own = found(labels=labels, loss=lambda y, t: F.cross_entropy(y, t, reduction="sum"))
    assert same(state(own), state(by_labels))
    squared = found(loss=lambda y, t: (y - t).square().sum())
    assert squared.search.end < squared.search.start


def test_one_batch_is_halved():
    whole = torch.cat(images())
    p = found(batches=[whole])
    assert p.search.judged_end <= p.search.judged_start
    assert same(state(p), state(found(batches=[whole[:16], whole[16:]])))


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(QkError, match=r"must be outside torch.inference_mode"):
        found()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"batches": [images()[0][:1]]}, "batches must be at least two for lapq"),
        ({"labels": [torch.zeros(8)]}, "labels must be one tensor for each of 4 batches, got 1"),
        ({"labels": torch.zeros(8)}, "labels must be an iterable with a tensor for each batch"),
        ({"labels": [1, 2, 3, 4]}, "labels must be tensors"),
        ({"labels": [torch.zeros(3, dtype=torch.int64)] * 4}, "loss must be a function that returns one number"),
        ({"loss": lambda y, t: y - t}, "loss must be a function that returns one number"),
        ({"loss": lambda y, t: y.sum() * math.nan}, "the loss of the quantized model must be finite"),
        ({"loss": "kl"}, "loss must be a function of output and labels"),
        ({"memory_mb": 0.0001}, "the float model's outputs must be at most 0.0001 MB"),
        ({"batches": [*images()[:1], torch.zeros(2, 4, 8, 8)]}, "batch 1 must be input that the model accepts"),
        ({"ranges": "mse", "labels": [torch.zeros(8)]}, "labels and loss must be left out"),
    ],
)
def test_bad_input_leaves_p_as_it_was(more, words):
    p = prepared()
    calibrate(p, images(), "minmax")
    before = state(p)
    batches, ranges = more.pop("batches", images()), more.pop("ranges", "lapq")
    with pytest.raises(QkError, match=words):
        calibrate(p, batches, ranges, **more)
    assert same(state(p), before)
    assert not any("forward" in vars(module) for module in p.model.modules())


# --- the cache --------------------------------------------------------------------------------------------------------


def moved(p, layers, x):
    """Steps moved by the factors exp(x), in the order of layers."""
    for layer, log in zip(layers, x, strict=True):
        layer.set_weight_range(layer.first_step * math.exp(log), layer.weight_zero.reshape(-1))


@pytest.mark.parametrize("name", ["small", "resnet18", "mobilenet_v2"])
def test_outputs_from_the_cache_are_the_models(name):
    if name != "small" and not import_torchvision():
        pytest.skip("torchvision is not installed")
    model = net() if name == "small" else vision_model(name)
    batches = images() if name == "small" else [torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32)]
    p = prepare(model, batches[0], Recipe(weights=4, activations=4, method="nearest"))
    calibrate(p, batches, "minmax")
    layers = list(p.quant_layers().values())
    for layer in layers:
        layer.first_step = layer.weight_step.clone()
    random, x = np.random.default_rng(0), np.zeros(len(layers))
    with torch.no_grad(), p.quantized():
        expected, points = [], []
        for i in range(8):
            if i % 3:
                x = x.copy()
                x[random.integers(len(layers) // 2, len(layers))] += 0.1
            points.append(x)
            moved(p, layers, x)
            expected.append([p.model(batch) for batch in batches])
        uses = {layer: (i,) for i, layer in enumerate(layers)}
        with PrefixCache(p, uses, 100, "test") as cache:
            for x, outputs in zip(points, expected, strict=True):
                moved(p, layers, x)
                cache.move(x)
                for i, batch in enumerate(batches):
                    assert torch.equal(cache.run(i, batch), outputs[i])
            assert cache.hits > 0
            assert cache.left < 100 * 2**20
    assert not any("forward" in vars(module) for module in p.model.modules())
