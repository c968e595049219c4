"""What widths lose, by each of the estimates."""

import copy
import math

import pytest
import torch
from torch import nn

import qk
from qk.calibrate.objective import task_loss
from qk.methods.brecq import learn_unit
from qk.methods.tune import tune
from qk.options import Tuning
from qk.prepare import prepare
from qk.search.alps import alps, alps_learned, alps_trained
from qk.search.bank import Bank
from qk.search.fisher import fisher
from qk.search.hessian import hessian
from qk.search.items import find_items
from qk.search.sensitivity import chance, cost_only, eagl, entropy
from qk.spec import Recipe
from search.small import data, net

pytestmark = pytest.mark.usefixtures("one_thread")


def bank_of(weights=(2, 4, 8), activations=(8,), model=None, example=None, keep=None, batches=None):
    batches = data() if batches is None else batches
    p = prepare(net() if model is None else model, batches[0], Recipe())
    return Bank(p, find_items(p, weights, activations, False, keep), batches)


# --- EAGL -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "bits"),
    [
        ([0, 0, 0, 0, 1, 1, 2, 3], 1.75),
        (list(range(16)), 4.0),
        ([0, 7, 7, 8, 8, 8, 8, 9, 9, 15], 2.12192809),
        ([0, 2, 5, 5, 7, 7, 8, 8, 8, 8, 9, 9, 9, 11, 11, 15], 2.82781953),
        ([0, 1, 1, 1] + [2] * 9 + [3] * 3, 1.62255625),
    ],
)
def test_entropies_of_the_sheet(codes, bits):
    assert entropy(torch.tensor(codes, dtype=torch.uint8)) == pytest.approx(bits, abs=5e-9)


# The sheet's, but for -0.6 and 0.15, which are ties in float32: here as its float64 has them.
WEIGHTS = [-0.9, -0.599, -0.31, -0.3, -0.12, -0.1, -0.04, 0, 0, 0.03, 0.08, 0.1, 0.149, 0.29, 0.33, 0.8]


@pytest.mark.parametrize(
    ("step", "bits", "codes", "entropy_of_them"),
    [
        (0.1, 4, [-8, -6, -3, -3, -1, -1, 0, 0, 0, 0, 1, 1, 1, 3, 3, 7], 2.82781953),
        (0.4, 2, [-2, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1], 1.62255625),
    ],
)
def test_codes_and_entropies_of_weights_of_the_sheet(step, bits, codes, entropy_of_them):
    zero = torch.tensor([2 ** (bits - 1)], dtype=torch.int32)
    found = qk.ops.quantize(torch.tensor(WEIGHTS), torch.tensor([step]), zero, bits)
    assert (found.int() - zero).tolist() == codes
    assert entropy(found) == pytest.approx(entropy_of_them, abs=5e-9)


def test_one_code_has_no_entropy_and_no_sign():
    found = entropy(torch.full((5,), 3, dtype=torch.uint8))
    assert found == 0
    assert math.copysign(1, found) == 1


def test_entropy_is_of_how_often_codes_occur_alone():
    codes = torch.randint(0, 16, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = entropy(codes)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    # Sums of 16 terms in another order: each is at most 0.54 and off by 2^-53 of itself, as is each sum of at most 4.
    assert entropy(order[codes.int()]) == pytest.approx(found, abs=16 * 4 * 2**-52)
    assert entropy(codes.flip(0)) == found <= 4
    assert entropy(codes // 2) <= found  # pairs of codes become one


def test_eagl_is_minus_the_entropy_of_the_codes_summed_over_linked_layers():
    bank = bank_of((2, 4))
    found = eagl(bank)
    codes = [bank.codes(name, 4) for name in ("one.a", "one.skip")]
    assert found.losses[0] == [-sum(map(entropy, codes)), 0.0]
    assert all(-8 <= row[0] < 0 for row in found.losses)


@pytest.mark.parametrize("estimate", [eagl, lambda bank: hessian(bank, data())])
def test_estimates_from_weights_refuse_widths_of_activations(estimate):
    with pytest.raises(qk.QkError, match="one for each width of weights"):
        estimate(bank_of(activations=(4, 8)))


# --- by the loss ------------------------------------------------------------------------------------------------------


def divergence(bank, names, batches):
    """From the float model, with the named layers quantized as the bank has them; mean over samples."""
    total = 0.0
    with torch.no_grad():
        for x in batches:
            with bank.p.quantized(set()) as model:
                expected = model(x)
            with bank.p.quantized(names) as model:
                total += float(task_loss(model(x), expected))
    return total / sum(map(len, batches))


def test_alps_is_the_divergence_with_one_item_narrowed():
    bank = bank_of(activations=(8, 4))
    found = alps(bank, data())
    untouched = [0] * 4
    bank.put(untouched)
    base = divergence(bank, None, data())
    for i, row in enumerate(found.losses):
        assert row[0] == 0
        for option in range(1, 6):
            bank.put([*untouched[:i], option, *untouched[i + 1 :]])
            expected = max(0.0, divergence(bank, None, data()) - base)
            # The cache gives the very outputs back: the sums are of the same floats.
            assert row[option] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert any(row[5] > row[2] > 0 for row in found.losses)


def test_alps_without_memory_finds_the_same():
    assert alps(bank_of(), data(), memory_mb=0).losses == alps(bank_of(), data()).losses


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(self.a(x))


class Straight(nn.Module):
    """Two linear layers in a block, then logits: the changes of logits are linear in those of the block's output."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.block = nn.ModuleList([Two(), Two()])
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x)
        for block in self.block:
            x = x + block(x)
        return self.last(x)


def straight(widths=(4, 8)):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Straight().eval()
    rng = torch.Generator().manual_seed(2)
    batches = [torch.randn(32, 6, generator=rng) for _ in range(4)]
    return bank_of(widths, model=model, batches=batches), batches


def test_fisher_is_the_divergence_in_second_order():
    bank, batches = straight()
    found = fisher(bank, batches, draws=64)
    for i, row in enumerate(found.losses):
        choice = [0] * len(bank.items)
        choice[i] = 1
        bank.put(choice)
        # Of 128 samples with 64 draws each: their squares vary by about sqrt(2) of the mean, samples by less than
        # twice that, so that the mean is known to about 3 / sqrt(128) = 25 %; higher orders are below that at 4 bits.
        assert row[1] == pytest.approx(divergence(bank, set(bank.items[i].layers), batches), rel=0.25)
        assert row[1] > 5 * row[0] > 0


def test_pairs_of_a_block_are_what_both_add():
    bank, batches = straight()
    found = fisher(bank, batches, draws=64)
    assert [unit.layers for unit in bank.p.blocks] == [(f"block.{i}.a", f"block.{i}.b") for i in range(2)]
    assert sorted(found.pairs) == [(0, 1), (2, 3)]
    for i, j in found.pairs:
        choice = [0] * 4
        choice[i] = choice[j] = 1
        bank.put(choice)
        both = {*bank.items[i].layers, *bank.items[j].layers}
        expected = divergence(bank, both, batches)
        together = found.losses[i][1] + found.losses[j][1] + found.pairs[i, j][1][1]
        assert together == pytest.approx(expected, rel=0.25)  # as above


def test_diagonal_fisher_takes_the_errors_for_independent():
    bank, batches = straight()
    full, diagonal = fisher(bank, batches, draws=16), fisher(bank, batches, draws=16, full=False)
    assert full.losses != diagonal.losses
    assert all(row[1] > row[0] > 0 for row in diagonal.losses)


def test_fisher_is_the_same_with_the_same_seed_and_leaves_p_alone():
    bank = bank_of()
    bank.put([0] * len(bank.items))
    before = {name: t.clone() for name, t in bank.p.model.state_dict().items()}
    first, again, other = fisher(bank, data()), fisher(bank, data()), fisher(bank, data(), seed=1)
    assert first == again
    assert first != other
    bank.put([0] * len(bank.items))
    after = bank.p.model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert all(layer.weight.grad is None for layer in bank.p.quant_layers().values())


class Tokens(nn.Module):
    """No classes: [batch, positions, channels], with padding."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x, attention_mask=None):
        return self.c(self.b(torch.relu(self.a(x))))


def test_an_output_without_classes_is_taken_by_its_squared_error_and_padding_does_not_count():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(64, 5, 6, generator=rng)
    mask = (torch.arange(5) < torch.randint(1, 6, (64, 1), generator=rng)).long()
    batches = [{"x": x, "attention_mask": mask}]
    bank = bank_of((3, 8), model=Tokens().eval(), batches=batches)
    (row,) = fisher(bank, batches, draws=64).losses
    bank.put([1])
    with torch.no_grad(), bank.p.quantized({"b"}) as model:
        found = model(x)
    with torch.no_grad(), bank.p.quantized(set()) as model:
        expected = 0.5 * ((model(x) - found).square() * mask[..., None]).sum() / 64
    # 64 draws for each of 64 samples: squares vary by sqrt(2) of the mean, which is known to 2.2 % then; times four.
    assert row[1] == pytest.approx(float(expected), rel=0.09)


def test_the_hessian_of_a_softmax_layer():
    """One layer before the classes: the Hessian for its weight is (diag(p) - p p^T) times the inputs' second moments,
    whose trace is known."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).eval()
    batches = [torch.randn(64, 4, generator=torch.Generator().manual_seed(0))]
    bank = bank_of((2, 8), model=model, batches=batches, keep=["0"])
    found = hessian(bank, batches, draws=256)
    with torch.no_grad():
        inputs = model[0](batches[0])
        share = model(batches[0]).softmax(1)
    trace = float(((share - share.square()).sum(1) * inputs.square().sum(1)).mean())
    weight = model[1].weight.detach()
    errors = [float((bank.values("1", w) - weight).square().sum()) for w in (8, 2)]
    expected = 0.5 * trace / weight.numel() * (errors[1] - errors[0])
    # Hutchinson's estimate: variance at most 2 |H|_F^2 <= 2 trace^2, over 256 draws: 9 %; three times that.
    assert found.losses == [[0.0, pytest.approx(expected, rel=0.27)]]


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.query, self.value, self.last = (nn.Linear(8, n) for n in (8, 8, 8, 3))

    def forward(self, x):
        x = self.first(x)
        q, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.query, self.value))
        y = nn.functional.scaled_dot_product_attention(q, q, v)
        return self.last(y.transpose(1, 2).flatten(2).mean(1))


def test_the_hessian_goes_through_attention():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attends().eval()
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    bank = bank_of(model=model, example=x, batches=[x])
    found = hessian(bank, [x])
    assert all(row[0] == 0 and row[-1] > 0 for row in found.losses)


def test_controls():
    items = bank_of(activations=(4, 8)).items
    assert cost_only(items).losses[0] == [-16.0, -12.0, -12.0, -8.0, -10.0, -6.0]
    assert chance(items, 1) == chance(items, 1) != chance(items, 2)


def test_what_a_choice_loses_is_its_items_and_pairs():
    found = fisher(bank_of(), data())
    choice = (2, 1, 0, 2)
    pairs = sum(table[choice[i]][choice[j]] for (i, j), table in found.pairs.items())
    assert found.of(choice) == sum(row[o] for row, o in zip(found.losses, choice, strict=True)) + pairs


# --- after learning ---------------------------------------------------------------------------------------------------


def test_learned_alps_is_the_divergence_after_the_item_has_learned():
    bank, recipe = bank_of((2, 4)), Recipe(iterations=30, batch_size=4)
    found, plain = alps_learned(bank, data(4), recipe=recipe), alps(bank, data(4)[1::2])
    assert found == alps_learned(bank, data(4), recipe=recipe)
    assert found != alps_learned(bank, data(4), recipe=recipe, seed=1)
    assert sum(row[1] for row in found.losses) < 0.9 * sum(row[1] for row in plain.losses)
    item = 0  # two layers that share the step of their input, which the first of them learns
    assert bank.items[item].layers == ("one.a", "one.skip")
    bank.put([1, 0, 0, 0])
    steps = [float(bank.p.quant_layers()["one.a"].input.step)]
    for name in bank.items[item].layers:
        shared = set() if len(steps) == 1 else {bank.p.quant_layers()[name].input}
        learn_unit(bank.p, bank.p.alone[name], {*bank.p.quant_layers()} - {name}, data(4)[::2], recipe, shared)
        steps.append(float(bank.p.quant_layers()[name].input.step))
    assert steps[0] != steps[1] == steps[2]
    learned = divergence(bank, None, data(4)[1::2])
    bank.forget()
    bank.put([0] * 4)
    expected = max(0.0, learned - divergence(bank, None, data(4)[1::2]))
    assert found.losses[item] == [0.0, pytest.approx(expected, rel=1e-12, abs=1e-15)]


@pytest.mark.parametrize("estimate", [alps_learned, lambda bank, batches: alps_trained(bank, labelled())])
def test_what_was_learned_is_forgotten(estimate):
    bank = bank_of((2, 8))
    bank.put([0] * 4)
    before = {name: t.clone() for name, t in bank.p.model.state_dict().items()}
    estimate(bank, data(2))
    assert bank.choice == (0, 0, 0, 0)
    after = bank.p.model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def labelled():
    model = net()
    return [(x, model(x).argmax(1)) for x in data(2)]


def test_trained_alps_is_the_loss_of_an_epoch():
    bank = bank_of((2, 8))
    found = alps_trained(bank, labelled())
    assert found == alps_trained(bank, labelled())
    losses = []
    for choice in ([0, 0, 0, 0], [0, 0, 1, 0]):
        bank.put(choice)
        p = copy.deepcopy(bank.p)
        tune(p, labelled(), Recipe(method="lsq", tuning=Tuning(epochs=1, lr=1e-3)), progress="off")
        losses.append(p.history[""][-1]["loss"])
    assert found.losses[2] == [0.0, max(0.0, losses[1] - losses[0])]
    assert any(row[1] > 0 for row in found.losses)
    with pytest.raises(qk.QkError, match="train must be labelled data to train on with alps_trained, got none"):
        qk.Search(prepare(net(), data()[0]), data()).sensitivity("alps_trained")
    search = qk.Search(prepare(net(), data()[0]), data(), weights=(2, 8), train=labelled())
    assert search.sensitivity("alps_trained") == found
