"""LSQ: forward and backward against the same mathematics in torch and torch's own learnable fake-quantize."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import main
from qk.bench.training import LSQ_SHAPES, lsq


def cases(args):
    for shape in LSQ_SHAPES:
        yield lsq(*shape, compiled=args.compile)


if __name__ == "__main__":
    main("lsq", cases)
