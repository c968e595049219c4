#include "ops/pool.h"

#include "cuda/values.cuh"

namespace qk::cuda {
namespace {

// A thread makes one value: neighbours read neighbouring channels.
__global__ void pool_kernel(PoolArgs a) {
  const uint8_t* x = static_cast<const uint8_t*>(a.x.data);
  each_item(a.images * a.oh * a.ow * a.channels, [&](int64_t i) {
    const int64_t channel = i % a.channels, pixel = i / a.channels;
    const int64_t y0 = pixel / a.ow % a.oh * a.stride_h - a.pad_h, x0 = pixel % a.ow * a.stride_w - a.pad_w;
    const uint8_t* image = x + pixel / (a.ow * a.oh) * a.h * a.w * a.channels + channel;
    int largest = 0, sum = 0, inside = 0;
    for (int64_t j = 0; j < a.kernel_h; ++j)
      for (int64_t k = 0; k < a.kernel_w; ++k) {
        const int64_t row = y0 + j * a.dilation_h, col = x0 + k * a.dilation_w;
        if (row < 0 || row >= a.h || col < 0 || col >= a.w) continue;
        const int code = image[(row * a.w + col) * a.channels];
        largest = code > largest ? code : largest;
        sum += code;
        ++inside;
      }
    if (a.mode == PoolMode::max) {
      static_cast<uint8_t*>(a.out.data)[i] = static_cast<uint8_t>(largest);
      return;
    }
    const int64_t padded = least(a.kernel_h, a.h + a.pad_h - y0) * least(a.kernel_w, a.w + a.pad_w - x0);
    const int64_t count = a.divisor ? a.divisor : a.count_padding ? padded : inside;
    const float factor = __fdiv_rn(*a.x.step, static_cast<float>(count));
    put(a.out, __fmul_rn(static_cast<float>(sum - inside * *a.x.zero), factor), i);
  });
}

}  // namespace

void pool(const PoolArgs& a) {
  launch("pool", pool_kernel, ceil_div(a.images * a.oh * a.ow * a.channels, block_threads), a);
}

}  // namespace qk::cuda
