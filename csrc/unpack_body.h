// Indices of one vector row, from the packed stream to byte offsets into a table.
//
// Value j of a row occupies bits [j T, (j + 1) T), least significant first, the main index below the residual one (see
// docs/format.md). Sixteen values of T bits are 2 T bytes, so with AVX-512 a group of them starts at a byte: one load, one
// permutation of 16-bit words that gives each value the two (or, above 17 bits, four) words it lies in, one shift. Elsewhere a
// 64-bit load a value does. Rows are read to their end and not a byte further.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int64_t kUnpackGroup = 16;  // values; ranges start at multiples of it

struct Offsets {
  uint32_t* main;
  uint32_t* residual;  // null without a residual codebook
};

struct Strides {
  uint32_t main, residual;  // bytes from one table entry to the next
};

VPTQ_INLINE uint64_t load_up_to_8(const uint8_t* at, int64_t available) {
  uint64_t word = 0;
  if (available >= 8) {
    std::memcpy(&word, at, 8);
  } else {
    for (int64_t i = 0; i < available; ++i) word |= static_cast<uint64_t>(at[i]) << (8 * i);
  }
  return word;
}

// Not packed: 16 bits each. Loading a checkpoint checks the range; memory stays safe without.
inline void widen_row(const uint8_t* row, int64_t first, int64_t count, int64_t entries, uint32_t stride,
                      uint32_t* offsets) {
  const uint8_t* at = row + 2 * first;
  const uint32_t last = static_cast<uint32_t>(entries - 1);
  for (int64_t j = 0; j < count; ++j) {
    uint16_t index;
    std::memcpy(&index, at + 2 * j, 2);
    offsets[j] = (index < last ? index : last) * stride;
  }
}

#if VPTQ_LANES == 16

// Up to 17 bits: each of 16 lanes takes two words.
inline void unpack_narrow(const LookupPart& part, const uint8_t* row, int64_t first, int64_t count, Strides strides,
                          Offsets out) {
  const int bits = part.main_bits + part.residual_bits;
  alignas(64) uint16_t words[32];
  alignas(64) uint32_t shifts[16];
  for (int i = 0; i < 16; ++i) {
    words[2 * i] = static_cast<uint16_t>(i * bits / 16);
    words[2 * i + 1] = static_cast<uint16_t>(i * bits / 16 + 1);
    shifts[i] = static_cast<uint32_t>(i * bits % 16);
  }
  const __m512i pick = _mm512_load_si512(words), shift = _mm512_load_si512(shifts);
  const __m512i main_mask = _mm512_set1_epi32((1 << part.main_bits) - 1);
  const __m512i residual_mask = _mm512_set1_epi32((1 << part.residual_bits) - 1);
  const __m512i main_stride = _mm512_set1_epi32(static_cast<int>(strides.main));
  const __m512i residual_stride = _mm512_set1_epi32(static_cast<int>(strides.residual));
  const __m128i above_main = _mm_cvtsi32_si128(part.main_bits);
  for (int64_t j = 0; j < count; j += 16) {
    const int64_t byte = (first + j) * bits / 8, left = part.row_bytes - byte;
    const __mmask64 there = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    const __m512i window = _mm512_maskz_loadu_epi8(there, row + byte);
    const __m512i values = _mm512_srlv_epi32(_mm512_permutexvar_epi16(pick, window), shift);
    const __m512i main = _mm512_and_si512(values, main_mask);
    _mm512_storeu_si512(out.main + j, _mm512_mullo_epi32(main, main_stride));
    if (out.residual == nullptr) continue;
    const __m512i residual = _mm512_and_si512(_mm512_srl_epi32(values, above_main), residual_mask);
    _mm512_storeu_si512(out.residual + j, _mm512_mullo_epi32(residual, residual_stride));
  }
}

// Up to 32 bits: each of 8 lanes takes four words.
inline void unpack_wide(const LookupPart& part, const uint8_t* row, int64_t first, int64_t count, Strides strides,
                        Offsets out) {
  const int bits = part.main_bits + part.residual_bits;
  alignas(64) uint16_t words[32];
  alignas(64) uint64_t shifts[8];
  for (int i = 0; i < 8; ++i) {
    for (int w = 0; w < 4; ++w) words[4 * i + w] = static_cast<uint16_t>(i * bits / 16 + w);
    shifts[i] = static_cast<uint64_t>(i * bits % 16);
  }
  const __m512i pick = _mm512_load_si512(words), shift = _mm512_load_si512(shifts);
  const __m512i main_mask = _mm512_set1_epi64((1LL << part.main_bits) - 1);
  const __m512i residual_mask = _mm512_set1_epi64((1LL << part.residual_bits) - 1);
  const __m256i main_stride = _mm256_set1_epi32(static_cast<int>(strides.main));
  const __m256i residual_stride = _mm256_set1_epi32(static_cast<int>(strides.residual));
  const __m128i above_main = _mm_cvtsi32_si128(part.main_bits);
  for (int64_t j = 0; j < count; j += 8) {
    const int64_t byte = (first + j) * bits / 8, left = part.row_bytes - byte;
    if (left <= 0) break;
    const __mmask64 there = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    const __m512i window = _mm512_maskz_loadu_epi8(there, row + byte);
    const __m512i values = _mm512_srlv_epi64(_mm512_permutexvar_epi16(pick, window), shift);
    const __m256i main = _mm512_cvtepi64_epi32(_mm512_and_si512(values, main_mask));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.main + j), _mm256_mullo_epi32(main, main_stride));
    if (out.residual == nullptr) continue;
    const __m512i above = _mm512_and_si512(_mm512_srl_epi64(values, above_main), residual_mask);
    const __m256i residual = _mm256_mullo_epi32(_mm512_cvtepi64_epi32(above), residual_stride);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.residual + j), residual);
  }
}

inline void unpack_row(const LookupPart& part, const uint8_t* row, int64_t first, int64_t count, Strides strides,
                       Offsets out) {
  if (part.main_bits + part.residual_bits <= 17) {
    unpack_narrow(part, row, first, count, strides, out);
  } else {
    unpack_wide(part, row, first, count, strides, out);
  }
}

#else

inline void unpack_row(const LookupPart& part, const uint8_t* row, int64_t first, int64_t count, Strides strides,
                       Offsets out) {
  const int bits = part.main_bits + part.residual_bits;
  const uint64_t main_mask = (uint64_t{1} << part.main_bits) - 1;
  const uint64_t residual_mask = (uint64_t{1} << part.residual_bits) - 1;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t bit = (first + j) * bits, byte = bit / 8;
    const uint64_t value = load_up_to_8(row + byte, part.row_bytes - byte) >> (bit % 8);
    out.main[j] = static_cast<uint32_t>(value & main_mask) * strides.main;
    if (out.residual == nullptr) continue;
    out.residual[j] = static_cast<uint32_t>(value >> part.main_bits & residual_mask) * strides.residual;
  }
}

#endif

// Byte offsets of `count` columns from `first` (a multiple of kUnpackGroup) of one vector row; up to kUnpackGroup - 1 more
// are written, which count for nothing.
inline void read_offsets(const LookupPart& part, int64_t row, int64_t first, int64_t count, Strides strides,
                         Offsets out) {
  if (part.main_bits > 0) {
    unpack_row(part, part.indices + row * part.row_bytes, first, count, strides, out);
    return;
  }
  const int64_t row_bytes = 2 * part.columns;
  widen_row(part.indices + row * row_bytes, first, count, part.centroids, strides.main, out.main);
  if (out.residual == nullptr) return;
  widen_row(part.residual_indices + row * row_bytes, first, count, part.residual_centroids, strides.residual,
            out.residual);
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
