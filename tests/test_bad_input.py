"""What comes in wrong, through the public API alone: an error says what, where and what to do, before work is lost.

The stages have tests of their own for each of these; here a user meets them, mostly through qk.quantize.
"""

from __future__ import annotations

import itertools
import json
import os
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import qk
from qk import _native, flow
from small_nets import inputs

NAN = torch.full((2, 4, 6, 6), torch.nan)
WRONG = torch.zeros(2, 3, 6, 6)


def net(width: int = 4) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 3)).eval()


def quick(**fields):
    return qk.Recipe(**({"iterations": 2, "method": "nearest"} | fields))


@pytest.fixture
def nothing_is_learned(monkeypatch):
    """Fails a test in which learning began before the input was refused."""
    monkeypatch.setattr(flow, "reconstruct", lambda *args, **kwargs: pytest.fail("learning began"))


def labelled(**options) -> DataLoader:
    return DataLoader(TensorDataset(inputs(8, 4, 6, 6), torch.zeros(8, dtype=torch.int64)), batch_size=4, **options)


class Forever(IterableDataset):
    def __iter__(self):
        return itertools.repeat(inputs()[0])


BATCHES = {
    "no batch": (list, "qk.quantize: batches must be at least one batch, got none"),
    "a generator that was read": (lambda: iter(()), "batches must be at least one batch.* used before is empty"),
    "a loader of nothing": (lambda: DataLoader([], batch_size=2), "batches must be at least one batch"),
    "one batch alone": (inputs, "batches must be an iterable of batches, got Tensor. Put a single batch in a list"),
    "a data set": (lambda: labelled().dataset, "batches must be an iterable of batches, got TensorDataset"),
    "text": (lambda: ["a", "b"], "batch 0 must be a tensor, tuple or dict of tensors, got str"),
    "a batch without images": (
        lambda: [inputs(0, 4, 6, 6)],
        r"at least one value in every tensor, got .*\[0, 4, 6, 6\]",
    ),
    "NaN at once": (lambda: [NAN], "must be finite, got 288 NaN or Inf among 288 values"),
    "NaN later": (lambda: [inputs(), NAN], "qk.calibrate: batch 1, where it reaches 0, must be finite, got NaN"),
    "Inf later": (lambda: [inputs(), NAN.nan_to_num(torch.inf)], "batch 1, where it reaches 0, must be finite"),
    "another shape at once": (lambda: [WRONG], r"got float32 \[2, 3, 6, 6\], on which it raised RuntimeError"),
    "another shape later": (lambda: [inputs(), WRONG], r"batch 1 must be .*\[2, 4, 6, 6\].*got float32 \[2, 3, 6, 6\]"),
    "a keyword that is none": (lambda: [{"y": inputs()}], "unexpected keyword argument 'y'.* a dict keywords"),
    "images and labels": (labelled, r"got \(float32 \[4, 4, 6, 6\], int64 \[4\]\).*pass inputs only"),
    "labels later": (lambda: [inputs(), *labelled()], "qk.calibrate: batch 1 .*looks like labels: pass inputs only"),
    "more than memory_mb": (
        lambda: (inputs(64, 4, 32, 32) for _ in range(9)),
        "at most 1 MB, got more after 1 batches",
    ),
}


@pytest.mark.usefixtures("nothing_is_learned")
@pytest.mark.parametrize("case", BATCHES)
def test_bad_batches(case):
    make, message = BATCHES[case]
    with pytest.raises(qk.QkError, match=message):
        qk.quantize(net(), make(), qk.Recipe(memory_mb=1))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("batches", [lambda: itertools.repeat(inputs()), lambda: DataLoader(Forever(), batch_size=2)])
def test_endless_batches_end_and_say_so(batches):
    with pytest.raises(UserWarning, match="has no length and goes on after 64 batches"):
        qk.quantize(net(), batches(), quick())


def test_data_for_learning_is_checked_like_that_for_calibration():
    p = qk.prepare(net(), inputs())
    with pytest.raises(qk.QkError, match=r"qk.reconstruct: p must be calibrated.*Call qk.calibrate"):
        qk.reconstruct(p, [inputs()])
    qk.calibrate(p, [inputs()])
    before = {name: layer.codes.clone() for name, layer in p.quant_layers().items()}
    for batches, message in (
        ([], "at least one batch"),
        ([WRONG], "batch 0 must be input"),
        ([inputs(), NAN], "batch 1"),
    ):
        with pytest.raises(qk.QkError, match=f"qk.reconstruct: .*{message}"):
            qk.reconstruct(p, batches, qk.Recipe(iterations=2), progress="off")
    assert all(torch.equal(layer.codes, before[name]) for name, layer in p.quant_layers().items())


def on_cuda() -> nn.Module:
    """As on a GPU, without one."""
    model = nn.Sequential(nn.Linear(4, 4, device="meta"))
    with FakeTensorMode():
        model[0].weight, model[0].bias = nn.Parameter(torch.empty(4, 4, device="cuda")), None
    return model


MODELS = {
    "no module": (lambda: "resnet18", "model must be an nn.Module, got str"),
    "no layer": (lambda: nn.Sequential(nn.Flatten(), nn.Tanh()), "one with a Conv2d or Linear that can be quantized"),
    "unknown layers alone": (lambda: nn.Sequential(nn.Conv1d(4, 4, 1)), "got 0: Conv1d has no integer kernel"),
    "too long sums alone": (lambda: nn.Linear(65794, 2), "float for all: K = 65794 could overflow int32 at W8A8"),
    "no device": (lambda: nn.Linear(4, 4, device="meta"), "model must be on cpu or cuda, got weight on meta"),
    "a device without kernels": (on_cuda, "on a device with kernels, got 0.weight on cuda:0 and no CUDA kernels: none"),
}


@pytest.mark.usefixtures("nothing_is_learned")
@pytest.mark.parametrize("case", MODELS)
def test_bad_models(case, monkeypatch):
    monkeypatch.setattr(_native, "cuda_error", "none were built")
    make, message = MODELS[case]
    x = torch.zeros(1, 65794) if "sums" in case else torch.zeros(2, 4, 4)
    with pytest.raises(qk.QkError, match=f"qk.prepare: .*{message}"):
        qk.quantize(make(), [x])


def test_an_unknown_layer_stays_in_float_and_is_reported():
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(24, 3))
    report = qk.quantize(model, [inputs(2, 4, 6)], quick(), measure=False).report
    assert {x.name: x.reason for x in report.layers} == {"0": "Conv1d has no integer kernel", "2": ""}
    assert "Conv1d has no integer kernel" in "\n".join(table.plain() for table in report.tables())


def test_a_sum_too_long_for_int32_stays_in_float_and_is_reported():
    model = nn.Sequential(nn.Linear(65794, 2), nn.Linear(2, 2))
    report = qk.quantize(model, [torch.randn(1, 65794)], quick(), measure=False).report
    assert "K = 65794 could overflow int32 at W8A8; it holds up to 65793" in report.kept_table().plain()


RECIPES = {
    "an unknown field": ({"bits": 4}, "bits is an unexpected keyword argument, got 4. The fields are: weights, "),
    "an impossible width": ({"weights": 5}, "weights must be 2, 3, 4 or 8, got 5"),
    "an impossible width of activations": ({"activations": 16}, "activations must be 2, 3, 4, 5, 6, 7 or 8, got 16"),
    "no step": ({"iterations": 0}, "iterations must be greater than or equal to 1"),
    "an exponent without slope": ({"beta": (20, 0.5)}, "beta.1 must be greater than or equal to 1, got 0.5"),
    "a rate that is NaN": ({"weight_lr": float("nan")}, "weight_lr must be a finite number"),
    "a seed out of range": ({"seed": -1}, "seed must be greater than or equal to 0"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_bad_recipes(case, tmp_path):
    fields, message = RECIPES[case]
    with pytest.raises(qk.QkError, match=f"Recipe: {re.escape(message)}"):
        qk.Recipe(**fields)
    with pytest.raises(qk.QkError, match=f"recipe: {re.escape(message)}"):
        qk.Recipe.from_dict(fields)
    (tmp_path / "r.yaml").write_text(json.dumps({k: ".nan" if v != v else v for k, v in fields.items()}))
    with pytest.raises(qk.QkError, match=f"recipe: {message.split()[0]} "):
        qk.Recipe.from_yaml(tmp_path / "r.yaml")


@pytest.mark.usefixtures("nothing_is_learned")
@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"weights": 4}, "qk.quantize: recipe must be a qk.Recipe, got dict. qk.Recipe.from_dict makes one"),
        (qk.Recipe(skip=("fc",)), "recipe.skip must be patterns that match layers, got 'fc'. The layers: 0, 3"),
        (qk.Recipe(overrides={"0": {"weights": 6}}), "overrides for 0: weights must be 2, 3, 4 or 8, got 6"),
        (qk.Recipe(overrides={"0": {"width": 4}}), "overrides for 0: width is an unexpected keyword argument"),
        (qk.Recipe(group_size=7), r"group_size must be a divisor of K.*got 7 for 0 with K = 36"),
    ],
)
def test_recipes_that_do_not_fit_the_model(recipe, message):
    with pytest.raises(qk.QkError, match=message):
        qk.quantize(net(), [inputs()], recipe)


@pytest.mark.usefixtures("nothing_is_learned")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate": 0.5}, "evaluate must be a function of a model, got float"),
        ({"evaluate": lambda m: None}, "evaluate must be a function that returns the share of labels met.*got None"),
        ({"evaluate": lambda m: 98.7}, "share of labels met, from 0 to 1, got 98.7"),
        ({"latency_batches": (0,)}, "latency_batches must be sizes of at least 1, got 0"),
        ({"blocks": ["layer1"]}, "blocks must be names of modules, got 'layer1'"),
        ({"example": WRONG}, "example must be input that the model accepts"),
    ],
)
def test_options_that_would_fail_later_fail_at_once(options, message):
    with pytest.raises(qk.QkError, match=message):
        qk.quantize(net(), [inputs()], **options)


@pytest.mark.usefixtures("nothing_is_learned")
def test_a_model_that_takes_one_batch_size_is_not_timed_at_another():
    class Fixed(nn.Sequential):
        def forward(self, x):
            return super().forward(x.view(2, 4, 6, 6))

    with pytest.raises(qk.QkError, match="latency_batches must be sizes that the model accepts, got 1, on which"):
        qk.quantize(Fixed(*net()), [inputs()], latency_batches=(1,))


@pytest.mark.usefixtures("nothing_is_learned")
def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(qk.QkError, match=r"qk.quantize: .*file must be a folder that can be written, got"):
        qk.quantize(net(), [inputs()], out=tmp_path / "file")


@pytest.mark.usefixtures("nothing_is_learned")
def test_state_that_no_checkpoint_holds_is_refused_at_once(tmp_path):
    class Extra(nn.Sequential):
        def get_extra_state(self):
            return {"anything": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(qk.QkError, match="state _extra_state must be a tensor, got dict"):
        qk.quantize(Extra(*net()), [inputs()], out=tmp_path)


@pytest.mark.parametrize("stage", [lambda m: qk.calibrate(m, [inputs()]), lambda m: qk.reconstruct(m, []), qk.convert])
def test_stages_want_what_prepare_returns(stage):
    with pytest.raises(qk.QkError, match=r"p must be the result of qk.prepare, got Sequential. Call qk.prepare"):
        stage(net())


def test_only_what_is_calibrated_is_converted_and_only_what_is_converted_is_saved(tmp_path):
    with pytest.raises(qk.QkError, match=r"qk.convert: p must be calibrated.*Call qk.calibrate"):
        qk.convert(qk.prepare(net(), inputs()))
    with pytest.raises(qk.QkError, match=r"qk.save: model must be the result of qk.convert or qk.load, got Sequential"):
        qk.save(net(), tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return qk.save(qk.quantize(net(), [inputs()], quick(), measure=False).model, tmp_path_factory.mktemp("saved"))


def copied(saved, tmp_path):
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("pattern", ["*.safetensors", "qk.json"])
def test_a_truncated_checkpoint(saved, tmp_path, pattern):
    (file,) = copied(saved, tmp_path).glob(pattern)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(qk.QkError, match=f"qk.load: .*{file.name}.*copy it anew"):
        qk.load(tmp_path, net())


def test_an_edited_checkpoint(saved, tmp_path):
    file = copied(saved, tmp_path) / "qk.json"
    file.write_text(file.read_text().replace('"weights": 8', '"weights": 4', 1))
    with pytest.raises(qk.QkError, match=r"qk.load: .*qk.json: checksum must be .*changed: copy it anew"):
        qk.load(tmp_path, net())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: net(width=8), r"layer 0: weight shape must be \(4, 3, 3, 4\), got \(8, 3, 3, 4\). .* another model"),
        (
            lambda: nn.Sequential(*net(), nn.ReLU()),
            "got 4, which the model has too. Is the checkpoint of another model",
        ),
        (lambda: nn.Sequential(*list(net())[:3]), "got 3, which the model lacks"),
        (lambda: net().to("meta"), "model must be on cpu or cuda, got 0.weight on meta"),
    ],
)
def test_a_checkpoint_for_another_model(saved, model, message):
    with pytest.raises(qk.QkError, match=f"qk.load: .*{message}"):
        qk.load(saved, model())


def test_a_folder_without_a_checkpoint(saved, tmp_path):
    with pytest.raises(qk.QkError, match=r"nowhere must be a folder made by qk.save, got no such path"):
        qk.load(tmp_path / "nowhere", net())
    with pytest.raises(
        qk.QkError, match=r"qk.json must be there, got an empty folder. Give the folder that qk.save wrote"
    ):
        qk.load(tmp_path, net())


def test_a_report_that_cannot_be_written(tmp_path):
    report = qk.quantize(net(), [inputs()], quick(), measure=False).report
    (tmp_path / "file").write_text("")
    with pytest.raises(qk.QkError, match=r"report: .*r.html must be a file that can be written, got"):
        report.save(tmp_path / "file" / "r.html")


def test_a_model_that_is_quantized_already_is_named():
    result = qk.quantize(net(), [inputs(4, 4, 6, 6)], quick(), measure=False)
    with pytest.raises(qk.QkError, match="must be a float model, got one that qk quantized already"):
        qk.quantize(result.model, [inputs(4, 4, 6, 6)], quick())


def test_half_precision_is_told_the_way_out():
    with pytest.raises(qk.QkError, match=r"model.float\(\) gives it float32 weights"):
        qk.quantize(net().half(), [inputs(4, 4, 6, 6).half()], quick())


def test_callers_modes_do_not_reach_learning():
    batches, recipe = [inputs(4, 4, 6, 6)], quick(method="brecq")
    with torch.no_grad():
        assert qk.quantize(net(), batches, recipe, measure=False, progress=False).prepared.history
    with torch.inference_mode(), pytest.raises(qk.QkError, match=r"must be outside torch\.inference_mode"):
        qk.quantize(net(), batches, recipe, measure=False, progress=False)
    torch.set_default_dtype(torch.double)
    try:
        floats = net().float()
        assert qk.quantize(floats, batches, recipe, measure=False, progress=False).prepared.history
    finally:
        torch.set_default_dtype(torch.float32)
