// The nearest-centroid kernel, compiled once for each instruction set by nearest_{generic,avx2,avx512}.cpp.
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

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int kLanes = VPTQ_LANES;
constexpr int kTile = VPTQ_TILE;  // vectors scored together: kTile x 2 accumulators fill the register file
constexpr int64_t kFirstLevelFloats = 6 * 1024;    // share of L1 that a slice of the codebook may take
constexpr int64_t kSecondLevelFloats = 192 * 1024;  // share of L2 that the maxima of a panel may take
constexpr int64_t kMaxPanel = 128;
constexpr float kLowest = -std::numeric_limits<float>::max();

typedef float Lanes __attribute__((vector_size(VPTQ_LANES * 4), may_alias));

#define VPTQ_INLINE inline __attribute__((always_inline))

// Bit l is set where lane l of `scores` is at least `bound`; never for NaN.
VPTQ_INLINE uint32_t at_least(Lanes scores, float bound) {
#if VPTQ_LANES == 16
  return _mm512_cmp_ps_mask((__m512)scores, _mm512_set1_ps(bound), _CMP_GE_OQ);
#elif VPTQ_LANES == 8
  return static_cast<uint32_t>(
      _mm256_movemask_ps(_mm256_cmp_ps((__m256)scores, _mm256_set1_ps(bound), _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= static_cast<uint32_t>(scores[lane] >= bound) << lane;
  return bits;
#endif
}

// A NaN in `scores` loses; GCC and Clang turn the comparison into one max instruction.
VPTQ_INLINE Lanes larger(Lanes scores, Lanes best) { return scores > best ? scores : best; }

VPTQ_INLINE Lanes all(float value) { return Lanes{} + value; }

struct Layout {
  int64_t dim, beam, centroids;
  int64_t blocks;       // blocks of kLanes centroids in a superblock; even
  int64_t superblocks;  // the codebook, padded
  int64_t block_floats;
  int64_t header_floats;  // the shift, padded to a whole vector
  int64_t panel;          // vectors whose maxima are held at once; a multiple of kTile

  explicit Layout(const NearestProblem& p) : dim(p.dim), beam(p.beam), centroids(p.centroids) {
    // Reading the maxima costs about 3 operations a superblock, scoring one again blocks * (dim + 1): their sum is
    // least at the square root.
    const int64_t all_blocks = (centroids + kLanes - 1) / kLanes;
    const double ideal = std::sqrt(3.0 * static_cast<double>(all_blocks) / static_cast<double>(beam * (dim + 1)));
    blocks = 2 * static_cast<int64_t>(ideal / 2 + 0.5);
    if (blocks < 2) blocks = 2;
    superblocks = (all_blocks + blocks - 1) / blocks;
    block_floats = (dim + 1) * kLanes;
    header_floats = (dim + 15) / 16 * 16;
    panel = kSecondLevelFloats / (superblocks * kLanes) / kTile * kTile;
    if (panel < kTile) panel = kTile;
    if (panel > kMaxPanel) panel = kMaxPanel;
  }

  int64_t superblock_floats() const { return blocks * block_floats; }
  int64_t maxima_floats() const { return superblocks * kLanes; }
  int64_t tile_floats() const { return (dim * kTile + 15) / 16 * 16; }
  // Enough lane-wise folds of the maxima that their beam-th best is close to the beam-th best of all.
  int64_t fold_vectors() const {
    const int64_t wanted = (4 * beam + kLanes - 1) / kLanes;
    return wanted < superblocks ? wanted : superblocks;
  }
};

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

// maxima[vector][superblock] for one tile of vectors and `count` superblocks from `first` on.
VPTQ_INLINE void score_tile(const Layout& at, const int64_t dim, const float* tile, const float* superblocks,
                            int64_t first, int64_t count, float* maxima) {
  const float* block = superblocks + first * at.superblock_floats();
  for (int64_t s = first; s < first + count; ++s) {
    Lanes best[kTile];
    for (int t = 0; t < kTile; ++t) best[t] = all(-std::numeric_limits<float>::infinity());
    for (int64_t b = 0; b < at.blocks; b += 2, block += 2 * at.block_floats) {
      const Lanes* left = reinterpret_cast<const Lanes*>(block);
      const Lanes* right = reinterpret_cast<const Lanes*>(block + (dim + 1) * kLanes);
      Lanes a[kTile], c[kTile];
      for (int t = 0; t < kTile; ++t) a[t] = left[0], c[t] = right[0];
      for (int64_t d = 0; d < dim; ++d) {
        const Lanes l = left[d + 1], r = right[d + 1];
        for (int t = 0; t < kTile; ++t) {
          const Lanes x = all(tile[d * kTile + t]);
          a[t] += x * l;
          c[t] += x * r;
        }
      }
      for (int t = 0; t < kTile; ++t) best[t] = larger(c[t], larger(a[t], best[t]));
    }
    for (int t = 0; t < kTile; ++t) {
      *reinterpret_cast<Lanes*>(maxima + t * at.maxima_floats() + s * kLanes) = best[t];
    }
  }
}

// No more than beam - 1 centroids can score above what this returns and still have it be a bound that winners reach.
VPTQ_INLINE float bound_of(const Layout& at, const float* maxima, float* fold_scores, int32_t* fold_indices) {
  const Lanes* entries = reinterpret_cast<const Lanes*>(maxima);
  const int64_t folds = at.fold_vectors();
  TopList top{fold_scores, fold_indices, at.beam};
  for (int64_t f = 0; f < folds; ++f) {
    Lanes best = entries[f];
    for (int64_t s = f + folds; s < at.superblocks; s += folds) best = larger(entries[s], best);
    for (int lane = 0; lane < kLanes; ++lane) top.offer(best[lane], 0);
  }
  return top.full() && top.worst() > kLowest ? top.worst() : kLowest;
}

VPTQ_INLINE void collect(const Layout& at, const int64_t dim, const float* x, const float* superblocks,
                         const float* maxima, float bound, TopList* top) {
  const Lanes* entries = reinterpret_cast<const Lanes*>(maxima);
  for (int64_t s = 0; s < at.superblocks; ++s) {
    if (__builtin_expect(at_least(entries[s], bound) == 0, 1)) continue;
    const float* block = superblocks + s * at.superblock_floats();
    for (int64_t b = 0; b < at.blocks; ++b, block += at.block_floats) {
      const Lanes* rows = reinterpret_cast<const Lanes*>(block);
      Lanes scores = rows[0];
      for (int64_t d = 0; d < dim; ++d) scores += all(x[d * kTile]) * rows[d + 1];
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

VPTQ_INLINE float squared_distance(const float* x, const float* c, int64_t dim) {
  double sum = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const double difference = static_cast<double>(x[d]) - static_cast<double>(c[d]);
    sum += difference * difference;
  }
  return static_cast<float>(sum);
}

VPTQ_INLINE void finish(const NearestProblem& p, const int64_t dim, TopList* top, int64_t vector) {
  for (int32_t next = 0; !top->full(); ++next) {
    if (!contains(*top, next)) top->indices[top->size++] = next;
  }
  const float* x = p.vectors + vector * dim;
  int64_t* indices = p.indices + vector * p.beam;
  float* distances = p.distances + vector * p.beam;
  for (int64_t i = 0; i < top->size; ++i) {
    const int64_t index = top->indices[i];
    const float distance = squared_distance(x, p.codebook + index * dim, dim);
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
    for (int64_t d = 0; d < dim; ++d) x[d * kTile] = i < count ? p.vectors[(begin + i) * dim + d] - shift[d] : 0.0f;
  }
}

VPTQ_INLINE void run_dim(const NearestProblem& p, const int64_t dim, const float* prepared, float* scratch,
                         int64_t begin, int64_t end) {
  const Layout at(p);
  const float* superblocks = prepared + at.header_floats;
  float* tiles = scratch;
  float* maxima = tiles + at.panel / kTile * at.tile_floats();
  float* scores = maxima + at.panel * at.maxima_floats();
  int32_t* indices = reinterpret_cast<int32_t*>(scores + at.beam);
  const int64_t slice = kFirstLevelFloats / at.superblock_floats() > 1 ? kFirstLevelFloats / at.superblock_floats() : 1;

  for (int64_t start = begin; start < end; start += at.panel) {
    const int64_t count = end - start < at.panel ? end - start : at.panel;
    load_panel(p, at, dim, prepared, start, count, tiles);
    for (int64_t first = 0; first < at.superblocks; first += slice) {
      const int64_t length = at.superblocks - first < slice ? at.superblocks - first : slice;
      for (int64_t i = 0; i < count; i += kTile) {
        score_tile(at, dim, tiles + i / kTile * at.tile_floats(), superblocks, first, length,
                   maxima + i * at.maxima_floats());
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* own = maxima + i * at.maxima_floats();
      const float bound = bound_of(at, own, scores, indices);
      TopList top{scores, indices, at.beam};
      collect(at, dim, tiles + i / kTile * at.tile_floats() + i % kTile, superblocks, own, bound, &top);
      finish(p, dim, &top, start + i);
    }
  }
}

// The format's vector lengths get loops of a known length; any other still runs.
void run(const NearestProblem& p, const float* prepared, float* scratch, int64_t begin, int64_t end) {
  switch (p.dim) {
    case 1: return run_dim(p, 1, prepared, scratch, begin, end);
    case 2: return run_dim(p, 2, prepared, scratch, begin, end);
    case 4: return run_dim(p, 4, prepared, scratch, begin, end);
    case 6: return run_dim(p, 6, prepared, scratch, begin, end);
    case 8: return run_dim(p, 8, prepared, scratch, begin, end);
    case 10: return run_dim(p, 10, prepared, scratch, begin, end);
    case 12: return run_dim(p, 12, prepared, scratch, begin, end);
    case 16: return run_dim(p, 16, prepared, scratch, begin, end);
    default: return run_dim(p, p.dim, prepared, scratch, begin, end);
  }
}

// Middle of coordinate d over the codebook, rounded to a power of two no larger than the codebook's spread there.
float middle(const NearestProblem& p, int64_t d) {
  float low = p.codebook[d], high = low;
  for (int64_t k = 1; k < p.centroids; ++k) {
    const float value = p.codebook[k * p.dim + d];
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  const double spread = static_cast<double>(high) - low;
  if (!std::isfinite(spread)) return 0.0f;
  if (spread == 0) return low;
  int exponent;
  std::frexp(spread, &exponent);
  const double step = std::ldexp(1.0, exponent - 1);
  return static_cast<float>(std::nearbyint((static_cast<double>(low) + high) / 2 / step) * step);
}

void prepare(const NearestProblem& p, float* prepared) {
  const Layout at(p);
  for (int64_t d = 0; d < p.dim; ++d) prepared[d] = middle(p, d);
  for (int64_t k = 0; k < at.superblocks * at.blocks * kLanes; ++k) {
    float* column = prepared + at.header_floats + k / kLanes * at.block_floats + k % kLanes;
    double square = 0;
    for (int64_t d = 0; d < p.dim; ++d) {
      const float value = k < p.centroids ? p.codebook[k * p.dim + d] - prepared[d] : 0.0f;
      column[(d + 1) * kLanes] = value;
      square += static_cast<double>(value) * value;
    }
    column[0] = k < p.centroids ? static_cast<float>(-square / 2) : -std::numeric_limits<float>::infinity();
  }
}

int64_t codebook_floats(const NearestProblem& p) {
  const Layout at(p);
  return at.header_floats + at.superblocks * at.superblock_floats();
}

int64_t scratch_floats(const NearestProblem& p) {
  const Layout at(p);
  return at.panel / kTile * at.tile_floats() + at.panel * at.maxima_floats() + 2 * at.beam;
}

#undef VPTQ_INLINE

}  // namespace

extern const NearestKernel kNearest;
const NearestKernel kNearest = {codebook_floats, scratch_floats, prepare, run};

}  // namespace VPTQ_ISA
}  // namespace vptq
