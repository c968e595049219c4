from __future__ import annotations
from collections.abc import Callable
from dataclasses import dataclass
from torch import Tensor

@dataclass
class Peer:
    """A run, and the float32 result that it came to."""
    name: str
    run: Callable[[], object]
    result: Callable[[], Tensor]
    width: str = "W8"
