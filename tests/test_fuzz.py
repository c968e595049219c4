"""No operator crashes, writes into its arguments, or disagrees with its fake, whatever it is given; errors name it.

Each example starts from arguments that are likely to be valid and replaces up to two of them by anything of their type.
"""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import qk
from qk.deploy.program import Builder, encode

SIZES = (0, 1, 1, 2, 3, 5, 8, 16, 17, 33)
LONG = ([0, 2**31], [0, 2**62], [0, 2**31 - 1, 1, 2**31 - 1])  # shapes without a value
INTS = (-(2**62), -1, 0, 1, 2, 3, 4, 7, 8, 9, 64, 2**62)
FLOATS = (0.0, -1.0, 1.0, 2.4, 1e-45, 3e38, float("nan"), float("inf"))
DTYPES = (torch.float32, torch.uint8, torch.int32, torch.float64, torch.float16, torch.int64, torch.bool, torch.int8)
STRINGS = ("paper", "torch", "none", "relu", "relu6", "max", "average", "sum", "affine", "", "no such word")
EXPECTED = (RuntimeError, TypeError, ValueError)  # NotImplementedError is a RuntimeError


def values(rnd, shape, dtype):
    """A tensor of any values, NaN and Inf among the floats."""
    generator = torch.Generator().manual_seed(rnd.getrandbits(32))
    if not dtype.is_floating_point:
        low = 0 if dtype in (torch.uint8, torch.bool) else -100
        high = {torch.bool: 2, torch.int8: 100}.get(dtype, rnd.choice((2, 4, 16, 256)))
        x = torch.randint(low if rnd.random() < 0.3 else 0, high, shape, generator=generator).to(dtype)
        if x.numel() and dtype is not torch.bool and rnd.random() < 0.1:
            x.view(-1)[rnd.randrange(x.numel())] = rnd.choice((torch.iinfo(dtype).min, torch.iinfo(dtype).max))
        return x
    x = torch.randn(shape, generator=generator) * rnd.choice((1e-30, 0.1, 1.0, 100.0, 1e30))
    if x.numel() and rnd.random() < 0.3:
        x.view(-1)[rnd.randrange(x.numel())] = rnd.choice(FLOATS)
    return x.to(dtype)


def shape(rnd, ranks=range(6)):
    return [rnd.choice(SIZES if i < 2 else (0, 1, 2, 3)) for i in range(rnd.choice(list(ranks)))]


def strided(rnd, x):
    """The same values with other strides: transposed, cut out of something larger, or repeated."""
    way = rnd.randrange(5)
    if way == 0 and x.dim() >= 2:
        order = rnd.sample(range(x.dim()), x.dim())
        back = sorted(range(x.dim()), key=order.__getitem__)
        return x.permute(order).contiguous().permute(back)
    if way == 1 and x.dim():
        larger = x.new_empty([n + 3 for n in x.shape]).fill_(1)
        view = larger[tuple(slice(1, 1 + n) for n in x.shape)]
        return view.copy_(x)
    if way == 2 and x.dim() and x.shape[0]:
        return x[:1].expand(x.shape)
    return x


def anything(rnd, kind):
    """Any value of a schema's type."""
    if kind.startswith("Optional"):
        return None if rnd.random() < 0.3 else anything(rnd, kind[len("Optional[") : -1])
    if kind == "Tensor":
        if rnd.random() < 0.05:  # nothing, of any length
            return torch.empty(rnd.choice(LONG), dtype=rnd.choice(DTYPES))
        x = strided(rnd, values(rnd, shape(rnd), rnd.choice(DTYPES)))
        return x.to("meta") if rnd.random() < 0.1 else x
    if kind == "List[Tensor]":
        return [anything(rnd, "Tensor") for _ in range(rnd.choice((0, 1, 2, 4)))]
    if kind == "List[int]":
        return [rnd.choice(INTS) for _ in range(rnd.choice((0, 1, 2, 2, 4)))]
    return {
        "int": rnd.choice(INTS),
        "float": rnd.choice(FLOATS),
        "bool": rnd.random() < 0.5,
        "str": rnd.choice(STRINGS),
    }[kind]


def scale(rnd, rows, bits):
    """step and zero for `rows` rows."""
    step = torch.tensor([rnd.choice((1e-3, 0.1, 1.0, 1e-45)) for _ in range(rows)])
    return step, torch.tensor([rnd.randrange(2**bits) for _ in range(rows)], dtype=torch.int32)


def like_any(rnd, schema):
    """Arguments by name, for operators on tensors of one shape with steps by rows."""
    base, bits = shape(rnd, range(1, 5)), rnd.randrange(2, 9)
    rows = rnd.choice((1, max(1, base[0])))
    step, zero = scale(rnd, rows, bits)
    if schema.name == "qk::range_error":
        base = [rows, rnd.choice(SIZES)]
        step, zero = step.unsqueeze(1).repeat(1, 3), zero.unsqueeze(1).repeat(1, 3)
    named = {
        "bits": bits,
        "step": step,
        "zero": zero,
        "codes": values(rnd, base, torch.uint8),
        "boundary": rnd.choice(("paper", "torch")),
        "beta": 2.0,
        "penalty": rnd.choice((None, torch.tensor([0.01, 7.3]), torch.tensor([0.0, 2.0]))),
        "power": rnd.choice((1.0, 2.0, 2.4)),
        "scale": 0.5,
        "grad_scale": 1.0,
        "round": rnd.random() < 0.5,
        "pairs": rnd.random() < 0.5,
        "stride": 1,
    }
    if schema.name == "qk::rounding_penalty_backward":
        named["grad"] = torch.ones(())
    kinds = {a.name: str(a.type) for a in schema.arguments}
    return {name: named[name] if name in named else strided(rnd, values(rnd, base, torch.float32)) for name in kinds}


def matrix(rnd, bits):
    return values(rnd, [rnd.choice(SIZES), rnd.choice(SIZES)], torch.uint8) & (2**bits - 1)


def pack(rnd, schema):
    bits = rnd.choice((2, 4, 8))
    return {"codes": strided(rnd, matrix(rnd, bits)), "bits": bits}


def unpack(rnd, schema):
    bits = rnd.choice((2, 4, 8))
    codes = matrix(rnd, bits)
    return {"packed": qk.ops.pack(codes, bits), "bits": bits, "cols": codes.shape[1]}


def sparq(rnd, schema):
    return like_any(rnd, schema) | {"bits": rnd.choice((2, 3, 4))}


def sparq_pack(rnd, schema):
    bits, stride = rnd.choice(((4, 1), (4, 2), (4, 4), (3, 1), (2, 1)))
    pairs = rnd.random() < 0.5
    codes = values(rnd, [rnd.choice((0, 1, 3)), rnd.choice((0, 1, 16, 37))], torch.uint8)
    return {"codes": qk.ops.sparq(codes, bits, stride, True, pairs), "bits": bits, "stride": stride, "pairs": pairs}


def sparq_unpack(rnd, schema):
    made = sparq_pack(rnd, schema)
    codes = made.pop("codes")
    return made | {"packed": qk.ops.sparq_pack(codes, **made), "cols": codes.shape[1]}


def packed_weight(rnd, kernel):
    """bits, the packed codes of a weight [N, *kernel, C / groups], its zeros and steps (per channel or by groups)."""
    bits, groups = rnd.choice((2, 4, 8)), rnd.choice((1, 1, 2, 3))
    full = [groups * rnd.choice((1, 2, 5, 16)), *kernel, rnd.choice((1, 3, 8, 17))]
    k = torch.Size(full[1:]).numel()
    codes = values(rnd, [full[0], k], torch.uint8) & (2**bits - 1)
    along = rnd.choice([n for n in (1, 1, 2, 4) if k % n == 0])
    step, zero = scale(rnd, full[0] * along, bits)
    zero = torch.full_like(zero, 128) if bits == 8 else zero
    by_group = [full[0], along] if along > 1 else [full[0]]
    return bits, groups, full, qk.ops.pack(codes, bits), zero.reshape(by_group), step.reshape(by_group)


def prepack(rnd, schema):
    bits, groups, full, packed, zero, _ = packed_weight(rnd, rnd.choice(([], [1, 1], [3, 3])))
    return {"packed": packed, "zero": zero, "bits": bits, "shape": full, "groups": groups if len(full) == 4 else 1}


def integer(rnd, full, bits, groups, packed, zero, step, x):
    x_bits = rnd.choice((4, 6, 8))
    x_step, x_zero = scale(rnd, 1, x_bits)
    out_step, out_zero = scale(rnd, 1, 4) if rnd.random() < 0.4 else (None, None)
    return {
        "x": strided(rnd, x & (2**x_bits - 1)),
        "x_step": x_step,
        "x_zero": x_zero,
        "weight": strided(rnd, torch.ops.qk.prepack(packed, zero, bits, full, groups)),
        "weight_step": step,
        "bias": torch.randn(full[0]) if rnd.random() < 0.5 else None,
        "bits": bits,
        "x_bits": x_bits,
        "activation": rnd.choice(("none", "relu", "relu6")),
        "out_step": out_step,
        "out_zero": out_zero,
        "out_bits": 4,
    }


def gemm(rnd, schema):
    bits, _, full, packed, zero, step = packed_weight(rnd, [])
    x = values(rnd, [*shape(rnd, range(3)), full[-1]], torch.uint8)
    return integer(rnd, full, bits, 1, packed, zero, step, x)


def gemm_weight_only(rnd, schema):
    bits, _, full, packed, zero, step = packed_weight(rnd, [])
    x = values(rnd, [*shape(rnd, range(3)), full[-1]], rnd.choice((torch.float32, torch.float16, torch.bfloat16)))
    return {
        "x": strided(rnd, x),
        "weight": strided(rnd, torch.ops.qk.prepack(packed, zero, bits, full)),
        "weight_step": step,
        "bias": torch.randn(full[0]) if rnd.random() < 0.5 else None,
        "bits": bits,
    }


def conv2d(rnd, schema):
    kernel = rnd.choice(([1, 1], [3, 3], [2, 5]))
    bits, groups, full, packed, zero, step = packed_weight(rnd, kernel)
    sides = [rnd.choice((1, 3, 7, 12)) for _ in range(2)]
    x = values(rnd, [rnd.choice((0, 1, 2)), *sides, full[-1] * groups], torch.uint8)
    pairs = {name: [rnd.choice(at), rnd.choice(at)] for name, at in (("stride", (1, 2)), ("padding", (0, 1, 4)))}
    more = {"kernel": kernel, **pairs, "dilation": [1, rnd.choice((1, 2))], "groups": groups}
    return integer(rnd, full, bits, groups, packed, zero, step, x) | more


def network(rnd, schema):
    """Quantize, convolve, pool, dequantize."""
    bits, _, full, packed, zero, step = packed_weight(rnd, [1, 1])
    b = Builder()
    scales = [b.scale(*scale(rnd, 1, 8), 8) for _ in range(2)]
    pairs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    u = b.step("quantize", b.input(), layout="nchw", scale=scales[0])
    weight = {"weight": torch.ops.qk.prepack(packed, zero, bits, full, 1), "weight_step": step, "bits": bits}
    u = b.step("conv2d", u, **weight, kernel=(1, 1), groups=1, activation="relu", scale=scales[1], **pairs)
    u = b.step("pool", u, mode="max", kernel=(2, 2), ceil_mode=1, count_include_pad=0, **pairs)
    b.output(b.step("dequantize", u), rnd.choice(("nchw", "same")))
    x = values(rnd, [rnd.choice((0, 1, 2)), full[-1], *(rnd.choice((2, 3, 7)) for _ in range(2))], torch.float32)
    text = encode(b.program())
    if rnd.random() < 0.2:
        text = text.replace(rnd.choice("=0123 \n"), rnd.choice("=0123 \n"), 1)
    return {"inputs": [strided(rnd, x)], "constants": b.constants(), "program": text}


def operand(rnd, base, bits=8):
    """A value of add and multiply: codes with step and zero, or float32 without."""
    if rnd.random() < 0.3:
        return strided(rnd, values(rnd, base, torch.float32)), None, None
    return strided(rnd, values(rnd, base, torch.uint8) & (2**bits - 1)), *scale(rnd, 1, bits)


def result_scale(rnd):
    step, zero = scale(rnd, 1, 4) if rnd.random() < 0.6 else (None, None)
    return {"out_step": step, "out_zero": zero, "out_bits": 4}


def pointwise(rnd, schema):
    """add and multiply."""
    base = shape(rnd, range(2, 5))
    other = base if schema.name == "qk::add" else [base[0], *[1] * (len(base) - 2), base[-1]]
    sides = (*operand(rnd, base), *operand(rnd, other))
    names = [argument.name for argument in schema.arguments[:6]]
    named = dict(zip(names, sides, strict=True))
    return named | {"activation": rnd.choice(("none", "relu", "relu6"))} | result_scale(rnd)


def pool(rnd, schema):
    x = values(rnd, [rnd.choice((0, 1, 2)), rnd.choice((3, 7)), rnd.choice((3, 8)), rnd.choice(SIZES)], torch.uint8)
    step, zero = scale(rnd, 1, 8)
    average = rnd.random() < 0.6
    args = {"x": strided(rnd, x), "x_step": step, "x_zero": zero, "mode": "average" if average else "max"}
    args |= {
        "kernel": [rnd.choice((1, 2, 3))] * 2,
        "stride": [rnd.choice((1, 2))] * 2,
        "padding": [rnd.choice((0, 1))] * 2,
    }
    args |= {"ceil_mode": rnd.random() < 0.3, "count_include_pad": rnd.random() < 0.5}
    return args | (result_scale(rnd) if average else {})


def lookup(rnd, schema):
    table = values(rnd, [256], rnd.choice((torch.uint8, torch.float32)))
    return {"codes": strided(rnd, values(rnd, shape(rnd), torch.uint8)), "table": table}


def index_select(rnd, schema):
    base, count = shape(rnd, range(1, 5)), rnd.choice((0, 1, 5, 70))
    index = torch.tensor([rnd.randrange(base[-1]) for _ in range(count if base[-1] else 0)], dtype=torch.int32)
    return {"codes": strided(rnd, values(rnd, base, torch.uint8)), "index": index}


def index_put(rnd, schema):
    base, others, terms = shape(rnd, range(1, 5)), rnd.choice(SIZES), rnd.choice((0, 1, 2, 3))
    end = result_scale(rnd)
    x = values(rnd, base, torch.float32 if end["out_step"] is None else torch.uint8)
    index = rnd.sample(range(base[-1]), rnd.randint(0, base[-1]))
    source = [[rnd.randrange(-1, others) for _ in index] for _ in range(terms)]
    args = {"x": strided(rnd, x), "added": strided(rnd, values(rnd, [*base[:-1], others], torch.float32)), **end}
    args |= {"index": torch.tensor(index, dtype=torch.int32), "activation": rnd.choice(("none", "relu", "relu6"))}
    args["source"] = torch.tensor(source, dtype=torch.int32).reshape(terms, len(index))
    if rnd.random() < 0.5:
        args["residual"], args["residual_step"], args["residual_zero"] = operand(rnd, base)
    return args


def concat(rnd, schema):
    base, count = shape(rnd, range(1, 5)), rnd.choice((1, 2, 3))
    scales = [scale(rnd, 1, 8) for _ in range(count)]
    codes = [strided(rnd, values(rnd, [*base[:-1], rnd.choice(SIZES)], torch.uint8)) for _ in range(count)]
    step, zero = scale(rnd, 1, 8)
    return {
        "codes": codes,
        "steps": [s for s, _ in scales],
        "zeros": [z for _, z in scales],
        "out_step": step,
        "out_zero": zero,
        "out_bits": 8,
    }


def embedding_bag(rnd, schema):
    bits, cols, count = rnd.choice((2, 4, 8)), rnd.choice((1, 5, 16, 33, 128)), rnd.choice((1, 3, 17))
    dtype = rnd.choice(("float16", "bfloat16", "float32"))
    kind = "affine" if bits == 8 else rnd.choice(("affine", "codebook", "shared"))
    numbers = {"affine": 2, "codebook": 2**bits, "shared": 1}[kind] * (
        2 if dtype != "float32" and kind != "shared" else 4
    )
    rows = values(rnd, [count, -(-cols * bits // 8) + numbers], torch.uint8)
    codes_first = rnd.random() < 0.5
    if kind == "shared":  # the numbers of books that there are
        rows[:, slice(-4, None) if codes_first else slice(0, 4)] = 0
    looked_up, long = rnd.choice((0, 1, 9)), rnd.choice((torch.int32, torch.int64))
    indices = torch.tensor([rnd.randrange(count) for _ in range(looked_up)], dtype=long)
    offsets = torch.tensor(sorted([0, rnd.randrange(looked_up + 1)]), dtype=rnd.choice((torch.int32, torch.int64)))
    mode = rnd.choice(("sum", "mean", "max"))
    return {
        "rows": rows,
        "indices": indices,
        "offsets": offsets,
        "bits": bits,
        "cols": cols,
        "kind": kind,
        "dtype": dtype,
        "codes_first": codes_first,
        "books": torch.randn(2, 2**bits) if kind == "shared" else None,
        "mode": mode,
        "per_sample_weights": torch.randn(looked_up) if mode == "sum" and rnd.random() < 0.5 else None,
        "padding_idx": rnd.choice((None, 0)),
    }


def attention(rnd, schema):
    batch, queries, keys = rnd.choice((0, 1, 2)), rnd.choice(SIZES), rnd.choice(SIZES)
    heads, depth, width = rnd.choice((1, 1, 2, 3)), rnd.choice((1, 3, 8, 32)), rnd.choice((1, 5, 16, 33))
    shapes = {"q": [queries, heads * depth], "k": [keys, heads * depth], "v": [keys, heads * width]}
    args = {"heads": heads, "scale": rnd.choice((None, None, 0.1, 1e30))} | result_scale(rnd)
    for name, rest in shapes.items():
        args[name] = strided(rnd, values(rnd, [batch, *rest], torch.uint8))
        args[f"{name}_step"], args[f"{name}_zero"] = scale(rnd, 1, 8)
    if rnd.random() < 0.5:
        rows = [rnd.choice((1, batch)), rnd.choice((1, queries)), keys]
        args["mask"] = strided(rnd, values(rnd, rows, rnd.choice((torch.bool, torch.uint8))))
    return args


LIKELY = {"pack": pack, "unpack": unpack, "sparq": sparq, "prepack": prepack, "gemm": gemm, "conv2d": conv2d}
LIKELY |= {"network": network, "add": pointwise, "multiply": pointwise, "pool": pool, "lookup": lookup}
LIKELY |= {"sparq_pack": sparq_pack, "sparq_unpack": sparq_unpack, "concat": concat, "embedding_bag": embedding_bag}
LIKELY |= {"attention": attention, "index_put": index_put, "index_select": index_select}
LIKELY |= {"gemm_weight_only": gemm_weight_only}


def described(value):
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return f"[{', '.join(map(described, value))}]"
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{value.dtype} {list(value.shape)} strides {value.stride()} on {value.device}"


def outputs(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def each_tensor(args):
    """The tensors of a call, those in lists too."""
    for value in args.values():
        yield from (x for x in (value if isinstance(value, list) else [value]) if isinstance(x, torch.Tensor))


def on_meta(value):
    if isinstance(value, list):
        return [on_meta(x) for x in value]
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def storage(x):
    """All bytes behind x, those around a view too."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone() if x.is_cpu else torch.empty(0)


def attempt(op, rnd, tell=lambda text: None):
    """One call; True if it gave a result."""
    schema = getattr(torch.ops.qk, op).default._schema
    args = LIKELY.get(op, like_any)(rnd, schema)
    for argument in rnd.sample(list(schema.arguments), rnd.choice((0, 0, 1, 1, 2))):
        args[argument.name] = anything(rnd, str(argument.type))
    tell(f"qk::{op}(" + ", ".join(f"{name}={described(value)}" for name, value in args.items()) + ")")
    tensors = list(each_tensor(args))
    before = [storage(x) for x in tensors]
    message = None
    try:
        result = outputs(getattr(torch.ops.qk, op)(**args))
    except EXPECTED as error:
        message = str(error)
    unchanged = all(torch.equal(storage(x), b) for x, b in zip(tensors, before, strict=True))
    assert unchanged, "an argument was written to"
    if message is not None:
        ours = message.startswith(f"qk::{op}: ")
        assert ours or not tensors or any(x.is_meta for x in tensors), message  # torch answers a call without a tensor
        return False
    if any(x.device.type == "meta" for x in tensors):
        return True
    meta = {name: on_meta(value) for name, value in args.items()}
    fakes = outputs(getattr(torch.ops.qk, op)(**meta))
    for real, fake in zip(result, fakes, strict=True):
        assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
    return True


def registered():
    names = {name.removeprefix("qk::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("qk::")}
    return sorted(n for n in names if torch._C._dispatch_has_kernel_for_dispatch_key(f"qk::{n}", "CPU"))


def fuzz(op, examples):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32 - 1))
    def run(seed):
        attempt(op, random.Random(seed), note)

    try:
        run()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", registered())
def test_any_call_gives_a_result_or_an_error(op):
    fuzz(op, 200)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512vnni", "amx"])
@pytest.mark.parametrize("op", registered())
def test_thousands_of_calls_give_a_result_or_an_error(op, isa):
    if isa not in qk.usable_isas():
        pytest.skip(f"{isa}: this CPU does not have it")
    before = qk.active_isa()
    qk.force_isa(isa)
    try:
        fuzz(op, 4000)
    finally:
        qk.force_isa(before)


@pytest.mark.parametrize("op", registered())
def test_a_good_part_of_the_calls_gives_a_result(op):
    # Else the fuzzing would only see the checks and never a kernel.
    assert sum(attempt(op, random.Random(seed)) for seed in range(60)) >= 15
