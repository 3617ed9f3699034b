// A tile of the weight, decoded: a block of vector rows of a chunk of columns, [column, output row] in float32, so that a decoded vector is
// stored as it is.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int64_t kTileLanes = 64;    // output rows of a tile, where a vector is not longer
constexpr int64_t kTileColumns = 128;

VPTQ_INLINE int64_t tile_rows(int64_t vector_len) {
  const int64_t lanes = whole_vectors(vector_len);
  return lanes >= kTileLanes ? 1 : (kTileLanes - lanes) / vector_len + 1;
}

VPTQ_INLINE int64_t tile_stride(int64_t vector_len) {
  return (whole_vectors(vector_len) + kTileLanes - 1) / kTileLanes * kTileLanes;
}

// Entries are zero beyond their vector, so they may overlap the row that follows: it is stored later.
template <typename Books>
void decode_entries(Books books, int64_t rows, int64_t count, int64_t vector_len, int64_t pieces, int64_t stride, float* tile) {
  constexpr int W = Books::kWidth;
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t r = 0; r < rows; ++r) {
      float* out = tile + j * stride + r * vector_len;
      for (int64_t piece = 0; piece < (W < 16 ? 1 : pieces); ++piece) {
        store_floats<W>(books.load(r * kTileColumns + j, piece), out + piece * W);
      }
    }
  }
}

#if VPTQ_LANES == 16

// Where a vector fills its entry, whole registers: half to a quarter of the stores.
template <typename Books>
void decode_groups(Books books, int64_t count, int64_t stride, float* tile) {
  constexpr int kPer = 16 / Books::kWidth, kGroups = static_cast<int>(kTileLanes) / 16;
  for (int64_t j = 0; j < count; ++j) {
    for (int g = 0; g < kGroups; ++g) {
      store_floats<16>(books.load_group(g * kPer * kTileColumns + j, kTileColumns), tile + j * stride + g * 16);
    }
  }
}

#endif

inline void decode(const PreparedPart& prepared, Offsets offsets, int64_t rows, int64_t count, int64_t vector_len,
                   int64_t stride, float* tile) {
  const int64_t lanes = whole_vectors(vector_len), pieces = lanes < 16 ? 1 : lanes / 16;
  with_books(prepared, lanes, 0, offsets, [&](auto books) {
#if VPTQ_LANES == 16
    if (rows * vector_len == kTileLanes && lanes == vector_len && lanes <= 16) {
      decode_groups(books, count, stride, tile);
      return;
    }
#endif
    decode_entries(books, rows, count, vector_len, pieces, stride, tile);
  });
}

struct TileScratch {
  uint32_t* main;      // [rows, kTileColumns]
  uint32_t* residual;  // the same
  float* tile;         // [kTileColumns, stride]
};

VPTQ_INLINE int64_t tile_scratch_bytes(int64_t vector_len) {
  return 4 * kTileColumns * (2 * tile_rows(vector_len) + tile_stride(vector_len));
}

inline TileScratch tile_scratch(int64_t vector_len, uint8_t* memory) {
  const int64_t offsets = tile_rows(vector_len) * kTileColumns;
  uint32_t* main = reinterpret_cast<uint32_t*>(memory);
  return {main, main + offsets, reinterpret_cast<float*>(main + 2 * offsets)};
}

// Columns from `first`; returns how many there were.
inline int64_t decode_tile(const LookupPart& part, const PreparedPart& prepared, int64_t begin, int64_t rows, int64_t first,
                           const TileScratch& scratch) {
  const int64_t v = part.vector_len, stride = tile_stride(v), left = part.columns - first;
  const int64_t count = left < kTileColumns ? left : kTileColumns;
  const bool two = part.residual_codebook != nullptr;
  for (int64_t r = 0; r < rows; ++r) {
    read_offsets(part, prepared.unpacker, prepared.shifts(), begin + r, first, count,
                 {scratch.main + r * kTileColumns, two ? scratch.residual + r * kTileColumns : nullptr});
  }
  decode(prepared, {scratch.main, two ? scratch.residual : nullptr}, rows, count, v, stride, scratch.tile);
  return count;
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
