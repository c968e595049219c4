"""Whole models with quantized tables: the integer model is the simulated one, and comes back from its files."""

import copy
import json

import pytest
import torch
from torch import nn

from deploy.checkpoints import edit, leaves, set_at, tensor_file
from qk.calibrate import calibrate
from qk.deploy import QEmbedding, QEmbeddingBag, convert, definition, fuse, load, quantize_embedding, save, unfused
from qk.errors import QkError
from qk.prepare import prepare
from qk.spec import Recipe
from rankers import ROWS, Ranker, inputs, made

BOTH = {"bits": 4, "overrides": {"user": {"method": "two-tier"}, "item": {"bits": 2, "method": "kmeans"}}}


def ready(embeddings=BOTH, **fields):
    p = prepare(made(Ranker), inputs(), Recipe(weights=8, method="nearest", embeddings=embeddings, **fields))
    calibrate(p, [inputs()])
    return p


@pytest.fixture(scope="module")
def p():
    return ready()


@pytest.fixture(scope="module")
def model(p):
    return convert(p)


@pytest.fixture
def folder(model, tmp_path):
    return save(model, tmp_path)


@torch.no_grad()
def run(model, x):
    return model(**x)


def test_integer_tables_give_the_bits_of_the_simulation_and_of_the_definition(p, model):
    assert [type(m) for m in (model.user, model.item, model.bag)] == [QEmbedding, QEmbedding, QEmbeddingBag]
    assert model.again is model.item
    ids, x = torch.arange(ROWS).reshape(2, -1), inputs()
    bags = (x["values"], x["offsets"])
    with torch.no_grad(), p.quantized() as simulated:
        for name in ("user", "item"):
            found = model.get_submodule(name)(ids)
            assert torch.equal(found, simulated.get_submodule(name)(ids))
            with definition():
                assert torch.equal(found, model.get_submodule(name)(ids))
        found = model.bag(*bags)
        assert torch.equal(found, simulated.bag(*bags))
        with definition():
            assert torch.equal(found, model.bag(*bags))
        # Sums of 24 and 16 products, in another order than the integer layers'.
        torch.testing.assert_close(run(model, x), run(simulated, x), rtol=1e-5, atol=1e-5)
    assert (model.user.num_embeddings, model.user.embedding_dim, model.user.padding_idx) == (ROWS, 24, 0)


def test_tables_alone_make_an_integer_model(tmp_path):
    p = ready(4, skip=("first", "last"))
    model, x = convert(p), inputs()
    with torch.no_grad(), p.quantized() as simulated:
        assert torch.equal(run(model, x), run(simulated, x))
    save(model, tmp_path)
    assert torch.equal(run(load(tmp_path, made(Ranker, seed=3)), x), run(model, x))
    with pytest.raises(QkError, match="one with an integer layer, got Ranker, no integer layer beside 3 tables"):
        fuse(model, x)


def test_a_changed_integer_model_leaves_the_prepared_one_alone(p):
    model, rows = convert(p), p.model.user.rows.clone()
    model.user.rows.zero_()
    assert torch.equal(p.model.user.rows, rows)


def test_a_loaded_model_gives_the_same_bits(model, folder, tmp_path):
    x, floats = inputs(), made(Ranker, seed=7)
    loaded = load(folder, floats)
    assert torch.equal(run(loaded, x), run(model, x))
    assert repr(loaded) == repr(model)
    assert loaded.qk_info == model.qk_info
    assert (loaded.user.method, loaded.item.method, loaded.bag.method) == ("two-tier", "kmeans", "greedy")
    assert loaded.user.error == model.user.error > 0
    assert isinstance(floats.user, nn.Embedding)
    again = save(loaded, tmp_path / "again")
    assert (again / "qk.json").read_bytes() == (folder / "qk.json").read_bytes()
    assert tensor_file(again).read_bytes() == tensor_file(folder).read_bytes()


def test_a_fused_model_has_the_bits_of_its_operators(model):
    batches = [inputs(), inputs(seed=2)]
    assert torch.equal(run(fuse(model, batches), batches[0]), run(unfused(model, batches), batches[0]))


def test_a_model_with_tables_put_in_by_hand_is_saved_and_loaded(tmp_path):
    model, x = made(Ranker), inputs()
    model.item = model.again = quantize_embedding(model.item, 4, "kmeans")
    model.bag = quantize_embedding(model.bag, 8, "asymmetric", "float32")
    save(model, tmp_path)
    loaded = load(tmp_path, made(Ranker, seed=3))
    assert torch.equal(run(loaded, x), run(model, x))
    assert loaded.item.method == "kmeans"
    assert loaded.item.error is None
    with pytest.raises(QkError, match=r"qk.load: model must be the float model, got one with integer layers or tables"):
        load(tmp_path, loaded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "user", nn.Embedding(ROWS + 1, 24)), r"table user: shape must be \(40, 24\), got \(41"),
        (lambda m: setattr(m, "user", nn.Linear(3, 3)), "table user must be Embedding, got Linear"),
        (lambda m: setattr(m.user, "max_norm", 2.0), "table user: max_norm must be None, got 2.0"),
        (lambda m: setattr(m.bag, "mode", "sum"), "table bag: mode must be mean, got sum"),
        (lambda m: setattr(m.bag, "padding_idx", None), "table bag: padding_idx must be 1, got None"),
        (lambda m: setattr(m, "bag", nn.Embedding(ROWS, 24)), "table bag must be EmbeddingBag, got Embedding"),
    ],
)
def test_another_model_is_refused(folder, change, message):
    floats = made(Ranker)
    change(floats)
    with pytest.raises(QkError, match=message):
        load(folder, floats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("tables", "user", "bits", value=3), "tables.user.bits must be"),
        (set_at("tables", "user", "bits", value=8), "bits must be 2 or 4 with row_kind shared"),
        (set_at("tables", "user", "books", value=None), "books must be there for row_kind shared"),
        (set_at("tables", "user", "books", value=7), r"user.books must be 7 rows, got 1"),
        (set_at("tables", "user", "rows", value=39), r"user.rows must be 39 rows, got 40|shape must be \(39"),
        (set_at("tables", "user", "padding_idx", value=40), "padding_idx must be a row"),
        (set_at("tables", "user", "mode", value="sum"), "mode and include_last_offset must be there"),
        (set_at("tables", "user", "surprise", value=1), "tables.user.surprise must be unexpected"),
        (set_at("tables", "item", "dtype", value="float32"), "table item: qk::embedding_bag: rows must be"),
        (set_at("tables", "item", "row_kind", value="affine"), "table item: qk::embedding_bag: rows must be"),
        (set_at("modules", "user", value="Embedding"), "tables and modules do not agree on user"),
        (lambda f: f["tables"].pop("user"), "modules.user must be QEmbedding, got Embedding"),
        (lambda f: f.pop("tables"), "must be QEmbedding"),
    ],
)
def test_wrong_fields_under_a_right_checksum_are_refused_by_name(folder, change, message):
    edit(folder, change)
    with pytest.raises(QkError, match=message):
        load(folder, made(Ranker))


def test_an_edit_of_any_field_of_a_table_is_noticed(folder, tmp_path):
    fields = json.loads((folder / "qk.json").read_text())
    paths = [path for path in leaves({"tables": fields["tables"]}) if path]
    assert len(paths) > 3 * 10
    for path in paths:
        for value in (None, "x", -1, 2**70, []):
            changed = copy.deepcopy(fields)
            set_at(*path, value=value)(changed)
            if changed == fields:
                continue
            (tmp_path / "qk.json").write_text(json.dumps(changed))
            with pytest.raises(QkError, match=r"qk.load: .*qk\.json"):
                load(tmp_path, made(Ranker))
