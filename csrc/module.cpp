// What is not a tensor operator: the choice of instruction set and facts of the build.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "core/arena.h"
#include "core/conv_rows.h"
#include "core/cut.h"
#include "core/isa.h"
#include "core/layout.h"
#include "core/probe.h"
#include "core/step_times.h"

namespace py = pybind11;

// What prepack's face accepts. The products are formed in double, which no size overflows.
static bool is_weight(const qk::WeightShape& w) {
  for (int64_t size : {w.n, w.kh, w.kw, w.c, w.groups, w.k_groups})
    if (size < 1 || size >= qk::size_limit) return false;
  const double k = static_cast<double>(w.kh) * w.kw * w.c;
  return k < qk::size_limit && k * w.n <= qk::values_limit && w.n % w.groups == 0 && w.k() % w.k_groups == 0;
}

// A prepacked weight: where its parts begin. shape [N, K] or [N, kh, kw, C / groups].
static py::dict packed_layout(const std::vector<int64_t>& shape, int64_t bits, int64_t groups, int64_t k_groups,
                              bool cuda, bool winograd) {
  const bool conv = shape.size() == 4;
  qk::WeightShape w{};
  if (shape.size() == 2 || conv)
    w = {shape[0], conv ? shape[1] : 1, conv ? shape[2] : 1, shape.back(), groups, k_groups, static_cast<int>(bits)};
  if (winograd) w.algorithm = qk::Algorithm::winograd;
  if (!qk::is_storage_width(bits) || !is_weight(w))
    throw std::invalid_argument("qk: packed_layout's arguments must be those of a weight. Look at qk.ops.prepack.");
  const qk::PackedLayout p = cuda ? qk::cuda::packed_layout(w) : qk::cpu::packed_layout(w);
  py::dict parts;
  parts["stored_bits"] = p.stored_bits;
  parts["blocks"] = p.blocks();
  parts["segments"] = p.segments;
  parts["segment_k"] = p.segment_k;
  parts["segment_padded"] = p.segment_padded;
  parts["k_padded"] = p.k_padded;
  parts["codes_at"] = p.codes_at;
  parts["sums_at"] = p.sums_at;
  parts["zeros_at"] = p.zeros_at;
  parts["bytes"] = p.bytes;
  return parts;
}

// Where a convolution on the CPU reads its rows: weight [N, kh, kw, C / groups], an image of [H, W].
static std::string conv_rows(const std::array<int64_t, 4>& shape, int64_t groups, int64_t k_groups,
                             std::array<int64_t, 2> size, std::array<int64_t, 2> stride, std::array<int64_t, 2> padding,
                             std::array<int64_t, 2> dilation) {
  const qk::WeightShape w{shape[0], shape[1], shape[2], shape[3], groups, k_groups, 8};
  int64_t out[2];
  for (int i = 0; i < 2; ++i) {
    for (int64_t value : {size[i], stride[i], dilation[i]})
      if (value < 1 || value >= qk::size_limit)
        throw std::invalid_argument("qk: conv_rows takes positive sizes below 2^31.");
    out[i] = (size[i] + 2 * padding[i] - qk::reach(shape[1 + i], dilation[i])) / stride[i] + 1;
  }
  const qk::ConvGeometry g{size[0],   size[1],    out[0],     out[1],      stride[0],
                           stride[1], padding[0], padding[1], dilation[0], dilation[1]};
  if (!is_weight(w) || padding[0] < 0 || padding[1] < 0 || out[0] < 1 || out[1] < 1)
    throw std::invalid_argument("qk: conv_rows's arguments must be those of a convolution.");
  switch (qk::conv_rows(w, g)) {
    case qk::ConvRows::in_place: return "in place";
    case qk::ConvRows::lines: return "lines";
    case qk::ConvRows::packed: return "packed";
  }
  return "";
}

// How a product of `rows` rows with a weight [n, k] is shared, for a tile of these limits.
static py::dict cut(int64_t rows, int64_t row_unit, int64_t n, int64_t k, int64_t groups, std::array<int64_t, 4> tile,
                    int64_t threads) {
  const qk::WeightShape w{n, 1, 1, k, groups, 1, 8};
  const bool positive = tile[0] > 0 && tile[1] > 0 && tile[2] > 0 && tile[3] > 0 && threads > 0;
  if (!is_weight(w) || rows < 1 || rows >= qk::size_limit || row_unit < 1 || row_unit > rows || !positive)
    throw std::invalid_argument("qk: cut's arguments must be positive sizes below 2^31.");
  const qk::Cut c = qk::cut(rows, row_unit, qk::cpu::packed_layout(w), {tile[0], tile[1], tile[2], tile[3]}, threads);
  py::dict d;
  d["tile_rows"] = c.tile_rows;
  d["tile_blocks"] = c.tile_blocks;
  d["block_rows"] = c.block_rows;
  d["row_blocks"] = c.row_blocks;
  d["columns"] = c.columns;
  d["units"] = c.units;
  d["workers"] = c.workers;
  return d;
}

PYBIND11_MODULE(_core, m) {
  m.def("active_isa", [] { return qk::isa_name(qk::active_isa()); });
  m.def("force_isa", &qk::force_isa, py::arg("name"));
  m.def("usable_isas", &qk::usable_isas);
  m.def("build_facts", [] {
    py::dict facts;
    facts["compiler"] = QK_COMPILER;
    facts["torch"] = QK_BUILT_WITH_TORCH;
    facts["cuda"] = QK_CUDA_VERSION;  // empty: built without CUDA
    facts["cuda_archs"] = QK_CUDA_ARCHS;
    return facts;
  });
  m.def("probe_products", &qk::probe_products, py::arg("rounds"), py::call_guard<py::gil_scoped_release>());
  m.def("probe_bandwidth", &qk::probe_bandwidth, py::arg("bytes"), py::arg("threads") = 1,
        py::call_guard<py::gil_scoped_release>());
  m.def("cut", &cut, py::arg("rows"), py::arg("row_unit"), py::arg("n"), py::arg("k"), py::arg("groups"),
        py::arg("tile"), py::arg("threads"));
  m.def("conv_rows", &conv_rows, py::arg("shape"), py::arg("groups"), py::arg("k_groups"), py::arg("size"),
        py::arg("stride"), py::arg("padding"), py::arg("dilation"));
  m.def("packed_layout", &packed_layout, py::arg("shape"), py::arg("bits"), py::arg("groups") = 1,
        py::arg("k_groups") = 1, py::arg("cuda") = false, py::arg("winograd") = false);
  // For reports and tests of the operator network.
  m.def("time_steps", [](bool wanted) { qk::step_times().wanted = wanted; }, py::arg("wanted"));
  m.def("step_seconds", [] { return qk::step_times().seconds; });
  m.def(
      "place",
      [](const std::vector<std::array<int64_t, 3>>& values, bool reuse) {
        std::vector<qk::Interval> intervals;
        for (const auto& [bytes, begin, end] : values)
          intervals.push_back({bytes, static_cast<int>(begin), static_cast<int>(end), 0});
        const int64_t total = qk::place(intervals, reuse);
        std::vector<int64_t> at;
        for (const qk::Interval& i : intervals) at.push_back(i.at);
        return std::make_pair(at, total);
      },
      py::arg("values"), py::arg("reuse") = true);
  m.def("reuse_memory", [](bool reuse) { qk::reuse_memory() = reuse; }, py::arg("reuse"));
}
