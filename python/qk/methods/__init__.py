"""Methods that learn: rounding and steps against the float model's own outputs."""

from qk.methods.brecq import reconstruct
from qk.methods.multipoint import multipoint, overhead

__all__ = ["multipoint", "overhead", "reconstruct"]
