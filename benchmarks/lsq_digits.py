"""Accuracy on the digits by LSQ, beside nearest rounding and BRECQ: the tables of docs/methods/lsq.md."""

import argparse

import torch

import qk
from qk.demo.digits import Augmented, Digits
from qk.methods.tune import LR, MOMENTUM, cosine
from small_digits import SEEDS, accuracy, calibration, networks, spread
from small_digits import data as digits

WIDTHS = ((4, 4), (3, 3), (2, 4), (2, 2))
ITERATIONS = 300
VARIANTS = {
    "the default": {},
    "a step for a whole weight": {"steps": "tensor"},
    "start: paper": {"start": "paper"},
    "count: values": {"count": "values"},
    "distill: soft": {"distill": "soft"},
    "distill: features": {"distill": "features"},
    "lr 0.003": {"lr": 0.003},
    "lr 0.03": {"lr": 0.03},
}


def trained_on(network: torch.nn.Module, data: Digits, epochs: int) -> torch.nn.Module:
    """The float network, BatchNorm folded, trained on as qk.tune does."""
    model = qk.prepare(network, data.train[:2]).model.train()  # its quantizers are off
    optimizer = torch.optim.SGD(qk.param_groups(model), lr=LR[4], momentum=MOMENTUM)
    batches = Augmented(data)
    torch.manual_seed(0)
    for step in range(epochs * len(batches)):
        if step % len(batches) == 0:
            epoch = iter(batches)
        for group in optimizer.param_groups:
            group["lr"] = cosine(LR[4], step / (epochs * len(batches)))
        images, labels = next(epoch)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--variants", action="store_true", help="the second table, at the width of --width")
    parser.add_argument("--width", default="2,2")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, batches, floats = digits(), calibration(), networks()

    def cell(weights: int, activations: int, method: str, **tuning: object) -> str:
        """Of the integer model, over the seeds."""
        found = []
        for seed, network in zip(SEEDS, floats, strict=True):
            fields = {"method": method, "iterations": ITERATIONS, "seed": seed}
            fields["tuning"] = qk.Tuning(**({"epochs": options.epochs} | tuning))
            recipe = qk.Recipe(weights=weights, activations=activations, **fields)
            train = Augmented(data) if method == "lsq" else None
            result = qk.quantize(network, batches, recipe, train=train, measure=False, fused=False, progress=False)
            with torch.no_grad():
                outputs = result.model(data.test[:64])
                with qk.deploy.definition():
                    assert torch.equal(outputs, result.model(data.test[:64]))
            found.append(accuracy(result.model))
        return spread(found)

    print(f"{options.epochs} epochs of LSQ, {ITERATIONS} iterations of BRECQ for each unit.")
    print(f"float: {spread(map(accuracy, floats))}")
    if options.variants:
        weights, activations = map(int, options.width.split(","))
        print(f"| W{weights}A{activations} | accuracy % |\n|---|---:|")
        for name, tuning in VARIANTS.items():
            print(f"| {name} | {cell(weights, activations, 'lsq', **tuning)} |", flush=True)
        return
    longer = (trained_on(network, data, options.epochs) for network in floats)
    print(f"float, trained for as long as LSQ, norms folded: {spread(map(accuracy, longer))}\n", flush=True)
    print("| | nearest | brecq | lsq |\n|---|---:|---:|---:|")
    for weights, activations in WIDTHS:
        cells = [cell(weights, activations, method) for method in ("nearest", "brecq", "lsq")]
        print(f"| W{weights}A{activations} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
