"""The inner loop of BRECQ on torchvision's resnet18, unit by unit, against the same loop in eager torch, and with
products of bfloat16.

Both learn the rounding (V) of every weight of a unit and its activation steps from the same samples with the same
schedule. Before anything is timed, both run a few iterations from the same start, and losses, V and steps must agree;
losses of bfloat16 to a twentieth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import qk
from harness import Case, machine, measure, options
from qk.calibrate import calibrate
from qk.methods.brecq import Learner
from qk.methods.cache import Cache, Room
from qk.methods.engine import fill_cache, first_tensor, frozen, loss_scale
from qk.prepare import prepare
from qk.spec import Recipe

CHECKED = 8  # iterations that must agree
TOTAL = 20  # of the schedule, so that the checked and timed iterations lie behind the warmup


class Straight(torch.autograd.Function):
    """round with the gradient of the identity."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


def straight_round(x: Tensor) -> Tensor:
    return Straight.apply(x)


class EagerLearner(Learner):
    """The same mathematics with torch's own operators and autograd."""

    def __enter__(self):
        super().__enter__()
        for rounding in self.roundings:
            rounding.layer.rounding = lambda r=rounding: self.soft(r)
        self.quantizers = {rounding.layer.input for rounding in self.roundings}
        for quantizer in self.quantizers:
            quantizer.forward = lambda x, _=None, q=quantizer: self.fake_quantize(x, q)
        known = ("params", "lr", "start")  # the last of steps, whose rates the loop sets
        groups = [{key: group[key] for key in known if key in group} for group in self.optimizer.param_groups]
        self.optimizer = torch.optim.Adam(groups)
        return self

    def __exit__(self, *error):
        for quantizer in self.quantizers:
            del quantizer.forward
        super().__exit__(*error)

    @staticmethod
    def h(v: Tensor) -> Tensor:
        return (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)

    def soft(self, r) -> Tensor:
        shape = (-1, *[1] * (r.weight.dim() - 1))
        step, zero = r.step.view(shape), r.zero.view(shape)
        code = torch.floor(r.weight * (1 / step)) + self.h(r.v) + zero
        return (code.clamp(0, 2**r.bits - 1) - zero) * step

    @staticmethod
    def fake_quantize(x: Tensor, q) -> Tensor:
        top = 2**q.bits - 1
        scale = (x[0].numel() * max(1, top - int(q.zero))) ** -0.5
        step = (q.step - q.step * scale).detach() + q.step * scale
        return straight_round((x * (1 / step)).clamp(-q.zero, top - q.zero)) * step

    def step(self, sample, iteration: int) -> Tensor:
        recipe = self.recipe
        output = first_tensor(self.module(*sample.args, **sample.kwargs))
        fit = (output - sample.target).square().sum() * loss_scale(output, self.layers)
        done = (iteration - recipe.warmup * TOTAL) / (TOTAL - recipe.warmup * TOTAL)
        exponent = recipe.beta[0] + (recipe.beta[1] - recipe.beta[0]) * max(0.0, done)
        loss = fit
        if iteration >= recipe.warmup * TOTAL:
            penalty = sum((1 - (2 * self.h(r.v) - 1).abs().pow(exponent)).sum() for r in self.roundings)
            loss = fit + recipe.penalty * penalty
        self.optimizer.zero_grad()
        loss.backward()
        left = 0.5 * (1 + math.cos(math.pi * iteration / TOTAL))
        for group in self.optimizer.param_groups[: len(self.steps)]:
            group["lr"] = left * group["start"]
        self.optimizer.step()
        return fit.detach()


def run(learner: Learner, cache: Cache, first: int, count: int) -> list[float]:
    generator = torch.Generator().manual_seed(first)
    recipe = learner.recipe
    samples = (cache.sample(recipe.batch_size, recipe.drop, generator) for _ in range(count))
    return [learner.step(sample, first + i).item() for i, sample in enumerate(samples)]


def check(ours: Learner, eager: Learner, narrow: Learner, cache: Cache, name: str) -> None:
    """Losses to 1 %; V and steps to a part of the distance they moved. The sign of a tiny gradient may differ, and
    Adam's first steps are as long for it as for any other, so a few of the V may part."""
    starts = [r.v.detach().clone() for r in ours.roundings]
    steps = [step.detach().clone() for step in ours.steps]
    with ours:
        mine = run(ours, cache, 0, CHECKED)
    learned = [step.detach().clone() for step in ours.steps]
    for step, start in zip(ours.steps, steps, strict=True):
        step.data.copy_(start)
    with narrow:
        torch.testing.assert_close(run(narrow, cache, 0, CHECKED), mine, rtol=0.05, atol=0)
    for step, start in zip(ours.steps, steps, strict=True):
        step.data.copy_(start)
    with eager:
        theirs = run(eager, cache, 0, CHECKED)
    torch.testing.assert_close(
        torch.tensor(mine), torch.tensor(theirs), rtol=1e-2, atol=0, msg=lambda m: f"{name}: {m}"
    )
    for a, b, start in zip(ours.roundings, eager.roundings, starts, strict=True):
        apart = (a.v - b.v).abs().mean() / (a.v - start).abs().mean().clamp(min=1e-12)
        assert apart < 0.05, f"{name}: V differs by {apart:.3f} of the way"
    for a, b in zip(learned, eager.steps, strict=True):
        apart = float((a - b.detach()).abs()) / (CHECKED * ours.recipe.act_lr)
        assert apart < 0.2, f"{name}: a step differs by {apart:.3f} of the way"


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """One for each unit; the unit is ready to run only while its case is the current one."""
    from tests.models import vision_model  # where torchvision's own operators need not load

    recipe = Recipe(weights=4, activations=4, iterations=TOTAL, batch_size=32)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 3, args.size, args.size, generator=generator) for _ in range(2)]
    p = prepare(vision_model("resnet18"), batches[0][:2], recipe)
    calibrate(p, batches)
    prefix: set[str] = set()
    with frozen(p.model):
        for unit in p.units:
            layers = [p.quant_layers()[name] for name in unit.layers]
            if args.only in unit.name:
                cache = fill_cache(p, unit, prefix, batches, Room(4096))
                given = unit.module(p.model), layers, list(dict.fromkeys(x.input for x in layers))
                with p.quantized(set(unit.layers)):
                    ours, eager = Learner(*given, recipe), EagerLearner(*given, recipe)
                    narrow = Learner(*given, replace(recipe, precision="bfloat16"))
                    yield Case(
                        name=unit.name,
                        check=partial(check, ours, eager, narrow, cache, unit.name),
                        ours=partial(timed, ours, cache, args.iterations),
                        peers={
                            "eager": partial(timed, eager, cache, args.iterations),
                            "bfloat16": partial(timed, narrow, cache, args.iterations),
                        },
                    )
            prefix |= set(unit.layers)


def timed(learner: Learner, cache: Cache, iterations: int) -> None:
    with learner:
        run(learner, cache, CHECKED, iterations)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(rounds=5)
    parser.add_argument("--size", type=int, default=64, help="of the pictures")
    parser.add_argument("--iterations", type=int, default=3, help="of each loop in each round")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    qk.force_isa(args.isa)
    facts = machine(args)
    print(f"{args.iterations} iterations of BRECQ's inner loop, resnet18 at {args.size} x {args.size}, batch 32, W4A4:")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows = []
    for case in cases(args):
        rows.append(measure(case, args))
        print(f"  ours / eager: {1 / rows[-1]['ratio']['eager']:.2f}", flush=True)
    ours, eager, narrow = (sum(row["ms"][kind][1] for row in rows) for kind in ("ours", "eager", "bfloat16"))
    print(f"\nall units: ours {ours:.1f} ms, eager {eager:.1f} ms, ours / eager {ours / eager:.3f}")
    print(f"with bfloat16 {narrow:.1f} ms, of float32 {narrow / ours:.3f}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"benchmark": "brecq_loop", "machine": facts, "cases": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
