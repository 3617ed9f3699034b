// vptq::nearest for the CPU.
#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "checks.h"
#include "kernels.h"
#include "operators.h"

namespace vptq {

using torch::headeronly::ScalarType;

std::tuple<Tensor, Tensor> nearest(const Tensor& vectors_in, const Tensor& codebook_in, int64_t beam) {
  require_floats(vectors_in, 2, "nearest", "vectors");
  require_floats(codebook_in, 2, "nearest", "codebook");
  const int64_t count = vectors_in.size(0), dim = vectors_in.size(1), centroids = codebook_in.size(0);
  require(dim >= 1, "nearest: vectors must have at least one coordinate");
  require(codebook_in.size(1) == dim, "nearest: vectors have ", dim, " coordinates but centroids have ",
          codebook_in.size(1));
  require(centroids < INT32_MAX / 2, "nearest: at most 2^30 centroids, got ", centroids);
  require(beam >= 1 && beam <= centroids, "nearest: beam is ", beam, ", allowed is 1 to the number of centroids, ",
          centroids);

  const Tensor vectors = torch::stable::contiguous(vectors_in);
  const Tensor codebook = torch::stable::contiguous(codebook_in);
  Tensor indices = torch::stable::new_empty(vectors, {count, beam}, ScalarType::Long);
  Tensor distances = torch::stable::new_empty(vectors, {count, beam});
  if (count == 0) return {indices, distances};

  const NearestProblem problem{vectors.const_data_ptr<float>(),
                                     codebook.const_data_ptr<float>(),
                                     dim,
                                     centroids,
                                     beam,
                                     indices.mutable_data_ptr<int64_t>(),
                                     distances.mutable_data_ptr<float>()};
  const NearestKernel& kernel = kernels_for(isa_or_throw()).nearest;
  const auto prepared = aligned_floats(kernel.codebook_floats(problem));
  require(prepared != nullptr, "nearest: out of memory for the codebook");
  kernel.prepare(problem, prepared.get());

  // A thread is worth waking for about a million multiply-adds.
  const int64_t grain = 1 + (int64_t{1} << 20) / (centroids * dim + 1);
  const auto scratch_of_thread = [&] { return aligned_floats(kernel.scratch_floats(problem)); };
  parallel_with_scratch("nearest", count, grain, scratch_of_thread, [&](float* scratch, int64_t begin, int64_t end) {
    kernel.run(problem, prepared.get(), scratch, begin, end);
  });
  return {indices, distances};
}

}  // namespace vptq
