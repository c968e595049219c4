"""calibrate: one pass over data from outside."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from qk.calibrate import calibrate
from qk.calibrate.batches import UNSIZED_LIMIT, hold, take
from qk.calibrate.observe import HistogramObserver, Observer
from qk.errors import QkError
from qk.prepare import prepare
from qk.spec import Recipe


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), nn.Flatten(), nn.Linear(128, 5)
    ).eval()


def data(count=3, batch=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 3, 8, 8, generator=generator) for _ in range(count)]


def prepared(**fields):
    return prepare(net(), data(1)[0], Recipe(**{"weights": 4, "activations": 4, **fields}))


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "kl"])
def test_every_quantizer_gets_a_range(ranges):
    p = prepared()
    calibrate(p, data(), ranges)
    assert p.calibrated
    layers = p.quant_layers()
    assert len(layers) == 3
    for layer in layers.values():
        assert layer.input.calibrated
        assert layer.input.step.item() > 0
        assert layer.codes.dtype == torch.uint8
        assert int(layer.codes.max()) <= 2**layer.spec.weights - 1
    assert layers["2"].input.zero.item() == 0  # after a ReLU
    assert layers["5"].input.zero.item() > 0  # after a SiLU
    assert (layers["0"].weight_zero == 128).all()  # 8-bit weights are symmetric
    with p.quantized():
        quantized = p.model(data()[0])
    expected = p.model(data()[0])
    assert (quantized - expected).abs().mean() < 0.5 * expected.abs().mean()


def test_groups_along_k_have_their_own_steps():
    p = prepared(first_last=None, overrides={"2": {"group_size": 24}})
    calibrate(p, data())
    layer = p.quant_layers()["2"]
    assert layer.weight_step.shape == (8, 3)
    assert layer.codes.shape == (8, 3, 3, 8)


def test_the_same_data_gives_the_same_bits():
    steps = []
    for _ in range(2):
        p = prepared()
        calibrate(p, data())
        steps.append([layer.input.step.item() for layer in p.quant_layers().values()])
    assert steps[0] == steps[1]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        (iter([]), "used before is empty"),
        (torch.zeros(2, 3, 8, 8), "Put a single batch in a list"),
        (None, "an iterable of batches, got NoneType"),
        (["text"], "batch 0 must be a tensor"),
        ([torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), torch.nan)], "batch 1, where it reaches 0, must be finite"),
        ([torch.full((2, 3, 8, 8), torch.inf)], "batch 0, where it reaches 0, must be finite"),
        (
            [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)],
            r"batch 1 must be .*\[4, 3, 8, 8\].*got .*\[2, 1, 8, 8\]",
        ),
        ([torch.zeros(2, 3, 9, 9)], "batch 0 must be input that the model accepts"),
        ([(torch.zeros(2, 3, 8, 8), torch.zeros(2).int())], "batch 0 must be input.*pass inputs only"),
        ([torch.zeros(0, 3, 8, 8)], "data that reaches 0"),
    ],
)
def test_bad_batches_are_refused_and_nothing_changes(batches, message):
    p = prepared()
    with pytest.raises(QkError, match=f"qk.calibrate: .*{message}"):
        calibrate(p, batches)
    assert not p.calibrated
    assert not any(layer.input.calibrated for layer in p.quant_layers().values())


def test_a_weight_that_is_not_finite_is_named():
    p = prepared()
    with torch.no_grad():
        p.model.get_submodule("2").weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(QkError, match="the weight of 2 must be finite"):
        calibrate(p, data())


def test_unknown_ranges_are_refused():
    with pytest.raises(QkError, match="ranges must be one of minmax"):
        calibrate(prepared(), data(), "max")


def test_an_endless_iterable_stops_at_the_limit_and_says_so():
    with pytest.warns(UserWarning, match=f"goes on after {UNSIZED_LIMIT} batches"):
        assert len(list(take(itertools.repeat(torch.zeros(1)), "qk.calibrate"))) == UNSIZED_LIMIT
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(take(itertools.repeat(torch.zeros(1)), "qk.calibrate", max_batches=5))) == 5
        assert len(list(take((torch.zeros(1) for _ in range(7)), "qk.calibrate"))) == 7
        assert len(list(take([torch.zeros(1)] * 100, "qk.calibrate"))) == 100


class Endless:
    """Has a length and does not keep it."""

    def __len__(self):
        return 3

    def __iter__(self):
        return itertools.repeat(torch.zeros(1))


def test_an_iterable_that_goes_on_after_its_length_stops_there_and_says_so():
    with pytest.warns(UserWarning, match="says that its length is 3 and goes on"):
        assert len(list(take(Endless(), "qk.calibrate"))) == 3


def test_a_model_that_writes_into_its_input_leaves_the_batches_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 8, 3))
    batches = data()
    p = prepare(model, batches[0], Recipe())
    calibrate(p, batches)
    assert all(torch.equal(a, b) for a, b in zip(batches, data(), strict=True))


def test_calibrating_anew_forgets_what_was_learned():
    p = prepared()
    calibrate(p, data())
    p.history = {"0": [{"iteration": 1, "loss": 1.0}]}
    calibrate(p, data())
    assert p.history == {}


def test_a_generator_is_held_within_the_memory_allowed():
    held = hold((torch.zeros(2**18) for _ in range(3)), "qk.reconstruct", None, memory_mb=4)
    assert len(held) == 3
    with pytest.raises(QkError, match="at most 4 MB, got more after 4 batches"):
        hold((torch.zeros(2**18) for _ in range(9)), "qk.reconstruct", None, memory_mb=4)


def test_tuples_and_dicts_are_splatted():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, scale):
            return self.b(torch.relu(self.a(x))) * scale

    p = prepare(Two(), (torch.randn(2, 8), torch.ones(1)), Recipe())
    calibrate(p, [(torch.randn(2, 8), torch.ones(1)), {"x": torch.randn(2, 8), "scale": torch.ones(1)}])
    assert p.calibrated


def test_a_sample_is_bounded_spread_and_repeatable():
    samples = []
    for _ in range(2):
        observer = Observer("x", limit=1000)
        for i in range(20):
            observer.see(torch.full((777,), float(i)))
        samples.append(observer.sample())
    assert torch.equal(*samples)
    assert 400 < samples[0].numel() <= 1000
    counts = torch.bincount(samples[0][0].long(), minlength=20)
    share = samples[0].numel() / 20
    assert (counts > 0.4 * share).all()
    assert (counts < 2.5 * share).all()
    assert (observer.low, observer.high) == (0.0, 19.0)


def test_a_histogram_that_grows_counts_every_value():
    observer = HistogramObserver("x", bins=64)
    x = [torch.rand(1001) * scale for scale in (0.1, 1.0, 7.3)]
    for one in x:
        observer.see(one)
    assert observer.counts.sum() == 3003
    expected = torch.histc(torch.cat(x), 64, 0, observer.width * 64)
    # A value within a rounding error of an edge may be in the neighbour.
    assert (observer.counts - expected).abs().sum() <= 4
