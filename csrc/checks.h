// What the operators demand of their tensors, and memory for the kernels. Every message names the operator and tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <sstream>
#include <stdexcept>

#include "isa.h"

namespace vptq {

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline Isa isa_or_throw() {
  Isa isa;
  const char* forced = std::getenv("VPTQ_CPU_ISA");
  require(choose_isa(&isa), "VPTQ_CPU_ISA is '", forced ? forced : "",
          "'; allowed are generic and, where the CPU has them, avx2, avx512 and amx");
  return isa;
}

inline void require_floats(const torch::stable::Tensor& tensor, int64_t dims, const char* op, const char* name) {
  require(tensor.dim() == dims, op, ": ", name, " must have ", dims, " dimensions, got ", tensor.dim());
  require(tensor.scalar_type() == torch::headeronly::ScalarType::Float, op, ": ", name,
          " must be float32; convert it with .float()");
  require(tensor.is_cpu(), op, ": ", name, " must be on the CPU");
}

struct AlignedFree {
  void operator()(float* memory) const { std::free(memory); }
};

using AlignedFloats = std::unique_ptr<float, AlignedFree>;

// On cache lines of its own; null when there is no memory.
inline AlignedFloats aligned_floats(int64_t count) {
  constexpr size_t kLine = 64;
  const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + kLine - 1) / kLine * kLine;
  return AlignedFloats(static_cast<float*>(std::aligned_alloc(kLine, bytes)));
}

// Threads with memory of their own. A thread cannot throw: one that gets none says so, and the caller's throws.
template <typename Allocate, typename Run>
void parallel_with_scratch(const char* op, int64_t count, int64_t grain, const Allocate& allocate, const Run& run) {
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const auto scratch = allocate();
    if (scratch == nullptr) {
      out_of_memory = true;
      return;
    }
    run(&*scratch, begin, end);
  });
  require(!out_of_memory, op, ": out of memory for a thread's scratch space");
}

}  // namespace vptq
