"""SPARQ in front of a layer: what every output sums equals the paper's rule, spelled out value by value."""

import pytest
import torch
from torch import nn

from qk.calibrate import calibrate, weight_range
from qk.errors import QkError
from qk.ops.sparq import FAMILIES, reference
from qk.options import Sparq
from qk.prepare import apply_plan, prepare
from qk.prepare.insert import ActQuantizer, QuantLayer, from_kernel_order, to_kernel_order
from qk.prepare.windows import cut_codes, partners, repeated, spread
from qk.spec import Plan, QuantSpec, Recipe

SETTINGS = [
    Sparq("5opt"),
    Sparq("3opt", round=False),
    Sparq("2opt", pairs="none"),
    Sparq("6opt", signed=True),
    Sparq("7opt", round=False, pairs="weights"),
    Sparq("5opt", pairs="weights", signed=True),
]
settings = pytest.mark.parametrize("sparq", SETTINGS, ids=lambda s: f"{s.window} {s.pairs}")


def one(distance: int, sparq: Sparq, alone: bool) -> int:
    """Section 2 and 3 of the sheet for one value, in whole numbers."""
    bits, stride = FAMILIES[sparq.window]
    if alone and sparq.pairs != "none":
        bits, stride = 2 * bits, 1
    shift = 0
    while distance >= 2 ** (bits + shift):
        shift += stride
    units, rest = divmod(distance, 2**shift)
    if sparq.round and shift:
        half = 2 ** (shift - 1)
        units += rest > half or (rest == half and units % 2 == 1)
    return min(units, 2**bits - 1) << shift


def summed(row: list[int], weights: list[int], sparq: Sparq, zero: int) -> int:
    """The sum of one output over the channels of one position of the kernel. weights: differences from their zero."""
    total = 0
    for i, (code, weight) in enumerate(zip(row, weights, strict=True)):
        if sparq.pairs == "weights":
            four = range(i // 4 * 4, min(i // 4 * 4 + 4, len(row)))
            others = [j for j in four if j != i and weights[j] != 0]
            partner = row[others[0]] if others else zero
        else:
            partner = row[i ^ 1] if i ^ 1 < len(row) else zero
        distance = code - zero
        kept = one(abs(distance), sparq, partner == zero)
        if kept > (zero if distance < 0 else 255 - zero):
            kept = one(abs(distance), Sparq(sparq.window, False, sparq.pairs), partner == zero)
        total += weight * (-kept if distance < 0 else kept)
    return total


def sparse(weight: torch.Tensor) -> torch.Tensor:
    """Two of four weights along the channels set to 0, in another place for each."""
    order = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    last = to_kernel_order(weight)
    padded = nn.functional.pad(to_kernel_order(order), (0, -last.shape[-1] % 4), value=2.0).unflatten(-1, (-1, 4))
    kept = padded.argsort(-1).argsort(-1) < 2
    return from_kernel_order(last * kept.flatten(-2)[..., : last.shape[-1]]).contiguous()


def codes(*shape: int, zero: int = 0, seed: int = 0) -> torch.Tensor:
    """Half of them zero, as after a ReLU, or on both sides of it."""
    g = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 256, shape, generator=g)
    return torch.where(torch.rand(shape, generator=g) < 0.5, drawn, zero).to(torch.uint8)


@settings
@pytest.mark.parametrize("channels", [8, 7, 5])
def test_every_output_is_the_rule_value_by_value(sparq, channels):
    zero = 35 if sparq.signed else 0
    x = codes(3, channels, zero=zero)
    g = torch.Generator().manual_seed(2)
    weight = torch.randint(-7, 8, (4, channels), generator=g)
    if sparq.pairs == "weights":
        weight = sparse(weight)
    cut = cut_codes(x, sparq, zero=torch.tensor([zero], dtype=torch.int32) if zero else None)
    multiplied = spread(weight) if sparq.pairs == "weights" else weight
    found = (cut.long() - zero) @ multiplied.t()
    expected = [[summed(row, w, sparq, zero) for w in weight.tolist()] for row in x.tolist()]
    assert found.tolist() == expected


def test_pairs_never_cross_the_groups_of_a_convolution():
    x = torch.tensor([[31, 31, 0, 31, 31, 31]], dtype=torch.uint8)
    assert cut_codes(x, Sparq("5opt")).tolist() == [[30, 30, 0, 31, 30, 30]]
    assert cut_codes(x, Sparq("5opt"), groups=2).tolist() == [[30, 30, 0, 30, 30, 31]]


def test_the_definition_gives_the_same_codes():
    for sparq in SETTINGS:
        zero = torch.tensor([35], dtype=torch.int32) if sparq.signed else None
        x = codes(2, 3, 12, zero=35 if sparq.signed else 0)
        for groups in (1, 2, 4):
            assert torch.equal(cut_codes(x, sparq, groups, zero), cut_codes(x, sparq, groups, zero, reference))


def test_partners_are_the_other_weight_of_the_four():
    used = torch.tensor([[1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0]], dtype=torch.bool)
    assert partners(used).tolist() == [[3, 0, 0, 1, 0, 0, 0, 0, 1, 3, 0]]


def test_versions_and_spread_weights_sum_what_the_plain_ones_do():
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = sparse(torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for group, part in enumerate(x.split(6, -1)):
        versions = repeated(x, 2).unflatten(-1, (2, -1))[:, group]
        torch.testing.assert_close(versions @ spread(weight).t(), part @ weight.t())


LAYERS = {
    "conv": (lambda: nn.Conv2d(8, 5, 3, padding=1), (2, 8, 5, 6)),
    "odd channels": (lambda: nn.Conv2d(7, 5, (1, 3), stride=2, bias=False), (2, 7, 5, 6)),
    "odd groups": (lambda: nn.Conv2d(6, 4, 3, groups=2, dilation=2), (2, 6, 7, 7)),
    "1x1": (lambda: nn.Conv2d(6, 4, 1), (1, 6, 4, 4)),
    "linear": (lambda: nn.Linear(9, 4), (3, 5, 9)),
}


def simulated(kind: str, sparq: Sparq, zero: int) -> tuple[QuantLayer, torch.Tensor]:
    """A calibrated layer, and an input on its grid."""
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    if sparq.pairs == "weights":
        layer.weight.data = sparse(layer.weight.data)
    quantizer = ActQuantizer(8)
    quantizer.set_range(torch.tensor([0.0625]), torch.tensor([zero], dtype=torch.int32))
    found = QuantLayer(layer, QuantSpec(4, 8, symmetric=True, sparq=sparq), quantizer)
    found.set_weight_range(*weight_range(found, "minmax"))
    found.quantized = True
    return found, (codes(*shape, zero=zero).float() - zero) * 0.0625


@settings
@pytest.mark.parametrize("kind", LAYERS)
def test_the_simulation_multiplies_the_cut_codes(kind, sparq):
    zero = 100 if sparq.signed else 0
    layer, x = simulated(kind, sparq, zero)
    if kind == "linear":
        row, weights = x.reshape(-1, 9)[0], layer.codes - layer.weight_zero.reshape(-1, 1)
        given = (row / 0.0625).int().add(zero).tolist()
        sums = [summed(given, w, sparq, zero) for w in weights.tolist()]
        expected = torch.tensor(sums) * layer.weight_step * 0.0625 + layer.bias
        # Sums of 9 products of whole numbers times 2^-4, each scaled and rounded: within 9 half units of the largest.
        torch.testing.assert_close(layer(x).reshape(-1, 4)[0], expected, rtol=0, atol=1e-4)
    assert not torch.equal(layer(x), whole(layer, x))
    layer.quantized = False
    assert layer(x).shape == whole(layer, x).shape


def whole(layer: QuantLayer, x: torch.Tensor) -> torch.Tensor:
    spec, layer.spec = layer.spec, QuantSpec(4, 8, symmetric=True)
    try:
        return layer(x)
    finally:
        layer.spec = spec


@pytest.mark.parametrize("pairs", ["channels", "weights", "none"])
def test_gradients_pass_straight_through(pairs):
    layer, x = simulated("conv", Sparq("5opt", pairs=pairs), 0)
    x = x.requires_grad_()
    layer.input.step.requires_grad_(True)
    (layer(x) * (probe := torch.randn(layer(x).shape, generator=torch.Generator().manual_seed(3)))).sum().backward()
    grad_x, grad_step = x.grad.clone(), layer.input.step.grad.clone()
    x.grad = layer.input.step.grad = None
    (whole(layer, x) * probe).sum().backward()
    # The same sums in another order: with versions of four times the channels.
    torch.testing.assert_close(grad_x, x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_step, layer.input.step.grad, rtol=1e-4, atol=1e-5)


# --- plans ---------------------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3),
    )  # fmt: skip


def images() -> torch.Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def cut_layers(**fields) -> dict[str, str | None]:
    p = prepare(net(), images(), Recipe(**{"weights": 4, "sparq": "5opt", **fields}))
    calibrate(p, [images()])
    return {name: layer.cuts and layer.cuts.window for name, layer in p.quant_layers().items()}


def test_inner_layers_with_inputs_of_one_sign_are_cut():
    assert cut_layers() == {"0": None, "2": None, "4": "5opt", "5": None, "8": None}
    assert cut_layers(first_last=None) == {"0": None, "2": None, "4": "5opt", "5": None, "8": "5opt"}
    assert cut_layers(sparq={"window": "3opt", "signed": True})["5"] == "3opt"
    assert cut_layers(sparq={"pairs": "none"})["2"] == "5opt"  # depthwise: no value has a partner
    assert cut_layers(overrides={"8": {"sparq": "2opt"}, "4": {"sparq": None}}) == {
        "0": None, "2": None, "4": None, "5": None, "8": "2opt",
    }  # fmt: skip
    assert cut_layers(overrides={"4": {"activations": 4}})["4"] is None


def test_specs_and_recipes_go_through_json():
    recipe = Recipe(sparq="6opt", sparq_bits=6.5, match_statistics=True)
    assert recipe.sparq == Sparq("6opt")
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    plan = Plan({"a": QuantSpec(sparq=Sparq("2opt", False, "none", True)), "b": QuantSpec()})
    assert Plan.from_dict(plan.to_dict()) == plan
    assert [spec.describe() for spec in plan.layers.values()] == ["W8A8 2opt", "W8A8"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantSpec(4, 4, sparq="5opt"), "activations must be 8 with sparq"),
        (lambda: QuantSpec(sparq="4opt"), "window must be '5opt'"),
        (
            lambda: QuantSpec(group_size=4, sparq=Sparq(pairs="weights")),
            "group_size must be null and points 1 with sparq.pairs",
        ),
        (lambda: Recipe(activations=4, sparq="5opt"), "activations must be 8 with sparq"),
        (lambda: Recipe(sparq_bits=5), "sparq must be there with sparq_bits"),
        (lambda: Sparq(pairs="rows"), "pairs must be 'channels'"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(QkError, match=message):
        make()


def test_weights_that_are_not_sparse_pair_nothing():
    p = prepare(net(), images(), Recipe())
    plan = Plan({name: QuantSpec(sparq=Sparq(pairs="weights")) for name in p.layers})
    with pytest.raises(QkError, match=r"at most two weights of each four.*got 0, 4, 5, 8"):
        apply_plan(p, plan)
    assert p.plan["4"].sparq is None
