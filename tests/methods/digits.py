"""The demo's network, how tests quantize it, and whether two results are the same."""

import torch

from qk.calibrate import calibrate
from qk.demo.digits import Training, load, trained
from qk.prepare import prepare


class Digits:
    """The demo's network, smaller, trained once and kept in pytest's cache folder."""

    def __init__(self, cache):
        data = load()
        self.model = trained(Training(widths=(16, 32, 32), epochs=10), cache)
        self.images, self.test_images, self.test_labels = data.train, data.test, data.test_labels

    def accuracy(self, model):
        """Percent of the test images."""
        with torch.no_grad():
            return 100 * (model(self.test_images).argmax(1) == self.test_labels).float().mean().item()


def quantized_digits(digits, batches, recipe):
    p = prepare(digits.model, batches[0][:2], recipe)
    calibrate(p, batches)
    return p


def state(p):
    return [
        (layer.codes.clone(), layer.input.step.item(), layer.weight_step.clone()) for layer in p.quant_layers().values()
    ]


def same(a, b):
    return all(torch.equal(x[0], y[0]) and x[1] == y[1] and torch.equal(x[2], y[2]) for x, y in zip(a, b, strict=True))
