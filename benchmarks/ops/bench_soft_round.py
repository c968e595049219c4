"""Soft rounding: forward and backward against the definition in eager torch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import main
from qk.bench.training import SOFT_ROUND_SHAPES, soft_round


def cases(args):
    for name, shape in SOFT_ROUND_SHAPES.items():
        yield soft_round(name, shape, args.compile, args.device)


if __name__ == "__main__":
    main("soft_round", cases)
