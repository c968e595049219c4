"""qk bench: its command line on tiny shapes without peers, its goals and page from figures made up here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from models import import_torchvision
from qk import _core
from qk.bench import confine, goals, limits, page, peers, problems, rows, run, suite, worker
from qk.bench.harness import alternate
from qk.cli import app


def call(*words, code=0):
    result = CliRunner().invoke(app, ["bench", *words])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def alone(monkeypatch):
    """Workers find no peers but torch."""
    monkeypatch.setattr(peers, "MODULES", {"torch": peers.MODULES["torch"]})
    # A worker is a process of its own: here it runs in this one.
    monkeypatch.setattr(run, "_once", _here)
    peers.installed.cache_clear()
    yield
    peers.installed.cache_clear()


def _here(spec, confinement, result, done, say):
    lines = Path(spec["wanted"]["cache"] or ".") / "lines"
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.write_text("")
    before = torch.get_num_threads()
    worker.main(spec, lines)
    torch.set_num_threads(before)
    for line in lines.read_text().splitlines():
        run._hear(json.loads(line), result, done, None, say)
    return None, None


def test_kernels_run_check_themselves_and_are_written(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    said = call("kernels", "--small", "--seconds", "60", "--json", str(tmp_path / "k.json"))
    assert "gemm small 1x128x32" in said
    assert "of the limit" in said
    result = json.loads((tmp_path / "k.json").read_text())
    (measured,) = result["runs"]
    assert measured["failed"] == []
    assert measured["limits"]["products"]
    kinds = {row["kind"] for row in measured["rows"]}
    assert {"gemm", "conv2d", "elementwise", "training"} <= kinds
    for row in measured["rows"]:
        assert row["failed"] == {} or row["kind"] == "conv2d", row  # fbgemm's depthwise saturates
        low, middle, high = row["entries"][0]["ms"]
        assert 0 < low <= middle <= high
    page.write(result, tmp_path / "page.md", "k.json")
    assert "small 1x128x32" in (tmp_path / "page.md").read_text()


def test_a_network_is_measured(alone, tmp_path):
    if not import_torchvision():
        pytest.skip("torchvision is not installed")
    words = ("--size", "32", "--widths", "W8A8", "--no-peers", "--seconds", "60", "--cache", str(tmp_path))
    said = call("model", "torchvision:mobilenet_v2", *words, "--json", str(tmp_path / "m.json"))
    assert "qk W8A8 modules" in said
    network, start = json.loads((tmp_path / "m.json").read_text())["runs"][0]["rows"]
    assert network["failed"] == start["failed"] == {}
    assert start["entries"][0]["packed"] > 3e6  # bytes of 3.4 million weights


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("kernels", "--threads", "999"), r"--threads must be numbers from 1 to"),
        (("kernels", "--json", "/proc/none/x.json"), r"/proc/none must be a folder that can be written"),
        (("kernels", "--threads", "0"), r"--threads must be numbers from 1 to"),
        (("kernels", "--threads", "two"), r"--threads must be numbers"),
        (("kernels", "--confine", "avx"), r"--confine must be none, vnni"),
        (("peers", "--confine", "avx"), r"--confine must be none, vnni"),  # and not its default batch sizes
        (("model", "resnet18"), r"NAME must be torchvision:NAME"),
        (("model", "torchvision:resnet18", "--widths", "8"), r"--widths must be such as W4A8"),
        (("model", "torchvision:resnet18", "--widths", "W5A8"), r"weights"),
        (("model", "torchvision:resnet18", "--batch", ""), r"--batch must be numbers"),
        (("page", "missing.json"), r"missing.json must be a file of qk bench --json"),
    ],
)
def test_bad_arguments_are_one_line(words, expected):
    said = call(*words, code=1)
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert expected in said


def test_a_page_needs_the_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "in the repository" in call("kernels", "--page", code=1)


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peers, "MODULES", {"nothing": "qk.bench.peers.with_nothing"})
    peers.installed.cache_clear()
    try:
        assert list(peers.installed()[1]) == ["nothing"]
    finally:
        peers.installed.cache_clear()


def candidate(name, family="W8", wrong=False, broken=False):
    def work():
        if broken:
            raise RuntimeError("no such kernel\nand more")

    def check():
        work()
        assert not wrong, "off by 3"

    return rows.Candidate(name, family, work, check, moved=100)


def test_who_is_wrong_or_fails_is_named_and_the_others_are_measured():
    def failing(threads):
        yield candidate("first of a bad source")
        raise ImportError("cannot be built")

    sources = {
        "qk": lambda threads: [candidate("qk W8A8", "W8A8"), candidate("wrong", wrong=True)],
        "other": lambda threads: [candidate("broken", broken=True), candidate("right")],
        "bad": failing,
    }
    known = {"products": {"avx512vnni": 1e12}, "read": [[100, 1e9], [1000, 1e9]]}
    row = worker.measure(rows.Row("gemm", "gemm x", sources, operations=1000), 1, known, 1.0)
    assert {e["name"] for e in row["entries"]} == {"qk W8A8", "right", "first of a bad source"}
    assert row["failed"] == {"wrong": "off by 3", "broken": "no such kernel", "bad": "cannot be built"}
    assert row["entries"][0]["limit_ms"] == pytest.approx(1e-4)  # 100 bytes at 1 GB/s take longer than 1000 operations
    assert "3 are allowed" not in run.describe(row)
    assert "wrong: off by 3" in run.describe(row)


CRASHES = """
import json, os, sys
spec, out = json.load(open(sys.argv[-2])), open(sys.argv[-1], "a")
for name in ("a", "b", "c"):
    if name in spec["skip"]:
        continue
    out.write(json.dumps({"begin": name}) + "\\n")
    out.flush()
    if name == "b":
        print("about to die")
        sys.stdout.flush()
        os.abort()
    entry = {"name": "qk", "ours": True, "family": "W8A8", "ms": [1, 1, 1]}
    row = {"kind": "gemm", "name": name, "operations": 0, "facts": {}, "entries": [entry], "failed": {}}
    out.write(json.dumps({"row": row}) + "\\n")
"""


def test_a_process_that_dies_goes_on_behind_its_row(tmp_path, monkeypatch):
    script = tmp_path / "crashes.py"
    script.write_text(CRASHES)
    start = subprocess.Popen
    monkeypatch.setattr(
        run.subprocess, "Popen", lambda command, **kw: start([sys.executable, str(script), *command[-2:]], **kw)
    )
    said = []
    result = run.benchmark(suite.Wanted("kernels"), (1,), ("none",), 5.0, said.append)["runs"][0]
    assert [row["name"] for row in result["rows"]] == ["a", "c"]
    assert result["failed"] == ["b: the process ended with -6: about to die"]


@pytest.mark.skipif(sys.platform != "linux", reason="system calls of Linux")
def test_an_interrupted_benchmark_keeps_its_rows(alone, tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    described, found = run.describe, []

    def interrupted(row):
        found.append(row["name"])
        if len(found) == 3:
            raise KeyboardInterrupt
        return described(row)

    monkeypatch.setattr(run, "describe", interrupted)
    call("kernels", "--small", "--seconds", "60", "--json", str(tmp_path / "k.json"), code=130)
    (measured,) = json.loads((tmp_path / "k.json").read_text())["runs"]
    assert [row["name"] for row in measured["rows"]] == found[:2]


def test_a_confined_process_gets_no_tiles():
    code = "from qk import _core; print(_core.usable_isas(), end='')"
    done = subprocess.run(
        [sys.executable, confine.__file__, sys.executable, "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "amx" not in done.stdout
    assert "generic" in done.stdout


def test_limits_lie_between_what_was_measured():
    known = {"products": {"avx512vnni": 1e12, "amx": 8e12}, "read": [[1024, 100e9], [4096, 25e9]]}
    assert limits.bandwidth(known, 10) == 100e9
    assert limits.bandwidth(known, 2048) == pytest.approx(50e9)
    assert limits.bandwidth(known, 10**9) == 25e9
    assert limits.seconds(known, 8 * 10**12, 0) == pytest.approx(1)
    assert limits.seconds(known, 8 * 10**12, 0, "avx512vnni") == pytest.approx(8)
    assert limits.seconds(known, 1, 25 * 10**9) == pytest.approx(1)


def test_probes_measure_something():
    found = limits.measure(1, sizes=(2**14,))
    assert all(value > 1e8 for value in found["products"].values())
    assert found["read"][0][1] > 1e8
    assert _core.probe_bandwidth(1, 2) > 0


@pytest.mark.parametrize(("size", "threads"), [(0, 1), (2**36 + 1, 1), (1, 0), (1, 1025)])
def test_a_bandwidth_probe_refuses(size, threads):
    with pytest.raises(RuntimeError, match=r"qk: (bytes|threads) must be from 1 to"):
        _core.probe_bandwidth(size, threads)


def test_rounds_end_with_the_budget():
    # Each call takes a millisecond at least, so that ten rounds fill the budget on any machine.
    times = alternate({"a": lambda: time.sleep(0.001)}, rounds=1000, slot=0.001, budget=0.01)
    assert 3 <= len(times["a"]) < 200


def test_candidates_with_threads_of_their_own_wait_for_those_that_spin():
    order = []
    alternate(
        {"qk": lambda: None, "ORT int8": lambda: None},
        rounds=2,
        slot=0.0,
        took={"qk": 1.0, "ORT int8": 1.0},
        rest=lambda before, after: order.append((before, after)) or worker._rest(before, after),
    )
    assert order == [("ORT int8", "qk"), ("qk", "ORT int8")] * 2
    assert worker._rest("ORT int8", "qk W8A8") > worker._rest("qk W8A8", "OpenVINO int8") > 0
    assert worker._rest("qk W8A8", "torch float32") == worker._rest("OpenVINO int8", "OpenVINO W4") == 0


def entry(name, family, ms, **more):
    return {"name": name, "ours": name.startswith("qk"), "family": family, "ms": [ms, ms, ms], **more}


def gemm_row(m, ours, theirs, **limit):
    entries = [entry("qk W8A8", "W8A8", ours, moved=100, **limit), entry("ORT", "W8", theirs)]
    entries.append(entry("OpenVINO", "W8", 2 * theirs))
    facts = {"m": m, "k": 512, "n": 512}
    return {
        "kind": "gemm",
        "name": f"gemm m{m}",
        "operations": 2 * m * 512 * 512,
        "facts": facts,
        "entries": entries,
        "failed": {"torch": "cannot"},
    }


def result_of(*measured, threads=1, confined="none"):
    machine = {"cpu": "a CPU", "cpus": 2, "instruction set": "avx512vnni"}
    known = {"products": {"avx512vnni": 1e12}, "read": [[2**15, 3e11], [2**28, 1e10]]}
    one = {"threads": threads, "confine": confined, "rows": list(measured), "failed": []}
    one |= {"machine": machine, "limits": known, "peers": {"onnxruntime": "1.0"}, "missing": {"openvino": "not there"}}
    return {"benchmark": "peers", "runs": [one]}


def test_a_run_of_products_alone_has_no_other_goals():
    run_ = result_of(gemm_row(128, 1.0, 2.0))["runs"][0]
    works = {g.work for g, _ in goals.standings(run_ | {"products_only": True})}
    assert "GEMM, M = 16" in works
    assert not any("lsq" in work or "start" in work or "bag" in work for work in works)
    alone = suite.rows(suite.Wanted("peers", peers=False, cache="unused", products_only=True))
    assert {row.kind for row in alone} == set(suite.PRODUCTS)


def test_goals_take_geometric_means_over_their_rows():
    result = result_of(gemm_row(128, 1.0, 2.0), gemm_row(512, 1.0, 0.5), gemm_row(16, 1.0, 1.05))
    met = {(g.work, g.ours, g.against): s for g, s in goals.standings(result["runs"][0])}
    large = met["large GEMM, M = 128 and 512", "W8A8", "W8"]
    assert (large.rows, large.ratio, large.lowest, large.rival) == (2, pytest.approx(1.0), 0.5, "ORT")
    assert large.met
    assert not met["GEMM, M = 16", "W8A8", "W8"].met  # 1.05 of 1.1
    assert met["network resnet18", "W4A8", "int8"] is None


def test_a_goal_against_a_limit_is_its_share():
    result = result_of(gemm_row(128, 1.0, 2.0, limit_ms=0.5, vnni_limit_ms=0.95))
    met = {(g.ours, g.against): s for g, s in goals.standings(result["runs"][0]) if s}
    assert met["W8A8", goals.VNNI_LIMIT].ratio == pytest.approx(0.95)
    assert met["W8A8", goals.VNNI_LIMIT].met


def test_a_goal_in_seconds():
    rows_ = [{"kind": "start", "name": "start resnet50", "operations": 0, "facts": {}, "failed": {}}]
    rows_[0]["entries"] = [entry("qk load W4A8", "load", 250.0, packed=10, prepacked=20)]
    (standing,) = [s for g, s in goals.standings(result_of(*rows_)["runs"][0]) if s]
    assert standing.ratio == pytest.approx(2)
    assert standing.met


def test_the_page_has_goals_tables_machine_and_failures(tmp_path):
    result = result_of(gemm_row(128, 1.0, 2.0, limit_ms=0.5, vnni_limit_ms=0.95), gemm_row(16, 1.0, 1.05))
    written = page.write(result, tmp_path / "performance.md", "figures.json")
    text = written[0].read_text()
    assert "| large GEMM, M = 128 and 512 | W8A8 | 1.000 | W8: ORT | 2.000 |" in text
    assert "1 thread, the machine as it is" in text
    assert "a CPU" in text
    assert "onnxruntime 1.0" in text
    assert "Not installed: openvino (not there)." in text
    assert "- torch: cannot (in gemm m128, 1 thread, the machine as it is) and 1 more" in text
    if len(written) > 1:
        assert "<svg" in written[1].read_text()
        first = written[1].read_bytes()
        page.write(result, tmp_path / "performance.md", "figures.json")
        assert written[1].read_bytes() == first  # the same figures, the same file


def test_results_merge_row_by_row(tmp_path):
    first = result_of(gemm_row(128, 1.0, 2.0), gemm_row(16, 1.0, 2.0))
    second = result_of(gemm_row(16, 1.0, 3.0))
    other = result_of(gemm_row(16, 1.0, 4.0), threads=2)
    files = []
    for i, result in enumerate((first, second, other)):
        files.append(tmp_path / f"{i}.json")
        files[-1].write_text(json.dumps(result))
    merged = page.merge([json.loads(f.read_text()) for f in files])
    assert [(r["threads"], len(r["rows"])) for r in merged["runs"]] == [(1, 2), (2, 1)]
    assert merged["runs"][0]["rows"][1]["entries"][1]["ms"][1] == 3.0
    assert "wrote" in call("page", *map(str, files), "--out", str(tmp_path / "p.md"))


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_tables_of_rows_mean_what_torch_reads(bits):
    d = problems.Bag(50, 16, 4, 2, 5).data
    name = {8: "byte", 4: "4bit", 2: "2bit"}[bits]
    read = getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets")
    rows.meets(read(d.table(bits), d.indices, d.offsets), d.expected(bits), 1e-3)


def test_every_goal_names_rows_of_the_suite():
    made = suite.rows(suite.Wanted("peers", peers=False, cache="unused"))
    records = [{"kind": r.kind, "name": r.name, "facts": r.facts} for r in made]
    for goal in goals.GOALS:
        if not goal.work.startswith("embedding bag"):
            assert any(goal.rows(record) for record in records), goal.work
