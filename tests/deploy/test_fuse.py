"""Fused models give the bits of the integer network, and say what they cannot fuse."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qk
from deploy.small import minmax, small_images, small_prepared
from models import images, minilm, tokens, vision_model
from qk.deploy.fuse import fuse, unfused
from qk.deploy.modules import integer_layers
from qk.inputs import feed
from qk.ops._program import decode
from qk.ops.network import interpret

NETWORKS = {  # integer regions with tensors=8: these networks are one call
    "resnet18": 1,
    "mobilenet_v3_small": 1,
    "resnet34": 1,
    "resnet50": 1,
    "mobilenet_v2": 1,
    "mobilenet_v3_large": 1,
    "regnet_x_400mf": 1,
    "mnasnet1_0": 1,
    "vgg16_bn": 2,  # at 64 x 64 its adaptive pool makes an image larger
    "efficientnet_b0": 1,
    "densenet121": 1,
    "googlenet": 1,
}
QUICK = ("resnet18",)


def integer(model: nn.Module, batch: Any, **recipe: Any) -> nn.Module:
    recipe = {"weights": 4, "activations": 8, "method": "nearest"} | recipe
    return qk.convert(minmax(qk.prepare(model, batch, qk.Recipe(**recipe)), [batch]))


def results(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        found = feed(model, batch)
    if isinstance(found, Tensor):
        return [found]
    return [t for t in (found.values() if hasattr(found, "values") else found) if isinstance(t, Tensor)]


def assert_same(one: nn.Module, other: nn.Module, batch: Any) -> None:
    pairs = list(zip(results(one, batch), results(other, batch), strict=True))
    assert pairs
    for a, b in pairs:
        assert torch.equal(a, b), f"{int((a != b).sum())} of {a.numel()} values differ"


def of(name: str, **widths: int) -> Any:
    return pytest.param(name, widths, marks=[] if name in QUICK and not widths else pytest.mark.slow)


WIDTHS = ({"weights": 8}, {"activations": 6}, {"activations": 4})


@pytest.mark.parametrize(
    ("name", "widths"),
    [of(name) for name in NETWORKS] + [of(n, **w) for n in ("resnet18", "mobilenet_v3_small") for w in WIDTHS],
)
def test_a_fused_network_gives_the_bits_of_the_unfused_one(name, widths):
    model, x = integer(vision_model(name), images(), **widths), images()
    fused = fuse(model, x)
    assert_same(unfused(model, x), fused, x)
    assert len(fused.regions) == NETWORKS[name]
    exact = fuse(model, x, tensors=None)
    assert_same(model, exact, x)
    assert_same(model, exact, images(5))


@pytest.mark.slow
@pytest.mark.parametrize("tensors", [8, None])
def test_a_fused_sentence_encoder_gives_the_bits_of_the_unfused_one(tensors):
    batch = tokens()
    model = integer(minilm(), batch, weights=8)
    fused = fuse(model, batch, tensors=tensors)
    for inputs in (batch, tokens(3, 11)):
        assert_same(unfused(model, batch, tensors=tensors), fused, inputs)
        if tensors is None:
            assert_same(model, fused, inputs)
    assert fused.steps["gemm"] == 37
    assert fused.steps["quantize"] == (13 if tensors else 25)  # q, k and v share the codes of what they read
    assert fused.steps.get("attention", 0) == (6 if tensors else 0)
    assert ("encoder.layer.0.output.LayerNorm: layer_norm", "layer_norm has no integer form here") in fused.report


@pytest.mark.parametrize("tensors", [8, None])
def test_every_batch_size_is_taken(tensors):
    model, x = qk.convert(small_prepared()), small_images()
    fused, one_by_one = fuse(model, x, tensors=tensors), unfused(model, x, tensors=tensors)
    for size in (1, 2, 7):
        assert_same(one_by_one, fused, small_images(size))
    assert_same(fuse(model, x[:1], tensors=None), model, x)  # a batch of one is no constant either


@pytest.mark.parametrize("tensors", [8, None])
def test_every_device_gives_the_same_bits(tensors, device):
    x = small_images()
    want = fuse(qk.convert(small_prepared()), x, tensors=tensors)(x)
    model = qk.convert(small_prepared()).to(device)
    for layer in integer_layers(model).values():
        layer.prepack()  # emulated, the device is still the CPU
    fused = fuse(model, x.to(device), tensors=tensors)
    assert len(fused.regions) >= 1
    assert_same(unfused(model, x.to(device), tensors=tensors), fused, x.to(device))
    if device.type == "cpu":  # what is float between regions is torch's, whose last bits are each device's own
        assert torch.equal(fused(x), want)


def test_fused_programs_follow_the_definitions(small):
    model, x = small
    fused = fuse(model, x)
    weights = {
        f"{name}.prepacked": (layer.weight_codes(), layer.weight_zero)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, (qk.deploy.QConv2d, qk.deploy.QLinear))
    }
    calls = [node for node in fused.body.graph.nodes if node.target is torch.ops.qk.network.default]
    assert len(calls) == len(fused.regions)
    seen = {}
    for region, node in zip(fused.regions, calls, strict=True):
        seen[node.name] = (region, {offset: weights[name] for offset, name in region.weights.items()})

    class Definitions(torch.fx.Interpreter):
        def run_node(self, node):
            if node.name not in seen:
                return super().run_node(node)
            inputs, constants, _ = self.fetch_args_kwargs_from_env(node)[0]
            region, made_from = seen[node.name]
            return interpret(decode(region.program), inputs, constants, made_from)

    with torch.no_grad():
        assert torch.equal(Definitions(fused.body).run(x), fused(x))


class Gated(nn.Module):
    """Squeeze-and-excitation, hard-swish, a concatenation with a pool, an average over windows, a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project, self.side = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.last, self.head = nn.Conv2d(16, 12, 1), nn.Linear(12 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.stem(x))
        gate = self.excite(torch.relu(self.squeeze(nn.functional.adaptive_avg_pool2d(x, 1))))
        x = self.project(x * torch.sigmoid(gate)) + x
        sides = torch.cat([nn.functional.max_pool2d(x, 3, 1, 1), torch.relu_(self.side(x))], 1)
        y = nn.functional.avg_pool2d(nn.functional.silu(self.last(sides)), 3, 2, 1)
        return self.head(torch.flatten(y, 1))


@pytest.mark.parametrize("widths", [{}, {"weights": 8}, {"activations": 6}, {"activations": 4}, {"weights": 2}])
@pytest.mark.parametrize("ranges", ["minmax", "percentile"])
def test_gates_tables_pools_and_concatenations_become_one_program(widths, ranges):
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    model = integer(Gated().eval(), x, **widths)
    fused = fuse(model, [x, 2 * x], ranges=ranges)
    assert_same(unfused(model, [x, 2 * x], ranges=ranges), fused, x)
    assert len(fused.regions) == 1
    assert fused.report == []
    assert fused.steps["multiply"] == 1
    assert fused.steps.get("add", 0) == 0  # in the epilogue of project
    assert_same(fuse(model, x, tensors=None), model, x)


def test_quantizing_tensors_costs_little():
    """8 bits between layers of 8 bits: an error well below that of the layers themselves."""
    x = torch.randn(16, 3, 5, 6, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(0)
    model = Gated().eval()
    whole = integer(model, x, weights=8)
    wanted, got, exact = (results(m, x)[0] for m in (model, fuse(whole, x), whole))
    assert (got - wanted).norm() < 2.5 * (exact - wanted).norm()


def test_a_fused_model_is_exported_compiled_and_copied(small):
    model, x = small
    fused = fuse(model, x)
    assert_same(copy.deepcopy(fused), fused, x)
    assert_same(torch.compile(fused, backend="eager", fullgraph=True), fused, x)
    again = fuse(model, x)
    again.load_state_dict(fused.state_dict())
    assert_same(again, fused, x)
    free = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(fused, (x,), dynamic_shapes=free, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 5):
        assert_same(loaded, fused, small_images(size))


def test_a_fused_model_survives_pickling(small):
    model, x = small
    file = io.BytesIO()
    torch.save(fuse(model, x), file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=False), fuse(model, x), x)


def test_what_stays_in_float_is_reported(small):
    model, x = small
    report = dict(fuse(model, x).report)
    assert report["plain: conv2d"] == "named in the recipe's skip"
    assert report["out: linear"] == "its weight is shared with another module"
    assert report["sum"] == "sum has no integer form here"
    assert report["add"] == "add has no integer form here"  # of a row to a matrix
    x = torch.randn(2, 3, 5, 6)
    report = dict(fuse(integer(Gated().eval(), x), x, tensors=None).report)
    assert report["hardswish"] == "tensors=None leaves what it reads in float"


def test_the_model_is_not_changed(small):
    model, x = small
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    wanted = results(copy.deepcopy(model).eval(), x)
    fuse(model, x)
    assert all(m.training for m in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(results(model.eval(), x)[0], wanted[0])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else x


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Branches()
        with torch.no_grad():
            self.body.first.bias.fill_(9.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.layer(x)


class WrittenThroughAView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.view(-1).relu_()
        return self.second(y)


class ReadsAParameter(nn.Module):
    """A layer whose input is no tensor of the network's."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.linspace(-1, 1, 24).view(4, 6))
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(x + self.first(self.places)))


ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))


def test_a_branch_on_values_names_the_module():
    with pytest.raises(qk.QkError, match=r"torch\.export can follow, got 'body' \(Branches\).*unfused model works"):
        fuse(integer(Inside().eval(), ROWS), ROWS)


def test_state_that_forward_changes_is_refused():
    with pytest.raises(qk.QkError, match="free of state that its forward changes, got calls"):
        fuse(integer(Counter().eval(), ROWS), ROWS)


def test_writes_through_a_view_are_followed():
    model = integer(WrittenThroughAView().eval(), ROWS)
    assert_same(fuse(model, ROWS), model, ROWS)


def test_a_layer_that_reads_a_parameter_is_fused():
    model = integer(ReadsAParameter().eval(), ROWS)
    fused = fuse(model, ROWS)
    assert fused.steps["gemm"] == 2
    assert_same(unfused(model, ROWS), fused, ROWS)


class Lengths(nn.Module):
    """Takes the number of rows for a constant: where rows are only copied any is right, else the traced one alone."""

    def __init__(self, mixes: bool) -> None:
        super().__init__()
        self.mixes, self.first, self.second = mixes, nn.Conv2d(3, 4, 3), nn.Linear(36, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)).reshape(len(x), -1))
        return x * torch.arange(len(x)).view(len(x), 1) if self.mixes else x


def test_a_number_of_rows_that_was_taken_for_a_constant(small):
    images = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    model = integer(Lengths(mixes=False).eval(), images)
    fused = fuse(model, images)
    assert fused.batch is None
    for rows in (2, 4, 9):  # of a batch of one two are traced
        more = images[:1].repeat(rows, 1, 1, 1)
        assert_same(fused, unfused(model, more), more)

    assert torch.equal(fused(images[:1]), fused(images)[:1])
    with pytest.raises(qk.QkError, match=r"graph runs on the example, .* x\.shape\[0\] leaves it free"):
        fuse(model, images[:1])

    model = integer(Lengths(mixes=True).eval(), images)
    fused = fuse(model, images)
    assert fused.batch == 4
    assert_same(fused, unfused(model, images), images)
    with pytest.raises(qk.QkError, match=r"x must be \[4, 3, 5, 5\], got \[3, 3, 5, 5\]"):
        fused(images[:3])
    result = qk.quantize(Lengths(mixes=True).eval(), [images], qk.Recipe(method="nearest"), progress=False)
    assert result.fused is None
    assert any("batches of 4 alone" in note for note in result.report.notes)
    assert fuse(*small).batch is None


class Shared(nn.Module):
    """Divides by the number of rows, or takes a first axis that is no batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(6, 6)

    def forward(self, x: Tensor, prior: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        return y / len(x) if self.kind == "mean" else y * prior


def test_rows_that_depend_on_their_number_are_not_taken_for_free():
    fused = fuse(integer(Shared("mean").eval(), ROWS), ROWS)
    assert fused.batch == len(ROWS)
    with pytest.raises(qk.QkError, match=r"x must be \[4, 6\], got \[5, 6\]"):
        fused(torch.randn(5, 6))


def test_a_first_axis_that_is_no_batch_is_not_taken_for_one():
    pair = (ROWS, torch.ones(6))
    model = integer(Shared("prior").eval(), pair)
    fused = fuse(model, pair)
    assert fused.batch is None
    assert_same(fused, unfused(model, pair), (ROWS[:3], torch.ones(6)))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("tensors", [8, None])
def test_torchs_own_attention_between_integer_layers(batch_first, tensors):
    # It asks views of tensors that were made contiguous for it.
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    x = torch.randn(4, 6, 16)
    model = integer(nn.Sequential(nn.Linear(16, 16), layer, nn.Linear(16, 4)).eval(), x)
    fused = fuse(model, x, tensors=tensors)
    assert fused.steps["gemm"] >= 3
    assert_same(fused, unfused(model, x, tensors=tensors), torch.randn(3, 6, 16) if batch_first else x)


def test_what_was_quantized_outlives_a_fault_of_fuse(monkeypatch, small):
    def broken(*_, **__):
        raise KeyError("lost")

    monkeypatch.setattr("qk.flow.fuse", broken)
    result = qk.quantize(
        Lengths(mixes=False).eval(), [torch.randn(4, 3, 5, 5)], qk.Recipe(method="nearest"), progress=False
    )
    assert result.fused is None
    assert any("please report it: qk.fuse raised KeyError" in note for note in result.report.notes)
