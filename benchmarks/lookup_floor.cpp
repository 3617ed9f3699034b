// The floor under a lookup kernel: nothing but index loads, entry loads and multiply-adds.
//
// Compiled and called by benchmarks/kernel.py. Offsets are ready to use and lie in the second-level cache, the input is
// a register, every entry goes to one of eight sums: what a kernel does besides (unpacking, reading its stream from memory,
// preparing input and output) is not here. Entries are float32 or bfloat16 of 4, 8 or 16 lanes.
#include <immintrin.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kRows = 8, kColumns = 256, kBlocks = 32;

// Each bfloat16 into the upper half of its word, in one shuffle.
__m256i upper_halves() {
  return _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                          -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
}

struct Entry4 {
  typedef __m128 Sum;
  static Sum zero() { return _mm_setzero_ps(); }
  static Sum floats(const uint8_t* at) { return _mm_loadu_ps(reinterpret_cast<const float*>(at)); }
  static Sum halves(const uint8_t* at) {
    const __m128i stored = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
    return _mm_castsi128_ps(_mm_shuffle_epi8(stored, _mm256_castsi256_si128(upper_halves())));
  }
  static Sum add(float x, Sum entry, Sum sum) { return _mm_fmadd_ps(_mm_set1_ps(x), entry, sum); }
  static float first(Sum sum) { return _mm_cvtss_f32(sum); }
};

struct Entry8 {
  typedef __m256 Sum;
  static Sum zero() { return _mm256_setzero_ps(); }
  static Sum floats(const uint8_t* at) { return _mm256_loadu_ps(reinterpret_cast<const float*>(at)); }
  static Sum halves(const uint8_t* at) {
    const __m128i stored = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(stored), upper_halves()));
  }
  static Sum add(float x, Sum entry, Sum sum) { return _mm256_fmadd_ps(_mm256_set1_ps(x), entry, sum); }
  static float first(Sum sum) { return _mm256_cvtss_f32(sum); }
};

#if defined(__AVX512F__)
struct Entry16 {
  typedef __m512 Sum;
  static Sum zero() { return _mm512_setzero_ps(); }
  static Sum floats(const uint8_t* at) { return _mm512_loadu_ps(at); }
  static Sum halves(const uint8_t* at) {
    const __m256i stored = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m512i pick = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i wide = _mm512_castsi256_si512(stored);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, _mm512_slli_epi32(pick, 16), wide));
  }
  static Sum add(float x, Sum entry, Sum sum) { return _mm512_fmadd_ps(_mm512_set1_ps(x), entry, sum); }
  static float first(Sum sum) { return _mm512_cvtss_f32(sum); }
};
#endif

template <typename Entry, bool kFloats>
float look_up(const uint8_t* table, const uint32_t* offsets, const float* x, int64_t blocks) {
  float result = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint32_t* at = offsets + block % kBlocks * kRows * kColumns;
    typename Entry::Sum sums[kRows];
    for (int r = 0; r < kRows; ++r) sums[r] = Entry::zero();
    for (int j = 0; j < kColumns; ++j) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const uint8_t* entry = table + at[r * kColumns + j];
        sums[r] = Entry::add(x[j], kFloats ? Entry::floats(entry) : Entry::halves(entry), sums[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) result += Entry::first(sums[r]);
  }
  return result;
}

template <typename Entry>
float run(bool floats, const uint8_t* table, const uint32_t* offsets, const float* x, int64_t blocks) {
  return floats ? look_up<Entry, true>(table, offsets, x, blocks) : look_up<Entry, false>(table, offsets, x, blocks);
}

}  // namespace

// Nanoseconds a lookup, by the clock, with `threads` threads doing `blocks` of 2048 lookups each in tables of their own.
extern "C" double lookup_nanoseconds(int lanes, int floats, int64_t entries, int threads, int64_t blocks) {
  const int64_t stride = lanes * (floats ? 4 : 2);
  std::vector<std::thread> workers;
  std::vector<double> seconds(threads);
  for (int t = 0; t < threads; ++t) {
    workers.emplace_back([=, &seconds] {
      uint8_t* table = static_cast<uint8_t*>(std::aligned_alloc(4096, (entries * stride + 4095) / 4096 * 4096));
      std::memset(table, 0, entries * stride);
      std::vector<uint32_t> offsets(kRows * kColumns * kBlocks);
      uint32_t state = 1 + t;
      for (uint32_t& offset : offsets) {
        state = state * 1664525u + 1013904223u;
        offset = static_cast<uint32_t>((state >> 8) % entries * stride);
      }
      std::vector<float> x(kColumns, 0.5f);
      volatile float sink = 0.0f;
      for (const int64_t some : {int64_t{kBlocks}, blocks}) {  // the first to warm up
        const auto began = std::chrono::steady_clock::now();
        if (lanes == 4) sink = run<Entry4>(floats, table, offsets.data(), x.data(), some);
        if (lanes == 8) sink = run<Entry8>(floats, table, offsets.data(), x.data(), some);
#if defined(__AVX512F__)
        if (lanes == 16) sink = run<Entry16>(floats, table, offsets.data(), x.data(), some);
#endif
        seconds[t] = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
      }
      (void)sink;
      std::free(table);
    });
  }
  for (std::thread& worker : workers) worker.join();
  double slowest = 0.0;
  for (const double each : seconds) slowest = each > slowest ? each : slowest;
  return slowest / static_cast<double>(blocks * kRows * kColumns) * 1e9;
}
