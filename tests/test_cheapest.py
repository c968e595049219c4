"""Accuracy first: the cheapest plan that keeps it, by few judgements, and why each layer has its widths."""

from __future__ import annotations

import json

import pytest
import torch

import qk
from qk.cheapest import BUDGETS
from search.small import data, net

RECIPE = qk.Recipe(method="nearest")
SIZE = {"cost": "size_mb", "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


class Scores:
    """Judges by how far the output is from the float model's: a share that falls with the distance."""

    def __init__(self):
        self.calls, self.model = 0, net()

    @torch.no_grad()
    def __call__(self, model):
        self.calls += 1
        apart = sum(float((model(x) - self.model(x)).square().sum()) for x in data())
        return 1 / (1 + apart)


@pytest.mark.parametrize("lose", [0.003, 0.01, 0.2])
def test_it_is_the_cheapest_of_all_plans_that_keep_it(lose):
    scores = Scores()
    found = qk.cheapest(net(), data(), RECIPE, evaluate=scores, lose=lose, **SIZE)
    assert found.point.quality >= 1 - lose
    assert scores.calls <= BUDGETS.bit_length() + 3  # float and the widest among them
    every = qk.pareto(net(), data(), RECIPE, evaluate=scores, costs=("size_mb",), budgets=BUDGETS, progress=False)
    cheapest = [p for p in every.points if p.quality >= 1 - lose and (not p.uniform or p.plan == found.plan)]
    # Of these plans qualities fall with the size all the way, so that halving finds the first.
    assert found.point.costs["size_mb"] == min(p.costs["size_mb"] for p in cheapest)
    assert found.plan == found.point.plan


def test_every_layer_has_a_reason():
    found = qk.cheapest(net(), data(), RECIPE, evaluate=Scores(), lose=0.01, **SIZE)
    narrowed = [name for name, spec in found.plan.layers.items() if spec.weights < 8]
    kept = [name for name in ("one.a", "one.b", "two.a", "two.b") if name not in narrowed]
    assert narrowed
    assert kept
    assert all(found.reasons[name].startswith("saves 0.00") for name in narrowed)
    assert all("would save" in found.reasons[name] for name in kept)
    assert found.reasons["stem"] == found.reasons["head"] == "as the recipe has it"
    assert [row[2] for row in found.table().rows] == list(found.reasons.values())


def test_where_nothing_is_cheaper_all_stay_at_their_widest():
    table = qk.LatencyTable()
    options = {"cost": "latency_ms", "progress": False, "weights": (4, 8), "table": table}
    search = qk.Search(qk.prepare(net(), data()[0], RECIPE), data(), weights=(4, 8), table=table)
    search.costs("latency_ms")
    for times in table.times.values():  # as if 4 bits took longer everywhere
        for widths in times:
            times[widths] = 1.0 if "W8" in str(widths) else 2.0
    found = qk.cheapest(net(), data(), RECIPE, evaluate=lambda m: 0.5, lose=0.01, **options)
    assert {spec.describe() for spec in found.plan.layers.values()} == {"W8A8"}
    assert found.reasons["two.b"] == "no narrower width costs less"
    assert found.point.measured_ms > 0


def test_a_run_that_was_killed_goes_on_and_leaves_the_plan(tmp_path):
    scores = Scores()

    def killed(model):
        if scores.calls == 4:
            raise KeyboardInterrupt
        return scores(model)

    with pytest.raises(KeyboardInterrupt):
        qk.cheapest(net(), data(), RECIPE, evaluate=killed, lose=0.01, out=tmp_path, **SIZE)
    judged = len(json.loads((tmp_path / "curve.json").read_text())["qualities"])
    before = scores.calls
    found = qk.cheapest(net(), data(), RECIPE, evaluate=scores, lose=0.01, out=tmp_path, **SIZE)
    assert judged == 3
    assert scores.calls - before == 1 + len(found.tried.points) - judged  # the float model again
    assert qk.Plan.load(tmp_path / "plan.json") == found.plan
    assert (tmp_path / "curve.html").exists()
    assert (tmp_path / "sensitivities" / "fisher-0.json").exists()


def test_more_than_the_widest_plan_keeps_is_refused():
    values = iter((0.9, 0.5))
    message = r"lose must be what some plan keeps, got 0\.1, where the widest plan loses 0\.4"
    with pytest.raises(qk.QkError, match=message):
        qk.cheapest(net(), data(), RECIPE, evaluate=lambda m: next(values), lose=0.1, **SIZE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"evaluate": None}, "evaluate must be a function"),
        ({"lose": 1.5}, r"lose must be a share in \[0, 1\), got 1.5"),
        ({"lose": -0.1}, "lose must be a share"),
        ({"cost": "joules"}, "costs must be different ones of size_mb"),
        ({"evaluate": lambda model: 93.2}, "share"),
    ],
)
def test_bad_input_is_named(changed, message):
    options = {"evaluate": lambda model: 1.0, "lose": 0.01} | SIZE | changed
    with pytest.raises(qk.QkError, match=message):
        qk.cheapest(net(), data(), RECIPE, **options)
