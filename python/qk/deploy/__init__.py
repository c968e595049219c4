"""From the prepared model to integer layers, and to a checkpoint and back."""

from qk.deploy.checkpoint import checkpoint_bytes, float_bytes, load, save
from qk.deploy.convert import Info, convert
from qk.deploy.measure import LayerMeasure, layer_errors, measure_layers
from qk.deploy.modules import IntegerLayer, QConv2d, QLinear, definition

__all__ = [
    "Info",
    "IntegerLayer",
    "LayerMeasure",
    "QConv2d",
    "QLinear",
    "checkpoint_bytes",
    "convert",
    "definition",
    "float_bytes",
    "layer_errors",
    "load",
    "measure_layers",
    "save",
]
