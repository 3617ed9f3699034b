// A stored layer as the kernels see it: its tensors checked against each other, cut into parts.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "lookup.h"

namespace vptq {

using torch::stable::Tensor;

// The operators' arguments, in the order of their schemas.
struct StoredTensors {
  const Tensor& codebook;
  const Tensor& indices;
  const std::optional<Tensor>& residual_codebook;
  const std::optional<Tensor>& residual_indices;
  const std::optional<Tensor>& outlier_codebook;
  const std::optional<Tensor>& outlier_indices;
  const std::optional<Tensor>& perm;
  const std::optional<Tensor>& weight_scale;
  const std::optional<Tensor>& weight_bias;
  int64_t in_features, out_features, vector_len, outlier_vector_len;
};

struct LayerPart {
  LookupPart lookup;
  int64_t first_column;
  int64_t rows;  // vector rows
};

class StoredLayer {
 public:
  // Throws std::runtime_error, naming the tensor, where the tensors contradict each other.
  explicit StoredLayer(const StoredTensors& tensors);

  Float dtype;
  int64_t in_features, out_features;
  std::vector<LayerPart> parts;  // the outlier columns first, then the groups
  int64_t padded_rows;           // output rows with the padding of either kind of vector
  const void* weight_scale = nullptr;
  const void* weight_bias = nullptr;
  std::vector<int64_t> perm;  // empty without one

 private:
  const Tensor& keep(const Tensor& tensor);
  void add_outliers(const StoredTensors& tensors);
  void add_groups(const StoredTensors& tensors, int64_t first_column);
  void read_perm(const Tensor& perm);

  std::vector<Tensor> kept_;  // contiguous
};

Float float_of(const Tensor& tensor, const char* name);

}  // namespace vptq
