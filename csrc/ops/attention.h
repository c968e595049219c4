#pragma once
#include <cstdint>

#include "core/kernel.h"
#include "ops/values.h"

namespace qk {

// Attention of `heads` heads that lie side by side in the rows of q, k and v (python/qk/ops/attention.py has the
// definition). q [batch, queries, heads * depth], k [batch, keys, heads * depth], v [batch, keys, heads * width].
struct AttentionArgs {
  Operand q, k, v;                // codes
  const uint8_t* mask;            // [mask_batch, mask_rows, keys], not 0 where a key is seen; or null
  int64_t mask_batch, mask_rows;  // batch and queries, or 1: the same for all
  float exponent;                 // scale * log2(e)
  Result out;                     // [batch, queries, heads * width], no activation
  int64_t batch, queries, keys, heads, depth, width;
};

// Differences of scores and sums of weighted values stay in int32.
constexpr int64_t longest_depth = INT32_MAX / (2 * 255 * 255), most_keys = INT32_MAX / (255 * 255);

// A weight is 255 * 2^-t rounded, t in halvings: 2^-n of the nearest n times a cubic in f = n - t, as Horner's scheme
// with every product and sum rounded.
constexpr float farthest = 16.0f;
constexpr float power_3 = 14.027276992797852f, power_2 = 61.7637939453125f, power_1 = 176.78713989257812f,
                power_0 = 255.0f;

}  // namespace qk

QK_KERNEL(attention, qk::AttentionArgs)
