#include "core/probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace qk {

int64_t probe_products(int64_t rounds) {
  if (rounds < 0 || rounds > int64_t{1} << 40)
    throw std::runtime_error("qk: rounds must be from 0 to 2^40, got " + std::to_string(rounds) + ".");
  int64_t operations = 0;
  cpu::probe({rounds, &operations});
  return operations;
}

double probe_bandwidth(int64_t bytes, int64_t threads) {
  if (bytes < 1 || bytes > int64_t{1} << 36)
    throw std::runtime_error("qk: bytes must be from 1 to 2^36, got " + std::to_string(bytes) + ".");
  if (threads < 1 || threads > 1024)
    throw std::runtime_error("qk: threads must be from 1 to 1024, got " + std::to_string(threads) + ".");
  constexpr int64_t step = 512, tries = 5;
  const int64_t each = (bytes + threads * step - 1) / (threads * step) * step;
  const int64_t rounds = std::max<int64_t>(1, (int64_t{1} << 26) / each);  // some milliseconds

  using Clock = std::chrono::steady_clock;
  std::vector<double> seconds(tries * threads);
  std::atomic<int64_t> arrived{0};
  std::atomic<bool> failed{false};
  const auto read = [&](int64_t thread) {
    const std::unique_ptr<uint8_t, void (*)(void*)> data(
        static_cast<uint8_t*>(std::aligned_alloc(4096, (each + 4095) & ~int64_t{4095})), std::free);
    if (data == nullptr) {
      failed = true;
    } else {
      std::memset(data.get(), 1, each);  // here, so that its pages lie beside the thread that reads them
      cpu::probe_read({data.get(), each, 1});
    }
    for (int64_t i = 0; i < tries; ++i) {
      ++arrived;
      while (arrived < (i + 1) * threads) std::this_thread::yield();  // all of them at once
      if (failed) return;
      const auto begin = Clock::now();
      cpu::probe_read({data.get(), each, rounds});
      seconds[i * threads + thread] = std::chrono::duration<double>(Clock::now() - begin).count();
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(read, i);
  read(0);
  for (std::thread& other : others) other.join();
  if (failed) throw std::bad_alloc();

  double best = 0;
  for (int64_t i = 0; i < tries; ++i) {
    const double slowest = *std::max_element(seconds.begin() + i * threads, seconds.begin() + (i + 1) * threads);
    best = std::max(best, static_cast<double>(each * threads * rounds) / slowest);
  }
  return best;
}

}  // namespace qk
