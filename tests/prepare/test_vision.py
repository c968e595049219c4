"""What prepare finds in the architectures of the papers, by name. Weights are random, images 64 x 64."""

import copy

import pytest
import torch

from models import images, vision_model
from qk.prepare import prepare


def names(prefix: str, *counts: int) -> list[str]:
    """prefix1.0, prefix1.1, ... for the first count, prefix2.0, ... for the second, and so on."""
    return [f"{prefix}{stage}.{i}" for stage, count in enumerate(counts, 1) for i in range(count)]


def regnet_names(*counts: int) -> list[str]:
    return [f"trunk_output.block{s}.block{s}-{i}" for s, count in enumerate(counts, 1) for i in range(count)]


def resnet_links(stages, prefix="layer{}.0"):
    return [(f"{prefix.format(s)}.conv1", f"{prefix.format(s)}.downsample.0") for s in stages]


def regnet_links(stages):
    return [tuple(f"trunk_output.block{s}.block{s}-0.{end}" for end in ("proj.0", "f.a.0")) for s in stages]


def is_batchnorm(module):
    return isinstance(module, torch.nn.BatchNorm2d)


def convolution_before(batchnorm: str) -> str:
    """By torchvision's naming: bn2 follows conv2; elsewhere both stand in a Sequential, one after the other."""
    parent, _, last = batchnorm.rpartition(".")
    before = last.replace("bn", "conv") if last.startswith("bn") else str(int(last) - 1)
    return f"{parent}.{before}" if parent else before


# blocks, links, layers, folds, units that are single layers
FOUND = {
    "resnet18": (names("layer", 2, 2, 2, 2), resnet_links([2, 3, 4]), 21, 20, ["conv1", "fc"]),
    "resnet50": (names("layer", 3, 4, 6, 3), resnet_links([1, 2, 3, 4]), 54, 53, ["conv1", "fc"]),
    "mobilenet_v2": (
        [f"features.{i}" for i in range(1, 18)],
        [],
        53,
        52,
        ["features.0.0", "features.18.0", "classifier.1"],
    ),
    "regnet_x_400mf": (regnet_names(1, 2, 7, 12), regnet_links([1, 2, 3, 4]), 72, 71, ["stem.0", "fc"]),
    "mnasnet1_0": (
        [f"layers.{s}.{i}" for s, count in zip(range(8, 14), (3, 3, 3, 2, 4, 1), strict=True) for i in range(count)],
        [],
        53,
        52,
        ["layers.0", "layers.3", "layers.6", "layers.14", "classifier.1"],
    ),
    "efficientnet_b0": (
        names("features.", 1, 2, 2, 3, 3, 4, 1),
        [],
        82,
        49,
        ["features.0.0", "features.8.0", "classifier.1"],
    ),
    "vgg16_bn": (
        [],
        [],
        16,
        13,
        [f"features.{i}" for i in (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)]
        + ["classifier.0", "classifier.3", "classifier.6"],
    ),
}


@pytest.fixture(scope="module", params=FOUND)
def case(request):
    model = vision_model(request.param)
    return request.param, model, prepare(model, images())


def test_blocks_links_and_folds_are_found_by_name(case):
    name, model, p = case
    blocks, links, layers, folds, single = FOUND[name]
    assert [unit.name for unit in p.blocks] == blocks
    assert [unit.name for unit in p.units if len(unit.layers) == 1] == single
    assert p.links == links
    assert (len(p.layers), len(p.folds)) == (layers, folds)
    assert p.folds == {n: convolution_before(n) for n, m in model.named_modules() if is_batchnorm(m)}
    assert p.kept == {}


def test_units_hold_each_layer_once_in_running_order(case):
    _, _, p = case
    assert [layer for unit in p.units for layer in sorted(unit.layers, key=list(p.layers).index)] == list(p.layers)
    assert [layer.order for layer in p.layers.values()] == list(range(len(p.layers)))
    assert list(p.quant_layers()) == list(p.layers)


def test_each_module_with_weights_is_accounted_for(case):
    _, model, p = case
    holders = {n for n, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))}
    assert holders == {*p.layers, *p.folds, *p.kept}


def test_linked_layers_share_one_quantizer(case):
    _, _, p = case
    layers = p.quant_layers()
    quantizers = {id(layer.input) for layer in layers.values()}
    assert len(quantizers) == len(layers) - sum(len(group) - 1 for group in p.links)
    for group in p.links:
        assert len({id(layers[n].input) for n in group}) == 1
        assert len({p.plan[n].activations for n in group}) == 1


def test_float_mode_differs_from_the_model_no_more_than_float32_from_float64(case):
    # Folding rounds each weight once more, relative 2^-24, as each product of float32 arithmetic does; so the folded
    # model's distance to the float64 model is of the size of the float model's own. 4: sums of random signs vary.
    name, model, p = case
    x = images(1, 32)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        ours, theirs = (p.model(x) - exact).abs().max(), (model(x) - exact).abs().max()
    assert ours <= 4 * theirs + 2**-24 * exact.abs().max(), name


# Giga multiply-accumulates at 224 x 224, as torchvision publishes them with its weights.
PUBLISHED = {
    "resnet18": 1.814,
    "resnet50": 4.089,
    "mobilenet_v2": 0.301,
    "regnet_x_400mf": 0.414,
    "mnasnet1_0": 0.314,
    "efficientnet_b0": 0.386,
}


@pytest.mark.parametrize(
    ("name", "giga"), [*PUBLISHED.items(), pytest.param("vgg16_bn", 15.47, marks=pytest.mark.slow)]
)
def test_multiply_accumulates_are_the_published_ones(name, giga):
    p = prepare(vision_model(name), images(1, 224))
    assert sum(layer.macs for layer in p.layers.values()) / 1e9 == pytest.approx(giga, abs=5e-4)


def test_the_norms_in_front_of_densenets_convolutions_stay():
    p = prepare(vision_model("densenet121"), images(1, 32))
    assert p.blocks == []
    assert p.folds["features.norm0"] == "features.conv0"
    assert p.folds["features.denseblock1.denselayer1.norm2"] == "features.denseblock1.denselayer1.conv1"
    assert "features.denseblock1.denselayer1.norm1" in p.kept
    assert "features.transition1.norm" in p.kept
    assert len(p.folds) == 59
    assert len(p.kept) == 62


def test_the_branches_of_an_inception_read_one_tensor():
    p = prepare(vision_model("googlenet"), images(1, 64))
    blocks = [f"inception{n}" for n in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")]
    assert [unit.name for unit in p.blocks] == blocks
    assert p.links == [tuple(f"{b}.{c}.conv" for c in ("branch1", "branch2.0", "branch3.0")) for b in blocks]
