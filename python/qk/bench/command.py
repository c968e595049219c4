"""`qk bench`: kernels, model, peers, table, page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from qk.errors import QkError, fail
from qk.words import bits_of, shape_of, show_table

bench = typer.Typer(no_args_is_help=True, help="Times kernels and networks beside other runtimes on this machine.")

RESULT, PAGE = Path("benchmarks/results/performance.json"), Path("docs/performance.md")
LARGEST_BATCH = 1024

Threads = Annotated[str, typer.Option(help="Numbers of threads, such as 1,2.")]
Confine = Annotated[str, typer.Option(help="none, or vnni: no library may use AMX; or both: none,vnni.")]
Seconds = Annotated[float, typer.Option(min=1, help="For measuring, about; what does not fit is left out by name.")]
Only = Annotated[str, typer.Option(help="Rows whose name or kind contains this.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File for the figures.")]
MakePage = Annotated[bool, typer.Option("--page", help=f"Write {RESULT}, {PAGE} and its plot: from the repository.")]
Small = Annotated[bool, typer.Option(help="Tiny shapes: only to see that everything runs.")]
WithPeers = Annotated[bool, typer.Option("--peers/--no-peers", help="Other runtimes that are installed.")]
Cache = Annotated[Path | None, typer.Option(help="Folder for quantized networks (~/.cache/qk/bench).")]
Batch = Annotated[str, typer.Option(help="Batch sizes of networks, such as 1,8.")]
Widths = Annotated[str, typer.Option(help="Of the quantized networks, such as W8A8,W4A6.")]


@bench.command()
def kernels(
    threads: Threads = "1",
    confine: Confine = "none",
    seconds: Seconds = 120,
    only: Only = "",
    json_file: JsonFile = None,
    page: MakePage = False,
    small: Small = False,
) -> None:
    """Our operators at shapes of known networks, beside torch."""
    _run({"suite": "kernels", "only": only, "small": small}, threads, confine, seconds, json_file, page, None)


@bench.command()
def model(
    name: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME, hf:PATH, python:MODULE:FUNCTION, minilm.")],
    widths: Widths = "W8A8,W4A8",
    batch: Batch = "1",
    size: Annotated[
        int | None, typer.Option(min=1, help="Of a square image (224), or of a text in tokens (128).")
    ] = None,
    threads: Threads = "1",
    confine: Confine = "none",
    seconds: Seconds = 60,
    peers: WithPeers = True,
    json_file: JsonFile = None,
    cache: Cache = None,
) -> None:
    """A network, quantized by qk (as modules and fused), beside torch and the peers that are installed."""
    from qk.bench.networks import MINILM

    if name != MINILM and ":" not in name:
        expected = "torchvision:NAME, timm:NAME, hf:PATH, python:MODULE:FUNCTION or minilm"
        raise fail("bench model", "NAME", expected, repr(name))
    wanted = {"suite": "model", "networks": (name,), "peers": peers, "size": size}
    wanted |= {"widths": _widths(widths), "batches": _numbers("--batch", batch, LARGEST_BATCH)}
    _run(wanted, threads, confine, seconds, json_file, False, cache)


@bench.command()
def peers(
    threads: Threads = "1",
    confine: Confine = "none",
    seconds: Seconds = 900,
    only: Only = "",
    networks: Annotated[str, typer.Option(help="Networks as for qk bench model; the goals' four if not given.")] = "",
    widths: Widths = "W8A8,W4A8,W4A6",
    batch: Batch = "1,8",
    peers: WithPeers = True,
    json_file: JsonFile = None,
    page: MakePage = False,
    small: Small = False,
    cache: Cache = None,
) -> None:
    """Everything, beside every peer that is installed: kernels, networks, learning, the start of a network."""
    wanted = {"suite": "peers", "only": only, "small": small, "peers": peers}
    wanted |= {"widths": _widths(widths), "batches": _numbers("--batch", batch, LARGEST_BATCH)}
    if networks:
        wanted["networks"] = tuple(part.strip() for part in networks.split(","))
    _run(wanted, threads, confine, seconds, json_file, page, cache)


@bench.command()
def table(
    name: Annotated[str, typer.Argument(help="torchvision:NAME, timm:NAME, hf:PATH or python:MODULE:FUNCTION.")],
    out: Annotated[Path, typer.Option(help="JSON file; one that is there is added to.")],
    shape: Annotated[str | None, typer.Option(help="Of the model's input, with the batch: 1,3,224,224,")] = None,
    data: Annotated[str | None, typer.Option(help="or data to take a sample of, as for qk search.")] = None,
    widths: Annotated[str, typer.Option(help="Of weights.")] = "2,4,8",
    activations: Annotated[str, typer.Option(help="Widths of activations.")] = "8",
    threads: Annotated[int | None, typer.Option(min=1, help="Those of torch if not given.")] = None,
) -> None:
    """Latency of a network's layers at each pair of widths, here, for qk search --table elsewhere."""
    import torch

    from qk import sources
    from qk.files import check_writable
    from qk.inputs import tensors_in
    from qk.prepare import prepare
    from qk.search import LatencyTable, Search
    from qk.search.show import latency_table

    if (shape is None) == (data is None):
        raise fail("bench table", "the sample", "given by --shape or --data", "both" if shape else "neither")
    check_writable(out, "bench table")
    floating = sources.load_model(name, None)
    if shape:
        sample = torch.randn(shape_of("bench table", shape))
    else:
        sample = sources.load_data(data, 1).calibration[0]
    chosen = {"weights": bits_of("--widths", widths), "activations": bits_of("--activations", activations)}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        known = LatencyTable.load(out) if out.exists() else LatencyTable()  # with these threads
        batch = next(tensors_in(sample)).shape[0]
        search = Search(
            prepare(floating, sample), [sample], table=known, latency_batch=batch, ranges="minmax", **chosen
        )
        costs = search.costs("latency_ms")
    finally:
        torch.set_num_threads(before)
    known.save(out)
    show_table(latency_table(search.items, costs))
    typer.echo(f"\nwrote {out}")


@bench.command("page")
def make_page(
    results: Annotated[list[Path], typer.Argument(help="Files of --json; of the same rows the last file's count.")],
    out: Annotated[Path, typer.Option(help="The page; its plot lies beside it.")] = PAGE,
) -> None:
    """Writes docs/performance.md and its plot from figures that were measured before."""
    from qk.bench import page as pages

    merged = pages.merge([_read(path) for path in results])
    for path in pages.write(merged, out, str(results[-1])):
        typer.echo(f"wrote {path}")


def _run(
    wanted: dict[str, Any],
    threads: str,
    confine: str,
    seconds: float,
    json_file: Path | None,
    page: bool,
    cache: Path | None,
) -> None:
    from qk.bench import page as pages
    from qk.bench.confine import CONFINEMENTS
    from qk.bench.run import benchmark
    from qk.bench.suite import Wanted
    from qk.files import check_writable, replace_file, writable_folder

    counts = _numbers("--threads", threads, max(2, os.cpu_count() or 1))  # more wait for each other
    confinements = tuple(part.strip() for part in confine.split(","))
    if not set(confinements) <= set(CONFINEMENTS):
        raise fail("bench", "--confine", "none, vnni or none,vnni", repr(confine))
    if page and not PAGE.parent.is_dir():
        raise fail("bench", "--page", "used in the repository, where docs/ is", str(Path.cwd()))
    wanted["cache"] = str((cache or Path.home() / ".cache" / "qk" / "bench").absolute())
    writable_folder(wanted["cache"], "bench")
    files = sorted({path for path in (json_file, RESULT if page else None) if path is not None})
    for path in files:
        check_writable(path, "bench")

    def keep(result: dict[str, Any]) -> None:
        for path in files:
            replace_file(path, (json.dumps(result, indent=1) + "\n").encode())

    result = benchmark(Wanted(**wanted), counts, confinements, seconds, typer.echo, keep)
    keep(result)
    for path in files:
        typer.echo(f"wrote {path}")
    if page:
        for path in pages.write(result, PAGE, str(RESULT)):
            typer.echo(f"wrote {path}")
    if not any(row["entries"] for run in result["runs"] for row in run["rows"]):
        raise fail("bench", "--only" if wanted.get("only") else "the benchmark", "something to measure", "nothing")


def _numbers(option: str, text: str, most: int) -> tuple[int, ...]:
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or min(values) < 1 or max(values) > most:
        raise fail("bench", option, f"numbers from 1 to {most}, such as 1,2", repr(text))
    return values


def _widths(text: str) -> tuple[str, ...]:
    from qk.bench.networks import parse_widths

    return tuple(parse_widths(text))


def _read(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise fail("bench page", str(path), "a file of qk bench --json", str(error)) from error
    if not isinstance(result, dict) or not isinstance(result.get("runs"), list):
        raise QkError(f"bench page: {path} must be a file of qk bench --json, got other JSON.")
    return result
