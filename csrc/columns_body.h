// Columns one after another for a range of vectors; see columns.h and vptq/ops/columns.py for what is computed.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int kCoupledAtOnce = 4;

// Scratch of one tile: a column's targets, the same in the units of the codebook, the chosen indices, and the tile's
// errors: of all columns where they are coupled. Those are kept apart from the output because its rows may lie a power
// of two apart, which one set of the cache would have to hold.
struct ColumnsScratch {
  int64_t stride;  // floats of one column of a tile
  int64_t *main, *residual;
  float *targets, *vectors, *errors, *search;
  int64_t taken;

  ColumnsScratch(const ColumnsProblem& p, float* memory) {
    stride = whole_lines(kColumnTile * p.stages.dim);
    Pieces pieces{memory};
    main = pieces.integers(kColumnTile);
    residual = pieces.integers(kColumnTile);
    targets = pieces.floats(stride);
    vectors = pieces.floats(stride);
    errors = pieces.floats(p.coupling == nullptr ? stride : p.columns * stride);
    search = pieces.floats(0);
    taken = pieces.taken;
  }
};

int64_t columns_scratch_floats(const ColumnsProblem& p, const StagesProblem& tail) {
  const int64_t whole = stages_scratch_floats(p.stages), cut = p.tail() == 0 ? 0 : stages_scratch_floats(tail);
  return ColumnsScratch(p, nullptr).taken + (whole > cut ? whole : cut);
}

// targets[i..i + blocks) += the errors of the columns before, each times its coupling with column `column`.
VPTQ_INLINE void couple_blocks(const float* weights, int64_t column, const ColumnsScratch& room, int64_t i,
                               const int blocks) {
  Lanes sum[kCoupledAtOnce];
  for (int b = 0; b < blocks; ++b) sum[b] = reinterpret_cast<const Lanes*>(room.targets + i)[b];
  for (int64_t q = 0; q < column; ++q) {
    const Lanes* error = reinterpret_cast<const Lanes*>(room.errors + q * room.stride + i);
    const Lanes weight = all(weights[q]);
    for (int b = 0; b < blocks; ++b) sum[b] += weight * error[b];
  }
  for (int b = 0; b < blocks; ++b) reinterpret_cast<Lanes*>(room.targets + i)[b] = sum[b];
}

// Whole vectors to the end, over the padding: a scalar rest would round otherwise, and results depend on the tiling.
VPTQ_INLINE void couple(const ColumnsProblem& p, int64_t column, int64_t width, const ColumnsScratch& room) {
  const float* weights = p.coupling + column * p.columns;
  int64_t i = 0;
  for (; i + kCoupledAtOnce * kLanes <= width; i += kCoupledAtOnce * kLanes) {
    couple_blocks(weights, column, room, i, kCoupledAtOnce);
  }
  for (; i < width; i += kLanes) couple_blocks(weights, column, room, i, 1);
}

VPTQ_INLINE float entry(const StagesProblem& stages, int64_t main, int64_t residual, int64_t d) {
  const float value = stages.main[main * stages.dim + d];
  return stages.residual == nullptr ? value : value + stages.residual[residual * stages.dim + d];
}

// Whether the vector's present centroids are at least as near to x as those just found.
VPTQ_INLINE bool keeps(const ColumnsProblem& p, const float* x, int64_t first, int64_t rows, int64_t old_main, int64_t old_residual,
                       int64_t main, int64_t residual) {
  float found = 0, kept = 0;
  for (int64_t d = 0; d < rows; ++d) {
    const float now = x[d] - entry(p.stages, main, residual, d);
    const float before = x[d] - entry(p.stages, old_main, old_residual, d);
    const float weight = p.row_weights == nullptr ? 1.0f : p.row_weights[first + d];
    found += weight * now * now;
    kept += weight * before * before;
  }
  return found >= kept;
}

VPTQ_INLINE void settle(const ColumnsProblem& p, int64_t column, int64_t begin, int64_t end,
                        const ColumnsScratch& room) {
  const int64_t dim = p.stages.dim;
  float* errors = room.errors + (p.coupling == nullptr ? 0 : column * room.stride);
  for (int64_t vector = begin; vector < end; ++vector) {
    const int64_t at = column * p.vectors() + vector, first = vector * dim;
    const int64_t rows = p.rows - first < dim ? p.rows - first : dim;
    const float* x = room.vectors + (vector - begin) * dim;
    int64_t main = room.main[vector - begin], residual = p.residual == nullptr ? 0 : room.residual[vector - begin];
    const int64_t old_residual = p.residual == nullptr ? 0 : p.residual[at];
    if (p.present != nullptr && keeps(p, x, first, rows, p.main[at], old_residual, main, residual)) {
      main = p.main[at];
      residual = old_residual;
    }
    p.main[at] = main;
    if (p.residual != nullptr) p.residual[at] = residual;
    for (int64_t d = 0; d < rows; ++d) {
      const int64_t out = column * p.rows + first + d;
      const float value = entry(p.stages, main, residual, d) * p.scale[column] + p.shift[column];
      const int64_t local = first + d - begin * dim;
      const float error = value - (p.present == nullptr ? room.targets[local] : p.present[out]);
      p.values[out] = value;
      p.errors[out] = error;
      errors[local] = error;
    }
  }
}

void run_tile(const ColumnsProblem& p, const StagesProblem& tail, const float* prepared, const float* tail_prepared,
              const ColumnsScratch& room, int64_t begin, int64_t end) {
  const int64_t dim = p.stages.dim, first = begin * dim;
  const int64_t width = (end * dim < p.rows ? end * dim : p.rows) - first;
  const bool cut = end * dim > p.rows;
  const int64_t whole = end - begin - (cut ? 1 : 0);
  for (int64_t column = 0; column < p.columns; ++column) {
    const float* base = p.base + column * p.rows + first;
    std::memcpy(room.targets, base, static_cast<size_t>(width) * sizeof(float));
    if (p.coupling != nullptr) couple(p, column, width, room);
    for (int64_t i = 0; i < width; ++i) room.vectors[i] = (room.targets[i] - p.shift[column]) / p.scale[column];
    const float* weights = p.row_weights == nullptr ? nullptr : p.row_weights + first;
    search_stages(p.stages, prepared, room.search, room.vectors, weights, whole, room.main, room.residual);
    if (cut) {
      const float* last = weights == nullptr ? nullptr : weights + whole * dim;
      search_stages(tail, tail_prepared, room.search, room.vectors + whole * dim, last, 1, room.main + whole,
                    room.residual + whole);
    }
    settle(p, column, begin, end, room);
  }
}

void run_columns(const ColumnsProblem& p, const StagesProblem& tail, const float* prepared, const float* tail_prepared,
                 float* scratch, int64_t begin, int64_t end) {
  const ColumnsScratch room(p, scratch);
  std::memset(scratch, 0, static_cast<size_t>(room.taken) * sizeof(float));  // padding is computed with
  for (int64_t start = begin; start < end; start += kColumnTile) {
    run_tile(p, tail, prepared, tail_prepared, room, start, end - start < kColumnTile ? end : start + kColumnTile);
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
