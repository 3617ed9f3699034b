// The nearest-centroid kernel, compiled once for each instruction set by kernels_{generic,avx2,avx512}.cpp.
//
// |x - c|^2 is smallest where score(x, c) = x.c - |c|^2/2 is largest, so one multiply-add per coordinate does it, with
// -|c|^2/2 as the accumulator's first value. The hot loop keeps only the best score of each lane over a "superblock"
// of centroids, which costs one max beside `dim` multiply-adds; tracking an index there would cost two more
// operations. Who scored it is found out afterwards:
//
//     score     tile of vectors x all superblocks -> maxima[vector][superblock][lane]         99% of the arithmetic
//     bound     the beam-th best of the maxima, or a little less: no winner can score lower
//     collect   score again the few superblocks that reach the bound; keep a sorted list of `beam`
//     finish    true distances of the winners, in double, and their order
//
// A score is computed by the same operations in the same order wherever it is computed, so equal scores are equal to
// the last bit and the lower index wins a tie. Codebook and vectors are shifted to the codebook's middle first:
// without that, data far from the origin would lose its digits to cancellation. The shift is a multiple of a power of
// two near the codebook's spread, so that small integers and their like stay exact.
//
// NaN and overflow: a centroid whose score is NaN or -inf is taken only when too few others are left, lowest index
// first. So indices are always valid and distinct, and a vector that holds NaN gets 0, 1, 2, ... at distance NaN.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int kBisections = 8;
constexpr float kLowest = -std::numeric_limits<float>::max();

// The `limit` best (score, index) pairs seen so far, best first. Offered in rising index order, so that an equal
// score, which must lose, goes behind.
struct TopList {
  float* scores;
  int32_t* indices;
  int64_t limit;
  int64_t size = 0;

  VPTQ_INLINE bool full() const { return size == limit; }
  VPTQ_INLINE float worst() const { return scores[size - 1]; }

  VPTQ_INLINE void offer(float score, int32_t index) {
    if (full()) {
      if (!(score > worst())) return;
      --size;
    }
    int64_t slot = size++;
    for (; slot > 0 && scores[slot - 1] < score; --slot) {
      scores[slot] = scores[slot - 1];
      indices[slot] = indices[slot - 1];
    }
    scores[slot] = score;
    indices[slot] = index;
  }
};

// Scores of one tile of vectors against two neighbouring blocks.
VPTQ_INLINE void score_pair(const int64_t dim, const float* tile, const float* block, Lanes (&a)[kTile],
                            Lanes (&c)[kTile]) {
  const Lanes* left = reinterpret_cast<const Lanes*>(block);
  const Lanes* right = reinterpret_cast<const Lanes*>(block + (dim + 1) * kLanes);
  for (int t = 0; t < kTile; ++t) a[t] = left[0], c[t] = right[0];
#pragma GCC unroll 2  // more, and GCC keeps so many coordinates in flight that accumulators spill
  for (int64_t d = 0; d < dim; ++d) {
    const Lanes l = left[d + 1], r = right[d + 1];
    for (int t = 0; t < kTile; ++t) {
      const Lanes x = all(tile[d * kTile + t]);
      a[t] += x * l;
      c[t] += x * r;
    }
  }
}

// maxima[vector][superblock] for one tile of vectors and `count` superblocks from `first` on.
VPTQ_INLINE void score_tile(const Layout& at, const int64_t dim, const float* tile, const float* superblocks,
                            int64_t first, int64_t count, float* maxima) {
  const float* block = superblocks + first * at.superblock_floats();
  for (int64_t s = first; s < first + count; ++s) {
    Lanes best[kTile], a[kTile], c[kTile];
    for (int t = 0; t < kTile; ++t) best[t] = nothing();
    for (int64_t b = 0; b < at.blocks; b += 2, block += 2 * at.block_floats) {
      score_pair(dim, tile, block, a, c);
      for (int t = 0; t < kTile; ++t) best[t] = larger(c[t], larger(a[t], best[t]));
    }
    for (int t = 0; t < kTile; ++t) reinterpret_cast<Lanes*>(maxima + t * at.maxima_floats())[s] = best[t];
  }
}

// The same where a superblock is one block: every score is kept.
VPTQ_INLINE void score_tile_fully(const Layout& at, const int64_t dim, const float* tile, const float* superblocks,
                                  int64_t first, int64_t count, float* maxima) {
  for (int64_t s = first; s < first + count; s += 2) {
    Lanes a[kTile], c[kTile];
    score_pair(dim, tile, superblocks + s * at.block_floats, a, c);
    for (int t = 0; t < kTile; ++t) {
      Lanes* scores = reinterpret_cast<Lanes*>(maxima + t * at.maxima_floats()) + s;
      scores[0] = larger(a[t], nothing());
      scores[1] = larger(c[t], nothing());
    }
  }
}

// A score that at least `beam` centroids reach, close to the beam-th best of all. The maxima belong to distinct
// centroids, and so do their lane-wise folds; bisection on how many folds reach a value needs no branch on data.
VPTQ_INLINE float bound_of(const Layout& at, const float* maxima, Lanes* folded) {
  const Lanes* entries = reinterpret_cast<const Lanes*>(maxima);
  const int64_t folds = at.fold_vectors();
  Lanes best_of_all = entries[0], worst_fold = all(-kLowest);
  for (int64_t f = 0; f < folds; ++f) {
    Lanes best = entries[f];
    for (int64_t s = f + folds; s < at.superblocks; s += folds) best = larger(entries[s], best);
    folded[f] = best;
    best_of_all = larger(best, best_of_all);
    worst_fold = worst_fold > best ? best : worst_fold;
  }
  float high = largest(best_of_all);
  if (at.beam == 1) return high > kLowest ? high : kLowest;
  if (folds * kLanes < at.beam) return kLowest;
  float low = -largest(-worst_fold);
  low = low > kLowest ? low : kLowest;
  high = high < -kLowest ? high : -kLowest;
  for (int step = 0; step < kBisections; ++step) {
    const float middle = low / 2 + high / 2;
    int64_t reached = 0;
    for (int64_t f = 0; f < folds; ++f) reached += __builtin_popcount(at_least(folded[f], middle));
    low = reached >= at.beam ? middle : low;
    high = reached >= at.beam ? high : middle;
  }
  return low;
}

VPTQ_INLINE void collect(const Layout& at, const int64_t dim, const float* x, const float* superblocks,
                         const float* maxima, float bound, TopList* top) {
  const Lanes* entries = reinterpret_cast<const Lanes*>(maxima);
  for (int64_t s = 0; s < at.superblocks; ++s) {
    if (__builtin_expect(at_least(entries[s], bound) == 0, 1)) continue;
    const float* block = superblocks + s * at.superblock_floats();
    for (int64_t b = 0; b < at.blocks; ++b, block += at.block_floats) {
      const Lanes* rows = reinterpret_cast<const Lanes*>(block);
      Lanes scores = at.blocks == 1 ? entries[s] : rows[0];
      for (int64_t d = 0; at.blocks != 1 && d < dim; ++d) scores += all(x[d * kTile]) * rows[d + 1];
      for (uint32_t hits = at_least(scores, bound); hits != 0; hits &= hits - 1) {
        const int lane = __builtin_ctz(hits);
        top->offer(scores[lane], static_cast<int32_t>((s * at.blocks + b) * kLanes + lane));
      }
    }
    if (top->full() && top->worst() > bound) bound = top->worst();
  }
}

VPTQ_INLINE bool contains(const TopList& top, int32_t index) {
  for (int64_t i = 0; i < top.size; ++i) {
    if (top.indices[i] == index) return true;
  }
  return false;
}

VPTQ_INLINE float squared_distance(const float* x, const float* c, const float* weights, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(x[d]) - static_cast<double>(c[d]);
    sum += difference * difference * (weights == nullptr ? 1.0 : static_cast<double>(weights[d]));
  }
  return static_cast<float>(sum);
}

VPTQ_INLINE void finish(const NearestProblem& p, const int64_t dim, TopList* top, int64_t vector) {
  for (int32_t next = 0; !top->full(); ++next) {
    if (!contains(*top, next)) top->indices[top->size++] = next;
  }
  const float* x = p.vectors + vector * dim;
  const float* weights = p.weighted ? p.weights + vector * dim : nullptr;
  int64_t* indices = p.indices + vector * p.beam;
  float* distances = p.distances + vector * p.beam;
  for (int64_t i = 0; i < top->size; ++i) {
    const int64_t index = top->indices[i];
    const float distance = squared_distance(x, p.codebook + index * dim, weights, dim);
    int64_t slot = i;
    for (; slot > 0; --slot) {
      const float above = distances[slot - 1];
      if (!(distance < above || (distance == above && index < indices[slot - 1]))) break;
      distances[slot] = above;
      indices[slot] = indices[slot - 1];
    }
    distances[slot] = distance;
    indices[slot] = index;
  }
}

VPTQ_INLINE void load_panel(const NearestProblem& p, const Layout& at, const int64_t dim, const float* shift,
                            int64_t begin, int64_t count, float* tiles) {
  const int64_t padded = (count + kTile - 1) / kTile * kTile;
  for (int64_t i = 0; i < padded; ++i) {
    float* x = tiles + i / kTile * at.tile_floats() + i % kTile;
    for (int64_t d = 0; d < dim; ++d) {
      const int64_t from = (begin + i) * dim + d;
      x[d * kTile] = i < count ? p.vectors[from] - shift[d] : 0.0f;
      if (!p.weighted) continue;
      const float weight = i < count ? p.weights[from] : 0.0f;
      x[d * kTile] *= weight;
      x[(dim + d) * kTile] = weight;
    }
  }
}

// `own` are the vectors' coordinates, `dim` those that are multiplied.
VPTQ_INLINE void run_dim(const NearestProblem& p, const int64_t own, const int64_t dim, const float* prepared,
                         float* scratch, int64_t begin, int64_t end) {
  const Layout at(p);
  const float* superblocks = prepared + at.header_floats;
  float* tiles = scratch;
  float* maxima = tiles + at.panel / kTile * at.tile_floats();
  Lanes* folded = reinterpret_cast<Lanes*>(maxima + at.panel * at.maxima_floats());
  float* scores = reinterpret_cast<float*>(folded + at.fold_vectors());
  int32_t* indices = reinterpret_cast<int32_t*>(scores + at.beam);
  // Blocks are scored in pairs, so where a superblock is one block their number must be even.
  const int64_t step = at.blocks == 1 ? 2 : 1;
  const int64_t fitting = kFirstLevelFloats / at.superblock_floats() / step * step;
  const int64_t slice = fitting > step ? fitting : step;

  for (int64_t start = begin; start < end; start += at.panel) {
    const int64_t count = end - start < at.panel ? end - start : at.panel;
    load_panel(p, at, own, prepared, start, count, tiles);
    for (int64_t first = 0; first < at.superblocks; first += slice) {
      const int64_t length = at.superblocks - first < slice ? at.superblocks - first : slice;
      for (int64_t i = 0; i < count; i += kTile) {
        const float* tile = tiles + i / kTile * at.tile_floats();
        float* rows = maxima + i * at.maxima_floats();
        if (at.blocks == 1) {
          score_tile_fully(at, dim, tile, superblocks, first, length, rows);
        } else {
          score_tile(at, dim, tile, superblocks, first, length, rows);
        }
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* best = maxima + i * at.maxima_floats();
      const float bound = bound_of(at, best, folded);
      TopList top{scores, indices, at.beam};
      collect(at, dim, tiles + i / kTile * at.tile_floats() + i % kTile, superblocks, best, bound, &top);
      finish(p, own, &top, start + i);
    }
  }
}

// The format's vector lengths get loops of a known length; any other still runs.
template <int kFactor>
VPTQ_INLINE void run_lengths(const NearestProblem& p, const float* prepared, float* scratch, int64_t begin,
                             int64_t end) {
  switch (p.dim) {
    case 1: return run_dim(p, 1, kFactor * 1, prepared, scratch, begin, end);
    case 2: return run_dim(p, 2, kFactor * 2, prepared, scratch, begin, end);
    case 4: return run_dim(p, 4, kFactor * 4, prepared, scratch, begin, end);
    case 6: return run_dim(p, 6, kFactor * 6, prepared, scratch, begin, end);
    case 8: return run_dim(p, 8, kFactor * 8, prepared, scratch, begin, end);
    case 10: return run_dim(p, 10, kFactor * 10, prepared, scratch, begin, end);
    case 12: return run_dim(p, 12, kFactor * 12, prepared, scratch, begin, end);
    case 16: return run_dim(p, 16, kFactor * 16, prepared, scratch, begin, end);
    default: return run_dim(p, p.dim, kFactor * p.dim, prepared, scratch, begin, end);
  }
}

void run(const NearestProblem& p, const float* prepared, float* scratch, int64_t begin, int64_t end) {
  if (p.weighted) return run_lengths<2>(p, prepared, scratch, begin, end);
  run_lengths<1>(p, prepared, scratch, begin, end);
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
