// Instead of csrc/core/register.h: the CUDA kernels behind the CPU key of a library of their own. The build renames the
// namespace qk, and with it the library, to qk_emulated.
#pragma once
#include <torch/csrc/stable/library.h>

#define QK_DEVICE cuda
#define QK_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(qk, CPU, m)
#define QK_DEVICE_GUARD(tensor) (void)0
