// y += Q x for a range of vector rows of one part of a layer: raw pointers and sizes, no torch, no allocation.
//
// A part is a run of quantized columns that share codebooks: a column group, or the outlier columns. The codebooks are
// brought into the form the loops want (`Table`) once a thread and part; the indices are read packed, as they lie in
// the file. Results do not depend on how rows are cut into ranges.
#pragma once

#include <cstdint>

namespace vptq {

// Tokens that share a decoded tile: enough to hide the decoding, few enough that their sums stay in the second-level cache.
constexpr int64_t kMaxTokens = 512;

enum class Float { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

constexpr int64_t float_bytes(Float dtype) { return dtype == Float::kFloat32 ? 4 : 2; }

struct LookupPart {
  const void* codebook;           // [centroids, vector_len]
  const void* residual_codebook;  // the same, or null
  Float dtype;
  int64_t vector_len;
  int64_t centroids, residual_centroids;
  int64_t columns;
  const uint8_t* indices;           // packed rows of `row_bytes`, or uint16 [rows, columns] where main_bits is 0
  const uint8_t* residual_indices;  // uint16 [rows, columns], or null where they are packed with the main ones
  int64_t row_bytes;
  int main_bits, residual_bits;  // widths in the packed stream; main_bits is 0 where it is not packed
};

struct LookupInput {
  const float* x;  // [tokens, stride], of which the part's columns are read
  int64_t stride;
  int64_t tokens;        // 1 to kMaxTokens
  const void* prepared;  // what prepare_input wrote
};

// A way to multiply. Memory is in bytes and aligned to 64: the prepared input is shared by all threads, scratch is one a thread
// and prepared once for many runs; `y` is [tokens, y_stride] and holds whole vectors. `rows_per_tile`: ranges should begin at
// multiples of it.
struct LookupKernel {
  bool (*fits)(const LookupPart&, int64_t tokens);
  int64_t (*rows_per_tile)(const LookupPart&, int64_t tokens);
  int64_t (*input_bytes)(const LookupPart&, int64_t tokens);
  void (*prepare_input)(const LookupPart&, const LookupInput&, void* memory);
  int64_t (*scratch_bytes)(const LookupPart&, int64_t tokens);
  void (*prepare)(const LookupPart&, void* scratch);
  void (*run)(const LookupPart&, const LookupInput&, float* y, int64_t y_stride, int64_t begin, int64_t end,
              void* scratch);
};

struct FloatKernel {
  void (*widen)(const void* stored, Float dtype, int64_t count, float* out);
  void (*round)(const float* values, Float dtype, int64_t count, void* out);
};

}  // namespace vptq
