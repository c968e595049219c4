"""Methods that learn: rounding and steps against the float model's own outputs, or all of it on labels."""

from qk.methods.brecq import reconstruct
from qk.methods.lsq import param_groups, trainable
from qk.methods.multipoint import multipoint, overhead
from qk.methods.sparq import choose_windows, input_statistics, set_windows
from qk.methods.tune import tune

__all__ = [
    "choose_windows",
    "input_statistics",
    "multipoint",
    "overhead",
    "param_groups",
    "reconstruct",
    "set_windows",
    "trainable",
    "tune",
]
