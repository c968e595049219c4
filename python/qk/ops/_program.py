"""Programs: what the operator `network` runs. Dataclasses, text and checks; shapes are in `qk.ops._shapes`.

A program is text, one line each, in this order: the version, inputs, steps, outputs. Words are separated by one space.

    qk-program 1
    input 0
    quantize 1 = 0 layout=nchw out_scale=0 out_bits=8
    conv2d 2 = 1 weight=0 weight_step=0 bias=64 bits=4 n=64 k_groups=1 kernel=3,3 stride=1,1 padding=1,1 \
dilation=1,1 groups=1 activation=relu out_scale=1 out_bits=8
    dequantize 3 = 2
    output 3 layout=nchw

Line        = "input" ID [SCALE]  |  OP ID " =" INPUT... KEY=VALUE...  |  "output" ID "layout=" ("nchw" | "same")
ID          of a value, 0 to 2^20 - 1; made once, by an input or a step, before any line that uses it.
SCALE       = "out_scale=" INDEX "out_bits=" 2..8: the value is uint8 codes; without it float32.
KEY=VALUE   those of SIGNATURES, each once; all are given but those marked optional. A number is decimal, a pair is
            "3,3", a list is "0,-1", a word is one of its choices.

All numbers that are not in the text lie in four tensors, so that a call does not pay for each of hundreds:

    steps   float32 [S], zeros int32 [S]: the scales of codes, by INDEX
    floats  float32 [F]: weight steps [n] or [n, k_groups], biases [n], float tables [256], each at an offset
    bytes   uint8 [B]: prepacked weights, tables of codes [256], int32 of columns, each at an offset

Values have the shape [B, H, W, C] (NHWC) in convolutional parts and [..., K] in linear parts. An input is a float32
tensor with any shape and strides, or codes [B, H, W, C] or [..., K]. What the steps compute is in `qk.ops.network`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qk.ops.sparq import FAMILIES

Attribute = int | str | tuple[int, ...]

HEAD = "qk-program 1"
MAX_ID = 2**20


@dataclass(frozen=True)
class Scale:
    """How codes stand for values: the index of their step and zero, and their width."""

    index: int
    bits: int


@dataclass(frozen=True)
class Value:
    """What an input or a step makes: codes with a scale, or float32."""

    id: int
    scale: Scale | None = None


@dataclass(frozen=True)
class Step:
    """One operation: makes value `out` from values `inputs`, constants by name -> offset, and attributes by name.

    scale: of the codes that it makes. None: float32; or, for a max pool and reshape, codes on the scale of the input.
    """

    op: str
    out: int
    inputs: tuple[int, ...]
    constants: Mapping[str, int] = field(default_factory=dict)
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    scale: Scale | None = None


@dataclass(frozen=True)
class Output:
    """A result. layout "nchw": a value [B, H, W, C] as [B, C, H, W], in memory still NHWC (channels_last); "same"."""

    value: int
    layout: str = "same"


@dataclass(frozen=True)
class Program:
    """inputs: one for each input tensor. outputs: of different values, each made by a step."""

    inputs: tuple[Value, ...]
    steps: tuple[Step, ...]
    outputs: tuple[Output, ...]

    def values(self) -> dict[int, Value]:
        """Every value by id, with the scale that it has."""
        values = {value.id: value for value in self.inputs}
        for step in self.steps:
            scale = step.scale
            if keeps_scale(step.op, step.attributes):
                scale = values[step.inputs[0]].scale
            values[step.out] = Value(step.out, scale)
        return values


@dataclass(frozen=True)
class Signature:
    """What a step of one kind takes. inputs: least and most. optional: constants that may be left out.

    attributes: name -> "int", "pair", "list" or a tuple of words. scale: "codes" must be given, "free" may, "none".
    """

    inputs: tuple[int, int]
    constants: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    attributes: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    scale: str = "free"


_ACTIVATION = {"activation": ("none", "relu", "relu6")}
# Of the weight: width, output channels, groups along K.
_WEIGHT = dict.fromkeys(("bits", "n", "k_groups"), "int")
_WINDOW = dict.fromkeys(("kernel", "stride", "padding", "dilation"), "pair")

SIGNATURES: dict[str, Signature] = {
    # float32 -> codes; layout nchw: [B, C, ...] -> [B, ..., C].
    "quantize": Signature((1, 1), attributes={"layout": ("nchw", "same")}, scale="codes"),
    # x codes [B, H, W, C], then, maybe, a residual [B, OH, OW, N] (codes or float32); as torch.ops.qk.conv2d.
    "conv2d": Signature(
        (1, 2),
        ("weight", "weight_step", "bias"),
        ("bias",),
        {**_WEIGHT, **_WINDOW, "groups": "int", **_ACTIVATION},
    ),
    # x codes [..., K], then, maybe, a residual [..., N]; as torch.ops.qk.gemm.
    "gemm": Signature((1, 2), ("weight", "weight_step", "bias"), ("bias",), {**_WEIGHT, **_ACTIVATION}),
    # a + b of one shape, each codes or float32.
    "add": Signature((2, 2), attributes=_ACTIVATION),
    # x [B, H, W, C] codes * gate [B, 1, 1, C] codes or float32: squeeze-and-excitation.
    "multiply": Signature((2, 2), attributes=_ACTIVATION),
    # x codes [B, H, W, C]. max keeps the scale (and is given none). kernel 0,0: the whole image. As torch's pools;
    # ceil_mode and count_include_pad (0 for max) are 0 or 1.
    "pool": Signature(
        (1, 1), attributes={"mode": ("max", "average"), **_WINDOW, "ceil_mode": "int", "count_include_pad": "int"}
    ),
    # codes -> table[codes]: table uint8 [256] with a scale, float32 [256] without.
    "lookup": Signature((1, 1), ("table",)),
    # codes -> codes of the same scale: as torch.ops.qk.sparq, relative to the scale's zero. round and pairs are 0 or 1.
    "sparq": Signature((1, 1), attributes={"family": tuple(FAMILIES), "round": "int", "pairs": "int"}),
    # codes of one shape but for the last axis, put together along it, each requantized to the scale of the result.
    "concat": Signature((1, 4096), scale="codes"),
    # q [B, queries, heads * D], k, v and, maybe, a mask [B or 1, queries or 1, keys], whose scale has no meaning; all
    # codes. score_scale: the bits of a positive float32. As torch.ops.qk.attention.
    "attention": Signature((3, 4), attributes={"heads": "int", "score_scale": "int"}),
    # x [..., N] of the result's scale, added [..., T] float32, then, maybe, a residual [..., N] (codes or float32); as
    # torch.ops.qk.index_put. index int32 [count] and source int32 [terms, count], 1 to 255 terms, lie among the bytes
    # at multiples of 4.
    "index_put": Signature((2, 3), ("index", "source"), (), {"count": "int", "terms": "int", **_ACTIVATION}),
    # codes [..., C] -> [..., count] of the same scale; as torch.ops.qk.index_select.
    "index_select": Signature((1, 1), ("index",), (), {"count": "int"}),
    # no copy. shape: 0 is the size of the input there, one may be -1.
    "reshape": Signature((1, 1), attributes={"shape": "list"}, scale="none"),
    # codes -> float32.
    "dequantize": Signature((1, 1), scale="none"),
}


def score_bits(scale: float) -> int:
    """attention's scale as programs have it: the bits of its float32."""
    return struct.unpack("<i", struct.pack("<f", scale))[0]


def score_scale(bits: int) -> float:
    """The scale that has these bits."""
    return struct.unpack("<f", struct.pack("<i", bits))[0]


def keeps_scale(op: str, attributes: Mapping[str, Any]) -> bool:
    """Whether a step's result has the scale of its first input."""
    return op in ("reshape", "sparq", "index_select") or (op == "pool" and attributes.get("mode") == "max")


# --- text -----------------------------------------------------------------------------------------------------------


def encode(program: Program) -> str:
    """The text of a program. Raises ValueError for one that `check` refuses."""
    check(program)
    lines = [HEAD]
    lines += [" ".join(["input", str(value.id), *_scale_words(value.scale)]) for value in program.inputs]
    for step in program.steps:
        signature = SIGNATURES[step.op]
        words = [step.op, str(step.out), "=", *map(str, step.inputs)]
        words += [f"{name}={step.constants[name]}" for name in signature.constants if name in step.constants]
        words += [f"{name}={_plain(step.attributes[name])}" for name in signature.attributes]
        lines.append(" ".join(words + _scale_words(step.scale)))
    lines += [f"output {output.value} layout={output.layout}" for output in program.outputs]
    return "\n".join(lines) + "\n"


def decode(text: str) -> Program:
    """The program of a text. Raises ValueError with the line and what is wrong with it."""
    lines = text.removesuffix("\n").split("\n")
    if lines[0] != HEAD:
        raise _wrong(1, f'the first line must be "{HEAD}"')
    inputs, steps, outputs = [], [], []
    for number, line in enumerate(lines[1:], 2):
        op, *words = line.split(" ")
        try:
            if op == "input" and not steps and not outputs and words:
                inputs.append(Value(_int(words[0]), _take_scale(given := _pairs(words[1:]))))
                _nothing_left(given)
            elif op == "output" and len(words) == 2:
                outputs.append(Output(_int(words[0]), _pairs(words[1:]).get("layout", "")))
            elif op in SIGNATURES and not outputs:
                steps.append(_step(op, words))
            else:
                raise ValueError(f'"{line}" is no input, step or output, or not in its place')
        except ValueError as error:
            raise _wrong(number, str(error)) from None
    program = Program(tuple(inputs), tuple(steps), tuple(outputs))
    check(program)
    return program


def _step(op: str, words: list[str]) -> Step:
    if len(words) < 2 or words[1] != "=":
        raise ValueError(f'{op} must be followed by an id and "="')
    split = next((i for i, word in enumerate(words) if i > 1 and "=" in word), len(words))
    signature, given = SIGNATURES[op], _pairs(words[split:])
    scale = _take_scale(given)
    constants = {name: _int(given.pop(name)) for name in signature.constants if name in given}
    attributes = {name: _value(kind, given.pop(name)) for name, kind in signature.attributes.items() if name in given}
    _nothing_left(given)
    return Step(op, _int(words[0]), tuple(map(_int, words[2:split])), constants, attributes, scale)


def _pairs(words: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals or not value or name in pairs:
            raise ValueError(f'"{word}" must be name=value, each name once')
        pairs[name] = value
    return pairs


def _nothing_left(given: dict[str, str]) -> None:
    if given:
        raise ValueError(f"{next(iter(given))} is not known here")


def _take_scale(given: dict[str, str]) -> Scale | None:
    names = [name for name in ("out_scale", "out_bits") if name in given]
    if len(names) == 1:
        raise ValueError("out_scale and out_bits must be given together")
    return Scale(*(_int(given.pop(name)) for name in names)) if names else None


def _scale_words(scale: Scale | None) -> list[str]:
    return [] if scale is None else [f"out_scale={scale.index}", f"out_bits={scale.bits}"]


def _plain(value: Attribute) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _int(text: str) -> int:
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal() and len(digits) <= 15):
        raise ValueError(f'"{text}" must be a number')
    return int(text)


def _value(kind: str | tuple[str, ...], text: str) -> Attribute:
    if kind == "int":
        return _int(text)
    return tuple(map(_int, text.split(","))) if kind in ("pair", "list") else text


def _wrong(line: int, what: str) -> ValueError:
    return ValueError(f"qk: program, line {line}: {what}.")


# --- checks ---------------------------------------------------------------------------------------------------------


def check(program: Program) -> None:
    """Raises ValueError for a program that is not well formed; shapes and constants are looked at when it runs."""
    scales: dict[int, Scale | None] = {}
    line = 1

    def demand(holds: bool, what: str) -> None:
        if not holds:
            raise _wrong(line, what)

    def define(id: int, scale: Scale | None) -> None:
        demand(isinstance(id, int) and 0 <= id < MAX_ID, f"the id {id} must be from 0 to {MAX_ID - 1}")
        demand(id not in scales, f"value {id} must be made once")
        if scale is not None:
            demand(0 <= scale.index < MAX_ID, f"out_scale must be from 0 to {MAX_ID - 1}")
            demand(2 <= scale.bits <= 8, "out_bits must be from 2 to 8")
        scales[id] = scale

    for value in program.inputs:
        line += 1
        define(value.id, value.scale)
    roots = dict.fromkeys(scales, -1)  # whose memory a value is; -1: an input's
    for step in program.steps:
        line += 1
        demand(step.op in SIGNATURES, f"{step.op} is no step; there are {', '.join(SIGNATURES)}")
        signature = SIGNATURES[step.op]
        least, most = signature.inputs
        demand(least <= len(step.inputs) <= most, f"{step.op} takes {least} to {most} inputs, not {len(step.inputs)}")
        for id in step.inputs:
            demand(id in scales, f"value {id} must be made on a line before")
        for name, offset in step.constants.items():
            demand(name in signature.constants, f"{step.op} takes no constant {name}")
            demand(isinstance(offset, int) and 0 <= offset < 2**48, f"{name} must be an offset")
        for name in signature.constants:
            demand(name in step.constants or name in signature.optional, f"{step.op} needs the constant {name}")
        for name in step.attributes:
            demand(name in signature.attributes, f"{step.op} takes no attribute {name}")
        for name, kind in signature.attributes.items():
            demand(name in step.attributes, f"{step.op} needs the attribute {name}")
            _check_attribute(demand, name, kind, step.attributes[name])
        _check_kinds(demand, step, signature, scales)
        define(step.out, scales[step.inputs[0]] if keeps_scale(step.op, step.attributes) else step.scale)
        roots[step.out] = roots[step.inputs[0]] if step.op == "reshape" else step.out
    seen = set()
    for output in program.outputs:
        line += 1
        root = roots.get(output.value, -1)
        demand(root >= 0, f"output {output.value} must be made by a step")
        demand(root not in seen, f"output {output.value} must be given once, and share no memory with another")
        demand(output.layout in ("nchw", "same"), "layout must be nchw or same")
        seen.add(root)
    demand(bool(program.inputs and program.outputs), "there must be an input and an output")


def _check_attribute(demand: Any, name: str, kind: str | tuple[str, ...], value: Attribute) -> None:
    if isinstance(kind, tuple):
        return demand(value in kind, f"{name} must be one of {', '.join(kind)}, not {value}")
    numbers = value if isinstance(value, tuple) else (value,)
    fits = all(isinstance(n, int) and -1 <= n < 2**31 for n in numbers)
    fits = fits and isinstance(value, tuple) == (kind != "int") and (kind != "pair" or len(numbers) == 2)
    demand(fits, f"{name} must be {kind if kind != 'int' else 'a number'}, not {value}")
    if kind == "list":
        return demand(1 <= len(numbers) <= 8 and numbers.count(-1) <= 1, f"{name} must be 1 to 8 sizes, one of them -1")
    least = (
        1 if name in ("stride", "dilation", "groups", "n", "k_groups", "heads", "score_scale", "count", "terms") else 0
    )
    demand(min(numbers) >= least, f"{name} must be {least} or more")
    if name in ("ceil_mode", "count_include_pad", "round", "pairs"):
        demand(value in (0, 1), f"{name} must be 0 or 1")
    if name == "terms":
        demand(value <= 255, "terms must be 255 or less")
    if name == "bits":
        demand(value in (2, 4, 8), "bits must be 2, 4 or 8")
    if name == "score_scale":
        demand(value < 0x7F800000, "score_scale must be the bits of a finite float32")


def _check_kinds(demand: Any, step: Step, signature: Signature, scales: dict[int, Scale | None]) -> None:
    """Codes and float32 where they belong."""
    codes = [scales[id] is not None for id in step.inputs]
    if step.op == "quantize":
        demand(not codes[0], "quantize takes float32 values")
    elif step.op in ("concat", "attention"):
        demand(all(codes), f"{step.op} takes codes")
    elif step.op == "index_put":
        demand(scales[step.inputs[0]] == step.scale, "index_put keeps the scale of its first input")
        demand(not codes[1], "index_put adds float32 values")
    elif step.op not in ("add", "reshape"):
        demand(codes[0], f"the first input of {step.op} must be codes")
    if signature.scale == "codes":
        demand(step.scale is not None, f"{step.op} needs out_scale and out_bits")
    elif signature.scale == "none" or keeps_scale(step.op, step.attributes):
        demand(step.scale is None, f"{step.op} takes no out_scale here")
    if step.op == "pool" and step.attributes["mode"] == "max":
        demand(step.attributes["count_include_pad"] == 0, "count_include_pad must be 0 for max")
    if step.op in ("conv2d", "pool"):
        kernel = step.attributes["kernel"]
        demand(
            min(kernel) > 0 or (step.op == "pool" and max(kernel) == 0), "kernel must be positive, or 0,0 for a pool"
        )
