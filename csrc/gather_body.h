// Bytes of up to 4096 entries: eight columns of a row by one gather, one shuffle that groups them by coordinate.

namespace vptq {
namespace VPTQ_ISA {
namespace {

struct ByteSums {
  int32_t high[kRows * 16];
  int32_t low[kRows * 16];
};

// The two halves of eight columns alternate in the lanes of a coordinate.
inline void multiply_gathered(const uint8_t* entries, const uint32_t* offsets, const int8_t* high, const int8_t* low,
                              int64_t count, ByteSums& sums) {
  alignas(64) uint8_t order[64];
  for (int i = 0; i < 64; ++i) {
    const int word = i / 4, coordinate = word / 2, column = word % 2 * 4 + i % 4;
    order[i] = static_cast<uint8_t>(column * kByteLanes + coordinate);
  }
  const __m512i by_coordinate = _mm512_load_si512(order);
  __m512i sum_high[kRows], sum_low[kRows];
  for (int r = 0; r < kRows; ++r) {
    sum_high[r] = _mm512_loadu_si512(sums.high + r * 16);
    sum_low[r] = _mm512_loadu_si512(sums.low + r * 16);
  }
  for (int64_t j = 0; j < count; j += 8) {
    long long high_eight, low_eight;
    std::memcpy(&high_eight, high + j, 8);
    std::memcpy(&low_eight, low + j, 8);
    const __m512i x_high = _mm512_set1_epi64(high_eight), x_low = _mm512_set1_epi64(low_eight);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m256i at = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(offsets + r * kChunk + j));
      const __m512i eight = _mm512_permutexvar_epi8(by_coordinate, _mm512_i32gather_epi64(at, entries, 8));
      sum_high[r] = _mm512_dpbusd_epi32(sum_high[r], eight, x_high);
      sum_low[r] = _mm512_dpbusd_epi32(sum_low[r], eight, x_low);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    _mm512_storeu_si512(sums.high + r * 16, sum_high[r]);
    _mm512_storeu_si512(sums.low + r * 16, sum_low[r]);
  }
}

// Columns in whole eights: what a row's offsets lack at their end stands for entry 0, and meets zeros of the input.
inline void run_gathered(const LookupPart& part, const ByteInput& input, float* y, int64_t begin, int64_t rows, ByteScratch& scratch) {
  const bool two = part.residual_codebook != nullptr;
  ByteSums sums[2];
  std::memset(sums, 0, sizeof sums);
  for (int64_t first = 0; first < part.columns; first += kChunk) {
    const int64_t count = chunk_at(part, first);
    if (count < kChunk) {
      std::memset(scratch.main_offsets, 0, sizeof scratch.main_offsets);
      std::memset(scratch.residual_offsets, 0, sizeof scratch.residual_offsets);
    }
    read_block(part, scratch.unpacker, {0, 0}, begin, rows, first,
               {scratch.main_offsets, two ? scratch.residual_offsets : nullptr});
    const int8_t *high = input.high + first, *low = input.low + first;
    multiply_gathered(scratch.main.entries, scratch.main_offsets, high, low, count, sums[0]);
    if (two) multiply_gathered(scratch.residual.entries, scratch.residual_offsets, high, low, count, sums[1]);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t e = 0; e < part.vector_len; ++e) {
      const int64_t at = r * 16 + 2 * e;
      float& out = y[(begin + r) * part.vector_len + e];
      for (int b = 0; b < 1 + two; ++b) {
        out += from_products(b == 0 ? scratch.main : scratch.residual, input, e,
                             int64_t{sums[b].high[at]} + sums[b].high[at + 1],
                             int64_t{sums[b].low[at]} + sums[b].low[at + 1]);
      }
    }
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
