"""docs/gpu.md says what the files say, and calls nothing verified that no GPU ran."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gpu_page")


def test_the_page_is_that_of_the_files(page):
    text = page.PAGE.read_text()
    assert page.kernels(page.runs()) in text, "PYTHONPATH=python:benchmarks python -m gpu_page"
    assert all(page.measured(run) in text for run in page.runs())


def run(failed, status=0, cc="9.0"):
    return {"machine": {"gpu": "Some GPU", "cc": cc}, "check": {"status": status, "failed": failed}}


def test_a_kernel_is_verified_where_the_tests_of_all_its_operators_passed(page):
    assert page.verified("lsq", []) == "unverified"
    assert page.verified("lsq", [run(["gemm"], 1), run(["gemm"], 1)]) == "Some GPU"
    assert page.verified("convolve", [run(["gemm"], 1)]) == "unverified"
    cut_short, never_begun = run([], 124), {"machine": {"gpu": "Another", "cc": "9.0"}}
    assert page.verified("lsq", [cut_short, never_begun]) == "unverified"


def test_kernels_of_one_architecture_are_verified_there_alone(page):
    assert page.verified("warp_groups", [run([])]) == "Some GPU"
    assert page.verified("warp_groups", [run([], cc="12.0")]) == "unverified"
    assert page.verified("first_layer", [run(["gemm"], 1, cc="12.0")]) == "Some GPU"
