// Stands in for the CUDA header when the kernels are compiled for the host: blocks run one after another, the threads
// of a block as fibers of one host thread, on x86-64. It proves indexing, barriers, shuffles and arithmetic, not speed.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using cudaStream_t = void*;

namespace emulated {

struct Dim {
  unsigned x;
};

inline thread_local Dim thread_index, block_index, grid_size;

// Keeps the registers that a call must keep on this stack, whose end goes to *from, and goes on where `to` is the end of
// one that was left so. As swapcontext, which also asks the system for signal masks, twice for every value shuffled.
__attribute__((naked, noinline)) inline void switch_stack(void** /*from*/, void* /*to*/) {
  asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
      "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
      "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

struct Fiber {
  void* left;  // the end of its stack while another runs
  std::unique_ptr<char[]> stack;
  enum { ready, at_barrier, at_shuffle, done } state;
  char slots[2][32];  // what it gives to its warp, by turns: the next one may come before all have read the last
  int turn;
};

constexpr size_t stack_bytes = 65536;

struct Block {
  std::vector<Fiber> fibers;
  void* scheduler;
  const std::function<void()>* kernel;
};

inline thread_local Block block;

inline void wait(decltype(Fiber::state) state) {
  const unsigned self = thread_index.x;
  block.fibers[self].state = state;
  switch_stack(&block.fibers[self].left, block.scheduler);
  thread_index.x = self;
}

inline void enter() {
  (*block.kernel)();
  wait(Fiber::done);
}

// Releases a warp at a shuffle when all of it is there, the block at a barrier when nobody runs any more.
inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = block.fibers[i];
    // As if it had been left when `enter` was to be called: six registers, its address, and one above for alignment.
    const auto top = reinterpret_cast<uintptr_t>(f.stack.get() + stack_bytes) / 16 * 16;
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;
    *--at = reinterpret_cast<void*>(&enter);
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    f.left = at;
    f.state = Fiber::ready;
    f.turn = 0;
  }
  for (;;) {
    bool ran = false;
    for (unsigned first = 0; first < threads; first += 32) {
      bool warp_ran = false;
      for (unsigned i = first; i < first + 32; ++i) {
        if (block.fibers[i].state != Fiber::ready) continue;
        thread_index.x = i;
        switch_stack(&block.scheduler, block.fibers[i].left);
        warp_ran = true;
      }
      int shuffling = 0;
      for (unsigned i = first; i < first + 32; ++i) shuffling += block.fibers[i].state == Fiber::at_shuffle;
      if (shuffling == 32)
        for (unsigned i = first; i < first + 32; ++i) block.fibers[i].state = Fiber::ready;
      else if (shuffling)
        throw std::runtime_error("emulated CUDA: a shuffle that only part of a warp reaches");
      ran |= warp_ran;
    }
    if (ran) continue;
    unsigned waiting = 0, done = 0;
    for (const Fiber& f : block.fibers) waiting += f.state == Fiber::at_barrier, done += f.state == Fiber::done;
    if (done == threads) return;
    if (waiting != threads) throw std::runtime_error("emulated CUDA: a barrier that only part of a block reaches");
    for (Fiber& f : block.fibers) f.state = Fiber::ready;
  }
}

inline void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  block.kernel = &kernel;
  block.fibers.resize(threads);
  for (Fiber& f : block.fibers)
    if (!f.stack) f.stack = std::make_unique<char[]>(stack_bytes);
  grid_size.x = blocks;
  for (unsigned i = 0; i < blocks; ++i) {
    block_index.x = i;
    run_block(threads);
  }
}

// What every lane of the warp gave: f(lane) reads it.
template <class T, class F>
auto together(const T& value, const F& f) {
  static_assert(sizeof value <= sizeof Fiber::slots[0]);
  Fiber& self = block.fibers[thread_index.x];
  const unsigned warp = thread_index.x / 32 * 32;
  const int turn = self.turn;
  self.turn = 1 - turn;
  std::memcpy(&self.slots[turn], &value, sizeof value);
  wait(Fiber::at_shuffle);
  return f([warp, turn](unsigned lane) {
    T found;
    std::memcpy(&found, &block.fibers[warp + lane].slots[turn], sizeof found);
    return found;
  });
}

template <class T>
T shuffle(T value, unsigned from) {
  return together(value, [&](const auto& of) { return from < 32 ? of(from) : value; });
}

}  // namespace emulated

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define gridDim emulated::grid_size

inline void __syncthreads() { emulated::wait(emulated::Fiber::at_barrier); }
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned apart) {
  return emulated::shuffle(value, threadIdx.x % 32 + apart);
}
template <class T>
T __shfl_sync(unsigned, T value, unsigned from) {
  return emulated::shuffle(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned apart) {
  return emulated::shuffle(value, (threadIdx.x % 32) ^ apart);
}
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline int atomicAdd(int* to, int by) {  // fibers do not run at once
  const int before = *to;
  *to += by;
  return before;
}
