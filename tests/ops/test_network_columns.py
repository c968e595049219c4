"""Columns that a program names: refused where they do not fit."""

import pytest
import torch

import qk
from networks import Net, coded
from qk.deploy.program import Builder


def test_columns_that_do_not_fit_are_refused(make_weight):
    index, source = torch.tensor([0, 1]).int(), torch.zeros(2, 2, dtype=torch.int32)
    put = {"index": index, "source": source, "activation": "none"}
    cases = [
        ("index_select", (0,), {"index": index + 7}, r"index_select 4: index must be a column from 0 to 7, got 8 at 1"),
        (
            "index_put",
            (1, 2),
            put | {"index": index - 1},
            r"index_put 4: index must be a column from 0 to 7, got -1 at 0",
        ),
        (
            "index_put",
            (1, 2),
            put | {"source": source + 3},
            r"index_put 4: source must be a column from -1 to 2, got 3",
        ),
        (
            "index_put",
            (1, 2),
            put | {"source": source - 2},
            r"index_put 4: source must be a column from -1 to 2, got -2",
        ),
        ("index_put", (1, 3), put, r"index_put 4: the second input must be of the shape of the first but for its last"),
        ("index_put", (1, 2, 3), put, r"index_put 4: the residual must be of the shape \[2, 4, 4, 8\], got \[2, 8\]"),
    ]
    for op, inputs, more, message in cases:
        net = Net(make_weight)
        floats = [net.given(torch.zeros(shape)) for shape in ((2, 4, 4, 8), (2, 4, 4, 3), (2, 8))]
        values = [net.step("quantize", floats[0], layout="same", scale=net.new_scale()), *floats]
        net.output(net.step("dequantize", values[0]))
        made = Builder.step(net, op, *(values[i] for i in inputs), **more)
        net.output(made)
        with pytest.raises(RuntimeError, match=message.replace(" 4:", f" {made}:")):
            qk.ops.network(*net.call())


def test_columns_are_looked_at_every_time_and_lie_where_numbers_may(make_weight):
    net = Net(make_weight)
    net.output(net.step("index_select", coded(net, 3, 8)[0], index=torch.tensor([7, 2]).int()))
    inputs, constants, text = net.call()
    qk.ops.network(inputs, constants, text)
    constants[3][3] = 1  # the high byte of the first
    with pytest.raises(RuntimeError, match="index must be a column from 0 to 7, got 16777223 at 0"):
        qk.ops.network(inputs, constants, text)
    with pytest.raises(RuntimeError, match="index must be at a multiple of 4 bytes, got 2"):
        qk.ops.network(inputs, constants, text.replace("index=0", "index=2"))
    aside = torch.cat([constants[3][:1], constants[3]])[1:]
    with pytest.raises(RuntimeError, match="the bytes, must be at a multiple of 4 bytes, got a view"):
        qk.ops.network(inputs, [*constants[:3], aside], text)
