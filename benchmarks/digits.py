"""The demo with three seeds: fills the tables of docs/results.md and README.md, and benchmarks/results/digits.json.

    python benchmarks/digits.py [--seeds 3] [--cache .cache] [--out build/digits]

One run makes everything between the marks; nothing there is typed by hand. The README shows the first seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, median

from pages import fill
from qk.demo import study
from qk.files import replace_file
from qk.tables import Table, percent, size

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "results" / "digits.json"


def averaged(studies: list[study.Study]) -> Table:
    """One row for each width and method: means over the seeds, with the lowest and highest of integer accuracy."""
    headers = ["network", "rounding", "simulated %", "integer %", "lowest to highest", "points from float"]
    headers += ["≠ definition", "≠ simulated", "on disk", "seconds"]
    floats = [s.float_accuracy for s in studies]
    ends = f"{percent(min(floats))} to {percent(max(floats))}"
    rows = [["float", "", percent(mean(floats)), "", ends, "", "", "", size(studies[0].float_bytes), ""]]
    for runs in zip(*(s.runs for s in studies), strict=True):
        integer = [run.integer for run in runs]
        row = [runs[0].name, runs[0].method, percent(mean(run.simulated for run in runs)), percent(mean(integer))]
        row += [f"{percent(min(integer))} to {percent(max(integer))}", f"{100 * (mean(integer) - mean(floats)):+.2f}"]
        row += [sum(run.not_definition for run in runs), sum(run.not_simulated for run in runs)]
        row += [size(round(mean(run.size_bytes for run in runs))), f"{mean(run.seconds for run in runs):.1f}"]
        rows.append(row)
    return Table("", headers, rows)


def latencies(studies: list[study.Study]) -> Table:
    """Medians over the seeds of p50 and p99; float and integer of one row alternated in one process."""
    headers = ["network", "rounding"]
    for n in study.LATENCY_BATCHES:
        headers += [f"batch {n}: float p50 (ms)", "integer p50", "float p99", "integer p99", "float / integer"]
    rows = []
    for runs in zip(*(s.runs for s in studies), strict=True):
        row = [runs[0].name, runs[0].method]
        for i in range(len(study.LATENCY_BATCHES)):
            timings = [run.latency[i] for run in runs]
            parts = {
                name: median(getattr(t, name) for t in timings)
                for name in ("float_p50", "integer_p50", "float_p99", "integer_p99")
            }
            row += [f"{v:.3f}" for v in parts.values()] + [f"{parts['float_p50'] / parts['integer_p50']:.2f}"]
        rows.append(row)
    return Table("", headers, rows)


def section(studies: list[study.Study]) -> str:
    facts = studies[0].machine
    seeds = ", ".join(str(s.seed) for s in studies)
    images = studies[0].held_out
    recipe = ", ".join(f"{name} {value}" for name, value in study.RECIPE.items())
    return f"""Seeds {seeds}; {images} held-out images; {study.CALIBRATION} training images for calibration; {recipe}.
Machine: {facts["cpu"]}, threads {facts["threads"]}, {facts["instruction set"]}, torch {facts["torch"]}.

{averaged(studies).markdown()}

"≠ definition" and "≠ simulated" are sums over the seeds: images on which the integer model's prediction differs from
that of the operators' definitions in torch, and from that of the float simulation of the same quantization.

{latencies(studies).markdown()}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "digits")
    options = parser.parse_args()
    studies = [study.run(options.out / str(s), cache=options.cache, seed=s) for s in range(options.seeds)]
    fill(ROOT / "docs" / "results.md", "digits", section(studies))
    fill(ROOT / "README.md", "demo", studies[0].table().markdown())
    replace_file(
        FIGURES, json.dumps([s.to_dict() | {"report_path": "report.html"} for s in studies], indent=1).encode()
    )
    print(averaged(studies).plain(), latencies(studies).plain(), sep="\n\n")


if __name__ == "__main__":
    main()
