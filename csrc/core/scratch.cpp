#include "core/scratch.h"

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace qk {
namespace {

struct Buffer {
  void* data = nullptr;
  int64_t bytes = 0;

  void* at_least(int64_t wanted, int64_t page) {
#if defined(__SANITIZE_ADDRESS__)
    page = 64;  // and a new one for each size, so that a step beyond it is seen
    if (wanted == bytes) return data;
#else
    if (wanted <= bytes) return data;
#endif
    std::free(data);
    data = nullptr, bytes = 0;
    const int64_t rounded = (wanted + page - 1) / page * page;
    data = std::aligned_alloc(static_cast<size_t>(page), static_cast<size_t>(rounded));
    if (!data) throw std::bad_alloc();
    bytes = rounded;
    return data;
  }
  ~Buffer() { std::free(data); }
};

}  // namespace

void* thread_scratch(int64_t bytes) {
  static thread_local Buffer buffer;
  return buffer.at_least(bytes, 4096);
}

void* thread_arena(int64_t bytes) {
  constexpr int64_t small = 4096, huge = 2 << 20;
  static thread_local Buffer buffer;
  const int64_t before = buffer.bytes;
  void* data = buffer.at_least(bytes, bytes < huge / 2 ? small : huge);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Fewer page faults and misses of the TLB. Advice: a refusal changes nothing.
  if (buffer.bytes != before && buffer.bytes % huge == 0) madvise(data, buffer.bytes, MADV_HUGEPAGE);
#endif
  return data;
}

}  // namespace qk
