// A few tokens: entries of several vector rows side by side in one register, multiplied with up to eight tokens.
//
// Where tokens share a lookup the multiplications are what costs, and they should fill their registers. AVX-512 only.

#if VPTQ_LANES == 16

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int kGroupTokens = 8;  // at a time: 2 registers of entries x 8 tokens of sums, and 8 of inputs

// sums [kRows * W / 16, tokens, 16] += entries at offsets [kRows, kChunk] times x [tokens, count], for up to M tokens.
template <int M, typename Books>
void multiply_groups(Books books, const float* x, int64_t x_stride, int64_t tokens, int64_t count, float* sums,
                     int64_t sums_stride) {
  constexpr int kPer = 16 / Books::kWidth, kRegisters = M > 4 ? 2 : 4, kGroups = kRows / kPer;
  const float* inputs[M];
  for (int m = 0; m < M; ++m) inputs[m] = x + (m < tokens ? m : tokens - 1) * x_stride;
  for (int group = 0; group < kGroups; group += kRegisters) {
    constexpr int kUsed = kRegisters < kGroups ? kRegisters : kGroups;
    const int64_t first = group * kPer * kChunk;
    Sixteen sum[kUsed][M];
    for (int g = 0; g < kUsed; ++g) {
      for (int m = 0; m < M; ++m) sum[g][m] = Sixteen{};
    }
    for (int64_t j = 0; j < count; ++j) {
      Sixteen entry[kUsed];
      for (int g = 0; g < kUsed; ++g) entry[g] = books.load_group(first + g * kPer * kChunk + j, kChunk);
      for (int m = 0; m < M; ++m) {
        const float factor = inputs[m][j];
        for (int g = 0; g < kUsed; ++g) sum[g][m] += entry[g] * factor;
      }
    }
    for (int g = 0; g < kUsed; ++g) {
      for (int m = 0; m < M && m < tokens; ++m) {
        float* at = sums + (group + g) * sums_stride + m * 16;
        store_floats<16>(load_floats<16>(at) + sum[g][m], at);
      }
    }
  }
}

// All tokens, kGroupTokens at a time or fewer, with the same offsets.
template <typename Books>
void multiply_tokens(const Books& books, const LookupInput& input, int64_t first, int64_t count, float* sums) {
  const int64_t step = even_pass(input.tokens, kGroupTokens);
  const auto multiply = step > 4 ? multiply_groups<8, Books> : multiply_groups<4, Books>;
  for (int64_t m = 0; m < input.tokens; m += step) {
    const int64_t some = input.tokens - m < step ? input.tokens - m : step;
    multiply(books, input.x + m * input.stride + first, input.stride, some, count, sums + m * 16, input.tokens * 16);
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq

#endif
