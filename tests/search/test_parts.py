"""Sensitivities in a folder: found once, gone on with, shared by processes, and never another run's."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import qk
from qk.errors import QkError
from qk.search import choose
from qk.search.parts import Parts
from search.small import data, net
from threads import threads

pytestmark = pytest.mark.usefixtures("one_thread")
PROGRAM = Path(__file__).with_name("shared.py")


def search(folder, batches=6, **options):
    return qk.Search(qk.prepare(net(), data(1)[0]), data(batches), folder=folder, **options)


def started(folder, kind, seconds):
    paths = os.pathsep.join([str(PROGRAM.parents[1]), *sys.path])
    command = [sys.executable, str(PROGRAM), str(folder), kind, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": paths})


@pytest.mark.parametrize("kind", ["fisher", "alps", "hessian", "eagl"])
def test_a_folder_gives_the_same_bits_and_is_read_without_the_model_at_all_widths(tmp_path, monkeypatch, kind):
    expected = search(None).sensitivity(kind)
    assert search(tmp_path).sensitivity(kind) == expected
    monkeypatch.setattr(choose, "Bank", None)
    assert search(tmp_path).sensitivity(kind) == expected
    with threads(2):  # a whole one is an estimate that another number of threads may use
        assert search(tmp_path).sensitivity(kind) == expected


@pytest.mark.parametrize("kind", ["fisher", "alps", "hessian"])
def test_an_interrupted_one_goes_on(tmp_path, monkeypatch, kind):
    expected, computed, all_parts = search(None).sensitivity(kind), [], Parts.all

    def watched(self, count, compute, left=2):
        def part(number):
            if len(computed) == left:
                raise KeyboardInterrupt
            computed.append(number)
            return compute(number)

        return all_parts(self, count, part)

    monkeypatch.setattr(Parts, "all", watched)
    with pytest.raises(KeyboardInterrupt):
        search(tmp_path).sensitivity(kind)
    monkeypatch.setattr(Parts, "all", lambda self, count, compute: watched(self, count, compute, left=100))
    assert search(tmp_path).sensitivity(kind) == expected
    assert len(computed) == len(set(computed)), "a part was computed twice"


@pytest.mark.parametrize("kind", ["fisher", "alps"])
def test_processes_share_the_work_and_one_that_is_killed_leaves_its_part_to_others(tmp_path, kind):
    killed = started(tmp_path, kind, 60)
    assert killed.stdout.readline().strip() == "0"
    others = [started(tmp_path, kind, 0.3) for _ in range(2)]
    first = [other.stdout.readline().strip() for other in others]  # both are at work, on other parts
    assert len({"0", *first}) == 3
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    rest = [other.communicate(timeout=120)[0].split() for other in others]
    assert all(other.returncode == 0 for other in others)
    done = [int(number) for number in (*first, *rest[0], *rest[1])]
    parts = 6 if kind == "fisher" else 5
    assert sorted(done) == list(range(parts)), "every part once, that of the killed one too"
    assert search(tmp_path).sensitivity(kind) == search(None).sensitivity(kind)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batches": 5}, "other batches"),
        ({"weights": (2, 8)}, "items"),
        ({"ranges": "minmax"}, "ranges 'mse' instead of 'minmax'"),
    ],
)
def test_of_another_run_it_is_refused(tmp_path, changed, message):
    search(tmp_path).sensitivity("fisher")
    with pytest.raises(QkError, match=message):
        search(tmp_path, **changed).sensitivity("fisher")
    (tmp_path / "fisher-0.json").unlink()  # its parts are left
    with pytest.raises(QkError, match=message):
        search(tmp_path, **changed).sensitivity("fisher")


def test_parts_of_another_number_of_threads_are_refused(tmp_path):
    search(tmp_path).sensitivity("fisher")
    (tmp_path / "fisher-0.json").unlink()
    with threads(2), pytest.raises(QkError, match="threads 1 instead of 2"):
        search(tmp_path).sensitivity("fisher")


def test_a_damaged_file_is_refused(tmp_path):
    search(tmp_path).sensitivity("alps")
    path = tmp_path / "alps-0.json"
    whole = json.loads(path.read_text())
    whole["losses"][0][1] *= 2
    path.write_text(json.dumps(whole))
    with pytest.raises(QkError, match="as it was written, got other numbers"):
        search(tmp_path).sensitivity("alps")
    path.write_text(path.read_text()[:-20])
    with pytest.raises(QkError, match=r"alps-0\.json must be a sensitivity, got JSONDecodeError"):
        search(tmp_path).sensitivity("alps")
    path.unlink()
    part = tmp_path / "parts" / "alps-0-0001.safetensors"
    part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(QkError, match=r"alps-0-0001\.safetensors must be a part of a sensitivity"):
        search(tmp_path).sensitivity("alps")


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QkError, match="a folder that can be written"):
        search(tmp_path / "file")
