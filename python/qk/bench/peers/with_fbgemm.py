"""FBGEMM's table-batched embedding for inference."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

from qk.bench.problems import Bag
from qk.bench.rows import Candidate, meets

PACKAGES = ("fbgemm-gpu-cpu",)


def bag(p: Bag, threads: int) -> Iterable[Candidate]:
    for bits, kind in ((8, SparseType.INT8), (4, SparseType.INT4), (2, SparseType.INT2)):
        spec = [("table", p.rows, p.cols, kind, EmbeddingLocation.HOST)]
        module = IntNBitTableBatchedEmbeddingBagsCodegen(spec, device="cpu", output_dtype=SparseType.FP32)
        module.initialize_weights()
        codes, numbers = p.data.halves(bits)
        weights, shifts = module.split_embedding_weights()[0]
        weights.copy_(codes)
        shifts.copy_(numbers)
        ends = torch.cat([p.data.offsets, torch.tensor([p.data.indices.numel()])]).int()
        run = partial(module, p.data.indices.int(), ends)
        expected = p.data.expected(bits)
        yield Candidate(f"fbgemm {bits}-bit rows", f"W{bits}", run, lambda r=run, e=expected: meets(r(), e, 0.02))
