"""Finished units on disk: a run that was killed ends in the bits of one that was not, and takes nothing foreign."""

import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from methods import killed
from qk.calibrate import calibrate
from qk.errors import QkError
from qk.flow import quantize
from qk.methods import brecq, reconstruct, resume
from qk.prepare import prepare
from qk.spec import Recipe
from threads import threads

RECIPE = Recipe(weights=3, activations=4, iterations=10, weight_lr=0.05)


pytestmark = pytest.mark.usefixtures("one_thread")


class Linked(nn.Module):
    """Four units, of which the second and third read the same tensor, so they share a step."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((self.left(x) + self.right(x)).relu().flatten(1))


def net(seed=0):
    torch.manual_seed(seed)
    return Linked().eval()


def images(seed=0):
    return list(torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).split(16))


def prepared(recipe=RECIPE, model=None, batches=None, ranges="mse"):
    p = prepare(model or net(), images()[0], recipe)
    calibrate(p, batches or images(), ranges)
    return p


def learned(p, recipe=RECIPE, batches=None, **more):
    reconstruct(p, batches or images(), recipe, progress="off", **more)
    return [(layer.codes, layer.input.step.detach()) for layer in p.quant_layers().values()], p.history


def same(a, b):
    (states, history), (others, other_history) = a, b
    pairs = zip((x for one in states for x in one), (x for one in others for x in one), strict=True)
    return all(torch.equal(x, y) for x, y in pairs) and history == other_history


@pytest.fixture
def interrupt(monkeypatch):
    """Raises in the given step of learning, counted over all units."""

    def at(number):
        step, calls = brecq.Learner.step, []

        def counted(self, *args):
            calls.append(1)
            if len(calls) == number:
                raise KeyboardInterrupt
            return step(self, *args)

        monkeypatch.setattr(brecq.Learner, "step", counted)
        return calls

    yield at
    monkeypatch.undo()


def test_another_process_goes_on_to_the_same_bits(tmp_path, interrupt):
    whole = learned(prepared())
    interrupt(15)
    with pytest.raises(KeyboardInterrupt):
        learned(prepared(), folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["unit-0000.safetensors"]
    steps = interrupt(-1)
    assert same(learned(prepared(), folder=tmp_path), whole)
    assert len(steps) == 30
    assert same(learned(prepared(), folder=tmp_path), whole)  # nothing is left to learn
    assert len(steps) == 30


def test_the_same_process_goes_on_too(tmp_path, interrupt):
    whole = learned(prepared())
    p = prepared()
    interrupt(25)
    with pytest.raises(KeyboardInterrupt):
        learned(p)  # without a folder
    interrupt(-1)
    assert same(learned(p, resume=True, folder=tmp_path), whole)
    assert len(list(tmp_path.iterdir())) == 4
    assert same(learned(prepared(), folder=tmp_path), whole)


def test_memory_is_no_part_of_a_run(tmp_path):
    first = learned(prepared(), folder=tmp_path)
    less = Recipe.from_dict(RECIPE.to_dict() | {"memory_mb": 1})
    assert same(learned(prepared(), less, folder=tmp_path), first)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("recipe.iterations 10 instead of 11", {"recipe": Recipe.from_dict(RECIPE.to_dict() | {"iterations": 11})}),
        ("recipe.seed 0 instead of 1", {"recipe": Recipe.from_dict(RECIPE.to_dict() | {"seed": 1})}),
        ("other plan", {"recipe": Recipe.from_dict(RECIPE.to_dict() | {"weights": 4})}),
        ("other model", {"model": net(1)}),
        ("other calibrated steps", {"ranges": "minmax"}),
        ("other batches", {"learn_on": images(1)}),
        ("other batches", {"learn_on": images()[:1]}),
        ("threads 1 instead of 2", {"threads": 2}),
    ],
)
def test_what_another_run_left_is_refused(tmp_path, words, change):
    learned(prepared(), folder=tmp_path)
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    recipe = change.get("recipe", RECIPE)
    p = prepared(recipe, change.get("model"), None, change.get("ranges", "mse"))
    before = [layer.codes for layer in p.quant_layers().values()]
    with threads(change.get("threads", 1)), pytest.raises(QkError) as error:
        learned(p, recipe, change.get("learn_on"), folder=tmp_path)
    assert words in str(error.value)
    assert str(error.value).startswith("qk.reconstruct: ")
    assert "Delete the folder" in str(error.value)
    assert all(layer.codes is codes for layer, codes in zip(p.quant_layers().values(), before, strict=True))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "swapped"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    learned(prepared(), folder=tmp_path)
    path = tmp_path / "unit-0001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    damaged = {"cut": content[:-5], "flipped": content, "empty": b"", "foreign": b"\x02" + bytes(7) + b"{}"}
    damaged["swapped"] = (tmp_path / "unit-0000.safetensors").read_bytes()
    path.write_bytes(damaged[damage])
    with pytest.raises(QkError, match=r"unit-0001.safetensors must be .*Delete the folder"):
        learned(prepared(), folder=tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_learning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QkError, match=r"must be a folder that can be written"):
        learned(prepared(), folder=tmp_path / "file")


def test_what_a_killed_writer_left_is_taken_away(tmp_path):
    (tmp_path / ".qk-abc").write_text("half")
    (tmp_path / "mine.txt").write_text("")
    learned(prepared(), folder=tmp_path)
    assert not (tmp_path / ".qk-abc").exists()
    resume.remove(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    resume.remove(tmp_path / "not there")


def test_a_run_that_learns_nothing_leaves_what_another_one_finished(tmp_path):
    learned(prepared(), folder=tmp_path / "unfinished")
    nearest = Recipe.from_dict(RECIPE.to_dict() | {"method": "nearest"})
    quantize(net(), images(), nearest, out=tmp_path, measure=False, fused=False, progress=False)
    assert len(list((tmp_path / "unfinished").iterdir())) == 4
    with pytest.raises(QkError, match=r"Delete the folder"):
        quantize(net(), images(), Recipe(iterations=2), out=tmp_path, measure=False, progress=False)
    quantize(net(), images(), RECIPE, example=images()[0], out=tmp_path, measure=False, fused=False, progress=False)
    assert not (tmp_path / "unfinished").exists()


def start(folder, case, iterations):
    command = [sys.executable, Path(__file__).with_name("killed.py"), folder, case, str(iterations)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def ends(process, seconds=None):
    """Whether it ends by itself; it is killed otherwise."""
    try:
        _, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()  # SIGKILL
        process.communicate()
        return False
    assert process.returncode == 0, said
    return True


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", killed.CASES)
def test_killed_it_ends_in_the_same_bytes(tmp_path, case):
    whole = start(tmp_path / "whole", case, 150)
    process = start(tmp_path / "killed", case, 150)
    while not (tmp_path / "killed" / "unfinished" / "unit-0001.safetensors").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    assert not ends(process, 0)
    assert (tmp_path / "killed" / "unfinished").is_dir()
    assert ends(start(tmp_path / "killed", case, 150))
    assert ends(whole)
    assert content(tmp_path / "whole") == content(tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("case", killed.CASES)
def test_killed_at_twenty_random_moments_it_ends_in_the_same_bytes(tmp_path, case):
    begin = time.monotonic()
    assert ends(start(tmp_path / "whole", case, 600))
    took = time.monotonic() - begin
    moments, kills = random.Random(0), 0
    while kills < 20:
        if ends(start(tmp_path / "killed", case, 600), moments.uniform(0.2, 1) * took):
            assert content(tmp_path / "whole") == content(tmp_path / "killed")
            shutil.rmtree(tmp_path / "killed")  # the next one begins anew
        else:
            kills += 1
    assert ends(start(tmp_path / "killed", case, 600))
    assert content(tmp_path / "whole") == content(tmp_path / "killed")
