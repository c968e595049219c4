"""From the prepared model to integer layers, and to a checkpoint and back."""

from qk.calibrate.table import Table, quantize_table
from qk.deploy.checkpoint import check_state, checkpoint_bytes, file_bytes, load, save
from qk.deploy.convert import Info, convert
from qk.deploy.embedding import QEmbedding, QEmbeddingBag, pack_table, quantize_embedding, table_modules
from qk.deploy.fuse import FusedModel, fuse, unfused
from qk.deploy.measure import LayerMeasure, LayerTimes, all_layer_times, layer_errors, measure_layers, table_sqnr
from qk.deploy.modules import IntegerLayer, QConv2d, QLinear, definition
from qk.deploy.table_file import load_table, quantize_table_file
from qk.deploy.tune import tune_kernels

__all__ = [
    "FusedModel",
    "Info",
    "IntegerLayer",
    "LayerMeasure",
    "LayerTimes",
    "QConv2d",
    "QEmbedding",
    "QEmbeddingBag",
    "QLinear",
    "Table",
    "all_layer_times",
    "check_state",
    "checkpoint_bytes",
    "convert",
    "definition",
    "file_bytes",
    "fuse",
    "layer_errors",
    "load",
    "load_table",
    "measure_layers",
    "pack_table",
    "quantize_embedding",
    "quantize_table",
    "quantize_table_file",
    "save",
    "table_modules",
    "table_sqnr",
    "tune_kernels",
    "unfused",
]
