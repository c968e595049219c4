#include "cuda/stream.h"

#include <torch/csrc/stable/c/shim.h>

#include <stdexcept>
#include <string>

// From libtorch_cuda. Weak, so that this object also loads on a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace qk::cuda {
namespace {

std::string advice(cudaError_t error) {
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorUnsupportedPtxVersion:
      return "This build has kernels for " QK_CUDA_ARCHS
             " and later ones by PTX 80; build qk with QK_CUDA_ARCHS for this GPU.";
    case cudaErrorInsufficientDriver:
    case cudaErrorNoDevice: return "CUDA 13 needs a GPU and a driver of version 580 or later; look at nvidia-smi.";
    default: return "An earlier kernel may have failed; CUDA_LAUNCH_BLOCKING=1 shows which.";
  }
}

[[noreturn]] void refuse(const char* op, const std::string& what, const std::string& todo) {
  throw std::runtime_error(std::string("qk::") + op + ": CUDA " + what + ". " + todo);
}

// Of the current device.
int attribute(const char* op, cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) refuse(op, std::string("gave no device: ") + cudaGetErrorString(error), advice(error));
  return value;
}

}  // namespace

cudaStream_t current_stream(const char* op) {
  int32_t device = 0;
  void* stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream)
    refuse(op, "must be part of torch, and this torch has none", "Install a CUDA build of torch.");
  if (aoti_torch_get_current_device_index(&device) || aoti_torch_get_current_cuda_stream(device, &stream))
    refuse(op, "gave no current stream", "Check that torch.cuda.is_available() is true.");
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) refuse(op, std::string("refused the kernel: ") + cudaGetErrorString(error), advice(error));
}

int processors(const char* op) { return attribute(op, cudaDevAttrMultiProcessorCount); }

// Later architectures take the instruction apart into many.
bool has_int4(const char* op) { return attribute(op, cudaDevAttrComputeCapabilityMajor) == 8; }

bool has_warp_groups(const char* op, const void* kernel) {
  static const bool built = std::string(", " QK_CUDA_ARCHS ",").find(" 90a,") != std::string::npos;
  if (!built || attribute(op, cudaDevAttrComputeCapabilityMajor) != 9 ||
      attribute(op, cudaDevAttrComputeCapabilityMinor) != 0)
    return false;
  static const int version = [&] {  // what a driver compiles from the PTX of sm_80 is older
    cudaFuncAttributes of{};
    const cudaError_t error = cudaFuncGetAttributes(&of, kernel);
    if (error != cudaSuccess) refuse(op, std::string("knows no kernel: ") + cudaGetErrorString(error), advice(error));
    return of.ptxVersion;
  }();
  return version >= 90;
}

void check_aligned(const char* op, const char* argument, const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  throw std::runtime_error(std::string("qk::") + op + ": " + argument + " must start at a multiple of " +
                           std::to_string(bytes) + " bytes, got a view that does not. Clone it first.");
}

}  // namespace qk::cuda
