"""A training on disk: interrupted or killed, it goes on to the same bits, and takes nothing foreign or damaged."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import qk
from methods.test_resume import content, ends
from methods.trainings import LABELLED, Interrupting, X, net, prepared, recipe, same, tuned
from qk.errors import QkError
from qk.methods.training_file import FILE, remove
from qk.spec import Recipe
from threads import threads

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("every", [None, 1, 2])
@pytest.mark.parametrize("at", [2, 6])  # in the first epoch, and at the end of the second
def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path, every, at):
    wanted = recipe(distill="soft")
    whole = tuned(wanted=wanted, validate=lambda model: float(model(X).sum()), loss=Interrupting(0))
    p = prepared()
    qk.trainable(p)
    before = copy.deepcopy(p.model.state_dict())
    more = {"wanted": wanted, "folder": tmp_path, "every": every, "validate": lambda model: float(model(X).sum())}
    with pytest.raises(KeyboardInterrupt):
        tuned(p, loss=Interrupting(at), **more)
    assert all(torch.equal(tensor, before[name]) for name, tensor in p.model.state_dict().items())
    done = {None: 3 * ((at - 1) // 3), 1: at - 1, 2: (at - 1) // 3 * 3 + (at - 1) % 3 // 2 * 2}[every]
    rest = Interrupting(0)
    assert same(tuned(loss=rest, **more), whole)  # in another process p is made anew
    assert rest.calls == 9 - done
    assert same(tuned(p, loss=rest, **more), whole)  # nothing is left to learn
    assert rest.calls == 9 - done


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("recipe.seed 0 instead of 1", {"wanted": Recipe.from_dict(recipe().to_dict() | {"seed": 1})}),
        ("recipe.tuning", {"wanted": recipe(lr=0.5)}),
        ("other batches", {"train": [(x + 1, y) for x, y in LABELLED]}),
        ("other batches", {"train": [(x, 3 - y) for x, y in LABELLED]}),
        ("batches in an epoch 3 instead of 2", {"train": LABELLED[:2]}),
        ("loss 'cross_entropy' instead of", {"loss": lambda y, labels: nn.functional.cross_entropy(y, labels)}),
        ("validate None instead of 'len'", {"validate": len}),
        ("threads 1 instead of 2", {"threads": 2}),
    ],
)
def test_what_another_training_left_is_refused(tmp_path, words, change):
    tuned(train=LABELLED, folder=tmp_path)
    held = content(tmp_path)
    count = change.pop("threads", 1)
    with threads(count), pytest.raises(QkError) as error:
        tuned(folder=tmp_path, **({"train": LABELLED} | change))
    assert words in str(error.value)
    assert "Delete the folder" in str(error.value)
    assert content(tmp_path) == held


def test_another_model_is_refused(tmp_path):
    tuned(folder=tmp_path)
    other = net()
    with torch.no_grad():
        other.stem.weight[0, 0, 0, 0] += 1
    with pytest.raises(QkError, match=r"other model"):
        tuned(prepared(other), folder=tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    tuned(folder=tmp_path)
    path = tmp_path / FILE
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes({"cut": whole[:-5], "flipped": whole, "empty": b""}[damage])
    with pytest.raises(QkError, match=r"qk.tune: .*training.safetensors must be .*Delete the folder"):
        tuned(folder=tmp_path)


def test_what_is_taken_away_is_ours_alone(tmp_path):
    (tmp_path / ".qk-abc").write_text("half")
    (tmp_path / "mine.txt").write_text("")
    tuned(folder=tmp_path)
    remove(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    remove(tmp_path / "not there")


def test_killed_it_ends_in_the_same_bytes(tmp_path):
    def start(folder):
        script = Path(__file__).with_name("killed_training.py")
        return subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.PIPE)

    whole = start(tmp_path / "whole")
    process = start(tmp_path / "killed")
    while not (tmp_path / "killed" / "unfinished" / FILE).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    assert not ends(process, 0)
    assert (tmp_path / "killed" / "unfinished").is_dir()
    assert ends(start(tmp_path / "killed"))
    assert ends(whole)
    assert content(tmp_path / "whole") == content(tmp_path / "killed")
