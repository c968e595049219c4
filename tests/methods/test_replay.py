"""Iterations that are replayed: equal to those that run, bit for bit.

In the place of CUDA's graphs stands a recorder of torch's operators, which like them keeps nothing of what Python
computes and refuses to read a value back.
"""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from methods.digits import quantized_digits
from qk.methods import brecq, reconstruct
from qk.methods.cache import Sample
from qk.methods.replay import WARM, CudaGraphs, Replay
from qk.spec import Recipe

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default)


GROUPS = {"group_size": 16, "overrides": {"stem.0": {"group_size": None}}}


class Recorder(TorchDispatchMode):
    """Runs what it records, which a graph does not: see Recorded.record."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            raise RuntimeError(f"{func} waits for the device")
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found


class Recorded:
    """As CudaGraphs. Recording leaves tensors that were there before as they were, as on a GPU, which runs replays."""

    def __init__(self, state):
        self.state, self.replays, self.warmed = state, 0, 0

    @contextmanager
    def warming(self):
        self.warmed += 1
        yield

    def record(self, body):
        before = [(t, t.detach().clone()) for t in self.state()]
        recorder = Recorder()
        try:
            with recorder:
                found = body()
        finally:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
        return found, lambda: self.replay(recorder.calls)

    @torch.no_grad()
    def replay(self, calls):
        self.replays += 1
        for func, args, kwargs, found in calls:
            given = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for old, new in zip(tensors(found), tensors(func(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:  # neither a view nor written in place
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def recorded(monkeypatch):
    """Makes every Learner replay; what it was given, one for each unit."""
    made = []
    init = brecq.Learner.__init__

    def replaying(self, module, layers, quantizers, recipe, phase=None, generator=None, graphs=None):
        def state():
            held = [v for slot in self.optimizer.state.values() for v in slot.values() if isinstance(v, torch.Tensor)]
            return [*held, *self.steps, *(rounding.v for rounding in self.roundings)]

        made.append(Recorded(state))
        init(self, module, layers, quantizers, recipe, phase, generator, made[-1])
        for group in self.optimizer.param_groups[: len(self.steps)] if self.replay else []:
            group["lr"] = torch.as_tensor(
                group["lr"]
            ).double()  # as of what is not replayed; CUDA's optimizer takes float32

    monkeypatch.setattr(brecq.Learner, "__init__", replaying)
    return made


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "fisher"}, {"loss": "fisher_full"}, {"order": "weights_first"}, {"drop": 0.5}, GROUPS],
    ids=lambda options: "-".join(options) or "default",
)
def test_replayed_iterations_learn_the_same_bits(digits, batches, recorded, monkeypatch, options):
    recipe = Recipe(weights=3, activations=4, iterations=40, **options)
    found, graphs = learned(digits, batches, recipe), list(recorded)
    assert graphs
    assert all(g.warmed == WARM for g in graphs)
    assert {g.replays for g in graphs} <= {37, 10 - WARM}  # steps learned alone have a quarter
    monkeypatch.undo()
    assert_same(found, learned(digits, batches, recipe))


def learned(digits, batches, recipe, hook=None):
    p = quantized_digits(digits, batches, recipe)
    if hook is not None:
        p.quant_layers()["layers.0.conv2"].register_forward_hook(hook)
    reconstruct(p, batches, recipe, progress="off")
    losses = {name: torch.tensor([at["loss"] for at in history]) for name, history in p.history.items()}
    return losses | p.model.state_dict()


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_a_module_that_reads_a_value_is_learned_as_it_is(digits, batches, recorded, monkeypatch):
    def hook(module, args, output):
        return output * float(output.max() > -1)

    recipe = Recipe(weights=3, activations=4, iterations=10)
    with pytest.warns(UserWarning, match="learned without CUDA graphs, as .*waits for the device") as warned:
        found = learned(digits, batches, recipe, hook)
    assert sum("CUDA graphs" in str(w.message) for w in warned) == 1
    assert sorted({g.replays for g in recorded}) == [0, 10 - WARM]
    monkeypatch.undo()
    assert_same(found, learned(digits, batches, recipe, hook))


def test_dropping_inside_a_unit_is_not_replayed(digits, batches, recorded):
    recipe = Recipe(weights=3, activations=4, iterations=10, drop=0.5, drop_inside=True)
    reconstruct(quantized_digits(digits, batches, recipe), batches, recipe, progress="off")
    assert all(g.replays == g.warmed == 0 for g in recorded)


def test_samples_of_another_part_have_a_graph_of_their_own():
    weight = torch.tensor(2.0)
    graphs = Recorded(list)
    replay = Replay(lambda sample: (sample.target * weight).sum(), graphs)
    for number in range(1, 12):
        part = number % 2
        sample = Sample((), {}, torch.full((3 + part,), float(number)), None, part)
        assert replay(sample).item() == 2 * number * (3 + part)
    assert graphs.warmed == 2 * WARM
    assert len(replay.recorded) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_replays_what_it_would_run(digits, batches, monkeypatch):
    """To rounding: a recorded product may be another library's kernel. A code differs where v ends next to 0."""
    recipe = Recipe(weights=3, activations=4, iterations=50)
    model, moved = copy.deepcopy(digits.model).cuda(), [batch.cuda() for batch in batches]
    replays = []
    record = CudaGraphs.record

    def counted(self, body):
        loss, replay = record(self, body)
        return loss, lambda: replays.append(replay())

    monkeypatch.setattr(CudaGraphs, "record", counted)
    found = [learned(SimpleNamespace(model=model), moved, recipe) for _ in range(2)]
    assert len(replays) == 2 * 5 * (recipe.iterations - WARM)
    assert_same(*found)
    monkeypatch.setattr(brecq, "CudaGraphs", lambda: None)
    plain = learned(SimpleNamespace(model=model), moved, recipe)
    for name in [name for name in found[0] if name.endswith("codes")]:
        assert (found[0][name] != plain[name]).float().mean() < 0.02, name
