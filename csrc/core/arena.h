// Where values of a network lie in one block of memory: values that are never alive together may lie over each other.
#pragma once
#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace qk {

struct Interval {
  int64_t bytes;
  int begin, end;  // first and last step at which it is alive
  int64_t at;      // byte from the start of the block: the answer
};

constexpr int64_t arena_line = 64;                 // every value starts at a cache line
constexpr int64_t arena_slack = 64;                // and may be read as far behind its end
constexpr int64_t arena_limit = int64_t{1} << 50;  // more than any machine has

// Largest first, each into the smallest gap that is free as long as it lives, else behind. Returns the bytes of the
// block, arena_limit or more if there are too many. Without reuse none lies over another: what tests compare with.
inline int64_t place(std::vector<Interval>& intervals, bool reuse) {
  std::vector<int> order(intervals.size()), placed;
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return intervals[a].bytes > intervals[b].bytes; });
  const auto padded = [](const Interval& i) {
    return (i.bytes + arena_slack + arena_line - 1) / arena_line * arena_line;
  };
  int64_t total = 0;
  for (int i : order) {
    Interval& one = intervals[i];
    const int64_t size = padded(one);
    int64_t best = -1, best_gap = INT64_MAX, free_from = 0;
    for (int j : placed) {  // by address
      const Interval& other = intervals[j];
      if (reuse && (other.end < one.begin || one.end < other.begin)) continue;
      const int64_t gap = other.at - free_from;
      if (gap >= size && gap < best_gap) best = free_from, best_gap = gap;
      free_from = std::max(free_from, other.at + padded(other));
    }
    one.at = best >= 0 ? best : free_from;
    total = std::max(total, one.at + size);
    if (total >= arena_limit) return total;
    placed.insert(std::upper_bound(placed.begin(), placed.end(), i,
                                   [&](int a, int b) { return intervals[a].at < intervals[b].at; }),
                  i);
  }
  return total;
}

}  // namespace qk
