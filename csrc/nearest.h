// Nearest centroids of many vectors: raw pointers and sizes, no torch, no allocation, no exceptions.
//
// The caller prepares a codebook once (transposed, padded, with its norms) and then runs ranges of vectors from as
// many threads as it likes, each with a scratch buffer of its own. Results do not depend on how ranges are cut.
#pragma once

#include <cstdint>

namespace vptq {

struct NearestProblem {
  const float* vectors;   // [count, dim]
  const float* codebook;  // [centroids, dim]
  int64_t dim;
  int64_t centroids;
  int64_t beam;        // 1 <= beam <= centroids
  int64_t* indices;    // [count, beam], nearest first
  float* distances;    // [count, beam], squared
  bool weighted = false;           // |x - c|^2 is the sum over d of w[d] (x[d] - c[d])^2
  const float* weights = nullptr;  // [count, dim] where it is
};

// One per instruction set. Sizes are in floats; buffers must be aligned to 64 bytes.
struct NearestKernel {
  int64_t (*codebook_floats)(const NearestProblem&);
  int64_t (*scratch_floats)(const NearestProblem&);
  void (*prepare)(const NearestProblem&, float* prepared);
  void (*run)(const NearestProblem&, const float* prepared, float* scratch, int64_t begin, int64_t end);
};

}  // namespace vptq
