// Working memory of a thread, kept from call to call: a fresh allocation of a megabyte costs page faults every time.
#pragma once
#include <cstdint>

namespace qk {

// At least `bytes` bytes on a cache line, with any content; good until the next call from the same thread.
void* thread_scratch(int64_t bytes);

// The same for the values of a network, beside the scratch of the kernels that it calls.
void* thread_arena(int64_t bytes);

}  // namespace qk
