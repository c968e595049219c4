"""Models that take lists of images and return dicts: torchvision's detection and segmentation, with small trunks."""

import pytest
import torch
from torch import nn

import qk
from models import fill, import_torchvision
from qk.deploy import definition
from qk.errors import QkError
from qk.inputs import resized
from qk.prepare import prepare
from qk.prepare.plan import last_layers
from qk.spec import Recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def nms(boxes, scores, limit):
    """Of boxes that overlap by more than the limit, the one that scores most."""
    from torchvision.ops import box_iou

    overlap, kept = box_iou(boxes, boxes), []
    free = torch.ones(len(boxes), dtype=torch.bool)
    for i in scores.argsort(descending=True, stable=True).tolist():
        if free[i]:
            kept.append(i)
            free &= overlap[i] <= limit
    return torch.tensor(kept, dtype=torch.int64)


@pytest.fixture(scope="module")
def torchvision():
    """With a nms in Python where its compiled operators do not load."""
    if not import_torchvision():
        pytest.skip("torchvision is not installed")
    import torchvision
    from torchvision import extension

    if extension._has_ops():
        yield torchvision
        return
    library, before = torch.library.Library("torchvision", "IMPL"), extension._has_ops
    library.impl("nms", nms, "CPU")
    extension._has_ops = lambda: True
    yield torchvision
    extension._has_ops = before
    library._destroy()


def retinanet(torchvision):
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    trunk = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return RetinaNet(trunk, num_classes=3, min_size=64, max_size=64, detections_per_img=20)


def ssd(torchvision):
    return torchvision.models.detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3, detections_per_img=20
    )


def fcn(torchvision):
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.fcn import FCN, FCNHead

    trunk = IntermediateLayerGetter(torchvision.models.resnet18(weights=None), {"layer4": "out"})
    return FCN(trunk, FCNHead(512, 3))


def deeplab(torchvision):
    return torchvision.models.segmentation.deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    )


def pictures(count=1, size=64):
    return list(torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)))


HEADS = ("head.", "classifier.")
DETECTORS, SEGMENTERS = (retinanet, ssd), (fcn, deeplab)
# blocks by the start of their names with their number, links, last layers
FOUND = {
    "retinanet": (
        {"backbone.body.layer": 8},
        4,
        ["head.classification_head.cls_logits", "head.regression_head.bbox_reg"],
    ),
    "ssd": (
        {"backbone.features.": 15},
        6,
        [f"head.{k}_head.module_list.{i}.1" for i in range(6) for k in ("regression", "classification")],
    ),
    "fcn": ({"backbone.layer": 8}, 3, ["classifier.4"]),
    "deeplab": ({"backbone.": 15}, 1, ["classifier.4"]),
}


@pytest.mark.parametrize("make", [*DETECTORS, *SEGMENTERS], ids=lambda make: make.__name__)
def test_blocks_links_and_the_last_layers_of_every_head_are_found(torchvision, make):
    example = (pictures(),) if make in DETECTORS else torch.stack(pictures())
    p = prepare(fill(make(torchvision), 0), example, Recipe(weights=4, activations=4))
    blocks, links, last = FOUND[make.__name__]
    for start, count in blocks.items():
        assert sum(unit.name.startswith(start) for unit in p.blocks) == count
    # Of a head every layer is a unit of its own: its class is there once, or its parts hold one layer each.
    heads = [unit.layers for unit in p.units if unit.name.startswith(HEADS)]
    assert heads == [(name,) for name in p.layers if name.startswith(HEADS)]
    assert len(p.links) == links
    assert sorted(last_layers(p.layers)) == sorted(last)
    wide = [name for name, spec in p.plan.layers.items() if spec.weights == 8]
    assert sorted(wide) == sorted([next(iter(p.layers)), *last])
    assert not p.kept


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    return all(same(x, y) for x, y in zip(a, b, strict=True))


# What is quantized of each where all of it would take long: the heads, and the trunk's first layers.
SKIPPED = {
    "retinanet": ("backbone*layer[234]*",),
    "ssd": ("backbone.features.0.[3-9]*", "backbone.features.0.1?*", "backbone.features.1*", "backbone.extra*"),
    "fcn": ("backbone*layer[234]*",),
    "deeplab": ("backbone.[3-9]*", "backbone.1?*"),
}


@pytest.mark.parametrize(
    "make",
    [retinanet, pytest.param(ssd, marks=pytest.mark.slow), fcn, deeplab],
    ids=lambda make: make.__name__,
)
def test_a_quantized_one_returns_what_the_float_one_does(torchvision, make, tmp_path):
    detects = make in DETECTORS
    model = fill(make(torchvision), 0).eval()
    batches = [(pictures(2),), (pictures(2),)] if detects else list(torch.stack(pictures(4)).split(2))
    recipe = Recipe(weights=4, activations=8, iterations=3, skip=SKIPPED[make.__name__])
    result = qk.quantize(model, batches, recipe, out=tmp_path, progress=False, measure=False, fused=not detects)
    learned = {name for unit in result.prepared.units for name in unit.layers}
    last = FOUND[make.__name__][2]
    heads = {name for name in result.plan.layers if name.startswith(HEADS)}
    assert heads > set(last)
    assert heads <= learned
    assert {name: result.plan[name].weights for name in heads} == {name: 8 if name in last else 4 for name in heads}
    given = (batches[0][0],) if detects else (batches[0],)
    with torch.no_grad():
        found = result.model(*given)
        with definition():
            assert same(found, result.model(*given))
        assert same(found, qk.load(tmp_path, model=model)(*given))
    expected = model(*given)
    assert type(found) is type(expected)
    names = [sorted(one) for one in found] if detects else sorted(found)
    assert names == ([sorted(one) for one in expected] if detects else sorted(expected))


class Finder(nn.Module):
    """Returns as many rows as pass a threshold."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        rows = self.b(self.a(x).relu())
        return {"rows": rows[rows[:, 0] > 0]}


def test_what_depends_on_values_is_left_unfused_in_a_note_and_nothing_is_printed(capfd):
    class Counting(Finder):
        def forward(self, x):
            found = super().forward(x)["rows"]
            return 2 * found if len(found) > 3 else found

    model, batches = Counting().eval(), [torch.randn(64, 8)]
    recipe = Recipe(weights=4, activations=8, iterations=2)
    result = qk.quantize(model, batches, recipe, progress=False, measure=False)
    assert result.fused is None
    assert any("Not fused" in note and "torch.export" in note for note in result.report.notes)
    assert capfd.readouterr().err == ""


def test_images_of_a_detector_are_counted_and_not_cut():
    one, two = torch.zeros(3, 8, 8), torch.ones(3, 6, 6)
    (found,) = resized(([one, two],), 3)
    assert [x.shape for x in found] == [one.shape, two.shape, one.shape]
    assert [x.shape for x in resized({"images": [one]}, 2)["images"]] == [one.shape] * 2
    assert resized((torch.zeros(1, 2), [torch.zeros(1, 2)]), 2)[0].shape == (2, 2)


def test_a_loss_of_the_task_is_refused_where_the_output_has_no_fixed_shape():
    torch.manual_seed(0)
    batches = [torch.randn(256, 8)]
    p = prepare(Finder(), batches[0], Recipe(weights=2, activations=2, first_last=None))
    qk.calibrate(p, batches)
    with pytest.raises(QkError, match=r"the task's loss: the model's output must be of the shape that it has in float"):
        qk.reconstruct(p, batches, Recipe(iterations=2, loss="fisher", granularity="layer"), progress="off")
    qk.reconstruct(p, batches, Recipe(iterations=2, granularity="layer"), progress="off")
