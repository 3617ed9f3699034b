// Three tokens and more: a tile of the weight is decoded once, then multiplied with all tokens.
//
// A register holds outputs, not inputs: no sum is ever taken across a register. The tile stays in the nearest caches, and the matrix is
// never in memory as a whole.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int kPanel = VPTQ_LANES == 16 ? 4 : 2;  // registers of outputs
constexpr int kTokens = 6;                        // tokens at a time: kPanel x kTokens sums, all in registers

// sums [M, stride] += x [M, count] tile [count, stride], for one panel of outputs.
template <int M>
void multiply_panel(const float* tile, int64_t stride, const float* x, int64_t x_stride, int64_t count, float* sums) {
  Lanes sum[M][kPanel];
  for (int m = 0; m < M; ++m) {
    for (int p = 0; p < kPanel; ++p) sum[m][p] = load_floats<kLanes>(sums + m * stride + p * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    Lanes weights[kPanel];
    for (int p = 0; p < kPanel; ++p) weights[p] = load_floats<kLanes>(tile + j * stride + p * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const float factor = x[m * x_stride + j];
      for (int p = 0; p < kPanel; ++p) sum[m][p] += weights[p] * factor;
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int p = 0; p < kPanel; ++p) store_floats<kLanes>(sum[m][p], sums + m * stride + p * kLanes);
  }
}

typedef void (*MultiplyPanel)(const float*, int64_t, const float*, int64_t, int64_t, float*);

inline void multiply_tile(const float* tile, int64_t stride, const float* x, int64_t x_stride, int64_t tokens,
                          int64_t count, float* sums) {
  constexpr MultiplyPanel kMultiply[kTokens + 1] = {nullptr,           multiply_panel<1>, multiply_panel<2>, multiply_panel<3>,
                                                    multiply_panel<4>, multiply_panel<5>, multiply_panel<6>};
  const int64_t step = even_pass(tokens, kTokens);
  for (int64_t m = 0; m < tokens; m += step) {
    const int64_t some = tokens - m < step ? tokens - m : step;
    for (int64_t lane = 0; lane < stride; lane += kPanel * kLanes) {
      kMultiply[some](tile + lane, stride, x + m * x_stride, x_stride, count, sums + m * stride + lane);
    }
  }
}

inline void tile_block(const LookupPart& part, const PreparedPart& prepared, const LookupInput& input, float* y, int64_t y_stride,
                       int64_t begin, int64_t rows, const TileScratch& scratch, float* sums) {
  const int64_t v = part.vector_len, stride = tile_stride(v);
  std::memset(sums, 0, static_cast<size_t>(input.tokens * stride) * 4);
  for (int64_t first = 0; first < part.columns; first += kTileColumns) {
    const int64_t count = decode_tile(part, prepared, begin, rows, first, scratch);
    multiply_tile(scratch.tile, stride, input.x + first, input.stride, input.tokens, count, sums);
  }
  for (int64_t m = 0; m < input.tokens; ++m) {
    float* out = y + m * y_stride + begin * v;
    for (int64_t lane = 0; lane < rows * v; ++lane) out[lane] += sums[m * stride + lane];
  }
}

inline void run_tiles(const LookupPart& part, const PreparedPart& prepared, const LookupInput& input, float* y, int64_t y_stride,
                      int64_t begin, int64_t end, uint8_t* memory) {
  const TileScratch scratch = tile_scratch(part.vector_len, memory);
  float* sums = reinterpret_cast<float*>(memory + tile_scratch_bytes(part.vector_len));
  const int64_t step = tile_rows(part.vector_len);
  // Lanes that no vector fills are multiplied too. What lies there must not be subnormal, as old offsets read as floats
  // are: microcode does those multiplications, and an evaluation at v6-k4096 took ten minutes more in them.
  std::memset(scratch.tile, 0, static_cast<size_t>(kTileColumns * tile_stride(part.vector_len)) * 4);
  for (int64_t row = begin; row < end; row += step) {
    tile_block(part, prepared, input, y, y_stride, row, end - row < step ? end - row : step, scratch, sums);
  }
}

// What LookupKernel names.

inline bool lookup_fits(const LookupPart&, int64_t) { return true; }

inline int64_t lookup_rows_per_tile(const LookupPart& part, int64_t tokens) {
  return tokens <= kFusedTokens ? kRows : tile_rows(part.vector_len);
}

inline int64_t lookup_scratch_bytes(const LookupPart& part, int64_t tokens) {
  const int64_t prepared = prepared_bytes(part), sums = 4 * tokens * tile_stride(part.vector_len);
  if (tokens <= kFusedTokens) return prepared + static_cast<int64_t>(sizeof(FusedScratch));
  return prepared + tile_scratch_bytes(part.vector_len) + sums;
}

inline int64_t lookup_input_bytes(const LookupPart&, int64_t) { return 0; }

inline void prepare_lookup_input(const LookupPart&, const LookupInput&, void*) {}

inline void run_lookup(const LookupPart& part, const LookupInput& input, float* y, int64_t y_stride, int64_t begin,
                       int64_t end, void* scratch) {
  const PreparedPart& prepared = *static_cast<PreparedPart*>(scratch);
  uint8_t* memory = static_cast<uint8_t*>(scratch) + prepared_bytes(part);
  if (input.tokens <= kFusedTokens) {
    run_fused(part, prepared, input, y, y_stride, begin, end, *reinterpret_cast<FusedScratch*>(memory));
  } else {
    run_tiles(part, prepared, input, y, y_stride, begin, end, memory);
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
