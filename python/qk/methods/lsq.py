"""LSQ: steps of weights and activations are parameters, trained with the weights by the loss of the task.

Source: Esser et al., Learned Step Size Quantization (2020), section 2. The gradient is that of qk.ops.lsq; the loop is
qk.methods.tune, or the user's own. Differences from the paper are in docs/methods/lsq.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qk import ops
from qk.calibrate import ranges as find
from qk.calibrate.batches import call
from qk.calibrate.ranges import SMALLEST_STEP
from qk.errors import fail
from qk.inputs import evaluating
from qk.ops.lsq import grad_scale_for
from qk.options import Tuning
from qk.prepare.apply import put
from qk.prepare.insert import ActQuantizer, QuantLayer, from_kernel_order, to_kernel_order
from qk.prepare.prepared import Prepared, check_learnable
from qk.prepare.rows import RowQuantizer
from qk.spec import Plan, QuantSpec

STAGE = "qk.trainable"
DECAY = {2: 0.25e-4, 3: 0.5e-4, 4: 1e-4, 8: 1e-4}  # weight decay by the weight's width (table 1 and section 3)
FLOAT_DECAY = DECAY[8]  # of weights that stay in float
ANEW = "Call qk.prepare and qk.calibrate anew."


def middle(bits: int) -> int:
    """Q_N = 2^(bits - 1), the zero of a weight's codes: u = q + Q_N."""
    return 2 ** (bits - 1)


def top(bits: int, zero: int) -> int:
    """Q_P, the largest multiple of the step; 1 where no code lies above zero."""
    return max(1, 2**bits - 1 - zero)


def first_step(mean_abs: Tensor, top: int) -> Tensor:
    """2 mean|v| / sqrt(Q_P) (section 2.1); 1 for what is all zeros."""
    step = 2 * mean_abs / top**0.5
    return torch.where(step < SMALLEST_STEP, torch.ones_like(step), step)


def positive(raw: Tensor) -> Tensor:
    """|raw| + 1e-30: the step, whatever an optimizer made of its parameter.

    Equal to raw, bit for bit, above 1e-22, so the paper's gradient and learning rate keep their meaning, which exp and
    softplus would change; below 0 the slope turns round, so a step that overshot comes back, where one held at a floor
    would not.
    """
    return raw.abs() + SMALLEST_STEP


class LearnedActivation(ActQuantizer):
    """An ActQuantizer whose step is trained; zero stays where calibration put it.

    raw_step: float32 [1], also under autocast; `step` follows from it. count: N of the gradient's scale, "features" of
    one sample or "values" of the batch.
    """

    def __init__(self, quantizer: ActQuantizer, count: str) -> None:
        nn.Module.__init__(self)  # the parameter has another name than ActQuantizer's
        self.bits, self.count, self.calibrated = quantizer.bits, count, True
        self.raw_step = nn.Parameter(quantizer.step.detach().clone())
        self.register_buffer("zero", quantizer.zero.clone())

    @property
    def step(self) -> Tensor:
        """Positive, float32 [1]."""
        return positive(self.raw_step)

    def set_range(self, step: Tensor, zero: Tensor) -> None:
        """Refused."""
        raise fail("qk.calibrate", "p", "as prepared", "one in training", ANEW)

    def forward(self, x: Tensor, cut: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """cut: as of ActQuantizer."""
        n = x.numel() if self.count == "values" else x.numel() // max(1, x.shape[0])
        scale = grad_scale_for(max(1, n), top(self.bits, self.zero_point))
        x = x.float()  # whatever autocast made of it
        quantized = ops.lsq(x, self.step, self.zero, self.bits, scale)
        return quantized if cut is None else cut(x, quantized)[1]


class LsqLayer(QuantLayer):
    """A QuantLayer that takes its codes from the float weight at every call, so that the weight can be trained.

    raw_step: float32 [N] or [N, groups along K], or [1] for one step of the whole weight. The zero is the middle code.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, spec: QuantSpec, quantizer: LearnedActivation | RowQuantizer, step: Tensor
    ) -> None:
        super().__init__(layer, spec, quantizer)
        self.raw_step = nn.Parameter(step)
        self.weight_zero = torch.full_like(step, middle(spec.weights), dtype=torch.int32)
        self.grad_scale = grad_scale_for(self.weight.numel() // step.numel(), top(spec.weights, middle(spec.weights)))
        self.quantized = True

    def set_weight_range(self, step: Tensor, zero: Tensor) -> None:
        """Refused."""
        raise fail("qk.calibrate", "p", "as prepared", "one in training", ANEW)

    def quantized_weight(self) -> Tensor:
        """Differentiable in the weight and raw_step."""
        steps = positive(self.raw_step), self.weight_zero, self.spec.weights, self.grad_scale
        if self.groups_along_k == 1:  # a row is the same set of weights in either order
            return ops.lsq(self.weight, *steps)
        return from_kernel_order(ops.lsq(to_kernel_order(self.weight), *steps))

    @torch.no_grad()
    def integers(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the weight as it is trained by now; one step of the whole weight becomes one for each row."""
        shape = self.raw_step.shape if self.raw_step.numel() > 1 else self.weight.shape[:1]
        step, zero = (t.expand(shape).contiguous() for t in (positive(self.raw_step), self.weight_zero))
        return ops.quantize(to_kernel_order(self.weight), step, zero, self.spec.weights), step, zero


@torch.no_grad()
def trainable(p: Prepared, tuning: Tuning | None = None, first: Any = None) -> nn.Module:
    """p.model with weights and steps to train in any loop of PyTorch; qk.convert(p) then gives the integer model.

    All quantized layers are switched on, and embedding tables, which stay as they are; weights become symmetric, and
    the plan says so. Dynamic layers train weights alone. tuning: steps, start, count. first: a batch of inputs, for
    start="paper". Nothing is set later, at a first call: the state dict is complete, and fits the trainable model of
    any equally prepared p. Steps are named raw_step; param_groups sorts the parameters.
    A p that is trainable already is left as it is.
    Raises QkError for p that is not calibrated, has no quantized layer, learned codes or corrected biases, which would
    be lost, channels of several points or pairs by sparse weights, and for start="paper" without a batch; p is
    unchanged then.
    """
    check_learnable(p, STAGE)
    tuning = tuning or Tuning()
    layers = p.quant_layers()
    if is_trainable(p):
        return p.model
    if not layers:
        raise fail(STAGE, "p", "a model with a quantized layer", "one whose tables alone are quantized")
    changed = [name for name, layer in layers.items() if layer.corrected_bias is not None]
    if p.history or changed:
        got = "learned codes" if p.history else f"corrected biases in {', '.join(changed[:5])}"
        expected = "as calibrated, as training starts from the float weights and biases"
        raise fail(STAGE, "p", expected, f"{got}, which would be lost", "Call qk.calibrate(p, batches) again.")
    several = [name for name, layer in layers.items() if layer.extra_rows]
    if several:
        raise fail(STAGE, "p", "with one row for each channel", f"several points in {', '.join(several)}", ANEW)
    sparse = [name for name, layer in layers.items() if layer.spec.sparq and layer.spec.sparq.pairs == "weights"]
    if sparse:
        got = f"sparq.pairs weights in {', '.join(sparse)}"
        raise fail(STAGE, "p", "without pairs by sparse weights, which training would fill", got)
    means = None
    if tuning.start == "paper":
        if first is None:
            raise fail(STAGE, "first", "a batch of inputs for start='paper'", "none", "start='calibrated' needs none.")
        means = _mean_magnitudes(p, first)
    static = [layer.input for layer in layers.values() if not layer.spec.dynamic]
    learned = {quantizer: LearnedActivation(quantizer, tuning.count) for quantizer in static}
    for quantizer, activation in learned.items():
        if means is not None:
            q_p = top(activation.bits, activation.zero_point)
            activation.raw_step.copy_(first_step(means[quantizer], q_p))
    specs = {name: replace(layer.spec, symmetric=True) for name, layer in layers.items()}
    for name, layer in layers.items():
        step = _weight_step(layer, tuning)
        quantizer = learned.get(layer.input, layer.input)
        new = LsqLayer(p.originals[name], specs[name], quantizer, step).train(layer.training)
        new.weight, new.input_scale = layer.weight, layer.input_scale  # the original's, or what smoothing made of it
        put(p, name, new)
    for table in p.quant_tables().values():
        table.quantized = True
    p.plan, p.history = Plan(p.plan.layers | specs), {}
    return p.model


def is_trainable(p: Prepared) -> bool:
    """Whether trainable was called for p."""
    return any(isinstance(layer, LsqLayer) for layer in p.quant_layers().values())


def param_groups(model: nn.Module, weight_decay: float | None = None) -> list[dict[str, Any]]:
    """Parameters of a trainable model (also inside DistributedDataParallel) for an optimizer, by weight decay.

    Steps come first, without any; then biases and other vectors, without any; then weights: by their width, 1e-4 from
    4 bits on, 0.5e-4 at 3, 0.25e-4 at 2, or all with `weight_decay`.
    """
    by_width: dict[nn.Parameter, float] = {}
    steps: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, LsqLayer):
            by_width[module.weight] = DECAY[module.spec.weights]
        if isinstance(module, (LsqLayer, LearnedActivation)) and module.raw_step.requires_grad:
            steps.append(module.raw_step)
    groups: dict[float, list[nn.Parameter]] = {0.0: []}
    known = set(steps)
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter in known:
            continue
        decay = by_width.get(parameter, FLOAT_DECAY) if weight_decay is None else weight_decay
        groups.setdefault(decay if parameter.dim() > 1 else 0.0, []).append(parameter)
    found = [(0.0, steps), *groups.items()]
    return [{"params": some, "weight_decay": decay} for decay, some in found if some]


def _weight_step(layer: QuantLayer, tuning: Tuning) -> Tensor:
    """Where a weight's steps start: [N], [N, groups along K] or [1]. What was calibrated with other zeros than the
    middle one, or for rows where one step is wanted, is found anew (mse)."""
    bits, per_channel = layer.spec.weights, tuning.steps == "channel"
    if tuning.start == "calibrated" and per_channel and layer.spec.weight_symmetric:
        return layer.weight_step.clone()
    rows = layer.weight_rows() if per_channel else layer.weight.detach().reshape(1, -1)
    if tuning.start == "paper":
        step = first_step(rows.abs().mean(1), top(bits, middle(bits)))
    else:
        step = find.mse(rows, bits, symmetric=True)[0]
    return step.reshape(layer.weight_step.shape) if per_channel else step


def _mean_magnitudes(p: Prepared, batch: Any) -> dict[ActQuantizer | RowQuantizer, Tensor]:
    """mean|x| in front of each quantizer, in the float model on one batch."""
    found: dict[ActQuantizer | RowQuantizer, Tensor] = {}

    def see(layer: QuantLayer, args: tuple, kwargs: dict) -> None:
        x = layer.taken(*args, **kwargs)
        found.setdefault(layer.input, x.float().abs().mean())

    layers = p.quant_layers().values()
    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        with p.quantized(set()), evaluating(p.model):
            call(p, batch, 0, STAGE)
    finally:
        for handle in handles:
            handle.remove()
    for name, layer in p.quant_layers().items():
        if layer.input not in found:
            raise fail(STAGE, "first", f"a batch that reaches {name}", "one that does not")
    return found
