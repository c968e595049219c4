"""qk.tune: it lowers the loss, keeps the best, and refuses what it cannot use."""

from __future__ import annotations

import copy
import itertools
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import qk
from methods.trainings import LABELLED, LABELS, Interrupting, X, net, prepared, recipe, same, shuffled, tuned
from qk.deploy import definition
from qk.errors import QkError
from qk.methods.lsq import is_trainable
from qk.methods.tune import cosine, feature_loss, soft_loss
from qk.prepare import prepare
from qk.spec import Recipe

module = sys.modules["qk.methods.tune"]

pytestmark = pytest.mark.usefixtures("one_thread")


# --- mathematics ------------------------------------------------------------------------------------------------------


def test_the_rate_falls_with_a_cosine_to_zero():
    assert [cosine(0.01, done) for done in (0, 0.5, 1)] == pytest.approx([0.01, 0.005, 0])


def test_the_soft_loss_is_a_divergence_for_each_sample():
    one, other = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.tensor([[0.0, 2.0], [1.0, 2.0]])
    e = torch.softmax(other[0], 0)
    expected = (e * (e.log() - torch.tensor(0.5).log())).sum() / 2  # the second sample is as it should be
    assert soft_loss(one, other).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_feature_loss_is_relative():
    x = torch.tensor([3.0, 4.0])
    assert feature_loss([x * 1.1, x], [x, x]).item() == pytest.approx(0.005, rel=1e-4)
    assert feature_loss([x * 110, x], [x * 100, x]).item() == pytest.approx(0.005, rel=1e-4)


@pytest.mark.parametrize(("weights", "epochs", "lr"), [(2, 90, 0.01), (4, 90, 0.01), (8, 1, 0.001)])
def test_epochs_and_rate_follow_from_the_narrowest_weights(weights, epochs, lr):
    p = prepare(net(), X[:4], Recipe(weights=weights))
    qk.calibrate(p, [X])
    run = module._Run(qk.trainable(p) and p, LABELLED, 3, Recipe(), Interrupting(0), None)
    assert (run.epochs, run.lr) == (epochs, lr)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"steps": "tensor", "start": "paper", "count": "values"}])
def test_training_lowers_the_loss_and_is_deployed_exactly(options, tmp_path):
    model = net()
    before = copy.deepcopy(model.state_dict())
    p = tuned(prepared(model), wanted=recipe(epochs=12, lr=0.03, **options))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    *records, last = p.history[""]
    assert [r["epoch"] for r in records] == list(range(1, 13))
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    assert (last["before"], last["after"], last["kept"]) == (records[0]["loss"], records[-1]["loss"], "learned")
    assert not any(m.training for m in p.model.modules())
    integer = qk.convert(p)
    with torch.no_grad():
        found = integer(X)
        with definition():
            assert torch.equal(found, integer(X))
        assert (found.argmax(1) == p.model(X).argmax(1)).float().mean() > 0.9
    assert integer.qk_info.history[""]["iterations"] == 36
    qk.save(integer, tmp_path)
    assert torch.equal(qk.load(tmp_path, net())(X), found)


def test_same_seed_same_bits_and_the_callers_random_numbers_stay():
    def drawn():
        return torch.rand(2).tolist(), np.random.rand(), random.random()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = drawn()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = tuned()
    assert drawn() == expected
    assert same(tuned(), first)
    other = Recipe.from_dict(recipe().to_dict() | {"seed": 1})
    assert not same(tuned(wanted=other), first)


def test_the_best_weights_are_kept():
    scores = iter([0.1, 0.5, 0.9, 0.3, 0.9])
    states = []

    def validate(model):
        assert not model.training
        assert not torch.is_grad_enabled()
        states.append(copy.deepcopy(model.state_dict()))
        return next(scores)

    p = tuned(wanted=recipe(epochs=4), validate=validate)
    assert all(torch.equal(tensor, states[2][name]) for name, tensor in p.model.state_dict().items())
    assert (p.history[""][-1]["epoch"], p.history[""][-1]["score"]) == (2, 0.9)
    assert [record["score"] for record in p.history[""]] == [0.5, 0.9, 0.3, 0.9, 0.9]


def test_weights_that_training_did_not_help_stay():
    start = prepared()
    qk.trainable(start)
    before = copy.deepcopy(start.model.state_dict())
    scores = itertools.count(0, -1)
    p = tuned(start, validate=lambda _: next(scores))
    assert all(torch.equal(tensor, before[name]) for name, tensor in p.model.state_dict().items())
    assert p.history[""][-1]["epoch"] == 0


def test_a_long_gradient_is_cut(monkeypatch):
    # One step without momentum or decay: what a weight moves by is lr times its gradient.
    def moved(norm):
        p = prepared()
        before = [layer.weight.detach().clone() for layer in p.quant_layers().values()]
        wanted = recipe(epochs=1, lr=0.5, weight_decay=0.0, max_norm=norm)
        qk.tune(p, LABELLED[:1], wanted, progress="off")
        after = [layer.weight.detach() for layer in p.quant_layers().values()]
        return torch.cat([(a - b).reshape(-1) for a, b in zip(after, before, strict=True)])

    free, cut = moved(None), moved(1e-3)
    assert free.norm() > 0.5 * 1e-3
    assert 0.3 * 0.5 * 1e-3 < cut.norm() < 0.5 * 1e-3  # biases and steps have their part
    # torch divides by norm + 1e-6, a thousandth here; what else differs are roundings of the weights.
    assert torch.nn.functional.cosine_similarity(free, cut, dim=0) > 0.999


def test_patience_ends_training():
    scores = iter([0.1, 0.5, 0.4, 0.4])
    p = tuned(wanted=recipe(epochs=50, patience=2), validate=lambda _: next(scores))
    assert len(p.history[""]) == 3 + 1
    assert p.history[""][-1]["epoch"] == 1


@pytest.mark.parametrize("distill", ["soft", "features"])
def test_distillation_draws_towards_the_float_model(distill):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 4)]
        model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        layers[-1].weight.mul_(10)
        target = model(X)
    p = prepare(model, X[:4], Recipe(weights=2, activations=2))
    qk.calibrate(p, [X])
    with p.quantized() as simulated, torch.no_grad():
        before = soft_loss(simulated(X), target)
    # A loss that says nothing: what is learned comes from the teacher.
    tuned(p, LABELLED, recipe(distill=distill, epochs=15), loss=lambda y, _: 0 * y.sum())
    with torch.no_grad():
        assert soft_loss(p.model(X), target) < 0.7 * before
    assert not any(m._forward_hooks for m in p.model.modules())


def test_a_teacher_is_the_float_model_before_training():
    p = prepared()
    with p.quantized(set()) as model, torch.no_grad():
        expected = model(X)
    qk.trainable(p)
    teacher = module.Teacher(p, [])
    with torch.no_grad():
        p.model.stem.weight.mul_(2)
        assert torch.equal(teacher.model(X), expected)
        assert teacher.loss(expected, [], X).item() == pytest.approx(0, abs=1e-6)


def test_inputs_may_be_tuples_or_dicts_and_the_loss_any():
    train = [({"x": x}, {"class": labels}) for x, labels in LABELLED]
    p = tuned(train=train, loss=lambda y, labels: nn.functional.cross_entropy(y, labels["class"]))
    assert same(p, tuned(train=LABELLED))


# --- refusals ---------------------------------------------------------------------------------------------------------


class Endless(IterableDataset):
    def __iter__(self):
        yield from LABELLED


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (iter(LABELLED), r"train must be pairs that can be read in every epoch, got list_iterator"),
        (X, r"train must be pairs that can be read in every epoch, got Tensor"),
        (DataLoader(Endless(), batch_size=None), r"train must be of a known length"),
        ([], r"train must be at least one batch"),
        ([X[:12]], r"batch 0 of train must be a pair \(inputs, labels\)"),
        ([(X[:12], LABELS[:12]), X[:12]], r"batch 1 of train must be a pair"),
        ([(X[:12, :2], LABELS[:12])], r"batch 0 must be input that the model accepts"),
        ([(X[:12], LABELS[:5])], r"the labels of batch 0 must be what loss takes, got int64 \[5\]"),
        ([*LABELLED, (X[:0], LABELS[:0])], r"batch \d must be with at least one sample, got int64 \[0\]"),
        ([(X[:12] * torch.nan, LABELS[:12])], r"the inputs of batch 0 must be finite"),
    ],
)
def test_bad_data_is_refused(train, message):
    p = prepared()
    with pytest.raises(QkError, match=message):
        tuned(p, train)
    assert p.history == {}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loss": 3}, r"loss must be a function, got int"),
        (
            {"loss": lambda y, labels: y},
            r"loss must be a function that returns one number with a gradient, got float32",
        ),
        ({"loss": lambda y, labels: y.sum().detach()}, r"got one without a gradient"),
        ({"loss": lambda y, labels: 1.0}, r"one number with a gradient, got float"),
        ({"validate": 3}, r"validate must be a function, got int"),
        ({"validate": lambda _: None}, r"validate must be a function that returns a number, got None"),
        ({"validate": lambda _: torch.nan}, r"validate must be a function that returns a number, got nan"),
        ({"every": 0}, r"every must be at least 1"),
        ({"wanted": recipe(patience=2)}, r"validate must be a function of the model where tuning.patience"),
        ({"progress": "loud"}, r"progress must be one of"),
        (
            {"wanted": recipe(lr=1e6, max_norm=None)},
            r"the loss of batch \d in epoch \d must be finite.* A smaller tuning.lr",
        ),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_trained(more, message):
    p = prepared()
    qk.trainable(p)
    before = copy.deepcopy(p.model.state_dict())
    with pytest.raises(QkError, match=message):
        tuned(p, **more)
    assert all(torch.equal(tensor, before[name]) for name, tensor in p.model.state_dict().items())


def test_weights_that_are_no_numbers_are_refused_though_their_codes_are():
    p = prepared()
    p.model.a.conv1.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(QkError, match=r"weights after epoch 1 must be finite, got NaN or infinity in a.conv1.weight"):
        tuned(p, wanted=recipe(max_norm=None))
    p = prepared()
    p.model.a.conv1.weight.register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(
        QkError, match=r"the gradient of batch 0 in epoch 1 must be finite, got nan. A smaller tuning.lr"
    ):
        tuned(p)


def test_float_tables_with_sparse_gradients_are_refused():
    model = nn.Sequential(nn.Embedding(9, 8, sparse=True), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    indices = torch.randint(0, 9, (12, 2), generator=torch.Generator().manual_seed(0))
    p = prepare(model, indices, recipe())
    qk.calibrate(p, [indices])
    with pytest.raises(QkError, match=r"p must be without sparse gradients, got nn.Embedding\(sparse=True\) in 0"):
        qk.tune(p, [(indices, LABELS[:12] % 3)], recipe(), progress="off")
    assert not is_trainable(p)


def test_what_is_not_ready_is_refused(tmp_path):
    p = prepare(net(), X[:4], recipe())
    with pytest.raises(QkError, match=r"p must be calibrated"):
        tuned(p)
    with pytest.raises(QkError, match=r"p must be the result of qk.prepare"):
        tuned(net())
    p = prepared()
    with torch.inference_mode(), pytest.raises(QkError, match=r"outside torch.inference_mode"):
        tuned(p)
    (tmp_path / "file").write_text("")
    with pytest.raises(QkError, match=r"must be a folder that can be written"):
        tuned(p, folder=tmp_path / "file")


def test_lines_of_progress_say_loss_and_score(capfd):
    tuned(progress="lines", validate=lambda _: 0.25)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[1].startswith("[2/3] epoch 2: loss ")
    assert ", score 0.25 in " in lines[1]


# --- in the whole flow ------------------------------------------------------------------------------------------------


def test_quantize_trains_where_the_recipe_says_lsq(tmp_path):
    result = qk.quantize(
        net(),
        [X],
        recipe(),
        train=shuffled(),
        validate=lambda model: float((model(X).argmax(1) == LABELS).float().mean()),
        evaluate=lambda model: float((model(X).argmax(1) == LABELS).float().mean()),
        out=tmp_path,
        latency_batches=(1,),
        progress=False,
    )
    assert is_trainable(result.prepared)
    assert not (tmp_path / "unfinished").exists()
    assert result.report.seconds["tune"] > 0
    assert [point["iteration"] for point in result.report.losses[""]] == [3, 6, 9]
    assert result.report.title.endswith("W3A4, lsq")
    assert all(layer.sqnr_db > 3 for layer in result.report.layers if layer.weights)
    with torch.no_grad():
        assert torch.equal(qk.load(tmp_path, net())(X), result.model(X))
        by_operators = qk.deploy.unfused(result.model, [X[:12]])
        assert result.fused(X).shape == by_operators(X).shape


@pytest.mark.parametrize(
    ("wanted", "more", "message"),
    [
        (recipe(), {}, r"qk.quantize: train must be pairs .* for method 'lsq'.*qk.tune"),
        (Recipe(iterations=2), {"train": LABELLED}, r"train must be left out, got one with method 'brecq'"),
        (Recipe(method="nearest"), {"validate": len}, r"validate must be left out"),
        (Recipe(method="lsq", bias_correction=True), {"train": LABELLED}, r"recipe.bias_correction must be false"),
        (Recipe(method="lsq", match_statistics=True), {"train": LABELLED}, r"recipe.match_statistics must be false"),
    ],
)
def test_quantize_refuses_training_that_does_not_fit(wanted, more, message):
    with pytest.raises(QkError, match=message):
        qk.quantize(net(), [X], wanted, **more)
