"""The digits demo, with a network and a number of iterations that take seconds."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("sklearn")

from qk.demo import digits, study

TINY = digits.Training(widths=(8, 8), epochs=2)


def test_the_split_is_fixed_and_disjoint():
    a, b = digits.load(), digits.load()
    assert torch.equal(a.test, b.test)
    assert len(a.train) + len(a.test) == 1797
    seen = {tuple(image.flatten().tolist()) for image in a.train}
    assert not any(tuple(image.flatten().tolist()) in seen for image in a.test)
    assert a.test_labels.bincount().min() > 30


def test_the_cache_gives_the_same_network_back_and_bad_files_are_trained_anew(tmp_path):
    first = digits.trained(TINY, tmp_path).state_dict()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for broken in (content[:-7], b"", content.replace(b'"seed', b'"sead')):
        path.write_bytes(broken)
        again = digits.trained(TINY, tmp_path).state_dict()
        assert all(torch.equal(t, again[name]) for name, t in first.items())
        assert path.read_bytes() == content


def test_training_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    digits.trained(TINY, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_the_study_measures_every_width_and_method(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "LATENCY_BATCHES", (1,))
    lines = []
    made = study.run(
        tmp_path / "out", cache=tmp_path, iterations=3, widths=((8, 8), (2, 4)), training=TINY, say=lines.append
    )
    assert [(run.name, run.method) for run in made.runs] == [
        ("W8A8", "nearest"), ("W8A8", "brecq"), ("W2A4", "nearest"), ("W2A4", "brecq"),
    ]  # fmt: skip
    assert all(run.not_definition == run.not_unfused == 0 for run in made.runs)
    assert made.runs[0].integer == pytest.approx(made.float_accuracy, abs=0.02)
    assert made.runs[-1].size_bytes < made.runs[0].size_bytes < made.float_bytes
    assert len(lines) == 5
    assert len(made.table().rows) == 5
    assert made.report_path.read_text().count("<details") > 4
    assert json.loads((tmp_path / "out" / "study.json").read_text())["runs"][0]["name"] == "W8A8"


@pytest.mark.slow
def test_four_bits_cost_half_a_point_and_two_bits_two(tmp_path):
    made = study.run(tmp_path / "out", cache=tmp_path, widths=((4, 4), (2, 4)))
    assert made.float_accuracy >= 0.985
    lost = {run.name: made.float_accuracy - run.integer for run in made.runs if run.method == "brecq"}
    assert lost["W4A4"] <= 0.005 + 1e-6
    assert lost["W2A4"] <= 0.02 + 1e-6
