"""The error of a unit's output, weighted by how much the task's loss feels it.

Source: Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction (2021), equation 10:
the diagonal Fisher information stands in for the Hessian of the unit's output.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qk.ops._rows import on_one_device, widened


def fisher_loss(output: Tensor, target: Tensor, weight: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale * sum of weight * (output - target)^2, with a gradient for output only.

    output, target, weight: [...], of one shape and all float32, float16 or bfloat16; without weight it is 1
    everywhere (the squared error).
    The mean over batch and positions of the sum over channels has scale = channels / output.numel().
    Returns one value, [], float32. The same bits for every number of threads and instruction set. Raises
    RuntimeError for another dtype, device or shape.
    """
    return torch.ops.qk.fisher_loss(output, target, weight, scale)[0]


def fisher_loss_and_slope(
    output: Tensor, target: Tensor, weight: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """fisher_loss and its gradient for output, from one pass: `output.backward(slope)` needs no second one.

    Arguments and errors as fisher_loss. Both are float32, and neither has a gradient of its own; for an output of 16
    bits scale the slope before it is cast.
    """
    return torch.ops.qk.fisher_loss(output.detach(), target, weight, scale)


def reference(
    output: Tensor, target: Tensor, weight: Tensor | None = None, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The definition, in the dtype of output, float32 at least: the loss and its gradient for output."""
    slope = widened(output) - widened(target)
    weighed = slope if weight is None else widened(weight) * slope
    return scale * (weighed * slope).sum(), 2 * scale * weighed


@torch.library.register_fake("qk::fisher_loss")
def _(output, target, weight, scale):
    on_one_device("fisher_loss", output, target, weight)
    return output.new_empty((), dtype=torch.float32), torch.empty_like(
        output, dtype=torch.float32, memory_format=torch.contiguous_format
    )


def _save(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad, _):
    return (grad * ctx.saved_tensors[0]).to(ctx.dtype), None, None, None


torch.library.register_autograd("qk::fisher_loss", _backward, setup_context=_save)
