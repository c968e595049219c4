"""The report: nothing left out, one file, readable anywhere."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess

import pytest
from rich.console import Console

from qk.errors import QkError
from qk.report import Latency, LayerReport, Report
from qk.tables import Table, ms, percent, show, size

SLOWER = "slower in integers: 0.02 ms instead of 0.01 ms"


@pytest.fixture
def report():
    layers = [
        LayerReport("stem", "conv2d", 8, 8, "", 38.2, 1152, 800, 0.2, 0.1),
        LayerReport("block.conv<1>", "conv2d", 2, 4, "", 11.5, 36864, 2800, 0.4, 0.2),
        LayerReport("fc", "linear", reason=SLOWER),
    ]
    losses = {"block": [{"iteration": i * 10, "loss": 2.0**-i} for i in range(9)]}
    return Report(
        title="a & b",
        layers=layers,
        accuracy={"float": 0.998, "simulated": 0.99, "integer": 0.988},
        size_bytes={"float": 900_000, "integer": 100_000},
        latency=[Latency(1, 0.5, 0.6, 0.4, 0.9)],
        seconds={"reconstruct": 1.0},
        losses=losses,
        recipe={"weights": 2},
        machine={"cpu": "one"},
    )


def test_every_layer_is_there_with_its_width_or_its_reason(report):
    text = "\n".join(table.plain() for table in report.tables())
    for word in ("stem", "W8A8", "block.conv<1>", "W2A4", "fc", SLOWER, "99.80", "98.80", "9.00x smaller"):
        assert word in text


def test_a_slower_model_is_called_slower(report):
    rows = {row[0]: row for row in report.summary().rows}
    assert rows["latency p50, batch 1 (ms)"][-1] == "1.25x faster"
    assert rows["latency p99, batch 1 (ms)"][-1] == "1.50x slower"


def test_json_gives_the_same_report_back(report, tmp_path):
    path = report.save(tmp_path / "r.json")
    assert Report.from_dict(json.loads(path.read_text())) == report


def test_the_page_is_one_file_without_network(report, tmp_path):
    pytest.importorskip("matplotlib")
    page = report.save(tmp_path / "deep" / "report.html").read_text()
    assert page.count("<svg") == 5
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "a &amp; b" in page
    assert "block.conv&lt;1&gt;" in page
    assert "<conv" not in page
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_a_report_of_nothing_is_still_a_page(tmp_path):
    assert "<h1>empty</h1>" in Report("empty").save(tmp_path / "r.html").read_text()


def test_what_was_not_measured_is_an_empty_cell():
    report = Report("r", [LayerReport("a", "linear", 4, 8)])
    assert report.layer_table().cells() == [["a", "linear", "W4A8", "", "", "", "", ""]]
    assert "<td" in report.section()


def test_infinite_error_ratios_do_not_break_the_pictures(tmp_path):
    layers = [LayerReport("a", "linear", 8, 8, "", float("inf")), LayerReport("b", "linear", 8, 8, "", float("-inf"))]
    report = Report("r", layers, losses={"u": [{"iteration": 0, "loss": 0.0}, {"iteration": 1, "loss": float("nan")}]})
    assert "</html>" in report.save(tmp_path / "r.html").read_text()
    json.loads(report.save(tmp_path / "r.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_chromium_draws_the_page(report, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    page = report.save(tmp_path / "report.html")
    picture = tmp_path / "page.png"
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_table_four_ways():
    table = Table("T", ["name", "n"], [["a|b", 1.5], ["[c]", None]])
    assert table.plain().splitlines() == ["T", "name    n", "a|b   1.5", "[c]"]
    assert table.markdown().splitlines()[1:] == ["| --- | ---: |", "| a\\|b | 1.5 |", "| [c] |  |"]
    assert '<td class="n">1.5</td>' in table.html()
    assert table.rich().row_count == 2


def test_units():
    assert [size(n) for n in (None, 12, 1234, 45_600_000, 7 * 10**9)] == [None, "12 B", "1.23 kB", "45.6 MB", "7 GB"]
    assert [ms(v) for v in (None, 0.1234, 12.34)] == [None, "0.123", "12.3"]
    assert percent(0.98765) == "98.77"


def test_a_narrow_terminal_cuts_no_figure():
    table = Table("", ["layer", "weight", "MACs"], [["encoder.layer.0.output.dense", "384x1536", "9,437,184"]])
    for width in (20, 40, 120):
        console = Console(file=io.StringIO(), force_terminal=True, width=width)
        show(table, console)
        shown = console.file.getvalue()
        assert "384x1536" in shown
        assert "9,437,184" in shown
        assert ("│" in shown) == (width == 120)


def test_a_report_that_cannot_be_written_is_a_qk_error(report, tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "report.html"):
        with pytest.raises(QkError, match="must be a file that can be written"):
            report.save(place)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
