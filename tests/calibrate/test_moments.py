"""Second moments of inputs say what any weight's output is, exactly, whatever the layer and however data comes."""

import pytest
import torch
from torch import nn

from qk.calibrate import calibrate
from qk.calibrate import moments as module
from qk.calibrate.moments import SecondMoments, patches, second_moments
from qk.errors import QkError
from qk.prepare import prepare
from qk.prepare.insert import to_kernel_order
from qk.spec import Recipe
from small_nets import Net

LAYERS = {
    "linear": (nn.Linear(6, 5, bias=False), (7, 3, 6)),
    "plain": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (3, 4, 7, 6)),
    "strided": (nn.Conv2d(4, 6, (3, 2), (2, 3), (1, 0), bias=False), (3, 4, 9, 8)),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=(2, 1), padding=2, bias=False), (2, 2, 9, 8)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3, bias=False), (3, 6, 7, 6)),
    "depthwise": (nn.Conv2d(5, 5, (3, 5), padding=(1, 2), groups=5, bias=False), (3, 5, 7, 6)),
    "doubled": (nn.Conv2d(5, 10, 1, groups=5, bias=False), (3, 5, 7, 6)),
    "pointwise": (nn.Conv2d(4, 6, 1, stride=2, bias=False), (3, 4, 7, 6)),
}


def data(shape):
    return list(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))


def prepared(layer, batches):
    p = prepare(layer, batches[0], Recipe(weights=4, first_last=None))
    calibrate(p, batches)
    return p


@pytest.mark.parametrize("chunk", [1, 200, 2**22])
@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_square_of_an_output_is_that_of_the_layer(name, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    layer, shape = LAYERS[name]
    batches = data(shape)
    ((_, moments),) = second_moments(prepared(layer, batches), [""], batches, "stage", memory_mb=1)
    rows = to_kernel_order(layer.weight.detach()).flatten(1)
    found = moments.between(torch.stack([rows, -2 * rows]))
    with torch.no_grad():
        outputs = torch.cat([layer(x).movedim(1, -1) if x.dim() == 4 else layer(x) for x in batches])
    square = outputs.double().square().flatten(0, -2).mean(0)
    # float32 products of float32 data, summed over less than a thousand rows.
    torch.testing.assert_close(found[:, 0, 0], square, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found[:, 0, 1], -2 * square, rtol=1e-5, atol=1e-9)


def test_few_rows_are_kept_and_many_become_products():
    rows = torch.randn(1, 12, 5, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    few, many = SecondMoments("", 1, 5, 10**6), SecondMoments("", 1, 5, 10**6)
    few.add(rows[:, :4])
    for part in rows.split(3, 1):
        many.add(part)
    assert few.products is None
    assert many.products is not None
    assert many.rows == []
    for moments, count in ((few, 4), (many, 12)):
        outputs = (weights @ rows[0, :count].T).double()
        expected = torch.einsum("vnm,wnm->nvw", outputs, outputs) / count
        torch.testing.assert_close(moments.between(weights), expected, rtol=1e-5, atol=1e-6)


def test_what_is_kept_is_a_copy():
    x = torch.ones(1, 2, 5)
    moments = SecondMoments("", 1, 5, 10**6)
    moments.add(x)
    x.zero_()
    assert float(moments.between(torch.ones(1, 1, 5))) == 25


def test_layers_come_in_turns_when_memory_is_short():
    batches = data((3, 4, 6, 6))
    net = Net(
        lambda m, x: m.c(m.b(m.a(x).relu()).relu()), **{n: nn.Conv2d(4, 4, 3, padding=1, bias=False) for n in "abc"}
    )
    p = prepared(net, batches)
    runs = []
    p.model.a.register_forward_hook(lambda *_: runs.append(1))
    wide = dict(second_moments(p, ["a", "b", "c"], batches, "stage", memory_mb=1))
    assert len(runs) == 2
    # One layer takes up to 2 * 4 * 36 * 36 bytes by the estimate.
    narrow = dict(second_moments(p, ["a", "b", "c"], batches, "stage", memory_mb=11000 / 2**20))
    assert len(runs) == 2 + 4  # for b, and for c; the pass for a ends before it runs
    assert all(torch.equal(wide[n].products, narrow[n].products) for n in "abc")


def test_inputs_of_the_quantized_model_are_those_that_a_layer_quantizes():
    batches = data((3, 4, 6, 6))
    p = prepared(nn.Conv2d(4, 2, 1), batches)
    p.model.input.set_range(torch.tensor(0.5), torch.tensor(128))
    ((_, moments),) = second_moments(p, [""], batches, "stage", 1, quantized=True)
    x = p.model.input(torch.cat(batches)).detach()
    expected = next(patches(p.model, x))[0]
    torch.testing.assert_close(moments.products[0], expected.T @ expected, rtol=1e-6, atol=1e-4)
    assert not p.model.quantized


def test_inputs_are_those_behind_a_factor_of_smoothing():
    layer, shape = LAYERS["linear"]
    batches = data(shape)
    p = prepared(layer, batches)
    p.model.input_scale = torch.arange(1.0, 7.0)
    ((_, moments),) = second_moments(p, [""], batches, "stage", 1)
    x = torch.cat(batches).reshape(-1, 6) * p.model.input_scale
    torch.testing.assert_close(moments.products[0], x.T @ x, rtol=1e-5, atol=1e-4)


def test_a_layer_that_does_not_fit_and_bad_data_are_refused():
    batches = data((3, 4, 7, 6))
    p = prepared(LAYERS["plain"][0], batches)
    with pytest.raises(QkError, match=r"memory_mb must be room for the second moments of one layer, got 1 of 36 x 36"):
        list(second_moments(p, [""], batches, "stage", memory_mb=0.001))
    bad = [torch.full((1, 4, 7, 6), torch.inf)]
    with pytest.raises(QkError, match="what reaches the model must be finite"):
        list(second_moments(p, [""], bad, "stage", memory_mb=1))
