"""Errors of 80 candidate ranges: one pass against a loop over the candidates in eager torch."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, main
from qk.ops.range_error import reference

BITS, CANDIDATES = 4, 80
SHAPES = {
    "resnet18 layer4.1.conv2, per channel": (512, 4608),
    "mobilenet_v2 depthwise 960, per channel": (960, 9),
    "1M per tensor": (1, 1 << 20),
}


def eager(x, step, zero, power):
    """As calibration code has it: one candidate at a time, all rows at once."""
    errors = []
    for s, z in zip(step.t().unsqueeze(-1), zero.t().float().unsqueeze(-1), strict=True):
        code = torch.clamp(torch.round(x / s) + z, 0, 2**BITS - 1)
        errors.append(((code - z) * s - x).abs().pow(power).sum(1))
    return torch.stack(errors, 1)


def cases(args):
    random = torch.Generator().manual_seed(0)
    for power in (2.0, 2.4):
        for name, (rows, cols) in SHAPES.items():
            x = torch.randn(rows, cols, generator=random).to(args.device)
            shrink = 1 - 0.01 * torch.arange(CANDIDATES, device=args.device)
            low, high = (end[:, None] * shrink for end in (x.amin(1).clamp(max=0), x.amax(1).clamp(min=1e-3)))
            step = (high - low) / (2**BITS - 1)
            zero = torch.round(-low / step).int()

            def check(x=x, step=step, zero=zero, power=power):
                part = x[:1, :100_000], step[:1], zero[:1]
                got, want = qk.ops.range_error(*part, BITS, power), reference(*part, BITS, power)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=0)
                wide = qk.ops.range_error(x, step, zero, BITS, power)
                torch.testing.assert_close(wide, eager(x, step, zero, power), rtol=1e-3, atol=1e-6)

            yield Case(
                name=f"range_error {name}, power {power}",
                check=check,
                ours=lambda x=x, step=step, zero=zero, power=power: qk.ops.range_error(x, step, zero, BITS, power),
                peers={
                    "eager torch, a loop": lambda x=x, step=step, zero=zero, power=power: eager(x, step, zero, power)
                },
                operations=x.numel() * CANDIDATES,  # errors, not instructions
            )


if __name__ == "__main__":
    main("range_error", cases)
