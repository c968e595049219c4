"""The operator network refuses programs that are not well formed and tensors that do not fit, and never crashes."""

import random

import pytest
import torch

import qk
from networks import POOL, Net, chain, coded, equal, random_net
from qk.deploy.program import Builder, decode, encode, interpret

GOOD = """qk-program 1
input 0
quantize 1 = 0 layout=nchw out_scale=0 out_bits=8
pool 2 = 1 mode=max kernel=2,2 stride=2,2 padding=0,0 dilation=1,1 ceil_mode=0 count_include_pad=0
reshape 3 = 2 shape=0,-1
dequantize 4 = 3
output 4 layout=same
"""
CONSTANTS = [torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.zeros(4), torch.zeros(64, dtype=torch.uint8)]
PUT = "index=0 source=0 count=2 terms=1 activation=none"
WRONG = [
    ("qk-program 1", "qk-program 2", "line 1"),
    ("input 0", "input 0 0", "line 2"),
    ("input 0", "input x", "line 2"),
    ("input 0", "input -1", "line 2"),
    ("input 0", "input 1048576", "line 2"),
    ("input 0", "input 0 out_scale=0", "line 2: "),
    ("input 0", "input  0", "line 2"),
    ("input 0\n", "", "line 2: .*must be made on a line before"),
    ("input 0\n", "input 0\ninput 0\n", "line 3: value 0 must be made once"),
    ("quantize 1", "quantise 1", "line 3"),
    ("quantize 1 = 0", "quantize 1 = 5", "line 3: .*must be made on a line before"),
    ("quantize 1 = 0", "quantize 0 = 0", "line 3: value 0 must be made once"),
    ("quantize 1 = 0", "quantize 1 = 0 0", "line 3: quantize takes 1 to 1 inputs, not 2"),
    ("quantize 1 = 0", "quantize 1 =", "line 3"),
    ("quantize 1 = 0", "quantize 1 : 0", "line 3"),
    ("layout=nchw", "layout=nhwc", "line 3: layout"),
    ("layout=nchw", "layout=nchw layout=nchw", "line 3"),
    ("layout=nchw ", "", "line 3: .*layout"),
    ("layout=nchw", "layout=nchw bits=4", "line 3"),
    ("layout=nchw", "layout=nchw colour=4", "line 3"),
    ("out_scale=0 ", "", "line 3"),
    ("out_scale=0 ", "out_scale=-1 ", "line 3: out_scale"),
    ("out_bits=8", "out_bits=9", "line 3: out_bits must be from 2 to 8"),
    ("out_bits=8", "out_bits=eight", 'line 3: "eight" must be a number'),
    ("out_bits=8", "out_bits=99999999999999999999999", "line 3: .*must be a number"),
    ("kernel=2,2", "kernel=2", "line 4: kernel"),
    ("kernel=2,2", "kernel=2,2,2", "line 4: kernel"),
    ("kernel=2,2", "kernel=2,", "line 4"),
    ("kernel=2,2", "kernel=0,2", "line 4: kernel"),
    ("stride=2,2", "stride=0,2", "line 4: stride"),
    ("padding=0,0", "padding=-1,0", "line 4: padding"),
    ("ceil_mode=0", "ceil_mode=2", "line 4: ceil_mode"),
    ("count_include_pad=0", "count_include_pad=1", "line 4: count_include_pad must be 0 for max"),
    ("count_include_pad=0", "count_include_pad=0 out_scale=0 out_bits=8", "line 4: "),
    ("pool 2 = 1", "pool 2 = 0", "line 4: the first input"),
    ("shape=0,-1", "shape=-1,-1", "line 5: shape"),
    ("shape=0,-1", "shape=0,-2", "line 5: shape"),
    ("shape=0,-1", "shape=1,1,1,1,1,1,1,1,-1", "line 5: shape"),
    ("dequantize 4 = 3", "dequantize 4 = 3 out_scale=0 out_bits=8", "line 6"),
    ("dequantize 4 = 3", "dequantize 4 = 0", "line 6: the first input"),
    ("dequantize 4 = 3", "index_select 4 = 3 index=0", "line 6: .*count"),
    ("dequantize 4 = 3", "index_select 4 = 3 index=0 count=0", "line 6: count"),
    ("dequantize 4 = 3", "index_select 4 = 0 index=0 count=1", "line 6: the first input"),
    ("dequantize 4 = 3", f"index_put 4 = 3 0 {PUT}", "line 6: index_put keeps the scale of its first input"),
    ("dequantize 4 = 3", f"index_put 4 = 3 3 {PUT} out_scale=0 out_bits=8", "line 6: index_put adds float32 values"),
    ("dequantize 4 = 3", f"index_put 4 = 3 0 {PUT.replace('=1', '=256')}", "line 6: terms"),
    ("output 4", "output 0", "line 7: .*made by a step"),
    ("output 4", "output 9", "line 7"),
    ("output 4 layout=same\n", "", "there must be an input and an output"),
    ("output 4 layout=same\n", "output 4 layout=same\noutput 4 layout=same\n", "line 8: .*given once"),
    ("output 4 layout=same\n", "output 2 layout=same\noutput 3 layout=same\n", "line 8: .*share no memory"),
    ("output 4 layout=same", "output 4", "line 7"),
    ("output 4 layout=same\n", "output 4 layout=same\ninput 5\n", "line 8"),
    ("output 4 layout=same\n", "output 4 layout=same\ndequantize 5 = 3\n", "line 8"),
    ("output 4 layout=same\n", "output 4 layout=same\n\n", "line 8"),
    ("output 4 layout=same\n", "output 4 layout=same\r\n", "line 7"),
]


def test_the_good_program_is_good():
    assert qk.ops.network([torch.randn(2, 3, 4, 4)], CONSTANTS, GOOD)[0].shape == (2, 12)
    assert encode(decode(GOOD)) == GOOD


@pytest.mark.parametrize(("old", "new", "message"), WRONG)
def test_a_program_that_is_not_well_formed_is_refused(old, new, message):
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(RuntimeError, match="qk::network: program must be well formed, got .*" + message):
        qk.ops.network([torch.randn(2, 3, 4, 4)], CONSTANTS, text)
    with pytest.raises(ValueError, match="qk: program, .*" + message):
        decode(text)


ATTENTION = """qk-program 1
input 0 out_scale=0 out_bits=8
input 1 out_scale=0 out_bits=8
input 2
attention 3 = 0 0 0 1 heads=2 score_scale=1065353216
output 3 layout=same
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("0 0 0 1", "0 0", "line 5: attention takes 3 to 4 inputs, not 2"),
        ("0 0 0 1", "0 0 2", "line 5: .*attention take"),
        ("0 0 0 1", "0 0 0 2", "line 5: .*attention take"),
        ("heads=2", "heads=0", "line 5: heads must be"),
        ("heads=2 ", "", "line 5: .*heads"),
        ("score_scale=1065353216", "score_scale=0", "line 5: score_scale must be"),
        ("score_scale=1065353216", "score_scale=2139095040", "line 5: score_scale must be"),
    ],
)
def test_attention_that_is_not_well_formed_is_refused(old, new, message):
    text = ATTENTION.replace(old, new, 1)
    x = torch.zeros(2, 3, 8, dtype=torch.uint8)
    inputs = [x, torch.ones(2, 1, 3, dtype=torch.uint8), torch.zeros(1)]
    qk.ops.network(inputs, CONSTANTS, ATTENTION)
    with pytest.raises(RuntimeError, match="qk::network: program must be well formed, got .*" + message):
        qk.ops.network(inputs, CONSTANTS, text)
    with pytest.raises(ValueError, match="qk: program, .*" + message):
        decode(text)


@pytest.mark.parametrize(
    ("shape", "mask", "message"),
    [
        ((2, 8), (2, 1, 3), r"line 5, attention 3: q must be \[B, queries, heads \* D\], heads = 2, got \[2, 8\]"),
        ((2, 3, 7), (2, 1, 3), r"line 5, attention 3: q must be"),
        ((2, 3, 8), (2, 1, 4), r"line 5, attention 3: mask must be \[B or 1, queries or 1, keys\]"),
        ((2, 3, 8), (2, 3), r"line 5, attention 3: mask must be"),
        ((1, 33026, 2), (1, 1, 33026), r"line 5, attention 3: keys must be at most 33025"),
    ],
)
def test_attention_of_other_sizes_is_refused(shape, mask, message):
    inputs = [torch.zeros(shape, dtype=torch.uint8), torch.ones(mask, dtype=torch.uint8), torch.zeros(1)]
    with pytest.raises(RuntimeError, match=message):
        qk.ops.network(inputs, CONSTANTS, ATTENTION)


@pytest.mark.parametrize("text", ["", "\n", "\0", "qk-program 1", "qk-program 1\n", "input 0", "=" * 10000, "ü" * 99])
def test_no_program_at_all_is_refused(text):
    with pytest.raises(RuntimeError, match="qk::network: program must be well formed"):
        qk.ops.network([torch.randn(2, 3, 4, 4)], CONSTANTS, text)
    with pytest.raises(ValueError, match="qk: program, "):
        decode(text)


def mutated(rnd, text):
    """text with a few words, numbers, lines or characters changed."""
    lines = text.splitlines()
    for _ in range(rnd.choice((1, 1, 2, 3))):
        i = rnd.randrange(len(lines))
        words = lines[i].split(" ")
        j = rnd.randrange(len(words))
        way = rnd.randrange(8)
        if way == 0:
            words[j] = rnd.choice(rnd.choice(lines).split(" "))
        elif way == 1:
            words.insert(j, rnd.choice(rnd.choice(lines).split(" ")))
        elif way == 2:
            del words[j]
        elif way in (3, 4):
            digits = [k for k, c in enumerate(words[j]) if c.isdigit()]
            if digits:
                k = rnd.choice(digits)
                words[j] = (
                    words[j][:k] + rnd.choice(("0", "1", "7", "-1", "63", "4096", "2147483647", "")) + words[j][k + 1 :]
                )
        elif way == 5 and words[j]:
            k = rnd.randrange(len(words[j]))
            words[j] = words[j][:k] + rnd.choice("=, -x\0") + words[j][k + 1 :]
        lines[i] = " ".join(words)
        if way == 6:
            lines.insert(rnd.randrange(len(lines) + 1), lines.pop(i))
        elif way == 7 and len(lines) > 1:
            del lines[i]
    return "\n".join(lines) + "\n"


def attempt(function, *arguments):
    """What function gives, and None; or None and the message of its error."""
    try:
        return function(*arguments), None
    except (RuntimeError, ValueError) as error:
        return None, str(error)


@pytest.mark.parametrize("part", range(8))
def test_a_changed_program_runs_or_raises(part, make_weight):
    rnd = random.Random(part)
    ran = 0
    for seed in range(5):
        net = random_net(make_weight, "cpu", seed, steps=8)
        inputs, constants, text = net.call()
        for _ in range(60):
            changed = mutated(rnd, text)
            program, message = attempt(decode, changed)
            well_formed = message is None
            got, message = attempt(qk.ops.network, inputs, constants, changed)
            if message is not None:
                assert message.startswith("qk::network: ")
                assert well_formed != message.startswith("qk::network: program must be well formed"), changed
                continue
            assert well_formed
            ran += 1
            fake = torch.ops.qk.network([x.to("meta") for x in inputs], [c.to("meta") for c in constants], changed)
            assert [(t.shape, t.dtype, t.stride()) for t in got] == [(t.shape, t.dtype, t.stride()) for t in fake]
            offsets = {step.constants["weight"] for step in program.steps if "weight" in step.constants}
            if offsets <= set(net.weights):
                equal(got, interpret(program, inputs, constants, net.weights))
    assert ran > 15


# --- tensors that do not fit ------------------------------------------------------------------------------------------


def damaged(index, change):
    def damage(inputs, constants):
        constants[index] = change(constants[index].clone())

    return damage


def put(at, value):
    def change(x):
        x[at] = value
        return x

    return change


def headless(x):
    x[:4] = 0
    return x


def other_bits(x):
    x[4] = 8
    return x


BAD = {
    "no constants": (lambda i, c: c.clear(), r"constants must be 4 tensors"),
    "a constant too much": (lambda i, c: c.append(c[0]), r"constants must be 4 tensors"),
    "steps of another type": (damaged(0, torch.Tensor.double), r"constants\[0\], the steps, must be contiguous Float"),
    "zeros of another type": (damaged(1, torch.Tensor.float), r"constants\[1\], the zeros, must be contiguous Int"),
    "floats of two axes": (damaged(2, lambda x: x[None]), r"constants\[2\], the floats, must be contiguous Float"),
    "bytes with strides": (damaged(3, lambda x: torch.stack([x, x], 1)[:, 0]), r"constants\[3\], the bytes, must be"),
    "bytes elsewhere": (damaged(3, lambda x: x.to("meta")), "tensors must be on one device"),
    "fewer zeros": (damaged(1, lambda x: x[1:]), r"zeros, must be as many as steps"),
    "fewer scales": (lambda i, c: c.__setitem__(slice(0, 2), [c[0][:2], c[1][:2]]), "must be steps of .* scales"),
    "fewer floats": (damaged(2, lambda x: x[:-1]), r"line \d+, gemm \d+: .* must be inside of the \d+ floats"),
    "fewer bytes": (damaged(3, lambda x: x[:-1]), r"line \d+, gemm \d+: weight must be inside of the \d+ bytes"),
    "no weights": (damaged(3, lambda x: x[:0]), r"line 4, conv2d 2: weight must be inside"),
    "bytes that are no weight": (damaged(3, headless), r"line 4, conv2d 2: weight must be prepacked from"),
    "a weight of other bits": (damaged(3, other_bits), r"line 4, conv2d 2: weight must be prepacked from"),
    "a step of 0": (damaged(0, put(1, 0.0)), "step 1 must be positive and finite"),
    "a step that is NaN": (damaged(0, put(1, float("nan"))), "step 1 must be positive and finite"),
    "a step that is infinite": (damaged(0, put(1, float("inf"))), "step 1 must be positive and finite"),
    "a zero below 0": (damaged(1, put(2, -1)), "zero 2 must be a code from 0 to 255"),
    "a zero above all codes": (damaged(1, put(2, 256)), "zero 2 must be a code from 0 to 255"),
    "no input": (lambda i, c: i.clear(), "inputs must be one tensor or more"),
    "two inputs": (lambda i, c: i.append(i[0]), "inputs must be 1 tensors, got 2"),
    "another type": (lambda i, c: i.__setitem__(0, i[0].double()), r"inputs\[0\] must be float32"),
    "codes": (lambda i, c: i.__setitem__(0, i[0].byte()), r"inputs\[0\] must be float32"),
    "no axis": (lambda i, c: i.__setitem__(0, torch.zeros(())), r"line 3, quantize 1: the input must be \[B, C, ...\]"),
    "three axes": (lambda i, c: i.__setitem__(0, i[0][0]), r"line 4, conv2d 2: the input must be \[B, H, W, C\]"),
    "other channels": (lambda i, c: i.__setitem__(0, i[0][:, :2]), r"line 4, conv2d 2: weight must be"),
    "no channels": (lambda i, c: i.__setitem__(0, i[0][:, :0]), r"inputs\[0\] must be positive"),
    "no pixels": (lambda i, c: i.__setitem__(0, i[0][..., :0]), r"inputs\[0\] must be positive"),
    "nothing, but huge": (lambda i, c: i.__setitem__(0, torch.empty(0, 3, 2**31, 1)), "inputs.0. must be positive"),
    "nothing, but of 2^62": (
        lambda i, c: i.__setitem__(0, torch.empty(0, 3, 2**30, 2**30)),
        "inputs.0. must be at most",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("warm", [False, True])
def test_tensors_that_do_not_fit_are_refused(name, warm, make_weight):
    damage, message = BAD[name]
    inputs, constants, text = chain(make_weight).call()
    if warm:
        qk.ops.network(inputs, constants, text)
    damage(inputs, constants)
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        qk.ops.network(inputs, constants, text)


def test_shapes_that_do_not_fit_are_refused(make_weight):
    def net():
        one = Net(make_weight)
        return one, coded(one, 2, 4, 4, 8)[0], coded(one, 2, 4, 4, 3)[0], coded(one, 2, 8)[0]

    cases = [
        ("add", (0, 1), {"activation": "none"}, r"add 3: the second input must be of the shape of the first"),
        ("multiply", (0, 1), {"activation": "none"}, r"multiply 3: the second input must be the gate \[2, 1, 1, 8\]"),
        ("multiply", (2, 2), {"activation": "none"}, r"multiply 3: the first input must be \[B, H, W, C\]"),
        ("pool", (2,), POOL | {"mode": "max"}, r"pool 3: the input must be \[B, H, W, C\]"),
        ("pool", (0,), POOL | {"mode": "max", "padding": (2, 0)}, "padding must be at most half of the kernel"),
        ("pool", (0,), POOL | {"mode": "average", "dilation": (2, 1)}, "dilation must be 1 for mode average"),
        ("pool", (0,), POOL | {"mode": "max", "kernel": (7, 3)}, "H of x must be at least as large"),
        ("reshape", (0,), {"shape": (3, -1)}, "reshape 3: shape must be one of as many values"),
        ("reshape", (0,), {"shape": (2, 4, 4)}, "reshape 3: shape must be one of as many values"),
        ("reshape", (0,), {"shape": (0, 0, 0, 0, 0)}, "reshape 3: shape must be one that copies sizes"),
        ("reshape", (0,), {"shape": (2**31 - 1,) * 3}, "reshape 3: shape must be"),
    ]
    for op, inputs, more, message in cases:
        one, *values = net()
        made = Builder.step(one, op, *(values[i] for i in inputs), **more)
        if op == "reshape":
            made = Builder.step(one, "dequantize", made)
        one.output(made)
        with pytest.raises(RuntimeError, match=message):
            qk.ops.network(*one.call())


@pytest.mark.parametrize("op", ["gemm", "concat", "index_select", "index_put"])
def test_rows_of_no_values_are_refused_or_give_none(op, make_weight):
    """A size of 0 in the place of one that is divided by."""
    net = Net(make_weight)
    x, scale = coded(net, 0)
    more = {"index": torch.zeros(1, dtype=torch.int32), "source": torch.zeros(1, 1, dtype=torch.int32)}
    if op == "gemm":
        weight = make_weight((4, 8), 4, "cpu")
        named = {"weight": weight.prepacked, "weight_step": weight.step, "bits": 4, "activation": "none"}
        made = Builder.step(net, op, x, **named)
    elif op == "concat":
        net.output(Builder.step(net, op, x, x, scale=scale))
        assert qk.ops.network(*net.call())[0].shape == (0,)
        return
    elif op == "index_select":
        made = Builder.step(net, op, x, index=more["index"])
    else:
        floats = net.given(torch.zeros(0))
        made = Builder.step(net, op, floats, floats, **more, activation="none")
    net.output(made)
    with pytest.raises(RuntimeError, match="qk::network"):
        qk.ops.network(*net.call())


@pytest.mark.parametrize(
    ("bits", "more", "message"),
    [
        (8, {}, "x_bits must be at most 6"),
        (6, {"stride": (2, 1)}, "stride must be 1"),
        (6, {"dilation": (1, 2)}, "dilation must be 1"),
    ],
)
def test_weights_for_winograd_elsewhere_are_refused(bits, more, message, make_weight):
    net = Net(make_weight)
    net.output(net.layer("conv2d", coded(net, 2, 9, 8, 20, bits=bits)[0], shape=(20, 3, 3, 20), winograd=True, **more))
    with pytest.raises(RuntimeError, match=r"qk::network: line 3, conv2d 1: " + message):
        qk.ops.network(*net.call())


def test_codes_above_their_width_are_refused(make_weight):
    net = Net(make_weight)
    x, scale = coded(net, 2, 5, bits=4)
    net.output(net.step("lookup", x, table=net.table(scale), scale=scale))
    inputs, constants, text = net.call()
    qk.ops.network(inputs, constants, text)
    with pytest.raises(RuntimeError, match=r"inputs\[0\] must be codes below 2\^out_bits"):
        qk.ops.network([inputs[0] + 16], constants, text)
    constants[3][7] = 16
    with pytest.raises(RuntimeError, match=r"line 3, lookup 1: table must be codes below 2\^out_bits"):
        qk.ops.network(inputs, constants, text)
