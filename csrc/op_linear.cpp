// vptq::linear for the CPU: y = Q x' + (x . weight_bias) + bias with x' = (x * weight_scale)[perm], so that permutation, scale and
// bias cost one pass over the input and none over the weight.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <string>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "layer.h"
#include "operators.h"

namespace vptq {
namespace {

constexpr const char* kOp = "vptq::linear";

// What a thread must have to do to be worth waking: ten microseconds.
constexpr int64_t kLookupsPerThread = 1 << 14;

// Centroids rounded to bytes are for who asks for them.
bool wants_bytes(const std::string& form) {
  const char* variable = std::getenv("VPTQ_CPU_CODEBOOK");
  const std::string asked = !form.empty() ? form : variable != nullptr ? variable : "";
  if (asked.empty() || asked == "exact") return false;
  require(asked == "int8", form.empty() ? "VPTQ_CPU_CODEBOOK" : "vptq::linear: codebook_form", " is '", asked,
          "'; allowed are exact and int8");
  return true;
}

// Memory a thread keeps from call to call: an allocation of this size would be mapped, and its pages cleared, every time.
class Kept {
 public:
  float* at_least(int64_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      memory_ = aligned_floats((bytes + 3) / 4);
      bytes_ = memory_ == nullptr ? 0 : bytes;
    }
    return memory_.get();
  }

 private:
  AlignedFloats memory_;
  int64_t bytes_ = 0;
};

thread_local Kept kept_input, kept_output, kept_prepared, kept_scratch;

float* floats_or_throw(Kept& kept, int64_t count) {
  float* memory = kept.at_least(4 * count);
  require(memory != nullptr || count == 0, kOp, ": out of memory for ", count, " floats");
  return memory;
}

// Several sums side by side, or each addition would wait for the one before it.
float dot(const float* a, const float* b, int64_t count) {
  constexpr int kSums = 8;
  double sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int s = 0; s < kSums; ++s) sums[s] += static_cast<double>(a[i + s]) * b[i + s];
  }
  for (; i < count; ++i) sums[0] += static_cast<double>(a[i]) * b[i];
  for (int s = 1; s < kSums; ++s) sums[0] += sums[s];
  return static_cast<float>(sums[0]);
}

// x' [tokens, in_features] and what weight_bias adds to all outputs of a token.
struct Prepared {
  float* x;
  std::vector<float> shift;
};

Prepared prepare(const StoredLayer& layer, const FloatKernel& kernel, const uint8_t* x, int64_t tokens) {
  const int64_t n = layer.in_features, bytes = n * float_bytes(layer.dtype);
  float* memory = floats_or_throw(kept_input, (tokens + 3) * n);
  float* rows = memory + 3 * n;
  float *scale = memory, *bias = memory + n, *ordered = memory + 2 * n;
  Prepared prepared{rows, std::vector<float>(tokens, 0.0f)};
  if (layer.weight_scale) {
    kernel.widen(layer.weight_scale, layer.dtype, n, scale);
    kernel.widen(layer.weight_bias, layer.dtype, n, bias);
  }
  for (int64_t m = 0; m < tokens; ++m) {
    float* row = rows + m * n;
    kernel.widen(x + m * bytes, layer.dtype, n, row);
    if (layer.weight_scale) {
      prepared.shift[m] = dot(row, bias, n);
      for (int64_t i = 0; i < n; ++i) row[i] *= scale[i];
    }
    if (!layer.perm.empty()) {
      for (int64_t p = 0; p < n; ++p) ordered[p] = row[layer.perm[p]];
      std::copy(ordered, ordered + n, row);
    }
  }
  return prepared;
}

// y += the part's share. Threads take tiles as they get to them: the machine's other work slows one more than another.
void multiply(const LayerPart& part, const LookupKernel& kernel, LookupInput input, float* y, int64_t y_stride) {
  float* prepared = floats_or_throw(kept_prepared, (kernel.input_bytes(part.lookup, input.tokens) + 3) / 4);
  kernel.prepare_input(part.lookup, input, prepared);
  input.prepared = prepared;
  const int64_t tile = kernel.rows_per_tile(part.lookup, input.tokens), tiles = (part.rows + tile - 1) / tile;
  const int64_t lookups = part.rows * part.lookup.columns;
  const int64_t threads = std::min({int64_t{torch::stable::get_num_threads()}, tiles, 1 + lookups / kLookupsPerThread});
  std::atomic<int64_t> next{0};
  const auto scratch_of_thread = [&] { return kept_scratch.at_least(kernel.scratch_bytes(part.lookup, input.tokens)); };
  parallel_with_scratch(kOp, threads, 1, scratch_of_thread, [&](float* scratch, int64_t, int64_t) {
    kernel.prepare(part.lookup, scratch);
    for (int64_t t = next++; t < tiles; t = next++) {
      kernel.run(part.lookup, input, y, y_stride, t * tile, std::min((t + 1) * tile, part.rows), scratch);
    }
  });
}

}  // namespace

Tensor linear(const Tensor& x_in, const Tensor& codebook, const Tensor& indices,
              const std::optional<Tensor>& residual_codebook, const std::optional<Tensor>& residual_indices,
              const std::optional<Tensor>& outlier_codebook, const std::optional<Tensor>& outlier_indices,
              const std::optional<Tensor>& perm, const std::optional<Tensor>& weight_scale,
              const std::optional<Tensor>& weight_bias, const std::optional<Tensor>& bias, int64_t in_features,
              int64_t out_features, int64_t vector_len, int64_t outlier_vector_len, std::string codebook_form) {
  const StoredLayer layer({codebook, indices, residual_codebook, residual_indices, outlier_codebook, outlier_indices,
                           perm, weight_scale, weight_bias, in_features, out_features, vector_len, outlier_vector_len});
  require(x_in.is_cpu(), kOp, ": the input must be on the CPU, as the layer is");
  require(float_of(x_in, "the input") == layer.dtype, kOp, ": the input must have the dtype of the layer");
  require(x_in.dim() >= 1 && x_in.size(-1) == in_features, kOp, ": the input's last dimension must be ", in_features);
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  const int64_t tokens = x.numel() / in_features;
  shape.back() = out_features;
  Tensor y = torch::stable::new_empty(x, shape);
  if (tokens == 0) return y;

  const Isa isa = isa_or_throw();
  const FloatKernel& floats = kernels_for(isa).floats;
  const LookupKernel* by_preference[] = {wants_bytes(codebook_form) ? byte_kernel_for(isa) : nullptr, amx_kernel_for(isa),
                                         &kernels_for(isa).lookup};  // the last one fits everything
  std::vector<float> layer_bias(bias ? out_features : 0);
  if (bias) {
    require(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == out_features &&
                float_of(*bias, "bias") == layer.dtype,
            kOp, ": bias must be ", out_features, " numbers of the layer's dtype");
    const Tensor dense = torch::stable::contiguous(*bias);
    floats.widen(dense.const_data_ptr(), layer.dtype, out_features, layer_bias.data());
  }
  const int64_t width = float_bytes(layer.dtype);
  const uint8_t* in = static_cast<const uint8_t*>(x.const_data_ptr());
  uint8_t* out = static_cast<uint8_t*>(y.mutable_data_ptr());
  for (int64_t first = 0; first < tokens; first += kMaxTokens) {
    const int64_t some = std::min(kMaxTokens, tokens - first);
    const Prepared prepared = prepare(layer, floats, in + first * in_features * width, some);
    float* sums = floats_or_throw(kept_output, some * layer.padded_rows);
    std::fill(sums, sums + some * layer.padded_rows, 0.0f);
    for (const LayerPart& part : layer.parts) {
      const auto fits = [&](const LookupKernel* kernel) { return kernel != nullptr && kernel->fits(part.lookup, some); };
      const LookupKernel& kernel = **std::find_if(std::begin(by_preference), std::end(by_preference), fits);
      multiply(part, kernel, {prepared.x + part.first_column, in_features, some, nullptr}, sums, layer.padded_rows);
    }
    for (int64_t m = 0; m < some; ++m) {
      float* row = sums + m * layer.padded_rows;
      if (layer.weight_scale) {
        for (int64_t o = 0; o < out_features; ++o) row[o] += prepared.shift[m];
      }
      for (size_t o = 0; o < layer_bias.size(); ++o) row[o] += layer_bias[o];
      floats.round(row, layer.dtype, out_features, out + (first + m) * out_features * width);
    }
  }
  return y;
}

}  // namespace vptq
