"""Transformer layers as blocks; query, key and value as readers of one tensor."""

import pytest
import torch
from torch import nn

import qk
from models import minilm, tokens
from qk.prepare import QuantLayer, prepare


@pytest.fixture(scope="module")
def prepared():
    return prepare(minilm(), tokens())


def test_transformer_layers_are_the_blocks_of_minilm(prepared):
    assert [unit.name for unit in prepared.units] == [*(f"encoder.layer.{i}" for i in range(6)), "pooler.dense"]
    parts = [f"attention.self.{n}" for n in ("query", "key", "value")]
    parts += ["attention.output.dense", "intermediate.dense", "output.dense"]
    for unit in prepared.blocks:
        assert unit.layers == tuple(f"{unit.name}.{part}" for part in parts)


def test_the_encoder_of_minilm_is_one_stage_though_it_returns_no_tensor(prepared):
    assert [(unit.name, len(unit.layers)) for unit in prepared.stages] == [("encoder", 36), ("pooler.dense", 1)]


def test_query_key_and_value_of_minilm_are_linked(prepared):
    qkv = ("query", "key", "value")
    assert prepared.links == [tuple(f"encoder.layer.{i}.attention.self.{n}" for n in qkv) for i in range(6)]
    # The first layer takes 8 bits; what reads the same tensor takes them too, but only for the activations.
    first, key = prepared.plan[prepared.links[0][0]], prepared.plan[prepared.links[0][1]]
    assert (first.weights, first.activations, key.weights, key.activations) == (8, 8, 4, 8)


def test_the_rest_of_minilm_is_kept_with_a_reason(prepared):
    embeddings = [f"embeddings.{n}_embeddings" for n in ("word", "position", "token_type")]
    norms = ["embeddings.LayerNorm"]
    norms += [f"encoder.layer.{i}.{n}.LayerNorm" for i in range(6) for n in ("attention.output", "output")]
    assert set(prepared.kept) == {*embeddings, *norms}
    assert prepared.kept[embeddings[0]] == "the recipe leaves embedding tables in float"
    assert prepared.folds == {}


def test_multiply_accumulates_of_minilm_are_those_of_its_matrices(prepared):
    batch, length, wide, inner = 2, 16, 384, 1536
    per_token = 6 * (4 * wide * wide + 2 * wide * inner)
    total = sum(layer.macs for layer in prepared.layers.values())
    assert total == batch * length * per_token + batch * wide * wide  # the pooler sees one token


def test_float_mode_of_minilm_is_the_model(prepared):
    with torch.no_grad():
        ours, theirs = prepared.model(**tokens()), minilm()(**tokens())
    assert torch.equal(ours.last_hidden_state, theirs.last_hidden_state)
    assert torch.equal(ours.pooler_output, theirs.pooler_output)


def test_torchs_encoder_takes_masks_of_padding():
    """Its own path for them reads weights of layers and makes nested tensors."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    batch = {"src": x, "src_key_padding_mask": torch.arange(6)[None] > torch.tensor([2, 3, 4, 5])[:, None]}
    masked = qk.quantize(encoder, [batch], qk.Recipe(method="nearest", weights=8), measure=False, progress=False)
    plain = qk.quantize(encoder, [x], qk.Recipe(method="nearest", weights=8), measure=False, progress=False)
    with torch.no_grad():
        expected = encoder(**batch)
        there = ~batch["src_key_padding_mask"]
        for found in (masked.model(**batch), masked.fused(**batch), plain.model(**batch)):
            assert (found - expected)[there].norm() < 0.05 * expected[there].norm()


def test_the_fused_path_of_torchs_encoder_does_not_pass_by_the_layers():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    p = prepare(encoder, x)
    assert [(unit.name, len(unit.layers)) for unit in p.units] == [("layers.0", 6), ("layers.1", 6)]
    ran = []
    for layer in p.quant_layers().values():
        assert isinstance(layer, QuantLayer)
        layer.register_forward_pre_hook(lambda module, args: ran.append(module))
    with torch.no_grad():
        p.model(x)
    assert len(ran) == 12
