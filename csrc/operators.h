// The operators that binding.cpp registers. They check, allocate and split work; kernels trust what they are given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace vptq {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> nearest(const Tensor& vectors, const Tensor& codebook, int64_t beam);

std::tuple<Tensor, Tensor> assign_columns(const Tensor& base, const std::optional<Tensor>& coupling,
                                          const std::optional<Tensor>& present, const Tensor& scale,
                                          const Tensor& shift, const Tensor& main,
                                          const std::optional<Tensor>& residual, const Tensor& indices,
                                          const std::optional<Tensor>& residual_indices, int64_t beam,
                                          const std::optional<Tensor>& row_weights);

void add_products(const Tensor& sums, const Tensor& left, const Tensor& right, bool upper);

Tensor linear(const Tensor& x, const Tensor& codebook, const Tensor& indices,
              const std::optional<Tensor>& residual_codebook, const std::optional<Tensor>& residual_indices,
              const std::optional<Tensor>& outlier_codebook, const std::optional<Tensor>& outlier_indices,
              const std::optional<Tensor>& perm, const std::optional<Tensor>& weight_scale,
              const std::optional<Tensor>& weight_bias, const std::optional<Tensor>& bias, int64_t in_features,
              int64_t out_features, int64_t vector_len, int64_t outlier_vector_len, std::string codebook_form);

}  // namespace vptq
