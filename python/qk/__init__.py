"""Post-training quantization of PyTorch models to 2, 4 and 8 bits, with the kernels that run them."""

from qk import ops
from qk._native import active_isa, build_facts, force_isa, usable_isas
from qk.calibrate import calibrate, correct_bias
from qk.calibrate.smooth import smooth
from qk.deploy import convert, fuse, load, load_table, quantize_embedding, quantize_table_file, save
from qk.errors import QkError
from qk.flow import Result, quantize
from qk.methods import param_groups, reconstruct, trainable, tune
from qk.methods.gptq import gptq
from qk.prepare import prepare
from qk.prepare.equalize import equalize
from qk.prepare.unclip import unclip
from qk.spec import Plan, QuantSpec, Recipe, Tuning

# qk.prepare and qk.calibrate are the functions; `from qk.prepare.links import ...` still finds the folders.
__all__ = [
    "Plan",
    "QkError",
    "QuantSpec",
    "Recipe",
    "Result",
    "Tuning",
    "active_isa",
    "build_facts",
    "calibrate",
    "convert",
    "correct_bias",
    "equalize",
    "force_isa",
    "fuse",
    "gptq",
    "load",
    "load_table",
    "ops",
    "param_groups",
    "prepare",
    "quantize",
    "quantize_embedding",
    "quantize_table_file",
    "reconstruct",
    "save",
    "smooth",
    "trainable",
    "tune",
    "unclip",
    "usable_isas",
]
