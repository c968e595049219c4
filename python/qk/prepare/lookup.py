"""What stands in the prepared model where an embedding table stood."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from qk import ops
from qk.ops.embedding_bag import embedding
from qk.options import Embeddings

KINDS = (nn.Embedding, nn.EmbeddingBag)


class QuantTable(nn.Module):
    """An Embedding or EmbeddingBag with packed rows beside its float ones.

    quantized False: the float module. True: lookups in `rows` uint8 [N, bytes of a row] and `books` float32 or None,
    by the operator of the integer module, hence with its bits. `spec` says how rows are read; calibration sets them,
    and `error`: length of their error over the length of the table. `weight` takes no gradient: a table has nothing to
    learn.
    """

    rows: Tensor | None
    books: Tensor | None

    def __init__(self, module: nn.Embedding | nn.EmbeddingBag, spec: Embeddings) -> None:
        super().__init__()
        # What models ask of the module (num_embeddings, padding_idx, ...) stays answered; its forward asks too.
        vars(self).update({k: v for k, v in vars(module).items() if k[0] != "_" and k != "training"})
        self.kind = kind_of(module)
        self.weight = nn.Parameter(module.weight.detach(), requires_grad=False)
        self.spec, self.quantized, self.error = spec, False, 0.0
        self.register_buffer("rows", None)
        self.register_buffer("books", None)

    @property
    def is_bag(self) -> bool:
        """Whether it stands for an EmbeddingBag."""
        return self.kind is nn.EmbeddingBag

    def set_rows(self, rows: Tensor, books: Tensor | None, error: float) -> None:
        """What calibration found."""
        self.rows, self.books, self.error = rows, books, error

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the float module."""
        if not self.quantized:
            return self.kind.forward(self, *args, **kwargs)
        assert self.rows is not None, "calibrate before quantizing"
        return self._bags(*args, **kwargs) if self.is_bag else self._rows(*args, **kwargs)

    def _rows(self, input: Tensor) -> Tensor:
        return embedding(self.rows, input, **self._form())

    def _bags(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        options = bag_options(self, offsets, per_sample_weights)
        return ops.embedding_bag(self.rows, input, offsets, **self._form(), **options)

    def _form(self) -> dict[str, Any]:
        spec = self.spec
        form = {"bits": spec.bits, "cols": self.weight.shape[1], "kind": spec.row_kind, "dtype": spec.scale_dtype}
        return form | {"books": self.books}


def bag_options(module: Any, offsets: Tensor | None, per_sample_weights: Tensor | None) -> dict[str, Any]:
    """How a call of a bag sums, as arguments of `qk.ops.embedding_bag`. module: with an EmbeddingBag's settings."""
    return {
        "mode": module.mode,
        "per_sample_weights": per_sample_weights,
        "include_last_offset": module.include_last_offset and offsets is not None,
        "padding_idx": module.padding_idx,
    }


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """nn.Embedding or nn.EmbeddingBag, if it is one."""
    return next((kind for kind in KINDS if isinstance(module, kind)), None)
