"""The digits network at five widths, each rounded to nearest and by BRECQ: accuracy, size and speed in one table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qk import flow, machine, tables
from qk.demo import digits
from qk.deploy import definition, file_bytes, unfused
from qk.files import replace_file, writable_folder
from qk.page import page
from qk.report import Latency, Report
from qk.sources import predictions
from qk.spec import Recipe
from qk.tables import Table

WIDTHS = ((8, 8), (4, 8), (4, 6), (4, 4), (2, 4))
METHODS = ("nearest", "brecq")
CALIBRATION = 1024  # images; none of them is held out
LATENCY_BATCHES = (1, 64)
RECIPE = {"iterations": 500, "batch_size": 32, "weight_lr": 3e-3, "act_lr": 1e-4}


@dataclass(frozen=True)
class Run:
    """One quantized network. not_definition, not_simulated: held-out images with another prediction than the integer
    model computed by the definitions in torch, and than the float simulation. fused: accuracy of the fused network;
    not_unfused: images on which it predicts something else than the same network run one operator after the other."""

    name: str
    method: str
    simulated: float
    integer: float
    fused: float
    not_definition: int
    not_simulated: int
    not_unfused: int
    size_bytes: int
    seconds: float
    latency: list[Latency]


@dataclass(frozen=True)
class Study:
    """What the demo measured. train_seconds: next to nothing where the network was in the cache."""

    seed: int
    float_accuracy: float
    float_bytes: int
    train_seconds: float
    held_out: int
    runs: list[Run]
    machine: dict[str, Any]
    report_path: Path

    def table(self) -> Table:
        """One row for each network; p50 and p99 of every batch size."""
        accuracy = tables.percent(self.float_accuracy)
        batches = [f"batch {n} p50/p99 ms" for n in LATENCY_BATCHES]
        headers = [
            "network",
            "rounding",
            "float %",
            "simulated %",
            "integer %",
            "fused %",
            "≠ definition",
            "≠ simulated",
            "≠ unfused",
            "on disk",
        ]
        rows: list[list[Any]] = [
            ["float", "", accuracy, None, None, None, None, None, None, tables.size(self.float_bytes)]
            + [self._float_times(i) for i in range(len(LATENCY_BATCHES))]
            + [f"{self.train_seconds:.1f} (training)" if self.train_seconds > 0.5 else "(trained before)"]
        ]
        for run in self.runs:
            rows.append(
                [run.name, run.method, accuracy]
                + [tables.percent(share) for share in (run.simulated, run.integer, run.fused)]
                + [run.not_definition, run.not_simulated, run.not_unfused, tables.size(run.size_bytes)]
                + [f"{tables.ms(t.fused_p50)}/{tables.ms(t.fused_p99)}" for t in run.latency]
                + [f"{run.seconds:.1f}"]
            )
        title = f"{self.held_out} held-out digits, seed {self.seed}"
        return Table(title, [*headers, *batches, "seconds"], rows)

    def _float_times(self, i: int) -> str | None:
        """The float network was timed beside every integer one: the middle one of its medians is shown."""
        timings = sorted((run.latency[i] for run in self.runs if len(run.latency) > i), key=lambda t: t.float_p50)
        if not timings:
            return None
        middle = timings[len(timings) // 2]
        return f"{tables.ms(middle.float_p50)}/{tables.ms(middle.float_p99)}"

    def verdict(self) -> str:
        """Whether the integer kernels kept their word, in a sentence."""
        wrong = sum(run.not_definition + run.not_unfused for run in self.runs)
        exact = "equal the definition on every image" if wrong == 0 else f"differ from the definition on {wrong} images"
        return (
            f"Integer and fused predictions {exact}. ≠ simulated counts images on which the float simulation says "
            "otherwise. Times are of the fused network."
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"report_path": str(self.report_path)}


def run(
    out: str | Path,
    *,
    cache: str | Path | None = None,
    seed: int = 0,
    iterations: int | None = None,
    widths: tuple[tuple[int, int], ...] = WIDTHS,
    training: digits.Training | None = None,
    say: Callable[[str], None] = print,
) -> Study:
    """Trains (or finds in `cache`) the network, quantizes it; checkpoints, report.html, study.json go to `out`."""
    out, data = writable_folder(out, "demo"), digits.load()
    start = time.perf_counter()
    network = digits.trained(training or digits.Training(seed=seed), cache)
    train_seconds = time.perf_counter() - start
    float_accuracy = _share(predictions(network, data.test), data)
    say(f"float network: {100 * float_accuracy:.2f} % of {len(data.test)} held-out digits ({train_seconds:.1f} s)")
    runs, reports = [], []
    for weights, activations in widths:
        for method in METHODS:
            fields = RECIPE | {"weights": weights, "activations": activations, "method": method, "seed": seed}
            recipe = Recipe(**(fields | ({"iterations": iterations} if iterations else {})))
            made, report = _one(network, data, recipe, out / f"w{weights}a{activations}-{method}")
            runs.append(made)
            reports.append(report)
            say(f"{made.name} {method}: {100 * made.integer:.2f} % in integers ({made.seconds:.1f} s)")
    path = out / "report.html"
    facts = machine.fingerprint()
    study = Study(seed, float_accuracy, file_bytes(network), train_seconds, len(data.test), runs, facts, path)
    replace_file(path, _page(study, reports).encode())
    replace_file(out / "study.json", json.dumps(study.to_dict(), indent=1).encode())
    return study


def _one(network: nn.Module, data: digits.Digits, recipe: Recipe, folder: Path) -> tuple[Run, Report]:
    batches = list(data.train[:CALIBRATION].split(64))
    result = flow.quantize(
        network,
        batches,
        recipe,
        evaluate=lambda m: _share(predictions(m, data.test), data),
        out=folder,
        latency_batches=LATENCY_BATCHES,
        progress=False,
        title="digits",
    )
    report = result.report
    with definition():
        defined = predictions(result.model, data.test)
    with result.prepared.quantized() as simulated:
        simulation = predictions(simulated, data.test)
    integer, fused = predictions(result.model, data.test), predictions(result.fused, data.test)
    by_operators = predictions(unfused(result.model, batches), data.test)
    seconds = sum(report.seconds.get(stage, 0) for stage in ("prepare", "calibrate", "reconstruct", "convert", "fuse"))
    made = Run(
        name=f"W{recipe.weights}A{recipe.activations}",
        method=recipe.method,
        simulated=report.accuracy["simulated"],
        integer=report.accuracy["integer"],
        fused=report.accuracy["fused"],
        not_definition=int((integer != defined).sum()),
        not_simulated=int((integer != simulation).sum()),
        not_unfused=int((fused != by_operators).sum()),
        size_bytes=report.size_bytes["integer"],
        seconds=seconds,
        latency=report.latency,
    )
    return made, report


def _share(predicted: torch.Tensor, data: digits.Digits) -> float:
    return (predicted == data.test_labels).float().mean().item()


def _page(study: Study, reports: list[Report]) -> str:
    """The table, then every network in a fold of its own; the one with the fewest bits is open."""
    parts = [study.table().html(), f"<p>{escape(study.verdict())}</p>"]
    for report in reports:
        is_open = " open" if report is reports[-1] else ""
        parts.append(f"<details{is_open}><summary>{escape(report.title)}</summary>{report.section()}</details>")
    return page("Handwritten digits, quantized", "".join(parts))
