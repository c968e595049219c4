"""The error of a unit's output, weighted by how much the task's loss feels it.

Source: Li et al., BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction (2021), equation 10:
the diagonal Fisher information stands in for the Hessian of the unit's output.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fisher_loss(output: Tensor, target: Tensor, weight: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """scale * sum of weight * (output - target)^2, with a gradient for output only.

    output, target, weight: [...], float32, of one shape; without weight it is 1 everywhere (the squared error).
    The mean over batch and positions of the sum over channels has scale = channels / output.numel().
    Returns one value, []. The same bits for every number of threads and instruction set. Raises RuntimeError for
    another dtype, device or shape.
    """
    return torch.ops.qk.fisher_loss(output, target, weight, scale)


def reference(output: Tensor, target: Tensor, weight: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """The definition, in the dtype of output."""
    squares = (output - target).square()
    return scale * (squares if weight is None else weight * squares).sum()


def reference_backward(
    grad: Tensor, output: Tensor, target: Tensor, weight: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The definition of the gradient of output."""
    slope = output - target
    return 2 * scale * grad * (slope if weight is None else weight * slope)


@torch.library.register_fake("qk::fisher_loss")
def _(output, target, weight, scale):
    return output.new_empty(())


@torch.library.register_fake("qk::fisher_loss_backward")
def _(grad, output, target, weight, scale):
    return torch.empty_like(output, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    output, target, weight, ctx.scale = inputs
    ctx.save_for_backward(output, target, weight)


def _backward(ctx, grad):
    return torch.ops.qk.fisher_loss_backward(grad, *ctx.saved_tensors, ctx.scale), None, None, None


torch.library.register_autograd("qk::fisher_loss", _backward, setup_context=_save)
