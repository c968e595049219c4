"""From a budget to a plan."""

import math
import sys

import pytest
import torch

import qk
from qk.deploy import file_bytes
from qk.prepare import prepare
from qk.search.latency import LatencyTable
from qk.spec import Budget, Recipe
from search.small import data, net

CHOOSE = sys.modules["qk.search.choose"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def found():
    return qk.Search(prepare(net(), data()[0], Recipe()), data())


@pytest.mark.parametrize("solver", ["exact", "genetic"])
@pytest.mark.parametrize("sensitivity", ["fisher", "alps", "hessian", "eagl", "random", "cost_only"])
def test_the_plan_keeps_the_size_and_no_cheaper_loss_does(found, sensitivity, solver):
    limit = 0.6 * found.costs("size_mb").of([0] * 4)
    chosen = found.plan(Budget(size_share=0.6), sensitivity, solver)
    assert chosen.costs["size_mb"] <= limit
    losses = found.sensitivity(sensitivity)
    every = [tuple(int(x) for x in choice) for choice in torch.cartesian_prod(*[torch.arange(3)] * 4)]
    best = min(losses.of(choice) for choice in every if found.costs("size_mb").of(choice) <= limit)
    # Sums of at most 4 losses and 2 pairs, each off by 2^-53 of the largest.
    assert losses.of(chosen.choice) == pytest.approx(best, rel=1e-12, abs=1e-15) == chosen.loss


def test_the_plan_is_one_that_the_whole_flow_takes(found):
    limit = 0.65 * found.costs("size_mb").of([0] * 4)
    plan = found.plan(Budget(size_mb=limit)).plan
    p = prepare(net(), data()[0], Recipe())
    qk.apply_plan(p, plan)
    qk.calibrate(p, data())
    integer = qk.convert(p)
    assert file_bytes(integer) / 1e6 <= limit
    assert integer(data()[0]).shape == (8, 6)
    assert {spec.weights for spec in plan.layers.values()} > {2} or {spec.weights for spec in plan.layers.values()} > {
        4
    }


def test_quantize_takes_the_plan_in_place_of_the_recipes_widths(found):
    plan = found.plan(Budget(size_share=0.65)).plan
    recipe = Recipe(weights=4, method="nearest")
    result = qk.quantize(net(), data(), recipe, plan=plan, measure=False, fused=False, progress=False)
    assert result.plan == plan
    p = prepare(net(), data()[0], recipe)
    qk.apply_plan(p, plan)
    qk.calibrate(p, data())
    assert torch.equal(result.model(data()[0]), qk.convert(p)(data()[0]))
    with pytest.raises(qk.QkError, match=r"plan must be one spec for each layer of the model, got unknown stem"):
        qk.quantize(torch.nn.Linear(4, 4), [torch.randn(2, 4)], recipe, plan=plan)
    with pytest.raises(qk.QkError, match=r"plan must be a qk\.Plan, got dict.*from_dict"):
        qk.quantize(net(), data(), recipe, plan=plan.to_dict())


def test_in_one_call(found):
    plan = qk.search(prepare(net(), data()[0], Recipe()), data(), Budget(bit_ops_share=0.8), "eagl", weights=(2, 4))
    assert plan["stem"].weights == plan["head"].weights == 8
    assert plan["one.a"] == plan["one.skip"]
    assert {plan[name].weights for name in ("one.a", "one.b", "two.a", "two.b")} <= {2, 4}


def test_several_limits_hold_at_once(found):
    budget = Budget(size_share=0.8, bit_ops_share=0.5)
    costs = found.plan(budget).costs
    widest = [0] * 4
    assert costs["size_mb"] <= 0.8 * found.costs("size_mb").of(widest)
    assert costs["giga_bit_ops"] <= 0.5 * found.costs("giga_bit_ops").of(widest)


def test_a_wide_budget_leaves_all_at_their_widest(found):
    assert found.plan(Budget(size_share=1.0)).choice == (0, 0, 0, 0)


def test_the_lower_of_a_limit_and_a_share_holds(found):
    widest = found.costs("size_mb").of([0] * 4)
    both = found.plan(Budget(size_mb=0.6 * widest, size_share=0.9))
    assert both == found.plan(Budget(size_share=0.6))


def test_uniform_plans(found):
    chosen = found.uniform(4, 8)
    assert chosen.choice == (1, 1, 1, 1)
    assert math.isnan(chosen.loss)
    assert chosen.plan["two.b"].describe() == "W4A8"
    assert chosen.plan["head"].describe() == "W8A8"
    assert found.uniform(3, 8).choice == (1, 1, 1, 1)  # the nearest that is wider
    assert chosen.costs["size_mb"] == found.costs("size_mb").of(chosen.choice)


# --- latency ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed():
    """With latencies that are made up: of a layer as many milliseconds as its weights have bits."""
    p = prepare(net(), data()[0], Recipe())
    found = qk.Search(p, data(1))
    found._costs["latency_ms"] = CHOOSE.Costs([[8.0, 4.0, 2.0]] * 4, 1.0)
    return found


def measures(search, monkeypatch, factor):
    """What the networks take when they are measured, instead of as predicted."""
    monkeypatch.setattr(search, "measured_ms", lambda choice: factor * search.costs("latency_ms").of(choice))


def test_a_limit_on_latency_is_measured(timed, monkeypatch):
    measures(timed, monkeypatch, 1.0)
    chosen = timed.plan(Budget(latency_ms=20.0), "eagl")
    assert chosen.measured_ms == chosen.costs["latency_ms"] <= 20


def test_a_plan_that_is_slower_than_predicted_gives_way_to_a_faster_one(timed, monkeypatch):
    predicted = timed.plan(Budget(latency_ms=30.0), "eagl") if measures(timed, monkeypatch, 1.0) is None else None
    measures(timed, monkeypatch, 1.3)
    chosen = timed.plan(Budget(latency_ms=30.0), "eagl")
    assert chosen.measured_ms <= 30 < 1.3 * predicted.costs["latency_ms"]
    assert chosen.costs["latency_ms"] < predicted.costs["latency_ms"]


def test_a_limit_that_nothing_keeps_when_measured_is_refused(timed, monkeypatch):
    measures(timed, monkeypatch, 2.0)
    with pytest.raises(qk.QkError, match="latency_ms must be at least 18, got 9, where 18 was the least"):
        timed.plan(Budget(latency_ms=9.0), "eagl")


def test_a_table_of_another_machine_is_not_measured_against(timed, monkeypatch):
    timed.table = LatencyTable(timed.table.machine | {"cpu": "another"})
    monkeypatch.setattr(timed, "measured_ms", None)
    assert timed.plan(Budget(latency_ms=20.0), "eagl").measured_ms is None


def test_real_latencies_lead_to_a_plan():
    found = qk.Search(prepare(net(), data()[0], Recipe()), data(1), weights=(2, 8))
    chosen = found.plan(Budget(latency_ms=1000.0), "eagl")
    assert chosen.choice == (0, 0, 0, 0)
    assert 0 < chosen.measured_ms <= 1000
    assert found.measured_ms((1, 1, 1, 1)) > 0


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_budget_below_the_least_is_refused_with_the_least(found):
    least = found.costs("size_mb").of((2, 2, 2, 2))
    with pytest.raises(qk.QkError, match=r"qk.search: limits must be at least (\S+) for size_mb, got 0.001") as error:
        found.plan(Budget(size_mb=0.001))
    assert float(str(error.value).split("at least ")[1].split()[0]) == pytest.approx(least, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sensitivity": "gut feeling"}, "sensitivity must be one of fisher, alps"),
        ({"solver": "greedy"}, "solver must be one of exact, genetic"),
        ({"budget": 4.5}, "budget must be a qk.Budget, got float"),
    ],
)
def test_what_is_no_choice_is_refused(found, arguments, says):
    with pytest.raises(qk.QkError, match=says):
        found.plan(**{"budget": Budget(size_share=0.5)} | arguments)


@pytest.mark.parametrize("fields", [{}, {"size_mb": 0}, {"size_share": 1.5}, {"latency_ms": -1}, {"bytes": 3}])
def test_budgets_that_are_none(fields):
    with pytest.raises(qk.QkError):
        Budget(**fields)


def test_searching_needs_a_prepared_model_and_a_sound_batch():
    with pytest.raises(qk.QkError, match=r"the result of qk\.prepare"):
        qk.Search(net(), data())
    with pytest.raises(qk.QkError, match="latency_batch must be at least 1"):
        qk.Search(prepare(net(), data()[0]), data(), latency_batch=0)
