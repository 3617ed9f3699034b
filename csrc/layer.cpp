#include "layer.h"

#include <cstdint>

#include "checks.h"

namespace vptq {

using torch::headeronly::ScalarType;

namespace {

constexpr const char* kOp = "vptq::linear";

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

int bits_for(int64_t entries, const char* name) {
  int bits = 0;
  while ((int64_t{1} << bits) < entries) ++bits;
  require((int64_t{1} << bits) == entries && bits <= 16, kOp, ": ", name, " has ", entries,
          " entries; packed indices need a power of two up to 65536");
  return bits;
}

void require_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* name) {
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  int64_t at = 0;
  for (const int64_t size : shape) same = same && tensor.size(at++) == size;
  if (same) return;
  std::ostringstream expected, found;
  for (const int64_t size : shape) expected << ' ' << size;
  for (int64_t d = 0; d < tensor.dim(); ++d) found << ' ' << tensor.size(d);
  require(false, kOp, ": ", name, " has shape [", found.str(), " ], this layer needs [", expected.str(), " ]");
}

void require_carrier(const Tensor& tensor, const char* name) {
  require(tensor.scalar_type() == ScalarType::Short || tensor.scalar_type() == ScalarType::UInt16, kOp, ": ", name,
          " must be 16-bit integers");
}

// How many entries of `vector_len` floats each of `groups` codebooks has.
int64_t entries_of(const Tensor& codebook, int64_t groups, int64_t vector_len, Float dtype, const char* name) {
  require(codebook.dim() == 2 && codebook.size(0) == groups && codebook.size(1) % vector_len == 0, kOp, ": ", name,
          " must be ", groups, " codebooks of vectors of ", vector_len);
  require(float_of(codebook, name) == dtype, kOp, ": ", name, " must have the dtype of the main codebook");
  const int64_t entries = codebook.size(1) / vector_len;
  require(entries >= 1 && entries <= 65536, kOp, ": ", name, " has ", entries, " entries, allowed are 1 to 65536");
  return entries;
}

}  // namespace

Float float_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Float::kFloat32;
    case ScalarType::Half: return Float::kFloat16;
    case ScalarType::BFloat16: return Float::kBFloat16;
    default: break;
  }
  require(false, kOp, ": ", name, " must be float16, bfloat16 or float32");
  return Float::kFloat32;
}

const Tensor& StoredLayer::keep(const Tensor& tensor) {
  require(tensor.is_cpu(), kOp, ": all tensors must be on the CPU");
  kept_.push_back(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
  return kept_.back();
}

StoredLayer::StoredLayer(const StoredTensors& t)
    : dtype(float_of(t.codebook, "codebook")), in_features(t.in_features), out_features(t.out_features) {
  require(in_features >= 1 && out_features >= 1, kOp, ": a layer of ", out_features, " x ", in_features);
  require(t.vector_len >= 1, kOp, ": vector_len is ", t.vector_len, ", must be at least 1");
  kept_.reserve(10);
  padded_rows = ceil_div(out_features, t.vector_len) * t.vector_len;
  require(t.outlier_codebook.has_value() == t.outlier_indices.has_value(), kOp,
          ": outlier_codebook and outlier_indices come together or not at all");
  if (t.outlier_codebook) add_outliers(t);
  add_groups(t, parts.empty() ? 0 : parts[0].lookup.columns);
  require(t.weight_scale.has_value() == t.weight_bias.has_value(), kOp,
          ": weight_scale and weight_bias come together or not at all");
  if (t.weight_scale) {
    require_shape(*t.weight_scale, {in_features}, "weight_scale");
    require_shape(*t.weight_bias, {in_features}, "weight_bias");
    require(float_of(*t.weight_scale, "weight_scale") == dtype && float_of(*t.weight_bias, "weight_bias") == dtype,
            kOp, ": weight_scale and weight_bias must have the dtype of the codebook");
    weight_scale = keep(*t.weight_scale).const_data_ptr();
    weight_bias = keep(*t.weight_bias).const_data_ptr();
  }
  if (t.perm) read_perm(*t.perm);
}

void StoredLayer::add_outliers(const StoredTensors& t) {
  const int64_t v = t.outlier_vector_len;
  require(v >= 1, kOp, ": outlier_vector_len is ", v, ", must be at least 1");
  const int64_t rows = ceil_div(out_features, v), entries = entries_of(*t.outlier_codebook, 1, v, dtype, "outlier_codebook");
  const Tensor& indices = keep(*t.outlier_indices);
  const int64_t columns = indices.dim() == 3 ? indices.size(2) : 0;
  require_shape(indices, {1, rows, columns}, "outlier_indices");
  require_carrier(indices, "outlier_indices");
  require(columns < in_features, kOp, ": ", columns, " outlier columns leave none of the ", in_features, " to the groups");
  if (rows * v > padded_rows) padded_rows = rows * v;
  const LookupPart part{keep(*t.outlier_codebook).const_data_ptr(), nullptr, dtype, v, entries, 0, columns,
                        static_cast<const uint8_t*>(indices.const_data_ptr()), nullptr, 2 * columns, 0, 0};
  if (columns > 0) parts.push_back({part, 0, rows});
}

void StoredLayer::add_groups(const StoredTensors& t, int64_t first_column) {
  const int64_t v = t.vector_len, rows = ceil_div(out_features, v);
  const int64_t groups = t.codebook.dim() == 2 ? t.codebook.size(0) : 0;
  require(groups >= 1 && (in_features - first_column) % groups == 0, kOp, ": ", in_features - first_column,
          " columns cannot be shared by ", groups, " codebooks");
  const int64_t columns = (in_features - first_column) / groups;
  const int64_t entries = entries_of(t.codebook, groups, v, dtype, "codebook");
  const int64_t residual_entries =
      t.residual_codebook ? entries_of(*t.residual_codebook, groups, v, dtype, "residual_codebook") : 0;
  const Tensor& indices = keep(t.indices);
  const bool packed = indices.scalar_type() == ScalarType::Int;
  LookupPart part{keep(t.codebook).const_data_ptr(), nullptr, dtype, v, entries, residual_entries, columns,
                  static_cast<const uint8_t*>(indices.const_data_ptr()), nullptr, 0, 0, 0};
  if (t.residual_codebook) part.residual_codebook = keep(*t.residual_codebook).const_data_ptr();
  if (packed) {
    part.main_bits = bits_for(entries, "codebook");
    part.residual_bits = residual_entries > 0 ? bits_for(residual_entries, "residual_codebook") : 0;
    require(part.main_bits >= 1, kOp, ": a packed codebook needs 2 entries or more");
    const int64_t words = ceil_div(columns * (part.main_bits + part.residual_bits), 32);
    require_shape(indices, {groups, rows, words}, "indices");
    require(!t.residual_indices, kOp, ": packed indices hold the residual ones; residual_indices must be None");
    part.row_bytes = 4 * words;
  } else {
    require_carrier(indices, "indices");
    require_shape(indices, {groups, rows, columns}, "indices");
    require(t.residual_codebook.has_value() == t.residual_indices.has_value(), kOp,
            ": residual_codebook and residual_indices come together or not at all");
    if (t.residual_indices) {
      require_carrier(*t.residual_indices, "residual_indices");
      require_shape(*t.residual_indices, {groups, rows, columns}, "residual_indices");
      part.residual_indices = static_cast<const uint8_t*>(keep(*t.residual_indices).const_data_ptr());
    }
    part.row_bytes = 2 * columns;
  }
  const int64_t width = float_bytes(dtype);
  for (int64_t g = 0; g < groups; ++g) {
    parts.push_back({part, first_column + g * columns, rows});
    part.codebook = static_cast<const uint8_t*>(part.codebook) + entries * v * width;
    part.indices += rows * part.row_bytes;
    if (part.residual_codebook) {
      part.residual_codebook = static_cast<const uint8_t*>(part.residual_codebook) + residual_entries * v * width;
    }
    if (part.residual_indices) part.residual_indices += rows * part.row_bytes;
  }
}

void StoredLayer::read_perm(const Tensor& stored) {
  require_shape(stored, {in_features}, "perm");
  const Tensor& tensor = keep(stored);
  perm.resize(in_features);
  if (tensor.scalar_type() == ScalarType::Long) {
    const int64_t* values = tensor.const_data_ptr<int64_t>();
    perm.assign(values, values + in_features);
  } else {
    require_carrier(tensor, "perm");
    const uint16_t* values = static_cast<const uint16_t*>(tensor.const_data_ptr());
    perm.assign(values, values + in_features);
  }
  for (const int64_t column : perm) {
    require(column >= 0 && column < in_features, kOp, ": perm holds ", column, "; the layer has ", in_features,
            " input columns");
  }
}

}  // namespace vptq
