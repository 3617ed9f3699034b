// The operators that binding.cpp registers. They check, allocate and split work; kernels trust what they are given.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace vptq {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> nearest(const Tensor& vectors, const Tensor& codebook, int64_t beam);

std::tuple<Tensor, Tensor> assign_columns(const Tensor& base, const std::optional<Tensor>& coupling,
                                          const std::optional<Tensor>& present, const Tensor& scale,
                                          const Tensor& shift, const Tensor& main,
                                          const std::optional<Tensor>& residual, const Tensor& indices,
                                          const std::optional<Tensor>& residual_indices, int64_t beam);

}  // namespace vptq
