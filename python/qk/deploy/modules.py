"""Integer layers: quantize the input, run the integer kernel, return float.

A weight lies packed at rest (docs/format.md); the kernel's own layout is made from it and never stored.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from qk import ops
from qk.deploy.pages import in_huge_pages
from qk.deploy.tail import OF_TAIL, TAIL, check_tail, tail_product
from qk.errors import fail
from qk.ops.conv2d import reference as conv2d_definition
from qk.ops.dequantize import reference as dequantize_definition
from qk.ops.gemm import reference as gemm_definition
from qk.ops.pack import row_bytes
from qk.ops.quantize import reference as quantize_definition
from qk.ops.quantize_rows import reference as quantize_rows_definition
from qk.ops.sparq import reference as sparq_definition
from qk.ops.unpack import reference as unpack_definition
from qk.options import Sparq
from qk.prepare.points import parts_of
from qk.prepare.windows import cut_codes, spread, why_whole
from qk.spec import QuantSpec


class _Mode(threading.local):
    definition = False


_mode = _Mode()


@contextmanager
def definition() -> Iterator[None]:
    """Within it, integer layers of this thread compute by the definitions in torch: the same bits, slowly."""
    before, _mode.definition = _mode.definition, True
    try:
        yield
    finally:
        _mode.definition = before


def by_definition() -> bool:
    """Whether this thread is within `definition`."""
    return _mode.definition


class IntegerLayer(nn.Module):
    """What QLinear and QConv2d share.

    packed: uint8 [N, bytes of a row], codes of the weight along K. weight_step float32, weight_zero int32: [N] or
    [N, groups along K]. bias: float32 [N] or None. input_step float32, input_zero int32: [1]; None in a dynamic
    QLinear, which finds those of each row when it comes. input_scale: float32 [K] of a QLinear that multiplies its
    input with it first (qk.smooth), or None. shape: of the weight in kernel order, [N, K] or [N, kh, kw, C / groups].
    spec: the widths. tail_packed uint8 [T, bytes of a row], tail_step float32 and tail_owners int64 [T], or None: rows
    that are added to those of their owners (qk.prepare.points).

    Inputs are float32. float16 and bfloat16 are widened to float32 and the result is cast back. `half()` and the like
    move the layer but leave its numbers in float32. After changing `packed`, `weight_zero` or the tail in place, call
    `prepack`; `load_state_dict`, `to`, copies and pickles do it themselves.
    """

    packed: Tensor
    weight_step: Tensor
    weight_zero: Tensor
    bias: Tensor | None
    input_step: Tensor | None
    input_zero: Tensor | None
    input_scale: Tensor | None
    tail_packed: Tensor | None
    tail_step: Tensor | None
    tail_owners: Tensor | None
    prepacked: Tensor | None

    def __init__(
        self, tensors: dict[str, Tensor | None], spec: QuantSpec, shape: tuple[int, ...], groups: int = 1
    ) -> None:
        """tensors: those above by name. Raises QkError for a dtype, shape or value that does not fit."""
        super().__init__()
        if spec.is_float:
            raise fail(type(self).__name__, "spec", "widths", f"a float layer ({spec.reason})")
        self.spec, self.shape, self.groups = spec, tuple(shape), groups
        self.bits, self.input_bits = spec.storage_bits, spec.activations
        self.out_features, self.k = shape[0], prod(shape[1:])
        self.algorithm = "direct"  # of the kernel: see qk.deploy.tune
        self.cuts: Sparq | None = None  # how codes of the input are cut; prepack knows, from their zero
        self.cuts_distance = False  # from a zero that is not code 0
        _check_tensors(type(self).__name__, tensors, spec, self.out_features, self.k)
        check_tail(type(self).__name__, tensors, spec, self.out_features, self.k)
        for name in TENSORS:
            self.register_buffer(name, tensors.get(name))
        for name in MADE:
            self.register_buffer(name, None, persistent=False)
        self.prepack()

    def prepack(self) -> Tensor:
        """Makes the kernel's layout from `packed`, and that of the tail."""
        if self.tail_packed is not None and not self.tail_packed.is_meta:
            nothing = 2 ** (self.spec.weights - 1)
            made, self.tail_groups = tail_product(self._buffers, self.shape, self.bits, nothing, self.groups)
            self._buffers.update(made)
        algorithm = self.algorithm if self.packed.device.type == "cpu" else "direct"
        packed, shape = self.packed, self.shape
        sparq = self.spec.sparq
        if sparq is not None and not self.input_zero.is_meta:
            zero = int(self.input_zero)
            self.cuts = None if why_whole(sparq, zero, self.shape[-1]) else sparq
            self.cuts_distance = zero != 0
        if self._pairs_by_weights:
            codes = self.multiplied_codes()
            packed, shape = ops.pack(codes.reshape(len(codes), -1), self.bits), tuple(codes.shape)
        self.prepacked = in_huge_pages(ops.prepack(packed, self.weight_zero, self.bits, shape, self.groups, algorithm))
        return self.prepacked

    def weight_codes(self) -> Tensor:
        """uint8 in kernel order."""
        return unpack_definition(self.packed, self.bits, self.k).reshape(self.shape)

    def tail_codes(self) -> Tensor:
        """uint8 [T, ...] in kernel order."""
        return unpack_definition(self.tail_packed, self.bits, self.k).reshape(-1, *self.shape[1:])

    def _with_points(self, y: Tensor, rows: Tensor) -> Tensor:
        """y [..., N] with the sums of the tail's rows as the channels of several points."""
        return ops.index_put(y, rows, self._buffers["tail_index"], self._buffers["tail_source"])

    def _by_parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """For the definition: owners of a part of the tail, and a weight of N rows that are 0 but for theirs: codes,
        zeros, steps."""
        if self.tail_owners is None:
            return
        nothing, codes = 2 ** (self.spec.weights - 1), self.tail_codes()
        for part in parts_of(self.tail_owners):
            owners = self.tail_owners[part]
            whole = codes.new_full(self.shape, nothing)
            steps = self.tail_step.new_ones(self.out_features)
            whole[owners], steps[owners] = codes[part], self.tail_step[part]
            yield owners, whole, torch.full_like(self.weight_zero, nothing), steps

    def multiplied_codes(self) -> Tensor:
        """The weight's codes as the kernel gets them: with pairs by weights, each at its activation's partner."""
        codes = self.weight_codes()
        if not self._pairs_by_weights:
            return codes
        return spread(codes, self.weight_zero)

    @property
    def _pairs_by_weights(self) -> bool:
        return self.cuts is not None and self.cuts.pairs == "weights"

    @property
    def can_join(self) -> bool:
        """As of QuantLayer."""
        return self.spec.reads_plain_codes and self.input_scale is None

    def values_read(self, x: Tensor) -> Tensor | None:
        """What the codes of x stand for, in its type, if that may stand in its place: the layer finds them again."""
        if not self.can_join:
            return None
        if x.dtype != torch.float32:
            return self.values_read(x.float()).to(x.dtype)
        step, zero = self.input_step, self.input_zero
        if _mode.definition:
            return dequantize_definition(quantize_definition(x, step, zero, self.input_bits), step, zero)
        return ops.dequantize(ops.quantize(x, step, zero, self.input_bits), step, zero)

    def _cut(self, codes: Tensor) -> Tensor:
        """The codes of the input as they are multiplied."""
        if self.cuts is None:
            return codes
        cut = sparq_definition if _mode.definition else ops.sparq
        return cut_codes(
            codes, self.cuts, self.groups, self._buffers["input_zero"] if self.cuts_distance else None, cut
        )

    def _apply(self, fn: Any, recurse: bool = True) -> IntegerLayer:
        device = self.packed.device
        before = {name: tensor for name in TENSORS if (tensor := self._buffers[name]) is not None}
        made = {name: self._buffers[name] for name in MADE}
        self._buffers.update(dict.fromkeys(MADE))
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            if self._buffers[name].dtype != tensor.dtype:
                self._buffers[name] = tensor.to(self._buffers[name].device)
        if self.packed.device == device:
            self._buffers.update(made)
        elif device.type != "meta":  # what comes from meta has no values before load_state_dict
            self.prepack()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.prepack()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": self._buffers | dict.fromkeys(MADE)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.prepack()

    def _through_float32(self, x: Tensor) -> Tensor:
        if x.dtype not in (torch.float16, torch.bfloat16):
            got = str(x.dtype).removeprefix("torch.")
            raise fail(type(self).__name__, "x", "float32, float16 or bfloat16", got, "Convert it with x.float().")
        return self(x.float()).to(x.dtype)


class QLinear(IntegerLayer):
    """Linear on packed integer weights. x [..., K] -> [..., N]."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return self._through_float32(x)
        if x.dim() == 0 or x.shape[-1] != self.k:
            raise fail("QLinear", "x", f"[..., {self.k}]", list(x.shape))
        if self._buffers["input_scale"] is not None:
            x = x * self.input_scale
        if _mode.definition:
            return self._by_definition(x)
        b = self._buffers  # as attributes they would cost as much as a small product
        weight = b["prepacked"] if b["prepacked"] is not None else self.prepack()
        step, zero = b["input_step"], b["input_zero"]
        if step is None:
            codes, step, zero = ops.quantize_rows(x, self.input_bits)
        else:
            codes = self._cut(ops.quantize(x, step, zero, self.input_bits))
        y = ops.gemm(codes, step, zero, weight, b["weight_step"], b["bias"], self.bits, self.input_bits)
        if b["tail_packed"] is None:
            return y
        tail = (b["tail_prepacked"], b["tail_steps"], b["tail_bias"])
        return self._with_points(y, ops.gemm(codes, step, zero, *tail, self.bits, self.input_bits))

    def _by_definition(self, x: Tensor) -> Tensor:
        step, zero = self.input_step, self.input_zero
        if step is None:
            codes, step, zero = quantize_rows_definition(x, self.input_bits)
        else:
            codes = self._cut(quantize_definition(x, step, zero, self.input_bits))
        y = gemm_definition(codes, step, zero, self.multiplied_codes(), self.weight_zero, self.weight_step, self.bias)
        for owners, *weight in self._by_parts():
            y[..., owners] += gemm_definition(codes, step, zero, *weight)[..., owners]
        return y

    def extra_repr(self) -> str:
        return f"{self.k}, {self.out_features}, bias={self.bias is not None}, {_widths(self.spec)}"


class QConv2d(IntegerLayer):
    """Conv2d on packed integer weights. x [B, C, H, W] or [C, H, W] in any memory format -> channels_last, or
    `contiguous`, where the model asks a view of it that channels_last has not."""

    def __init__(
        self,
        tensors: dict[str, Tensor | None],
        spec: QuantSpec,
        shape: tuple[int, ...],
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        groups: int = 1,
        contiguous: bool = False,
    ) -> None:
        if spec.dynamic:
            raise fail("QConv2d", "spec.dynamic", "false, as a convolution reads many rows at once", "true")
        super().__init__(tensors, spec, shape, groups)
        self.stride, self.padding, self.dilation = tuple(stride), tuple(padding), tuple(dilation)
        self.kernel_size, self.in_channels = self.shape[1:3], self.shape[3] * groups
        self.contiguous = contiguous

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            return self._through_float32(x)
        if x.dim() == 3:
            return self(x.unsqueeze(0)).squeeze(0)
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise fail("QConv2d", "x", f"[B, {self.in_channels}, H, W] or [{self.in_channels}, H, W]", list(x.shape))
        x = x.permute(0, 2, 3, 1)  # contiguous already when x is channels_last
        if _mode.definition:
            return self._by_definition(x)
        b = self._buffers
        weight = b["prepacked"] if b["prepacked"] is not None else self.prepack()
        codes = self._cut(ops.quantize(x, b["input_step"], b["input_zero"], self.input_bits))
        y = self._convolved(codes, weight, b["weight_step"], b["bias"], self.groups)
        if b["tail_packed"] is not None:
            reads = b["tail_reads"]
            codes = codes if reads is None else ops.index_select(codes, reads)
            tail = (b["tail_prepacked"], b["tail_steps"], b["tail_bias"])
            y = self._with_points(y, self._convolved(codes, *tail, self.tail_groups))
        return self._laid(y)

    def values_read(self, x: Tensor) -> Tensor | None:
        """As of IntegerLayer; contiguous, or in channels_last, as x is."""
        if x.dim() != 4:
            return super().values_read(x)
        values = super().values_read(x.permute(0, 2, 3, 1))
        if values is None:
            return None
        values = values.permute(0, 3, 1, 2)
        return values.contiguous() if x.is_contiguous() else values

    def _convolved(self, codes: Tensor, weight: Tensor, steps: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        b = self._buffers
        return ops.conv2d(
            codes,
            b["input_step"],
            b["input_zero"],
            weight,
            steps,
            bias,
            self.bits,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            groups,
            self.input_bits,
        )

    def _by_definition(self, x: Tensor) -> Tensor:
        step, zero = self.input_step, self.input_zero
        codes = self._cut(quantize_definition(x, step, zero, self.input_bits))
        places = (self.stride, self.padding, self.dilation, self.groups)
        weight = (self.multiplied_codes(), self.weight_zero, self.weight_step)
        y = conv2d_definition(codes, step, zero, *weight, self.bias, *places)
        for owners, *weight in self._by_parts():
            y[..., owners] += conv2d_definition(codes, step, zero, *weight, None, *places)[..., owners]
        return self._laid(y)

    def _laid(self, y: Tensor) -> Tensor:
        y = y.permute(0, 3, 1, 2)
        return y.contiguous() if self.contiguous else y

    def extra_repr(self) -> str:
        config = {"kernel_size": self.kernel_size, "stride": self.stride}
        defaults = {"padding": (0, 0), "dilation": (1, 1), "groups": 1}
        config |= {name: getattr(self, name) for name, usual in defaults.items() if getattr(self, name) != usual}
        config["bias"] = self.bias is not None
        words = ", ".join(f"{name}={value}" for name, value in config.items())
        return f"{self.in_channels}, {self.out_features}, {words}, {_widths(self.spec)}"


def integer_layers(model: nn.Module) -> dict[str, IntegerLayer]:
    """Name -> integer layer; of a layer with several names the first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, IntegerLayer)}


TENSORS = ("packed", "weight_step", "weight_zero", "bias", "input_step", "input_zero", "input_scale", *TAIL)
# By prepack, never stored.
MADE = ("prepacked", *OF_TAIL)


def _widths(spec: QuantSpec) -> str:
    return spec.describe() + ("" if spec.group_size is None else f", group_size={spec.group_size}")


def _check_tensors(stage: str, tensors: dict[str, Tensor | None], spec: QuantSpec, n: int, k: int) -> None:
    if spec.group_size is not None and k % spec.group_size:
        raise fail(stage, "group_size", f"a divisor of K = {k}", spec.group_size)
    steps = (n,) if spec.group_size in (None, k) else (n, k // spec.group_size)
    expected = {
        "packed": (torch.uint8, (n, row_bytes(k, spec.storage_bits))),
        "weight_step": (torch.float32, steps),
        "weight_zero": (torch.int32, steps),
        "bias": (torch.float32, (n,)),
        "input_step": (torch.float32, (1,)),
        "input_zero": (torch.int32, (1,)),
        "input_scale": (torch.float32, (k,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = tensors.get(name)
        if spec.dynamic and name in ("input_step", "input_zero"):
            if tensor is not None:
                raise fail(stage, name, "absent in a dynamic layer, whose rows bring their own", "one for all")
            continue
        if tensor is None and name in ("bias", "input_scale"):
            continue
        got = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
        if got != (dtype, shape):
            raise fail(stage, name, f"{dtype} {list(shape)}", "nothing" if got is None else f"{got[0]} {list(got[1])}")
    for name, bits in (("weight", spec.code_bits), ("input", spec.activations)):
        step, zero = tensors.get(f"{name}_step"), tensors.get(f"{name}_zero")
        if step is None or step.is_meta:
            continue
        if not bool(((step > 0) & step.isfinite()).all()):
            raise fail(stage, f"{name}_step", "positive and finite", f"{step.min().item()} to {step.max().item()}")
        if zero.numel() and not 0 <= int(zero.min()) <= int(zero.max()) < 2**bits:
            raise fail(stage, f"{name}_zero", f"within 0 and {2**bits - 1}", f"{zero.min()} to {zero.max()}")
