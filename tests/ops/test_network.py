"""The operator network: every step is its operator's definition, bit for bit, wherever values lie in memory."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qk
from networks import GLOBAL, POOL, Net, chain, coded, equal, image, random_net
from qk import _core
from qk.deploy.program import decode, interpret
from qk.ops._program import score_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def quantize_nchw(net):
    yield net.step("quantize", net.given(image(net, 2, 5, 7, 6)), layout="nchw", scale=net.new_scale(6))


def quantize_channels_last(net):
    x = image(net, 2, 5, 7, 6).to(memory_format=torch.channels_last)
    yield net.step("quantize", net.given(x), layout="nchw", scale=net.new_scale())


def quantize_other_strides(net):
    x = net.given(image(net, 2, 5, 7, 9).transpose(2, 3)[:, :, 1:])
    yield net.step("quantize", x, layout="nchw", scale=net.new_scale())
    yield net.step("quantize", x, layout="same", scale=net.new_scale())


def quantize_both_ways(net):
    x = net.given(image(net, 2, 5, 7, 6).to(memory_format=torch.channels_last))
    yield net.step("quantize", x, layout="nchw", scale=net.new_scale())
    yield net.step("quantize", x, layout="same", scale=net.new_scale())


def quantize_rows_and_sequences(net):
    yield net.step("quantize", net.given(image(net, 33)), layout="same", scale=net.new_scale())
    yield net.step("quantize", net.given(image(net, 2, 5, 9)), layout="nchw", scale=net.new_scale())
    yield net.step("quantize", net.given(image(net, 2, 3, 1, 1)), layout="nchw", scale=net.new_scale())


def quantize_between(net):
    u, s = coded(net, 2, 5, 6, 4)
    y = net.step("dequantize", u)
    yield net.step("quantize", y, layout="same", scale=s)
    yield net.step("quantize", y, layout="nchw", scale=s)


def conv2d(net):
    x, _ = coded(net, 2, 8, 7, 12)
    y = net.layer("conv2d", x, shape=(20, 3, 3, 12), activation="relu", scale=net.new_scale(6))
    yield net.layer("conv2d", y, shape=(9, 1, 1, 20), padding=(0, 0), bias=False)
    yield net.layer(
        "conv2d", y, shape=(8, 3, 2, 10), groups=2, stride=(2, 1), dilation=(1, 2), bits=8, activation="relu6"
    )
    yield net.layer("conv2d", y, shape=(20, 3, 3, 1), groups=20, bits=2, scale=net.new_scale())
    yield net.layer("conv2d", y, shape=(7, 3, 3, 20), k_groups=3, scale=net.new_scale())


def conv2d_with_residual(net):
    x, _ = coded(net, 2, 6, 7, 12)
    float_residual = net.given(image(net, 2, 6, 7, 12))
    for residual in (x, float_residual):
        for scale in (None, net.new_scale(5)):
            for activation in ("none", "relu", "relu6"):
                yield net.layer("conv2d", x, residual, shape=(12, 3, 3, 12), activation=activation, scale=scale)
    yield net.layer("conv2d", x, x, shape=(12, 3, 3, 1), groups=12, scale=net.new_scale())


def gemm(net):
    x, _ = coded(net, 3, 40)
    y = net.layer("gemm", x, shape=(33, 40), k_groups=2, activation="relu", scale=net.new_scale(4))
    yield net.layer("gemm", y, shape=(40, 33), bits=8, bias=False)
    yield net.layer("gemm", y, x, shape=(40, 33), bits=2, scale=net.new_scale())
    tokens, _ = coded(net, 2, 5, 16)
    yield net.layer("gemm", tokens, net.given(image(net, 2, 5, 24)), shape=(24, 16))


def add(net):
    (a, _), (b, _), c = coded(net, 2, 3, 4, 5), coded(net, 2, 3, 4, 5, bits=4), net.given(image(net, 2, 3, 4, 5))
    for pair in ((a, b), (a, c), (c, b), (c, c), (a, a)):
        for scale in (None, net.new_scale(7)):
            yield net.step("add", *pair, activation="relu", scale=scale)


def multiply(net):
    (x, _), (gate, _), values = coded(net, 2, 5, 6, 19), coded(net, 2, 1, 1, 19), net.given(image(net, 2, 1, 1, 19))
    for factor in (gate, values):
        for scale in (None, net.new_scale(7)):
            yield net.step("multiply", x, factor, activation="none", scale=scale)


def pool(net):
    x, _ = coded(net, 2, 9, 8, 21)
    for ceil_mode in (0, 1):
        for shape in ({}, {"stride": (2, 2)}, {"kernel": (2, 3), "stride": (3, 2), "padding": (0, 1)}):
            more = POOL | shape | {"ceil_mode": ceil_mode}
            yield net.step("pool", x, mode="max", **more)
            for count in (0, 1):
                yield net.step("pool", x, mode="average", **more | {"count_include_pad": count}, scale=net.new_scale())
    yield net.step("pool", x, mode="max", **POOL | {"dilation": (2, 1)})
    yield net.step("pool", x, mode="max", **GLOBAL)
    yield net.step("pool", x, mode="average", **GLOBAL)


def lookup(net):
    x, _ = coded(net, 3, 5, 7)
    scale = net.new_scale(6)
    yield net.step("lookup", x, table=net.table(scale), scale=scale)
    yield net.step("lookup", x, table=net.table())


def sparq(net):
    for shape in ((3, 5, 7), (2, 3, 3, 6)):
        x, _ = coded(net, *shape)
        y = net.step("lookup", x, table=net.table(scale := net.new_scale()), scale=scale)
        for family, round, pairs in (("5opt", 1, 1), ("3opt", 0, 1), ("2opt", 1, 0), ("6opt", 0, 0), ("7opt", 1, 1)):
            yield net.step("sparq", y, family=family, round=round, pairs=pairs)
    yield net.layer("conv2d", y, shape=(5, 3, 3, 6))


def concat(net):
    (a, s), (b, _), (c, _) = coded(net, 2, 3, 3, 5), coded(net, 2, 3, 3, 16, bits=5), coded(net, 2, 3, 3, 1)
    yield net.step("concat", a, b, c, a, scale=net.new_scale(6))
    yield net.step("concat", a, b, scale=s)
    yield net.step("concat", a, scale=net.new_scale())


def attention(net):
    (q, _), (k, _), (v, _) = coded(net, 2, 5, 24), coded(net, 2, 7, 24, bits=6), coded(net, 2, 7, 15)
    a = {"heads": 3, "score_scale": score_bits(24**-0.5)}
    yield net.step("attention", q, k, v, **a)
    yield net.step("attention", q, q, q, **a, scale=net.new_scale())
    for shape in ((2, 1, 7), (1, 5, 7), (1, 1, 7), (2, 5, 7)):
        mask, _ = coded(net, *shape, bits=2)
        yield net.step("attention", q, k, v, mask, **a, scale=net.new_scale(4))


def index_put(net):
    (x, scale), (r, _), added = coded(net, 2, 5, 24), coded(net, 2, 5, 24, bits=5), net.given(image(net, 2, 5, 9))
    plain, values = net.given(image(net, 2, 5, 24)), net.given(image(net, 2, 5, 24))
    index, source = torch.tensor([3, 23, 0]).int(), torch.tensor([[0, 8, 2], [1, 1, 1], [-1, 4, -1]]).int()
    for into, to in ((net.step("sparq", x, family="5opt", round=1, pairs=1), scale), (plain, None)):
        for residual in ((), (r,), (values,)):
            yield net.step("index_put", into, added, *residual, index=index, source=source, activation="relu", scale=to)


def index_select(net):
    x, _ = coded(net, 2, 3, 3, 24)
    y = net.step("index_select", x, index=torch.tensor([3, 23, 0, 3]).int())
    yield y
    yield net.layer("conv2d", y, shape=(4, 3, 3, 1), groups=4)


def reshape(net):
    x, _ = coded(net, 2, 3, 4, 5)
    y = net.step("reshape", x, shape=(0, -1))
    y = net.layer("gemm", y, shape=(48, 60), scale=net.new_scale())
    y = net.step("reshape", y, shape=(2, 4, -1, 6))
    yield net.layer("conv2d", y, shape=(3, 3, 3, 6))
    y = net.step("lookup", x, table=net.table())
    yield net.step("reshape", y, shape=(-1,))


def dequantize(net):
    yield net.step("dequantize", coded(net, 3, 5, 7)[0])
    yield net.step("dequantize", coded(net, 1)[0])


KINDS = [
    quantize_nchw, quantize_channels_last, quantize_other_strides, quantize_both_ways, quantize_rows_and_sequences,
    quantize_between, conv2d, conv2d_with_residual, gemm, add, multiply, pool, lookup, sparq, concat, attention,
    index_put, index_select, reshape, dequantize,
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_each_step_is_its_definition(kind, device, make_weight):
    net = Net(make_weight, device)
    for value in list(kind(net)):
        net.output(value)
    equal(*net.run())


@pytest.mark.parametrize("seed", range(40))
def test_networks_are_their_definition(seed, device, make_weight):
    net = random_net(make_weight, device, seed)
    equal(*net.run())


def test_weights_for_winograd(each_isa_and_threads, make_weight):
    net = Net(make_weight)
    x, _ = coded(net, 2, 9, 8, 20, bits=6)
    y = net.layer("conv2d", x, x, shape=(20, 3, 3, 20), winograd=True, activation="relu", scale=net.new_scale(4))
    net.output(y)
    net.output(net.layer("conv2d", y, shape=(8, 3, 3, 5), groups=4, bits=2, winograd=True))
    equal(*net.run())
    call = net.call()
    each_isa_and_threads(lambda: qk.ops.network(*call))


def test_results_lie_as_they_say(device, make_weight):
    net = Net(make_weight, device)
    x = net.step("quantize", net.given(image(net, 2, 3, 6, 5)), layout="nchw", scale=net.new_scale())
    net.output(net.layer("conv2d", x, shape=(7, 3, 3, 3)), "nchw")
    net.output(net.layer("conv2d", x, shape=(7, 3, 3, 3)))
    got, want = net.run()
    equal(got, want)
    assert got[0].shape == (2, 7, 6, 5)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].shape == (2, 6, 5, 7)
    assert got[1].is_contiguous()


def test_any_batch_and_back(device, make_weight):
    net = chain(make_weight, device)
    for batch in (2, 0, 1, 3, 2, 0, 5, 4, 6, 7, 8, 9, 10, 2):
        net.inputs = [image(net, batch, 3, 12, 12)]
        got, want = net.run()
        equal(got, want)
        assert got[0].shape == (batch, 10)


def test_every_call_gives_fresh_results(make_weight):
    call = chain(make_weight).call()
    first, second = qk.ops.network(*call), qk.ops.network(*call)
    equal(first, second)
    assert first[0].data_ptr() != second[0].data_ptr()


def test_threads_and_instruction_sets_change_no_bit(each_isa_and_threads, make_weight):
    call = chain(make_weight, batch=5).call()
    each_isa_and_threads(lambda: qk.ops.network(*call))


def test_two_threads_call_at_once(make_weight):
    nets = [chain(make_weight, seed=seed, batch=1 + seed) for seed in range(4)]
    calls, expected = [net.call() for net in nets], [net.run()[1] for net in nets]
    wrong = []

    def work(start):
        for i in range(100):
            which = (start + i) % len(nets)
            if not torch.equal(qk.ops.network(*calls[which])[0], expected[which][0]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40, 60))
def test_memory_that_is_reused_changes_no_bit(seed, make_weight):
    call = random_net(make_weight, "cpu", seed, steps=25).call()
    shared = qk.ops.network(*call)
    try:
        _core.reuse_memory(False)
        # The plan hangs on the text, the shapes and the sizes of constants: one more byte makes a new one.
        longer = [*call[1][:3], torch.cat([call[1][3], torch.zeros(1, dtype=torch.uint8)])]
        apart = qk.ops.network(call[0], longer, call[2])
    finally:
        _core.reuse_memory(True)
    equal(shared, apart)


INTERVALS = st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 12), st.integers(0, 12)), max_size=25)


@given(INTERVALS)
@settings(deadline=None)
def test_values_alive_together_lie_apart(intervals):
    values = [(size, min(a, b), max(a, b)) for size, a, b in intervals]
    at, total = _core.place(values)
    for i, (size, begin, end) in enumerate(values):
        assert at[i] % 64 == 0
        assert at[i] + size + 64 <= total
        for j, (other, first, last) in enumerate(values[:i]):
            if begin <= last and first <= end:
                assert at[i] + size + 64 <= at[j] or at[j] + other + 64 <= at[i]
    _, apart = _core.place(values, False)
    assert total <= apart


def test_a_chain_needs_two_values_at_a_time():
    _, total = _core.place([(1000, i, i + 1) for i in range(50)])
    assert total <= 2 * 1088


def test_constants_may_change_in_place(make_weight):
    net = chain(make_weight)
    inputs, constants, text = net.call()
    qk.ops.network(inputs, constants, text)
    constants[0][0] *= 2
    constants[1][0] = 7
    constants[2] += 0.25
    equal(qk.ops.network(inputs, constants, text), interpret(net.program(), inputs, constants, net.weights))


def test_step_times(make_weight):
    call = chain(make_weight).call()
    _core.time_steps(True)
    try:
        qk.ops.network(*call)
        seconds = _core.step_seconds()
    finally:
        _core.time_steps(False)
    assert len(seconds) == len(decode(call[2]).steps)
    assert all(0 <= s < 1 for s in seconds)


# --- torch ------------------------------------------------------------------------------------------------------------


class Whole(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        _, constants, self.text = net.call()
        for i, constant in enumerate(constants):
            self.register_buffer(f"c{i}", constant)

    def forward(self, x):
        return torch.ops.qk.network([x * 1.5], [self.c0, self.c1, self.c2, self.c3], self.text)[0].softmax(-1)


@pytest.fixture
def whole(make_weight):
    net = chain(make_weight)
    return Whole(net), net.inputs[0]


def test_registration(device, make_weight):
    for seed in (1, 3, 4):
        torch.library.opcheck(torch.ops.qk.network.default, random_net(make_weight, device, seed).call())


def test_compiles_without_a_break(whole):
    model, x = whole
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (2, 1, 5):
        assert torch.equal(compiled(x[:1].repeat(batch, 1, 1, 1)), model(x[:1].repeat(batch, 1, 1, 1)))


def dynamic(model, x):
    return torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))


def test_export_is_saved_and_loaded(whole, tmp_path):
    model, x = whole
    torch.export.save(dynamic(model, x), tmp_path / "net.pt2")
    loaded = torch.export.load(tmp_path / "net.pt2").module()
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 12, 12)
        assert torch.equal(loaded(images), model(images))


@pytest.mark.slow
def test_ahead_of_time_compilation(whole, tmp_path):
    model, x = whole
    path = torch._inductor.aoti_compile_and_package(dynamic(model, x), package_path=str(tmp_path / "net.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for batch in (1, 2, 7):
        images = torch.randn(batch, 3, 12, 12)
        # softmax is Inductor's own code there; the network's bits are its input
        assert torch.allclose(compiled(images), model(images), rtol=0, atol=1e-6)
