// How the nearest-centroid kernel lays out its codebook and its scratch memory; what the sizes are and why.
//
// Prepared codebook: the shift (see nearest_body.h), then blocks of kLanes centroids, transposed: first the lanes'
// -|c|^2/2, then one row of lanes a coordinate. Blocks are grouped into superblocks, padded with centroids that
// score -inf. Where distances are weighted -|c|^2/2 differs from vector to vector, and is a product as well:
// score = sum of (w x)[d] c[d] + sum of w[d] (-c[d]^2/2), so that centroids and vectors have 2 dim coordinates.

namespace vptq {
namespace VPTQ_ISA {
namespace {

// Vectors scored together: 2 * kTile accumulators, kTile maxima and a few operands fit the register file.
constexpr int kTile = VPTQ_TILE;
constexpr int64_t kFirstLevelFloats = 6 * 1024;     // share of L1 that a slice of the codebook may take
constexpr int64_t kSecondLevelFloats = 192 * 1024;  // share of L2 that the maxima of a panel may take
constexpr int64_t kMaxPanel = 128 / kTile * kTile;
constexpr double kKeepAll = 1.5;      // below this superblock size, keeping all scores beats scoring some again
constexpr int64_t kFoldsPerWinner = 6;  // more make the bound tighter and dearer

struct Layout {
  int64_t dim;  // coordinates of what is multiplied
  int64_t beam, centroids;
  int64_t blocks;       // blocks of kLanes centroids in a superblock; 1 or even
  int64_t superblocks;  // the codebook, padded
  int64_t block_floats;
  int64_t header_floats;  // the shift, padded to a whole vector
  int64_t panel;          // vectors whose maxima are held at once; a multiple of kTile

  explicit Layout(const NearestProblem& p) : dim(p.weighted ? 2 * p.dim : p.dim), beam(p.beam), centroids(p.centroids) {
    // Reading the maxima costs about 3 operations a superblock, scoring one again blocks * (dim + 1): their sum is
    // least at the square root.
    const int64_t all_blocks = (centroids + kLanes - 1) / kLanes;
    const double ideal = std::sqrt(3.0 * static_cast<double>(all_blocks) / static_cast<double>(beam * (dim + 1)));
    blocks = ideal < kKeepAll ? 1 : 2 * static_cast<int64_t>(ideal / 2 + 0.5);
    superblocks = blocks == 1 ? (all_blocks + 1) / 2 * 2 : (all_blocks + blocks - 1) / blocks;
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
    const int64_t wanted = (kFoldsPerWinner * beam + kLanes - 1) / kLanes;
    return wanted < superblocks ? wanted : superblocks;
  }
};

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
      if (p.weighted) column[(p.dim + d + 1) * kLanes] = -value * value / 2;
      square += p.weighted ? 0.0 : static_cast<double>(value) * value;
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
  return at.panel / kTile * at.tile_floats() + at.panel * at.maxima_floats() +
         at.fold_vectors() * kLanes + 2 * at.beam;
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
