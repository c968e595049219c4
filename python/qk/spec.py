"""What is asked for: widths per layer (QuantSpec, Plan) and how to get there (Recipe). Frozen and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from qk.errors import fail
from qk.fields import STRICT, parsed, refuses_in_words
from qk.files import write_json
from qk.options import Cutting, Tables, Tuning

WeightBits = Literal[2, 3, 4, 8]  # as the kernels store them; 3 lies in 4
ActivationBits = Literal[2, 3, 4, 5, 6, 7, 8]
Ranges = Literal["minmax", "percentile", "mse", "kl", "lapq"]
Points = Literal[1, 2, 3]
Grid = Literal["mid-tread", "mid-rise"]
Exponent = Annotated[float, Field(ge=1)]  # of the rounding penalty; below 1 its slope has no bound
Alpha = Annotated[float, Field(ge=0, le=1)]


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class QuantSpec:
    """Widths of one layer. Both None: the layer stays in float, and `reason` says why.

    group_size: weights that share a step along K (K in the order kh, kw, C for a convolution); None is per output
    channel. symmetric: zero in the middle of the weight's codes; 8-bit weights always are, as their kernels need it.
    points: how many rows of codes an output channel may be a sum of (qk.multipoint); above 1 only for symmetric weights
    of 2 to 4 bits without groups.
    sparq: windows for the codes of the input, which have 8 bits then; the name of a window stands for its defaults.
    grid: "mid-tread" has 0 among a weight's levels; those of "mid-rise" lie at odd multiples of half a step on both
    sides of 0, as in LAPQ's released code. Its codes take a bit more (4 bits: 8), and no method that learns knows it.
    dynamic: each row of a Linear's input gets a step and zero of its own when it comes, instead of those that
    calibration found for all (docs/methods/dynamic.md). Not with sparq, and not for a convolution.
    """

    weights: WeightBits | None = 8
    activations: ActivationBits | None = 8
    group_size: int | None = Field(default=None, gt=0)
    symmetric: bool = False
    points: Points = 1
    reason: str = ""
    sparq: Cutting = None
    grid: Grid = "mid-tread"
    dynamic: bool = False

    def __post_init__(self) -> None:
        if (self.weights is None) != (self.activations is None):
            raise ValueError("weights and activations must both be widths, or both be null for a float layer")
        single = self.weights in (None, 8) or not self.symmetric or self.group_size is not None
        if self.points > 1 and single:
            raise ValueError("points above 1 need symmetric weights of 2 to 4 bits without group_size")
        if self.grid == "mid-rise" and (self.weights in (None, 8) or self.points > 1):
            raise ValueError("grid mid-rise needs weights of 2 to 4 bits and points 1")
        if self.sparq is None:
            return
        if self.dynamic:
            raise ValueError("dynamic must be false with sparq, whose windows are those of a step that is known")
        if self.activations != 8:
            raise ValueError(f"activations must be 8 with sparq, which cuts codes of 8 bits, got {self.activations}")
        if self.sparq.pairs == "weights" and (self.group_size is not None or self.points > 1):
            expected = "group_size must be null and points 1 with sparq.pairs weights, which need another order along K"
            raise ValueError(expected)

    @property
    def is_float(self) -> bool:
        """Whether the layer stays in float."""
        return self.weights is None

    @property
    def code_bits(self) -> int:
        """Bits of a weight's code: on the grid mid-rise codes count half steps."""
        assert self.weights is not None
        return self.weights if self.grid == "mid-tread" else {2: 3, 3: 4, 4: 8}[self.weights]

    @property
    def storage_bits(self) -> int:
        """Bits of a packed weight at rest."""
        return 4 if self.code_bits == 3 else self.code_bits

    @property
    def reads_plain_codes(self) -> bool:
        """Whether one step, found by calibration, turns the input into the codes that are multiplied."""
        return not self.dynamic and self.sparq is None

    @property
    def weight_symmetric(self) -> bool:
        """Whether every zero of the weight is the middle code."""
        return self.symmetric or self.weights == 8

    def describe(self) -> str:
        """Widths in short: W4A8, W4A8 dynamic, or float."""
        widths = f"W{self.weights}A{self.activations}"
        if self.is_float:
            return "float"
        widths += " dynamic" if self.dynamic else ""
        points = "" if self.points == 1 else f" in up to {self.points} points"
        grid = "" if self.grid == "mid-tread" else f" {self.grid}"
        return widths + grid + ("" if self.sparq is None else f" {self.sparq.window}") + points


SKIPPED = "named in the recipe's skip"


def float_spec(reason: str) -> QuantSpec:
    """Of a layer that stays in float, and why."""
    return QuantSpec(None, None, reason=reason)


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class Plan:
    """Layer name -> QuantSpec, in the order in which the layers run."""

    layers: dict[str, QuantSpec]

    def __getitem__(self, name: str) -> QuantSpec:
        return self.layers[name]

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML hold it; from_dict gives an equal one back."""
        return TypeAdapter(Plan).dump_python(self, mode="json")

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """Raises QkError for fields that do not fit, all of them named."""
        return parsed(Plan, data, "plan")

    def save(self, path: str | Path) -> Path:
        """As a JSON file, which `load` reads. Returns the path."""
        return write_json(path, self.to_dict(), "plan")

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Raises QkError for a file that holds no plan."""
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            got = f"{type(error).__name__}: {error}"
            raise fail("plan", str(path), "a JSON file with a plan, as of qk search", got) from error
        if not isinstance(data, dict):
            raise fail("plan", str(path), "a JSON object with layers", type(data).__name__)
        return Plan.from_dict(data)


Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class Budget:
    """What a network may cost at most (qk.search); all that are given hold at once.

    size_mb: of the checkpoint's tensors, in 10^6 bytes. latency_ms: of a call of the fused network on this machine.
    giga_bit_ops: of one sample, 10^9 multiply-accumulates times the bits of weight and activation. A share is of what
    the network costs with every layer at its widest.
    """

    size_mb: Positive | None = None
    latency_ms: Positive | None = None
    giga_bit_ops: Positive | None = None
    size_share: Share | None = None
    latency_share: Share | None = None
    bit_ops_share: Share | None = None

    def __post_init__(self) -> None:
        if not self.limits():
            raise ValueError("a budget must limit something, got no limit")

    def limits(self) -> dict[str, tuple[float | None, float | None]]:
        """Name of a cost -> its absolute limit and its share, where one of them is given."""
        both = {
            "size_mb": (self.size_mb, self.size_share),
            "latency_ms": (self.latency_ms, self.latency_share),
            "giga_bit_ops": (self.giga_bit_ops, self.bit_ops_share),
        }
        return {name: given for name, given in both.items() if given != (None, None)}


@refuses_in_words
@dataclass(frozen=True, config=STRICT)
class Recipe:
    """How to quantize. The defaults are BRECQ with learned activation steps.

    weights, activations: widths of every layer but the first and the last (of each head, where a model has several),
    which take `first_last` (None: no exception).
    group_size, symmetric: as in QuantSpec. skip: name patterns (fnmatch) of layers and tables to leave in float.
    overrides: name pattern -> fields of QuantSpec that differ there; the last pattern that matches wins.
    embeddings: how tables of Embedding and EmbeddingBag are quantized, or their bits alone; None: they stay in float.
    ranges: how a step is chosen before learning. method: "nearest" stops after that; "brecq" learns the rounding;
    "lsq" trains weights and steps on labels, as `tuning` says; "gptq" rounds column by column, with act_order those of
    large inputs first, for inputs from the "quantized" or the "float" prefix.
    first_output: width of the first layer's output, which the second to run reads: "plain" is that of every other
    layer's, as in LSQ; "first_last" is `first_last`, as in BRECQ's released code.
    additions: what one takes of a tensor that layers read too: "float" is the tensor as it came; "quantized" its values
    behind the layers' quantizer, as in BRECQ's released code.
    granularity: what is reconstructed together: a layer, a block, the blocks at one resolution, the whole net.
    loss: "fisher" weighs errors by squared gradients of the task loss; "fisher_full" lets the errors of a sample act
    together. order: "joint" learns rounding and steps at once; "weights_first" all rounding with float activations,
    then, in a quarter of the iterations, all steps.
    iterations, batch_size, weight_lr, act_lr: of learning, for each unit. penalty, warmup, beta: weight of the rounding
    penalty, the share of iterations without it, its exponent's start and end. drop: probability with which a value of
    the unit's input comes from the quantized prefix instead of the float one; 1.0 is BRECQ's, 0.5 QDrop's. drop_inside:
    the same at every quantizer inside the unit. precision: of the factors of large products while a unit is learned;
    "auto" is "bfloat16" where the processor multiplies that in tiles (AMX), else "float32". What is kept is judged in
    float32.
    equalize: qk.quantize scales channels so that weights on both sides of them have one range. smooth: alpha; it scales
    channels so that activations lose range to weights, the more the nearer alpha is to 1; "search" finds one for each
    place, or none. relu6: "relu" puts ReLU where a ReLU6 keeps either from scaling.
    points: as in QuantSpec, for layers of 2 to 4 bits, whose weights become symmetric. points_error: channels get
    points while their output's mean squared error is above this part of its mean square. points_budget: at most this
    part more of what points_cost says, spent where it lowers the error most; 0.1 where neither is given. points_cost:
    "both" multiply-adds and weights, half each, or "macs" or "rows" alone.
    memory_mb: for the cached inputs and outputs of a unit; beyond it they go to a file. seed: same seed, same bits.
    bias_correction: qk.quantize gives every layer a bias with which its mean output is the float model's.
    grid: as in QuantSpec, for layers of 2 to 4 bits; "mid-rise" for method "nearest" alone.
    sparq: windows for the inputs of all layers but the first and last (QuantSpec); overrides may name others.
    sparq_bits: qk.quantize chooses the window of each of these layers by the error that it makes, so that an activation
    takes this many bits on average, with what says where its window lies (qk.choose_windows).
    dynamic: as in QuantSpec, for every Linear, the first and last too; convolutions keep steps of calibration, and
    overrides may name single layers. Not with sparq.
    match_statistics: qk.quantize gives layers that took up a BatchNorm the output mean and variance of the float model.
    only_faster: qk.quantize times each layer on this machine, at the shape of the example, and leaves it in float where
    its integer call is slower by more than the noise. Off, because a layer alone pays for quantizing its input and
    giving back float, which a fused network will not; and on, equal bits need equal timings.
    """

    weights: WeightBits = 4
    activations: ActivationBits = 8
    first_last: WeightBits | None = 8
    group_size: int | None = Field(default=None, gt=0)
    symmetric: bool = False
    skip: tuple[str, ...] = ()
    overrides: dict[str, dict[str, Any]] = Field(default_factory=dict)
    embeddings: Tables = None
    ranges: Ranges = "mse"
    method: Literal["nearest", "brecq", "lsq", "gptq"] = "brecq"
    act_order: bool = True
    prefix: Literal["quantized", "float"] = "quantized"
    first_output: Literal["plain", "first_last"] = "plain"
    additions: Literal["float", "quantized"] = "float"
    granularity: Literal["layer", "block", "stage", "net"] = "block"
    loss: Literal["mse", "fisher", "fisher_full"] = "mse"
    order: Literal["joint", "weights_first"] = "joint"
    iterations: int = Field(default=4000, ge=1)
    batch_size: int = Field(default=16, ge=1)
    weight_lr: float = Field(default=1e-2, gt=0)
    act_lr: float = Field(default=4e-4, ge=0)
    penalty: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.2, ge=0, lt=1)
    beta: tuple[Exponent, Exponent] = (20.0, 2.0)
    drop: float = Field(default=1.0, ge=0, le=1)
    drop_inside: bool = False
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    points: Points = 1
    points_error: float | None = Field(default=None, gt=0)
    points_budget: float | None = Field(default=None, gt=0)
    points_cost: Literal["both", "macs", "rows"] = "both"
    memory_mb: int = Field(default=1024, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    tuning: Tuning = Field(default_factory=Tuning)
    equalize: bool = False
    smooth: Alpha | Literal["search"] | None = None
    relu6: Literal["keep", "relu"] = "keep"
    bias_correction: bool = False
    grid: Grid = "mid-tread"
    sparq: Cutting = None
    sparq_bits: float | None = Field(default=None, gt=0)
    dynamic: bool = False
    match_statistics: bool = False
    only_faster: bool = False

    def __post_init__(self) -> None:
        if self.sparq is not None and self.activations != 8:
            raise ValueError(f"activations must be 8 with sparq, which cuts codes of 8 bits, got {self.activations}")
        if self.drop_inside and not 0 < self.drop < 1:
            raise ValueError(f"drop must be between 0 and 1 with drop_inside, which mixes by it, got {self.drop}")
        if self.sparq_bits is not None and self.sparq is None:
            raise ValueError("sparq must be there with sparq_bits, which chooses its windows")
        if self.grid == "mid-rise" and self.method != "nearest":
            raise ValueError(f"method must be nearest with grid mid-rise, got {self.method}")
        if self.sparq is not None and self.dynamic:
            raise ValueError("dynamic must be false with sparq; overrides can give single layers either")

    def skips(self, name: str) -> bool:
        """Whether a layer or table stays in float by its name."""
        return any(fnmatchcase(name, pattern) for pattern in self.skip)

    def spec_for(self, name: str, is_first_or_last: bool, is_second: bool = False, kind: str = "linear") -> QuantSpec:
        """The widths of one layer, before linked layers are made to agree. kind: of the layer, as in Layer."""
        if self.skips(name):
            return float_spec(SKIPPED)
        fields: dict[str, Any] = {
            "weights": self.weights,
            "activations": self.activations,
            "group_size": self.group_size,
            "symmetric": self.symmetric,
        }
        is_exception = is_first_or_last and self.first_last is not None
        if is_exception:
            fields |= {"weights": self.first_last, "activations": self.first_last}
        elif is_second and self.first_last is not None and self.first_output == "first_last":
            fields |= {"activations": self.first_last}
        for pattern, changed in self.overrides.items():
            if fnmatchcase(name, pattern):
                fields |= changed
        fields.setdefault("grid", "mid-tread" if fields["weights"] in (None, 8) else self.grid)
        fields.setdefault("points", 1 if fields["weights"] in (None, 8) else self.points)
        if fields["points"] != 1:
            fields["symmetric"] = True
        is_linear, is_float = kind == "linear", fields["weights"] is None
        fields.setdefault("dynamic", self.dynamic and is_linear and not is_float)
        is_whole = is_exception or fields["dynamic"] or fields["activations"] != 8
        fields.setdefault("sparq", None if is_whole else self.sparq)
        return parsed(QuantSpec, fields, f"recipe: overrides for {name}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON and YAML hold it; from_dict gives an equal one back."""
        return TypeAdapter(Recipe).dump_python(self, mode="json")

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Recipe:
        """Raises QkError for fields that do not fit, all of them named."""
        return parsed(Recipe, data, "recipe")

    @staticmethod
    def from_yaml(path: str | Path) -> Recipe:
        """Raises QkError for a file that is missing, is not YAML, or has an unknown or impossible field."""
        try:
            data = yaml.safe_load(Path(path).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise fail("recipe", str(path), "a readable YAML file", error) from error
        if not isinstance(data, dict):
            raise fail("recipe", str(path), "a mapping of Recipe's fields", type(data).__name__)
        return Recipe.from_dict(data)


def checked_recipe(recipe: Recipe | None, stage: str) -> Recipe:
    """The recipe, or the default one. Raises QkError for what is no Recipe."""
    if recipe is not None and not isinstance(recipe, Recipe):
        raise fail(stage, "recipe", "a qk.Recipe", type(recipe).__name__, "qk.Recipe.from_dict makes one of a dict.")
    return recipe or Recipe()
