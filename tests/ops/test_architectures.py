"""gemm and conv2d by the instructions that one architecture of GPUs alone has.

Those are products of codes of 4 bits (sm_80 to 89) and of groups of four warps (sm_90), for sizes that give every
processor a block.
"""

import pytest
import torch

from ops import test_conv2d, test_gemm

CHANNELS = [60, 160, 480]  # blocks of 64, of 128, and of 256 channels, and part of another
KERNELS = {80: "true>", 90: "warp_groups_kernel"}  # what a GPU calls those with the instruction


@pytest.fixture(params=["emulated 80", "emulated 90", "cuda"])
def device(request, emulated):
    where, *architecture = request.param.split()
    if where == "emulated":
        if not emulated.library:
            pytest.skip("emulated: the target qk_emulated was not built")
        with emulated.of(int(*architecture)):
            yield torch.device("cpu")
        return
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] not in (8, 9):
        pytest.skip("cuda: no GPU with such an instruction")
    yield torch.device("cuda")


def times(device, tokens):
    """How often so many tokens come, so that every processor gets a block of them; emulated there are two."""
    return 1 if device.type == "cpu" else -(-128 * torch.cuda.get_device_properties(0).multi_processor_count // tokens)


# Tiles are 64 codes of K: parts of one, one, two, an odd and an even number of whole and part ones.
@pytest.mark.parametrize("k", [16, 64, 80, 192, 416])
@pytest.mark.parametrize("n", CHANNELS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_are_the_definition(bits, n, k, device, make_weight):
    w = make_weight((n, k), bits, device)
    for m, per_row, x_bits in ((45, False, 8), (100, True, 8), (70, True, 4)):
        m += 128 if n <= 64 else 0
        inputs, bias = test_gemm.problem(m * times(device, m), k, w, device, x_bits, per_row=per_row)
        got, want = test_gemm.both(inputs, w, bias, x_bits)
        assert torch.equal(got, want), (m, x_bits)


@pytest.mark.parametrize("x_bits", [2, 4, 6, 8])
@pytest.mark.parametrize("n", [32, 130])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_many_rows_of_few_channels(bits, n, x_bits, device, make_weight):
    w = make_weight((n, 208), bits, device)
    inputs, bias = test_gemm.problem(300 * times(device, 300), 208, w, device, x_bits)
    out = {"out_step": torch.tensor([90.0], device=device), "out_zero": inputs[2] % 16, "out_bits": 4}
    got, want = test_gemm.both(inputs, w, bias, x_bits, **out)
    assert torch.equal(got, want)


@pytest.mark.parametrize("x_bits", [4, 8])
@pytest.mark.parametrize("n", CHANNELS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_largest_codes_do_not_saturate(bits, n, x_bits, device, make_weight):
    w = make_weight((n, 512), bits, device, extreme=True)
    x = torch.full((140 * times(device, 140), 512), 2**x_bits - 1, dtype=torch.uint8)
    for zero in (0, 2**x_bits - 1):
        inputs = [x, torch.tensor([0.1]), torch.tensor([zero], dtype=torch.int32)]
        got, want = test_gemm.both([t.to(device) for t in inputs], w, None, x_bits)
        assert torch.equal(got, want)


# H, W, channels that an output reads, what differs from a plain convolution of 3 x 3
IMAGES = {
    "padding": (5, 7, 48, {"padding": (1, 1)}),
    "padding beyond the kernel": (3, 2, 32, {"padding": (4, 3)}),
    "stride": (9, 11, 64, {"stride": (2, 1), "padding": (1, 0)}),
    "dilation": (9, 8, 16, {"dilation": (2, 1), "padding": (1, 1)}),
    "groups": (6, 6, 80, {"groups": 2, "padding": (1, 1)}),
}


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("n", CHANNELS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_images_are_the_definition(bits, n, name, device, make_weight):
    h, width, channels, geometry = IMAGES[name]
    groups = geometry.get("groups", 1)
    w = make_weight((n * groups, 3, 3, channels), bits, device, groups=groups)
    for x_bits in (4, 8):
        batch = 4 * times(device, 4 * h * width)
        inputs, bias = test_conv2d.problem(batch, h, width, channels * groups, n * groups, device, x_bits)
        plain, want = test_conv2d.both(inputs, w, bias, geometry, x_bits)
        assert torch.equal(plain, want), x_bits
        residual = torch.randint(0, 256, plain.shape, dtype=torch.uint8, device=device)
        epilogue = {"activation": "relu", "residual": residual, "residual_step": torch.tensor([7.3], device=device)}
        zero = torch.tensor([9], dtype=torch.int32, device=device)
        epilogue |= {"residual_zero": zero, "out_step": torch.tensor([9.0], device=device), "out_zero": zero}
        codes, want = test_conv2d.both(inputs, w, bias, geometry, x_bits, **epilogue)
        assert torch.equal(codes, want), x_bits
        assert len(codes.unique()) > 10


def test_a_gpu_did_run_them(device, make_weight):
    if device.type == "cpu":
        pytest.skip("emulated: nothing keeps account of its kernels")
    w = make_weight((288, 64), 4, device)
    inputs, bias = test_gemm.problem(45 * times(device, 45), 64, w, device, x_bits=4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        test_gemm.both(inputs, w, bias, x_bits=4)
    kernel = KERNELS[torch.cuda.get_device_capability()[0] * 10]
    assert any(kernel in event.key for event in seen.key_averages())
