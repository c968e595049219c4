// The two calls that a launch needs from outside. Errors: "qk::op: CUDA ... What to do."
#pragma once
#include <cuda_runtime_api.h>

namespace qk::cuda {

cudaStream_t current_stream(const char* op);  // torch's stream of the current device
void check_launch(const char* op);            // throws if the launch was refused

}  // namespace qk::cuda
