// A few tokens: every lookup goes straight into the sums of its output rows.
//
// A block of vector rows shares each x_j. Their sums stay in registers through a chunk of columns, whose offsets lie in the
// first-level cache; what is left is an index load, an entry load and a multiply-add a lookup.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int kDirectTokens = 2;  // up to here an entry is multiplied alone, above in a register that it shares
// Above this, tiles. One thread, 4096 x 4096 at v8-k4096: at 8 tokens 2.3 ms against 4.2, at 32 both 12.7.
constexpr int kFusedTokens = VPTQ_LANES == 16 ? 24 : kDirectTokens;

// sums [kRows, M, W] += entries at offsets [kRows, kChunk] times x [M, count].
template <int W, Float kDtype, int M>
void multiply_entries(const uint8_t* entries, const uint32_t* offsets, const float* x, int64_t x_stride,
                      int64_t count, float* sums) {
  typename Wide<W>::Floats sum[kRows][M];
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < M; ++m) sum[r][m] = load_floats<W>(sums + (r * M + m) * W);
  }
  for (int64_t j = 0; j < count; ++j) {
    float factor[M];
    for (int m = 0; m < M; ++m) factor[m] = x[m * x_stride + j];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const typename Wide<W>::Floats entry = load_entry<W, kDtype>(entries + offsets[r * kChunk + j]);
      for (int m = 0; m < M; ++m) sum[r][m] += entry * factor[m];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int m = 0; m < M; ++m) store_floats<W>(sum[r][m], sums + (r * M + m) * W);
  }
}

// Adds what `count` columns from `first` contribute to the `width` coordinates from `piece`.
inline void multiply_chunk(const PreparedPart& prepared, int64_t piece, int64_t width, Offsets offsets,
                           const LookupInput& input, int64_t first, int64_t count, float* sums) {
#if VPTQ_LANES == 16
  if (input.tokens > kDirectTokens) {
    with_books(prepared, width, piece, offsets, [&](auto books) { multiply_tokens(books, input, first, count, sums); });
    return;
  }
#endif
  const auto add = [&](const Table& table, const uint32_t* at) {
    with_entry(width, table.dtype, [&](auto entry) {
      using E = decltype(entry);
      const auto multiply = input.tokens == 1 ? multiply_entries<E::kWidth, E::kFloat, 1> : multiply_entries<E::kWidth, E::kFloat, 2>;
      multiply(table.entries + piece * float_bytes(table.dtype), at, input.x + first, input.stride, count, sums);
    });
  };
  add(prepared.main, offsets.main);
  if (offsets.residual != nullptr) add(prepared.residual, offsets.residual);
}

// Where the sums of a row and token begin.
VPTQ_INLINE int64_t sums_at(int64_t row, int64_t token, int64_t tokens, int64_t width) {
  if (tokens <= kDirectTokens) return (row * tokens + token) * width;
  const int64_t per = 16 / width;
  return (row / per * tokens + token) * 16 + row % per * width;
}

struct FusedScratch {
  uint32_t main[kRows * kChunk];
  uint32_t residual[kRows * kChunk];
  float sums[kRows * kFusedTokens * 16];
};

// Sums of one block of rows for the `width` coordinates from `piece` of their vectors.
inline void fused_block(const LookupPart& part, const PreparedPart& prepared, const LookupInput& input, int64_t begin,
                        int64_t rows, int64_t piece, int64_t width, FusedScratch& scratch) {
  const Offsets offsets{scratch.main, part.residual_codebook != nullptr ? scratch.residual : nullptr};
  std::memset(scratch.sums, 0, static_cast<size_t>(kRows * input.tokens * 16) * 4);
  for (int64_t first = 0; first < part.columns; first += kChunk) {
    read_block(part, prepared.unpacker, prepared.shifts(), begin, rows, first, offsets);
    multiply_chunk(prepared, piece, width, offsets, input, first, chunk_at(part, first), scratch.sums);
  }
}

inline void run_fused(const LookupPart& part, const PreparedPart& prepared, const LookupInput& input, float* y,
                      int64_t y_stride, int64_t begin, int64_t end, FusedScratch& scratch) {
  const int64_t lanes = whole_vectors(part.vector_len), width = lanes < 16 ? lanes : 16;
  for (int64_t row = begin; row < end; row += kRows) {
    const int64_t rows = end - row < kRows ? end - row : kRows;
    for (int64_t piece = 0; piece < part.vector_len; piece += width) {
      fused_block(part, prepared, input, row, rows, piece, width, scratch);
      const int64_t used = part.vector_len - piece < width ? part.vector_len - piece : width;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t m = 0; m < input.tokens; ++m) {
          float* out = y + m * y_stride + (row + r) * part.vector_len + piece;
          const float* sums = scratch.sums + sums_at(r, m, input.tokens, width);
          for (int64_t e = 0; e < used; ++e) out[e] += sums[e];
        }
      }
    }
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
