"""Layers with quantizers: what stands in the prepared model where a Conv2d or Linear stood.

Weights are kept in kernel order: [N, K] of a Linear, [N, kh, kw, C / groups] of a convolution (docs/format.md), so that
a group of K that shares a step is contiguous and codes need no shuffling when they are packed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from qk import ops
from qk.ops.lsq import grad_scale_for
from qk.options import Sparq
from qk.prepare import mid_rise
from qk.prepare.points import Tail, add_to_owners, last_of, with_last
from qk.prepare.product import product
from qk.prepare.rows import RowQuantizer
from qk.prepare.windows import fake_cut, repeated, spread, why_whole
from qk.spec import QuantSpec

# What is deployed of a layer beside its float bias and the input's step.
DEPLOYED = ("codes", "weight_step", "weight_zero", "tail_codes", "tail_step", "tail_owners", "corrected_bias")


def to_kernel_order(weight: Tensor) -> Tensor:
    """[N, C / groups, kh, kw] -> [N, kh, kw, C / groups]; [N, K] stays."""
    return weight.permute(0, 2, 3, 1).contiguous() if weight.dim() == 4 else weight.contiguous()


def from_kernel_order(weight: Tensor) -> Tensor:
    """The inverse, as a view: a convolution's weight comes back in channels_last."""
    return weight.permute(0, 3, 1, 2) if weight.dim() == 4 else weight


class ActQuantizer(nn.Module):
    """Fake-quantizes one tensor: one step and zero for all of it. Layers that read the same tensor share one.

    passes: gives its input back, while weights are learned with activations in float. mix: while learning drops values,
    a function of the input and the quantized input that gives what goes on.
    """

    zero: Tensor
    passes: bool = False
    mix: Callable[[Tensor, Tensor], Tensor] | None = None
    _known: tuple[Tensor, int, int] | None = None

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.step = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.register_buffer("zero", torch.zeros(1, dtype=torch.int32))
        self.calibrated = False

    def set_range(self, step: Tensor, zero: Tensor) -> None:
        """step, zero: one value each."""
        with torch.no_grad():
            self.step.copy_(step.reshape(1))
            self.zero.copy_(zero.reshape(1))
        self.calibrated = True

    @property
    def zero_point(self) -> int:
        """zero as a number, fetched where it has changed: each time would be a wait for a GPU."""
        zero = self.zero
        if zero.is_inference():  # it does not count its changes
            return int(zero)
        if self._known is None or self._known[0] is not zero or self._known[1] != zero._version:
            self._known = zero, zero._version, int(zero)
        return self._known[2]

    def forward(self, x: Tensor, cut: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """cut: what SPARQ makes of the input and the quantized input before they are mixed."""
        if self.passes:
            return x
        features = max(1, x.numel() // max(1, x.shape[0]))
        top = 2**self.bits - 1 - self.zero_point
        quantized = ops.lsq(x, self.step, self.zero, self.bits, grad_scale_for(features, max(1, top)))
        if cut is not None:
            x, quantized = cut(x, quantized)
        return quantized if self.mix is None else self.mix(x, quantized)


class QuantLayer(nn.Module):
    """A Conv2d or Linear with a quantizer in front and quantized weights.

    quantized False: the float layer. True: input through `input`, weights from `codes`, or, while rounding is learned,
    from `rounding`, which gives them in the layout of `weight`. `weight` and `bias` stay as they were; `codes` uint8 in
    kernel order, `weight_step` float32 and `weight_zero` int32 [N] or [N, groups along K] are what is deployed, with
    `corrected_bias` in place of `bias` where there is one (qk.calibrate.bias). `tail_codes`, `tail_step` and
    `tail_owners` are rows that are added to channels' first ones (qk.prepare.points); None: there are none.
    `input_scale` float32 [K]: what a Linear multiplies its input with before anything else, quantized or not, where
    smoothing gave it a share of the weights. `arrived`: an input that was quantized where the module of id `arrived_in`
    took it (qk.prepare.joins). `narrow`: what product rounds its factors to, while a unit is learned.
    """

    arrived: Tensor | None = None
    arrived_in: int = 0
    narrow: torch.dtype | None = None

    codes: Tensor | None
    weight_step: Tensor | None
    weight_zero: Tensor | None
    tail_codes: Tensor | None
    tail_step: Tensor | None
    tail_owners: Tensor | None
    corrected_bias: Tensor | None
    input_scale: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.Linear, spec: QuantSpec, quantizer: ActQuantizer | RowQuantizer) -> None:
        super().__init__()
        # What models ask of a layer (in_features, stride, ...) stays answered; private names and the mode are not.
        vars(self).update({k: v for k, v in vars(layer).items() if k[0] != "_" and k != "training"})
        self.weight, self.bias = layer.weight, layer.bias
        self.conv_args: dict | None = None
        if isinstance(layer, nn.Conv2d):
            self.conv_args = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
            self.conv_args["padding"] = padding_of(layer)
        self.spec = spec
        self.input = quantizer
        self.quantized = False
        self.rounding: Callable[[], Tensor] | None = None
        for name in (*DEPLOYED, "input_scale"):
            self.register_buffer(name, None)

    @property
    def kind(self) -> str:
        """As in Layer: linear or conv2d."""
        return "linear" if self.conv_args is None else "conv2d"

    @property
    def groups_along_k(self) -> int:
        """How many steps a row of the weight has."""
        k = self.weight[0].numel()
        return 1 if self.spec.group_size is None else k // self.spec.group_size

    def weight_rows(self) -> Tensor:
        """The float weight in kernel order as rows with one step each: [N * groups along K, -1]."""
        return to_kernel_order(self.weight.detach()).reshape(self.weight.shape[0] * self.groups_along_k, -1)

    def set_weight_range(self, step: Tensor, zero: Tensor) -> None:
        """step, zero: one for each of weight_rows. Codes become the nearest ones, the bias the float one."""
        shape = (self.weight.shape[0],) if self.groups_along_k == 1 else (self.weight.shape[0], self.groups_along_k)
        self.weight_step = step.reshape(shape).to(torch.float32)
        self.weight_zero = zero.reshape(shape).to(torch.int32)
        self.corrected_bias = self.tail_codes = self.tail_step = self.tail_owners = None
        assert self.spec.weights is not None
        weight = to_kernel_order(self.weight.detach())
        if self.spec.grid == "mid-rise":
            self.codes = mid_rise.codes_of(weight, self.weight_step, self.spec.weights)
        else:
            self.codes = ops.quantize(weight, self.weight_step, self.weight_zero, self.spec.weights)

    def set_weight_points(self, codes: Tensor, step: Tensor, tail: Tail | None) -> None:
        """codes: uint8 [N, K] of the first points; step: [N]. Zeros become the middle code, the bias the float one."""
        shape = to_kernel_order(self.weight).shape
        self.codes, self.weight_step = codes.reshape(shape), step.to(torch.float32)
        self.weight_zero = torch.full_like(self.weight_step, 2 ** (self.spec.weights - 1), dtype=torch.int32)
        self.corrected_bias = self.tail_codes = self.tail_step = self.tail_owners = None
        if tail is not None:
            self.tail_codes, self.tail_step = tail.codes.reshape(-1, *shape[1:]), tail.step.to(torch.float32)
            self.tail_owners = tail.owners

    @property
    def extra_rows(self) -> int:
        """Rows of the tail."""
        return 0 if self.tail_owners is None else len(self.tail_owners)

    @property
    def last_codes(self) -> Tensor:
        """`codes`, with those of the last point of channels that have several: what learned rounding may change."""
        return self.codes if self.tail_owners is None else last_of(self.codes, self.tail_codes, self.tail_owners)

    @last_codes.setter
    def last_codes(self, codes: Tensor) -> None:
        if self.tail_owners is None:
            self.codes = codes
        else:
            self.codes, self.tail_codes = with_last(self.codes, self.tail_codes, self.tail_owners, codes)

    @property
    def last_step(self) -> Tensor:
        """The step that goes with last_codes."""
        if self.tail_owners is None:
            return self.weight_step
        return last_of(self.weight_step, self.tail_step, self.tail_owners)

    def fixed_weight(self) -> Tensor | None:
        """What the points before each channel's last sum to, in the layout of `weight`; None without a tail."""
        if self.tail_owners is None:
            return None
        nothing = self.weight_zero.to(torch.uint8).reshape(-1, *[1] * (self.codes.dim() - 1)).expand_as(self.codes)
        return self._summed(*with_last(self.codes, self.tail_codes, self.tail_owners, nothing))

    def _summed(self, codes: Tensor, tail_codes: Tensor | None) -> Tensor:
        weight = ops.dequantize(codes, self.weight_step, self.weight_zero)
        if self.tail_owners is not None:
            rows = ops.dequantize(tail_codes, self.tail_step, self.weight_zero[self.tail_owners])
            weight = add_to_owners(weight, rows, self.tail_owners)
        return from_kernel_order(weight)

    @property
    def quantized_bias(self) -> Tensor | None:
        """The bias that goes with the quantized weight."""
        return self.bias if self.corrected_bias is None else self.corrected_bias

    def integers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Codes, steps and zeros of the weight, as they are deployed; None before calibration."""
        return self.codes, self.weight_step, self.weight_zero

    def quantized_weight(self) -> Tensor:
        """The weight that the integer kernels see, in the layout of `weight`."""
        assert self.codes is not None, "calibrate before quantizing"
        if self.rounding is None:
            return self._summed(self.codes, self.tail_codes)
        return self.rounding()

    def taken(self, input: Tensor) -> Tensor:
        """What the layer makes of its input before it is quantized. Called as the layer is, so hooks pass it what they
        get."""
        return input if self.input_scale is None else input * self.input_scale

    @property
    def cuts(self) -> Sparq | None:
        """How the codes of the input are cut, with the range that it has now; None where they stay whole."""
        sparq = self.spec.sparq
        whole = sparq is None or why_whole(sparq, self.input.zero_point, self.weight.shape[1])
        return None if whole else sparq

    @property
    def can_join(self) -> bool:
        """Whether what it makes of its input may stand in the place of the input: plain codes with a step that is
        known, of the input itself."""
        return self.spec.reads_plain_codes and self.input_scale is None

    def values_read(self, x: Tensor) -> Tensor | None:
        """What the layer quantizes x to, if that may stand in the place of x; None while it is in float."""
        return self.input(x) if self.quantized and self.can_join else None

    def _cut(self, x: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """The input and its cut codes' values, as they are multiplied."""
        groups, channels = (1, -1) if self.conv_args is None else (self.conv_args["groups"], -3)
        sparq = self.spec.sparq
        values = fake_cut(quantized, self.input.step, self.input.zero, sparq, groups, channels)
        return repeated(x, groups, channels) if sparq.pairs == "weights" else x, values

    def _at_partners(self, weight: Tensor) -> Tensor:
        """The weight as it is multiplied where its values pair those of the input."""
        is_used = self.codes != self.weight_zero.reshape(-1, *[1] * (self.codes.dim() - 1))
        return from_kernel_order(spread(to_kernel_order(weight), is_used=is_used))

    def forward(self, input: Tensor) -> Tensor:  # the name of the float layer's argument: some models use it
        x, weight, bias = self.taken(input), self.weight, self.bias
        if self.quantized:
            sparq = None if self.input.passes else self.cuts
            x = x if x is self.arrived else self.input(x, sparq and self._cut)
            weight, bias = self.quantized_weight(), self.quantized_bias
            if sparq is not None and sparq.pairs == "weights":
                weight = self._at_partners(weight)
        conv_args = self.conv_args
        if conv_args is not None:
            weight, padding = without_idle_taps(weight, tuple(x.shape[-2:]), **conv_args)
            conv_args = conv_args | {"padding": padding}
        return product(x, weight, bias, conv_args, self.narrow)


def without_idle_taps(
    weight: Tensor,
    size: tuple[int, ...],
    padding: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    **_: object,
) -> tuple[Tensor, tuple[int, int]]:
    """The weight without the rows and columns that meet padding alone on inputs of this size, and what padding is left.

    The last layers of a network on small images have inputs of one pixel, where 8 of 9 taps do nothing but take time.
    """
    spans, left = zip(*map(_busy_taps, weight.shape[-2:], size, padding, stride, dilation), strict=True)
    return weight[..., slice(*spans[0]), slice(*spans[1])], left


@lru_cache(maxsize=1024)
def _busy_taps(taps: int, size: int, padding: int, stride: int, dilation: int) -> tuple[tuple[int, int], int]:
    """First and last + 1 of the taps along one axis that may meet the input, and the padding that goes with them."""

    def outputs(taps: int, padding: int) -> int:
        return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1

    wanted = outputs(taps, padding)
    meets = [any(0 <= o * stride + t * dilation - padding < size for o in range(wanted)) for t in range(taps)]
    if any(meets):
        first, end = meets.index(True), taps - meets[::-1].index(True)
        left = padding - first * dilation
        if left >= 0 and outputs(end - first, left) == wanted:
            return (first, end), left
    return (0, taps), padding


def padding_of(layer: nn.Conv2d) -> tuple[int, int]:
    """The layer's padding as numbers; "same" is symmetric where prepare lets a layer through."""
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return layer.padding
