// sums += left^T right in products of bfloat16: raw pointers and sizes, no torch, no allocation, no exceptions.
#pragma once

#include <cstdint>

#include "lookup.h"

namespace vptq {

struct ProductInput {
  const void* numbers;  // [tokens, columns], float32 or bfloat16
  Float dtype;
  int64_t tokens;
  int64_t columns;
  int64_t stride;  // from token to token
};

struct ProductSums {
  float* sums;  // [rows, columns]
  int64_t rows;
  int64_t columns;
  bool upper;  // what lies below the diagonal may be left out
};

// Packed inputs must be aligned to 64 bytes; tiles are pieces of the sums, to be shared out among threads.
struct ProductKernel {
  int64_t (*packed_floats)(const ProductInput&);
  int64_t (*panels)(int64_t columns);
  void (*pack)(const ProductInput&, uint32_t* packed, int64_t begin, int64_t end);  // panels begin to end
  int64_t (*tiles)(const ProductSums&);
  void (*run)(const ProductSums&, int64_t tokens, const uint32_t* left, const uint32_t* right, int64_t begin, int64_t end);
};

}  // namespace vptq
