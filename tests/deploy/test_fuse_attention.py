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
    """Heads cut out of rows and joined as libraries do it. joined_by: how the result is joined."""

    def __init__(self, joined_by: str = "reshape", **given: Any) -> None:
        super().__init__()
        wide = HEADS * DEPTH
        self.query, self.key, self.value, self.out = (nn.Linear(wide, wide) for _ in range(4))
        with torch.no_grad():  # scores that matter
            self.query.weight *= 4
            self.key.weight *= 4
        self.joined_by, self.given = joined_by, given

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.joined_by == "permute":
            cut = [rows.reshape(*x.shape[:2], HEADS, DEPTH).permute(0, 2, 1, 3) for rows in (q, k, v)]
            y = F.scaled_dot_product_attention(*cut, attn_mask=mask, **self.given).permute(0, 2, 1, 3)
        else:
            cut = [rows.view(*x.shape[:2], HEADS, DEPTH).transpose(1, 2) for rows in (q, k, v)]
            y = F.scaled_dot_product_attention(*cut, attn_mask=mask, **self.given).transpose(1, 2)
        y = y.contiguous().view(*x.shape) if self.joined_by == "view" else y.reshape(*x.shape)
        return self.out(y)


class Twice(nn.Module):
    """Two of them share a mask."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.first, self.second = SelfAttention(**given), SelfAttention(joined_by="view", **given)

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


LIMIT = 1e-3  # 30 dB of tensors with 8 bits; what is left out by mistake costs 10 times as much, as `checked` sees


def noise(got: Tensor, want: Tensor) -> float:
    return float((got - want).square().mean() / want.square().mean())


def checked(model: nn.Module, batch: Any, wrong: Any = None) -> qk.FusedModel:
    """Fused, with the bits of the unfused network; close to the integer model. wrong: a model or a batch that lacks
    what must not be lost."""
    whole = integer(model, batch)
    args = batch if isinstance(batch, tuple) else (batch,)
    fused, steps = qk.fuse(whole, batch), unfused(whole, batch)
    with torch.no_grad():
        got, want = fused(*args), whole(*args)
        assert torch.equal(got, steps(*args))
        assert noise(got, want) < LIMIT
        if isinstance(wrong, nn.Module):
            wrong.load_state_dict(model.state_dict())
            assert noise(integer(wrong, batch)(*args), want) > 10 * LIMIT
        elif wrong is not None:
            assert noise(whole(wrong), want) > 10 * LIMIT
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
    fused = checked(model, batch, batch[0] if isinstance(batch, tuple) else None)
    assert fused.steps["attention"] == 2
    assert len(fused.regions) == 1
    assert not any("attention" in name for name, _ in fused.report)


def test_a_scale_is_kept():
    assert checked(Twice(scale=1.0), rows(), Twice()).steps["attention"] == 2


def test_heads_are_cut_by_permute_as_well():
    assert checked(SelfAttention(joined_by="permute"), rows()).steps["attention"] == 1


def test_other_batches_are_taken():
    batch = (rows(), mask_of((2, 1, 1, 11)))
    whole = integer(Twice(), batch)
    fused, steps = qk.fuse(whole, batch), unfused(whole, batch)
    for size in (1, 5, 3):
        other = (rows(size), mask_of((size, 1, 1, 11)))
        with torch.no_grad():
            assert torch.equal(fused(*other), steps(*other))


def test_other_lengths_are_taken():
    whole = integer(Twice(), rows())
    fused, steps = qk.fuse(whole, rows()), unfused(whole, rows())
    for size, length in ((1, 7), (2, 1), (3, 40)):
        with torch.no_grad():
            assert torch.equal(fused(rows(size, length)), steps(rows(size, length)))


def test_a_query_that_sees_nothing_gets_zeros():
    mask = mask_of((2, 1, 11, 11))
    whole = integer(SelfAttention(), (rows(), mask))
    fused = qk.fuse(whole, (rows(), mask))
    assert fused.steps["attention"] == 1
    unseen = mask.clone()
    unseen[1, 0, 4] = False
    with torch.no_grad():
        got, before = fused(rows(), unseen), fused(rows(), mask)
    assert torch.equal(got[1, 4], whole.out.bias)
    got[1, 4] = before[1, 4]
    assert torch.equal(got, before)


class Odd(SelfAttention):
    """Attention that looks like the operator's and is not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "one head of keys":
            self.key, self.value = nn.Linear(HEADS * DEPTH, DEPTH), nn.Linear(HEADS * DEPTH, DEPTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        first = x[:1] if "keys of one image" in self.kind else x
        q, k, v = self.query(x), self.key(first), self.value(first)
        if self.kind == "no heads":
            return self.out(F.scaled_dot_product_attention(q, k, v))
        q, k, v = (t.view(*t.shape[:2], -1, DEPTH).transpose(1, 2) for t in (q, k, v))
        if self.kind == "five axes":
            return self.out(
                F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(1, 2).reshape(x.shape)
            )
        scale = -0.3 if self.kind == "negative scale" else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if self.kind == "turned twice":
            return self.out(y.transpose(2, 3).transpose(1, 2).reshape(x.shape))
        if self.kind == "two readers":
            return self.out(y.transpose(1, 2).reshape(x.shape)) + y.mean()
        return self.out(y.transpose(1, 2).reshape(x.shape))


def square() -> Tensor:
    """As many rows as a head is wide."""
    return rows(length=DEPTH)


@pytest.mark.parametrize(
    ("model", "batch"),
    [
        (SelfAttention(is_causal=True), rows()),
        (SelfAttention(), (rows(), mask_of((2, HEADS, 11, 11)))),
        (SelfAttention(), (rows(), torch.zeros(2, 1, 11, 11))),
        (SelfAttention(), (rows(), mask_of((2, 1, 11, 1)))),
        (Odd("no heads"), rows()),
        (Odd("five axes"), rows()),
        (Odd("one head of keys"), rows()),
        (Odd("keys of one image"), rows()),
        (Odd("keys of one image, example of one"), rows(1)),
        (Odd("negative scale"), rows()),
        (Odd("turned twice"), square()),
        (Odd("two readers"), rows()),
    ],
    ids=[
        *("causal", "a mask for each head", "a mask that is added", "a mask without keys", "no heads", "five axes"),
        *("one head of keys", "keys of one image", "example of one image", "negative scale", "turned twice"),
        "two readers",
    ],
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
