// sums += left^T right, products in bfloat16 and sums in float32: second moments of a layer's inputs, over thousands of tokens.
//
// Both matrices are packed once, as pairs of tokens in panels of columns, and then only read along panels: an instruction
// multiplies a pair for sixteen columns. 8 x 48 sums stay in registers for 512 tokens. Every sum runs in one order, however
// the panels are shared out.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int64_t kPanelColumns = 48;
constexpr int64_t kRowsAtOnce = 8;
constexpr int64_t kPairsAtOnce = 256;  // of a panel: 48 KiB, which the second cache has room for twice
constexpr int kVectors = kPanelColumns / 16;

inline int64_t product_panels(int64_t columns) { return (columns + kPanelColumns - 1) / kPanelColumns; }

inline int64_t products_packed_floats(const ProductInput& input) {
  return product_panels(input.columns) * kPanelColumns * ((input.tokens + 1) / 2);
}

// Sixteen numbers of a token as bfloat16, zero past the last column or token.
VPTQ_INLINE __m256i rounded_numbers(const ProductInput& input, int64_t token, int64_t column) {
  if (token >= input.tokens) return _mm256_setzero_si256();
  const __mmask16 there = first_lanes(input.columns - column);
  const int64_t at = token * input.stride + column;
  if (input.dtype == Float::kBFloat16) return _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(input.numbers) + at);
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(there, static_cast<const float*>(input.numbers) + at));
}

inline void pack_products(const ProductInput& input, uint32_t* packed, int64_t begin, int64_t end) {
  const int64_t pairs = (input.tokens + 1) / 2;
  for (int64_t panel = begin; panel < end; ++panel) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      for (int vector = 0; vector < kVectors; ++vector) {
        const int64_t column = panel * kPanelColumns + 16 * vector;
        const __m512i first = _mm512_cvtepu16_epi32(rounded_numbers(input, 2 * pair, column));
        const __m512i second = _mm512_cvtepu16_epi32(rounded_numbers(input, 2 * pair + 1, column));
        uint32_t* to = packed + (panel * pairs + pair) * kPanelColumns + 16 * vector;
        _mm512_storeu_si512(to, _mm512_or_si512(first, _mm512_bslli_epi128(second, 2)));
      }
    }
  }
}

// sums [8, 48] += left [pairs, 8 of 48] right [pairs, 48]; only `rows` and `columns` of the sums exist.
VPTQ_INLINE void multiply_pairs(const uint32_t* left, const uint32_t* right, int64_t pairs, float* sums, int64_t stride,
                                int64_t rows, int64_t columns) {
  __m512 sum[kRowsAtOnce][kVectors];
#pragma GCC unroll 8
  for (int row = 0; row < kRowsAtOnce; ++row) {
    for (int vector = 0; vector < kVectors; ++vector) {
      const __mmask16 there = row < rows ? first_lanes(columns - 16 * vector) : 0;
      sum[row][vector] = _mm512_maskz_loadu_ps(there, sums + row * stride + 16 * vector);
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512i weights[kVectors];
    for (int vector = 0; vector < kVectors; ++vector) weights[vector] = _mm512_loadu_si512(right + 16 * vector);
#pragma GCC unroll 8
    for (int row = 0; row < kRowsAtOnce; ++row) {
      const __m512i factor = _mm512_set1_epi32(static_cast<int>(left[row]));
      for (int vector = 0; vector < kVectors; ++vector) {
        sum[row][vector] = _mm512_dpbf16_ps(sum[row][vector], (__m512bh)factor, (__m512bh)weights[vector]);
      }
    }
    left += kPanelColumns;
    right += kPanelColumns;
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRowsAtOnce; ++row) {
    for (int vector = 0; vector < kVectors; ++vector) {
      const __mmask16 there = row < rows ? first_lanes(columns - 16 * vector) : 0;
      _mm512_mask_storeu_ps(sums + row * stride + 16 * vector, there, sum[row][vector]);
    }
  }
}

inline void multiply_panels(const uint32_t* left, const uint32_t* right, int64_t pairs, float* sums, int64_t stride, int64_t rows,
                            int64_t columns) {
  for (int64_t pair = 0; pair < pairs; pair += kPairsAtOnce) {
    const int64_t some = pairs - pair < kPairsAtOnce ? pairs - pair : kPairsAtOnce;
    for (int64_t row = 0; row < rows; row += kRowsAtOnce) {
      multiply_pairs(left + pair * kPanelColumns + row, right + pair * kPanelColumns, some, sums + row * stride, stride, rows - row,
                     columns);
    }
  }
}

inline int64_t product_tiles(const ProductSums& sums) { return product_panels(sums.rows) * product_panels(sums.columns); }

inline void run_products(const ProductSums& sums, int64_t tokens, const uint32_t* left, const uint32_t* right, int64_t begin,
                         int64_t end) {
  const int64_t pairs = (tokens + 1) / 2, across = product_panels(sums.columns), panel = kPanelColumns * pairs;
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t i = tile / across, j = tile % across, row = i * kPanelColumns, column = j * kPanelColumns;
    if (sums.upper && j < i) continue;
    const int64_t rows = sums.rows - row < kPanelColumns ? sums.rows - row : kPanelColumns;
    multiply_panels(left + i * panel, right + j * panel, pairs, sums.sums + row * sums.columns + column, sums.columns, rows,
                    sums.columns - column);
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
