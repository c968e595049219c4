"""SPARQ as a method: statistics of inputs, windows within a budget, and learning with the cut active."""

from math import inf

import pytest
import torch
from torch import nn

import qk
from prepare.test_windows import sparse
from qk.errors import QkError
from qk.methods.sparq import (
    Choice,
    choose_windows,
    input_statistics,
    multiplied_bits,
    set_windows,
    shift_of,
    stored_bits,
    within_budget,
)
from qk.options import Sparq
from qk.prepare import prepare
from qk.spec import Recipe


class Net(nn.Module):
    """A stem, two layers that read what a ReLU made, one that reads values of both signs, and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 7, 1)
        self.both, self.head = nn.Conv2d(7, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.one(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.both(self.two(x))).mean((2, 3)))


def batches():
    return list(torch.randn(24, 3, 9, 8, generator=torch.Generator().manual_seed(0)).split(8))


def calibrated(**fields):
    torch.manual_seed(0)
    p = prepare(Net(), batches()[0], Recipe(**{"weights": 8, "sparq": "5opt", "method": "nearest"} | fields))
    qk.calibrate(p, batches(), "minmax")
    return p


def output(p):
    with p.quantized(), torch.no_grad():
        return torch.cat([p.model(x) for x in batches()])


# --- costs and statistics --------------------------------------------------------------------------------------------


def test_bits_are_those_of_the_hardware():
    stored = {window: stored_bits(Sparq(window)) for window in ("5opt", "3opt", "2opt", "6opt", "7opt")}
    assert stored == {"5opt": 7.5, "3opt": 6.5, "2opt": 5.5, "6opt": 6.5, "7opt": 5.5}
    assert stored_bits(Sparq("2opt", pairs="none")) == 5.0
    assert [multiplied_bits(Sparq(w)) for w in ("3opt", "6opt", "7opt")] == [4, 3, 2]


def test_the_shift_is_the_smallest_that_keeps_the_top_bit():
    values = torch.tensor([0, 15, 16, 31, 32, 63, 64, 127, 128, 255])
    assert shift_of(values, "5opt").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert shift_of(values, "3opt").tolist() == [0, 0, 2, 2, 2, 2, 4, 4, 4, 4]
    assert shift_of(values, "2opt").tolist() == [0, 0, 4, 4, 4, 4, 4, 4, 4, 4]
    assert shift_of(values, "7opt").tolist() == [0, 2, 3, 3, 4, 4, 5, 5, 6, 6]


def test_shares_are_counted_by_hand():
    layer = nn.Linear(5, 2)
    p = prepare(nn.Sequential(layer), torch.zeros(1, 5), Recipe(sparq="5opt", first_last=None))
    x = torch.tensor([[0.0, 255, 16, 15, 0], [0, 0, 31, 255, 31]])
    qk.calibrate(p, [x], "minmax")  # step 1
    found = input_statistics(p, [x])["0"]
    assert (found.zeros, found.small) == (4 / 10, 5 / 10)
    assert found.one_zero == 2 / 6  # (0, 255), (16, 15), (0, none); (0, 0), (31, 255), (31, none): the last, of an odd
    assert found.wide == 2 / 6  # 255 and the lone 31
    assert found.shifts == {0: 1 / 6, 1: 3 / 6, 2: 0, 3: 0, 4: 2 / 6}
    # Moved: 31 -> 30 in its pair, 255 -> 240; those beside a 0 stay.
    power = 255**2 + 16**2 + 15**2 + 31**2 + 255**2 + 31**2
    assert found.sqnr_db == pytest.approx(10 * torch.log10(torch.tensor(power / (1 + 225))).item(), abs=1e-4)
    assert found.bits == 7.5


def test_layers_whose_codes_stay_whole_say_why():
    found = input_statistics(calibrated(), batches())
    assert list(found) == ["one", "two", "both"]
    assert (found["both"].window, found["both"].bits, found["both"].sqnr_db) == ("whole", 8.0, inf)
    assert found["both"].reason == "its input has values below 0"
    assert sum(found["one"].shifts.values()) == pytest.approx(1)
    assert found["one"].zeros > 0.3


# --- windows ---------------------------------------------------------------------------------------------------------


def test_errors_are_ordered_as_the_windows_are():
    p, errors = calibrated(), {}
    with p.quantized(set()), torch.no_grad():
        float_output = torch.cat([p.model(x) for x in batches()])
    for window in (None, "5opt", "3opt", "2opt", "6opt", "7opt"):
        set_windows(p, {name: window and Sparq(window) for name in ("one", "two")})
        errors[window] = float((output(p) - float_output).square().sum())
    assert errors[None] < errors["5opt"] < errors["3opt"] < errors["2opt"] < errors["6opt"] < errors["7opt"]


def test_set_windows_changes_nothing_else():
    p = calibrated()
    codes, step = p.quant_layers()["one"].codes, p.quant_layers()["one"].input.step.item()
    before = output(p)
    set_windows(p, {"one": None, "two": Sparq("7opt", round=False)})
    assert not torch.equal(output(p), before)
    assert p.plan["two"].sparq == p.quant_layers()["two"].spec.sparq == Sparq("7opt", round=False)
    assert (p.quant_layers()["one"].codes is codes, p.quant_layers()["one"].input.step.item()) == (True, step)
    set_windows(p, {"one": "5opt", "two": Sparq("5opt")})
    with pytest.raises(QkError, match=r"windows\['one'\] must be a qk.Sparq, None, or one of 5opt.*, got '9opt'"):
        set_windows(p, {"one": "9opt"})
    assert torch.equal(output(p), before)
    for windows, words in [
        ({"none": None}, "windows must be for quantized layers, got none"),
        ({"one": Sparq(pairs="weights")}, "at most two weights of each four"),
    ]:
        with pytest.raises(QkError, match=words):
            set_windows(p, windows)


@pytest.mark.parametrize("cost", ["stored", "multiplied"])
def test_a_budget_is_met_and_a_larger_one_never_errs_more(cost):
    before = inf
    for bits in (3.0, 4.5, 6.0, 8.0) if cost == "multiplied" else (5.5, 6.0, 6.7, 7.8, 8.0):
        p = calibrated()
        chosen = choose_windows(p, batches(), bits, cost)
        assert list(chosen) == ["one", "two"]
        amounts = {
            n: p.layers[n].macs if cost == "multiplied" else 8 * s for n, s in (("one", 8 * 42), ("two", 12 * 20))
        }
        spent = sum(c.bits * amounts[n] for n, c in chosen.items()) / sum(amounts.values())
        assert spent <= bits * (1 + 1e-6)
        error = sum(c.error for c in chosen.values())
        assert error <= before
        before = error
        sparqs = {name: p.plan[name].sparq for name in chosen}
        assert {name: s and s.window for name, s in sparqs.items()} == {name: c.window for name, c in chosen.items()}
    assert all(c.window is None for c in chosen.values())


def test_the_least_sum_of_errors_within_the_budget_is_found():
    options = {
        "small": [Choice(None, 8, 0.0), Choice("5opt", 7.5, 0.4), Choice("2opt", 5.5, 0.5)],
        "large": [Choice(None, 8, 0.0), Choice("5opt", 7.5, 0.1), Choice("2opt", 5.5, 0.9)],
    }
    amounts = {"small": 100, "large": 300}
    assert [c.window for c in within_budget(options, amounts, 8).values()] == [None, None]
    assert [c.window for c in within_budget(options, amounts, 7.7).values()] == [None, "5opt"]
    assert [c.window for c in within_budget(options, amounts, 7.1).values()] == ["2opt", "5opt"]
    assert [c.window for c in within_budget(options, amounts, 5.5).values()] == ["2opt", "2opt"]
    with pytest.raises(QkError, match=r"bits must be at least 5\.5, what the narrowest windows need, got 5"):
        within_budget(options, amounts, 5)


def test_bad_input_is_named():
    with pytest.raises(QkError, match="cost must be one of stored, multiplied"):
        choose_windows(calibrated(), batches(), 6, "area")
    with pytest.raises(QkError, match=r"whose input can be cut, got no layer with sparq in its plan"):
        choose_windows(calibrated(sparq=None), batches(), 6)
    with pytest.raises(QkError, match=r"whose input can be cut, got both: its input has values below 0"):
        choose_windows(calibrated(sparq=None, overrides={"both": {"sparq": "5opt"}}), batches(), 6)
    with pytest.raises(QkError, match="p must be calibrated"):
        input_statistics(prepare(Net(), batches()[0], Recipe(sparq="5opt")), batches())


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairs", ["channels", "weights"])
def test_brecq_learns_with_the_cut_active(pairs):
    def run():
        torch.manual_seed(0)
        model = Net()
        for layer in (model.one, model.two):
            layer.weight.data = sparse(layer.weight.data)
        inner = {"sparq": {"window": "7opt", "pairs": pairs}}
        recipe = Recipe(weights=4, iterations=150, weight_lr=1e-2, overrides={"one": inner, "two": inner})
        p = prepare(model, batches()[0], recipe)
        qk.calibrate(p, batches(), "minmax")
        qk.reconstruct(p, batches(), recipe, progress="off")
        return p

    p = run()
    last = p.history["one"][-1]
    assert last["kept"] == "learned"
    assert last["after"] < 0.9 * last["before"]
    if pairs == "channels":
        again = run().quant_layers()
        assert all(torch.equal(layer.codes, again[name].codes) for name, layer in p.quant_layers().items())
    model, x = qk.convert(p), batches()[0]
    with torch.no_grad(), p.quantized() as simulated:
        # Few layers, sums of whole numbers times float32 steps: the two differ by their rounding alone.
        torch.testing.assert_close(model(x), simulated(x), rtol=1e-4, atol=1e-5)
    if pairs == "weights":
        one = p.quant_layers()["one"]
        zeros = one.weight.permute(0, 2, 3, 1) == 0
        assert (one.codes == one.weight_zero.reshape(-1, 1, 1, 1))[zeros].all()  # pruned weights stay so
