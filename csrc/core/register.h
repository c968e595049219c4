// A face is compiled twice: into the base object for the CPU and, with QK_CUDA_OBJECT, into the CUDA object.
// QK_DEVICE is the namespace of the kernels it uses, QK_REGISTER puts it behind the dispatcher.
#pragma once
#include <torch/csrc/stable/library.h>

#if defined(QK_CUDA_OBJECT)
#include <torch/csrc/stable/accelerator.h>
#define QK_DEVICE cuda
#define QK_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(qk, CUDA, m)
#define QK_DEVICE_GUARD(tensor) torch::stable::accelerator::DeviceGuard qk_guard((tensor).get_device_index())
#else
#define QK_DEVICE cpu
#define QK_REGISTER(m) STABLE_TORCH_LIBRARY_IMPL(qk, CPU, m)
#define QK_DEVICE_GUARD(tensor) (void)0
#endif
