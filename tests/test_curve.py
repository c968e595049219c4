"""The curve of cost and quality: what its points are, that it goes on where it was, and its page."""

from __future__ import annotations

import base64
import json
import re

import pytest
import torch

import qk
from qk import judge
from qk.curve import Curve, Point
from search.small import data, net

RECIPE = qk.Recipe(method="nearest")
SIZE = {"costs": ("size_mb",), "budgets": 5, "progress": False}

pytestmark = pytest.mark.usefixtures("one_thread")


def point(name: str, size: float, quality: float, ms: float | None = None) -> Point:
    return Point(name, qk.Plan({}), {"size_mb": size, "latency_ms": 1.0}, 0.0, quality, ms)


def test_the_front_is_what_no_other_point_beats():
    points = [point("a", 1, 0.5), point("b", 2, 0.4), point("c", 2, 0.6), point("d", 3, 0.6), point("e", 4, 0.9)]
    assert [p.name for p in Curve("", "accuracy", ("size_mb",), points).front("size_mb")] == ["a", "c", "e"]
    assert [p.name for p in Curve("", "divergence", ("size_mb",), points).front("size_mb")] == ["a", "b"]


def test_a_measured_latency_counts_before_the_predicted_one():
    points = [point("a", 1, 0.5, 3.0), point("b", 1, 0.6, 2.0)]
    assert [p.name for p in Curve("", "accuracy", ("latency_ms",), points).front("latency_ms")] == ["b"]


@pytest.fixture(scope="module")
def found():
    return qk.pareto(net(), data(), RECIPE, **SIZE)


def test_every_budget_and_pair_of_widths_has_its_plan(found):
    names = [p.name for p in found.points]
    assert names[:3] == ["all W8A8", "all W4A8", "all W2A8"]
    assert [p.uniform for p in found.points] == [True] * 3 + [False] * (len(names) - 3)
    sizes = sorted(p.costs["size_mb"] for p in found.points)
    least, most = sizes[0], sizes[-1]
    for p in found.points[3:]:
        limit = float(p.name.split()[1])  # shown with four digits
        assert p.costs["size_mb"] <= limit * (1 + 1e-3)
        assert any(limit == pytest.approx(least + (most - least) * k / 4, rel=1e-3) for k in range(5))


def test_the_quality_is_that_of_the_quantized_network(found):
    model = net()
    chosen = found.points[-1]
    result = qk.quantize(model, data(), RECIPE, plan=chosen.plan, measure=False, progress=False)
    assert chosen.quality == judge.divergence(model, result.fused, data())
    judged = qk.pareto(model, data(), RECIPE, evaluate=lambda m: float(m(data()[0])[0, 0] > 0), **SIZE)
    assert judged.judged == "accuracy"
    assert judged.floating == float(model(data()[0])[0, 0] > 0)


def test_what_was_judged_is_not_judged_again(tmp_path):
    calls = []

    def evaluate(model):
        calls.append(model)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return len(calls) / 100

    with pytest.raises(KeyboardInterrupt):
        qk.pareto(net(), data(), RECIPE, evaluate=evaluate, out=tmp_path, **SIZE)
    first = json.loads((tmp_path / "curve.json").read_text())["points"]
    assert len(first) == 2  # the first call was of the float model
    whole = qk.pareto(net(), data(), RECIPE, evaluate=evaluate, out=tmp_path, **SIZE)
    assert [p.quality for p in whole.points[:2]] == [x["quality"] for x in first]
    count = len(calls)
    again = qk.pareto(net(), data(), RECIPE, evaluate=evaluate, out=tmp_path, **SIZE)
    assert len(calls) == count + 1
    assert [p.quality for p in again.points] == [p.quality for p in whole.points]
    for p in again.points:
        assert qk.Plan.load(tmp_path / "plans" / p.file) == p.plan


def test_another_call_is_refused_there(tmp_path, found):
    qk.pareto(net(), data(), RECIPE, out=tmp_path, **SIZE)
    with pytest.raises(qk.QkError, match=r"of another: budgets 5 instead of 4. Delete the folder"):
        qk.pareto(net(), data(), RECIPE, out=tmp_path, **SIZE | {"budgets": 4})
    changed = net()
    with torch.no_grad():
        changed.head.bias += 1
    with pytest.raises(qk.QkError, match="other model"):
        qk.pareto(changed, data(), RECIPE, out=tmp_path, **SIZE)
    (tmp_path / "curve.json").write_text("{}")
    with pytest.raises(qk.QkError, match="must be a curve"):
        qk.pareto(net(), data(), RECIPE, out=tmp_path, **SIZE)


def test_the_page_stands_alone_and_holds_the_plans(tmp_path, found):
    pytest.importorskip("matplotlib")
    text = found.save(tmp_path / "curve.html").read_text()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", text)
    for number, p in enumerate(sorted(found.points, key=lambda p: p.costs["size_mb"])):
        assert f'id="point-size_mb-{number}"' in text
        panel = text.split(f'data-n="{number}"')[1].split("</figure>")[0]
        assert p.name in panel
        plan = re.search(r"base64,([^\"]+)", panel)[1]
        assert qk.Plan.from_dict(json.loads(base64.b64decode(plan))) == p.plan


def test_latencies_are_measured_and_kept(tmp_path):
    options = {"weights": (4, 8), "budgets": 2, "progress": False}
    curve = qk.pareto(net(), data(), RECIPE, out=tmp_path, **options)
    assert all(p.measured_ms > 0 for p in curve.points)
    assert qk.LatencyTable.load(tmp_path / "latencies.json").times
    assert "ms measured" in curve.table().headers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"costs": ()}, "costs must be different ones"),
        ({"costs": ("size_mb", "price")}, "costs must be different ones"),
        ({"budgets": 1}, "budgets must be at least 2"),
        ({"recipe": qk.Recipe(method="lsq")}, r"method must be nearest, gptq or brecq"),
        ({"weights": (5,)}, "different widths"),
    ],
)
def test_bad_input_is_refused(options, message):
    with pytest.raises(qk.QkError, match=message):
        qk.pareto(net(), data(), **SIZE | {"recipe": RECIPE} | options)
