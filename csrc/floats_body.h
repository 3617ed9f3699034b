// float16 and bfloat16 to float32 and back, to nearest even, as PyTorch converts them.

namespace vptq {
namespace VPTQ_ISA {
namespace {

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

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
