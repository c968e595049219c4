"""The machine that a figure was measured on."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from qk import _native


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("qk-torch")
    except PackageNotFoundError:
        return "not installed (run from its sources)"


def fingerprint() -> dict[str, str | int]:
    """What timings depend on; stands beside every figure."""
    facts = _native.build_facts()
    return {
        "cpu": cpu_name(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "instruction set": _native.active_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "qk": version(),
        "compiler": facts["compiler"],
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
