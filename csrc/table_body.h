// Codebooks in the form the lookup loops want: entries of whole vectors, zero padded, float32 where that is cheap.
//
// An entry of 4, 8 or a multiple of 16 floats is multiplied straight from memory. Codebooks that would outgrow a core's second-level
// cache as float32 stay in 16 bits, in place where their entries are whole vectors already, and are widened at each lookup.

namespace vptq {
namespace VPTQ_ISA {
namespace {

// 4096 x 8 and 8192 x 8 as float32: see docs/log.md for the crossover.
constexpr int64_t kExpandBytes = 256 * 1024;

#if VPTQ_LANES == 4
constexpr bool kWidensHalf = false;
#else
constexpr bool kWidensHalf = true;
#endif

struct Table {
  const uint8_t* entries;
  Float dtype;
  uint32_t stride;  // bytes
};

constexpr int64_t whole_vectors(int64_t vector_len) {
  return vector_len <= 4 ? 4 : vector_len <= 8 ? 8 : (vector_len + 15) / 16 * 16;
}

VPTQ_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(half & 0x7fff) << 13;
  float value;
  if (bits >= 0x0f800000u) {  // infinity and NaN keep their mantissa
    bits += 0x70000000u;
    std::memcpy(&value, &bits, 4);
  } else {  // an exponent bias of 15 became one of 127; subnormals come out normal
    const uint32_t rescale = 0x77800000u;
    float factor;
    std::memcpy(&factor, &rescale, 4);
    std::memcpy(&value, &bits, 4);
    value *= factor;
  }
  std::memcpy(&bits, &value, 4);
  bits |= sign;
  std::memcpy(&value, &bits, 4);
  return value;
}

VPTQ_INLINE float bfloat_to_float(uint16_t stored) {
  const uint32_t bits = static_cast<uint32_t>(stored) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void widen(const void* stored, Float dtype, int64_t count, float* out) {
  if (dtype == Float::kFloat32) {
    std::memcpy(out, stored, static_cast<size_t>(count) * 4);
    return;
  }
  const uint16_t* in = static_cast<const uint16_t*>(stored);
  int64_t i = 0;
  if (dtype == Float::kBFloat16) {
    for (; i < count; ++i) out[i] = bfloat_to_float(in[i]);
    return;
  }
#if VPTQ_LANES != 4
  for (; i + 8 <= count; i += 8) {
    __m128i halves;
    std::memcpy(&halves, in + i, 16);
    const __m256 floats = _mm256_cvtph_ps(halves);
    std::memcpy(out + i, &floats, 32);
  }
#endif
  for (; i < count; ++i) out[i] = half_to_float(in[i]);
}

VPTQ_INLINE uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return sign | 0x7e00;
  if (bits >= 0x477ff000u) return sign | 0x7c00;  // rounds to 65536 or more
  if (bits < 0x38800000u) {                       // subnormal: let an addition round to multiples of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return sign | static_cast<uint16_t>(bits - 0x3f000000u);
  }
  bits += 0xfffu + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((bits - 0x38000000u) >> 13);
}

VPTQ_INLINE uint16_t float_to_bfloat(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline void round_floats(const float* values, Float dtype, int64_t count, void* out) {
  if (dtype == Float::kFloat32) {
    std::memcpy(out, values, static_cast<size_t>(count) * 4);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out);
  int64_t i = 0;
  if (dtype == Float::kBFloat16) {
    for (; i < count; ++i) to[i] = float_to_bfloat(values[i]);
    return;
  }
#if VPTQ_LANES != 4
  for (; i + 8 <= count; i += 8) {
    __m256 floats;
    std::memcpy(&floats, values + i, 32);
    const __m128i halves = _mm256_cvtps_ph(floats, _MM_FROUND_TO_NEAREST_INT);
    std::memcpy(to + i, &halves, 16);
  }
#endif
  for (; i < count; ++i) to[i] = float_to_half(values[i]);
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

inline Table make_table(const void* codebook, Float dtype, int64_t entries, int64_t vector_len, uint8_t* memory) {
  const bool narrow = stays_narrow(dtype, entries, vector_len);
  const int64_t lanes = whole_vectors(vector_len), width = narrow || dtype != Float::kFloat32 ? 2 : 4;
  const Float kept = narrow ? dtype : Float::kFloat32;
  const uint32_t stride = static_cast<uint32_t>(lanes * (narrow ? 2 : 4));
  const uint8_t* stored = static_cast<const uint8_t*>(codebook);
  if (in_place(dtype, entries, vector_len)) return {stored, kept, stride};
  if (lanes == vector_len) {
    widen(stored, dtype, entries * vector_len, reinterpret_cast<float*>(memory));
    return {memory, kept, stride};
  }
  for (int64_t e = 0; e < entries; ++e) {
    uint8_t* entry = memory + e * stride;
    std::memset(entry, 0, stride);
    const uint8_t* from = stored + e * vector_len * width;
    if (narrow) {
      std::memcpy(entry, from, static_cast<size_t>(vector_len) * 2);
    } else {
      widen(from, dtype, vector_len, reinterpret_cast<float*>(entry));
    }
  }
  return {memory, kept, stride};
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

template <int W, Float kDtype>
VPTQ_INLINE typename Wide<W>::Floats load_entry(const uint8_t* at) {
  typename Wide<W>::Floats floats;
  if (kDtype == Float::kFloat32) {
    std::memcpy(&floats, at, sizeof floats);
    return floats;
  }
  typename Wide<W>::Halves halves;
  std::memcpy(&halves, at, sizeof halves);
  if (kDtype == Float::kBFloat16) {
    const typename Wide<W>::Words words = __builtin_convertvector(halves, typename Wide<W>::Words) << 16;
    std::memcpy(&floats, &words, sizeof floats);
    return floats;
  }
#if VPTQ_LANES != 4
  if (W == 4) {
    __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    const __m128 wide = _mm_cvtph_ps(four);
    std::memcpy(&floats, &wide, sizeof floats);
  } else {
    for (int part = 0; part < W / 8; ++part) {
      __m128i eight;
      std::memcpy(&eight, at + 16 * part, 16);
      const __m256 wide = _mm256_cvtph_ps(eight);
      std::memcpy(reinterpret_cast<uint8_t*>(&floats) + 32 * part, &wide, 32);
    }
  }
#endif
  return floats;
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
