"""The command line: results on stdout, one plain line and exit code 1 for bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import qk
from qk.cli import app

MODEL = """
import torch
from torch import nn

def make(width=8):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                         nn.Conv2d(width, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, 10))

def data():
    x = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return [x[:6], x[6:]], [(x, make().eval()(x).argmax(1))]

def with_training(rows=6):
    calibration, evaluation = data()
    return calibration, evaluation, [(x[:rows], y[:rows]) for x, y in evaluation]

def unlabelled():
    return data()[0], None

def with_labels():
    calibration, evaluation = data()
    return calibration, evaluation, None, [make().eval()(x).argmax(1) for x in calibration]

def labelled():
    return [(x, torch.zeros(6, dtype=torch.int64)) for x in data()[0]], None

def wrong():
    return 3
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command where cli_model.py lies; MODEL and DATA name its functions."""
    (tmp_path / "cli_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)

    def call(*words, code=0):
        words = [w.replace("MODEL", "python:cli_model:make").replace("DATA", "python:cli_model:data") for w in words]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == code, result.output
        return result

    return call


QUICK = ("--set", "iterations=3", "--set", "batch_size=4")


def test_quantize_eval_and_inspect_agree(run, tmp_path):
    made = run("quantize", "--model", "MODEL", "--data", "DATA", "--out", "out", *QUICK, "--json")
    report = json.loads(made.stdout)
    assert report["accuracy"]["float"] == 1.0
    assert (tmp_path / "out" / "report.html").exists()

    measured = json.loads(run("eval", "--model", "MODEL", "--data", "DATA", "--checkpoint", "out", "--json").stdout)
    assert measured["accuracy"] == report["accuracy"]["integer"]
    assert run("eval", "--model", "MODEL", "--data", "DATA").stdout == "accuracy: 100.00 %\n"

    held = json.loads(run("inspect", "out", "--json").stdout)
    assert [x["width"] for x in held["layers"]] == ["W8A8", "W4A8", "W8A8"]
    assert held["bytes"] == report["size_bytes"]["integer"]
    assert "W4A8" in run("inspect", "out").stdout

    other = run("eval", "--model", "MODEL?width=4", "--data", "DATA", "--checkpoint", "out", code=1)
    assert "layer 0: weight shape must be" in other.stderr
    (tmp_path / "out" / "qk.json").write_text("{")
    for words in (["inspect", "out"], ["eval", "--model", "MODEL", "--data", "DATA", "--checkpoint", "out"]):
        assert "qk.json must be JSON" in run(*words, code=1).stderr


def test_quantize_shows_a_table_and_where_things_are(run, tmp_path):
    shown = run("quantize", "--model", "MODEL", "--data", "DATA", "--out", "o", "--report", "r.json", *QUICK).stdout
    for word in ("size on disk", "latency p50, batch 1", "W4A8", "checkpoint: o", "report: r.json"):
        assert word in shown
    assert json.loads((tmp_path / "r.json").read_text())["layers"]


def test_search_writes_a_plan_that_quantize_takes(run, tmp_path):
    words = ["search", "--model", "MODEL", "--data", "DATA", "--widths", "2,8", "--table", "table.json"]
    found = json.loads(run(*words, "--out", "plan.json", "--budget", "size_share=0.97", "--json").stdout)
    assert found["layers"] == {"0": "W8A8", "3": "W2A8", "7": "W8A8"}
    assert qk.Plan.load(tmp_path / "plan.json")["3"].weights == 2
    shown = run(*words, "--out", "plan.json", "--budget", "latency_ms=1000", "--budget", "size_share=0.97").stdout
    for word in ("chosen", "all W8A8", "all W2A8", "chosen, measured", "plan: plan.json"):
        assert word in shown
    assert qk.LatencyTable.load(tmp_path / "table.json").times

    quantize = ["quantize", "--model", "MODEL", "--data", "DATA", "--out", "out", "--set", "method=nearest"]
    run(*quantize, "--plan", "plan.json", "--json")
    held = json.loads(run("inspect", "out", "--json").stdout)
    assert [x["width"] for x in held["layers"]] == ["W8A8", "W2A8", "W8A8"]


def test_search_keeps_sensitivities_and_shares_their_work(run, tmp_path):
    words = [
        "search",
        "--model",
        "python:cli_model:make",
        "--data",
        "python:cli_model:data",
        "--widths",
        "2,8",
        "--out",
    ]
    words += ["plan.json", "--budget", "size_share=0.97", "--folder", "kept", "--json"]
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-m", "qk.cli", *words, "--processes", "3"]  # in processes of their own
    shared = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, cwd=tmp_path, capture_output=True)
    assert shared.returncode == 0, shared.stderr
    assert b"ended with an error" not in shared.stderr
    assert (tmp_path / "kept" / "fisher-0.json").exists()
    assert json.loads(shared.stdout) == json.loads(run(*words).stdout)
    assert "beside --folder and --budget" in run(*words[:-3], "--processes", "2", code=1).stderr


def test_hago_writes_a_strategy_and_the_network(run, tmp_path):
    words = ["hago", "--model", "MODEL", "--data", "DATA", "--hardware", "arm_neon_dotprod", "--out", "s.json"]
    found = json.loads(run(*words, "--export", "net.pt2", "--json").stdout)
    assert found["trials"] > 1
    assert found["bits"] == json.loads((tmp_path / "s.json").read_text())["bits"]
    assert torch.export.load(tmp_path / "net.pt2").graph_signature.user_inputs
    shown = run(*words, "--tuner", "default").stdout
    for word in ("int8", "1 trials", "accuracy: float", "strategy: s.json"):
        assert word in shown
    assert "one of arm_neon_dotprod" in run(*words[:5], "--hardware", "phone", "--out", "s.json", code=1).stderr


def test_a_curve_writes_a_page_and_plans(run, tmp_path):
    words = ["search", "--model", "MODEL", "--data", "DATA", "--widths", "2,8", "--out", "curve", "--pareto", "3"]
    found = json.loads(run(*words, "--cost", "size_mb", "--set", "method=nearest", "--json").stdout)
    assert found["judged"] == "accuracy"
    assert {p["name"] for p in found["points"]} >= {"all W8A8", "all W2A8"}
    assert (tmp_path / "curve" / "curve.html").exists()
    shown = run(*words, "--cost", "size_mb", "--set", "method=nearest", "--table", "table.json").stdout
    assert (tmp_path / "table.json").exists()
    for word in ("all W8A8", "accuracy, %", "float", "plans and the page: curve"):
        assert word in shown
    qk.Plan.load(tmp_path / "curve" / "plans" / "all_W2A8.json")


def test_lose_finds_the_cheapest_plan_that_keeps_the_accuracy(run, tmp_path):
    words = ["search", "--model", "MODEL", "--data", "DATA", "--widths", "2,8", "--out", "first", "--lose", "0.5"]
    words += ["--cost", "size_mb", "--set", "method=nearest"]
    found = json.loads(run(*words, "--json").stdout)
    assert found["chosen"] in {point["name"] for point in found["points"]}
    assert found["why"].keys() == {"0", "3", "7"}
    assert qk.Plan.load(tmp_path / "first" / "plan.json")["0"].weights == 8
    shown = run(*words).stdout
    for word in ("why", "accuracy, %", "plans and the page: first"):
        assert word in shown
    unlabelled = [*words[:4], "python:cli_model:unlabelled", *words[5:]]
    assert "--data must be labelled with --lose" in run(*unlabelled, code=1).stderr


def test_a_table_of_another_machine_is_measured_there_and_used_here(run, tmp_path):
    measured = ["bench", "table", "MODEL", "--widths", "4,8", "--out", "table.json"]
    threads = torch.get_num_threads()
    run(*measured[:-1], "two.json", "--shape", "1,1,8,8", "--threads", str(threads + 1))
    assert json.loads((tmp_path / "two.json").read_text())["machine"]["threads"] == threads + 1
    assert torch.get_num_threads() == threads
    shown = run(*measured, "--shape", "1,1,8,8").stdout
    for word in ("W8A8", "W4A8", "everything else", "wrote table.json"):
        assert word in shown
    path = tmp_path / "table.json"
    held = json.loads(path.read_text())
    held["machine"]["cpu"] = "another"
    path.write_text(json.dumps(held))
    before = path.read_bytes()
    search = ["search", "--model", "MODEL", "--data", "DATA", "--widths", "4,8", "--out", "p.json", "--json"]
    search += ["--budget", "latency_ms=1000", "--table", "table.json"]
    assert "a table of this machine" in run(*search, code=1).stderr
    found = json.loads(run(*search, "--foreign").stdout)
    assert found["measured_ms"] is None
    assert path.read_bytes() == before
    assert "--foreign must be beside --table" in run(*search[:-2], "--foreign", code=1).stderr
    assert "given by --shape or --data, got neither" in run(*measured, code=1).stderr
    assert "positive numbers with commas" in run(*measured[:-1], "new.json", "--shape", "2,x", code=1).stderr


def test_a_budget_below_the_least_names_the_least(run):
    words = ["search", "--model", "MODEL", "--data", "DATA", "--out", "p", "--budget", "size_mb=0.001"]
    assert "limits must be at least 0.00" in run(*words, code=1).stderr


def test_lapq_searches_by_labels_where_they_are_asked_for(run):
    words = ["quantize", "--model", "MODEL", "--out", "o", "--set", "method=nearest", "--set", "ranges=lapq", "--json"]
    notes = []
    for data, more in (("DATA", []), ("python:cli_model:with_labels", ["--labels"])):
        report = json.loads(run(*words, "--data", data, *more).stdout)
        notes.append(next(note for note in report["notes"] if note.startswith("LAPQ: p = ")))
    assert notes[0] != notes[1]  # other losses: divergence, and cross entropy
    assert "--labels must be left out" in run(*words, "--data", "DATA", "--labels", code=1).stderr
    refused = [*words[:5], "--data", "python:cli_model:with_labels", "--labels", *QUICK]
    assert "only ranges 'lapq' look at them" in run(*refused, code=1).stderr


def test_tune_keeps_the_epoch_that_other_data_choose(run):
    words = ["tune", "--model", "MODEL", "--data", "python:cli_model:with_training", "--out", "o", "--json"]
    words += ["--set", "tuning.epochs=9", "--set", "tuning.patience=1", "--set", "tuning.lr=1e-6"]
    report = json.loads(run(*words, "--validate", "DATA").stdout)
    assert len(report["losses"][""]) < 9  # such a rate betters nothing
    assert (
        "--validate must be data with labels" in run(*words, "--validate", "python:cli_model:unlabelled", code=1).stderr
    )


def test_tune_trains_saves_and_reports(run, tmp_path):
    words = ["tune", "--model", "MODEL", "--data", "python:cli_model:with_training", "--out", "out"]
    made = run(*words, "--set", "weights=3", "--set", "tuning.epochs=2", "--set", "tuning.lr=0.02", "--json")
    report = json.loads(made.stdout)
    assert report["recipe"]["method"] == "lsq"
    assert report["recipe"]["tuning"]["lr"] == 0.02
    assert report["seconds"]["tune"] > 0
    assert len(report["losses"][""]) == 2
    assert (tmp_path / "out" / "report.html").exists()
    measured = json.loads(run("eval", "--model", "MODEL", "--data", "DATA", "--checkpoint", "out", "--json").stdout)
    assert measured["accuracy"] == report["accuracy"]["integer"]
    assert [x["width"] for x in json.loads(run("inspect", "out", "--json").stdout)["layers"]] == [
        "W8A8",
        "W3A8",
        "W8A8",
    ]


def test_a_recipe_comes_from_a_file_and_from_set(run, tmp_path):
    (tmp_path / "r.yaml").write_text("weights: 2\nmethod: nearest\n")
    words = ["inspect", "MODEL", "--shape", "2,1,8,8", "--recipe", "r.yaml", "--json"]
    widths = [x["width"] for x in json.loads(run(*words).stdout)["layers"]]
    assert widths == ["W8A8", "W2A8", "W8A8"]
    changed = run(*words, "--set", "overrides.3.weights=4", "--set", "overrides.3.activations=4", "--set", "skip=['7']")
    assert [x["width"] for x in json.loads(changed.stdout)["layers"]] == ["W8A8", "W4A4", "float"]


def test_inspect_names_folds(run):
    shown = run("inspect", "MODEL?width=4", "--data", "DATA").stdout
    assert "4x1x3x3" in shown
    assert "folded into" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eval", "--model", "nothing", "--data", "DATA"], "source must be torchvision:NAME"),
        (["eval", "--model", "torchvision:resnet", "--data", "DATA"], "list_models"),
        (["eval", "--model", "python:cli_model:missing", "--data", "DATA"], "a module and a function"),
        (["eval", "--model", "python:cli_model:data", "--data", "DATA"], "returns an nn.Module"),
        (["eval", "--model", "hf:nowhere", "--data", "DATA"], "config.json"),
        (["eval", "--model", "MODEL", "--data", "nothing"], "source must be digits"),
        (["eval", "--model", "MODEL", "--data", "python:cli_model:wrong"], "calibration batches in a list"),
        (["eval", "--model", "MODEL", "--data", "python:cli_model:unlabelled"], "must be data with labels"),
        (["eval", "--model", "MODEL", "--data", "imagefolder:nowhere"], "class folders"),
        (["eval", "--model", "MODEL", "--data", "imagefolder:."], "no images"),
        (["eval", "--model", "MODEL", "--data", "imagefolder:"], "a folder of class folders"),
        (["eval", "--model", "MODEL", "--data", "imagefolder:.?size=-4"], "size of imagefolder must be a whole number"),
        (["eval", "--model", "MODEL", "--data", "imagefolder:.?size=32.5"], "at least 1, got 32.5"),
        (["eval", "--model", "MODEL", "--data", "imagefolder:.?size=[3"], "must be name=value, joined by &"),
        (
            ["search", "--model", "MODEL", "--data", "DATA", "--out", ".", "--budget", "size_mb=1"],
            "a file, got a folder",
        ),
        (["quantize", "--model", "MODEL", "--data", "DATA", "--out", "o", "--report", "."], "a file, got a folder"),
        (["eval", "--model", "MODEL", "--data", "DATA", "--weights", "none.pt"], "weights: none.pt must be a file"),
        (["eval", "--model", "MODEL", "--data", "DATA", "--weights", "cli_model.py"], "torch file of tensors"),
        (["eval", "--model", "MODEL", "--data", "DATA", "--checkpoint", "."], "qk.json"),
        (["inspect", "."], "qk.json"),
        (["inspect", "nowhere"], "the target must be a checkpoint's folder, or a model"),
        (["inspect", "MODEL"], "--data or --shape"),
        (["inspect", "MODEL", "--shape", "1,a"], "positive numbers with commas"),
        (["quantize", "--model", "MODEL", "--data", "DATA", "--out", "o", "--set", "bits=4"], "bits"),
        (["quantize", "--model", "MODEL", "--data", "DATA", "--out", "o", "--set", "weights=5"], "weights"),
        (["quantize", "--model", "MODEL", "--data", "DATA", "--out", "o", "--set", "weights"], "FIELD=VALUE"),
        (["quantize", "--model", "MODEL", "--data", "DATA", "--out", "o", "--set", "overrides.3=8"], "PATTERN.FIELD"),
        (["eval", "--model", "MODEL?depth=3", "--data", "DATA"], "arguments that it takes"),
        (["quantize", "--model", "MODEL", "--data", "DATA", "--out", "o", "--recipe", "no.yaml"], "no.yaml"),
        (["quantize", "--model", "MODEL", "--data", "DATA", "--out", "cli_model.py"], "a folder that can be written"),
        (
            ["quantize", "--model", "MODEL", "--data", "DATA", "--out", "o", "--report", "cli_model.py/r.html"],
            "a folder that can be written",
        ),
        (["demo", "--out", "cli_model.py"], "a folder that can be written"),
        (["tune", "--model", "MODEL", "--data", "DATA", "--out", "o"], "data with labels to train on"),
        (["search", "--model", "MODEL", "--data", "DATA", "--out", "p", "--budget", "size_mb"], "FIELD=NUMBER"),
        (
            ["search", "--model", "MODEL", "--data", "DATA", "--out", "p"],
            "--pareto and --lose, got none",
        ),
        (["search", "--model", "MODEL", "--data", "DATA", "--out", "p", "--budget", "megabytes=3"], "megabytes"),
        (
            ["search", "--model", "MODEL", "--data", "DATA", "--out", "p", "--budget", "size_mb=1", "--widths", "two"],
            "--widths must be widths in bits",
        ),
        (
            ["quantize", "--model", "MODEL", "--data", "DATA", "--out", "o", "--plan", "none.json"],
            "none.json must be a JSON file with a plan",
        ),
        (
            ["tune", "--model", "MODEL", "--data", "DATA", "--out", "o", "--set", "tuning.epochs=0"],
            "tuning.epochs must",
        ),
        (["tune", "--model", "MODEL", "--data", "DATA", "--out", "o", "--set", "tuning.rate=1"], "rate"),
        (
            ["tune", "--model", "MODEL", "--data", "DATA", "--out", "o", "--set", "method=brecq"],
            "--set method must be lsq, or left out, got brecq",
        ),
    ],
)
def test_bad_input_is_one_plain_line(run, words, message):
    if "torchvision:resnet" in words and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    result = run(*words, code=1)
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_labels_among_the_calibration_data_are_named(run):
    result = run("quantize", "--model", "MODEL", "--data", "python:cli_model:labelled", "--out", "o", code=1)
    assert "error: qk.prepare: example must be input that the model accepts" in result.stderr
    assert "The second looks like labels: pass inputs only" in result.stderr


def test_debug_shows_where_an_error_came_from(run):
    result = run("--debug", "inspect", "MODEL", code=1)
    assert isinstance(result.exception, qk.QkError)


def test_weights_of_another_model_are_named(run, tmp_path):
    torch.save(nn.Linear(3, 4).state_dict(), tmp_path / "w.pt")
    result = run("eval", "--model", "MODEL", "--data", "DATA", "--weights", "w.pt", code=1)
    assert "Missing key" in result.stderr


def test_weights_are_loaded_from_both_kinds_of_file(run, tmp_path):
    from safetensors.torch import save_file

    from qk.sources import load_model

    state = {name: torch.full_like(t, 2) for name, t in load_model("python:cli_model:make").state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    save_file(state, tmp_path / "w.safetensors")
    for file in ("w.pt", "w.safetensors"):
        assert load_model("python:cli_model:make", file)[0].weight.unique().tolist() == [2.0]


def test_a_pickled_object_is_not_executed(run, tmp_path):
    torch.save({"a": nn.Linear(2, 2)}, tmp_path / "w.pt")
    result = run("eval", "--model", "MODEL", "--data", "DATA", "--weights", "w.pt", code=1)
    assert "torch file of tensors" in result.stderr


def test_doctor_finds_the_kernels_equal_to_their_definitions(run):
    assert "all checks passed" in run("doctor").stdout
    facts = json.loads(run("doctor", "--json").stdout)
    assert set(facts["checks"].values()) == {"equal"}
    assert set(facts["checks"]) == set(qk.usable_isas())


def test_doctor_fails_when_a_kernel_differs(run, monkeypatch):
    from qk import doctor

    monkeypatch.setattr(doctor, "_check", lambda isa: "differs")
    assert "a check failed" in run("doctor", code=1).stdout
