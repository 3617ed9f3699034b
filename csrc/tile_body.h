// Three tokens and more: a tile of the weight is decoded once, then multiplied with all tokens.
//
// The tile holds a block of vector rows of a chunk of columns, [column, output row], so that a decoded vector is stored as it is
// and a register holds outputs, not inputs: no sum is ever taken across a register. It stays in the nearest caches, and the matrix is
// never in memory as a whole.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int64_t kTileLanes = 64;    // output rows of a tile, where a vector is not longer
constexpr int64_t kTileColumns = 128;
constexpr int kPanel = VPTQ_LANES == 16 ? 4 : 2;  // registers of outputs
constexpr int kTokens = 6;                        // tokens at a time: kPanel x kTokens sums, all in registers

VPTQ_INLINE int64_t tile_rows(int64_t vector_len) {
  const int64_t lanes = whole_vectors(vector_len);
  return lanes >= kTileLanes ? 1 : (kTileLanes - lanes) / vector_len + 1;
}

VPTQ_INLINE int64_t tile_stride(int64_t vector_len) {
  return (whole_vectors(vector_len) + kTileLanes - 1) / kTileLanes * kTileLanes;
}

// Entries are zero beyond their vector, so they may overlap the row that follows: it is stored, or added to, later.
template <int W, Float kDtype, bool kAdd>
void decode_entries(const uint8_t* entries, const uint32_t* offsets, int64_t rows, int64_t count, int64_t vector_len,
                    int64_t pieces, int64_t stride, float* tile) {
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t r = 0; r < rows; ++r) {
      const uint8_t* entry = entries + offsets[r * kTileColumns + j];
      float* out = tile + j * stride + r * vector_len;
      for (int64_t piece = 0; piece < (W < 16 ? 1 : pieces); ++piece) {
        typename Wide<W>::Floats floats = load_entry<W, kDtype>(entry + piece * W * float_bytes(kDtype));
        if (kAdd) floats += load_floats<W>(out + piece * W);
        store_floats<W>(floats, out + piece * W);
      }
    }
  }
}

#if VPTQ_LANES == 16

// Where a vector fills its entry, whole registers: half to a quarter of the stores.
template <int W, Float kDtype, bool kAdd>
void decode_groups(const uint8_t* entries, const uint32_t* offsets, int64_t count, int64_t stride, float* tile) {
  constexpr int kPer = 16 / W, kGroups = static_cast<int>(kTileLanes) / 16;
  for (int64_t j = 0; j < count; ++j) {
    for (int g = 0; g < kGroups; ++g) {
      const uint32_t* at = offsets + g * kPer * kTileColumns + j;
      Sixteen floats = Group<W, kDtype>::load(entries, at, kTileColumns);
      float* out = tile + j * stride + g * 16;
      if (kAdd) floats += load_floats<16>(out);
      store_floats<16>(floats, out);
    }
  }
}

#endif

template <bool kAdd>
void decode(const Table& table, const uint32_t* offsets, int64_t rows, int64_t count, int64_t vector_len,
            int64_t stride, float* tile) {
  const int64_t lanes = whole_vectors(vector_len), pieces = lanes < 16 ? 1 : lanes / 16;
#if VPTQ_LANES == 16
  if (rows * vector_len == kTileLanes && lanes == vector_len && lanes <= 16) {
    with_entry(lanes, table.dtype, [&](auto entry) {
      using E = decltype(entry);
      decode_groups<E::kWidth, E::kFloat, kAdd>(table.entries, offsets, count, stride, tile);
    });
    return;
  }
#endif
  with_entry(lanes, table.dtype, [&](auto entry) {
    using E = decltype(entry);
    decode_entries<E::kWidth, E::kFloat, kAdd>(table.entries, offsets, rows, count, vector_len, pieces, stride, tile);
  });
}

// sums [M, stride] += x [M, count] tile [count, stride], for one panel of outputs.
template <int M>
void multiply_panel(const float* tile, int64_t stride, const float* x, int64_t x_stride, int64_t count, float* sums) {
  Lanes sum[M][kPanel];
  for (int m = 0; m < M; ++m) {
    for (int p = 0; p < kPanel; ++p) sum[m][p] = load_floats<kLanes>(sums + m * stride + p * kLanes);
  }
  for (int64_t j = 0; j < count; ++j) {
    Lanes weights[kPanel];
    for (int p = 0; p < kPanel; ++p) weights[p] = load_floats<kLanes>(tile + j * stride + p * kLanes);
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m) {
      const float factor = x[m * x_stride + j];
      for (int p = 0; p < kPanel; ++p) sum[m][p] += weights[p] * factor;
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int p = 0; p < kPanel; ++p) store_floats<kLanes>(sum[m][p], sums + m * stride + p * kLanes);
  }
}

typedef void (*MultiplyPanel)(const float*, int64_t, const float*, int64_t, int64_t, float*);

inline void multiply_tile(const float* tile, int64_t stride, const float* x, int64_t x_stride, int64_t tokens,
                          int64_t count, float* sums) {
  constexpr MultiplyPanel kMultiply[kTokens + 1] = {nullptr,           multiply_panel<1>, multiply_panel<2>, multiply_panel<3>,
                                                    multiply_panel<4>, multiply_panel<5>, multiply_panel<6>};
  for (int64_t m = 0; m < tokens; m += kTokens) {
    const int64_t some = tokens - m < kTokens ? tokens - m : kTokens;
    for (int64_t lane = 0; lane < stride; lane += kPanel * kLanes) {
      kMultiply[some](tile + lane, stride, x + m * x_stride, x_stride, count, sums + m * stride + lane);
    }
  }
}

struct TileScratch {
  uint32_t* main;      // [rows, kTileColumns]
  uint32_t* residual;  // the same
  float* tile;         // [kTileColumns, stride]
  float* sums;         // [kMaxTokens, stride]
};

VPTQ_INLINE int64_t tile_scratch_bytes(int64_t vector_len) {
  const int64_t offsets = 2 * tile_rows(vector_len) * kTileColumns;
  return 4 * (offsets + (kTileColumns + kMaxTokens) * tile_stride(vector_len));
}

inline TileScratch tile_scratch(int64_t vector_len, uint8_t* memory) {
  const int64_t offsets = tile_rows(vector_len) * kTileColumns;
  uint32_t* main = reinterpret_cast<uint32_t*>(memory);
  float* tile = reinterpret_cast<float*>(main + 2 * offsets);
  return {main, main + offsets, tile, tile + kTileColumns * tile_stride(vector_len)};
}

inline void tile_block(const LookupPart& part, const Unpacker& unpacker, const Table& main, const Table& residual, const LookupInput& input,
                       float* y, int64_t y_stride, int64_t begin, int64_t rows, const TileScratch& scratch) {
  const int64_t v = part.vector_len, stride = tile_stride(v);
  const bool two = part.residual_codebook != nullptr;
  const Shifts shifts{main.shift, residual.shift};
  std::memset(scratch.sums, 0, static_cast<size_t>(input.tokens * stride) * 4);
  for (int64_t first = 0; first < part.columns; first += kTileColumns) {
    const int64_t count = part.columns - first < kTileColumns ? part.columns - first : kTileColumns;
    for (int64_t r = 0; r < rows; ++r) {
      read_offsets(part, unpacker, shifts, begin + r, first, count,
                   {scratch.main + r * kTileColumns, two ? scratch.residual + r * kTileColumns : nullptr});
    }
    decode<false>(main, scratch.main, rows, count, v, stride, scratch.tile);
    if (two) decode<true>(residual, scratch.residual, rows, count, v, stride, scratch.tile);
    multiply_tile(scratch.tile, stride, input.x + first, input.stride, input.tokens, count, scratch.sums);
  }
  for (int64_t m = 0; m < input.tokens; ++m) {
    float* out = y + m * y_stride + begin * v;
    for (int64_t lane = 0; lane < rows * v; ++lane) out[lane] += scratch.sums[m * stride + lane];
  }
}

inline void run_tiles(const LookupPart& part, const Unpacker& unpacker, const Table& main, const Table& residual, const LookupInput& input,
                      float* y, int64_t y_stride, int64_t begin, int64_t end, uint8_t* memory) {
  const TileScratch scratch = tile_scratch(part.vector_len, memory);
  const int64_t step = tile_rows(part.vector_len);
  // Lanes that no vector fills are multiplied too. What lies there must not be subnormal, as old offsets read as floats
  // are: microcode does those multiplications, and an evaluation at v6-k4096 took ten minutes more in them.
  std::memset(scratch.tile, 0, static_cast<size_t>(kTileColumns * tile_stride(part.vector_len)) * 4);
  for (int64_t row = begin; row < end; row += step) {
    tile_block(part, unpacker, main, residual, input, y, y_stride, row, end - row < step ? end - row : step, scratch);
  }
}

// What LookupKernel names.

struct PreparedPart {
  Table main, residual;
  Unpacker unpacker;
};

constexpr int64_t kPreparedBytes = (sizeof(PreparedPart) + 63) / 64 * 64;

VPTQ_INLINE int64_t tables_bytes(const LookupPart& part) {
  return table_bytes(part.dtype, part.centroids, part.vector_len) +
         table_bytes(part.dtype, part.residual_centroids, part.vector_len);
}

inline bool lookup_fits(const LookupPart&, int64_t) { return true; }

inline int64_t lookup_rows_per_tile(const LookupPart& part, int64_t tokens) {
  return tokens <= kFusedTokens ? kRows : tile_rows(part.vector_len);
}

inline int64_t lookup_scratch_bytes(const LookupPart& part, int64_t tokens) {
  const int64_t fused = static_cast<int64_t>(sizeof(FusedScratch));
  return kPreparedBytes + tables_bytes(part) + (tokens <= kFusedTokens ? fused : tile_scratch_bytes(part.vector_len));
}

inline void prepare_lookup(const LookupPart& part, const LookupInput&, void* scratch) {
  uint8_t* memory = static_cast<uint8_t*>(scratch) + kPreparedBytes;
  PreparedPart& prepared = *static_cast<PreparedPart*>(scratch);
  prepared.main = make_table(part.codebook, part.dtype, part.centroids, part.vector_len, memory);
  prepared.residual = prepared.main;
  if (part.residual_codebook != nullptr) {
    memory += table_bytes(part.dtype, part.centroids, part.vector_len);
    prepared.residual =
        make_table(part.residual_codebook, part.dtype, part.residual_centroids, part.vector_len, memory);
  }
  prepared.unpacker = make_unpacker(part, {prepared.main.shift, prepared.residual.shift});
}

inline void run_lookup(const LookupPart& part, const LookupInput& input, float* y, int64_t y_stride, int64_t begin,
                       int64_t end, void* scratch) {
  const PreparedPart& prepared = *static_cast<PreparedPart*>(scratch);
  uint8_t* memory = static_cast<uint8_t*>(scratch) + kPreparedBytes + tables_bytes(part);
  if (input.tokens <= kFusedTokens) {
    run_fused(part, prepared.unpacker, prepared.main, prepared.residual, input, y, y_stride, begin, end,
              *reinterpret_cast<FusedScratch*>(memory));
  } else {
    run_tiles(part, prepared.unpacker, prepared.main, prepared.residual, input, y, y_stride, begin, end, memory);
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
