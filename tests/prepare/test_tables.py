"""Which embedding tables are quantized, why the others are not, and what stands in their places."""

import copy

import pytest
import torch
from torch import nn

from qk.calibrate import calibrate
from qk.calibrate.rows import METHODS, RANGES
from qk.deploy import convert
from qk.errors import QkError
from qk.ops.embedding_bag import DTYPES
from qk.options import Embeddings
from qk.prepare import QuantTable, prepare
from qk.spec import Recipe
from rankers import ROWS, Doubled, Ranker, Ties, inputs, made


def recipe(embeddings=4, **fields):
    return Recipe(method="nearest", embeddings=embeddings, **fields)


def test_every_table_is_found_under_its_first_name_and_the_model_is_as_before():
    model, x = made(Ranker), inputs()
    before = copy.deepcopy(model.state_dict())
    p = prepare(model, x, recipe())
    assert list(p.tables) == ["user", "item", "bag"]
    assert p.model.again is p.model.item
    assert all(isinstance(table, QuantTable) for table in p.quant_tables().values())
    assert p.model.user.num_embeddings == ROWS
    assert not p.kept
    assert isinstance(model.user, nn.Embedding)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(p.model(**x), model(**x))  # in float until it is calibrated and switched on


def test_each_table_that_cannot_be_quantized_has_its_reason():
    p = prepare(made(Ties), torch.arange(5), recipe())
    assert list(p.tables) == ["plain"]
    for name, reason in {
        "tied": "its weight is shared with another module",
        "head": "its weight is shared with another module",
        "twin": "its weight is shared with another module",
        "twin_of": "its weight is shared with another module",
        "normed": "max_norm changes its rows as they are looked up",
        "low": "its weight is float16, not float32",
        "narrow": "it would not get smaller: 200 bytes in 4 bits greedy, 160 in float",
        "own": "Doubled has its own forward",
        "read": "its weight is read by the model without a call of the layer",
        "idle": "it did not run on the example",
        "hooked": "it has hooks, which a replaced layer would lose",
        "computed": "its weight is computed by a parametrization; remove that first",
        "behind": "the model calls it through another reference, so that a replaced layer would be passed by",
    }.items():
        assert p.kept[name] == reason
    assert isinstance(p.model.behind, nn.Embedding)


def test_names_and_patterns_choose():
    p = prepare(made(Ranker), inputs(), recipe(skip=("it*", "last")))
    assert list(p.tables) == ["user", "bag"]
    assert p.kept == {"item": "named in the recipe's skip", "last": "named in the recipe's skip"}
    several = {"bits": 2, "overrides": {"*": {"scale_dtype": "float32"}, "b*": {"bits": 8, "method": "golden"}}}
    p = prepare(made(Ranker), inputs(), recipe(several))
    assert p.tables["item"] == Embeddings(2, "greedy", "float32")
    assert p.tables["bag"] == Embeddings(8, "golden", "float32")


def test_without_being_asked_tables_stay_in_float():
    p = prepare(made(Ranker), inputs())
    assert not p.tables
    assert p.kept == dict.fromkeys(["user", "item", "bag"], "the recipe leaves embedding tables in float")


def test_tables_alone_are_enough():
    p = prepare(nn.Embedding(9, 16), torch.arange(9), recipe())
    assert isinstance(p.model, QuantTable)
    assert p.tables == {"": Embeddings(4)}
    p = prepare(made(Ranker), inputs(), recipe(skip=("first", "last")))
    assert not p.quant_layers()
    assert list(p.tables) == ["user", "item", "bag"]


def test_a_model_with_nothing_to_quantize_is_refused():
    with pytest.raises(QkError, match="must be null for a model without an Embedding or EmbeddingBag"):
        prepare(nn.Linear(3, 3), torch.ones(1, 3), recipe())
    with pytest.raises(QkError, match=r"Conv2d, Linear or embedding table .* Doubled has its own forward"):
        prepare(Doubled(9, 16), torch.arange(9), recipe())
    with pytest.raises(QkError, match=r"Conv2d or Linear .* leaves embedding tables in float"):
        prepare(nn.Embedding(9, 16), torch.arange(9), Recipe())
    with pytest.raises(QkError, match="plan must be one that quantizes a layer"):
        prepare(made(Ranker), inputs(), recipe(skip=("*",)))
    with pytest.raises(QkError, match="skip must be patterns that match layers, got 'nowhere'"):
        prepare(made(Ranker), inputs(), recipe(skip=("nowhere",)))


def test_a_table_with_a_nan_is_named():
    model = made(Ranker)
    model.bag.weight.data[3, 4] = torch.nan
    with pytest.raises(QkError, match="the weight of bag must be finite, got NaN or Inf"):
        prepare(model, inputs(), recipe())


def test_a_width_alone_stands_for_the_rest():
    assert Recipe(embeddings=2).embeddings == Embeddings(2)
    assert Recipe.from_dict(Recipe(embeddings={"overrides": {"a": {"bits": 8}}}).to_dict()).embeddings.for_table(
        "a"
    ) == Embeddings(8)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (3, "embeddings.bits must be 2, 4 or 8, got 3"),
        (True, "embeddings must be a dictionary or an instance of Embeddings, got True"),
        ({"method": "median"}, "embeddings.method must be 'symmetric', .* or 'two-tier', got 'median'"),
        ({"bits": 8, "method": "kmeans"}, "bits must be 2 or 4 with kmeans"),
        ({"rows": 8}, "embeddings.rows is an unexpected keyword argument"),
        ({"overrides": {"a": {"bits": 5}}}, "overrides for a: bits must be 2, 4 or 8, got 5"),
        ({"bins": 4}, "bins is an unexpected .* The fields are: bits, method, scale_dtype, overrides"),
        ({"method": "kmeans", "overrides": {"a": {"bits": 8}}}, "overrides for a: bits must be 2 or 4 with kmeans"),
        ({"overrides": {"a": {"overrides": {}}}}, "overrides for a must be of bits, method, scale_dtype"),
    ],
)
def test_what_cannot_be_asked_for_is_said(embeddings, message):
    with pytest.raises(QkError, match=message):
        Recipe(embeddings=embeddings)


def test_what_can_be_asked_for_is_what_there_is():
    assert {*RANGES, "kmeans", "two-tier"} == set(METHODS)
    for dtype in DTYPES:
        Embeddings(scale_dtype=dtype)


class Asks(nn.Module):
    """Reads a weight's dtype outside of its module's calls, as models that cast do."""

    def __init__(self, of):
        super().__init__()
        self.table, self.layer, self.of = nn.Embedding(20, 32), nn.Linear(32, 4), of

    def forward(self, ids):
        return self.layer(self.table(ids).to(getattr(self, self.of).weight.dtype))


@pytest.mark.parametrize(("of", "left"), [("table", "layer"), ("layer", "table")])
def test_what_the_model_asks_for_its_weight_stays_in_float(of, left):
    p = prepare(Asks(of), torch.arange(5), recipe())
    assert p.kept[of].startswith("the model asks for its weight outside of its calls")
    assert [*p.tables, *p.quant_layers()] == [left]
    calibrate(p, [torch.arange(20)])
    with torch.no_grad():
        assert convert(p)(torch.arange(5)).shape == (5, 4)


class Named(nn.Embedding):
    def position(self, name):
        return {"a": 1, "b": 2}[name]


class Scaled(nn.Linear):
    gain = 2.0

    def scale(self):
        return self.gain


class AsksForMore(Asks):
    """Asks modules for what their own classes add."""

    def __init__(self, of):
        super().__init__(of)
        self.table, self.layer = Named(20, 32), Scaled(32, 4)

    def forward(self, ids):
        x = self.table(ids + (self.table.position("b") if self.of == "table" else 0))
        return self.layer(x) * (self.layer.scale() if self.of == "layer" else 1.0)


@pytest.mark.parametrize(("of", "left", "what"), [("table", "layer", "position"), ("layer", "table", "scale")])
def test_what_the_model_asks_for_what_its_class_adds_stays_in_float(of, left, what):
    p = prepare(AsksForMore(of), torch.arange(5), recipe())
    assert p.kept[of].startswith(f"the model asks for its {what} outside of its calls")
    assert [*p.tables, *p.quant_layers()] == [left]
    calibrate(p, [torch.arange(18)])
    with torch.no_grad():
        assert convert(p)(torch.arange(5)).shape == (5, 4)


def test_patterns_that_match_no_table_are_refused():
    with pytest.raises(QkError, match=r"embeddings.overrides must be patterns that match tables, got '\*.typo'.*user"):
        prepare(made(Ranker), inputs(), recipe(Embeddings(overrides={"*.typo": {"bits": 8}})))
