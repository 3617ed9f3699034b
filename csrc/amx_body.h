// Three tokens and more where the processor multiplies tiles of bfloat16 (AMX).
//
// A tile of the weight is decoded to float32 as tile_body.h does, then split in two bfloat16, w = high + low, of 17 bits together; so is
// the input, whose low halves count as further tokens. float32 sums of all four products: the error of an output is below
// 2^-16 sum |w x|, less than the rounding of either 16-bit dtype. Halves that are zero are left out: those of a lone codebook
// in bfloat16, and of inputs that are bfloat16 without scaling. The instructions take subnormal numbers for zero.

namespace vptq {
namespace VPTQ_ISA {
namespace {

// Where a prototype on such a processor crossed the lookup kernels; not measured with this code (docs/performance.md).
constexpr int64_t kFewestTokens = 3;
constexpr int64_t kBlockColumns = 2 * kTilePairs;    // columns of one product
constexpr int64_t kPanelWords = 4 * kTileBytes / 2;  // of weights: kTileLanes outputs x 32 columns

VPTQ_INLINE int64_t whole_blocks(int64_t columns) { return (columns + kBlockColumns - 1) / kBlockColumns; }

VPTQ_INLINE int64_t whole_rows(int64_t tokens) { return (tokens + kTileRows - 1) / kTileRows * kTileRows; }

// [a0 b0 a1 b1 ...], each rounded to bfloat16.
VPTQ_INLINE __m512i pairs_of(Sixteen a, Sixteen b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20,
                                         4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}

// What rounding `value` to `high` left. An infinity leaves nothing.
VPTQ_INLINE Sixteen rest_of(Sixteen value, __m512i high) {
  const __m512 rest = _mm512_sub_ps((__m512)value, (__m512)high);
  return (Sixteen)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(rest, rest, _CMP_ORD_Q), rest);
}

struct AmxInput {
  int64_t rows;    // the tokens, and once more where their low halves are not all zero
  int64_t stride;  // in columns, whole blocks
  alignas(64) uint16_t x[];
};

inline int64_t amx_input_bytes(const LookupPart& part, int64_t tokens) {
  return static_cast<int64_t>(sizeof(AmxInput)) + whole_rows(2 * tokens) * whole_blocks(part.columns) * kBlockColumns * 2;
}

inline void prepare_amx_input(const LookupPart& part, const LookupInput& input, void* memory) {
  AmxInput& prepared = *static_cast<AmxInput*>(memory);
  prepared.stride = whole_blocks(part.columns) * kBlockColumns;
  __m256i any_low = _mm256_setzero_si256();
  for (int64_t m = 0; m < input.tokens; ++m) {
    uint16_t *high = prepared.x + m * prepared.stride, *low = high + input.tokens * prepared.stride;
    for (int64_t j = 0; j < prepared.stride; j += 16) {
      const __m512 value = _mm512_maskz_loadu_ps(first_lanes(part.columns - j), input.x + m * input.stride + j);
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
      const Sixteen rest = rest_of((Sixteen)value, _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
      const __m256i rest_rounded = (__m256i)_mm512_cvtneps_pbh((__m512)rest);
      any_low = _mm256_or_si256(any_low, rest_rounded);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + j), rounded);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + j), rest_rounded);
    }
  }
  prepared.rows = _mm256_testz_si256(any_low, any_low) ? input.tokens : 2 * input.tokens;
  uint16_t* end = prepared.x + prepared.rows * prepared.stride;
  std::memset(end, 0, static_cast<size_t>((whole_rows(prepared.rows) - prepared.rows) * prepared.stride) * 2);
}

struct AmxScratch {
  TileScratch decoded;
  uint16_t* high;  // [panel, block of columns, 4 tiles]
  uint16_t* low;   // the same
  float* sums;     // [rows, stride]
};

// Of a codebook that bfloat16 holds, no low half is left; of a sum of two there is.
VPTQ_INLINE bool has_low(const LookupPart& part) {
  return part.dtype != Float::kBFloat16 || part.residual_codebook != nullptr;
}

// tile [count, stride] in the order of the weights' tiles. Columns up to a whole block are zero.
inline void split_tile(const float* tile, int64_t stride, int64_t blocks, bool two, const AmxScratch& scratch) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int64_t lane = 0; lane < stride; lane += 16) {
    const int64_t at = lane / kTileLanes * blocks * kPanelWords + lane % kTileLanes / 16 * (kTileBytes / 2);
    for (int64_t pair = 0; pair < blocks * kTilePairs; ++pair) {
      const int64_t to = at + pair / kTilePairs * kPanelWords + pair % kTilePairs * 32;
      const Sixteen a = load_floats<16>(tile + 2 * pair * stride + lane);
      const Sixteen b = load_floats<16>(tile + (2 * pair + 1) * stride + lane);
      const __m512i high = pairs_of(a, b);
      _mm512_storeu_si512(scratch.high + to, high);
      if (!two) continue;
      const Sixteen rest_a = rest_of(a, _mm512_slli_epi32(high, 16));
      _mm512_storeu_si512(scratch.low + to, pairs_of(rest_a, rest_of(b, _mm512_and_si512(high, upper))));
    }
  }
}

// sums [rows, stride] += input [rows, columns of the chunk] weights.
inline void multiply_split(const AmxInput& input, int64_t first, int64_t blocks, int64_t stride, bool two,
                           const AmxScratch& scratch) {
  for (int64_t lane = 0; lane < stride; lane += kTileLanes) {
    const int64_t panel = lane / kTileLanes * blocks * kPanelWords;
    for (int64_t row = 0; row < input.rows; row += kTileRows) {
      float* sums = scratch.sums + row * stride + lane;
      load_sums(sums, stride);
      for (int64_t block = 0; block < blocks; ++block) {
        load_input(input.x + row * input.stride + first + block * kBlockColumns, input.stride);
        add_products(scratch.high + panel + block * kPanelWords);
        if (two) add_products(scratch.low + panel + block * kPanelWords);
      }
      store_sums(sums, stride);
    }
  }
}

inline void amx_block(const LookupPart& part, const PreparedPart& prepared, const AmxInput& input, int64_t tokens, float* y,
                      int64_t y_stride, int64_t begin, int64_t rows, const AmxScratch& scratch) {
  const int64_t stride = tile_stride(part.vector_len);
  const bool two = has_low(part);
  std::memset(scratch.sums, 0, static_cast<size_t>(whole_rows(input.rows) * stride) * 4);
  for (int64_t first = 0; first < part.columns; first += kTileColumns) {
    const int64_t count = decode_tile(part, prepared, begin, rows, first, scratch.decoded), blocks = whole_blocks(count);
    std::memset(scratch.decoded.tile + count * stride, 0, static_cast<size_t>((blocks * kBlockColumns - count) * stride) * 4);
    split_tile(scratch.decoded.tile, stride, blocks, two, scratch);
    multiply_split(input, first, blocks, stride, two, scratch);
  }
  for (int64_t m = 0; m < input.rows; ++m) {
    float* out = y + m % tokens * y_stride + begin * part.vector_len;
    for (int64_t lane = 0; lane < rows * part.vector_len; ++lane) out[lane] += scratch.sums[m * stride + lane];
  }
}

inline bool amx_fits(const LookupPart& part, int64_t tokens) {
  return tokens >= kFewestTokens && part.dtype != Float::kFloat32;
}

inline int64_t amx_rows_per_tile(const LookupPart& part, int64_t) { return tile_rows(part.vector_len); }

inline int64_t amx_scratch_bytes(const LookupPart& part, int64_t tokens) {
  const int64_t stride = tile_stride(part.vector_len);
  return prepared_bytes(part) + tile_scratch_bytes(part.vector_len) +
         2 * kTileColumns * stride * 2 + whole_rows(2 * tokens) * stride * 4;
}

inline void run_amx(const LookupPart& part, const LookupInput& input, float* y, int64_t y_stride, int64_t begin,
                    int64_t end, void* memory) {
  const PreparedPart& prepared = *static_cast<PreparedPart*>(memory);
  uint8_t* decoded = static_cast<uint8_t*>(memory) + prepared_bytes(part);
  uint16_t* high = reinterpret_cast<uint16_t*>(decoded + tile_scratch_bytes(part.vector_len));
  const int64_t step = tile_rows(part.vector_len), words = kTileColumns * tile_stride(part.vector_len);
  const AmxScratch scratch{tile_scratch(part.vector_len, decoded), high, high + words,
                           reinterpret_cast<float*>(high + 2 * words)};
  begin_tiles();
  for (int64_t row = begin; row < end; row += step) {
    const int64_t rows = end - row < step ? end - row : step;
    amx_block(part, prepared, *static_cast<const AmxInput*>(input.prepared), input.tokens, y, y_stride, row, rows, scratch);
  }
  end_tiles();
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
