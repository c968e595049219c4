"""Models that ask views of a convolution's output: the integer model runs on them as the float one does."""

import pytest
import torch
from torch import nn

import qk
from qk.deploy import unfused

NEAREST = qk.Recipe(method="nearest")


class Viewed(nn.Module):
    """A view behind a pool behind the second of two convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(128, 4)

    def forward(self, x):
        x = self.pool(torch.relu(self.b(torch.relu(self.a(x)))))
        return self.head(x.view(x.size(0), -1))


class ViewedEarly(Viewed):
    """A view of the first convolution's output, asked for when the second has run."""

    def forward(self, x):
        first = torch.relu(self.a(x))
        second = self.b(first)
        return self.head(self.pool(second).flatten(1)) + first.view(x.shape[0], -1)[:, :4]


class Shuffled(Viewed):
    """Channels of groups mixed, as ShuffleNet writes it: a view with more axes."""

    def forward(self, x):
        x = self.a(x)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).contiguous().view(x.shape)
        return self.head(self.pool(self.b(x)).flatten(1))


def data():
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=rng) for _ in range(2)]


@pytest.mark.parametrize(("make", "contiguous"), [(Viewed, {"b"}), (ViewedEarly, {"a", "b"}), (Shuffled, set())])
def test_the_integer_model_runs_and_is_saved_loaded_and_fused(make, contiguous, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    result = qk.quantize(model, data(), NEAREST, progress=False, out=tmp_path)
    assert result.prepared.contiguous == contiguous
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        found = result.model(x)
        # 8-bit inputs and 4-bit weights of two layers and 8-bit ones: well within a fifth of the float output.
        assert (found - model(x)).abs().max() < 0.2 * model(x).abs().max()
        with qk.deploy.definition():
            assert torch.equal(result.model(x), found)
        with result.prepared.quantized() as simulated:
            torch.testing.assert_close(simulated(x), found, rtol=0, atol=1e-5)
    loaded = qk.load(tmp_path, model=make().eval())
    assert torch.equal(loaded(x), found)
    assert {name for name in ("a", "b") if loaded.get_submodule(name).contiguous} == contiguous
    assert result.fused is not None, result.report.notes
    assert torch.equal(result.fused(x), unfused(result.model, data())(x))


def test_a_float_convolution_lies_as_its_input_does():
    recipe = qk.Recipe(method="nearest", skip=("b",), first_last=None)
    result = qk.quantize(Viewed().eval(), data(), recipe, progress=False)
    assert result.prepared.contiguous == {"b"}
    assert result.model.a.contiguous
    assert result.model(data()[0]).shape == (4, 4)


def test_other_models_keep_channels_last():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).eval()
    p = qk.prepare(model, data()[0], NEAREST)
    assert p.contiguous == set()
    qk.calibrate(p, data())
    assert qk.convert(p)[0](data()[0]).is_contiguous(memory_format=torch.channels_last)
