// h(v) of learned rounding: the part in [0, 1] to add to floor(weight / step) (AdaRound, section 3.3).
#pragma once
#include <cuda_runtime.h>

namespace qk::cuda {

struct Rounding {
  float part, slope;  // h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1) and its derivative, 0 where h is clamped
};

__device__ inline Rounding rounding_of(float v) {
  const float sigmoid = 1.0f / (1.0f + expf(-v)), stretched = sigmoid * 1.2f - 0.1f;
  const float part = fminf(fmaxf(stretched, 0.0f), 1.0f);
  return {v == v ? part : v, part == stretched && part > 0 && part < 1 ? 1.2f * sigmoid * (1.0f - sigmoid) : 0.0f};
}

}  // namespace qk::cuda
