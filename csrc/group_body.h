// Entries of several vector rows side by side in one register: for a few tokens, and for filling tiles.
//
// A register of 16 floats holds one entry of 16, two of 8 or four of 4, of rows that follow each other. Where several tokens
// share a lookup the multiplications are what costs, and they should fill their registers. AVX-512 only: narrower registers are
// full with one entry.

#if VPTQ_LANES == 16

namespace vptq {
namespace VPTQ_ISA {
namespace {

typedef Wide<16>::Floats Sixteen;

constexpr int kGroupTokens = 8;  // at a time: 2 registers of entries x 8 tokens of sums, and 8 of inputs

// `offsets` is the first row's; the rows after it lie `stride` further each.
template <int W, Float kDtype>
struct Group;

template <Float kDtype>
struct Group<16, kDtype> {
  static VPTQ_INLINE Sixteen load(const uint8_t* entries, const uint32_t* offsets, int64_t) {
    return load_entry<16, kDtype>(entries + *offsets);
  }
};

VPTQ_INLINE Sixteen widen_sixteen(__m256i halves, Float dtype) {
  if (dtype == Float::kFloat16) return (Sixteen)_mm512_cvtph_ps(halves);
  return (Sixteen)upper_sixteen(halves);
}

template <Float kDtype>
struct Group<8, kDtype> {
  static VPTQ_INLINE Sixteen load(const uint8_t* entries, const uint32_t* offsets, int64_t stride) {
    const uint8_t *a = entries + offsets[0], *b = entries + offsets[stride];
    if (kDtype == Float::kFloat32) {
      const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(a)));
      return (Sixteen)_mm512_insertf32x8(low, _mm256_loadu_ps(reinterpret_cast<const float*>(b)), 1);
    }
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
    return widen_sixteen(_mm256_inserti128_si256(low, _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1), kDtype);
  }
};

template <Float kDtype>
struct Group<4, kDtype> {
  static VPTQ_INLINE Sixteen load(const uint8_t* entries, const uint32_t* offsets, int64_t stride) {
    const uint8_t *a = entries + offsets[0], *b = entries + offsets[stride];
    const uint8_t *c = entries + offsets[2 * stride], *d = entries + offsets[3 * stride];
    if (kDtype == Float::kFloat32) {
      __m512 all = _mm512_castps128_ps512(_mm_loadu_ps(reinterpret_cast<const float*>(a)));
      all = _mm512_insertf32x4(all, _mm_loadu_ps(reinterpret_cast<const float*>(b)), 1);
      all = _mm512_insertf32x4(all, _mm_loadu_ps(reinterpret_cast<const float*>(c)), 2);
      return (Sixteen)_mm512_insertf32x4(all, _mm_loadu_ps(reinterpret_cast<const float*>(d)), 3);
    }
    return widen_sixteen(_mm256_inserti128_si256(_mm256_castsi128_si256(two(a, b)), two(c, d), 1), kDtype);
  }

 private:
  static VPTQ_INLINE __m128i two(const uint8_t* a, const uint8_t* b) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a));
    return _mm_unpacklo_epi64(low, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b)));
  }
};

// sums [kRows * W / 16, tokens, 16] += entries at offsets [kRows, kChunk] times x [tokens, count], for up to M tokens.
template <int W, Float kDtype, int M>
void multiply_groups(const uint8_t* entries, const uint32_t* offsets, const float* x, int64_t x_stride, int64_t tokens,
                     int64_t count, float* sums, int64_t sums_stride) {
  constexpr int kPer = 16 / W, kRegisters = M > 4 ? 2 : 4, kGroups = kRows / kPer;
  const float* inputs[M];
  for (int m = 0; m < M; ++m) inputs[m] = x + (m < tokens ? m : tokens - 1) * x_stride;
  for (int group = 0; group < kGroups; group += kRegisters) {
    constexpr int kUsed = kRegisters < kGroups ? kRegisters : kGroups;
    const uint32_t* rows = offsets + group * kPer * kChunk;
    Sixteen sum[kUsed][M];
    for (int g = 0; g < kUsed; ++g) {
      for (int m = 0; m < M; ++m) sum[g][m] = Sixteen{};
    }
    for (int64_t j = 0; j < count; ++j) {
      Sixteen entry[kUsed];
      for (int g = 0; g < kUsed; ++g) entry[g] = Group<W, kDtype>::load(entries, rows + g * kPer * kChunk + j, kChunk);
      for (int m = 0; m < M; ++m) {
        const float factor = inputs[m][j];
        for (int g = 0; g < kUsed; ++g) sum[g][m] += entry[g] * factor;
      }
    }
    for (int g = 0; g < kUsed; ++g) {
      for (int m = 0; m < M && m < tokens; ++m) {
        float* at = sums + (group + g) * sums_stride + m * 16;
        store_floats<16>(load_floats<16>(at) + sum[g][m], at);
      }
    }
  }
}

// All tokens, kGroupTokens at a time or fewer, with the same offsets.
inline void multiply_tokens(const Table& table, int64_t skip, int64_t width, const uint32_t* offsets,
                            const LookupInput& input, int64_t first, int64_t count, float* sums) {
  const int64_t passes = (input.tokens + kGroupTokens - 1) / kGroupTokens, step = (input.tokens + passes - 1) / passes;
  for (int64_t m = 0; m < input.tokens; m += step) {
    const int64_t some = input.tokens - m < step ? input.tokens - m : step;
    with_entry(width, table.dtype, [&](auto entry) {
      using E = decltype(entry);
      const auto multiply = some > 4 ? multiply_groups<E::kWidth, E::kFloat, 8> : multiply_groups<E::kWidth, E::kFloat, 4>;
      multiply(table.entries + skip, offsets, input.x + m * input.stride + first, input.stride, some, count,
               sums + m * 16, input.tokens * 16);
    });
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq

#endif
