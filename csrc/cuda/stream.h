// What a launch needs from outside. Errors: "qk::op: CUDA ... What to do."
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace qk::cuda {

cudaStream_t current_stream(const char* op);  // torch's stream of the current device
void check_launch(const char* op);            // throws if the launch was refused
int processors(const char* op);               // multiprocessors of the current device
bool has_int4(const char* op);  // whether the current device multiplies codes of 4 bits, at twice the rate
// Whether the current device has wgmma, and this kernel was compiled for it: sm_90 without the a has it not.
bool has_warp_groups(const char* op, const void* kernel);

// Throws unless the address is a multiple of `bytes`: a view into the middle of a tensor may start anywhere.
void check_aligned(const char* op, const char* argument, const void* address, int bytes);

}  // namespace qk::cuda
