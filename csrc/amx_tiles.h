// The tile registers as the kernel uses them: sums [16 tokens, 64 outputs], an input [16 tokens, 32 columns], weights of 64 outputs.
//
// Processors with AMX are rare where tests run, so VPTQ_EMULATE_AMX (tests only) does what the manual says each instruction does, in
// plain C++. Everything around the instructions is then tested anywhere; the instructions themselves only where they exist.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int64_t kTileRows = 16;    // tokens
constexpr int64_t kTilePairs = 16;   // pairs of columns
constexpr int64_t kTileBytes = 1024;  // of weights: [pair, 16 outputs, 2]

#if defined(VPTQ_EMULATE_AMX)

struct EmulatedTiles {
  float sums[4][16][16];
  uint16_t input[16][32];
};

inline EmulatedTiles& tiles() {
  static thread_local EmulatedTiles all;
  return all;
}

inline void begin_tiles() {}
inline void end_tiles() {}

inline float without_subnormals(uint16_t stored) { return (stored & 0x7f80) == 0 ? 0.0f : bfloat_to_float(stored); }

inline void load_sums(const float* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    for (int t = 0; t < 4; ++t) std::memcpy(tiles().sums[t][row], from + row * stride + 16 * t, 64);
  }
}

inline void store_sums(float* to, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    for (int t = 0; t < 4; ++t) std::memcpy(to + row * stride + 16 * t, tiles().sums[t][row], 64);
  }
}

inline void load_input(const uint16_t* from, int64_t stride) {
  for (int row = 0; row < 16; ++row) std::memcpy(tiles().input[row], from + row * stride, 64);
}

inline void add_products(const uint16_t* weights) {
  for (int t = 0; t < 4; ++t) {
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 32; ++column) {
        for (int out = 0; out < 16; ++out) {
          const uint16_t weight = weights[t * 512 + column / 2 * 32 + 2 * out + column % 2];
          tiles().sums[t][row][out] += without_subnormals(tiles().input[row][column]) * without_subnormals(weight);
        }
      }
    }
  }
}

#else

struct alignas(64) TileConfiguration {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes_per_row[16];
  uint8_t rows[16];
};

// A thread's own, and what other libraries configure is gone: begin and end enclose one kernel call.
inline void begin_tiles() {
  TileConfiguration whole;
  std::memset(&whole, 0, sizeof whole);
  whole.palette = 1;
  for (int t = 0; t < 8; ++t) {
    whole.bytes_per_row[t] = 64;
    whole.rows[t] = 16;
  }
  // GCC 12 believes that the instruction reads a byte, and drops the stores of the others.
  asm volatile("" : : "r"(&whole) : "memory");
  _tile_loadconfig(&whole);
}

inline void end_tiles() { _tile_release(); }

inline void load_sums(const float* from, int64_t stride) {
  asm volatile("" : : : "memory");  // nor does it believe that tiles are loaded from memory: all stores come first
  _tile_loadd(0, from, stride * 4);
  _tile_loadd(1, from + 16, stride * 4);
  _tile_loadd(2, from + 32, stride * 4);
  _tile_loadd(3, from + 48, stride * 4);
}

inline void store_sums(float* to, int64_t stride) {
  _tile_stored(0, to, stride * 4);
  _tile_stored(1, to + 16, stride * 4);
  _tile_stored(2, to + 32, stride * 4);
  _tile_stored(3, to + 48, stride * 4);
}

inline void load_input(const uint16_t* from, int64_t stride) { _tile_loadd(4, from, stride * 2); }

inline void add_products(const uint16_t* weights) {
  _tile_loadd(5, weights, 64);
  _tile_dpbf16ps(0, 4, 5);
  _tile_loadd(6, weights + 512, 64);
  _tile_dpbf16ps(1, 4, 6);
  _tile_loadd(7, weights + 1024, 64);
  _tile_dpbf16ps(2, 4, 7);
  _tile_loadd(5, weights + 1536, 64);
  _tile_dpbf16ps(3, 4, 5);
}

#endif

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
