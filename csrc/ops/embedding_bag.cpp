#include "ops/embedding_bag.h"

#include <vector>

#include "core/layout.h"
#include "ops/integer.h"

namespace qk {
namespace {

constexpr const char* op = "embedding_bag";

RowKind parse_kind(const std::string& name) {
  if (name == "affine") return RowKind::affine;
  if (name == "codebook") return RowKind::codebook;
  check(name == "shared", op, "kind", "affine, codebook or shared", name);
  return RowKind::shared;
}

FloatType parse_dtype(const std::string& name) {
  if (name == "float16") return FloatType::float16;
  if (name == "bfloat16") return FloatType::bfloat16;
  check(name == "float32", op, "dtype", "float16, bfloat16 or float32", name);
  return FloatType::float32;
}

BagMode parse_mode(const std::string& name) {
  if (name == "sum") return BagMode::sum;
  if (name == "mean") return BagMode::mean;
  check(name == "max", op, "mode", "sum, mean or max", name);
  return BagMode::max;
}

bool is_index(const Tensor& t) { return t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int; }

const void* index_data(const Tensor& t) {
  if (t.scalar_type() == ScalarType::Long) return t.const_data_ptr<int64_t>();
  return t.const_data_ptr<int32_t>();
}

int64_t index_at(const void* indices, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(indices)[i] : static_cast<const int32_t*>(indices)[i];
}

// On the CPU; the CUDA kernel takes what lies between 0 and count.
void check_offsets(const Tensor& offsets, int64_t count, bool include_last) {
  if (!offsets.is_cpu()) return;
  const void* data = index_data(offsets);
  const bool wide = offsets.scalar_type() == ScalarType::Long;
  const int64_t n = offsets.numel();
  int64_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = index_at(data, wide, i);
    if (at < last || at > count || (i == 0 && at != 0))
      fail(op, "offsets", "0 first, never falling, at most " + std::to_string(count) + ", the number of indices",
           std::to_string(at) + " at " + std::to_string(i));
    last = at;
  }
  if (include_last && last != count)
    fail(op, "offsets", "up to " + std::to_string(count) + ", the number of indices, at their end",
         std::to_string(last), "Without include_last_offset the last bag goes on to the end.");
  if (n == 0 && count > 0) fail(op, "offsets", "one for each bag", "none for " + std::to_string(count) + " indices");
}

}  // namespace

template <void (*kernel)(const EmbeddingBagArgs&)>
Tensor embedding_bag(const Tensor& rows, const Tensor& indices, const std::optional<Tensor>& offsets, int64_t bits,
                     int64_t cols, const std::string& kind_name, const std::string& dtype_name, bool codes_first,
                     const std::optional<Tensor>& books, const std::string& mode_name,
                     const std::optional<Tensor>& per_sample_weights, bool include_last_offset,
                     std::optional<int64_t> padding_idx) {
  EmbeddingBagArgs a{};
  check_device(op, rows, {{"indices", &indices}});
  check_dtype(op, "rows", rows, ScalarType::Byte);
  check_tensor(rows.dim() == 2, op, "rows", "[N, bytes of a row]", rows);
  check_storage_bits(op, bits);
  check_size(op, "cols", cols, 1);
  a.kind = parse_kind(kind_name);
  a.dtype = parse_dtype(dtype_name);
  a.mode = parse_mode(mode_name);
  a.bits = static_cast<int>(bits);
  a.cols = cols;
  if (a.kind != RowKind::affine) check(bits < 8, op, "bits", "2 or 4 for rows with codebooks", bits);
  const int64_t entries = int64_t{1} << bits, entry_bytes = a.dtype == FloatType::float32 ? 4 : 2;
  const int64_t code_bytes = ceil_div(cols, 8 / bits);
  const int64_t number_bytes = a.kind == RowKind::affine     ? 2 * entry_bytes
                               : a.kind == RowKind::codebook ? entries * entry_bytes
                                                             : 4;
  a.row_count = rows.size(0);
  a.row_bytes = code_bytes + number_bytes;
  if (rows.size(1) != a.row_bytes)
    fail(op, "rows",
         "[N, " + std::to_string(a.row_bytes) + "]: " + std::to_string(code_bytes) + " bytes of codes and " +
             std::to_string(number_bytes) + " of numbers",
         describe(rows));
  a.codes_at = codes_first ? 0 : number_bytes;
  a.numbers_at = codes_first ? code_bytes : 0;
  // Rows may lie further apart: a table padded to cache lines is read as it lies.
  const bool in_place = rows.stride(1) == 1 && rows.stride(0) >= a.row_bytes;
  const Tensor table = in_place ? rows : dense(rows);
  a.rows = table.const_data_ptr<uint8_t>();
  a.row_stride = in_place ? rows.stride(0) : a.row_bytes;

  Tensor book_values;
  check(books.has_value() == (a.kind == RowKind::shared), op, "books", "given for kind shared, and only then",
        books.has_value() ? "some" : "none");
  if (books) {
    check_device(op, rows, {{"books", &*books}});
    check_dtype(op, "books", *books, ScalarType::Float);
    check_tensor(books->dim() == 2 && books->size(1) == entries, op, "books", "[books, 2^bits]", *books);
    book_values = dense(*books);
    a.books = book_values.const_data_ptr<float>();
    a.book_count = books->size(0);
  }

  check_tensor(is_index(indices), op, "indices", "int32 or int64", indices);
  const Tensor numbers = dense(indices);
  a.indices = index_data(numbers);
  a.wide_indices = numbers.scalar_type() == ScalarType::Long;
  a.count = numbers.numel();
  Tensor begins;
  if (offsets) {
    check_device(op, rows, {{"offsets", &*offsets}});
    check_tensor(indices.dim() == 1, op, "indices", "[count] beside offsets", indices, "A 2-D input takes no offsets.");
    check_tensor(offsets->dim() == 1 && is_index(*offsets), op, "offsets", "int32 or int64 [bags]", *offsets);
    begins = dense(*offsets);
    check_offsets(begins, a.count, include_last_offset);
    check(!include_last_offset || begins.numel() > 0, op, "offsets", "one more than there are bags", 0);
    a.offsets = index_data(begins);
    a.wide_offsets = begins.scalar_type() == ScalarType::Long;
    a.bags = begins.numel() - (include_last_offset ? 1 : 0);
  } else {
    check_tensor(indices.dim() == 2, op, "indices", "[bags, bag_size] without offsets", indices);
    check(!include_last_offset, op, "include_last_offset", "false without offsets", include_last_offset);
    a.bags = indices.size(0);
    a.bag_size = indices.size(1);
  }
  Tensor weights;
  if (per_sample_weights) {
    check_device(op, rows, {{"per_sample_weights", &*per_sample_weights}});
    check_dtype(op, "per_sample_weights", *per_sample_weights, ScalarType::Float);
    check_same_shape(op, "per_sample_weights", *per_sample_weights, "indices", indices);
    check(a.mode == BagMode::sum, op, "mode", "sum with per_sample_weights", mode_name);
    weights = dense(*per_sample_weights);
    a.weights = weights.const_data_ptr<float>();
  }
  a.padding_row = -1;
  if (padding_idx) {
    if (*padding_idx < -a.row_count || *padding_idx >= a.row_count)
      fail(op, "padding_idx", "the number of one of " + std::to_string(a.row_count) + " rows",
           std::to_string(*padding_idx));
    a.padding_row = *padding_idx < 0 ? *padding_idx + a.row_count : *padding_idx;
  }
  product(op, "the result", {a.bags ? a.bags : 1, cols});
  Tensor out = torch::stable::new_empty(rows, {a.bags, cols}, ScalarType::Float);
  a.out = out.mutable_data_ptr<float>();
  int64_t bad = -1;
  if (rows.is_cpu()) a.bad = &bad;
  QK_DEVICE_GUARD(rows);
  kernel(a);
  if (bad >= 0) {
    const int64_t index = index_at(a.indices, a.wide_indices, bad);
    const std::string place = " at " + std::to_string(bad);
    if (index < 0 || index >= a.row_count)
      fail(op, "indices", "from 0 to " + std::to_string(a.row_count - 1) + ", the numbers of rows",
           std::to_string(index) + place);
    int32_t book;
    std::memcpy(&book, a.rows + index * a.row_stride + a.numbers_at, sizeof book);
    fail(op, "rows", "with the number of one of " + std::to_string(a.book_count) + " books each",
         std::to_string(book) + " in row " + std::to_string(index));
  }
  return out;
}

QK_REGISTER(m) { m.impl("embedding_bag", TORCH_BOX(&embedding_bag<QK_DEVICE::embedding_bag>)); }

}  // namespace qk
