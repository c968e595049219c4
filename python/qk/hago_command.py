"""qk hago: an integer network for a device that a file declares."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qk.errors import fail
from qk.files import check_writable, replacing
from qk.words import BatchSize, DataName, Json, Model, Weights, evaluation, print_json, show_table, speaker


def hago(
    model: Model,
    data: DataName,
    hardware: Annotated[str, typer.Option(help="A device: a name or a file of YAML or JSON.")],
    out: Annotated[Path, typer.Option(help="JSON file for the strategy, which qk.hago(strategy=...) takes.")],
    tuner: Annotated[str, typer.Option(help="greedy, random, annealing, exact, or default: the widest.")] = "greedy",
    limit: Annotated[float | None, typer.Option(help="Part of the cost at the widest that may be used.")] = None,
    lose: Annotated[float, typer.Option(help="For greedy: by how much the loss may exceed that of the widest.")] = 0.0,
    ranges: Annotated[str, typer.Option(help="mse, minmax or average.")] = "mse",
    trials: Annotated[int | None, typer.Option(min=1, help="Of the tuners random and annealing.")] = None,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    export: Annotated[
        Path | None, typer.Option(help="The integer network as a file of torch.export, for one batch of the data.")
    ] = None,
    weights: Weights = None,
    batch_size: BatchSize = 32,
    as_json: Json = False,
) -> None:
    """Which tensors are integer on a device, at how many bits: arm_neon_dotprod, float_only, int16_accumulator,
    nvidia_sm80, nvidia_sm89, nvidia_sm90, x86_avx2, x86_avx512_vnni, or one that a file declares."""
    import torch

    from qk import sources
    from qk.hago import hago as search
    from qk.hago.hardware import Hardware

    device = Hardware.load(hardware)
    for path in (out, export):
        if path is not None:
            check_writable(path, "hago")
    floating = sources.load_model(model, weights)
    loaded = sources.load_data(data, batch_size)
    batches = list(loaded.calibration)
    speaker(as_json)(f"searching bits of {model} on {data} for {device.name}")
    if export is not None and not isinstance(batches[0], torch.Tensor):
        raise fail("hago", "--export", "of a model that takes one tensor", type(batches[0]).__name__)
    options = {"tuner": tuner, "limit": limit, "lose": lose, "ranges": ranges, "trials": trials, "seed": seed}
    found = search(floating, batches, device, **options)
    path = found.strategy.save(out)
    judge = evaluation(loaded)
    accuracy = None if judge is None else {"float": judge(floating), "integer": judge(found.fused or found.model)}
    if export is not None:
        program = torch.export.export(found.model, (batches[0],))
        with replacing(export) as file:
            torch.export.save(program, file)
    strategy = found.strategy
    if as_json:
        facts = {"strategy": str(path), "loss": strategy.loss, "cost": strategy.cost, "unit": strategy.unit}
        print_json(facts | {"accuracy": accuracy, "bits": strategy.bits, "trials": len(found.history)})
        return
    show_table(found.table())
    typer.echo(f"\n{len(found.history)} trials, loss {strategy.loss:.4g}, cost {strategy.cost:.4g} {strategy.unit}")
    if accuracy is not None:
        typer.echo(f"accuracy: float {100 * accuracy['float']:.2f} %, integer {100 * accuracy['integer']:.2f} %")
    typer.echo(f"strategy: {path}")
