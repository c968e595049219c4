"""Where channels can be scaled: every wiring has a path or a reason, and scaling along a path changes nothing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import images, minilm, tokens, vision_model
from qk.prepare import prepare
from qk.prepare.scaling import scale, usable_paths
from qk.spec import Recipe
from small_nets import Net, inputs, residual_net


def parts():
    torch.manual_seed(0)
    return {
        "a": nn.Conv2d(4, 6, 3, padding=1), "b": nn.Conv2d(6, 4, 3, padding=1), "c": nn.Conv2d(6, 5, 1, groups=1),
        "deep": nn.Conv2d(6, 12, 3, padding=1, groups=6), "wide": nn.Conv2d(12, 4, 1),
        "grouped": nn.Conv2d(6, 4, 3, groups=2), "norm": nn.BatchNorm2d(6), "relu": nn.ReLU(), "slope": nn.PReLU(6),
        "six": nn.ReLU6(inplace=True), "head": nn.Linear(6, 3), "flat": nn.Linear(6 * 36, 3), "drop": nn.Dropout(),
        "strided": nn.Linear(6 * 9, 3),
    }  # fmt: skip


def found(wiring, x=None, recipe=None, **more):
    """The prepared net and source -> readers of its paths."""
    model = Net(wiring, **(parts() | more)).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.uniform_(0.5, 2)
                module.running_mean.uniform_(-1, 1)
    p = prepare(model, inputs() if x is None else x, recipe or Recipe(weights=4, activations=8))
    return p, {path.source: tuple(path.readers) for path in p.paths}


THROUGH = {
    "nothing": lambda m, x: m.b(m.a(x)),
    "a function": lambda m, x: m.b(F.relu(m.a(x))),
    "a module": lambda m, x: m.b(m.relu(m.a(x))),
    "a function in place": lambda m, x: m.b(F.relu_(m.a(x))),
    "a folded norm": lambda m, x: m.b(m.relu(m.norm(m.a(x)))),
    "a leaky function": lambda m, x: m.b(F.leaky_relu(m.a(x), 0.1)),
    "learned slopes": lambda m, x: m.b(m.slope(m.a(x))),
    "maxima": lambda m, x: m.b(F.max_pool2d(m.a(x).relu(), 3, 2, 1)),
    "means": lambda m, x: m.b(F.avg_pool2d(m.a(x), 3, 1, 1)),
    "means of given size": lambda m, x: m.b(F.adaptive_avg_pool2d(m.a(x), (3, 2))),
    "dropout": lambda m, x: m.b(m.drop(m.a(x))),
    "groups": lambda m, x: m.grouped(m.a(x).relu()),
    "the mean of an image": lambda m, x: m.head(m.a(x).relu().mean((2, 3))),
    "a pool of one value": lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x), 1).flatten(1)),
    "flat images": lambda m, x: m.flat(m.a(x).relu().flatten(1)),
    "flat pooled images": lambda m, x: m.strided(F.max_pool2d(m.a(x), 2).flatten(1)),
    "another order of axes": lambda m, x: m.head(m.a(x).permute(0, 2, 3, 1)),
    "a part of the image": lambda m, x: m.head(m.a(x)[:, :, 0, 1]),
    "there and back": lambda m, x: m.b(m.a(x).flatten(2).view(2, 6, 6, 6)),
    "a copy": lambda m, x: m.b(m.a(x).clone()),
}  # fmt: skip


@pytest.mark.parametrize("wiring", THROUGH.values(), ids=THROUGH.keys())
def test_scaling_along_a_path_changes_nothing(wiring):
    x = inputs()
    p, paths = found(wiring)
    assert list(paths) == ["a"]
    with torch.no_grad():
        before = p.model(x)
        weight = p.originals["a"].weight.clone()
        factor = torch.logspace(-3, 3, 6, dtype=torch.float64)[torch.randperm(6)]
        scale(p, p.paths[0], factor)
        found_after = p.model(x)
    assert not torch.equal(p.originals["a"].weight, weight)
    # Each weight is rounded once more: K products of 2^-24, in two layers, for values of size 1 and K up to 216.
    torch.testing.assert_close(found_after, before, rtol=0, atol=2e-5)


def test_power_of_two_factors_change_no_bit():
    x = inputs()
    p, _ = found(lambda m, x: m.wide(m.deep(m.a(x).relu()).relu()))
    assert [path.source for path in p.paths] == ["a", "deep"]
    with torch.no_grad():
        before = p.model(x)
        for path in p.paths:
            scale(p, path, torch.exp2(torch.randint(-8, 8, (path.channels,)).double()))
        assert torch.equal(p.model(x), before)


AGAINST = {
    "a sum": (lambda m, x: m.b(m.a(x) + 1), "add"),
    "a residual": (lambda m, x: m.head((m.a(x).relu() + F.pad(x, (0, 0, 0, 0, 0, 2))).mean((2, 3))), "add"),
    "a read elsewhere": (lambda m, x: m.b(y := m.a(x)).mean() + y.abs().mean(), "abs"),
    "a returned tensor": (lambda m, x: (y := m.a(x), m.b(y)), "returned"),
    "a smooth function": (lambda m, x: m.b(F.gelu(m.a(x))), "gelu"),
    "a function that clips": (lambda m, x: m.b(F.relu6(m.a(x))), "hardtanh"),
    "a sigmoid": (lambda m, x: m.b(m.a(x).sigmoid()), "sigmoid"),
    "a product": (lambda m, x: m.b((y := m.a(x)) * y.mean((2, 3), keepdim=True)), "mul"),
    "mixed channels": (lambda m, x: m.b(m.a(x).reshape(2, 6, 2, 18).transpose(1, 2).reshape(2, 6, 6, 6)), "mixed"),
    "a reader that runs twice": (lambda m, x: m.b(m.a(x)) + m.b(m.a(x)), "more than once"),
    "a function between that runs on weights": (lambda m, x: m.b(m.a(x)) * m.a.weight.mean(), None),
    "a concatenation": (lambda m, x: m.wide(torch.cat([m.a(x), F.pad(x, (0, 0, 0, 0, 0, 2))], 1)), "cat"),
    "memory that another name reads": (lambda m, x: _aliased(m, x), "memory"),
    "a bias that is read": (lambda m, x: m.b(m.a(x)).mean() + m.a.bias.mean(), "read elsewhere"),
    "nothing reads it": (lambda m, x: (m.a(x), m.b(F.pad(x, (0, 0, 0, 0, 0, 2))))[1], "no layer reads"),
}  # fmt: skip


def _aliased(m, x):
    """Written through a view, then read under the name of before."""
    y = m.a(x)
    z = y.view(2, 6, 36)
    z.relu_()
    m.unused = m.flat(z.flatten(1))
    return m.unused.mean() + y.amax()


@pytest.mark.parametrize(("wiring", "word"), AGAINST.values(), ids=AGAINST.keys())
def test_without_a_path_there_is_a_reason(wiring, word):
    p, paths = found(wiring)
    assert "a" not in paths
    if word is None:  # it is no layer then
        assert "a" in p.kept
    else:
        assert word in p.blocked["a"]


def test_several_readers_and_chains():
    _, paths = found(lambda m, x: m.b(y := m.a(x).relu()).mean() + m.wide(m.deep(y).relu()).mean())
    assert paths == {"a": ("b", "deep"), "deep": ("wide",)}


def test_relu6_is_on_the_path_by_name():
    p, paths = found(lambda m, x: m.b(m.six(m.a(x))))
    assert paths == {"a": ("b",)}
    assert p.paths[0].clips == ("six",)
    usable, skipped = usable_paths(p, "test")
    assert usable == []
    assert "ReLU6" in skipped["a"]
    _, paths = found(lambda m, x: m.wide(m.deep(m.six(m.a(x))).clamp(0, 1)) + m.six(x).mean())
    assert "a" not in paths  # it runs twice


def test_norms_are_sources():
    torch.manual_seed(0)
    more = {"ln": nn.LayerNorm(4), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4), "bare": nn.LayerNorm(4, bias=False)}
    x = torch.randn(2, 5, 4)
    p, paths = found(lambda m, x: m.down(m.up(m.ln(x)).relu()) + x, x, **more)
    assert paths == {"ln": ("up",), "up": ("down",)}
    with torch.no_grad():
        before = p.model(x)
        scale(p, p.paths[0], torch.logspace(-2, 2, 4).double())
        torch.testing.assert_close(p.model(x), before, rtol=0, atol=1e-5)
        assert not torch.equal(p.model.ln.weight, torch.ones(4))
    _, paths = found(lambda m, x: m.up(m.bare(x)), x, **more)
    assert paths == {"bare": ("up",)}
    p, paths = found(lambda m, x: m.down(F.gelu(m.up(y := m.ln(x)))) + y, x, **more)
    assert paths == {}
    assert "add" in p.blocked["ln"]
    p, paths = found(lambda m, x: m.up(m.ln(x)) * m.ln.weight.mean(), x, **more)
    assert "read elsewhere" in p.blocked["ln"]
    plain = nn.LayerNorm(4, elementwise_affine=False)
    p, paths = found(lambda m, x: m.up(m.ln(x)), x, **(more | {"ln": plain}))
    assert "ln" not in {*p.blocked, *paths}  # it has no weights


def test_a_preactivation_norm_is_a_source():
    _, paths = found(lambda m, x: m.b(m.norm(F.pad(x, (0, 0, 0, 0, 0, 2))).relu()))
    assert paths == {"norm": ("b",)}


@pytest.mark.parametrize("kind", ["sdpa", "bmm"])
def test_values_of_attention_are_a_source_and_queries_are_not(kind):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            heads = [f(x).view(2, 5, 2, 4).transpose(1, 2) for f in (self.q, self.k, self.v)]
            if kind == "sdpa":
                y = F.scaled_dot_product_attention(*heads)
            else:
                y = (heads[0] @ heads[1].transpose(2, 3)).softmax(-1) @ heads[2]
            return self.out(y.transpose(1, 2).reshape(2, 5, 8))

    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    p = prepare(Attention().eval(), x, Recipe())
    assert [(path.source, *path.readers) for path in p.paths] == [("v", "out")]
    assert set(p.blocked) == {"q", "k", "out"}
    with torch.no_grad():
        before = p.model(x)
        scale(p, p.paths[0], torch.logspace(-2, 2, 8).double())
        torch.testing.assert_close(p.model(x), before, rtol=0, atol=1e-5)


def test_residual_units_have_paths_inside():
    p = prepare(residual_net(), inputs(), Recipe())
    assert {path.source: tuple(path.readers) for path in p.paths} == {"1.a": ("1.b",), "2.a": ("2.b",)}


@pytest.mark.parametrize(("name", "count"), [("resnet18", 8), ("mobilenet_v2", 37), ("regnet_x_400mf", 45)])
def test_networks_of_torchvision_keep_their_outputs(name, count):
    x = images(size=32)
    p = prepare(vision_model(name), x, Recipe())
    assert len(p.paths) == count
    assert {path.source for path in p.paths}.isdisjoint(p.blocked)
    assert {path.source for path in p.paths} | set(p.blocked) == set(p.layers)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = p.model(x)
        for path in p.paths:
            if not path.clips:
                scale(p, path, torch.exp2(torch.randint(-4, 4, (path.channels,), generator=generator)).double())
        assert torch.equal(p.model(x), before)


def test_minilm_has_paths_from_values_to_outputs():
    p = prepare(minilm(), tokens(), Recipe())
    base = "encoder.layer.{}.attention."
    expected = [(base.format(i) + "self.value", base.format(i) + "output.dense") for i in range(6)]
    assert [(path.source, *path.readers) for path in p.paths] == expected
    with torch.no_grad():
        before = p.model(**tokens()).last_hidden_state
        for path in p.paths:
            scale(p, path, torch.exp2(torch.arange(path.channels) % 9 - 4).double())
        assert torch.equal(p.model(**tokens()).last_hidden_state, before)
