#include "core/scratch.h"

#include <cstdlib>
#include <new>

namespace qk {
namespace {

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void* thread_scratch(int64_t bytes) {
  static thread_local Buffer buffer;
#if defined(__SANITIZE_ADDRESS__)
  constexpr int64_t unit = 64;  // a new one for each size, so that a step beyond it is seen
  const bool fits = bytes == buffer.bytes;
#else
  constexpr int64_t unit = 4096;
  const bool fits = bytes <= buffer.bytes;
#endif
  if (!fits) {
    std::free(buffer.data);
    buffer.bytes = 0;
    const int64_t rounded = (bytes + unit - 1) / unit * unit;
    buffer.data = std::aligned_alloc(static_cast<size_t>(unit), static_cast<size_t>(rounded));
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace qk
