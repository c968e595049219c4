"""Errors and speed of the methods for embedding tables: the table of docs/methods/embedding.md."""

import time

import torch

from qk.calibrate.rows import METHODS
from qk.deploy import quantize_table
from qk.machine import cpu_name

ROWS, COLS, THREADS = 20_000, 64, 2


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    tables = {"normal": torch.randn(ROWS, COLS), "Laplace": torch.distributions.Laplace(0.0, 1.0).sample((ROWS, COLS))}
    print(f"{ROWS} rows of {COLS}, {THREADS} threads, {cpu_name()}\n")
    print(
        "| method | " + " | ".join(f"{name}, {bits} bits" for name in tables for bits in (4, 2)) + " | rows/s, 4 bits |"
    )
    print("|---|" + "---:|" * 5)
    for method in METHODS:
        errors, speeds = [], []
        for x in tables.values():
            for bits in (4, 2):
                begin = time.perf_counter()
                found = quantize_table(x, bits, method)
                if bits == 4:
                    speeds.append(ROWS / (time.perf_counter() - begin))
                errors.append(float((found.values() - x).norm() / x.norm()))
        print(f"| {method} | " + " | ".join(f"{e:.4f}" for e in errors) + f" | {min(speeds):,.0f} |")


if __name__ == "__main__":
    main()
