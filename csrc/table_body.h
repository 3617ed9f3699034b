// Codebooks in the form the lookup loops want: entries of whole vectors, zero padded, float32 where that is cheap.
//
// An entry of 4, 8 or a multiple of 16 floats is multiplied straight from memory. Codebooks that would outgrow a core's second-level
// cache as float32 stay in 16 bits, in place where their entries are whole vectors already, and are widened at each lookup.

namespace vptq {
namespace VPTQ_ISA {
namespace {

// What the first-level cache holds beside the offsets: within it a lookup of float32 is a sixth cheaper than one of 16
// bits, beyond it a tenth dearer (docs/log.md).
constexpr int64_t kExpandBytes = 32 * 1024;

#if VPTQ_LANES == 4
constexpr bool kWidensHalf = false;
#else
constexpr bool kWidensHalf = true;
#endif

struct Table {
  const uint8_t* entries;
  Float dtype;
  int shift;  // an entry has 2^shift bytes
};

// Powers of two, so that an index becomes an offset by a shift.
inline int64_t whole_vectors(int64_t vector_len) {
  int64_t lanes = 4;
  while (lanes < vector_len) lanes *= 2;
  return lanes;
}

VPTQ_INLINE bool stays_narrow(Float dtype, int64_t entries, int64_t vector_len) {
  if (dtype == Float::kFloat32 || (dtype == Float::kFloat16 && !kWidensHalf)) return false;
  return entries * whole_vectors(vector_len) * 4 > kExpandBytes;
}

VPTQ_INLINE bool in_place(Float dtype, int64_t entries, int64_t vector_len) {
  return whole_vectors(vector_len) == vector_len &&
         (dtype == Float::kFloat32 || stays_narrow(dtype, entries, vector_len));
}

inline int64_t table_bytes(Float dtype, int64_t entries, int64_t vector_len) {
  if (in_place(dtype, entries, vector_len)) return 0;
  const int64_t width = stays_narrow(dtype, entries, vector_len) ? 2 : 4;
  return (entries * whole_vectors(vector_len) * width + 63) / 64 * 64;
}

// Every call pays this for each entry of an odd length: with memset and memcpy a call on 192 x 576 at v6-k4096 took 60 us, not 30.
VPTQ_INLINE void pad_entry(const uint16_t* from, int64_t vector_len, int64_t lanes, uint16_t* to) {
#if VPTQ_LANES == 16
  if (lanes <= 16) {
    const __mmask16 there = static_cast<__mmask16>((1u << vector_len) - 1);
    const __m256i entry = _mm256_maskz_loadu_epi16(there, from);
    if (lanes == 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), entry);
    } else if (lanes == 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(entry));
    } else {
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(entry));
    }
    return;
  }
#endif
  for (int64_t i = 0; i < lanes; ++i) to[i] = i < vector_len ? from[i] : 0;
}

inline Table make_table(const void* codebook, Float dtype, int64_t entries, int64_t vector_len, uint8_t* memory) {
  const bool narrow = stays_narrow(dtype, entries, vector_len);
  const int64_t lanes = whole_vectors(vector_len), width = narrow || dtype != Float::kFloat32 ? 2 : 4;
  const Float kept = narrow ? dtype : Float::kFloat32;
  const int64_t stride = lanes * (narrow ? 2 : 4);
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(stride));
  const uint8_t* stored = static_cast<const uint8_t*>(codebook);
  if (in_place(dtype, entries, vector_len)) return {stored, kept, shift};
  if (lanes == vector_len) {
    widen(stored, dtype, entries * vector_len, reinterpret_cast<float*>(memory));
    return {memory, kept, shift};
  }
  for (int64_t e = 0; e < entries; ++e) {
    uint8_t* entry = memory + e * stride;
    const uint8_t* from = stored + e * vector_len * width;
    if (narrow) {
      pad_entry(reinterpret_cast<const uint16_t*>(from), vector_len, lanes, reinterpret_cast<uint16_t*>(entry));
    } else {
      std::memset(entry, 0, static_cast<size_t>(stride));
      widen(from, dtype, vector_len, reinterpret_cast<float*>(entry));
    }
  }
  return {memory, kept, shift};
}

// W floats of GCC's and Clang's vector types, which become whatever registers the instruction set has.
template <int W>
struct Wide {
  typedef float Floats __attribute__((vector_size(W * 4), may_alias));
  typedef uint32_t Words __attribute__((vector_size(W * 4), may_alias));
  typedef uint16_t Halves __attribute__((vector_size(W * 2), may_alias));
};

template <int W>
VPTQ_INLINE typename Wide<W>::Floats load_floats(const float* at) {
  typename Wide<W>::Floats floats;
  std::memcpy(&floats, at, sizeof floats);
  return floats;
}

template <int W>
VPTQ_INLINE void store_floats(typename Wide<W>::Floats floats, float* at) {
  std::memcpy(at, &floats, sizeof floats);
}

// W 16-bit floats as float32. A bfloat16 goes to the upper half of its word by one shuffle, which leaves the ports of the
// multiply-adds alone; widening and shifting takes one of them. GCC 12 takes a convertvector apart, hence intrinsics.
template <int W, Float kDtype>
struct Widened {
  static VPTQ_INLINE typename Wide<W>::Floats load(const uint8_t* at) {
    typename Wide<W>::Floats floats;
    for (int half = 0; half < 2; ++half) {
      const typename Wide<W / 2>::Floats part = Widened<W / 2, kDtype>::load(at + half * W);
      std::memcpy(reinterpret_cast<uint8_t*>(&floats) + half * W * 2, &part, sizeof part);
    }
    return floats;
  }
};

#if VPTQ_LANES == 4

template <Float kDtype>
struct Widened<4, kDtype> {
  static VPTQ_INLINE Wide<4>::Floats load(const uint8_t* at) {
    Wide<4>::Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    const Wide<4>::Words words = __builtin_convertvector(halves, Wide<4>::Words) << 16;
    return (Wide<4>::Floats)words;
  }
};

#else

// Elements 0 to 3 of the lower copy, 4 to 7 of the upper one.
VPTQ_INLINE __m256i upper_halves() {
  return _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                          -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
}

template <Float kDtype>
struct Widened<4, kDtype> {
  static VPTQ_INLINE Wide<4>::Floats load(const uint8_t* at) {
    const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    if (kDtype == Float::kFloat16) return (Wide<4>::Floats)_mm_cvtph_ps(halves);
    return (Wide<4>::Floats)_mm_shuffle_epi8(halves, _mm256_castsi256_si128(upper_halves()));
  }
};

template <Float kDtype>
struct Widened<8, kDtype> {
  static VPTQ_INLINE Wide<8>::Floats load(const uint8_t* at) {
    return of(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }

  static VPTQ_INLINE Wide<8>::Floats of(__m128i halves) {
    if (kDtype == Float::kFloat16) return (Wide<8>::Floats)_mm256_cvtph_ps(halves);
    return (Wide<8>::Floats)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(halves), upper_halves());
  }
};

#if VPTQ_LANES == 16

VPTQ_INLINE __m512i upper_sixteen(__m256i halves) {
  const __m512i pick = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_slli_epi32(pick, 16), _mm512_castsi256_si512(halves));
}

template <Float kDtype>
struct Widened<16, kDtype> {
  static VPTQ_INLINE Wide<16>::Floats load(const uint8_t* at) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    if (kDtype == Float::kFloat16) return (Wide<16>::Floats)_mm512_cvtph_ps(halves);
    return (Wide<16>::Floats)upper_sixteen(halves);
  }
};

#endif
#endif

template <int W, Float kDtype>
VPTQ_INLINE typename Wide<W>::Floats load_entry(const uint8_t* at) {
  if (kDtype == Float::kFloat32) return load_floats<W>(reinterpret_cast<const float*>(at));
  return Widened<W, kDtype>::load(at);
}

template <int W, Float kDtype>
struct Entry {
  static constexpr int kWidth = W;
  static constexpr Float kFloat = kDtype;
};

template <int W, typename Use>
inline auto with_entry_of(Float dtype, const Use& use) {
  if (dtype == Float::kFloat32) return use(Entry<W, Float::kFloat32>());
  if (dtype == Float::kBFloat16) return use(Entry<W, Float::kBFloat16>());
  return use(Entry<W, kWidensHalf ? Float::kFloat16 : Float::kFloat32>());
}

// From what a table says of its entries to what a loop must know of them when it is compiled.
template <typename Use>
inline auto with_entry(int64_t width, Float dtype, const Use& use) {
  if (width == 4) return with_entry_of<4>(dtype, use);
  if (width == 8) return with_entry_of<8>(dtype, use);
  return with_entry_of<16>(dtype, use);
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
