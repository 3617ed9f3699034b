// Indices of one vector row, from the packed stream to byte offsets into a table.
//
// Value j of a row occupies bits [j T, (j + 1) T), least significant first, the main index below the residual one (see
// docs/format.md). Sixteen values of T bits are 2 T bytes, so with AVX-512 a group of them starts at a byte: one load, one
// permutation of 16-bit words that gives each value the two (or, where it may reach into more, four) words it lies in, one shift. Elsewhere a
// 64-bit load a value does. Rows are read to their end and not a byte further.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int kRows = VPTQ_LANES == 16 ? 8 : 4;  // vector rows at a time: as many sums as registers allow
constexpr int64_t kChunk = 256;                  // columns between two visits of the sums
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

// How the values of one stream are picked from a window of 64 bytes; the same for every row. A rotation brings a field to where it
// counts entries in bytes, so that a mask is all that is left to do.
struct Unpacker {
  __m512i words;           // narrow: 16 lanes of two words each; else 8 lanes of four
  __m512i main_rotation, residual_rotation;
  __m512i main_mask, residual_mask;
  int64_t bits;
  bool narrow;
};

// Whether two 16-bit words hold every value whole: up to 17 bits, and 18, 20, 24 and 32, whose values begin at few places.
inline bool two_words_hold(int bits) {
  int most = 0;
  for (int i = 0; i < 16; ++i) most = i * bits % 16 > most ? i * bits % 16 : most;
  return most + bits <= 32;
}

inline Unpacker make_unpacker(const LookupPart& part, Shifts shifts) {
  const int bits = part.main_bits + part.residual_bits;
  const bool narrow = two_words_hold(bits);
  const int lanes = narrow ? 16 : 8, each = 32 / lanes, width = 512 / lanes;
  alignas(64) uint16_t words[32];
  alignas(64) uint32_t main[16] = {}, residual[16] = {};
  for (int i = 0; i < lanes; ++i) {
    for (int w = 0; w < each; ++w) words[each * i + w] = static_cast<uint16_t>(i * bits / 16 + w);
    const int at = i * 16 / lanes, skipped = i * bits % 16;
    main[at] = static_cast<uint32_t>((width + shifts.main - skipped) % width);
    residual[at] = static_cast<uint32_t>((2 * width + shifts.residual - skipped - part.main_bits) % width);
  }
  const auto mask = [&](int field, int shift) {
    const uint64_t ones = ((uint64_t{1} << field) - 1) << shift;
    return lanes == 16 ? _mm512_set1_epi32(static_cast<int>(ones)) : _mm512_set1_epi64(static_cast<long long>(ones));
  };
  return {_mm512_load_si512(words),
          _mm512_load_si512(main),
          _mm512_load_si512(residual),
          mask(part.main_bits, shifts.main),
          mask(part.residual_bits, shifts.residual),
          bits,
          narrow};
}

// Sixteen values from lanes of 32 bits, or eight from lanes of 64.
template <bool kNarrow, bool kTwo>
VPTQ_INLINE void unpack_window(const Unpacker& u, __m512i window, uint32_t* main, uint32_t* residual) {
  const __m512i values = _mm512_permutexvar_epi16(u.words, window);
  if (kNarrow) {
    _mm512_storeu_si512(main, _mm512_and_si512(_mm512_rolv_epi32(values, u.main_rotation), u.main_mask));
    if (!kTwo) return;
    _mm512_storeu_si512(residual, _mm512_and_si512(_mm512_rolv_epi32(values, u.residual_rotation), u.residual_mask));
  } else {
    const __m512i first = _mm512_and_si512(_mm512_rolv_epi64(values, u.main_rotation), u.main_mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(main), _mm512_cvtepi64_epi32(first));
    if (!kTwo) return;
    const __m512i second = _mm512_and_si512(_mm512_rolv_epi64(values, u.residual_rotation), u.residual_mask);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(residual), _mm512_cvtepi64_epi32(second));
  }
}

// Sixteen values of up to 16 bits, or their double, from memory: half as many bytes cross half as many cache lines.
template <bool kShort>
VPTQ_INLINE __m512i whole_window(const uint8_t* at) {
  if (kShort) return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  return _mm512_loadu_si512(at);
}

// 64 bytes, and zeros in place of those from `end` on.
VPTQ_INLINE __m512i window_at(const uint8_t* at, const uint8_t* end) {
  const int64_t left = end - at;
  const __mmask64 there = left >= 64 ? ~__mmask64{0} : left <= 0 ? 0 : (__mmask64{1} << left) - 1;
  return _mm512_maskz_loadu_epi8(there, at);
}

template <bool kNarrow, bool kTwo, bool kShort = false>
inline void unpack_windows(const LookupPart& part, const Unpacker& u, const uint8_t* row, int64_t first, int64_t count,
                           Offsets out) {
  constexpr int64_t kStep = kNarrow ? 16 : 8;
  const int64_t bytes = kStep * u.bits / 8;
  const uint8_t *at = row + first * u.bits / 8, *end = row + part.row_bytes;
  int64_t j = 0;
  for (; j < count && end - at >= (kShort ? 32 : 64); j += kStep, at += bytes) {
    unpack_window<kNarrow, kTwo>(u, whole_window<kShort>(at), out.main + j, out.residual + j);
  }
  for (; j < count; j += kStep, at += bytes) {  // not a byte beyond the row
    unpack_window<kNarrow, kTwo>(u, window_at(at, end), out.main + j, out.residual + j);
  }
}

inline void unpack_row(const LookupPart& part, const Unpacker& u, const uint8_t* row, int64_t first, int64_t count,
                       Offsets out) {
  const bool two = out.residual != nullptr;
  if (u.bits <= 16 && two) return unpack_windows<true, true, true>(part, u, row, first, count, out);
  if (u.bits <= 16) return unpack_windows<true, false, true>(part, u, row, first, count, {out.main, out.main});
  if (u.narrow && two) return unpack_windows<true, true>(part, u, row, first, count, out);
  if (u.narrow) return unpack_windows<true, false>(part, u, row, first, count, {out.main, out.main});
  if (two) return unpack_windows<false, true>(part, u, row, first, count, out);
  unpack_windows<false, false>(part, u, row, first, count, {out.main, out.main});
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

// Columns from `first` in a chunk.
VPTQ_INLINE int64_t chunk_at(const LookupPart& part, int64_t first) {
  return part.columns - first < kChunk ? part.columns - first : kChunk;
}

// The stream of a chunk comes from memory while the one before it is looked up.
VPTQ_INLINE void prefetch_block(const LookupPart& part, int64_t begin, int64_t rows, int64_t first) {
  const int64_t bits = part.main_bits > 0 ? part.main_bits + part.residual_bits : 16;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = part.indices + (begin + r) * part.row_bytes + first * bits / 8;
    for (int64_t byte = 0; byte < kChunk * bits / 8; byte += 64) __builtin_prefetch(row + byte, 0, 2);
  }
}

// Offsets [kRows, kChunk] of one chunk of a block of rows. Rows that are not there repeat the last one, and are dropped.
inline void read_block(const LookupPart& part, const Unpacker& unpacker, Shifts shifts, int64_t begin, int64_t rows,
                       int64_t first, Offsets out) {
  const int64_t count = chunk_at(part, first);
  for (int64_t r = 0; r < kRows; ++r) {
    read_offsets(part, unpacker, shifts, begin + (r < rows ? r : rows - 1), first, count,
                 {out.main + r * kChunk, out.residual == nullptr ? nullptr : out.residual + r * kChunk});
  }
  if (first + kChunk < part.columns) prefetch_block(part, begin, rows, first + kChunk);
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
