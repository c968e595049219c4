// Every operator, with the shapes of its arguments. The only place with names and defaults.
//
// "rows": a tensor x goes with step float32 [...] and zero int32 of as many values, rows = step.numel(). x is seen as
// [rows, numel / rows], one step and zero for each row: 1 value is per tensor, N values are per output channel of a
// weight [N, ...], N * G values are groups of K / G along the last axis (docs/numerics.md). Codes are uint8.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(qk, m) {
  // --- training, each with a fused backward ------------------------------------------------------------------------
  // "float": float32, float16 or bfloat16, one for all that is called so, computed in float32.

  // x [...] float, step and zero by rows -> [...] float: step * (clamp(round(x / step) + zero, 0, 2^bits - 1) - zero).
  // grad_scale multiplies the gradient of step. boundary "paper" decides inside or outside on x / step, "torch" on the
  // rounded code.
  m.def("lsq(Tensor x, Tensor step, Tensor zero, int bits, float grad_scale=1.0, str boundary=\"paper\") -> Tensor");
  m.def(
      "lsq_backward(Tensor grad, Tensor x, Tensor step, Tensor zero, int bits, float grad_scale, str boundary)"
      " -> (Tensor, Tensor)");

  // weight [...], v [...] float, step and zero by rows -> [...] float:
  // step * (clamp(floor(weight / step) + h(v) + zero, 0, 2^bits - 1) - zero), h(v) = clamp(1.2 sigmoid(v) - 0.1, 0, 1).
  // Backward with penalty float32 [2], a weight and a beta, adds weight times the gradient of rounding_penalty.
  m.def("soft_round(Tensor weight, Tensor v, Tensor step, Tensor zero, int bits) -> Tensor");
  m.def(
      "soft_round_backward(Tensor grad, Tensor weight, Tensor v, Tensor step, Tensor zero, int bits, "
      "Tensor? penalty=None) -> Tensor");

  // v [...] float -> [] float32: sum of 1 - |2 h(v) - 1|^beta.
  m.def("rounding_penalty(Tensor v, float beta) -> Tensor");
  m.def("rounding_penalty_backward(Tensor grad, Tensor v, float beta) -> Tensor");

  // output, target, weight [...] float -> loss [] float32: scale * sum of weight * (output - target)^2, no weight means
  // 1; and its gradient for output [...] float32, in the same pass.
  m.def("fisher_loss(Tensor output, Tensor target, Tensor? weight, float scale) -> (Tensor, Tensor)");

  // x [rows, cols] float, step [rows, candidates] float32, zero [rows, candidates] int32 -> [rows, candidates]:
  // sum over cols of |fake_quantized(x) - x|^power for each candidate, in one pass over x.
  m.def("range_error(Tensor x, Tensor step, Tensor zero, int bits, float power) -> Tensor");

  // --- codes ---------------------------------------------------------------------------------------------------------

  // x [...] float32, step and zero by rows -> [...] uint8: clamp(round(x / step) + zero, 0, 2^bits - 1).
  m.def("quantize(Tensor x, Tensor step, Tensor zero, int bits) -> Tensor");
  // x [..., cols] float32 -> codes [..., cols] uint8, step [...] float32, zero [...] int32: one range for each row,
  // from its own minimum and maximum, stretched to hold 0.
  m.def("quantize_rows(Tensor x, int bits) -> (Tensor, Tensor, Tensor)");
  // codes [...] uint8, step and zero by rows -> [...] float32: step * (codes - zero).
  m.def("dequantize(Tensor codes, Tensor step, Tensor zero) -> Tensor");
  // codes [rows, cols] uint8 -> [rows, row_bytes] uint8: value i of a byte at bit i * bits, rows padded to 16 bytes
  // with zero bits. bits 2, 4 or 8. A code that does not fit is an error on the CPU and loses its high bits on CUDA.
  m.def("pack(Tensor codes, int bits) -> Tensor");
  m.def("unpack(Tensor packed, int bits, int cols) -> Tensor");
  // codes [..., cols] uint8 of 8 bits -> the same shape: each value cut to its window of `bits` bits at the smallest
  // allowed shift (a multiple of stride, at most 8 - bits) that keeps its top bit; with pairs, a value whose partner
  // (2i, 2i + 1 along cols) is 0 gets a window of 2 * bits bits. zero: int32, one value, the code that is the value 0;
  // what is cut is the distance from it.
  m.def("sparq(Tensor codes, int bits, int stride=1, bool round=True, bool pairs=True, Tensor? zero=None) -> Tensor");
  // codes [rows, cols] uint8, cut by sparq with zero 0 -> [rows, row_bytes] uint8: windows, shifts and, with pairs,
  // which pairs give all of their bits to one value, in blocks of 16 values (docs/format.md). A code that is none of
  // the windows' is an error on the CPU and loses its low bits on CUDA.
  m.def("sparq_pack(Tensor codes, int bits, int stride=1, bool pairs=True) -> Tensor");
  m.def("sparq_unpack(Tensor packed, int cols, int bits, int stride=1, bool pairs=True) -> Tensor");

  // --- integer -------------------------------------------------------------------------------------------------------

  // packed [N, row_bytes] uint8 (codes of a weight of `shape`, packed along K), zero [N] or [N, groups along K] int32
  // -> the kernels' own layout, opaque uint8 [bytes]. shape [N, K] for gemm, [N, kh, kw, C / groups] for conv2d.
  // bits 2, 4 or 8; 8-bit weights have zero 128. algorithm: direct, or winograd for
  // conv2d of 3 x 3 kernels, stride 1, bits 2 or 4 and x_bits up to 6 (docs/winograd.md).
  m.def("prepack(Tensor packed, Tensor zero, int bits, int[] shape, int groups=1, str algorithm=\"direct\") -> Tensor");

  // x [..., K] uint8 codes below 2^x_bits, x_step float32 and x_zero int32 [1] or [rows of x], weight prepacked,
  // weight_step [N] or [N, groups along K] float32, bias [N] float32 -> [..., N] float32:
  // activation(float(sum (x - x_zero) (weight - weight_zero)) * (x_step * weight_step) + bias + residual); groups are
  // added in order. With out_step and out_zero (one value each) the result is quantized to uint8 codes of out_bits.
  // activation: none, relu, relu6. residual: float32, or codes with residual_step and residual_zero (one value each).
  m.def(
      "gemm(Tensor x, Tensor x_step, Tensor x_zero, Tensor weight, Tensor weight_step, Tensor? bias, int bits,"
      " int x_bits=8, str activation=\"none\", Tensor? out_step=None, Tensor? out_zero=None, int out_bits=8,"
      " Tensor? residual=None, Tensor? residual_step=None, Tensor? residual_zero=None) -> Tensor");

  // x [..., K] float32, float16 or bfloat16, weight prepacked, weight_step [N] or [N, groups along K] float32, bias [N]
  // float32 -> [..., N] of x's type: sum x * (weight_step * (weight - weight_zero)) + bias, in float32.
  m.def("gemm_weight_only(Tensor x, Tensor weight, Tensor weight_step, Tensor? bias, int bits) -> Tensor");

  // x [B, H, W, C] uint8 codes (NHWC), x_step and x_zero [1], weight prepacked from [N, kh, kw, C / groups],
  // weight_step [N] or [N, groups along K], bias [N] -> [B, OH, OW, N] float32 or codes, as gemm. Padding has code
  // x_zero.
  m.def(
      "conv2d(Tensor x, Tensor x_step, Tensor x_zero, Tensor weight, Tensor weight_step, Tensor? bias, int bits,"
      " int[2] kernel, int[2] stride=1, int[2] padding=0, int[2] dilation=1, int groups=1,"
      " int x_bits=8, str activation=\"none\", Tensor? out_step=None, Tensor? out_zero=None, int out_bits=8,"
      " Tensor? residual=None, Tensor? residual_step=None, Tensor? residual_zero=None) -> Tensor");

  // --- integer, between layers: codes in, codes or float32 out -----------------------------------------------------
  // A result without out_step and out_zero (one value each) is float32, with them uint8 codes of out_bits.

  // a, b [...] of one shape: uint8 codes with step and zero [1], or float32 without -> [...]: activation(value(a) +
  // value(b)), value step * (code - zero). activation: none, relu, relu6.
  m.def(
      "add(Tensor a, Tensor? a_step, Tensor? a_zero, Tensor b, Tensor? b_step, Tensor? b_zero,"
      " str activation=\"none\", Tensor? out_step=None, Tensor? out_zero=None, int out_bits=8) -> Tensor");
  // x [B, ..., C], gate [B, ..., C] with sizes 1 between, each codes or float32 as for add -> [B, ..., C]:
  // activation(value(x) * value(gate)).
  m.def(
      "multiply(Tensor x, Tensor? x_step, Tensor? x_zero, Tensor gate, Tensor? gate_step, Tensor? gate_zero,"
      " str activation=\"none\", Tensor? out_step=None, Tensor? out_zero=None, int out_bits=8) -> Tensor");
  // x [B, H, W, C] codes (NHWC), x_step and x_zero [1] -> [B, OH, OW, C]. mode max: uint8, the largest code of each
  // window, what is padded takes no part. mode average: float(sum of (x - x_zero)) * (x_step / count), count as in
  // torch's avg_pool2d. Sizes as in torch's pools.
  m.def(
      "pool(Tensor x, Tensor x_step, Tensor x_zero, str mode, int[2] kernel, int[2] stride, int[2] padding=0,"
      " int[2] dilation=1, bool ceil_mode=False, bool count_include_pad=True, int? divisor_override=None,"
      " str activation=\"none\", Tensor? out_step=None, Tensor? out_zero=None, int out_bits=8) -> Tensor");
  // x [..., N] codes with out_step and out_zero, float32 without, added [..., T] float32, index int32 [count], source
  // int32 [terms, count], residual [..., N] codes or float32 as for add, or none -> [..., N]: x, but in column index[u]
  // activation(sum of added[..., source[p, u]] for p in order, none where it is -1, + value(residual)). A column that
  // there is not is an error on the CPU and left out on CUDA.
  m.def(
      "index_put(Tensor x, Tensor added, Tensor index, Tensor source, Tensor? residual=None,"
      " Tensor? residual_step=None, Tensor? residual_zero=None, str activation=\"none\", Tensor? out_step=None,"
      " Tensor? out_zero=None, int out_bits=8) -> Tensor");
  // codes [..., C] uint8, index int32 [count] -> [..., count]: codes[..., index]. A column that there is not is an
  // error on the CPU and 0 on CUDA.
  m.def("index_select(Tensor codes, Tensor index) -> Tensor");
  // codes [...] uint8, table [256] uint8 or float32 -> [...] of the table's type: table[code].
  m.def("lookup(Tensor codes, Tensor table) -> Tensor");
  // codes: uint8 [..., C] each, alike but for C, steps and zeros [1] each -> uint8 [..., sum of C], side by side:
  // quantize(step * (code - zero)) with out_step, out_zero [1] and out_bits.
  m.def(
      "concat(Tensor[] codes, Tensor[] steps, Tensor[] zeros, Tensor out_step, Tensor out_zero, int out_bits=8) -> "
      "Tensor");

  // q [B, queries, heads * D], k [B, keys, heads * D], v [B, keys, heads * E] uint8 codes, step and zero [1] each, mask
  // bool or uint8 [B or 1, queries or 1, keys], scale 1 / sqrt(D) if not given -> [B, queries, heads * E]: for each
  // head softmax(scale * q k^T) v, exact integer sums, weights of 8 bits relative to the largest of a row.
  m.def(
      "attention(Tensor q, Tensor q_step, Tensor q_zero, Tensor k, Tensor k_step, Tensor k_zero, Tensor v,"
      " Tensor v_step, Tensor v_zero, int heads, Tensor? mask=None, float? scale=None, Tensor? out_step=None,"
      " Tensor? out_zero=None, int out_bits=8) -> Tensor");

  // rows [N, row_bytes] uint8: `cols` codes, value i at bit i * bits, in front of them or, with codes_first, behind
  // them (kind affine) scale and offset, (codebook) 2^bits values, of dtype float16, bfloat16 or float32, or (shared)
  // int32, a row of books [.., 2^bits] float32. value: code * scale + offset, or the codebook's at code.
  // indices [count] int32 or int64 with offsets [bags], or [bags, bag_size] without -> [bags, cols] float32: mode sum,
  // mean or max of the rows that each bag names, as torch's embedding_bag. per_sample_weights [like indices] float32.
  m.def(
      "embedding_bag(Tensor rows, Tensor indices, Tensor? offsets, int bits, int cols, str kind=\"affine\","
      " str dtype=\"float16\", bool codes_first=True, Tensor? books=None, str mode=\"sum\","
      " Tensor? per_sample_weights=None, bool include_last_offset=False, int? padding_idx=None) -> Tensor");

  // --- whole networks ------------------------------------------------------------------------------------------------

  // program: text, a list of the steps above (python/qk/ops/_program.py). inputs: float32 or codes, as it says.
  // constants: steps float32 [S], zeros int32 [S], floats float32 [F], bytes uint8 [B], to which it refers.
  // -> one fresh tensor for each output line.
  m.def("network(Tensor[] inputs, Tensor[] constants, str program) -> Tensor[]");
}
