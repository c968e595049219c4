"""The cache of a unit's inputs and outputs."""

import tempfile
from pathlib import Path

import pytest
import torch

from qk.errors import QkError
from qk.methods.cache import Cache, Call, Room

CPU = torch.device("cpu")


def call(x, mask=None, flag=True):
    return Call.of((x,), {"mask": mask, "flag": flag})


def filled(rows=10, room=None, weight=False):
    cache = Cache(room or Room(1), CPU)
    for i in range(3):
        x = torch.full((rows, 4), float(i)) + torch.arange(rows)[:, None] * 0.01
        cache.add(call(x), call(-x), x * 10, x.square() if weight else None, more=2 - i)
    return cache


def test_rows_of_inputs_targets_and_weights_belong_together():
    cache = filled(weight=True)
    cache.normalize()
    assert cache.rows == 30
    assert len(cache.parts) == 1
    sample = cache.sample(8, 1.0, torch.Generator().manual_seed(0))
    assert sample.rows == 8
    assert torch.equal(sample.args[0] * 10, sample.target)
    assert len(sample.args[0][:, 0].unique()) == 8  # without replacement
    assert sample.kwargs == {"mask": None, "flag": True}
    ratio = sample.weight / sample.args[0].square().clamp(min=1e-9)
    torch.testing.assert_close(ratio[sample.args[0] > 0.1], torch.full_like(ratio[sample.args[0] > 0.1], ratio.max()))
    weights = torch.cat([chunk.weight for chunk in cache.chunks(7)])
    assert weights.shape == (30, 4)
    assert weights.mean().item() == pytest.approx(1.0, rel=1e-5)


def test_weights_that_are_all_zero_count_alike():
    cache = Cache(Room(1), CPU)
    cache.add(call(torch.ones(2, 3)), call(torch.ones(2, 3)), torch.ones(2, 3), torch.zeros(2, 3))
    cache.normalize()
    assert torch.equal(next(cache.chunks(9)).weight, torch.ones(2, 3))


@pytest.mark.parametrize("drop", [0.0, 0.25, 0.5, 1.0])
def test_drop_is_the_share_from_the_quantized_prefix(drop):
    cache = Cache(Room(8), CPU)
    x = torch.rand(64, 1003) + 1
    cache.add(call(x), call(-x), x, None)
    sample = cache.sample(64, drop, torch.Generator().manual_seed(0))
    share = (sample.args[0] > 0).float().mean().item()
    # 64192 draws: five standard deviations are 0.01
    assert share == pytest.approx(drop, abs=0.01)
    assert torch.equal(sample.args[0].abs(), sample.target)


def test_beyond_the_budget_rows_go_to_a_file_that_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = Room(1)
    cache = Cache(room, CPU)
    x = torch.randn(64, 3000)
    cache.add(call(x), call(-x), x * 2, None, more=1)
    cache.add(call(x + 1), call(-x), x * 2 + 2, None)
    assert room.in_files > 0
    assert list(Path(tmp_path).iterdir()) == []
    found = torch.cat([chunk.target for chunk in cache.chunks(50)])
    assert torch.equal(found, torch.cat([x * 2, x * 2 + 2]))
    assert torch.equal(torch.cat([chunk.args[0] for chunk in cache.chunks(50)]), torch.cat([x, x + 1]))


def test_a_full_disk_is_an_error_before_anything_is_written(monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", refuse, raising=False)
    with pytest.raises(QkError, match=r"must have 1 MB free.*No space left"):
        Room(0).empty((2**18,), torch.float32)


def test_what_has_no_batch_is_kept_from_the_call_and_another_one_makes_another_part():
    cache = Cache(Room(1), CPU)
    mask = torch.zeros(1, 5)
    for i, one in enumerate((mask, mask.clone(), mask + 1)):
        x = torch.full((4, 5), float(i))
        cache.add(call(x, one), call(x, one), x, None, more=2 - i)
    assert [part.rows for part in cache.parts] == [8, 4]
    seen = {chunk.kwargs["mask"].sum().item() for chunk in cache.chunks(4)}
    assert seen == {0.0, 5.0}


def test_batches_of_other_lengths_make_parts_and_all_are_sampled():
    cache = Cache(Room(1), CPU)
    for length in (3, 5, 3):
        x = torch.full((4, length), float(length))
        cache.add(call(x), call(x), x, None)
    generator = torch.Generator().manual_seed(0)
    lengths = [cache.sample(4, 0.5, generator).target.shape[1] for _ in range(40)]
    assert set(lengths) == {3, 5}


def test_what_the_prefix_does_not_change_is_kept_once():
    cache = Cache(Room(1), CPU)
    x, mask = torch.randn(4, 5), torch.zeros(4, 1)
    cache.add(Call.of((x, mask), {}), Call.of((x + 1, mask), {}), x, None)
    assert [store is None for store in cache.parts[0].plain] == [False, True]
