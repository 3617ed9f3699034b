// A vector of VPTQ_LANES floats, of whatever instruction set the including file is compiled for.
//
// GCC's and Clang's vector types do nearly all: arithmetic on them becomes the set's own instructions, so one text
// serves SSE, AVX2, AVX-512 and NEON. Only a comparison's bit mask needs intrinsics to be fast. No include guard, and
// no system headers: each includer gets its own copy in its own namespace (see target_begin.h).

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int kLanes = VPTQ_LANES;

typedef float Lanes __attribute__((vector_size(VPTQ_LANES * 4), may_alias));

#define VPTQ_INLINE inline __attribute__((always_inline))

// Bit l is set where lane l of `scores` is at least `bound`; never for NaN.
VPTQ_INLINE uint32_t at_least(Lanes scores, float bound) {
#if VPTQ_LANES == 16
  return _mm512_cmp_ps_mask((__m512)scores, _mm512_set1_ps(bound), _CMP_GE_OQ);
#elif VPTQ_LANES == 8
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)scores, _mm256_set1_ps(bound), _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(scores[lane] >= bound) << lane;
  return bits;
#endif
}

#if VPTQ_LANES == 16
// For masked loads: as many of sixteen lanes as there are numbers left.
VPTQ_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}
#endif

// A NaN in `scores` loses; GCC and Clang turn the comparison into one max instruction.
VPTQ_INLINE Lanes larger(Lanes scores, Lanes best) { return scores > best ? scores : best; }

// Minus zero, not plus: x - 0 is x for every x, so compilers drop it; -0 + 0 is not.
VPTQ_INLINE Lanes all(float value) { return value - Lanes{}; }

VPTQ_INLINE Lanes nothing() { return all(-std::numeric_limits<float>::infinity()); }

VPTQ_INLINE float largest(Lanes scores) {
  float lane[kLanes];
  std::memcpy(lane, &scores, sizeof lane);
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lane[i] = lane[i + half] > lane[i] ? lane[i + half] : lane[i];
  }
  return lane[0];
}

// How many tokens a pass takes where the fewest passes of at most `most` share `count`: evenly, because a pass reads
// every weight, however few tokens it has.
VPTQ_INLINE int64_t even_pass(int64_t count, int64_t most) {
  const int64_t passes = (count + most - 1) / most;
  return (count + passes - 1) / passes;
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
