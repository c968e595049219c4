"""Attention between integer layers: a step of a program, with every kind of mask; what it cannot do stays in float."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qk
from qk.deploy import unfused
from qk.spec import Recipe

HEADS, DEPTH = 3, 8


class SelfAttention(nn.Module):
    """Heads cut out of rows and joined as libraries do it. lie: how the result is joined."""

    def __init__(self, lie: str = "reshape", **given: Any) -> None:
        super().__init__()
        wide = HEADS * DEPTH
        self.query, self.key, self.value, self.out = (nn.Linear(wide, wide) for _ in range(4))
        self.lie, self.given = lie, given

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        cut = [
            layer(x).view(*x.shape[:2], HEADS, DEPTH).transpose(1, 2) for layer in (self.query, self.key, self.value)
        ]
        y = F.scaled_dot_product_attention(*cut, attn_mask=mask, **self.given).transpose(1, 2)
        y = y.contiguous().view(*x.shape) if self.lie == "view" else y.reshape(*x.shape)
        return self.out(y)


class Twice(nn.Module):
    """Two of them share a mask."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.first, self.second = SelfAttention(**given), SelfAttention(lie="view", **given)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.second(torch.tanh(self.first(x, mask)), mask)


class Holds(nn.Module):
    """The mask is a buffer."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.twice = Twice()
        self.register_buffer("mask", mask_of(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(x, self.mask)


def rows(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randn(batch, length, HEADS * DEPTH, generator=torch.Generator().manual_seed(batch))


def integer(model: nn.Module, batch: Any) -> nn.Module:
    torch.manual_seed(0)
    recipe = Recipe(weights=8, activations=8, method="nearest")
    return qk.quantize(model.eval(), [batch], recipe, fused=False, measure=False).model


def mask_of(shape: tuple[int, ...]) -> Tensor:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.7
    mask[..., 0] = True
    return mask


def checked(model: nn.Module, batch: Any) -> qk.FusedModel:
    """Fused, with the bits of the unfused network; close to the integer model: its tensors have 8 bits more to lose."""
    whole = integer(model, batch)
    fused, steps, args = qk.fuse(whole, batch), unfused(whole, batch), batch if isinstance(batch, tuple) else (batch,)
    with torch.no_grad():
        got = fused(*args)
        assert torch.equal(got, steps(*args))
        want = whole(*args)
    noise = (got - want).square().mean() / want.square().mean()
    assert noise < 1e-2  # 20 dB: a wrong mask, scale or order of heads leaves 0 dB
    return fused


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize(
    "shape", [None, (2, 1, 1, 11), (2, 1, 11, 11), (1, 1, 11, 11), (1, 1, 1, 11), (11, 11), (1, 11)]
)
def test_attention_becomes_a_step(shape, held):
    if shape is None or held:
        batch, model = rows(), Holds(shape) if shape else Twice()
    elif shape[0] == 1:
        pytest.skip("the first axis of an input is the batch")
    else:
        batch, model = (rows(), mask_of(shape)), Twice()
    fused = checked(model, batch)
    assert fused.steps["attention"] == 2
    assert len(fused.regions) == 1
    assert not any("attention" in name for name, _ in fused.report)


@pytest.mark.parametrize("given", [{"scale": 0.7}, {"scale": DEPTH**-0.5, "dropout_p": 0.0}])
def test_a_scale_is_kept(given):
    assert checked(Twice(**given), rows()).steps["attention"] == 2


def test_other_batches_and_lengths_are_taken():
    whole = integer(Twice(), (rows(), mask_of((2, 1, 1, 11))))
    batch = (rows(), mask_of((2, 1, 1, 11)))
    fused, steps = qk.fuse(whole, batch), unfused(whole, batch)
    for size, length in ((1, 11), (5, 11), (3, 11)):
        other = (rows(size, length), mask_of((size, 1, 1, length)))
        with torch.no_grad():
            assert torch.equal(fused(*other), steps(*other))


def test_a_query_that_sees_nothing_gets_zeros():
    mask = mask_of((2, 1, 11, 11))
    mask[1, 0, 4] = False
    batch = (rows(), mask)
    fused = qk.fuse(integer(SelfAttention(), (rows(), mask_of((2, 1, 11, 11)))), (rows(), mask_of((2, 1, 11, 11))))
    with torch.no_grad():
        got = fused(*batch)
    assert torch.isfinite(got).all()  # torch's own gives NaN or zeros, as its kernels have it


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (SelfAttention(is_causal=True), rows()),
        (SelfAttention(), (rows(), mask_of((2, HEADS, 11, 11)))),
        (SelfAttention(), (rows(), torch.zeros(2, 1, 11, 11))),
    ],
    ids=["causal", "a mask for each head", "a mask that is added"],
)
def test_what_has_no_integer_form_stays_in_float(model, batch):
    fused = checked(model, batch)
    assert "attention" not in fused.steps
    assert any("scaled_dot_product_attention" in name for name, _ in fused.report)


def test_without_tensors_nothing_changes():
    whole = integer(SelfAttention(), rows())
    fused = qk.fuse(whole, rows(), tensors=None)
    assert "attention" not in fused.steps
    with torch.no_grad():
        assert torch.equal(fused(rows()), whole(rows()))


def test_a_fused_attention_is_exported():
    batch = (rows(), mask_of((2, 1, 1, 11)))
    fused = qk.fuse(integer(SelfAttention(), batch), batch)
    program = torch.export.export(fused, batch)
    with torch.no_grad():
        assert torch.equal(program.module()(*batch), fused(*batch))
