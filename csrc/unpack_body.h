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

struct Shifts {
  int main, residual;  // log2 of the bytes from one table entry to the next
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
inline void widen_row(const uint8_t* row, int64_t first, int64_t count, int64_t entries, int shift, uint32_t* offsets) {
  const uint8_t* at = row + 2 * first;
  const uint32_t last = static_cast<uint32_t>(entries - 1);
  for (int64_t j = 0; j < count; ++j) {
    uint16_t index;
    std::memcpy(&index, at + 2 * j, 2);
    offsets[j] = (index < last ? index : last) << shift;
  }
}

#if VPTQ_LANES == 16

// How the values of one stream are picked from a window of 64 bytes; the same for every row.
struct Unpacker {
  __m512i words, shift;  // up to 17 bits: 16 lanes of two words each; above: 8 lanes of four
  __m512i main_mask, residual_mask;
  __m128i above_main, main_shift, residual_shift;
  int64_t bits;
};

inline Unpacker make_unpacker(const LookupPart& part, Shifts shifts) {
  const int bits = part.main_bits + part.residual_bits, lanes = bits <= 17 ? 16 : 8, each = 32 / lanes;
  alignas(64) uint16_t words[32];
  alignas(64) uint32_t shift[16] = {};
  for (int i = 0; i < lanes; ++i) {
    for (int w = 0; w < each; ++w) words[each * i + w] = static_cast<uint16_t>(i * bits / 16 + w);
    shift[i * 16 / lanes] = static_cast<uint32_t>(i * bits % 16);
  }
  const auto mask = [&](int width) {
    return lanes == 16 ? _mm512_set1_epi32((1 << width) - 1) : _mm512_set1_epi64((1LL << width) - 1);
  };
  return {_mm512_load_si512(words),          _mm512_load_si512(shift),           mask(part.main_bits),
          mask(part.residual_bits),          _mm_cvtsi32_si128(part.main_bits),  _mm_cvtsi32_si128(shifts.main),
          _mm_cvtsi32_si128(shifts.residual), bits};
}

VPTQ_INLINE __m512i window_at(const LookupPart& part, const uint8_t* row, int64_t byte) {
  const int64_t left = part.row_bytes - byte;
  const __mmask64 there = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
  return _mm512_maskz_loadu_epi8(there, row + byte);
}

inline void unpack_row(const LookupPart& part, const Unpacker& u, const uint8_t* row, int64_t first, int64_t count,
                       Offsets out) {
  if (u.bits <= 17) {
    for (int64_t j = 0; j < count; j += 16) {
      const __m512i window = window_at(part, row, (first + j) * u.bits / 8);
      const __m512i values = _mm512_srlv_epi32(_mm512_permutexvar_epi16(u.words, window), u.shift);
      _mm512_storeu_si512(out.main + j, _mm512_sll_epi32(_mm512_and_si512(values, u.main_mask), u.main_shift));
      if (out.residual == nullptr) continue;
      const __m512i residual = _mm512_and_si512(_mm512_srl_epi32(values, u.above_main), u.residual_mask);
      _mm512_storeu_si512(out.residual + j, _mm512_sll_epi32(residual, u.residual_shift));
    }
    return;
  }
  for (int64_t j = 0; j < count; j += 8) {
    const __m512i window = window_at(part, row, (first + j) * u.bits / 8);
    const __m512i values = _mm512_srlv_epi64(_mm512_permutexvar_epi16(u.words, window), u.shift);
    const __m512i main = _mm512_sll_epi64(_mm512_and_si512(values, u.main_mask), u.main_shift);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.main + j), _mm512_cvtepi64_epi32(main));
    if (out.residual == nullptr) continue;
    const __m512i above = _mm512_and_si512(_mm512_srl_epi64(values, u.above_main), u.residual_mask);
    const __m512i residual = _mm512_sll_epi64(above, u.residual_shift);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out.residual + j), _mm512_cvtepi64_epi32(residual));
  }
}

#else

struct Unpacker {
  uint64_t main_mask, residual_mask;
  int main_bits, bits;
  Shifts shifts;
};

inline Unpacker make_unpacker(const LookupPart& part, Shifts shifts) {
  return {(uint64_t{1} << part.main_bits) - 1, (uint64_t{1} << part.residual_bits) - 1, part.main_bits,
          part.main_bits + part.residual_bits, shifts};
}

inline void unpack_row(const LookupPart& part, const Unpacker& u, const uint8_t* row, int64_t first, int64_t count,
                       Offsets out) {
  for (int64_t j = 0; j < count; ++j) {
    const int64_t bit = (first + j) * u.bits, byte = bit / 8;
    const uint64_t value = load_up_to_8(row + byte, part.row_bytes - byte) >> (bit % 8);
    out.main[j] = static_cast<uint32_t>(value & u.main_mask) << u.shifts.main;
    if (out.residual == nullptr) continue;
    out.residual[j] = static_cast<uint32_t>(value >> u.main_bits & u.residual_mask) << u.shifts.residual;
  }
}

#endif

// Byte offsets of `count` columns from `first` (a multiple of kUnpackGroup) of one vector row; up to kUnpackGroup - 1 more
// are written, which count for nothing.
inline void read_offsets(const LookupPart& part, const Unpacker& unpacker, Shifts shifts, int64_t row, int64_t first,
                         int64_t count, Offsets out) {
  if (part.main_bits > 0) {
    unpack_row(part, unpacker, part.indices + row * part.row_bytes, first, count, out);
    return;
  }
  widen_row(part.indices + row * part.row_bytes, first, count, part.centroids, shifts.main, out.main);
  if (out.residual == nullptr) return;
  widen_row(part.residual_indices + row * part.row_bytes, first, count, part.residual_centroids, shifts.residual,
            out.residual);
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
