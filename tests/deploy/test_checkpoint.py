"""Checkpoints: a loaded model gives the bits of the saved one, and a save that dies leaves the files of before."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deploy.checkpoints import tensor_file
from deploy.small import minmax, one_layer, same, small_images, small_model, small_prepared
from models import images, minilm, tokens, vision_model
from qk.deploy import QLinear, checkpoint_bytes, convert, file_bytes, load, save
from qk.deploy.manifest import FORMAT
from qk.errors import QkError
from qk.prepare import prepare
from qk.spec import Recipe


def test_a_loaded_model_gives_the_same_bits(model, folder):
    x = small_images()
    floats = small_model(seed=7)  # other weights, the same architecture
    before = copy.deepcopy(floats.state_dict())
    loaded = load(folder, floats)
    assert same(loaded, model, x)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.state_dict().items())
    assert repr(loaded) == repr(model)
    assert loaded.qk_info == model.qk_info
    assert not loaded.training
    after = floats.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert isinstance(floats.stem, nn.Conv2d)
    assert isinstance(floats.norm, nn.BatchNorm2d)
    assert not {t.data_ptr() for t in loaded.state_dict().values()} & {t.data_ptr() for t in after.values()}


def test_a_loaded_model_can_be_saved_again(model, folder, tmp_path):
    again = save(load(folder, small_model()), tmp_path / "again")
    assert (again / "qk.json").read_bytes() == (folder / "qk.json").read_bytes()
    assert tensor_file(again).read_bytes() == tensor_file(folder).read_bytes()


def test_the_files_are_what_the_format_says(model, folder):
    assert sorted(p.name for p in folder.iterdir()) == sorted([tensor_file(folder).name, "qk.json"])
    fields = json.loads((folder / "qk.json").read_text())
    assert fields["format"] == FORMAT
    assert fields["tensors"]["bytes"] == tensor_file(folder).stat().st_size
    assert tensor_file(folder).name == f"model-{fields['tensors']['sha256'][:16]}.safetensors"
    assert fields["layers"]["left"] == {
        "kind": "conv2d",
        "weight_shape": [12, 3, 3, 4],
        "bias": True,
        "stride": [1, 1],
        "padding": [2, 2],
        "dilation": [2, 2],
        "groups": 3,
        "extra_rows": 0,
        "contiguous": False,
    }
    assert fields["tied"]["out.weight"] == "embedding.weight"
    assert {name for name in fields["tied"] if name.startswith("alias.")} == {
        f"alias.{n}" for n in model.twice.state_dict()
    }
    tensors = load_file(tensor_file(folder))
    assert tensors["left.packed"].shape == (12, 32)
    assert tensors["plain.bias"].shape == (7,)  # the shift of the norm behind it
    assert not any(name.startswith("norm") for name in tensors)
    assert checkpoint_bytes(folder) == sum(p.stat().st_size for p in folder.iterdir())


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "minilm"])
def test_real_models_come_back(name, tmp_path):
    batch = tokens() if name == "minilm" else images()
    floats = minilm() if name == "minilm" else vision_model(name)
    p = minmax(prepare(floats, batch, Recipe(weights=4, activations=8, method="nearest")), [batch])
    model = convert(p)
    save(model, tmp_path)
    loaded = load(tmp_path, floats)
    with torch.no_grad():
        if name == "minilm":
            assert torch.equal(loaded(**batch).last_hidden_state, model(**batch).last_hidden_state)
        else:
            assert same(loaded, model, batch)
            assert checkpoint_bytes(tmp_path) < 0.2 * file_bytes(floats)


def test_an_encoder_layer_of_torch_comes_back(tmp_path):
    def layer():
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()

    x = torch.randn(3, 4, 8)
    p = prepare(layer(), x, Recipe(method="nearest"))
    integer = convert(minmax(p, [x]))
    loaded = load(save(integer, tmp_path), layer())
    with torch.no_grad():
        assert torch.equal(loaded(x), integer(x))


def test_a_model_that_is_one_layer_comes_back(tmp_path):
    _, p, x = one_layer()
    model = convert(p)
    save(model, tmp_path)
    loaded = load(tmp_path, nn.Linear(6, 3))
    assert isinstance(loaded, QLinear)
    assert same(loaded, model, x)


# --- saving -----------------------------------------------------------------------------------------------------------


def test_only_an_integer_model_is_saved(tmp_path):
    for bad in (small_model(), "model", small_prepared().model):
        with pytest.raises(QkError, match=r"qk.save: model must be the result of qk.convert"):
            save(bad, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Extra(nn.Module):
        def get_extra_state(self):
            return {"anything": 1}

    model = convert(small_prepared())
    model.extra = Extra()
    with pytest.raises(QkError, match=r"state extra._extra_state must be a tensor, got dict"):
        save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_path_that_cannot_be_written_is_an_error(model, tmp_path):
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(QkError, match="must be a folder that can be written, got"):
            save(model, bad)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("function", ["write", "fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_save_that_dies_leaves_the_checkpoint_of_before(function, call, model, folder, monkeypatch):
    other = convert(small_prepared(weights=2))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    calls = 0
    real = getattr(os, function) if function != "write" else os.fdopen

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(os, "fdopen" if function == "write" else function, dying)
    try:
        save(other, folder)
        died = False
    except Killed:
        died = True
    monkeypatch.undo()
    loaded = load(folder, small_model())
    now = {path.name: path.read_bytes() for path in folder.iterdir()}
    if now["qk.json"] == before["qk.json"]:
        assert died
        assert same(loaded, model, small_images())
    else:
        assert same(loaded, other, small_images())
    save(other, folder)  # and what was left behind goes away
    assert same(load(folder, small_model()), other, small_images())
    assert len(list(folder.iterdir())) == 2


def test_overwriting_leaves_other_files_alone(model, folder):
    (folder / "notes.txt").write_text("mine")
    (folder / "model.safetensors").write_text("mine")
    save(convert(small_prepared(weights=2)), folder)
    assert {path.name for path in folder.iterdir()} > {"notes.txt", "model.safetensors", "qk.json"}
    assert len(list(folder.glob("model-*"))) == 1


def test_the_same_model_gives_the_same_files(tmp_path):
    a, b = (save(convert(small_prepared()), tmp_path / name) for name in "ab")
    assert (a / "qk.json").read_bytes() == (b / "qk.json").read_bytes()


def test_a_path_may_be_text(model, tmp_path):
    assert save(model, str(tmp_path / "deep" / "er")) == Path(tmp_path / "deep" / "er")
    assert same(load(str(tmp_path / "deep" / "er"), small_model()), model, small_images())
