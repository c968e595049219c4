"""What an attention_mask calls padding counts for nothing that is fitted to data."""

import copy

import pytest
import torch
from torch import nn

from qk.calibrate import calibrate, correct_bias
from qk.calibrate.batches import counting
from qk.calibrate.smooth import smooth
from qk.errors import QkError
from qk.methods import gptq, reconstruct
from qk.methods.cache import Room
from qk.methods.engine import fill_cache, outputs_of
from qk.methods.multipoint import multipoint
from qk.methods.tune import Teacher
from qk.prepare import prepare
from qk.spec import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


class Tokens(nn.Module):
    """Each position by itself, then the mean of those that count."""

    def __init__(self):
        super().__init__()
        self.up, self.relu, self.down, self.head = nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.Linear(16, 5)

    def forward(self, x, attention_mask=None):
        x = self.down(self.relu(self.up(x)))
        mask = torch.ones(x.shape[:2]) if attention_mask is None else attention_mask
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def batches(padding=0.0):
    """Four of [8, 6, 16], with `padding` added where the mask says so."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(4):
        mask = (torch.arange(6) < torch.randint(1, 7, (8, 1), generator=rng)).long()
        x = torch.randn(8, 6, 16, generator=rng)
        found.append({"x": x + padding * (1 - mask[..., None]), "attention_mask": mask})
    return found


def calibrated(activations=8):
    torch.manual_seed(0)
    p = prepare(Tokens(), batches()[0], Recipe(weights=2, activations=activations, first_last=None))
    calibrate(p, batches())
    return p


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (reconstruct, {}),
        (reconstruct, {"loss": "fisher"}),
        (reconstruct, {"order": "weights_first"}),
        (reconstruct, {"order": "weights_first", "loss": "fisher"}),
        (gptq.gptq, {}),
        (gptq.gptq, {"prefix": "float"}),
    ],
)
def test_what_padding_holds_changes_no_bit(method, fields):
    recipe = Recipe(weights=2, first_last=None, batch_size=8, iterations=50, weight_lr=0.05, act_lr=0.02, **fields)
    p = calibrated(activations=3)
    other, third = copy.deepcopy(p), copy.deepcopy(p)
    method(p, batches(), recipe, progress="off")
    method(other, batches(padding=0.5), recipe, progress="off")
    without = [{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])} for batch in batches()]
    method(third, without, recipe, progress="off")
    codes = [torch.cat([layer.codes.flatten() for layer in q.quant_layers().values()]) for q in (p, other, third)]
    steps = [torch.stack([layer.input.step for layer in q.quant_layers().values()]) for q in (p, other)]
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(*steps)
    assert p.history == other.history
    assert not torch.equal(codes[0], codes[2])  # where it counts it does


@pytest.mark.parametrize("loss", ["mse", "fisher"])
def test_weights_of_the_errors_are_0_on_padding_and_1_on_average(loss):
    p, data = calibrated(), batches()
    outputs = outputs_of(p, data, Room(64)) if loss == "fisher" else None
    part = fill_cache(p, p.units[0], set(), data, Room(64), outputs).parts[0]
    padding = torch.cat([batch["attention_mask"] for batch in data]) == 0
    assert part.weight.mean() == pytest.approx(1, rel=1e-6)  # float32
    assert (part.weight[padding] == 0).all()
    if loss == "mse":
        counted = part.weight[~padding]
        assert (counted == counted[0, 0]).all()


def test_the_head_behind_the_mean_counts_everywhere():
    p, data = calibrated(), batches()
    part = fill_cache(p, p.units[-1], set(), data, Room(64)).parts[0]
    assert (part.weight == 1).all()


@pytest.mark.parametrize(
    ("batch", "counted"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, [[True, True, False], [True, False, False]]),
        ({"attention_mask": torch.tensor([[True, True, False]] * 2)}, [[True, True, False]] * 2),
        ({"attention_mask": torch.zeros(2, 3)}, None),  # added to scores: it means the reverse
        ({"attention_mask": torch.ones(2, 4, dtype=torch.long)}, None),
        ({"attention_mask": torch.ones(2, 1, 1, 3, dtype=torch.long)}, None),
        ({"attention_mask": None}, None),
        ({"input_ids": torch.ones(2, 3, dtype=torch.long)}, None),
        (torch.ones(2, 3), None),
    ],
)
def test_which_masks_are_understood(batch, counted):
    found = counting(batch, torch.zeros(2, 3, 5))
    assert (found if counted is None else found.tolist()) == counted
    assert counting(batch, torch.zeros(2, 3, 5, 5)) is None


class Encoder(nn.Module):
    """[batch, positions, 16], padding and all, as encoders give it."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x, attention_mask=None):
        return self.down(torch.relu(self.up(x)))


def scattered(padding):
    """Four batches whose padding is random, `padding` large."""
    rng = torch.Generator().manual_seed(1)
    return [
        {**b, "x": b["x"] + padding * torch.randn(8, 6, 16, generator=rng) * (1 - b["attention_mask"][..., None])}
        for b in batches()
    ]


def encoder(**fields):
    torch.manual_seed(0)
    return prepare(Encoder(), batches()[0], Recipe(weights=3, first_last=None, **fields))


def numbers(p):
    """All that calibration sets."""
    found = []
    for layer in p.quant_layers().values():
        names = ("codes", "weight_step", "tail_codes", "tail_step", "corrected_bias", "input_scale")
        own = [getattr(layer, name) for name in names] + [layer.input.step, layer.input.zero]
        found += [x.detach().double().flatten() for x in own if x is not None]
    return torch.cat(found)


def ranged(ranges):
    def run(data):
        p = encoder()
        calibrate(p, data, ranges)
        return p

    return run


def corrected(data):
    p = ranged("mse")(data)
    correct_bias(p, data)
    return p


def with_points(data):
    p = encoder(symmetric=True, points=2, points_budget=0.5)
    calibrate(p, data)
    multipoint(p, data, budget=0.5)
    return p


def smoothed(data):
    p = encoder()
    smooth(p, data, 0.5)
    calibrate(p, data)
    return p


@pytest.mark.parametrize(
    "run",
    [*(ranged(name) for name in ("minmax", "percentile", "mse", "kl", "lapq")), corrected, with_points, smoothed],
    ids=["minmax", "percentile", "mse", "kl", "lapq", "bias", "points", "smooth"],
)
def test_what_padding_holds_changes_no_step(run):
    found = numbers(run(batches()))
    assert torch.equal(found, numbers(run(scattered(30.0))))
    everything = [{**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in scattered(30.0)]
    other = numbers(run(everything))
    assert found.shape != other.shape or not torch.equal(found, other)  # where it counts it does


def test_a_mask_of_padding_alone_is_said_to_leave_no_data():
    nothing = [{**b, "attention_mask": torch.zeros_like(b["attention_mask"])} for b in batches()]
    with pytest.raises(QkError, match="data that reaches up"):
        calibrate(encoder(), nothing)


def test_distillation_leaves_padding_out():
    p = ranged("mse")(batches())
    teacher = Teacher(p, [])
    batch = batches()[0]
    with torch.no_grad():
        output = p.model(**batch)
        changed = output + 5 * (1 - batch["attention_mask"][..., None])
        assert teacher.loss(output, [], batch) == teacher.loss(changed, [], batch)
        assert teacher.loss(output, [], batch) < teacher.loss(changed, [], {"x": batch["x"]})
