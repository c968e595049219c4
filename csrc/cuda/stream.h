// What a launch needs from outside. Errors: "qk::op: CUDA ... What to do."
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace qk::cuda {

cudaStream_t current_stream(const char* op);  // torch's stream of the current device
void check_launch(const char* op);            // throws if the launch was refused
int processors(const char* op);               // multiprocessors of the current device

// Throws unless the address is a multiple of `bytes`: a view into the middle of a tensor may start anywhere.
void check_aligned(const char* op, const char* argument, const void* address, int bytes);

}  // namespace qk::cuda
