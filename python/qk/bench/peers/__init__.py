"""Other runtimes. Each module is one of them, needs packages of its own, and is left out by name without them.

A module has any of gemm(problem, threads), conv(problem, threads), bag(problem, threads) and
network(network, threads, cache), which yield candidates, and PACKAGES, whose versions stand beside the figures.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

from qk import machine

MODULES = {
    "torch": "qk.bench.peers.with_torch",
    "onnxruntime": "qk.bench.peers.with_onnxruntime",
    "openvino": "qk.bench.peers.with_openvino",
    "zentorch": "qk.bench.peers.with_zentorch",
    "fbgemm": "qk.bench.peers.with_fbgemm",
}


@cache
def installed() -> tuple[dict[str, ModuleType], dict[str, str]]:
    """The peers that can be imported here, and why the others cannot."""
    found, missing = {}, {}
    for name, module in MODULES.items():
        try:
            found[name] = importlib.import_module(module)
        except Exception as error:  # a wheel may fail in any way that its libraries do
            missing[name] = str(error).splitlines()[0] if str(error) else type(error).__name__
    return found, missing


def versions() -> dict[str, str]:
    """Of the packages of installed peers."""
    packages = [package for module in installed()[0].values() for package in module.PACKAGES]
    return {package: version for package in packages if (version := machine.installed_version(package))}
