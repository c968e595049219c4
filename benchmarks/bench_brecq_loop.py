"""The inner loop of BRECQ on torchvision's resnet18 at 64 x 64, unit by unit, against the same loop in eager torch.

Both learn the rounding (V) of every weight of a unit and its activation steps from the same samples with the same
schedule. Before anything is timed, both run a few iterations from the same start, and losses, V and steps must agree.
"""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median

import torch
from tests.models import vision_model
from torch import Tensor

import qk
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
            quantizer.forward = lambda x, q=quantizer: self.fake_quantize(x, q)
        groups = [{"params": group["params"], "lr": group["lr"]} for group in self.optimizer.param_groups]
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
        self.optimizer.step()
        return fit.detach()


def run(learner: Learner, cache: Cache, first: int, count: int) -> list[float]:
    generator = torch.Generator().manual_seed(first)
    recipe = learner.recipe
    return [
        learner.step(cache.sample(recipe.batch_size, recipe.drop, generator), first + i).item() for i in range(count)
    ]


def check(ours: Learner, eager: Learner, cache: Cache, name: str) -> None:
    """Losses to 1 %; V and steps to a part of the distance they moved. The sign of a tiny gradient may differ, and
    Adam's first steps are as long for it as for any other, so a few of the V may part."""
    starts = [r.v.detach().clone() for r in ours.roundings]
    steps = [step.detach().clone() for step in ours.steps]
    with ours:
        mine = run(ours, cache, 0, CHECKED)
    learned = [step.detach().clone() for step in ours.steps]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=3, help="of each loop in each round")
    parser.add_argument("--only", default="")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"BRECQ's inner loop, resnet18 at 64 x 64, batch 32, W4A4: {qk.active_isa()}, {args.threads} threads")

    recipe = Recipe(weights=4, activations=4, iterations=TOTAL)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 3, 64, 64, generator=generator) for _ in range(2)]
    p = prepare(vision_model("resnet18"), batches[0][:2], recipe)
    calibrate(p, batches)
    total = {"ours": 0.0, "eager": 0.0}
    prefix: set[str] = set()
    with frozen(p.model):
        for unit in p.units:
            layers = [p.quant_layers()[name] for name in unit.layers]
            if args.only in unit.name:
                cache = fill_cache(p, unit, prefix, batches, Room(4096), None)
                quantizers = list(dict.fromkeys(layer.input for layer in layers))
                module = p.model.get_submodule(unit.name)
                with p.quantized(set(unit.layers)):
                    make = {"ours": Learner, "eager": EagerLearner}
                    loops = {kind: cls(module, layers, quantizers, recipe) for kind, cls in make.items()}
                    check(loops["ours"], loops["eager"], cache, unit.name)
                    times = {kind: [] for kind in loops}
                    gc.disable()
                    for _ in range(args.rounds):
                        for kind, loop in loops.items():
                            with loop:
                                begin = time.perf_counter()
                                run(loop, cache, CHECKED, args.iterations)
                                times[kind].append((time.perf_counter() - begin) / args.iterations)
                    gc.enable()
                middle = {kind: median(t) for kind, t in times.items()}
                spread = max(times["ours"]) / min(times["ours"])
                for kind in total:
                    total[kind] += middle[kind]
                ratio = middle["ours"] / middle["eager"]
                print(
                    f"  {unit.name:14s} ours {1e3 * middle['ours']:8.2f} ms  eager {1e3 * middle['eager']:8.2f} ms"
                    f"  ratio {ratio:.2f}  (spread of ours {spread:.2f})",
                    flush=True,
                )
            prefix |= set(unit.layers)
    print(f"  all units      ours {1e3 * total['ours']:8.2f} ms  eager {1e3 * total['eager']:8.2f} ms", end="")
    print(f"  ratio {total['ours'] / total['eager']:.3f}")


if __name__ == "__main__":
    main()
