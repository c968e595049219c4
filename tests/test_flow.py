"""qk.quantize: the stages in one call, on a small model."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import qk
from qk import inspection
from qk.deploy import LayerTimes, measure
from qk.inputs import resized
from qk.prepare import QuantLayer
from rankers import ROWS, Ranker, inputs, made


class Net(nn.Module):
    """A residual unit, a layer that no kernel runs, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.a, self.b = Unit(), Unit()
        self.odd = nn.Conv1d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.b(self.a(self.stem(x)))
        return self.head(self.odd(x.flatten(2)).mean(2))


class Unit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        return torch.relu(x + self.conv2(torch.relu(self.conv1(x))))


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().train()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(6, 3, 9, 7, generator=generator) for _ in range(3)]


def quick(**fields):
    return qk.Recipe(**({"iterations": 8, "batch_size": 4} | fields))


def test_the_integer_model_equals_its_definition_and_the_report_is_whole(model, batches, tmp_path):
    before = copy.deepcopy(model.state_dict())
    result = qk.quantize(
        model, batches, quick(), evaluate=lambda m: float(m(batches[0]).isfinite().all()), out=tmp_path
    )
    with torch.no_grad():
        found = result.model(batches[0])
        with qk.deploy.definition():
            assert torch.equal(found, result.model(batches[0]))
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    report = result.report
    rows = {layer.name: layer for layer in report.layers}
    assert rows["a.conv1"].width == "W4A8"
    assert rows["stem.0"].width == rows["head"].width == "W8A8"
    assert rows["odd"].weights is None
    assert "Conv1d has no integer kernel" in rows["odd"].reason
    assert all(r.sqnr_db > 5 and r.float_ms > 0 and r.integer_ms > 0 for r in report.layers if r.weights)
    assert report.accuracy == {"float": 1.0, "simulated": 1.0, "integer": 1.0, "fused": 1.0}
    assert report.size_bytes["integer"] == sum(f.stat().st_size for f in tmp_path.iterdir())
    assert report.latency[0].integer_p99 >= report.latency[0].integer_p50 > 0
    assert report.latency[0].fused_p99 >= report.latency[0].fused_p50 > 0
    by_operators = qk.deploy.unfused(result.model, [batches[0], *batches])
    assert torch.equal(result.fused(batches[0]), by_operators(batches[0]))
    assert report.losses
    assert report.folds == {"stem.1": "stem.0"}
    assert torch.equal(found, qk.load(tmp_path, model=model)(batches[0]))


def test_nearest_learns_nothing(model, batches):
    result = qk.quantize(model, batches, quick(method="nearest"), measure=False)
    assert result.report.losses == {}
    assert "reconstruct" not in result.report.seconds
    assert result.report.latency == []
    assert result.fused is not None


def test_what_cannot_be_fused_is_said(model, batches, monkeypatch):
    assert qk.quantize(model, batches, quick(method="nearest"), measure=False, fused=False).fused is None
    monkeypatch.setattr("qk.flow.fuse", lambda *_: (_ for _ in ()).throw(qk.QkError("no way")))
    result = qk.quantize(model, batches, quick(method="nearest"), measure=False)
    assert result.fused is None
    assert "Not fused: no way" in result.report.notes


def slow_in_integers(*names):
    """In place of the clock: these layers take twice as long in integers, all others half."""
    order = iter(["stem.0", "a.conv1", "a.conv2", "b.conv1", "b.conv2", "head"])
    return lambda *_: LayerTimes(0.01, 0.02, True) if next(order) in names else LayerTimes(0.01, 0.005, False)


def test_only_faster_leaves_slower_layers_in_float_and_says_so(model, batches, tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(measure, "layer_times", slow_in_integers("a.conv1", "head"))
        result = qk.quantize(model, batches, quick(only_faster=True), out=tmp_path, measure=False)
    reason = "slower in integers: 0.020 ms instead of 0.010 ms"
    reasons = {layer.name: layer.reason for layer in result.report.layers if layer.weights is None}
    assert reasons == {"a.conv1": reason, "head": reason, "odd": "Conv1d has no integer kernel"}
    assert result.prepared.kept == reasons
    assert result.plan["head"].reason == result.model.qk_info.plan["head"].reason == reason
    assert isinstance(result.model.get_submodule("a.conv1"), nn.Conv2d)
    assert isinstance(result.model.get_submodule("a.conv2"), qk.deploy.QConv2d)
    assert "head" not in result.prepared.history  # nothing was learned for it
    assert reason in result.report.kept_table().plain()
    with torch.no_grad():
        found = result.model(batches[0])
        with qk.deploy.definition():
            assert torch.equal(found, result.model(batches[0]))
        assert torch.equal(found, qk.load(tmp_path, model=model)(batches[0]))


def test_without_only_faster_slower_layers_are_named(model, batches, monkeypatch):
    monkeypatch.setattr(measure, "layer_times", slow_in_integers("b.conv2"))
    report = qk.quantize(model, batches, quick(method="nearest"), latency_batches=()).report
    assert {layer.name for layer in report.layers if layer.weights is None} == {"odd"}
    assert [n for n in report.notes if "Slower in integers than in float, called alone: b.conv2;" in n]
    assert "b.conv2; the recipe's only_faster leaves such layers in float" in report.tables()[-1].plain()


def test_only_faster_that_leaves_nothing_raises_before_learning(model, batches, monkeypatch):
    monkeypatch.setattr(measure, "layer_times", lambda *_: LayerTimes(0.01, 0.02, True))
    monkeypatch.setattr(qk.flow, "reconstruct", lambda *_, **__: pytest.fail("learning began"))
    with pytest.raises(qk.QkError, match=r"recipe.only_faster must be false, got 6 of 6 layers slower in integers"):
        qk.quantize(model, batches, quick(only_faster=True))


@pytest.mark.parametrize(
    ("floats", "integers", "slower"),
    [([1, 1, 1, 9], [2, 2, 2, 2], False), ([1, 1, 1, 1], [2, 2, 2, 2], True), ([1, 2, 3, 4], [2, 3, 4, 5], False)],
)
def test_slower_is_what_noise_does_not_explain(floats, integers, slower, monkeypatch):
    monkeypatch.setattr(measure, "alternate", lambda *_, **__: [floats, integers])
    layer = QuantLayer(nn.Linear(2, 2), qk.QuantSpec(), None)
    times = measure.layer_times(layer, layer, (1, 2))
    assert times == LayerTimes(sorted(floats)[2], sorted(integers)[2], slower)


def test_units_that_learning_did_not_help_are_named(model, batches):
    report = qk.quantize(model, batches, quick(weight_lr=50.0, iterations=3), measure=False, progress=False).report
    assert [n for n in report.notes if "Nearest rounding was kept where learning did not lower the loss: " in n]


def test_same_seed_same_bits(model, batches):
    def bits():
        return qk.quantize(model, batches, quick(), measure=False, progress=False).model.state_dict()

    first, second = bits(), bits()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batches_that_can_be_read_once_serve_every_stage(model, batches):
    result = qk.quantize(model, iter(batches), quick(), measure=False, progress=False)
    again = qk.quantize(model, batches, quick(), measure=False, progress=False)
    assert torch.equal(result.model(batches[0]), again.model(batches[0]))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        (torch.zeros(2, 3, 9, 7), "Put a single batch in a list"),
        ([torch.zeros(2, 4, 9, 7)], "input that the model"),
        ([torch.full((2, 3, 9, 7), torch.nan)], "finite"),
    ],
)
def test_bad_batches_are_named_before_work_is_lost(model, batches, message):
    with pytest.raises(qk.QkError, match=message):
        qk.quantize(model, batches, quick())


def test_a_model_without_a_layer_to_quantize_raises(batches):
    with pytest.raises(qk.QkError, match="Conv2d or Linear"):
        qk.quantize(nn.Sequential(nn.Flatten(), nn.Tanh()), batches, quick())


def test_a_layer_without_widths_in_the_recipe_has_a_reason_in_the_report(model, batches):
    recipe = quick(method="nearest", overrides={"head": {"weights": None, "activations": None}})
    report = qk.quantize(model, batches, recipe, measure=False).report
    assert {x.name: x.reason for x in report.layers}["head"] == "the plan says so"


def test_names_of_stages_are_functions_and_their_folders_import():
    from qk.calibrate.batches import hold
    from qk.prepare.insert import QuantLayer

    assert callable(qk.prepare)
    assert callable(qk.calibrate)
    assert hold.__module__ == "qk.calibrate.batches"
    assert QuantLayer.__module__ == "qk.prepare.insert"


def test_an_example_is_cut_or_repeated_along_its_first_axis():
    x = torch.arange(3)
    assert resized({"x": x}, 5)["x"].tolist() == [0, 1, 2, 0, 1]
    assert resized((x, x), 1)[1].tolist() == [0]


def words(shown):
    """Of each line."""
    return [line.split() for table in shown for line in table.plain().splitlines()]


def test_tables_of_a_model_are_in_the_report_and_in_what_inspect_shows(tmp_path):
    batch = inputs()
    embeddings = {"bits": 4, "overrides": {"bag": {"bits": 8, "scale_dtype": "float32"}}}
    recipe = quick(method="nearest", weights=8, embeddings=embeddings, skip=("item",))
    result = qk.quantize(made(Ranker), [batch], recipe, measure=False, out=tmp_path)
    assert result.report.title == "Ranker: W8A8, nearest, tables 4 bits greedy"
    user, bag = result.report.embeddings
    assert (user.name, user.rows, user.cols, user.bits, user.method) == ("user", ROWS, 24, 4, "greedy")
    assert (user.float_bytes, user.integer_bytes) == (ROWS * 24 * 4, ROWS * (12 + 4))
    assert (bag.bits, bag.method, bag.integer_bytes) == (8, "greedy", ROWS * (24 + 8))
    assert 15 < user.sqnr_db < 30 < bag.sqnr_db
    assert "named in the recipe's skip" in {layer.name: layer.reason for layer in result.report.layers}["item"]
    assert any(row[:6] == ["user", "40", "x", "24", "4", "greedy"] for row in words(result.report.tables()))
    assert "Embedding tables" in result.report.section()
    assert qk.report.Report.from_dict(result.report.to_dict()).embeddings == result.report.embeddings
    assert result.fused is not None

    facts, shown = inspection.of_checkpoint(tmp_path)
    assert facts["tables"] == [asdict(user), asdict(bag)]
    assert any("SQNR" in table.plain() and "bag" in table.plain() for table in shown)
    facts, _ = inspection.described(qk.prepare(made(Ranker), batch, recipe))
    assert facts["tables"] == [asdict(replace(x, sqnr_db=None)) for x in (user, bag)]


@pytest.mark.parametrize(
    "fields", [{}, {"method": "gptq", "points_budget": 0.1}, {"granularity": "net"}, {"ranges": "lapq"}]
)
def test_tables_alone_are_quantized_where_nothing_can_be_learned(fields, tmp_path):
    recipe = quick(embeddings=2, skip=("first", "last"), bias_correction=True, only_faster=True, **fields)
    batch = inputs()
    result = qk.quantize(made(Ranker), [batch], recipe, measure=False, out=tmp_path)
    assert result.report.title == "Ranker: tables 2 bits greedy"
    assert result.report.losses == {}
    assert [x.bits for x in result.report.embeddings] == [2, 2, 2]
    assert "Not fused: only tables are quantized." in result.report.notes
    with torch.no_grad():
        assert torch.equal(qk.load(tmp_path, made(Ranker, seed=3))(**batch), result.model(**batch))


def test_bags_are_not_made_up_for_another_batch():
    recipe = quick(method="nearest", weights=8, embeddings=4)
    with pytest.raises(qk.QkError, match=r"latency_batches must be \(\), got \[1\] for a model that gives bag offsets"):
        qk.quantize(made(Ranker), [inputs()], recipe, latency_batches=(1,))
    result = qk.quantize(made(Ranker), [inputs()], recipe)
    assert result.report.latency == []
    assert "The whole model is not timed: " in result.report.notes[0]
    assert all(layer.float_ms > 0 for layer in result.report.layers)


def test_offsets_of_as_many_rows_as_values_are_seen():
    class Bags(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.layer = torch.nn.EmbeddingBag(30, 32), torch.nn.Linear(32, 16)

        def forward(self, values, offsets):
            return self.layer(self.bag(values, offsets))

    recipe = qk.Recipe(method="nearest", embeddings=4)
    with pytest.raises(qk.QkError, match=r"latency_batches must be \(\), got \[3\] for a model that gives bag offsets"):
        qk.quantize(Bags(), [(torch.tensor([4, 7]), torch.tensor([0, 1]))], recipe, latency_batches=(3,))


def test_training_needs_a_layer():
    recipe = quick(method="lsq", embeddings=4, skip=("first", "last"))
    batch = inputs()
    with pytest.raises(qk.QkError, match=r"must be another than lsq, .*got a model whose embedding tables alone"):
        qk.quantize(made(Ranker), [batch], recipe, train=[(batch, torch.zeros(6))], measure=False)
