"""Methods that learn: rounding and steps against the float model's own outputs, or all of it on labels."""

from qk.methods.brecq import reconstruct
from qk.methods.lsq import param_groups, trainable
from qk.methods.tune import tune

__all__ = ["param_groups", "reconstruct", "trainable", "tune"]
