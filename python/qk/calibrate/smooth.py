"""Smoothing: channels of large activations are divided, and the weights that read them multiplied.

Source: Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models (2023),
section 4; the search for alpha is as in Lin et al., AWQ (2024), section 3.2. Differences are in docs/methods/smooth.md.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qk.calibrate import ranges as find
from qk.calibrate.batches import call, hold, unpadded
from qk.errors import fail
from qk.inputs import device_of, evaluating
from qk.ops import dequantize, quantize
from qk.prepare.insert import ActQuantizer, QuantLayer, to_kernel_order
from qk.prepare.paths import channel_axis
from qk.prepare.prepared import Path, Prepared
from qk.prepare.rows import RowQuantizer
from qk.prepare.scaling import Scaled, divide_inputs, read_ranges, scale, times_input, usable_paths, within_clip

STAGE = "qk.smooth"
SEARCHED = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
Quantizer = ActQuantizer | RowQuantizer
SILENT = 1e-3  # of the mean power of all channels is added to that of one, so that those of nothing do not decide
SAMPLE = 2**18  # values of an input that the search looks at: 1 MiB


def smooth_factor(inputs: Tensor, read: Tensor, alpha: float) -> Tensor:
    """s = max |X|^alpha / max |W|^(1 - alpha) for each channel, [C]; 1 where a range is 0."""
    return torch.where((inputs > 0) & (read > 0), inputs.pow(alpha) / read.pow(1 - alpha), 1.0)


def output_error(layer: QuantLayer, x: Tensor, factor: Tensor) -> float:
    """|quantized(W s) quantized(x / s) - W x|^2 / |W x|^2 of an output channel, on average over channels, as what reads
    a small one may multiply it with large weights. With the widths of the layer and ranges by mse.

    x: an input of the layer; factor: s, [C], float32.
    """

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight) if layer.conv_args is None else F.conv2d(x, weight, **layer.conv_args)

    assert layer.spec.weights is not None
    x_scaled = x / factor.reshape(-1, *[1] * (layer.weight.dim() - 2))
    if layer.spec.dynamic:
        x_rounded = layer.input(x_scaled)
    else:
        x_rounded = _rounded(x_scaled.reshape(1, -1), layer.input.bits).reshape(x.shape)
    rows = to_kernel_order(times_input(layer, factor)).reshape(layer.weight_rows().shape)
    rows = _rounded(rows, layer.spec.weights, layer.spec.weight_symmetric)
    weight = rows.reshape(to_kernel_order(layer.weight).shape)
    weight = weight.permute(0, 3, 1, 2) if weight.dim() == 4 else weight
    expected = product(x, layer.weight.detach())
    change = product(x_rounded, weight) - expected
    lost, power = (_by_channel(layer, y).square().mean(1) for y in (change, expected))
    return float((lost / (power + SILENT * power.mean()).clamp(min=1e-30)).mean())


def _rounded(rows: Tensor, bits: int, symmetric: bool = False) -> Tensor:
    step, zero = find.mse(rows, bits, symmetric)
    return dequantize(quantize(rows, step, zero, bits), step, zero)


@torch.no_grad()
def smooth(
    p: Prepared,
    batches: Iterable,
    alpha: float | str = "search",
    max_batches: int | None = None,
    memory_mb: int = 1024,
) -> Scaled:
    """Moves the difficulty of activations into weights, in place: along p.paths, from a norm or a layer to its readers,
    and for Linear layers that no path leads to by dividing their input where they take it in.

    alpha: from 0, where activations keep most of their ranges, to 1, where they all become 1; "search": for each place
    the one with which its readers err least when quantized, on a sample of their inputs, or none. batches, max_batches,
    memory_mb: as for reconstruct; the float model runs once. In float p computes what it did, up to roundings. Returns
    what was scaled and, for everything else, why not. To be called after the plan is made and before qk.calibrate.
    Raises QkError, with p unchanged, for p that is calibrated, another alpha, and bad batches.
    """
    paths, skipped = usable_paths(p, STAGE, through_clips=True)
    if alpha != "search" and not (isinstance(alpha, int | float) and 0 <= alpha <= 1):
        raise fail(STAGE, "alpha", "from 0 to 1, or 'search'", repr(alpha))
    inputs = _inputs_without_path(p, paths, skipped)
    peaks, made, samples = _watch(p, [*paths, *inputs], hold(batches, STAGE, max_batches, memory_mb))
    done = {}
    for place in [*paths, *inputs]:
        peak, read = peaks[place.source], read_ranges(p, place)
        tried = {a: smooth_factor(peak, read, a) for a in (SEARCHED if alpha == "search" else (alpha,))}
        if place.clips:
            tried = {a: within_clip(factor, made[place.source]) for a, factor in tried.items()}
        chosen = _least_error(p, place, samples, tried) if alpha == "search" else alpha
        if chosen is None:
            skipped[place.source] = "its readers err less as it is"
            continue
        if place in paths:
            scale(p, place, tried[chosen])
        else:
            divide_inputs([p.quant_layers()[name] for name in place.readers], tried[chosen])
        done[f"{place.source} (alpha {chosen:g})"] = tuple(place.readers)
    return Scaled(done, skipped)


def _inputs_without_path(p: Prepared, paths: list[Path], skipped: dict[str, str]) -> list[Path]:
    """Inputs of Linear layers alone, as paths without a source; into `skipped` why other inputs are not."""
    reached = {name for path in paths for name in path.readers}
    sharing: dict[Quantizer, list[str]] = defaultdict(list)
    for name, layer in p.quant_layers().items():
        sharing[layer.input].append(name)
    found = []
    for names in sharing.values():
        layers = [p.quant_layers()[name] for name in names]
        source = f"the input of {', '.join(names)}"
        if reached & set(names):
            continue
        if any(layer.kind != "linear" for layer in layers):
            skipped[source] = "no path leads there, and to divide an image costs a pass over it"
        else:
            k = layers[0].weight.shape[1]
            found.append(Path(source, k, {name: torch.arange(k) for name in names}))
    return found


def _watch(
    p: Prepared, places: list[Path], batches: list
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[Quantizer, list[Tensor]]]:
    """By source, [C] in float64: max |x| of each channel where it is read, and max x where it is made if ReLU6 follows.
    And samples of the inputs of quantized readers."""
    device = device_of(p.model)
    peaks = {place.source: torch.zeros(place.channels, dtype=torch.float64, device=device) for place in places}
    made = {place.source: torch.zeros_like(peaks[place.source]) for place in places if place.clips}
    samples: dict[Quantizer, list[Tensor]] = defaultdict(list)
    quota = SAMPLE // len(batches)
    batch = None

    def sees(into: Tensor, channels: Tensor, first: bool) -> Callable:
        def see(layer: QuantLayer, args: tuple, kwargs: dict) -> None:
            x = unpadded(batch, args[0] if args else kwargs["input"])
            is_image = layer.weight.dim() == 4
            into.scatter_reduce_(0, channels.to(into.device), _by_channel(layer, x).abs().amax(1).double(), "amax")
            if first:
                rows = x if is_image else x.reshape(-1, x.shape[-1])
                count = max(1, quota // rows[0].numel())
                samples[layer.input].append(rows[:: max(1, len(rows) // count)][:count].clone())

        return see

    def makes(into: Tensor) -> Callable:
        def see(source: nn.Module, args: tuple, output: Tensor) -> None:
            into.copy_(into.maximum(_by_channel(source, unpadded(batch, output)).amax(1)))

        return see

    with ExitStack() as stack, evaluating(p.model), p.quantized(set()):
        for source, into in made.items():
            stack.callback(p.model.get_submodule(source).register_forward_hook(makes(into)).remove)
        known: set[Quantizer] = set()
        for place in places:
            for name, channels in place.readers.items():
                layer = p.model.get_submodule(name)
                first = isinstance(layer, QuantLayer) and layer.input not in known
                known |= {layer.input} if first else set()
                hook = sees(peaks[place.source], channels, first)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for index, batch in enumerate(batches):
            call(p, batch, index, STAGE)
    for source, peak in peaks.items():
        if not torch.isfinite(peak).all():
            raise fail(STAGE, f"what leaves {source}", "finite", "NaN or infinity", "Look for it in the batches.")
    return peaks, made, samples


def _by_channel(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer takes, or a layer or norm gives, as [C, values of the channel]."""
    return x.movedim(channel_axis(module), 0).flatten(1)


def _least_error(
    p: Prepared, place: Path, samples: dict[Quantizer, list[Tensor]], tried: dict[float, Tensor]
) -> float | None:
    """The alpha with which the readers err least together; None if they err less without."""
    layers = p.quant_layers()
    readers = [(layers[name], channels) for name, channels in place.readers.items() if name in layers]

    def error(factor: Tensor) -> float:
        return sum(
            output_error(layer, torch.cat(samples[layer.input]), factor[channels.to(factor.device)].float())
            for layer, channels in readers
        )

    errors = {None: error(torch.ones_like(next(iter(tried.values()))))} | {a: error(s) for a, s in tried.items()}
    return min(errors, key=errors.get)
