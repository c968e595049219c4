"""Methods that learn: rounding and steps against the float model's own outputs."""

from qk.methods.brecq import reconstruct

__all__ = ["reconstruct"]
