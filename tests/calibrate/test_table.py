"""Rows of a whole model's tables, as calibration sets them."""

import pytest
import torch

import qk
from qk.calibrate.table import quantize_table
from qk.errors import QkError
from rankers import ROWS, Ranker, inputs, made


def calibrated(embeddings=4, **fields):
    recipe = qk.Recipe(method="nearest", embeddings=embeddings, **fields)
    p = qk.prepare(made(Ranker), inputs(), recipe)
    qk.calibrate(p, [inputs(), inputs(seed=2)])
    return p


@pytest.mark.parametrize("method", ["asymmetric", "kmeans", "two-tier"])
@pytest.mark.parametrize("bits", [2, 4])
def test_rows_are_those_of_the_table_alone(bits, method):
    p = calibrated({"bits": bits, "method": method})
    for name, table in p.quant_tables().items():
        weight = made(Ranker).get_submodule(name).weight.detach()
        alone = quantize_table(weight, bits, method)
        assert torch.equal(table.rows, alone.rows)
        assert (table.books is None) == (alone.books is None)
        error = float((alone.values() - weight).double().norm() / weight.double().norm())
        assert table.error == alone.error(weight) == pytest.approx(error, rel=1e-6)


def test_the_switch_is_that_of_the_layers():
    p, x, model = calibrated(), inputs(), made(Ranker)
    ids = torch.arange(ROWS)
    table = p.model.user
    with torch.no_grad(), p.quantized({"user"}):
        assert torch.equal(table(ids), quantize_table(model.user.weight, 4).values())
        assert torch.equal(p.model.item(ids), model.item.weight)
    with torch.no_grad(), p.quantized(set()):
        assert torch.equal(p.model(**x), model(**x))
    with torch.no_grad(), p.quantized():
        assert not torch.equal(p.model(**x), model(**x))
    assert not table.quantized


def test_layers_are_calibrated_on_what_float_tables_give():
    with_tables, without = calibrated(), calibrated(None)
    for name, layer in without.quant_layers().items():
        assert torch.equal(layer.input.step, with_tables.quant_layers()[name].input.step)


def test_a_table_that_has_rows_keeps_them():
    p = calibrated()
    rows = p.model.user.rows
    qk.calibrate(p, [inputs(seed=3)])
    assert p.model.user.rows is rows


def test_a_value_that_no_scale_holds_is_named_with_its_table():
    model = made(Ranker)
    model.item.weight.data[3, 4] = 1e6
    p = qk.prepare(model, inputs(), qk.Recipe(method="nearest", embeddings=4))
    with pytest.raises(QkError, match=r"qk.calibrate: table item: weight must be within the range of float16"):
        qk.calibrate(p, [inputs()])
    assert not p.calibrated
    assert p.model.user.rows is None
    with pytest.raises(QkError, match=r"qk.convert: p must be calibrated"):
        qk.convert(p)


def test_learning_sees_quantized_tables_and_leaves_them_alone():
    p = calibrated(iterations=3, batch_size=4)
    before = {name: table.rows.clone() for name, table in p.quant_tables().items()}
    seen = []
    p.model.user.register_forward_hook(lambda table, *_: seen.append(table.quantized))
    qk.reconstruct(p, [inputs()], qk.Recipe(embeddings=4, iterations=3, batch_size=4), progress="off")
    assert {True, False} == set(seen)  # the prefix quantized, the targets in float
    qk.calibrate(p, [inputs()])
    model = qk.trainable(p)
    assert all(table.quantized for table in p.quant_tables().values())
    model(**inputs()).sum().backward()
    assert p.model.user.weight.grad is None
    assert all(torch.equal(table.rows, before[name]) for name, table in p.quant_tables().items())


def test_there_is_nothing_to_train_in_tables_alone():
    p = calibrated(skip=("first", "last"))
    with pytest.raises(QkError, match="p must be a model with a quantized layer, got one whose tables alone"):
        qk.trainable(p)
    qk.reconstruct(p, [inputs()], qk.Recipe(granularity="net"), progress="off")
    assert not p.history
