"""What a recipe's fields of several values hold: SPARQ's windows, embedding tables, training. Frozen and checked."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from qk.fields import STRICT, parsed, refuses_in_words

Window = Literal["5opt", "3opt", "2opt", "6opt", "7opt"]
RangeMethod = Literal["symmetric", "asymmetric", "greedy", "greedy+", "golden", "histogram", "histogram-brute"]
TableMethod = Literal[RangeMethod, "kmeans", "two-tier"]


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class Sparq:
    """SPARQ: the 8-bit codes of a layer's input cut to windows of fewer bits (docs/methods/sparq.md).

    window: "5opt", "3opt" and "2opt" keep 4 bits at 5, 3 or 2 shifts, "6opt" keeps 3 bits, "7opt" 2. round: to the
    nearest value of the window; else what lies below it is cut off.
    pairs: which two values share their bits, so that one beside a 0 keeps twice as many. "channels": neighbours 2i and
    2i + 1 along the channels. "weights": those that the at most two weights other than 0 among each four read (2:4
    sparse weights). "none": no pairs, to see what they are worth.
    signed: also where the code of 0 is not code 0; distances from it are cut. Else such a layer keeps its whole codes.
    """

    window: Window = "5opt"
    round: bool = True
    pairs: Literal["channels", "weights", "none"] = "channels"
    signed: bool = False


def _named_window(value: Any) -> Any:
    """The name of a window alone stands for a Sparq with that window."""
    return {"window": value} if isinstance(value, str) else value


Cutting = Annotated[Sparq | None, BeforeValidator(_named_window)]


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class Embeddings:
    """How embedding tables are quantized (docs/methods/embedding.md).

    bits: of a code; kmeans and two-tier have 2 or 4. method: how a row's codes are chosen. scale_dtype: of what a row
    keeps beside them. overrides: name pattern -> those of these fields that differ there; the last that matches wins.
    """

    bits: Literal[2, 4, 8] = 4
    method: TableMethod = "greedy"
    scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits == 8 and self.row_kind != "affine":
            raise ValueError(f"bits must be 2 or 4 with {self.method}, as a book of 256 values saves nothing, got 8")
        for pattern, changed in self.overrides.items():
            self._with(changed, pattern)

    def for_table(self, name: str) -> Embeddings:
        """What holds for one table, without overrides."""
        changed: dict[str, Any] = {}
        for pattern, fields in self.overrides.items():
            changed |= fields if fnmatchcase(name, pattern) else {}
        return self._with(changed, name)

    def _with(self, changed: dict[str, Any], name: str) -> Embeddings:
        fields = {"bits": self.bits, "method": self.method, "scale_dtype": self.scale_dtype}
        if unknown := changed.keys() - fields:
            raise ValueError(f"overrides for {name} must be of {', '.join(fields)}, got {', '.join(sorted(unknown))}")
        return parsed(Embeddings, fields | changed, f"overrides for {name}")

    @property
    def row_kind(self) -> str:
        """What a row keeps beside its codes, as qk.ops.embedding_bag names it."""
        return row_kind(self.method)

    def describe(self) -> str:
        """In short: 4 bits greedy."""
        return f"{self.bits} bits {self.method}"


def row_kind(method: str) -> str:
    """Of the rows that a method makes: affine, codebook or shared."""
    return {"kmeans": "codebook", "two-tier": "shared"}.get(method, "affine")


def _width_alone(value: Any) -> Any:
    """A number of bits alone stands for Embeddings of that width."""
    return {"bits": value} if isinstance(value, int) and not isinstance(value, bool) else value


Tables = Annotated[Embeddings | None, BeforeValidator(_width_alone)]


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class Tuning:
    """How to train with method "lsq", beside Recipe's seed. None follows from the narrowest weights, as in the paper.

    epochs: 90, or 1 where all weights have 8 bits. lr: of weights and steps, 0.01, or 0.001 at 8 bits; a cosine takes
    it to 0. weight_decay: of weights; by the width of each, 1e-4 from 4 bits on, 0.5e-4 at 3, 0.25e-4 at 2.
    steps: one for each output "channel" of a weight, or one for the whole "tensor". start: of the steps, "calibrated"
    or the "paper"'s 2 mean|v| / sqrt(Q_P). count: N of the gradient scale 1 / sqrt(N Q_P) for activations, the
    "features" of one sample or the "values" of a batch. distill: "none" trains on labels; "soft" on the float model's
    output too, with equal weight; "features" also on the outputs of its units. patience: epochs without a better score
    after which training ends. max_norm: of the gradient of everything that learns; a longer one is cut to it, which
    networks with folded BatchNorms need (docs/methods/lsq.md). None: never.
    """

    epochs: int | None = Field(default=None, ge=1)
    lr: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    steps: Literal["channel", "tensor"] = "channel"
    start: Literal["calibrated", "paper"] = "calibrated"
    count: Literal["features", "values"] = "features"
    distill: Literal["none", "soft", "features"] = "none"
    patience: int | None = Field(default=None, ge=1)
    max_norm: float | None = Field(default=1.0, gt=0)
