"""Post-training quantization of PyTorch models to 2, 4 and 8 bits, with the kernels that run them."""

from qk import ops
from qk._native import active_isa, build_facts, force_isa, usable_isas
from qk.calibrate import calibrate, correct_bias, match_statistics
from qk.calibrate.smooth import smooth
from qk.cheapest import cheapest
from qk.deploy import convert, fuse, load, load_table, quantize_embedding, quantize_table_file, save
from qk.errors import QkError
from qk.flow import Result, quantize
from qk.hago import Hardware, hago
from qk.methods import (
    choose_windows,
    input_statistics,
    multipoint,
    param_groups,
    reconstruct,
    set_windows,
    trainable,
    tune,
)
from qk.methods.gptq import gptq
from qk.options import Embeddings, Sparq, Tuning
from qk.pareto import pareto
from qk.prepare import apply_plan, prepare
from qk.prepare.equalize import equalize
from qk.prepare.unclip import unclip
from qk.search import LatencyTable, Search, search
from qk.spec import Budget, Plan, QuantSpec, Recipe

# qk.prepare and qk.calibrate are the functions; `from qk.prepare.links import ...` still finds the folders.
__all__ = [
    "Budget",
    "Embeddings",
    "Hardware",
    "LatencyTable",
    "Plan",
    "QkError",
    "QuantSpec",
    "Recipe",
    "Result",
    "Search",
    "Sparq",
    "Tuning",
    "active_isa",
    "apply_plan",
    "build_facts",
    "calibrate",
    "cheapest",
    "choose_windows",
    "convert",
    "correct_bias",
    "equalize",
    "force_isa",
    "fuse",
    "gptq",
    "hago",
    "input_statistics",
    "load",
    "load_table",
    "match_statistics",
    "multipoint",
    "ops",
    "param_groups",
    "pareto",
    "prepare",
    "quantize",
    "quantize_embedding",
    "quantize_table_file",
    "reconstruct",
    "save",
    "search",
    "set_windows",
    "smooth",
    "trainable",
    "tune",
    "unclip",
    "usable_isas",
]
