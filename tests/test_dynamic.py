"""The whole flow with dynamic layers, and every method that looks at an input's step."""

import dataclasses

import pytest
import torch

import qk
from qk.calibrate import lapq
from qk.calibrate.smooth import output_error
from qk.errors import QkError
from qk.methods.gptq import Runs, moments_of
from qk.methods.lsq import LearnedActivation, param_groups
from qk.ops.quantize_rows import reference
from qk.prepare.rows import RowQuantizer
from small_nets import encoder, inputs, residual_net

BATCHES = list(inputs(12, 6, 16).split(4))
FLOWS = {
    "nearest": {"method": "nearest"},
    "gptq": {"method": "gptq", "group_size": 8},
    "brecq": {"method": "brecq", "drop": 0.5, "drop_inside": True},
    "steps of their own": {"method": "brecq", "order": "weights_first", "granularity": "layer"},
    "smoothed": {"method": "nearest", "smooth": "search", "bias_correction": True},
    "points": {"method": "brecq", "points": 2, "points_budget": 0.4},
    "lapq": {"method": "nearest", "ranges": "lapq"},
}


def prepared(**fields):
    p = qk.prepare(encoder(), BATCHES[0], qk.Recipe(**({"dynamic": True, "method": "nearest"} | fields)))
    qk.calibrate(p, BATCHES)
    return p


def outputs(model, x):
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("overrides", [{}, {"up": {"dynamic": False}, "key": {"dynamic": False}}], ids=["all", "some"])
@pytest.mark.parametrize("name", FLOWS)
def test_every_flow_ends_in_the_definitions_integers(name, overrides):
    recipe = qk.Recipe(dynamic=True, iterations=6, batch_size=4, overrides=overrides, **FLOWS[name])
    model, x = encoder(), BATCHES[0]
    result = qk.quantize(model, BATCHES, recipe, measure=False, progress=False)
    found = outputs(result.model, x)
    with qk.deploy.definition():
        assert torch.equal(found, outputs(result.model, x))
    with result.prepared.quantized() as simulated:
        torch.testing.assert_close(outputs(simulated, x), found, rtol=1e-4, atol=1e-4)
    assert (found - outputs(model, x)).square().mean() < 0.01 * found.square().mean()
    widths = {layer.name: layer.width for layer in result.report.layers}
    assert {n for n, width in widths.items() if "dynamic" in width} == set(widths) - set(overrides)
    again = qk.report.Report.from_dict(result.report.to_dict())
    assert [layer.width for layer in again.layers] == list(widths.values())


def test_the_report_names_convolutions_that_stay_static():
    x = inputs(4, 4, 6, 6)
    notes = qk.quantize(residual_net(), [x], qk.Recipe(dynamic=True, method="nearest"), measure=False).report.notes
    assert any(note.startswith("Not dynamic, as convolutions have one step") and "0, 1.a" in note for note in notes)
    assert not any("dynamic" in note for note in qk.quantize(encoder(), BATCHES, measure=False).report.notes)


def test_inputs_that_are_not_finite_are_refused_without_a_range_to_find():
    p = qk.prepare(encoder(), BATCHES[0], qk.Recipe(dynamic=True))
    with pytest.raises(QkError, match=r"batch 0, where it reaches query, must be finite"):
        qk.calibrate(p, [torch.full((1, 6, 16), float("nan"))])
    assert not p.calibrated


def test_outlying_rows_do_not_cost_the_others():
    x = BATCHES[0].clone()
    x[0, 0] *= 300  # a row as large as a transformer's first token may be
    model, errors = encoder().down, {}
    rows = torch.cat([x, x], -1)
    for dynamic in (False, True):
        p = qk.prepare(model, rows, qk.Recipe(first_last=None, weights=8, dynamic=dynamic, method="nearest"))
        qk.calibrate(p, [rows], "minmax")
        change = outputs(qk.convert(p), rows) - outputs(model, rows)
        errors[dynamic] = change[1:].square().mean()
    assert errors[True] < errors[False] / 100


def test_only_steps_that_there_are_are_learned():
    p = prepared(overrides={"up": {"dynamic": False}})
    step = p.quant_layers()["up"].input.step.item()
    recipe = qk.Recipe(iterations=8, batch_size=4, order="weights_first", granularity="layer", act_lr=1e-3)
    qk.reconstruct(p, BATCHES, recipe, progress="off")
    assert [name for name in p.history if name.endswith("(steps)")] == ["up (steps)"]
    assert p.quant_layers()["up"].input.step.item() != step


def test_units_that_share_all_of_their_steps_with_one_before_learn_them_once():
    p = prepared(dynamic=False)
    recipe = qk.Recipe(iterations=4, batch_size=4, order="weights_first", granularity="layer")
    qk.reconstruct(p, BATCHES, recipe, progress="off")
    assert [name for name in p.history if name.endswith("(steps)")] == [
        f"{n} (steps)" for n in ("query", "up", "down", "head")
    ]


def test_a_killed_reconstruction_goes_on_without_steps(tmp_path):
    recipe, codes = qk.Recipe(iterations=4, batch_size=4, granularity="layer"), []
    for _ in range(2):
        p = prepared()
        qk.reconstruct(p, BATCHES, recipe, progress="off", folder=tmp_path)
        codes.append([layer.codes for layer in p.quant_layers().values()])
    assert all(torch.equal(a, b) for a, b in zip(*codes, strict=True))
    with pytest.raises(QkError, match="other plan"):
        qk.reconstruct(prepared(overrides={"up": {"dynamic": False}}), BATCHES, recipe, progress="off", folder=tmp_path)


def test_gptq_sees_the_rows_that_the_kernel_multiplies():
    p = prepared(activations=2, first_last=None)
    codes, step, zero = reference(BATCHES[0], 2)
    x = ((codes - zero[..., None]) * step[..., None]).reshape(-1, 16)
    runs = Runs(p, p.units[0], set(), BATCHES[:1])
    torch.testing.assert_close(moments_of(runs, "query").parts[0][0], (x.mT @ x).double())


def test_smoothing_judges_by_rows():
    layer, x = prepared(activations=4, weights=8).quant_layers()["up"], inputs(20, 16)
    x *= torch.logspace(-2, 2, 20)[:, None]
    by_rows = output_error(layer, x, torch.ones(16))
    layer.spec = dataclasses.replace(layer.spec, dynamic=False)
    assert by_rows != output_error(layer, x, torch.ones(16))


def test_lapq_moves_the_steps_of_weights_alone():
    steps = lapq.Steps(prepared().quant_layers())
    assert len(steps.owners) == 5
    assert not any(isinstance(owner, RowQuantizer) for owner in steps.owners)


def test_training_learns_weights_and_their_steps():
    p = prepared(overrides={"up": {"dynamic": False}}, first_last=None)
    model = qk.trainable(p, first=BATCHES[0], tuning=qk.Tuning(start="paper"))
    learned = [name for name, m in model.named_modules() if isinstance(m, LearnedActivation)]
    assert learned == ["up.input"]
    before = outputs(model, BATCHES[0])
    optimizer = torch.optim.SGD(param_groups(model), lr=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(BATCHES[0]).float().square().mean().backward()
    for layer in p.quant_layers().values():
        assert layer.weight.grad.abs().sum() > 0
    optimizer.step()
    found = outputs(model, BATCHES[0])
    assert not torch.equal(before, found)
    torch.testing.assert_close(outputs(qk.convert(p), BATCHES[0]), found, rtol=1e-4, atol=1e-4)
