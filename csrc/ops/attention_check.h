// What attention's sizes must be: for the operator and for a step of a network.
#pragma once
#include <cmath>
#include <optional>
#include <string>
#include <vector>

#include "core/check.h"
#include "ops/attention.h"

namespace qk {

// All but the pointers. mask: null without one. scale: 1 / sqrt(D) if not given.
inline AttentionArgs attention_args(const char* op, const std::vector<int64_t>& q, const std::vector<int64_t>& k,
                                    const std::vector<int64_t>& v, const std::vector<int64_t>* mask, int64_t heads,
                                    std::optional<double> scale) {
  check(heads >= 1, op, "heads", "1 or more", heads);
  if (q.size() != 3 || q[2] < heads || q[2] % heads != 0)
    fail(op, "q", "[B, queries, heads * D], heads = " + std::to_string(heads), text_of(q));
  if (k.size() != 3 || k[0] != q[0] || k[2] != q[2])
    fail(op, "k", "[B, keys, heads * D], for q " + text_of(q), text_of(k));
  if (v.size() != 3 || v[0] != q[0] || v[1] != k[1] || v[2] < heads || v[2] % heads != 0)
    fail(op, "v", "[B, keys, heads * E], for k " + text_of(k), text_of(v));
  AttentionArgs a{};
  a.batch = q[0], a.queries = q[1], a.keys = k[1], a.heads = heads, a.depth = q[2] / heads, a.width = v[2] / heads;
  const auto within = [&](const char* name, int64_t got, int64_t most, const char* reason) {
    if (got > most) fail(op, name, "at most " + std::to_string(most) + reason, std::to_string(got));
  };
  within("D", a.depth, longest_depth, ", for scores in int32");
  within("keys", a.keys, most_keys, ", for sums in int32");
  if (mask) {
    const auto& m = *mask;
    if (m.size() != 3 || (m[0] != 1 && m[0] != a.batch) || (m[1] != 1 && m[1] != a.queries) || m[2] != a.keys)
      fail(op, "mask", "[B or 1, queries or 1, keys], for q " + text_of(q) + " and k " + text_of(k), text_of(m));
    a.mask_batch = m[0], a.mask_rows = m[1];
  }
  const float by = static_cast<float>(scale ? *scale : 1.0 / std::sqrt(static_cast<double>(a.depth)));
  check(by > 0 && std::isfinite(by), op, "scale", "positive and finite", by);
  a.exponent = static_cast<float>(by * 1.4426950408889634);  // log2(e)
  return a;
}

}  // namespace qk
