"""What a device computes in integers, declared: operators, types, accumulators, rounding and costs (docs/hago.md)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from qk.errors import fail
from qk.fields import STRICT, parsed, refuses_in_words
from qk.inputs import digest

DEVICES = Path(__file__).parent / "devices"

Kind = Literal[
    "conv2d",
    "grouped_conv2d",
    "depthwise_conv2d",
    "dense",
    "add",
    "multiply",
    "relu",
    "clip",
    "max_pool2d",
    "avg_pool2d",
    "concatenate",
    "reshape",
    "function",
]
Type = Literal["int2", "int4", "int8", "int16", "int32", "uint8"]
Rounding = Literal["nearest_even", "half_up", "half_away", "floor"]
LAYERS = ("conv2d", "grouped_conv2d", "depthwise_conv2d", "dense")
WIDE = 16  # bits of a type that sums pass on in
SUMS = (*LAYERS, "avg_pool2d")  # what gives sums
UNCHANGED = ("relu", "clip", "max_pool2d", "reshape", "concatenate")  # results are of the operand's type
# Of its tensors: a layer has an activation and a weight, a concatenation any number.
OPERANDS = dict.fromkeys(LAYERS, 2) | {"add": 2, "multiply": 2}


def bits_of(kind: Type) -> int:
    """Of an integer type."""
    return int(kind.lstrip("uint"))


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class Descriptor:
    """One way in which a device computes an operator in integers.

    inputs: types of the tensors, a layer's activation before its weight; one type stands for all. Those of add and
    multiply are in any order. output: of the result. accumulator: bits in which a layer or an average sums; sums that
    leave them wrap. cost: for a multiply-accumulate of a layer, for a value of another's result; "measure": time it.
    """

    inputs: tuple[Type, ...] | Type
    output: Type
    accumulator: int = Field(default=32, ge=8, le=32)
    cost: float | Literal["measure"] = Field(default=1.0)

    def __post_init__(self) -> None:
        if self.cost != "measure" and self.cost < 0:
            raise ValueError(f"cost must be 0 or more, or measure, got {self.cost}")

    def types(self, count: int) -> tuple[Type, ...]:
        """Of so many inputs."""
        return (self.inputs,) * count if isinstance(self.inputs, str) else self.inputs


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class Operator:
    """integer: descriptors, the narrowest first, of which the first that holds the bits is taken. begins: whether it
    computes in integers even where all that it reads is float."""

    integer: tuple[Descriptor, ...]
    begins: bool = False


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class Hardware:
    """A device.

    operators: kind -> how it is computed in integers. fallback: "float32", in which everything else is computed: a
    device must say that it can. arithmetic: "float32": what a layer sums is scaled in float32 before it leaves the
    registers, activations are unsigned codes with any zero (docs/numerics.md); "integer": results stay integers with
    the scale of their sums, zeros are 0, and what reads them requantizes by a multiplier of 31 bits and a shift.
    weights: one step for each output channel, or for a tensor. rounding: of that shift. scales: steps of any value, or
    of powers of two, where requantizing is a shift alone. least_activation_bits, least_weight_bits: that are tried.
    """

    name: str
    operators: dict[Kind, Operator]
    fallback: Literal["float32"]
    arithmetic: Literal["float32", "integer"] = "float32"
    weights: Literal["channel", "tensor"] = "channel"
    rounding: Rounding = "nearest_even"
    scales: Literal["any", "power_of_two"] = "any"
    least_activation_bits: int = Field(default=4, ge=2, le=8)
    least_weight_bits: int = Field(default=4, ge=2, le=8)
    about: str = ""

    def __post_init__(self) -> None:
        for kind, operator in self.operators.items():
            if not operator.integer:
                raise ValueError(f"{kind} must have a descriptor, or not be listed: the rest is float")
            for i, descriptor in enumerate(operator.integer):
                self._check(kind, descriptor)
                if any(_covers(earlier, descriptor, OPERANDS.get(kind, 1)) for earlier in operator.integer[:i]):
                    raise ValueError(f"{kind} must have narrow types first: {descriptor.inputs} would never be taken")
        costs = [d.cost for kind, operator in self.operators.items() for d in operator.integer if kind not in LAYERS]
        if any(d.cost == "measure" for o in self.operators.values() for d in o.integer) and any(costs):
            raise ValueError(
                "operators that are no layers must have cost 0 beside measured ones: they are part of them"
            )

    def _check(self, kind: Kind, descriptor: Descriptor) -> None:
        count = OPERANDS.get(kind, 1)
        types = descriptor.types(count)
        if len(types) != count or (kind == "concatenate" and not isinstance(descriptor.inputs, str)):
            raise ValueError(f"{kind} must have {count} input types, or one for all, got {len(types)}")
        unsigned = [t for t in (*types, descriptor.output) if t.startswith("u")]
        if self.on_integers and (unsigned or kind in ("function", "multiply")):
            what = unsigned[0] if unsigned else kind
            raise ValueError(f"{kind} must do without {what} where arithmetic is integer: zeros are 0 there")
        if kind in LAYERS:
            activation, weight = types
            if bits_of(weight) > 8 or bits_of(activation) > 8 or weight.startswith("u"):
                raise ValueError(f"{kind} must read activations of up to 8 bits and signed weights of up to 8")
        if kind in SUMS and bits_of(descriptor.output) < WIDE:
            raise ValueError(f"{kind} must give its sums, in int16 or int32: what reads them requantizes")
        if descriptor.cost == "measure" and (self.on_integers or kind not in LAYERS):
            raise ValueError(f"{kind} must have a number as cost: measured are layers where arithmetic is float32")
        if self.on_integers:
            if kind in UNCHANGED and descriptor.output != types[0]:
                raise ValueError(f"{kind} must give the type that it reads, {types[0]}, got {descriptor.output}")
            return
        narrow = [t for t in types[: 1 if kind in LAYERS else count] if bits_of(t) < WIDE and t != "uint8"]
        if narrow or descriptor.accumulator != 32 or self.scales != "any" or self.rounding != "nearest_even":
            got = narrow[0] if narrow else "another accumulator, rounding or scale"
            raise ValueError(
                f"{kind} must have uint8 activations, 32 bits of accumulator, scales any and rounding nearest_even "
                f"where arithmetic is float32, got {got}"
            )

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML hold it; from_dict gives an equal one back."""
        return TypeAdapter(Hardware).dump_python(self, mode="json")

    @property
    def on_integers(self) -> bool:
        """Whether results stay integers."""
        return self.arithmetic == "integer"

    @cached_property
    def digest(self) -> str:
        """sha256 of all but the words."""
        return digest(sorted((name, repr(value)) for name, value in self.to_dict().items() if name != "about"))

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str = "hardware") -> Hardware:
        """Raises QkError for fields that do not fit, all of them named."""
        if isinstance(data, Mapping) and "fallback" not in data:
            advice = "Add `fallback: float32` if the device has float operators for the rest of a network."
            raise fail(where, "fallback", "float32, for what has no integer form", "nothing", advice)
        return parsed(Hardware, data, where)

    @staticmethod
    def load(source: str | Path) -> Hardware:
        """A device that is shipped, by its name (`Hardware.shipped`), or one from a file of YAML or JSON.

        Raises QkError for what is neither, and for a file whose fields do not fit."""
        path = DEVICES / f"{source}.yaml" if str(source) in Hardware.shipped() else Path(source)
        try:
            data = yaml.safe_load(path.read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            expected = f"one of {', '.join(Hardware.shipped())}, or a readable file of YAML or JSON"
            raise fail("hardware", str(source), expected, error) from error
        return Hardware.from_dict(data, f"hardware {source}")

    @staticmethod
    def shipped() -> list[str]:
        """Names of the devices that come with the package."""
        return sorted(path.stem for path in DEVICES.glob("*.yaml"))


def _covers(earlier: Descriptor, later: Descriptor, count: int) -> bool:
    """Whether the earlier one holds all that the later one does."""
    return all(bits_of(a) >= bits_of(b) for a, b in zip(earlier.types(count), later.types(count), strict=True))
