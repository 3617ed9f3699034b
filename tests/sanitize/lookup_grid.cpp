// Every lookup kernel on exactly sized buffers, for the address and undefined-behaviour sanitizers.
//
// Built and run by tests/kernels/test_sanitized.py. Each case draws a part of a layer at random (vector length, index widths, packed or
// not, dtype, sizes), computes y in double from the definition, and compares; a byte read or written outside a buffer ends the
// program. Prints the number of cases.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels.h"

using namespace vptq;

namespace {

std::mt19937 draw(7);

int64_t below(int64_t limit) { return static_cast<int64_t>(draw() % static_cast<uint32_t>(limit)); }

template <typename T>
struct Exact {  // no vector: its capacity would hide reads beyond its size
  explicit Exact(int64_t count) : size(count), data(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64))) {}
  ~Exact() { std::free(data); }
  int64_t size;
  T* data;
};

// The stored bytes alone, at an address that nothing else aligns: malloc gives redzones right behind them.
struct Bytes {
  explicit Bytes(int64_t count) : data(static_cast<uint8_t*>(std::malloc(static_cast<size_t>(count)))) {}
  ~Bytes() { std::free(data); }
  uint8_t* data;
};

struct Book {
  Book(int64_t entries, int64_t length, Float dtype)
      : stored(entries * length * float_bytes(dtype)), values(entries * length) {
    for (size_t i = 0; i < values.size(); ++i) {
      const int64_t half = dtype == Float::kBFloat16 ? 128 : 1024;  // what the dtype holds exactly, of several sizes
      const float value = std::ldexp(static_cast<float>(below(2 * half) - half) / half, static_cast<int>(-below(5)));
      values[i] = value;
      kernels_for(Isa::kGeneric).floats.round(&value, dtype, 1, stored.data + i * float_bytes(dtype));
    }
  }
  Bytes stored;
  std::vector<double> values;
};

void put_bits(uint8_t* row, int64_t at, uint64_t value, int bits) {
  for (int b = 0; b < bits; ++b) row[(at + b) / 8] |= static_cast<uint8_t>((value >> b & 1) << ((at + b) % 8));
}

void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

void check(Isa isa) {
  const LookupKernel *tiles = amx_kernel_for(isa), *bytes = byte_kernel_for(isa);
  const int64_t lengths[] = {1, 2, 3, 4, 6, 8, 10, 12, 16, 17, 40}, v = lengths[below(11)];
  const int64_t all_tokens[] = {1, 2, 3, 5, 9, 24, 25, 31}, tokens = all_tokens[below(8)];
  const Float dtype = static_cast<Float>(below(3));
  const bool packed = below(4) != 0, two = below(2) != 0;
  const int main_bits = static_cast<int>(1 + below(v > 8 ? 10 : 13)), residual_bits = two ? static_cast<int>(1 + below(9)) : 0;
  const int64_t entries = packed ? int64_t{1} << main_bits : 1 + below(700);
  const int64_t residual_entries = !two ? 0 : packed ? int64_t{1} << residual_bits : 1 + below(300);
  const int64_t columns = 1 + below(below(2) ? 20 : 600), rows = 1 + below(below(2) ? 4 : 70);
  const Book main(entries, v, dtype), residual(two ? residual_entries : 1, v, dtype);

  const int bits = main_bits + residual_bits;
  const int64_t row_bytes = packed ? (columns * bits + 31) / 32 * 4 : 2 * columns;
  const Bytes stream(rows * row_bytes), second(packed || !two ? 1 : rows * row_bytes);
  std::memset(stream.data, 0, static_cast<size_t>(rows * row_bytes));
  std::vector<int64_t> index(rows * columns), residual_index(rows * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t row = i / columns, j = i % columns;
    index[i] = below(8) == 0 ? entries - 1 : below(entries);
    residual_index[i] = two ? below(residual_entries) : 0;
    if (packed) {
      put_bits(stream.data + row * row_bytes, j * bits, static_cast<uint64_t>(index[i] | residual_index[i] << main_bits), bits);
    } else {
      const uint16_t a = static_cast<uint16_t>(index[i]), b = static_cast<uint16_t>(residual_index[i]);
      std::memcpy(stream.data + row * row_bytes + 2 * j, &a, 2);
      if (two) std::memcpy(second.data + row * row_bytes + 2 * j, &b, 2);
    }
  }

  const Exact<float> x(tokens * columns), y(tokens * rows * v);
  for (int64_t i = 0; i < x.size; ++i) x.data[i] = static_cast<float>(below(1 << 20) - (1 << 19)) / 131072.0f;
  std::memset(y.data, 0, static_cast<size_t>(y.size) * 4);
  const LookupPart part{main.stored.data, two ? residual.stored.data : nullptr, dtype, v, entries, residual_entries,
                        columns, stream.data, packed || !two ? nullptr : second.data, row_bytes,
                        packed ? main_bits : 0, packed ? residual_bits : 0};
  const bool in_tiles = tiles != nullptr && tiles->fits(part, tokens);
  const LookupKernel& kernel = in_tiles ? *tiles : kernels_for(isa).lookup;
  const Exact<uint8_t> scratch(kernel.scratch_bytes(part, tokens));
  const Exact<uint8_t> prepared(kernel.input_bytes(part, tokens));
  const LookupInput input{x.data, columns, tokens, prepared.data};
  kernel.prepare_input(part, input, prepared.data);
  kernel.prepare(part, scratch.data);
  const int64_t tile = kernel.rows_per_tile(part, tokens), half = (rows / 2 + tile - 1) / tile * tile;
  const int64_t cut = half < rows ? half : rows;
  kernel.run(part, input, y.data, rows * v, 0, cut, scratch.data);
  kernel.run(part, input, y.data, rows * v, cut, rows, scratch.data);

  if (bytes != nullptr && bytes->fits(part, tokens)) {  // what it computes is tested elsewhere
    const Exact<float> other(rows * v);
    const Exact<uint8_t> prepared_bytes(bytes->input_bytes(part, tokens));
    const LookupInput in_bytes{x.data, columns, tokens, prepared_bytes.data};
    bytes->prepare_input(part, in_bytes, prepared_bytes.data);
    const Exact<uint8_t> more(bytes->scratch_bytes(part, tokens));
    bytes->prepare(part, more.data);
    bytes->run(part, in_bytes, other.data, rows * v, 0, rows, more.data);
  }

  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t out = 0; out < rows * v; ++out) {
      double sum = 0.0, size = 0.0;
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t at = out / v * columns + j;
        double weight = main.values[index[at] * v + out % v];
        if (two) weight += residual.values[residual_index[at] * v + out % v];
        sum += weight * x.data[m * columns + j];
        size += std::fabs(weight * x.data[m * columns + j]);
      }
      if (!(std::fabs(y.data[m * rows * v + out] - sum) <= (in_tiles ? 3e-5 : 1e-5) * size + 1e-6)) fail("wrong result");
    }
  }
}

}  // namespace

int main(int count, char** arguments) {
  Isa isa;
  if (count != 2 || !choose_isa(&isa)) fail("usage: VPTQ_CPU_ISA=... lookup_grid CASES");
  const int cases = std::atoi(arguments[1]);
  for (int i = 0; i < cases; ++i) check(isa);
  std::printf("%d cases on %s\n", cases, isa_name(isa));
  return 0;
}
