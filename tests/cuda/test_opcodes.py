"""What the compiler made of the products' main loops, by disassembly: nothing slow in them, and wide accesses alone.

Needs cuobjdump, of the CUDA toolkit or of the package nvidia-cuda-cuobjdump with nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("80", "90a", "120")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
WEIGHTS = {8: "LDG.E.128", 4: "LDG.E.128", 2: "LDG.E.64"}  # a lane's part of a tile comes by one, of 8 bits by two
ADDRESSES = 30  # masks and shifts for them, at most, as seen
UNPACKED = {8: 0, 4: 8 + 4, 2: 8 + 6}  # masks and shifts for the 8 registers of a tile of weights


def cuobjdump() -> str | None:
    """Of the toolkit, or of the package, which puts it beside its own nvdisasm."""
    packages = Path(sysconfig.get_paths()["purelib"], "nvidia").glob("*/bin/cuobjdump")
    return shutil.which("cuobjdump") or next((str(path) for path in packages), None)


def newest(name: str) -> Path | None:
    builds = ROOT.glob(f"build/**/qk_cuda.dir/csrc/cuda/{name}.cu.o")
    return max(builds, key=lambda path: path.stat().st_mtime, default=None)


def main_loop(body: str) -> Counter[str]:
    """How often each instruction is in the innermost loop around the first product; empty without products."""
    code = [(int(at, 16), op, rest) for at, op, rest in INSTRUCTION.findall(body)]
    products = [at for at, op, _ in code if op.startswith(("IMMA", "IGMMA", "HMMA"))]
    if not products:
        return Counter()
    ends = ((int(to[1], 16), at) for at, op, rest in code if op == "BRA" and (to := re.search(r"0x([0-9a-f]+)", rest)))
    around = [(first, last) for first, last in ends if first <= products[0] <= last]
    first, last = min(around, key=lambda loop: loop[1] - loop[0])
    return Counter(op for at, op, _ in code if first <= at <= last)


def loops_of(name: str, arch: str, parameters: str, some: bool = False) -> dict[tuple[int, ...], Counter[str]]:
    """Of every kernel of a file, by the numbers in its template parameters, which the pattern finds; with `some`,
    of those where it does."""
    tool, built = cuobjdump(), newest(name)
    if not tool:
        pytest.skip("cuobjdump: not installed")
    if not built:
        pytest.skip("cuda: no kernels were built here")
    command = [tool, "-sass", "-arch", f"sm_{arch}", str(built)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names, bodies = (re.split(r"Function : (\S+)", text)[i::2] for i in (1, 2))
    readable = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    found = {}
    for line, body in zip(readable.splitlines(), bodies, strict=True):
        numbers = re.search(parameters, line.replace("false", "0").replace("true", "1"))
        if numbers or not some:
            found[tuple(map(int, numbers.groups()))] = main_loop(body)
    assert found
    assert some or len(found) == len(names)
    return found


def of_kind(loop: Counter[str], *starts: str) -> dict[str, int]:
    return {op: count for op, count in loop.items() if op.split(".")[0] in starts}


def count(loop: Counter[str], *starts: str) -> int:
    return sum(of_kind(loop, *starts).values())


# --- many tokens ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loops(request):
    """By row warps, row tiles, token tiles, bits, bytes copied together, and whether K is in groups and x has int4."""
    found = loops_of("convolve", request.param, r"Tile<(\d), (\d), (\d)>, (\d), (\d+), ([01]), ([01])>")
    # Where the instruction of int4 would be taken apart its kernels are empty.
    assert all(bool(loop) == (request.param == "80" or not key[-1]) for key, loop in found.items())
    return {key: loop for key, loop in found.items() if loop}


@pytest.fixture
def whole(loops):
    """Those of whole vectors and one group, by row tiles, token tiles and bits."""
    return [(*key[1:4], loop) for key, loop in loops.items() if key[4:] == (16, 0, 0)]


def test_each_tile_multiplies_as_often_as_it_must(loops):
    """Two steps of 32 codes, or one of 64, for each tile of 16 channels and 8 tokens, whose tokens come by one load."""
    for (_, rows, tokens, *_, int4), loop in loops.items():
        assert count(loop, "IMMA") == (1 if int4 else 2) * rows * tokens
        assert of_kind(loop, "LDSM") == {"LDSM.16.M88.4": tokens}


def test_nothing_of_the_loop_is_in_local_memory_converts_or_divides(loops):
    for (*_, grouped, _), loop in loops.items():
        assert not of_kind(loop, "LDL", "STL")
        # Groups along K leave the integers once for each.
        assert grouped or not of_kind(loop, "I2F", "I2FP", "F2I", "MUFU", "FMUL", "FADD", "FFMA")


def test_weights_and_x_come_16_bytes_at_a_time(whole):
    assert len(whole) == 4 * 3
    for rows, _, bits, loop in whole:
        assert of_kind(loop, "LDG") == {WEIGHTS[bits]: rows * (2 if bits == 8 else 1)}
        assert set(of_kind(loop, "LDGSTS")) == {"LDGSTS.E.BYPASS.128"}


def test_unpacking_costs_what_its_masks_and_shifts_do(whole):
    for rows, _, bits, loop in whole:
        assert count(loop, "LOP3", "SHF") <= rows * UNPACKED[bits] + ADDRESSES


def test_sums_of_codes_take_a_dot_product_for_each_word(loops):
    for (_, _, tokens, bits, *_), loop in loops.items():
        assert count(loop, "IDP") == (4 * tokens if bits < 8 else 0)


def test_int4_takes_two_operations_more_for_each_register(loops):
    """A register of x is joined from two, of weights made from two of 4 bits, or masked out of one of 2."""
    for (_, rows, tokens, bits, *_, int4), loop in loops.items():
        if int4:
            assert count(loop, "LOP3", "SHF") <= 4 * tokens + rows * (8 if bits == 4 else 6) + ADDRESSES
            assert set(of_kind(loop, "IMMA")) == {"IMMA.16864.U4.U4"}


# --- groups of warps --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def groups():
    """Of sm_90a, by row tiles, token tiles and bits."""
    return loops_of("warp_groups", "90a", r"Tile<\d, (\d), (\d+)>, (\d)>")


def test_the_loop_of_warp_groups_has_two_tiles(groups):
    for (rows, tokens, bits), loop in groups.items():
        assert of_kind(loop, "IGMMA") == {f"IGMMA.64x{8 * tokens}x32.{'S8' if bits == 8 else 'U8'}.U8": 2 * 2 * rows}
        assert of_kind(loop, "LDG") == {WEIGHTS[bits]: 2 * rows * (2 if bits == 8 else 1)}
        assert set(of_kind(loop, "LDGSTS")) == {"LDGSTS.E.BYPASS.128"}
        assert count(loop, "IDP") == (2 * 8 if bits < 8 else 0)  # 128 tokens of 16 words, by 256 threads
        assert count(loop, "BAR") == 2
        assert not of_kind(loop, "LDL", "STL", "I2F", "I2FP", "F2I", "MUFU", "FMUL", "FADD", "FFMA")


@pytest.mark.parametrize("arch", ["80", "120"])
def test_warp_groups_are_empty_elsewhere(arch):
    assert not any(loops_of("warp_groups", arch, r"Tile<\d, (\d), (\d+)>, (\d)>").values())


# --- few tokens -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=ARCHITECTURES)
def few(request):
    """By row tiles, token tiles, tiles of K on their way, and bits."""
    return loops_of("few_tokens", request.param, r"Shape<(\d), (\d), (\d)>, (\d)>")


def test_a_warps_loop_for_few_tokens_multiplies_and_reads_as_often_as_it_must(few):
    for (rows, tokens, depth, bits), loop in few.items():
        assert count(loop, "IMMA") == 2 * rows * tokens * depth
        assert count(loop, "IDP") == (4 * tokens * depth if bits < 8 else 0)
        assert of_kind(loop, "LDG") == {
            WEIGHTS[bits]: rows * depth * (2 if bits == 8 else 1),
            "LDG.E": 4 * tokens * depth,
        }
        assert not of_kind(loop, "LDL", "STL", "I2F", "I2FP", "F2I", "MUFU", "FMUL", "FADD", "FFMA")


# --- float activations ------------------------------------------------------------------------------------------------

PARTS = {"Float16": 1, "BFloat16": 1, "Float32": 3}  # what a value of x is the sum of


@pytest.fixture(scope="module", params=[(arch, name) for arch in ARCHITECTURES for name in PARTS])
def floats(request):
    """Of one type of x: by warps of rows (none for few tokens), row tiles, token tiles, and bits."""
    arch, name = request.param
    few, many = (
        loops_of("gemm_weight_only", arch, rf"{shape}<.*::{name}, (\d), (\d), (\d)>, (\d), ([014])>", some=True)
        for shape in ("Shape", "Tile")
    )
    return PARTS[name], few, many


def test_floats_are_multiplied_as_often_as_they_must_be(floats):
    """Four steps of 16 for each tile of 64 codes; a register of the weight has two codes, and its zero taken off."""
    parts, few, many = floats
    for (rows, tokens, depth, *_), loop in few.items():
        assert count(loop, "HMMA") == 4 * rows * tokens * depth * parts
        assert count(loop, "HADD2", "HFMA2") == 16 * rows * depth
    for (_, rows, tokens, *_), loop in many.items():
        assert count(loop, "HMMA") == 4 * rows * tokens * parts
        assert count(loop, "HADD2", "HFMA2") == 16 * rows


def test_weights_and_floats_come_in_wide_accesses(floats):
    parts, few, many = floats
    for (rows, tokens, depth, bits, word), loop in few.items():
        reads = of_kind(loop, "LDG")
        assert reads.pop(WEIGHTS[bits]) >= rows * depth * (2 if bits == 8 else 1)
        if word == 4 and parts == 1 and bits > 2:  # of 2 bits the weights come as x does
            assert reads["LDG.E.64"] == 4 * tokens * depth
    for (_, rows, tokens, bits, _), loop in many.items():
        assert of_kind(loop, "LDG")[WEIGHTS[bits]] == rows * (2 if bits == 8 else 1)
        assert set(of_kind(loop, "LDGSTS")) == {"LDGSTS.E.BYPASS.128"}
        assert of_kind(loop, "LDS")[f"LDS.{64 if parts == 1 else 128}"] == 4 * tokens
        assert count(loop, "BAR") == 1


def test_nothing_of_the_loops_of_floats_is_in_local_memory_converts_or_divides(floats):
    for loop in (*floats[1].values(), *floats[2].values()):
        assert not of_kind(loop, "LDL", "STL", "I2F", "I2FP", "F2I", "F2F", "F2FP", "MUFU")
