// Bytes of up to 256 entries: 64 columns of one coordinate by four shuffles, each of a quarter of the table.

namespace vptq {
namespace VPTQ_ISA {
namespace {

struct SixtyFour {
  __m512i main, residual;  // indices, a byte each
};

// Indices of 64 columns from `first`; beyond the row's end they are anything.
VPTQ_INLINE SixtyFour read_bytes(const LookupPart& part, const Unpacker& unpacker, int64_t row, int64_t first,
                                 uint32_t* main, uint32_t* residual) {
  const uint8_t* at = part.indices + row * part.row_bytes;
  if (part.main_bits == 8 && part.residual_bits == 0) {
    __builtin_prefetch(at + first + 2048);
    return {window_at(at + first, at + part.row_bytes), _mm512_setzero_si512()};
  }
  if (part.main_bits == 8 && part.residual_bits == 8) {
    __builtin_prefetch(at + 2 * first + 2048);
    __builtin_prefetch(at + 2 * first + 2112);
    const __m512i low = window_at(at + 2 * first, at + part.row_bytes);
    const __m512i high = window_at(at + 2 * first + 64, at + part.row_bytes);
    const __m512i mains = _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(low)), _mm512_cvtepi16_epi8(high), 1);
    const __m256i low_residual = _mm512_cvtepi16_epi8(_mm512_srli_epi16(low, 8));
    const __m256i high_residual = _mm512_cvtepi16_epi8(_mm512_srli_epi16(high, 8));
    return {mains, _mm512_inserti64x4(_mm512_castsi256_si512(low_residual), high_residual, 1)};
  }
  const int64_t left = part.columns - first, count = left < 64 ? left : 64;
  const bool two = part.residual_codebook != nullptr;
  read_offsets(part, unpacker, {0, 0}, row, first, count, {main, two ? residual : nullptr});
  alignas(64) uint8_t bytes[2][64];
  for (int i = 0; i < 64; i += 16) {
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes[0] + i), _mm512_cvtepi32_epi8(_mm512_loadu_si512(main + i)));
    _mm_store_si128(reinterpret_cast<__m128i*>(bytes[1] + i), _mm512_cvtepi32_epi8(_mm512_loadu_si512(residual + i)));
  }
  return {_mm512_load_si512(bytes[0]), _mm512_load_si512(bytes[1])};
}

// sums += the columns' entries times the input, a coordinate at a time.
template <int V>
VPTQ_INLINE void multiply_shuffled(const uint8_t* planes, __m512i index, __m512i high, __m512i low, __m512i* sum_high,
                                   __m512i* sum_low) {
  const __mmask64 upper = _mm512_movepi8_mask(index);
  const __mmask64 odd = _mm512_test_epi8_mask(index, _mm512_set1_epi8(0x40));
  const __mmask64 second = _kandn_mask64(upper, odd), third = _kandn_mask64(odd, upper), fourth = _kand_mask64(odd, upper);
#pragma GCC unroll 8
  for (int e = 0; e < V; ++e) {
    const uint8_t* plane = planes + e * kShuffled;
    __m512i bytes = _mm512_permutexvar_epi8(index, _mm512_loadu_si512(plane));
    bytes = _mm512_mask_permutexvar_epi8(bytes, second, index, _mm512_loadu_si512(plane + 64));
    bytes = _mm512_mask_permutexvar_epi8(bytes, third, index, _mm512_loadu_si512(plane + 128));
    bytes = _mm512_mask_permutexvar_epi8(bytes, fourth, index, _mm512_loadu_si512(plane + 192));
    sum_high[e] = _mm512_dpbusd_epi32(sum_high[e], bytes, high);
    sum_low[e] = _mm512_dpbusd_epi32(sum_low[e], bytes, low);
  }
}

VPTQ_INLINE int64_t total(__m512i sums) {
  alignas(64) int32_t lanes[16];
  _mm512_store_si512(lanes, sums);
  int64_t all_lanes = 0;
  for (int i = 0; i < 16; ++i) all_lanes += lanes[i];
  return all_lanes;
}

// One codebook of one row; a second one in a pass of its own, or the sums would not fit the registers.
template <int V>
void shuffled_row(const LookupPart& part, const ByteInput& input, int64_t row, bool residual, float* y,
                  ByteScratch& scratch) {
  const ByteTable& table = residual ? scratch.residual : scratch.main;
  __m512i sum_high[V], sum_low[V];
  for (int e = 0; e < V; ++e) sum_high[e] = sum_low[e] = _mm512_setzero_si512();
  for (int64_t j = 0; j < part.columns; j += 64) {
    const SixtyFour indices =
        read_bytes(part, scratch.unpacker, row, j, scratch.main_offsets, scratch.residual_offsets);
    multiply_shuffled<V>(table.entries, residual ? indices.residual : indices.main,
                         _mm512_loadu_si512(input.high + j), _mm512_loadu_si512(input.low + j), sum_high, sum_low);
  }
  for (int64_t e = 0; e < part.vector_len; ++e) {
    y[row * part.vector_len + e] += from_products(table, input, e, total(sum_high[e]), total(sum_low[e]));
  }
}

inline void run_shuffled(const LookupPart& part, const ByteInput& input, float* y, int64_t row, ByteScratch& scratch) {
  const auto one = part.vector_len <= 4 ? shuffled_row<4> : shuffled_row<8>;
  one(part, input, row, false, y, scratch);
  if (part.residual_codebook != nullptr) one(part, input, row, true, y, scratch);
}

inline void run_bytes(const LookupPart& part, const LookupInput& whole, float* y, int64_t, int64_t begin, int64_t end,
                      void* memory) {
  ByteScratch& scratch = *static_cast<ByteScratch*>(memory);
  const ByteInput& input = *static_cast<const ByteInput*>(whole.prepared);
  if (shuffles(part)) {
    for (int64_t row = begin; row < end; ++row) run_shuffled(part, input, y, row, scratch);
    return;
  }
  for (int64_t row = begin; row < end; row += kRows) {
    run_gathered(part, input, y, row, end - row < kRows ? end - row : kRows, scratch);
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
