"""Post-training quantization of PyTorch models to 2, 4 and 8 bits, with the kernels that run them."""

from qk import ops
from qk._native import active_isa, build_facts, force_isa, usable_isas

__all__ = ["active_isa", "build_facts", "force_isa", "ops", "usable_isas"]
