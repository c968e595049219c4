"""Loads the compiled objects: the base one always, the CUDA one only beside a CUDA build of torch."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

_here = Path(__file__).parent
_base = _here / "libqk_ops.so"
if not _base.exists():
    raise ImportError(f"qk: {_base} must exist, but this copy of qk was not built. Install it: pip install .")
torch.ops.load_library(str(_base))

from qk._core import active_isa, build_facts, force_isa, usable_isas  # noqa: E402

cuda_error: str | None = None  # why the CUDA kernels are not there; None when they are


def _load_cuda() -> str | None:
    library = _here / "libqk_cuda.so"
    if not library.exists():
        return "this build of qk has no CUDA kernels"
    if torch.version.cuda is None or not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is a build without CUDA"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        warnings.warn(f"qk: the CUDA kernels did not load ({error}); CPU operators work.", stacklevel=3)
        return str(error)
    return None


cuda_error = _load_cuda()
active_isa()  # chosen now: a QK_ISA that cannot run here is an error at once, and no operator reads the environment

__all__ = ["active_isa", "build_facts", "cuda_error", "force_isa", "usable_isas"]
