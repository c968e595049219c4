"""The recipes of published results can be read, say how they are run, and run."""

import json
import shlex
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import qk
from models import fill, import_torchvision
from qk.cli import app
from qk.sources import load_model
from qk.spec import Recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]
# One of each folder.
RUN = [
    "adaround/resnet18-w4a4",
    "brecq/resnet18-w2a4",
    "lapq/resnet18-w4a4",
    "lsq/resnet18-w2a2",
    "lsq-distilled/resnet18-w3a3",
    "qdrop/resnet18-w2a4",
]


def command_of(path):
    """The words behind `qk` that the file's comment gives."""
    lines = [line.strip("# \\\n") for line in path.read_text().splitlines() if line.startswith("#   ")]
    return shlex.split(" ".join(lines))[1:]


def test_there_are_recipes():
    assert {name.partition("/")[0] for name in RUN} == {path.parent.name for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_has_the_widths_of_its_name_and_its_own_command(path):
    recipe = Recipe.from_yaml(path)
    network, _, widths = path.stem.rpartition("-")
    assert widths == f"w{recipe.weights}a{recipe.activations}"
    command, *words = command_of(path)
    assert command == ("tune" if recipe.method == "lsq" else "quantize")
    assert ("--labels" in words) == (recipe.ranges == "lapq")  # published with cross entropy
    options = [words[words.index(name) + 1] for name in ("--model", "--weights", "--recipe", "--out")]
    expected = [
        f"torchvision:{network}",
        f"{network}.safetensors",
        f"recipes/{path.parent.name}/{path.name}",
        path.stem,
    ]
    assert options == expected
    head = path.read_text().partition("\n#\n")[0]
    assert "% top-1" in head
    assert widths.upper() in head


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_names_a_network_and_layers_that_there_are(path):
    if not import_torchvision():
        pytest.skip("torchvision is not installed")
    from torchvision import models

    network, recipe = path.stem.rpartition("-")[0], Recipe.from_yaml(path)
    assert network in models.list_models()
    if patterns := [*recipe.skip, *recipe.overrides]:
        with torch.device("meta"):
            names = [name for name, _ in models.get_model(network, weights=None).named_modules()]
        assert all(any(fnmatchcase(name, pattern) for name in names) for pattern in patterns)


def little_resnet() -> nn.Module:
    """Modules named as in torchvision's resnet18, of two of its stages and few channels, for two classes."""
    from torchvision.models.resnet import BasicBlock

    model = nn.Sequential()
    model.conv1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
    model.bn1, model.relu = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
    model.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8))
    shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
    model.layer4 = nn.Sequential(BasicBlock(8, 16, 2, shortcut), BasicBlock(16, 16))
    model.avgpool, model.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model.fc = nn.Linear(16, 2)
    return fill(model, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """images/train and images/val with a class folder each for cats and dogs, and little.safetensors."""
    image_module = pytest.importorskip("PIL.Image")
    if not import_torchvision():
        pytest.skip("torchvision is not installed")
    folder = tmp_path_factory.mktemp("recipes")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            images = folder / "images" / part / name
            images.mkdir(parents=True)
            for i in range(2):
                pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
                image_module.fromarray(pixels.numpy()).save(images / f"{i}.png")
    save_file(little_resnet().state_dict(), folder / "little.safetensors")
    return folder


def run(name, folder, out, model, weights):
    """The file's own command, with another network, its weights, small images and little learning."""
    path = ROOT / "recipes" / f"{name}.yaml"
    command, *words = command_of(path)
    data = f"imagefolder:{folder / 'images'}?size=32&resize=32&calibration=4"
    changed = {"--model": model, "--weights": str(weights), "--data": data, "--recipe": str(path), "--out": str(out)}
    for option, value in changed.items():
        words[words.index(option) + 1] = value
    words += ["--batch-size", "2", "--set", "iterations=2"] + ["--set", "tuning.epochs=1"] * (command == "tune")
    result = CliRunner().invoke(app, [command, *words, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), Recipe.from_yaml(path)


@pytest.mark.parametrize("name", RUN)
def test_it_runs_as_its_command_says(name, folder, tmp_path):
    weights = folder / "little.safetensors"
    found, recipe = run(name, folder, tmp_path, "python:test_recipes:little_resnet", weights)
    widths = {layer["name"]: layer["widths"] for layer in found["layers"]}
    assert widths["layer4.0.conv2"] == f"W{recipe.weights}A{recipe.activations}"
    ends = "float" if recipe.first_last is None else f"W{recipe.first_last}A{recipe.first_last}"
    assert (widths["conv1"], widths["fc"]) == (ends, ends)
    assert qk.load(tmp_path, model=little_resnet())(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


@pytest.mark.slow
def test_one_runs_on_its_own_network(folder, tmp_path):
    model = "torchvision:resnet18?num_classes=2"
    save_file(load_model(model).state_dict(), tmp_path / "resnet18.safetensors")
    run("qdrop/resnet18-w2a4", folder, tmp_path / "out", model, tmp_path / "resnet18.safetensors")
    assert (tmp_path / "out" / "qk.json").is_file()
