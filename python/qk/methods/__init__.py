"""Methods that learn: rounding and steps against the float model's own outputs."""

from qk.methods.brecq import reconstruct
from qk.methods.sparq import choose_windows, input_statistics, set_windows

__all__ = ["choose_windows", "input_statistics", "reconstruct", "set_windows"]
