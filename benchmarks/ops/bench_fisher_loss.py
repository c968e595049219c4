"""The weighted reconstruction loss: value and gradient against the definition in eager torch."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from harness import main
from qk.bench.training import FISHER_SHAPES, fisher_loss


def cases(args):
    for weighted in (True, False):
        for name, shape in FISHER_SHAPES.items():
            yield fisher_loss(name, shape, weighted, args.compile, args.device)


if __name__ == "__main__":
    main("fisher_loss", cases)
