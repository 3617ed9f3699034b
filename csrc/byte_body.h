// One token with the codebook in bytes: exact products of rounded numbers, several columns an instruction.
//
// Entries are c = s_e (u - 128) with a byte u and a scale for each coordinate e; the input is x = t (256 h + l) with signed bytes h
// and l. Then sum c x = s_e t (256 sum u h + sum u l - 128 sum (256 h + l)), and nothing is rounded but c and x. Bytes are looked up
// in two ways: up to 256 entries lie in registers, and a shuffle looks up 64 columns of one coordinate; up to 4096 lie in the
// first-level cache, and a gather brings eight columns of all coordinates. Both end in dot products of four columns at a time.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int64_t kByteLanes = 8;                  // coordinates of an entry
constexpr int64_t kShuffled = 256;                 // entries that a shuffle reaches
constexpr int64_t kGathered = 4096;                // beyond, the exact kernel is as fast
constexpr int64_t kByteColumns = int64_t{1} << 17;  // what a 32-bit sum of products holds: 4 x 255 x 128 every 8 columns
constexpr int64_t kByteTail = 64;                  // zeros behind the input

struct ByteTable {
  uint8_t entries[kGathered * kByteLanes];  // [entries, 8], or where they are shuffled [8, 256]
  float scale[kByteLanes];
};

struct ByteInput {
  float scale;
  int64_t sum;  // of the rounded values
  int8_t high[kByteColumns + kByteTail];
  int8_t low[kByteColumns + kByteTail];
};

struct ByteScratch {
  ByteTable main, residual;
  Unpacker unpacker;
  uint32_t main_offsets[kRows * kChunk];
  uint32_t residual_offsets[kRows * kChunk];
};

inline bool bytes_fit(const LookupPart& part, int64_t tokens) {
  const int64_t larger = part.centroids > part.residual_centroids ? part.centroids : part.residual_centroids;
  return tokens == 1 && part.vector_len <= kByteLanes && larger <= kGathered && part.columns < kByteColumns;
}

VPTQ_INLINE bool shuffles(const LookupPart& part) {
  return part.centroids <= kShuffled && part.residual_centroids <= kShuffled;
}

VPTQ_INLINE __m256 entry_at(const void* codebook, Float dtype, int64_t at, __mmask8 there) {
  if (dtype == Float::kFloat32) return _mm256_maskz_loadu_ps(there, static_cast<const float*>(codebook) + at);
  const __m128i halves = _mm_maskz_loadu_epi16(there, static_cast<const uint16_t*>(codebook) + at);
  return (__m256)(dtype == Float::kFloat16 ? Widened<8, Float::kFloat16>::of(halves)
                                           : Widened<8, Float::kBFloat16>::of(halves));
}

inline void make_byte_table(const void* codebook, Float dtype, int64_t entries, int64_t vector_len, bool shuffled,
                            ByteTable& table) {
  const __mmask8 there = static_cast<__mmask8>((1u << vector_len) - 1);
  __m256 largest = _mm256_setzero_ps();
  for (int64_t k = 0; k < entries; ++k) {
    const __m256 entry = entry_at(codebook, dtype, k * vector_len, there);
    largest = _mm256_max_ps(largest, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), entry));
  }
  const __m256 scale = _mm256_mul_ps(largest, _mm256_set1_ps(1.0f / 127.0f));
  const __mmask8 used = _mm256_cmp_ps_mask(scale, _mm256_setzero_ps(), _CMP_GT_OQ);
  const __m256 inverse = _mm256_maskz_div_ps(used, _mm256_set1_ps(1.0f), scale);
  _mm256_storeu_ps(table.scale, scale);
  for (int64_t k = 0; k < entries; ++k) {
    const __m256 entry = _mm256_mul_ps(entry_at(codebook, dtype, k * vector_len, there), inverse);
    const __m256i rounded = _mm256_add_epi32(_mm256_cvtps_epi32(entry), _mm256_set1_epi32(128));
    uint8_t bytes[16];
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes), _mm256_cvtepi32_epi8(rounded));
    if (!shuffled) {
      std::memcpy(table.entries + k * kByteLanes, bytes, kByteLanes);
    } else {
      for (int64_t e = 0; e < vector_len; ++e) table.entries[e * kShuffled + k] = bytes[e];
    }
  }
}

inline int64_t byte_input_bytes(const LookupPart&, int64_t) { return sizeof(ByteInput); }

inline void prepare_byte_input(const LookupPart& part, const LookupInput& input, void* memory) {
  const float* x = input.x;
  const int64_t count = part.columns;
  ByteInput& bytes = *static_cast<ByteInput*>(memory);
  __m512 largest = _mm512_setzero_ps(), poison = _mm512_setzero_ps();  // zero, or NaN where the input is not finite
  for (int64_t j = 0; j < count; j += 16) {
    const __m512 some = _mm512_maskz_loadu_ps(first_lanes(count - j), x + j);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(some));
    poison = _mm512_add_ps(poison, _mm512_sub_ps(some, some));
  }
  const float size = _mm512_reduce_max_ps(largest);
  bytes.scale = size / 32639.0f + _mm512_reduce_add_ps(poison);  // 127 x 256 + 127
  const __m512 inverse = _mm512_set1_ps(size > 0.0f ? 32639.0f / size : 0.0f);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t j = 0; j < count + kByteTail; j += 16) {
    const __m512 some = _mm512_maskz_loadu_ps(first_lanes(count - j), x + j);
    const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(some, inverse));
    const __m128i low = _mm512_cvtepi32_epi8(value);
    const __m512i high = _mm512_srai_epi32(_mm512_sub_epi32(value, _mm512_cvtepi8_epi32(low)), 8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes.low + j), low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes.high + j), _mm512_cvtepi32_epi8(high));
    sum = _mm512_add_epi32(sum, value);
  }
  alignas(64) int32_t sums[16];
  _mm512_store_si512(sums, sum);
  bytes.sum = 0;
  for (int i = 0; i < 16; ++i) bytes.sum += sums[i];
}

VPTQ_INLINE float from_products(const ByteTable& table, const ByteInput& input, int64_t coordinate, int64_t high,
                                int64_t low) {
  return static_cast<float>(256 * high + low - 128 * input.sum) * table.scale[coordinate] * input.scale;
}

inline int64_t bytes_rows_per_tile(const LookupPart&, int64_t) { return kRows; }

inline int64_t byte_scratch_bytes(const LookupPart&, int64_t) { return sizeof(ByteScratch); }

inline void prepare_bytes(const LookupPart& part, void* memory) {
  ByteScratch& scratch = *static_cast<ByteScratch*>(memory);
  const bool shuffled = shuffles(part);
  make_byte_table(part.codebook, part.dtype, part.centroids, part.vector_len, shuffled, scratch.main);
  if (part.residual_codebook != nullptr) {
    make_byte_table(part.residual_codebook, part.dtype, part.residual_centroids, part.vector_len, shuffled,
                    scratch.residual);
  }
  scratch.unpacker = make_unpacker(part, {0, 0});
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
