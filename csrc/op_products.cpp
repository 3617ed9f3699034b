// vptq::add_products for CPUs that multiply bfloat16.
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "checks.h"
#include "kernels.h"
#include "operators.h"

namespace vptq {

using torch::headeronly::ScalarType;

namespace {

ProductInput product_input(const Tensor& numbers, const char* name) {
  require(numbers.dim() == 2, "add_products: ", name, " must have 2 dimensions, got ", numbers.dim());
  require(numbers.is_cpu(), "add_products: ", name, " must be on the CPU");
  const bool rounded = numbers.scalar_type() == ScalarType::BFloat16;
  require(rounded || numbers.scalar_type() == ScalarType::Float, "add_products: ", name,
          " must be float32 or bfloat16; convert it with .float()");
  return {numbers.const_data_ptr(), rounded ? Float::kBFloat16 : Float::kFloat32, numbers.size(0), numbers.size(1), numbers.size(1)};
}

AlignedFloats packed(const ProductKernel& kernel, const ProductInput& input) {
  AlignedFloats memory = aligned_floats(kernel.packed_floats(input) + 1);
  require(memory != nullptr, "add_products: out of memory for packed inputs");
  uint32_t* to = reinterpret_cast<uint32_t*>(memory.get());
  torch::stable::parallel_for(0, kernel.panels(input.columns), 1,
                              [&](int64_t begin, int64_t end) { kernel.pack(input, to, begin, end); });
  return memory;
}

}  // namespace

void add_products(const Tensor& sums_in, const Tensor& left_in, const Tensor& right_in, bool upper) {
  const Tensor left = torch::stable::contiguous(left_in), right = torch::stable::contiguous(right_in);
  const ProductInput of_left = product_input(left, "left"), of_right = product_input(right, "right");
  require_floats(sums_in, 2, "add_products", "sums");
  require(of_left.tokens == of_right.tokens, "add_products: left has ", of_left.tokens, " rows and right ", of_right.tokens);
  require(sums_in.size(0) == of_left.columns && sums_in.size(1) == of_right.columns && sums_in.is_contiguous(),
          "add_products: sums must be contiguous [", of_left.columns, ", ", of_right.columns, "]");

  const ProductKernel* kernel = product_kernel_for(isa_or_throw());
  require(kernel != nullptr, "add_products: VPTQ_CPU_ISA leaves no kernel for it; set it before vptq is imported");
  Tensor sums = sums_in;
  const ProductSums target{sums.mutable_data_ptr<float>(), of_left.columns, of_right.columns, upper};
  const bool same = of_left.numbers == of_right.numbers && of_left.columns == of_right.columns;
  const AlignedFloats packed_left = packed(*kernel, of_left);
  const AlignedFloats packed_right = same ? nullptr : packed(*kernel, of_right);
  const uint32_t* lefts = reinterpret_cast<const uint32_t*>(packed_left.get());
  const uint32_t* rights = same ? lefts : reinterpret_cast<const uint32_t*>(packed_right.get());
  // Threads take equal numbers of tiles; where half of them are empty, tile n and the nth from the end make one whole.
  const int64_t tiles = kernel->tiles(target), half = (tiles + 1) / 2;
  torch::stable::parallel_for(0, half, 1, [&](int64_t begin, int64_t end) {
    kernel->run(target, of_left.tokens, lefts, rights, begin, end);
    kernel->run(target, of_left.tokens, lefts, rights, tiles - end > end ? tiles - end : end, tiles - begin);
  });
}

}  // namespace vptq
