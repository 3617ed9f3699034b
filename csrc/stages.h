// Centroids of one codebook, or of a main and a residual codebook whose entries are added: raw pointers, no torch.
#pragma once

#include <cstdint>

namespace vptq {

// Up to so many pairs of centroids are all compared (pairs_body.h); above, a beam of main centroids is tried.
constexpr int64_t kMostPairs = 1 << 16;

struct StagesProblem {
  const float* main;      // [main_centroids, dim]
  const float* residual;  // [residual_centroids, dim], or null
  int64_t dim;
  int64_t main_centroids;
  int64_t residual_centroids;
  int64_t beam;  // 1 <= beam <= main_centroids; with 1 the choice is greedy
  bool weighted = false;  // distances are sums of weighted squares

  bool all_pairs() const {
    return residual != nullptr && !weighted && beam > 1 && main_centroids * residual_centroids <= kMostPairs;
  }
};

// One per instruction set. Sizes are in floats; buffers must be aligned to 64 bytes.
struct StagesKernel {
  int64_t (*prepared_floats)(const StagesProblem&);
  int64_t (*scratch_floats)(const StagesProblem&);
  void (*prepare)(const StagesProblem&, float* prepared);
  // vectors [count, dim] -> main [count], residual [count] (untouched where there is one codebook); weights are
  // [count, dim] as well, or null.
  void (*search)(const StagesProblem&, const float* prepared, float* scratch, const float* vectors,
                 const float* weights, int64_t count, int64_t* main, int64_t* residual);
};

}  // namespace vptq
