"""Files of devices: what is read, what is refused."""

import json

import pytest

from qk.errors import QkError
from qk.hago.hardware import Hardware

BYTE = {"inputs": "int8", "output": "int32"}
GOOD = {
    "name": "mine",
    "fallback": "float32",
    "arithmetic": "integer",
    "operators": {"conv2d": {"begins": True, "integer": [BYTE]}},
}


@pytest.mark.parametrize("name", Hardware.shipped())
def test_shipped_devices_load(name):
    device = Hardware.load(name)
    assert device.name == name
    assert Hardware.from_dict(device.to_dict()) == device


def test_the_issues_devices_are_there():
    wanted = {"x86_avx2", "x86_avx512_vnni", "nvidia_sm80", "nvidia_sm89", "nvidia_sm90", "arm_neon_dotprod"}
    assert wanted | {"int16_accumulator", "float_only"} == set(Hardware.shipped())


def test_json_is_read_too(tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(GOOD))
    assert Hardware.load(tmp_path / "mine.json") == Hardware.from_dict(GOOD)


def with_conv(**fields):
    return GOOD | {"operators": {"conv2d": {"begins": True, "integer": [BYTE | fields]}}}


def with_op(kind, **fields):
    return GOOD | {"operators": {kind: {"integer": [fields]}}}


MEASURED = Hardware.load("x86_avx2").to_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({k: v for k, v in GOOD.items() if k != "fallback"}, "fallback must be float32.*Add `fallback: float32`"),
        (with_conv(inputs="int7"), "int7"),
        (with_conv(output="float64"), "float64"),
        (with_conv(inputs=["int8", "int8", "int8"]), "2 input types"),
        (with_conv(output="int8"), "int16 or int32"),
        (with_conv(inputs=["int16", "int8"]), "up to 8 bits"),
        (with_conv(cost=-1), "cost must be 0 or more"),
        (with_conv(accumulator=64), "accumulator"),
        (with_conv(inputs=["uint8", "int8"]), "without uint8 where arithmetic is integer"),
        (GOOD | {"operators": {"conv9d": {"integer": [BYTE]}}}, "conv9d"),
        (GOOD | {"operators": {"conv2d": {"integer": []}}}, "must have a descriptor"),
        (GOOD | {"arithmetic": "float32"}, "uint8 activations"),
        (GOOD | {"operators": {"function": {"integer": [BYTE]}}}, "without function"),
        (GOOD | {"speed": 3}, "speed"),
        (with_op("relu", inputs="int32", output="int8"), "must give the type that it reads"),
        (with_op("avg_pool2d", inputs="int8", output="int8"), "must give its sums"),
        (with_op("concatenate", inputs=["int8"], output="int8"), "or one for all"),
        (with_op("add", inputs="int8", output="int16", cost="measure"), "number as cost"),
        (GOOD | {"operators": {"dense": {"integer": [BYTE, BYTE | {"inputs": "int4"}]}}}, "narrow types first"),
        (
            MEASURED
            | {"operators": MEASURED["operators"] | {"add": {"integer": [{"inputs": "uint8", "output": "int32"}]}}},
            "cost 0 beside measured",
        ),
        ([], "a mapping"),
    ],
)
def test_faults_are_named(data, message):
    with pytest.raises(QkError, match=message):
        Hardware.from_dict(data)


def test_files_that_are_none(tmp_path):
    with pytest.raises(QkError, match="one of arm_neon_dotprod"):
        Hardware.load("my_phone")
    (tmp_path / "bad.yaml").write_text("name: [")
    with pytest.raises(QkError, match="readable file of YAML"):
        Hardware.load(tmp_path / "bad.yaml")
