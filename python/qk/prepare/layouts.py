"""Which convolutions must give contiguous outputs: integer ones give channels_last, of which a model may ask a view
that only contiguous tensors have, such as x.view(x.size(0), -1)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qk.inputs import copied_to, device_of, feed


def find_contiguous(model: nn.Module, convolutions: dict[str, nn.Module], example: Any) -> set[str]:
    """Runs the model, which takes the example as it is, with these layers' outputs in channels_last. While it raises,
    the last of them that was called becomes contiguous; all of them at last."""
    found: set[str] = set()
    while len(found) < len(convolutions):
        called: list[str] = []

        def laid(name: str, called: list[str] = called) -> Any:
            def hook(_: nn.Module, args: tuple, output: Tensor) -> Tensor:
                called.append(name)
                if name in found or output.dim() != 4:
                    return output.contiguous()
                return output.contiguous(memory_format=torch.channels_last)

            return hook

        with ExitStack() as stack, torch.no_grad():
            for name, layer in convolutions.items():
                stack.callback(layer.register_forward_hook(laid(name)).remove)
            try:
                feed(model, copied_to(example, device_of(model)))
                return found
            except RuntimeError:
                late = [name for name in called if name not in found]
                if not late:  # no layout's fault
                    return found
                found.add(late[-1])
    return found
