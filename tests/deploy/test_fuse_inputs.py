"""What fuse and fused models take as input, and what they refuse."""

import pytest
import torch
from torch import nn

import qk
from deploy.small import minmax
from qk.deploy.fuse import FusedModel, fuse, unfused


def test_wrong_input_to_fuse_is_refused(small):
    model, x = small
    cases = [
        ((nn.Linear(3, 3).eval(), torch.ones(2, 3)), {}, "with an integer layer, got Linear, all in float"),
        ((model.state_dict(), x), {}, "model must be an nn.Module"),
        ((fuse(model, x), x), {}, "an unfused integer model, got a fused one"),
        ((model, torch.randn(2, 4, 13, 11)), {}, r"must be input that the model accepts, got .*\[2, 4, 13, 11\]"),
        ((model, []), {}, "a batch or a list of batches, got an empty list"),
        ((model, ["text"]), {}, "batch 0 of example must be a tensor"),
        ((model, x), {"tensors": 4}, "tensors must be 8 or None, got 4"),
        ((model, x), {"ranges": "mse"}, "ranges must be one of minmax, percentile"),
        ((model, [x, torch.full_like(x, torch.nan)]), {}, "batch 1 of example must be finite"),
        ((model, [x, x.double()]), {}, r"batch 1 of example must be like the first, float32 .*, got float64"),
        ((model, [x, (x, x)]), {}, r"batch 1 of example must be like the first, .*, got \(float32"),
        ((model, [x, x[:, :, 1:]]), {}, r"batch 1 of example must be like the first, .*, got float32 .*12, 11"),
        ((model, x), {"algorithm": "fast"}, "algorithm must be one of direct, winograd, or None, got 'fast'"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(qk.QkError, match=message):
            fuse(*arguments, **options)


def test_wrong_input_to_a_fused_model_is_refused(small):
    model, x = small
    fused = fuse(model, x)
    with pytest.raises(qk.QkError, match=r"x must be \[any, 3, 13, 11\], got \[2, 3, 12, 11\]. Fuse the model again"):
        fused(torch.randn(2, 3, 12, 11))
    with pytest.raises(qk.QkError, match="x must be float32, got float64"):
        fused(x.double())
    for wrong in (x.numpy(), None, [x], x.to_sparse()):
        with pytest.raises(qk.QkError, match="x must be a dense tensor, got"):
            fused(wrong)
    with pytest.raises(qk.QkError, match=r"device and dtype must be cpu and torch\.float32, as made, got"):
        fused.half()
    assert isinstance(fused.to("cpu").float(), FusedModel)


class Options(nn.Module):
    """Takes more than tensors, as models of libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, mask=None, scale=1.0, as_tuple=False):
        y = self.first(x) * scale
        y = self.second(y if mask is None else y + mask)
        return (y,) if as_tuple else y


def test_what_is_no_tensor_is_an_input_that_must_stay_as_it_was():
    x = torch.randn(5, 4)
    example = {"x": x, "mask": None, "scale": 2.0, "as_tuple": True}
    model = qk.convert(minmax(qk.prepare(Options().eval(), example, qk.Recipe(method="nearest")), [example]))
    fused = fuse(model, example)
    with torch.no_grad():
        assert torch.equal(fused(**example)[0], unfused(model, example)(**example)[0])
    for changed, message in (
        ({"as_tuple": False}, "as_tuple must be True, as in the example, got False. Fuse the model again"),
        ({"scale": 3.0}, "scale must be 2.0, as in the example, got 3.0"),
        ({"scale": 2}, "scale must be 2.0, as in the example, got 2"),
        ({"mask": torch.zeros(8)}, r"mask must be None, as in the example, got float32 \[8\]"),
    ):
        with pytest.raises(qk.QkError, match=f"FusedModel: {message}"):
            fused(**example | changed)
