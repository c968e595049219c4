"""Images in folders of classes: numbers, splits, what is trained on."""

import pytest
import torch

import qk
from qk.sources import load_data


def test_a_folder_of_images_is_split_into_calibration_and_evaluation(tmp_path, monkeypatch):
    image_module = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)

    for color in ("red", "blue"):
        (tmp_path / "images" / color).mkdir(parents=True)
        for i in range(5):
            image_module.new("RGB", (20 + i, 30), color).save(tmp_path / "images" / color / f"{i}.png")
    data = load_data("imagefolder:images?size=16&resize=18&calibration=4", batch_size=3)
    assert [tuple(x.shape) for x in data.calibration] == [(3, 3, 16, 16), (1, 3, 16, 16)]
    assert sum(len(labels) for _, labels in data.evaluation) == 6
    for images, labels in data.evaluation:
        assert ((images[:, 0] > images[:, 2]).flatten(1).all(1) == labels.bool()).all()  # blue is 0, red 1
    assert sum(len(labels) for _, labels in data.train) == 4  # those that the evaluation does not see
    (tmp_path / "images" / "red" / "9.png").write_bytes(b"no image")
    with pytest.raises(qk.QkError, match=r"9\.png must be a readable image"):
        load_data("imagefolder:images?calibration=11")


def test_classes_have_one_number_in_all_splits(tmp_path, monkeypatch):
    image_module = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)

    def folder(split, name):
        (tmp_path / "images" / split / name).mkdir(parents=True)
        image_module.new("RGB", (16, 16), name).save(tmp_path / "images" / split / name / "0.png")

    for name in ("blue", "green", "red"):
        folder("train", name)
    (tmp_path / "images" / "train" / ".cache").mkdir()  # no images: no class
    for name in ("blue", "red"):
        folder("val", name)
    data = load_data("imagefolder:images?size=16&resize=16")
    assert [labels.tolist() for _, labels in data.evaluation] == [[0, 2]]
    folder("val", "yellow")
    with pytest.raises(qk.QkError, match="val must be the classes blue, green, red, got yellow, which the images to"):
        load_data("imagefolder:images?size=16&resize=16")


def test_images_to_train_on_are_shuffled_moved_and_mirrored(tmp_path, monkeypatch):
    image_module = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)

    for split in ("train", "val"):
        (tmp_path / "images" / split / "one").mkdir(parents=True)
        for i in range(6):
            image = image_module.linear_gradient("L").rotate(90).resize((24, 20))  # brighter from left to right
            image.save(tmp_path / "images" / split / "one" / f"{i}.png")
    data = load_data("imagefolder:images?size=16&resize=20&calibration=2", batch_size=6)
    assert len(data.train) == len(data.evaluation) == 1
    torch.manual_seed(0)
    (first, _), (second, _) = (next(iter(data.train)) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(next(iter(data.train))[0], first)
    assert not torch.equal(first, second)
    rises = [float(x[0, :, -1].mean() - x[0, :, 0].mean()) > 0 for x in torch.cat([first, second])]
    assert 0 < sum(rises) < 12
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) > 4  # not only mirrored
