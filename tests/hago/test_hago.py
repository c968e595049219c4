"""qk.hago: topology, simulation, search and realization (tests (a) to (f) of the method's sheet)."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import qk
from hago import nets
from hago.nets import build
from qk.errors import QkError
from qk.hago import Strategy, hago
from qk.hago.hardware import Hardware

DEVICES = Hardware.shipped()
NETWORKS = (*nets.IMAGES, *nets.ROWS)


def changed(device, **operators):
    """A shipped device with descriptors of its own."""
    data = Hardware.load(device).to_dict()
    data["operators"] = data["operators"] | operators
    return data


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NETWORKS)
def test_the_realized_network_is_its_simulation(name, device):
    net, batches = build(name)
    found = hago(net, batches, device, tuner="random", trials=2, seed=3)
    unseen = 3 * torch.randn_like(batches[0])
    for batch in (*batches, unseen):
        with torch.no_grad():
            simulated, computed = found.simulate(batch), found.model(batch)
            for a, b in zip(tree_leaves(simulated), tree_leaves(computed), strict=True):
                assert torch.equal(a, b)
            if found.fused is not None:
                for a, b in zip(tree_leaves(found.fused(batch)), tree_leaves(computed), strict=True):
                    assert torch.equal(a, b)
    assert bool(found.topology.integer) == (device != "float_only")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_widest_is_near_the_float_network(name):
    net, batches = build(name)
    for device in ("x86_avx512_vnni", "arm_neon_dotprod"):
        found = hago(net, batches, device, tuner="default")
        with torch.no_grad():
            expected, y = tree_leaves(net(batches[0]))[0], tree_leaves(found.model(batches[0]))[0]
        # 8 bits leave an error of 2^-8 / sqrt(12) of a range, for a range of eight deviations 0.009 of the tensor; ten
        # such steps, each by itself, make 0.03.
        assert (y - expected).norm() <= 0.05 * expected.norm()


def test_a_float_device_changes_nothing():  # (a)
    net, batches = build("flat")
    found = hago(net, batches, "float_only")
    assert found.strategy.bits == {}
    assert found.fused is None
    for batch in batches:
        with torch.no_grad():
            assert torch.equal(found.model(batch), net(batch))
    names = {str(node.target) for node in found.model.graph.nodes if node.op == "call_function"}
    assert not any("quantize" in name or "qk" in name for name in names)


def test_a_device_with_convolutions_alone_has_regions_of_one():  # (b)
    net, batches = build("residual")
    data = Hardware.load("x86_avx512_vnni").to_dict()
    data["operators"] = {"conv2d": data["operators"]["conv2d"]}
    found = hago(net, batches, Hardware.from_dict(data), tuner="default")
    assert sorted(found.topology.integer.values()) == ["conv2d"] * 3
    readers = [node for node in found.model.graph.nodes if "qk.conv2d" in str(node.target)]
    assert len(readers) == 3
    for node in readers:
        assert "quantize" in str(node.args[0].target if node.args else node.kwargs["x"].target)  # float in, float out
        assert node.kwargs.get("out_step") is None
    dense = [reason for node, reason in found.topology.reasons.items() if "linear" in node.name]
    assert dense == ["x86_avx512_vnni has no dense in integers"]


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
        nn.init.constant_(self.a.weight, 1.0)
        nn.init.constant_(self.b.weight, 2.0)

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_operands_of_a_sum_take_the_larger_step():  # (c)
    found = hago(Sum(), [torch.tensor([-6.4, 1.0]).reshape(2, 1, 1, 1)], sums_of_bytes(), ranges="minmax")
    (joined,) = [d for d in found.topology.dimensions if len(d.joined) == 2]
    assert found.strategy.bits[joined.name] == 7  # a bit less than the type: two of them fit in
    step, zero = found.strategy.steps[joined.name]
    assert (step, zero) == (pytest.approx(0.2), 0)  # 0.1 of one, 0.2 of the other
    assert len(joined.edges) == 2


def sums_of_bytes():
    byte = {"integer": [{"inputs": "int8", "output": "int8"}]}
    return Hardware.from_dict(changed("arm_neon_dotprod", add=byte))


def test_an_accumulator_that_overflows_is_seen_in_the_simulation():  # (d)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 4, 1), nn.ReLU()).eval()
    with torch.no_grad():
        net[0].weight.abs_()
    batches = [torch.rand(2, 64, 4, 4)]
    narrow = hago(net, batches, "int16_accumulator", tuner="default")
    data = changed("int16_accumulator", conv2d={"begins": True, "integer": [{"inputs": "int8", "output": "int32"}]})
    data["operators"]["relu"] = {"integer": [{"inputs": "int32", "output": "int32"}]}
    wide = hago(net, batches, Hardware.from_dict(data), tuner="default")
    with torch.no_grad():
        expected = net(batches[0])
        assert torch.equal(narrow.simulate(batches[0]), narrow.model(batches[0]))
        assert (wide.model(batches[0]) - expected).norm() < 0.05 * expected.norm()
        assert (narrow.model(batches[0]) - expected).norm() > 0.5 * expected.norm()
    assert "sums may wrap" in narrow.table().plain()
    assert "sums may wrap" not in wide.table().plain()
    # What the search is for: fewer bits, with which the sums stay inside.
    searched = hago(net, batches, "int16_accumulator", tuner="annealing", trials=40)
    with torch.no_grad():
        assert (searched.model(batches[0]) - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("device", ["x86_avx2", "int16_accumulator"])
def test_greedy_is_never_worse_than_the_widest(device):  # (f)
    net, batches = build("residual")
    widest = hago(net, batches, device, tuner="default")
    greedy = hago(net, batches, device, tuner="greedy")
    assert greedy.strategy.loss <= widest.strategy.loss
    assert sum(greedy.strategy.bits.values()) <= sum(widest.strategy.bits.values())


def test_three_devices_make_three_networks():
    net, batches = build("residual")
    codes = {hago(net, batches, device, tuner="default").model.code for device in DEVICES if "x86" not in device}
    assert len(codes) == 4  # of sm_80, 89 and 90 one


@pytest.mark.parametrize("tuner", ["greedy", "random", "annealing", "exact"])
def test_a_limit_is_kept_and_seeds_repeat(tuner):
    net, batches = build("residual")
    runs = [hago(net, batches, "nvidia_sm80", tuner=tuner, limit=0.6, trials=12, seed=1) for _ in range(2)]
    widest = hago(net, batches, "nvidia_sm80", tuner="default")
    assert runs[0].strategy == runs[1].strategy
    assert runs[0].strategy.cost <= 0.6 * widest.strategy.cost
    assert runs[0].history


def test_what_is_judged_can_be_accuracy():
    net, batches = build("residual")
    with torch.no_grad():
        labels = net(batches[0]).argmax(1)
    seen = []

    def accuracy(run):
        seen.append(float((run(batches[0]).argmax(1) == labels).float().mean()))
        return seen[-1]

    found = hago(net, batches, "nvidia_sm80", evaluate=accuracy)
    assert found.strategy.loss == -max(seen)
    assert sum(found.strategy.bits.values()) < sum(d.choices[0] for d in found.topology.dimensions)


def test_a_strategy_is_kept_in_a_file(tmp_path):
    net, batches = build("residual")
    found = hago(net, batches, "arm_neon_dotprod", tuner="random", trials=3)
    again = hago(net, batches, "arm_neon_dotprod", strategy=found.strategy.save(tmp_path / "s.json"))
    assert again.strategy == found.strategy
    assert again.history == []
    with torch.no_grad():
        assert torch.equal(again.model(batches[0]), found.model(batches[0]))
    other = copy.deepcopy(net)
    nn.init.zeros_(other.fc.weight)
    with pytest.raises(QkError, match="one of this model"):
        hago(other, batches, "arm_neon_dotprod", strategy=found.strategy)
    with pytest.raises(QkError, match="one for x86_avx2"):
        hago(net, batches, "x86_avx2", strategy=found.strategy)
    with pytest.raises(QkError, match="JSON file with a strategy"):
        Strategy.load(tmp_path / "none.json")


def test_the_integer_network_exports():
    net, batches = build("flat")
    for device in ("arm_neon_dotprod", "x86_avx512_vnni"):
        found = hago(net, batches, device, tuner="default")
        program = torch.export.export(found.model, (batches[0],))
        with torch.no_grad():
            assert torch.equal(program.module()(batches[0]), found.model(batches[0]))


def test_on_our_kernels_it_is_as_good_as_fuse():
    net, batches = build("residual")
    found = hago(net, batches, "x86_avx512_vnni", tuner="default")
    recipe = qk.Recipe(weights=8, activations=8, method="nearest")
    fused = qk.quantize(net, batches, recipe).fused
    with torch.no_grad():
        expected = net(batches[0])
        errors = [float((run(batches[0]) - expected).norm()) for run in (found.fused, fused)]
    assert errors[0] <= 1.1 * errors[1]  # the same ranges but for the sum's operand
    assert found.fused.report == fused.report == []
    assert len(found.fused.regions) == len(fused.regions) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tuner": "best"}, "tuner must be one of"),
        ({"limit": 2.0}, "limit must be a share"),
        ({"limit": 0.01, "tuner": "greedy"}, "limit must be at least 0"),
        ({"limit": 0.5, "tuner": "default"}, "for the tuner default"),
        ({"tuner": "exact"}, "limit must be a share of the widest"),
        ({"lose": -1.0}, "lose must be 0 or more"),
        ({"ranges": "best"}, "ranges must be one of"),
    ],
)
def test_bad_options_are_refused(options, message):
    net, batches = build("flat")
    with pytest.raises(QkError, match=message):
        hago(net, batches, "nvidia_sm80", **options)


def test_batches_that_are_not_finite_are_refused():
    net, batches = build("flat")
    batches[1] = torch.full_like(batches[1], torch.inf)
    with pytest.raises(QkError, match="finite"):
        hago(net, batches, "nvidia_sm80")


def test_too_long_sums_stay_in_float():
    net = nn.Sequential(nn.Linear(70000, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    found = hago(net, [torch.randn(2, 70000)], "x86_avx512_vnni", tuner="default")
    assert "could leave int32" in next(iter(found.topology.reasons.values()))


def test_digests_are_of_what_a_device_does():
    device = Hardware.load("x86_avx2")
    assert replace(device, about="other words").digest == device.digest
    assert replace(device, least_weight_bits=4).digest != device.digest


def test_a_channel_without_weights_keeps_its_bias():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].weight[0] *= 1e-9
        net[0].weight[1] = 0
        net[0].bias[:2] = torch.tensor([0.5, 0.011])
    batches = [torch.randn(2, 3, 8, 8)]
    for device in ("arm_neon_dotprod", "x86_avx2"):
        found = hago(net[:2], batches, device, tuner="default")
        with torch.no_grad():
            y = found.model(batches[0])
        # The bias is kept in 30 bits (arm) or as float32.
        assert torch.allclose(y[:, 0], torch.tensor(0.5), rtol=1e-6)
        assert torch.allclose(y[:, 1], torch.tensor(0.011), rtol=1e-6)


def test_may_wrap_counts_the_bias():
    net = nn.Sequential(nn.Conv2d(2, 1, 1), nn.ReLU()).eval()
    batches = [torch.rand(2, 2, 4, 4)]
    assert "may wrap" not in hago(net, batches, "int16_accumulator", tuner="default").table().plain()
    data = changed("int16_accumulator", conv2d=conv("int8", "int16"))
    data["operators"]["conv2d"]["integer"][0]["accumulator"] = 14
    assert "may wrap" in hago(net, batches, Hardware.from_dict(data), tuner="default").table().plain()


def conv(inputs, output):
    return {"begins": True, "integer": [{"inputs": inputs, "output": output}]}


def test_moves_in_a_narrower_type_requantize_first():
    net, batches = build("flat")
    bytes_alone = {"integer": [{"inputs": "int8", "output": "int8"}]}
    device = Hardware.from_dict(changed("arm_neon_dotprod", max_pool2d=bytes_alone, reshape=bytes_alone))
    found = hago(net, batches, device, tuner="default")
    with torch.no_grad():
        assert torch.equal(found.simulate(batches[0]), found.model(batches[0]))
    (pool,) = [node for node in found.model.graph.nodes if "max_pool" in str(node.target)]
    assert "requantize" in str(pool.args[0].target)


def test_parts_of_a_concatenation_have_one_step_whatever_they_read():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(3, 4, 1) for _ in range(3))

        def forward(self, x):
            return torch.cat([torch.relu(self.a(x)), self.b(x) + self.c(x)], 1)

    both = {"integer": [{"inputs": "int8", "output": "int8"}, {"inputs": "int32", "output": "int32"}]}
    narrow = {"integer": [{"inputs": "int8", "output": "int8"}]}
    device = Hardware.from_dict(changed("arm_neon_dotprod", concatenate=both, add=narrow))
    torch.manual_seed(0)
    net, batches = Parts().eval(), [torch.randn(2, 3, 4, 4)]
    found = hago(net, batches, device, tuner="default")
    with torch.no_grad():
        assert torch.equal(found.simulate(batches[0]), found.model(batches[0]))
        assert (found.model(batches[0]) - net(batches[0])).abs().max() < 0.1


def test_inputs_of_another_size_are_refused():
    net, batches = build("residual")
    with pytest.raises(QkError, match="batch 1 must be like the first"):
        hago(net, [batches[0], batches[1][..., :12]], "arm_neon_dotprod")
    found = hago(net, batches, "arm_neon_dotprod", tuner="default")
    with pytest.raises(QkError, match="must be"):
        found.model(batches[0][..., :12])
    with torch.no_grad():
        assert found.model(batches[0][:1]).shape == (1, 10)


def test_steps_of_a_strategy_are_checked():
    net, batches = build("flat")
    strategy = hago(net, batches, "nvidia_sm80", tuner="default", ranges="minmax").strategy
    assert hago(net, batches, "nvidia_sm80", strategy=strategy).grids.ranges == "minmax"
    first = next(iter(strategy.steps))
    for steps in ({}, strategy.steps | {first: (0.0, 0)}, strategy.steps | {first: (0.1, 999)}):
        with pytest.raises(QkError, match="a step above 0"):
            hago(net, batches, "nvidia_sm80", strategy=replace(strategy, steps=steps))


def test_layers_in_float_have_a_reason():
    class Computed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Conv2d(3, 3, 3, padding="same"), nn.Parameter(torch.randn(2, 3, 1, 1))

        def forward(self, x):
            return nn.functional.conv2d(self.a(x), self.w - self.w.mean((2, 3), keepdim=True) + 1)

    found = hago(Computed().eval(), [torch.randn(2, 3, 8, 8)], "x86_avx512_vnni", tuner="default")
    assert list(found.topology.integer.values()) == ["conv2d"]
    assert "its weight or bias is computed" in found.table().plain()


def test_images_are_read_as_they_lie():
    net, batches = build("flat")
    found = hago(net, batches, "x86_avx512_vnni", tuner="default")
    assert len(found.fused.regions) == 1
    assert found.fused.report == []


def test_many_layers_that_read_one_tensor():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(12))

        def forward(self, x):
            return torch.cat([head(x) for head in self.heads], 1)

    net, batches = Heads().eval(), [torch.randn(16, 8)]
    for tuner in ("greedy", "exact"):
        found = hago(net, batches, "nvidia_sm80", tuner=tuner, limit=0.5)
        assert found.strategy.cost <= 0.5 * 12 * 16


def test_batch_norms_behind_joins_stay_in_the_region():
    net, batches = build("norms")
    found = hago(net, batches, "x86_avx512_vnni", tuner="default")
    assert "depthwise_conv2d" in found.topology.integer.values()
    assert len(found.fused.regions) == 1
    assert found.fused.report == []
