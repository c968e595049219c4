"""Run by test_table_file.py: quantizes a table of a file; prints the MB of a piece, of the table and of the peak."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

from qk.deploy import quantize_table_file
from resident import Peak

ROWS, COLS = 1 << 16, 32


def main(folder: Path, method: str, chunk_rows: int) -> None:
    torch.set_num_threads(1)
    table = np.lib.format.open_memmap(folder / "x.npy", "w+", np.float32, (ROWS, COLS))
    generator = np.random.default_rng(0)
    for row in table:  # one at a time, so that nothing of its size was ever allocated
        row[:] = generator.standard_normal(COLS, np.float32)
    np.save(folder / "short.npy", table[:1000])
    del table
    quantize_table_file(folder / "short.npy", folder / "q", 4, method)  # what is loaded and allocated once
    with Peak() as peak:
        quantize_table_file(folder / "x.npy", folder / "q", 4, method, chunk_rows=chunk_rows)
    value = 4 / 2**20
    print(json.dumps({"piece": chunk_rows * COLS * value, "table": ROWS * COLS * value, "peak": peak.rise}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
