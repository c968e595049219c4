"""docs/performance.md and its plot, from what `qk bench` measured."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qk.bench.goals import ANY, Standing, best, standings
from qk.files import replace_file
from qk.tables import Table, size
from qk.tables import ms as shown_ms

KINDS = {
    "gemm": "Linear layers",
    "conv2d": "Convolutions",
    "network": "Networks",
    "start": "Start",
    "embedding_bag": "Embedding bags",
    "elementwise": "Elementwise",
    "training": "Learning",
}
CONFINED = {"none": "the machine as it is", "vnni": "without AMX (AVX-512 VNNI)"}
INTRO = """# Performance

Written by `qk bench page` from `{source}`; measured by

    qk bench peers --threads 1,2 --confine none,vnni --page

in an environment with the extra `bench`, or by parts of it (`--only`) run later, which then count. Each row is one
piece of work; ours and the peers take turns in one process, every result is checked first (ours against its definition
bit for bit, a peer against float32), and what stands here is the median of a peer or of ours. A ratio is the peer's
time over ours: above 1 we are faster. Where several rows stand together, it is the geometric mean.

- **Codes in, codes out**: W8A8, W4A8 and so on take 8-bit codes of activations and give codes, as a layer inside an
  integer network does; so do the peers of width W8. Ours are integer networks of that one layer (the operator
  `network`), ONNX Runtime's and OpenVINO's are compiled models of it with their tensors bound beforehand. The peers'
  products with 4-bit and 2-bit weights take and give float32 and quantize activations on the way; "dynamic" is ours
  doing the same.
- **The limit** of a row is the longer of two times, both measured in the same run: its operations at the peak of 8-bit
  products on registers, and the bytes it must move at the bandwidth of reading as many bytes over and over. What
  needs less than that, Winograd's algorithm or sums in 16 bits, may exceed it.
- **Weights of 7 bits for the peers** where the processor has no VNNI: they add two products in 16 bits, saturate, and
  are wrong with 8. Ours are exact, and have all 8 ([decision 5](decisions/0005-products-on-avx2.md)).
- **Without AMX** all libraries of the process are denied the use of AMX's tiles.
- A peer whose result was wrong, or that failed, is not in the tables; the list at the end names it.
"""


def write(result: dict[str, Any], page: Path, source: str) -> list[Path]:
    """The page, and the plot beside it where matplotlib is installed; the files that were written."""
    page.parent.mkdir(parents=True, exist_ok=True)
    plot = page.with_name(f"{page.stem}-roofline.svg")
    drawn = draw(result, plot)
    replace_file(page, text(result, source, plot.name if drawn else None).encode())
    return [page, plot] if drawn else [page]


def text(result: dict[str, Any], source: str, plot: str | None = None) -> str:
    """The page as Markdown."""
    runs = result["runs"]
    parts = [INTRO.format(source=source), _machine(runs)]
    parts.append("## Goals\n")
    parts += [f"### {title(run)}\n\n{goal_table(run).markdown()}\n" for run in runs]
    if plot:
        parts.append(f"## Roofline\n\nOne thread; each point is a layer.\n\n![Roofline]({plot})\n")
    for kind, heading in KINDS.items():
        tables = [(title(run), kind_table(run, kind)) for run in runs]
        shown = [f"### {name}\n\n{table.markdown()}\n" for name, table in tables if table.rows]
        if shown:
            parts.append(f"## {heading}\n")
            parts += [part.replace("### ", f"### {heading}: ", 1) for part in shown]
    parts.append(_failures(runs))
    return "\n".join(parts).rstrip() + "\n"


def title(run: dict[str, Any]) -> str:
    """Of a run: its threads and what it was confined to."""
    return f"{run['threads']} thread{'s' * (run['threads'] > 1)}, {CONFINED[run['confine']]}"


def _machine(runs: list[dict[str, Any]]) -> str:
    """The fingerprint, versions, and limits of each run."""
    run = next((r for r in runs if "machine" in r), None)
    if run is None:
        return "No run came to an end.\n"
    facts = run["machine"]
    keys = ("cpu", "cpus", "torch", "compiler", "python", "system")
    lines = ["## Machine\n", ", ".join(f"{key} {facts[key]}" for key in keys if key in facts) + "."]
    lines.append("Peers: " + (", ".join(f"{k} {v}" for k, v in run["peers"].items()) or "none") + ".")
    lines += [f"Not installed: {name} ({why})." for name, why in run["missing"].items()]
    table = Table("", ["run", "instruction set", "peak of 8-bit products, GOP/s", "read bandwidth, GB/s"])
    for r in runs:
        if "limits" not in r:
            continue
        peaks = ", ".join(f"{isa} {value / 1e9:.0f}" for isa, value in r["limits"]["products"].items())
        reads = [(n, value) for n, value in r["limits"]["read"] if n in (2**15, 2**20, 2**24, 2**28)]
        reads = reads or r["limits"]["read"]
        read = ", ".join(f"{_binary(n)} {value / 1e9:.0f}" for n, value in reads)
        table.rows.append([title(r), r["machine"]["instruction set"], peaks, read])
    return "\n".join([*lines, "", table.markdown(), ""])


def goal_table(run: dict[str, Any]) -> Table:
    """Every goal: ours, the best of those it is held against, the limit, the ratio and whether it is met."""
    headers = ["work", "ours", "ms", "against", "ms", "limit, ms", "of the limit", "ratio", "lowest", "goal", "met"]
    table = Table("", headers)
    for goal, standing in standings(run):
        if standing is None:
            against = "the best peer" if goal.against == ANY else goal.against
            table.rows.append([goal.work, goal.ours, None, against, *[None] * 5, f"{goal.least:g}", "not measured"])
            continue
        s: Standing = standing
        rival = f"{goal.against}: {s.rival}" if goal.against in ("W8", "W4", "W2", "int8") else s.rival
        share = f"{100 * s.limit_ms / s.ms:.0f} %" if s.limit_ms else None
        figures = [shown_ms(s.rival_ms), shown_ms(s.limit_ms), share, f"{s.ratio:.2f}", f"{s.lowest:.2f}"]
        met = "yes" if s.met else "**no**"
        table.rows.append([goal.work, goal.ours, shown_ms(s.ms), rival, *figures, f"{goal.least:g}", met])
    return table


def kind_table(run: dict[str, Any], kind: str) -> Table:
    """Every row of a kind: the best of each family of ours, with its share of the limit, and of each of theirs."""
    rows = [row for row in run["rows"] if row["kind"] == kind and row["entries"]]
    mine = _families(rows, ours=True)
    theirs = _families(rows, ours=False)
    table = Table("", ["row", *(f"qk {f}, ms" for f in mine), *(f"best {f}, ms" for f in theirs), "best peer / ours"])
    for row in rows:
        cells: list[Any] = [row["name"].removeprefix(f"{kind} ")]
        for family in mine:
            entry = best(row, family, ours=True)
            share = f" {100 * entry['limit_ms'] / entry['ms'][1]:.0f} %" if entry and "limit_ms" in entry else ""
            name = " winograd" if entry and "winograd" in entry["name"] else ""
            cells.append(entry and f"{_spread(entry)}{share}{name}{_bytes(entry)}")
        for family in theirs:
            entry = best(row, family)
            cells.append(entry and f"{_spread(entry)} {entry['name']}")
        ours, peer = best(row, None, ours=True), best(row, None)
        cells.append(f"{peer['ms'][1] / ours['ms'][1]:.2f}" if ours and peer else None)
        table.rows.append(cells)
    return table


def _spread(entry: dict[str, Any]) -> str:
    """Median, 10 % and 90 %."""
    low, middle, high = (shown_ms(value) for value in entry["ms"])
    return f"{middle} ({low}-{high})"


def _families(rows: Iterable[dict[str, Any]], ours: bool) -> list[str]:
    return list(dict.fromkeys(e["family"] for row in rows for e in row["entries"] if e["ours"] == ours))


def _bytes(entry: dict[str, Any]) -> str:
    return f", {size(entry['packed'])} packed, {size(entry['prepacked'])} for the kernels" if "packed" in entry else ""


def _failures(runs: list[dict[str, Any]]) -> str:
    """What is not in the tables: of each candidate the first reason, and in how many more rows it is missing."""
    seen: dict[str, list[str]] = {}
    for run in runs:
        for row in run["rows"]:
            for name, why in row["failed"].items():
                seen.setdefault(name, []).append(f"{why} (in {row['name']}, {title(run)})")
        for line in run["failed"]:
            seen.setdefault("", []).append(f"{line} ({title(run)})")
    if not seen:
        return "## Left out\n\nNothing: every candidate ran and was right.\n"
    more = {what: f" and {len(places) - 1} more" if len(places) > 1 else "" for what, places in seen.items()}
    lines = [f"- {what + ': ' if what else ''}{places[0]}{more[what]}" for what, places in seen.items()]
    return "## Left out\n\n" + "\n".join(lines) + "\n"


def merge(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Several results as one: of rows with the same name, threads and confinement the last counts."""
    merged: dict[tuple[str, int], dict[str, Any]] = {}
    for run in (run for result in results for run in result["runs"]):
        key = (run["confine"], run["threads"])
        before = merged.get(key)
        if before is None:
            merged[key] = run
            continue
        rows = {row["name"]: row for row in before["rows"]} | {row["name"]: row for row in run["rows"]}
        merged[key] = before | run | {"rows": list(rows.values()), "failed": before["failed"] + run["failed"]}
    return results[-1] | {"runs": [merged[key] for key in sorted(merged)]}


def draw(result: dict[str, Any], path: Path) -> bool:
    """The roofline plot: speed over operations for each byte, ours and the best peers', under the measured roofs.

    False where matplotlib is not installed or nothing was measured.
    """
    runs = [run for run in result["runs"] if run["threads"] == 1 and run.get("limits") and _points(run)]
    try:
        import matplotlib
    except ImportError:
        return False
    if not runs:
        return False
    matplotlib.use("svg")
    from matplotlib import pyplot

    with pyplot.rc_context({"svg.hashsalt": "qk", "svg.fonttype": "none", "font.size": 9}):
        figure, axes = pyplot.subplots(1, len(runs), figsize=(6.2 * len(runs), 4.8), sharey=True, squeeze=False)
        for axis, run in zip(axes[0], runs, strict=True):
            _panel(axis, run)
        axes[0][0].set_ylabel("GOP/s")
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return True


COLOURS = {"W8": "#0b6e99", "W4": "#c2571a", "W2": "#5b8c2a"}
MARKERS = {"W8": "o", "W4": "s", "W2": "^"}


def _binary(n: int) -> str:
    return f"{n >> 20} MiB" if n >= 2**20 else f"{n >> 10} KiB"


def _points(run: dict[str, Any]) -> list[tuple[str, bool, float, float]]:
    """Weight width, whether ours, operations for each byte, GOP/s: the best of ours and of the peers for each width.

    A peer is put where ours of the same weight width is, for what it moves is not known.
    """
    points = []
    for row in run["rows"]:
        if not row["operations"]:
            continue
        for width in COLOURS:
            ours = best(row, f"{width}A8", ours=True)
            peer = best(row, width)
            for entry, mine in ((ours, True), (peer, False)):
                if entry and ours and ours["moved"]:
                    speed = row["operations"] / entry["ms"][1] / 1e6
                    points.append((width, mine, row["operations"] / ours["moved"], speed))
    return points


def _panel(axis: Any, run: dict[str, Any]) -> None:
    points = _points(run)
    low, high = min(p[2] for p in points) / 2, max(p[2] for p in points) * 2
    span = [low * (high / low) ** (i / 50) for i in range(51)]
    peak = max(run["limits"]["products"].values()) / 1e9
    for n, rate in run["limits"]["read"]:
        if n in (2**15, 2**20, 2**24, 2**28):
            line = [min(peak, x * rate / 1e9) for x in span]
            axis.plot(span, line, color="#999999", linewidth=0.8, zorder=1)
            axis.annotate(_binary(n), (span[0], line[0]), color="#666666", fontsize=7, va="bottom")
    for isa, value in run["limits"]["products"].items():
        axis.axhline(value / 1e9, color="#333333", linewidth=1, linestyle="--", zorder=1)
        axis.annotate(f"{isa}: {value / 1e9:.0f}", (span[-1], value / 1e9), fontsize=7, ha="right", va="bottom")
    for width, colour in COLOURS.items():
        for mine in (True, False):
            here = [(x, y) for w, m, x, y in points if w == width and m == mine]
            if here:
                face = colour if mine else "none"
                label = f"qk {width}A8" if mine else f"best peer, {width}"
                shape = {"s": 22, "marker": MARKERS[width], "facecolors": face, "edgecolors": colour}
                axis.scatter(*zip(*here, strict=True), label=label, zorder=2, **shape)
    axis.set(xscale="log", yscale="log", xlabel="operations for each byte moved", title=title(run))
    axis.legend(fontsize=7, loc="lower right")
