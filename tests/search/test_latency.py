"""Latencies by layer, the tables that hold them, and what is estimated from these."""

import json
import sys

import pytest
import torch
from torch import nn

import qk
from qk.prepare import prepare
from qk.search.bank import Bank
from qk.search.items import find_items
from qk.search.latency import LatencyTable, kind_of, latency_costs, network_times, uniform_networks
from qk.spec import Budget, Recipe
from search.small import data, net

LATENCY = sys.modules["qk.search.latency"]  # qk.search itself is the function

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bank():
    p = prepare(net(), data()[0], Recipe())
    return Bank(p, find_items(p, (4, 8), (6, 8), False, None), data(1), "minmax")


@pytest.fixture(scope="module")
def measured(bank):
    """A table and what came of it."""
    table = LatencyTable()
    return table, latency_costs(bank, data(1)[0][:1], table)


def test_every_layer_of_a_network_has_its_steps(bank):
    networks = uniform_networks(bank, data(1)[0])
    assert list(networks) == [(8, 8), (8, 6), (4, 8), (4, 6)]
    found = network_times(list(networks.values()), data(1)[0])
    for times in found:
        layers = {name: times.layers[name] for name in bank.p.quant_layers()}
        assert all(0 < ms < 100 for ms in layers.values())
        assert 0 < times.whole < 1000


def test_costs_are_of_all_items_and_options_and_a_second_look_measures_nothing(bank, measured, monkeypatch):
    table, costs = measured
    assert [len(row) for row in costs.items] == [4] * len(bank.items)
    assert all(ms > 0 for row in costs.items for ms in row)
    assert costs.rest >= 0
    assert not costs.estimated
    monkeypatch.setattr(LATENCY, "network_times", None)
    assert latency_costs(bank, data(1)[0][:1], table) == costs


def test_layers_of_one_shape_share_a_row(measured):
    table, costs = measured
    # one.b, two.a and two.b are 3x3 of 16 channels on 6 x 6, but for the item of two.a with its shortcut.
    assert costs.items[1] == costs.items[3]
    assert len(table.times) == 4


def test_another_batch_is_another_row(bank, measured):
    table, _ = measured
    other = LatencyTable(table.machine, dict(table.times), dict(table.work), dict(table.rest))
    latency_costs(bank, data(1)[0][:2], other)
    assert len(other.times) == 2 * len(table.times)
    assert len(other.rest) == 2


def test_a_table_comes_back_from_its_file(measured, tmp_path):
    table, _ = measured
    table.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == table


def foreign(table, path):
    LatencyTable(table.machine | {"cpu": "another"}, table.times, table.work, table.rest).save(path)
    return path


def test_a_table_of_another_machine_is_refused_unless_it_is_wanted(bank, measured, tmp_path):
    table, costs = measured
    path = foreign(table, tmp_path / "other.json")
    with pytest.raises(qk.QkError, match=r"a table of this machine, got cpu another.*foreign=True"):
        LatencyTable.load(path)
    other = LatencyTable.load(path, foreign=True)
    assert other.is_foreign
    assert not table.is_foreign
    assert latency_costs(bank, data(1)[0][:1], other) == costs


def test_what_a_foreign_table_lacks_is_estimated_from_its_kind(bank, measured, tmp_path, monkeypatch):
    table, _ = measured
    monkeypatch.setattr(LATENCY, "network_times", None)
    other = LatencyTable.load(foreign(table, tmp_path / "other.json"), foreign=True)
    gone = next(shape for shape in other.times if " 16x16x3x3 " in shape and "stride 2" in shape)
    for n, work in enumerate((10_000, 20_000, 80_000, 10**9)):
        for widths in ((8, 8), (8, 6), (4, 8), (4, 6)):
            other.add(f"conv2d 9x9x3x3 on {n} groups 1", widths, work, work * 1e-6 * (n + 1))
    del other.times[gone]
    macs = other.work.pop(gone)
    costs = latency_costs(bank, data(1)[0][:1], other)
    assert "one.a W8A8" in costs.estimated
    near = sorted((abs(torch.tensor(other.work[s] / macs).log().item()), s) for s in other.times if "3x3" in s)[:3]
    speeds = sorted(other.times[s]["W8A8"] / other.work[s] for _, s in near)
    assert other.time(gone, (8, 8), macs) == pytest.approx(macs * speeds[1], rel=1e-12)


def test_layers_outside_fused_regions_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    batches = [torch.randn(4, 8, generator=torch.Generator().manual_seed(0))]
    search = qk.Search(prepare(model, batches[0], Recipe(dynamic=True)), batches, weights=(4, 8))
    assert search.plan(Budget(bit_ops_share=0.9), "eagl").plan["2"].describe() == "W4A8 dynamic"
    with pytest.raises(qk.QkError, match="layers that run in fused regions, got 2 outside"):
        search.plan(Budget(latency_ms=5.0), "eagl")


def test_too_few_rows_to_estimate_from_are_refused(bank, measured, tmp_path):
    table, _ = measured
    empty = LatencyTable.load(foreign(LatencyTable(table.machine), tmp_path / "empty.json"), foreign=True)
    with pytest.raises(qk.QkError, match="or 3 of its kind, got 0 of conv2d 3x3 W8A8"):
        latency_costs(bank, data(1)[0][:1], empty)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [
        ("linear 10x20 on 1x20", "linear"),
        ("conv2d 8x4x3x3 on 1x8x6x6 stride 1,1 padding 1,1 dilation 1,1 groups 2", "conv2d 3x3"),
        ("conv2d 8x1x3x3 on 1x8x6x6 stride 1,1 padding 1,1 dilation 1,1 groups 8", "conv2d 3x3 depthwise"),
        ("conv2d 8x1x1x1 on 1x1x6x6 stride 1,1 padding 0,0 dilation 1,1 groups 1", "conv2d 1x1"),
    ],
)
def test_kinds(shape, kind):
    assert kind_of(shape) == kind


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("rest"),
        lambda data: data.update(format=2),
        lambda data: data["times"].update(more={"W8A8": 1.0}),
        lambda data: next(iter(data["times"].values())).update(W8A8=-1.0),
        lambda data: next(iter(data["times"].values())).update(W8A8="fast"),
        lambda data: data.update(times=[]),
    ],
)
def test_files_that_are_no_tables_are_refused(measured, tmp_path, change):
    path = tmp_path / "table.json"
    measured[0].save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(qk.QkError, match="a table of latencies"):
        LatencyTable.load(path)


def test_no_file_and_no_place(measured, tmp_path):
    with pytest.raises(qk.QkError, match="a table of latencies, got FileNotFoundError"):
        LatencyTable.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(qk.QkError, match="a place that can be written"):
        measured[0].save(tmp_path / "file" / "table.json")
