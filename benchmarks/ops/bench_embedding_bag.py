"""Sums over bags of rows of a large table, beside torch's and fbgemm's packed tables and half precision.

Several sets of indices take turns, so that the rows of a call are not those that the caches still hold.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main, options
from qk.deploy.embedding import in_huge_pages, pack_table
from qk.ops.embedding_bag import reference

SETS = 8


def fbgemm_table(weight, bits, offsets):
    """A run of fbgemm's batched tables on the CPU with rows of as many bits; None where it is not installed."""
    try:
        import fbgemm_gpu  # noqa: F401
        from fbgemm_gpu.split_embedding_configs import SparseType
        from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
        from fbgemm_gpu.split_table_batched_embeddings_ops_inference import (
            IntNBitTableBatchedEmbeddingBagsCodegen as Tables,
        )
    except (ImportError, OSError):
        return None
    dtype = {2: SparseType.INT2, 4: SparseType.INT4, 8: SparseType.INT8}[bits]
    table = Tables(
        [("table", *weight.shape, dtype, EmbeddingLocation.HOST)], device="cpu", output_dtype=SparseType.FP32
    )
    table.initialize_weights()
    table.fill_random_weights()
    table(torch.zeros(1, dtype=torch.int64), torch.tensor([0, 1]))
    return lambda indices: table(indices, offsets)


def cases(args):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(args.rows, args.cols, generator=random)
    lengths = torch.randint(32, 65, (args.bags,), generator=random)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    sets = [torch.randint(0, args.rows, (int(offsets[-1]),), generator=random) for _ in range(SETS)]
    halves = {"bfloat16": weight.bfloat16(), "float16": weight.half()}

    def by_turns(run):
        turn = itertools.cycle(sets)
        return lambda: run(next(turn))

    for bits in (8, 4, 2):
        rows = in_huge_pages(pack_table(weight, bits, "float32" if bits == 8 else "float16")).to(args.device)
        bag = (bits, args.cols, "affine", "float32" if bits == 8 else "float16")

        def ours(indices, rows=rows, bag=bag):
            return qk.ops.embedding_bag(rows, indices, offsets, *bag, include_last_offset=True)

        def check(rows=rows, bag=bag):
            few = offsets[:9]
            indices = sets[0][: int(few[-1])]
            run = (rows, indices, few, *bag)
            assert torch.equal(
                qk.ops.embedding_bag(*run, include_last_offset=True), reference(*run, include_last_offset=True)
            )

        peers = {}
        name = {8: "byte", 4: "4bit", 2: "2bit"}[bits]
        packed = getattr(torch.ops.quantized, f"embedding_bag_{name}_prepack")(weight)
        theirs = getattr(torch.ops.quantized, f"embedding_bag_{name}_rowwise_offsets")
        peers[f"torch.ops.quantized {name}"] = by_turns(
            lambda indices, packed=packed, theirs=theirs: theirs(
                packed, indices, offsets, False, 0, False, None, None, True
            )
        )
        if run := fbgemm_table(weight, bits, offsets):
            peers[f"fbgemm int{bits}"] = by_turns(run)
        for half, table in halves.items():
            peers[f"torch {half}"] = by_turns(
                lambda indices, table=table: F.embedding_bag(
                    indices, table, offsets, mode="sum", include_last_offset=True
                )
            )
        yield Case(
            name=f"embedding_bag {bits} bits, {args.rows} x {args.cols}, {args.bags} bags of 32 to 64",
            check=check,
            ours=by_turns(ours),
            peers=peers,
            moved_bytes=int(offsets[-1]) * rows.shape[1] + 4 * args.bags * args.cols,
        )


if __name__ == "__main__":
    parser = options("Times embedding_bag.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--cols", type=int, default=128)
    parser.add_argument("--bags", type=int, default=512)
    main("embedding_bag", cases, parser)
