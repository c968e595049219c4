"""torch's MultiheadAttention with projections that can be quantized: it computes the same, and what cannot stays."""

import itertools

import pytest
import torch
from torch import Tensor, nn

import qk
from qk.prepare import prepare
from qk.prepare.projections import ProjectedAttention, projectable

WIDE, HEADS, BATCH, QUERIES, KEYS = 16, 4, 3, 5, 7
EIGHT = qk.Recipe(method="nearest", weights=8)
MASKS = ("none", "boolean", "float", "per head")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def attention(**options) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(WIDE, HEADS, **options).eval()
    for name, p in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(p)
    return made


def encoder(**options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDE, HEADS, 32, **options), 2, enable_nested_tensor=False
    ).eval()


def mask_of(kind: str, *shape: int) -> Tensor | None:
    if kind == "none":
        return None
    hidden = drawn(*shape, seed=1) > 0.5
    hidden[..., 0] = False  # every query sees a key
    return hidden if kind == "boolean" else torch.zeros(shape).masked_fill(hidden, -torch.inf)


def both(module: nn.MultiheadAttention, *inputs: Tensor, **options) -> None:
    """Sums of 16 and 7 float32 products in other orders: some 2^-24 of values up to 50, twenty times over."""
    with torch.no_grad():
        expected, weights = module(*inputs, **options)
        found, ours = ProjectedAttention(module)(*inputs, **options)
    torch.testing.assert_close(found, expected, atol=6e-5, rtol=0)
    assert (ours is None) == (weights is None)
    if weights is not None:
        torch.testing.assert_close(ours, weights, atol=6e-5, rtol=0)


@pytest.mark.parametrize("padding", MASKS[:3])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("need_weights", "average"), [(False, True), (True, True), (True, False)])
def test_every_kind_of_mask_computes_what_torchs_module_does(padding, mask, need_weights, average):
    options = {
        "key_padding_mask": mask_of(padding, BATCH, KEYS),
        "attn_mask": mask_of(mask, *((BATCH * HEADS,) if mask == "per head" else ()), QUERIES, KEYS),
        "need_weights": need_weights,
        "average_attn_weights": average,
    }
    if padding != mask and "none" not in (padding, mask):  # torch warns of a float and a boolean one
        options["key_padding_mask"] = mask_of("float", BATCH, KEYS)
        options["attn_mask"] = options["attn_mask"] if mask != "boolean" else mask_of("float", QUERIES, KEYS)
    both(attention(batch_first=True), drawn(BATCH, QUERIES, WIDE), *[drawn(BATCH, KEYS, WIDE)] * 2, **options)


@pytest.mark.parametrize(("bias", "batch_first"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("sizes", [{}, {"kdim": 12, "vdim": 20}])
def test_other_shapes_and_weights_too(bias, batch_first, sizes):
    module = attention(bias=bias, batch_first=batch_first, **sizes)
    shapes = ((QUERIES, WIDE), (KEYS, module.kdim), (KEYS, module.vdim))
    rows = [drawn(BATCH, *shape, seed=i) for i, shape in enumerate(shapes)]
    for need_weights in (False, True):
        both(module, *(x if batch_first else x.transpose(0, 1) for x in rows), need_weights=need_weights)
        both(module, *(x[0] for x in rows), need_weights=need_weights)  # without a batch axis
        padded = mask_of("boolean", KEYS)
        both(module, *(x[0] for x in rows), need_weights=need_weights, key_padding_mask=padded)


@pytest.mark.parametrize("need_weights", [False, True])
def test_causal_attention(need_weights):
    x, mask = drawn(BATCH, QUERIES, WIDE), torch.ones(QUERIES, QUERIES).triu(1).bool()
    module = attention(batch_first=True)
    both(module, x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
    padding = mask_of("boolean", BATCH, QUERIES)
    both(module, x, x, x, attn_mask=mask, is_causal=True, key_padding_mask=padding, need_weights=need_weights)
    with pytest.raises(ValueError, match="expected attn_mask, got None"):
        ProjectedAttention(module)(x, x, x, is_causal=True)


def test_gradients_and_dropout_are_those_of_training():
    module = ProjectedAttention(attention(batch_first=True, dropout=0.5)).train()
    x = drawn(BATCH, QUERIES, WIDE)
    for need_weights in (False, True):
        torch.manual_seed(0)
        first, again = (module(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(first, again)
    first.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_encoder_is_integers_but_for_norms(batch_first, tmp_path):
    model, x = encoder(batch_first=batch_first), drawn(4, 6, WIDE)
    result = qk.quantize(model, [x], EIGHT, measure=False, progress=False)
    parts = [f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")] + ["linear1", "linear2"]
    names = [f"layers.{i}.{part}" for i in range(2) for part in parts]
    assert list(result.model.qk_info.plan.layers) == names
    assert result.model.qk_info.links == [tuple(names[6 * i : 6 * i + 3]) for i in range(2)]
    with torch.no_grad():
        expected, found = model(x), result.model(x)
        assert (found - expected).norm() < 0.02 * expected.norm()  # 8 bits: steps of 1/255 of a range, six in a row
        assert (result.fused(x) - expected).norm() < 0.02 * expected.norm()
    assert {reason for _, reason in result.fused.report} == {"layer_norm has no integer form here"}
    loaded = qk.load(qk.save(result.model, tmp_path), model)
    with torch.no_grad():
        assert torch.equal(loaded(x), found)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


def test_an_encoder_and_decoder_with_masks_of_minus_infinity():
    torch.manual_seed(0)
    model = nn.Transformer(WIDE, HEADS, 1, 1, 32, batch_first=True).eval()
    padding = torch.arange(KEYS) >= torch.tensor([4, 5, KEYS])[:, None]
    batch = {
        "src": drawn(BATCH, KEYS, WIDE),
        "tgt": drawn(BATCH, QUERIES, WIDE, seed=1),
        "tgt_mask": model.generate_square_subsequent_mask(QUERIES),
        "src_key_padding_mask": padding,
        "memory_key_padding_mask": padding,
    }
    result = qk.quantize(model, [batch], EIGHT, measure=False, progress=False)
    assert len(result.prepared.layers) == 6 + 10
    with torch.no_grad():
        expected = model(**batch)
        assert (result.model(**batch) - expected).norm() < 0.02 * expected.norm()
    batch["tgt_mask"] = batch["tgt_mask"] * 2 + 1  # no mask: its values are more than 0 and -inf
    with pytest.raises(qk.QkError, match="example must be finite, got 10 NaN or Inf among 25 values"):
        prepare(model, batch)


def test_projections_learn_their_rounding():
    model, x = encoder(batch_first=True), drawn(16, 6, WIDE)
    learned = qk.Recipe(weights=2, first_last=None, iterations=200)
    errors = []
    for recipe in (qk.Recipe(weights=2, first_last=None, method="nearest"), learned):
        result = qk.quantize(model, [x], recipe, measure=False, progress=False)
        with torch.no_grad():
            errors.append((result.model(x) - model(x)).norm())
    assert [unit.name for unit in result.prepared.units] == ["layers.0", "layers.1"]
    assert errors[1] < 0.7 * errors[0]


class Own(nn.MultiheadAttention):
    """A class of the user's."""


class Asks(nn.Module):
    """Asks its attention for the weight that projections take apart."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.linear = attention(batch_first=True), nn.Linear(WIDE, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x).to(self.attention.in_proj_weight.dtype)
        return self.attention(x, x, x, need_weights=False)[0]


def test_what_is_more_than_torchs_module_stays_as_it_is():
    hooked = attention()
    hooked.register_forward_hook(lambda *_: None)
    shared = nn.ModuleList([attention(), attention()])
    shared[1].in_proj_weight = shared[0].in_proj_weight
    for module in (attention(add_bias_kv=True), attention(add_zero_attn=True), Own(WIDE, HEADS), hooked, shared):
        assert projectable(module) == []
    assert projectable(attention()) == [""]
    p = prepare(Asks().eval(), drawn(2, 3, WIDE))
    assert list(p.layers) == ["linear"]
    assert type(p.model.attention) is nn.MultiheadAttention


def test_attention_that_is_the_model_or_stands_there_twice():
    x = drawn(2, 5, WIDE)
    assert list(prepare(attention(batch_first=True), (x, x, x)).layers) == ["q_proj", "k_proj", "v_proj", "out_proj"]

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = attention(batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x, x, x)[0]
            return self.second(x, x, x)[0]

    p = prepare(Twice().eval(), x)
    assert [layer.calls for layer in p.layers.values()] == [2] * 4
    with torch.no_grad():
        torch.testing.assert_close(p.model(x), Twice().eval()(x), atol=6e-5, rtol=0)
