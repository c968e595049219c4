"""The recipes of published results can be read, say how they are run, and run."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from models import import_torchvision
from qk.cli import app
from qk.spec import Recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_there_are_recipes():
    assert {path.parent.name for path in RECIPES} >= {"adaround", "brecq", "lapq", "lsq", "qdrop"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_has_the_widths_of_its_name_and_its_own_command(path):
    recipe = Recipe.from_yaml(path)
    network, _, widths = path.stem.removesuffix("-distilled").rpartition("-")
    assert widths.startswith(f"w{recipe.weights}a{recipe.activations}")
    command = " ".join(line.strip("# \\\n") for line in path.read_text().splitlines() if line.startswith("#   "))
    assert f"--model torchvision:{network} " in command
    assert f"--recipe recipes/{path.parent.name}/{path.name} " in command
    assert "% top-1" in path.read_text().partition("\n#\n")[0]


def test_one_runs_as_its_command_says(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    if not import_torchvision():
        pytest.skip("torchvision is not installed")
    generator = torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for name in ("cats", "dogs"):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for i in range(2):
                pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
                image_module.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    options = ["--model", "torchvision:resnet18?num_classes=2", "--out", str(tmp_path / "out")]
    options += ["--data", f"imagefolder:{tmp_path / 'images'}?size=32&resize=32&calibration=4", "--batch-size", "2"]
    options += ["--recipe", str(ROOT / "recipes/qdrop/resnet18-w2a4.yaml"), "--set", "iterations=1", "--json"]
    result = CliRunner().invoke(app, ["quantize", *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "qk.json").is_file()
