"""qk.load refuses files that are damaged, wrong or of another model, says where, and never crashes."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from deploy.checkpoints import edit, leaves, set_at, tensor_file
from deploy.small import Small, same, small_images, small_model, small_prepared
from models import vision_model
from qk.deploy import checkpoint, convert, load, save
from qk.deploy.manifest import FORMAT
from qk.errors import QkError


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A checkpoint that nobody changes, to copy from."""
    return save(model, tmp_path_factory.mktemp("whole"))


# --- bad files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0, 1, 7, 8, 9, 100, 0.2, 0.5, 0.9, -3])
@pytest.mark.parametrize("name", ["qk.json", "tensors"])
def test_a_truncated_file_is_refused(folder, name, share):
    path = tensor_file(folder) if name == "tensors" else folder / name
    size = path.stat().st_size
    os.truncate(path, int(size * share) if isinstance(share, float) else share if share >= 0 else size + share)
    with pytest.raises(QkError, match=f"qk.load: .*{path.name}.*copy it anew") as error:
        load(folder, small_model())
    if name == "tensors":
        assert f"must be {size} bytes long" in str(error.value)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_changed_byte_goes_unnoticed(data, whole, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flipped")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        loaded = load(folder, small_model())
    except QkError:
        return
    finally:
        shutil.rmtree(folder)
    # A space in qk.json that became another kind of space says the same.
    assert path.name == "qk.json"
    assert same(loaded, model, small_images())


def loads_or_is_refused(folder):
    """Whatever lies there, nothing but a QkError comes of it. The folder goes."""
    try:
        load(folder, small_model())
    except QkError:
        pass
    finally:
        shutil.rmtree(folder)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_tensors_that_only_claim_to_be_whole_do_not_crash(data, whole, tmp_path_factory):
    """The file's size and hash agree with qk.json, so that every later check has to hold on its own."""
    folder = tmp_path_factory.mktemp("resealed")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = tensor_file(folder)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(len(content) - 40, len(content)))]
    file = checkpoint.TensorFile(bytes=len(content), sha256=checkpoint.sha256(content).hexdigest())
    path.unlink()
    (folder / file.name).write_bytes(content)
    edit(folder, lambda fields: fields.update(tensors={"bytes": file.bytes, "sha256": file.sha256}))
    loads_or_is_refused(folder)


def test_an_edit_of_any_field_is_noticed(whole, tmp_path):
    fields = json.loads((whole / "qk.json").read_text())
    paths = [path for path in leaves(fields) if path]
    assert len(paths) > 100
    for path in paths:
        for value in (None, "x", -1, 2**70, [], {}, {"x": 1}, "DELETE"):
            changed = copy.deepcopy(fields)
            parent = changed
            for key in path[:-1]:
                parent = parent[key]
            if value == "DELETE":
                del parent[path[-1]]
            elif parent[path[-1]] == value:
                continue
            else:
                parent[path[-1]] = value
            (tmp_path / "qk.json").write_text(json.dumps(changed))
            with pytest.raises(QkError, match=r"qk.load: .*qk\.json"):
                load(tmp_path, small_model())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            set_at("format", value=FORMAT + 1),
            rf"qk.json: format must be at most {FORMAT}, got {FORMAT + 1}.*upgrade qk",
        ),
        (set_at("format", value="1"), "format must be a number from 1"),
        (set_at("format", value=True), "format must be a number from 1"),
        (lambda f: f.pop("format"), "format must be a number from 1 .*got None"),
        (lambda f: f.pop("folds"), "qk.json: folds must be field required"),
        (set_at("surprise", value=1), "qk.json: surprise must be unexpected"),
        (set_at("layers", "left", "kernel", value=3), "layers.left.kernel must be unexpected"),
        (set_at("layers", "left", "groups", value=2), "layer left: weight shape|layer left: groups must be 2, got 3"),
        (set_at("layers", "left", "groups", value=0), "groups must be positive"),
        (set_at("layers", "left", "stride", value=[2, 2]), r"layer left: stride must be \(2, 2\), got \(1, 1\)"),
        (set_at("layers", "left", "padding", value=[2, 1]), "layer left: padding must be"),
        (set_at("layers", "left", "dilation", value=[1, 2]), "layer left: dilation must be"),
        (set_at("layers", "left", "weight_shape", value=[12, 3, 3, 5]), "layer left: weight shape must be"),
        (set_at("layers", "left", "weight_shape", value=[12, 36]), "weight_shape must be 4 positive sizes"),
        (set_at("layers", "left", "bias", value=False), "layer left: bias must be False, got True"),
        (set_at("layers", "stem", "bias", value=False), "stem.bias must be absent"),
        (set_at("layers", "left", "kind", value="linear"), "linear"),
        (
            set_at("layers", "other", value={"kind": "linear", "weight_shape": [1, 1], "bias": True}),
            "layers names other",
        ),
        (set_at("layers", value={}), "layers must name an integer layer"),
        (set_at("plan", "layers", "left", "weights", value=2), r"layer left: QConv2d: (packed|weight_zero) must be"),
        (set_at("plan", "layers", "left", "weights", value=5), "plan.layers.left.weights must be"),
        (set_at("plan", "layers", "left", "group_size", value=None), "layer left: QConv2d: weight_step must be"),
        (set_at("plan", "layers", "left", "group_size", value=7), "group_size must be a divisor of K = 36"),
        (lambda f: f["plan"]["layers"].pop("left"), "layers names left, for which the plan has no widths"),
        (lambda f: f["modules"].pop("plain"), "folds names norm3 -> plain"),
        (lambda f: f["modules"].pop("embedding"), "modules must be those .* got embedding, which the model has too"),
        (set_at("modules", "twice.gate", value="ReLU"), "got twice.gate, which the model lacks"),
        (set_at("modules", "embedding", value="Linear"), "modules.embedding must be Linear, got Embedding"),
        (set_at("modules", "left", value="Conv2d"), "layers and modules do not agree on left"),
        (set_at("folds", value={}), "layer stem: bias must be True, got False"),
        (set_at("folds", "twice", value="stem"), "folds names twice -> stem"),
        (lambda f: f["tied"].pop("out.weight"), "tensor out.weight must be there"),
        (set_at("tied", "out.weight", value="nowhere"), "tensor out.weight must be there"),
        (set_at("tied", "out.weight", value="head.bias"), "tensor out.weight must be"),
        (set_at("tied", "new.weight", value="head.bias"), "tensor new.weight must be a tensor of the model"),
        (set_at("joins", value={"nowhere": ["left"]}), "joins names nowhere -> left"),
        (set_at("joins", value={"": ["left", "lost"]}), "joins names  -> left, lost"),
        (set_at("joins", value={"": []}), "joins names"),
        (set_at("joins", value={"": "left"}), "joins"),
        (set_at("tensors", "bytes", value=3), "must be 3 bytes long"),
        (set_at("tensors", "sha256", value="../../etc/passwd"), "tensors.sha256 must be"),
    ],
)
def test_wrong_fields_under_a_right_checksum_are_refused_by_name(folder, change, message):
    edit(folder, change)
    with pytest.raises(QkError, match=message):
        load(folder, small_model())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_wild_fields_under_a_right_checksum_do_not_crash(data, whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wild")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    path = data.draw(st.sampled_from([p for p in leaves(json.loads((whole / "qk.json").read_text())) if p]))
    numbers = st.integers(-3, 20) | st.sampled_from([2**31, 2**63, -(2**63), 2**200]) | st.floats()
    wild = st.recursive(
        st.none() | st.booleans() | numbers | st.text(max_size=5), lambda x: st.lists(x, max_size=4), max_leaves=4
    )
    edit(folder, set_at(*path, value=data.draw(wild)))
    loads_or_is_refused(folder)


def test_what_is_no_checkpoint_is_refused(tmp_path, folder):
    with pytest.raises(QkError, match=r"nowhere must be a folder made by qk.save, got no such path"):
        load(tmp_path / "nowhere", small_model())
    with pytest.raises(QkError, match=r"must be a folder made by qk.save, got a file"):
        load(folder / "qk.json", small_model())
    (tmp_path / "empty").mkdir()
    with pytest.raises(QkError, match=r"empty/qk.json must be there, got an empty folder"):
        load(tmp_path / "empty", small_model())
    for text in (b"", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"1" * 10_000, b'{"format": 1}'):
        (tmp_path / "empty" / "qk.json").write_bytes(text)
        with pytest.raises(QkError, match=r"qk.json.* must be .*copy it anew"):
            load(tmp_path / "empty", small_model())
    tensor_file(folder).unlink()
    with pytest.raises(QkError, match=r"safetensors must be there, as qk.json names it.*Copy the whole folder"):
        load(folder, small_model())


def test_a_file_that_cannot_be_read_is_named(folder):
    path = tensor_file(folder)
    path.unlink()
    path.mkdir()
    with pytest.raises(QkError, match="safetensors must be readable, got Is a directory"):
        load(folder, small_model())


# --- another model ----------------------------------------------------------------------------------------------------


class Small2(Small):
    pass


def changed(name, module):
    model = small_model()
    setattr(model, name, module)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: changed("head", nn.Linear(7, 11)),
            r"model: layer head: weight shape must be \(10, 7\), got \(11, 7\)",
        ),
        (lambda: changed("head", nn.Linear(7, 10, bias=False)), "layer head: bias must be True, got False"),
        (lambda: changed("head", nn.Conv2d(7, 10, 1)), "layer head must be a linear, got Conv2d"),
        (
            lambda: changed("left", nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=3, stride=2)),
            "layer left: stride",
        ),
        (lambda: changed("right", nn.Identity()), "layer right must be a conv2d, got Identity"),
        (lambda: changed("norm", nn.Identity()), "modules.norm must be a folded BatchNorm, got Identity"),
        (lambda: changed("plain", nn.Conv2d(12, 7, 1)), r"tensor plain.weight must be .*\[7, 12, 1, 1\], got .*3, 3\]"),
        (lambda: changed("embedding", nn.Embedding(5, 7).double()), "tensor embedding.weight must be torch.float64"),
        (lambda: changed("embedding", nn.EmbeddingBag(5, 7)), "modules.embedding must be Embedding, got EmbeddingBag"),
        (Small2, "modules: the model itself must be Small, got Small2"),
        (lambda: changed("extra", nn.ReLU()), "got extra, which the model has too"),
        (
            lambda: nn.Sequential(nn.Linear(2, 2)),
            "got alias, depth, embedding, head, left and 8 more, which the model lacks",
        ),
        (lambda: vision_model("resnet18"), "which the model lacks"),
        (lambda: "resnet18", "model must be the float nn.Module that was quantized, got str"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_and_says_where(folder, build, message):
    with pytest.raises(QkError, match=message):
        load(folder, build())


def test_an_integer_model_is_not_a_float_model(folder, model):
    with pytest.raises(QkError, match="model must be the float model, got one with integer layers"):
        load(folder, model)


def test_ties_that_the_checkpoint_does_not_have_are_refused(tmp_path):
    model = convert(small_prepared())
    model.out.weight = nn.Parameter(model.out.weight + 1)
    save(model, tmp_path)
    with pytest.raises(QkError, match="must be free to hold its own values, got tied to another tensor"):
        load(tmp_path, small_model())
    free = changed("out", nn.Linear(7, 5, bias=False))
    assert same(load(tmp_path, free), model, small_images())


def test_a_model_on_meta_is_refused(folder):
    with pytest.raises(QkError, match=r"qk.load: model must be on cpu or cuda, got stem.weight on meta"):
        load(folder, small_model().to("meta"))
