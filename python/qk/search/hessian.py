"""Sensitivities by the trace of the Hessian, as in HAWQ."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from qk.calibrate.batches import call
from qk.calibrate.objective import first_tensor, task_loss
from qk.inputs import part_generator
from qk.methods.engine import frozen
from qk.prepare.insert import to_kernel_order
from qk.search.bank import Bank
from qk.search.items import STAGE
from qk.search.parts import Parts
from qk.search.sensitivity import Sensitivity, check_weights_alone

DRAWS = 16  # of the vectors of Hutchinson's estimate


def hessian(bank: Bank, batches: list, draws: int = DRAWS, seed: int = 0, parts: Parts | None = None) -> Sensitivity:
    """Half the mean curvature of the loss along a layer's weights, times their squared error at each width, summed over
    the layers of an item; 0 at the widest.

    Curvature: trace of the Hessian over the number of weights, by Hutchinson's estimate E[v^T H v] with v of +-1, of
    the divergence from the float model's output (in nats for logits), where that is 0. Source: Dong et al., HAWQ-V2
    (2020); Yao et al., HAWQ-V3 (2021).
    Raises QkError where one width of weights comes with several of activations, whose errors it does not see.
    """
    check_weights_alone(bank.items, "hessian")
    p = bank.p
    layers = {name: p.quant_layers()[name] for item in bank.items for name in item.layers}

    def of_batch(index: int) -> list[float]:
        """How many samples, and the trace of each layer's block summed over them."""
        generator = part_generator(seed, index)
        traces = [0.0] * len(layers)
        with frozen(p.model), p.quantized(set()):
            weights = [layer.weight.requires_grad_() for layer in layers.values()]
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
                output = first_tensor(call(p, batches[index], index, STAGE), STAGE)
                loss = task_loss(output, output.detach(), batches[index])
                slopes = torch.autograd.grad(loss, weights, create_graph=True)
            for _ in range(draws):
                signs = [_signs(w, generator) for w in weights]
                products = torch.autograd.grad(slopes, weights, signs, retain_graph=True)
                for i, (sign, product) in enumerate(zip(signs, products, strict=True)):
                    traces[i] += float((sign * product).sum()) / draws
            for weight in weights:
                weight.requires_grad_(False)
        return [len(output), *traces]

    samples, *found = map(sum, zip(*(parts or Parts()).all(len(batches), of_batch), strict=True))
    traces = dict(zip(layers, found, strict=True))

    def loss_at(name: str, weights: int) -> float:
        layer = layers[name]
        rounded = bank.values(name, weights)
        error = float((rounded - to_kernel_order(layer.weight.detach())).double().square().sum())
        return 0.5 * traces[name] / samples / layer.weight.numel() * error

    losses = []
    for item in bank.items:
        row = [sum(loss_at(name, w) for name in item.layers) for w, _ in item.options]
        losses.append([value - row[0] for value in row])
    return Sensitivity("hessian", losses, unit="nats")


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """+1 and -1 at random."""
    drawn = torch.randint(2, like.shape, generator=generator)
    return (2 * drawn - 1).to(like.device, like.dtype)
