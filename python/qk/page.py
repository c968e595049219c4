"""The report's HTML: one file, no network; light and dark; pictures as inline SVG."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from math import inf, isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qk.report import LayerReport, Report

INK = "#010203"  # what matplotlib draws text and axes with; becomes the page's text colour
BEFORE, AFTER = "#94a3b8", "#3b82f6"
LINES = ["#3b82f6", "#f59e0b", "#10b981", "#ef4444", "#8b5cf6", "#14b8a6", "#ec4899", "#84cc16"]

STYLE = """
:root{color-scheme:light dark;--ink:#0f172a;--soft:#64748b;--line:#e2e8f0;--paper:#fff;--card:#f8fafc}
@media(prefers-color-scheme:dark){:root{--ink:#e2e8f0;--soft:#94a3b8;--line:#334155;--paper:#0f172a;--card:#1e293b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:1.25rem;background:var(--paper);color:var(--ink);
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.5rem;line-height:1.25;margin:.25rem 0 1rem}
h2{font-size:1.1rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:1rem 0 .25rem}
.wide{overflow-x:auto;border:1px solid var(--line);border-radius:8px;margin:.5rem 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.875rem}
th,td{text-align:left;padding:.35rem .7rem;border-bottom:1px solid var(--line);white-space:nowrap}
tr:last-child td{border-bottom:0}th{background:var(--card);color:var(--soft);font-weight:600}
.n{text-align:right}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:1rem;margin:1rem 0}
figure{margin:0;padding:.75rem;background:var(--card);border:1px solid var(--line);border-radius:8px}
figcaption{font-weight:600;margin-bottom:.25rem}
figure svg{width:100%;height:auto;display:block;color:var(--ink)}
details{margin:.5rem 0}summary{cursor:pointer;padding:.3rem 0;font-weight:600}
td:last-child:not(.n){white-space:normal}p{color:var(--soft)}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document; body is HTML already."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )


def figures(report: Report) -> str:
    """The pictures that the report has figures for."""
    quantized = [x for x in report.layers if x.weights is not None]
    wanted: list[tuple[str, bool, Callable[[Any], None]]] = [
        ("Error per layer: SQNR in dB, more is better", any(x.sqnr_db is not None for x in quantized),
         lambda axes: _bars(axes, quantized, "dB", ("SQNR", AFTER, lambda x: x.sqnr_db))),
        ("Bits per layer", bool(quantized),
         lambda axes: _bars(axes, report.layers, "bits", ("weights", AFTER, lambda x: x.weights or 32),
                            ("activations", "#10b981", lambda x: x.activations or 32))),
        ("Size of each weight, before and after", any(x.integer_bytes for x in quantized),
         lambda axes: _bars(axes, report.layers, "kB", ("float", BEFORE, lambda x: _kb(x.float_bytes)),
                            ("quantized", AFTER, lambda x: _kb(x.integer_bytes)))),
        ("Time of each layer, before and after", any(x.integer_ms for x in quantized),
         lambda axes: _bars(axes, report.layers, "ms", ("float", BEFORE, lambda x: x.float_ms),
                            ("quantized", AFTER, lambda x: x.integer_ms))),
        ("Reconstruction loss of each unit", any(report.losses.values()), lambda axes: _curves(axes, report.losses)),
    ]  # fmt: skip
    return drawing([(caption, draw) for caption, there, draw in wanted if there], len(report.layers))


def drawing(pictures: list[tuple[str, Callable[[Any], None]]], rows: int) -> str:
    """Captions and what draws on matplotlib's axes, as figures side by side; one line instead when it is not installed.

    rows: bars in each, for its height.
    """
    try:
        import matplotlib
    except ImportError:
        return "<p>No pictures: matplotlib is not installed (pip install qk-torch[report]).</p>"
    style = {
        "svg.fonttype": "none", "svg.hashsalt": "qk", "font.family": "sans-serif", "font.size": 9,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
        "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.5,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        drawn = [_figure(caption, rows, draw) for caption, draw in pictures]
    return f'<div class="grid">{"".join(drawn)}</div>' if drawn else ""


def _figure(caption: str, rows: int, draw: Callable[[Any], None]) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.8, max(2.2, 0.7 + 0.24 * rows)), layout="constrained")
    draw(figure.add_subplot())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"


Series = tuple[str, str, "Callable[[LayerReport], float | None]"]


def _bars(axes: Any, layers: list[LayerReport], unit: str, *series: Series) -> None:
    """Horizontal bars, first layer on top, one bar of each series per layer."""
    height = 0.8 / len(series)
    for i, (label, color, value) in enumerate(series):
        places = [row + (i - (len(series) - 1) / 2) * height for row in range(len(layers))]
        axes.barh(places, [_finite(value(x)) for x in layers], height, label=label, color=color)
    axes.set_yticks(range(len(layers)), [_short(x.name) for x in layers])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.set_xlabel(unit)
    axes.grid(axis="x", color=BEFORE, alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(series))


def _curves(axes: Any, losses: dict[str, list[dict[str, float]]]) -> None:
    for i, (unit, points) in enumerate(losses.items()):
        drawn = [p for p in points if p["loss"] is not None and 0 < p["loss"] < inf]  # the axis is logarithmic
        x, y = [p["iteration"] for p in drawn], [p["loss"] for p in drawn]
        dash = ("-", "--", ":")[i // len(LINES) % 3]
        axes.plot(x, y, label=_short(unit or "the model"), color=LINES[i % len(LINES)], linewidth=1.2, linestyle=dash)
    axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss")
    axes.grid(color=BEFORE, alpha=0.3, linewidth=0.5)
    if len(losses) <= 12:
        axes.legend(frameon=False, fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4)  # off the curves


def _finite(value: float | None) -> float:
    return value if value is not None and isfinite(value) else 0.0


def _kb(n: int | None) -> float | None:
    return None if n is None else n / 1000


def _short(name: str, limit: int = 26) -> str:
    return name if len(name) <= limit else "…" + name[1 - limit :]
