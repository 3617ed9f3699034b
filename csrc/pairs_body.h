// The pair of a main and a residual centroid whose sum is nearest, by comparing all pairs.
//
//     |x - c - r|^2 / 2 = |x|^2/2 - (x.c - |c|^2/2) - (x.r - |r|^2/2) + c.r
//
// The two brackets cost one product a centroid, c.r does not depend on x and is tabulated once: so a pair costs an
// addition and a max, whatever the vector length, where the sum of two entries would cost `dim` multiply-adds. The
// maximum over r is taken lane by lane over c, without an index; who it was is one more search among the residual
// centroids, for the one main centroid that won. Equal sums go to the lower main, then the lower residual index.

namespace vptq {
namespace VPTQ_ISA {
namespace {

// kPairTile * kPairBlocks maxima, the table's entries and the vectors' scores fit the register file.
constexpr int kPairTile = kLanes == 16 ? 4 : 2;
constexpr int kPairBlocks = kLanes == 16 ? 4 : 2;

// Prepared: the shift; main and residual centroids transposed, each below a row of -|c|^2/2; the table of -c.r.
struct PairLayout {
  int64_t dim, centroids, partners;
  int64_t width;          // centroids, padded with ones that score -inf
  int64_t partner_width;  // partners, likewise
  int64_t header_floats;

  explicit PairLayout(const StagesProblem& p)
      : dim(p.dim), centroids(p.main_centroids), partners(p.residual_centroids) {
    constexpr int64_t kStep = kLanes * kPairBlocks;
    width = (centroids + kStep - 1) / kStep * kStep;
    partner_width = (partners + kLanes - 1) / kLanes * kLanes;
    header_floats = (dim + 15) / 16 * 16;
  }

  int64_t main_at() const { return header_floats; }
  int64_t residual_at() const { return main_at() + (dim + 1) * width; }
  int64_t table_at() const { return residual_at() + (dim + 1) * partner_width; }
  int64_t prepared_floats() const { return (table_at() + partners * width + 15) / 16 * 16; }
  int64_t scratch_floats() const { return (kPairTile * (width + partner_width) + dim + 15) / 16 * 16; }
};

// [count, dim] -> [dim + 1, width]: minus half the squared norms, then the coordinates less `shift`.
void transpose(const float* book, const float* shift, int64_t dim, int64_t count, int64_t width, float* rows) {
  for (int64_t k = 0; k < width; ++k) {
    double square = 0;
    for (int64_t d = 0; d < dim; ++d) {
      const float value = k < count ? book[k * dim + d] - (shift ? shift[d] : 0.0f) : 0.0f;
      rows[(d + 1) * width + k] = value;
      square += static_cast<double>(value) * value;
    }
    rows[k] = k < count ? static_cast<float>(-square / 2) : -std::numeric_limits<float>::infinity();
  }
}

void prepare_pairs(const StagesProblem& p, float* prepared) {
  const PairLayout at(p);
  const NearestProblem main_only{nullptr, p.main, p.dim, p.main_centroids, 1, nullptr, nullptr};
  for (int64_t d = 0; d < p.dim; ++d) prepared[d] = middle(main_only, d);
  const float* main = prepared + at.main_at();
  transpose(p.main, prepared, p.dim, p.main_centroids, at.width, prepared + at.main_at());
  transpose(p.residual, nullptr, p.dim, p.residual_centroids, at.partner_width, prepared + at.residual_at());
  for (int64_t r = 0; r < p.residual_centroids; ++r) {
    float* row = prepared + at.table_at() + r * at.width;
    for (int64_t c = 0; c < at.width; ++c) row[c] = 0;
    for (int64_t d = 0; d < p.dim; ++d) {
      const float value = p.residual[r * p.dim + d];
      for (int64_t c = 0; c < at.width; ++c) row[c] -= value * main[(d + 1) * at.width + c];
    }
  }
}

// x.c - |c|^2/2 for all centroids of a transposed codebook.
VPTQ_INLINE void score_all(const float* x, const float* rows, int64_t dim, int64_t width, float* scores) {
  for (int64_t k = 0; k < width; k += kLanes) {
    Lanes sum = *reinterpret_cast<const Lanes*>(rows + k);
    for (int64_t d = 0; d < dim; ++d) sum += all(x[d]) * *reinterpret_cast<const Lanes*>(rows + (d + 1) * width + k);
    *reinterpret_cast<Lanes*>(scores + k) = sum;
  }
}

// Lowest index of the largest score; 0 where no score is a number.
VPTQ_INLINE int64_t best_of(const float* scores, int64_t width) {
  Lanes most = nothing();
  for (int64_t k = 0; k < width; k += kLanes) most = larger(*reinterpret_cast<const Lanes*>(scores + k), most);
  const float value = largest(most);
  for (int64_t k = 0; k < width; k += kLanes) {
    const uint32_t hits = at_least(*reinterpret_cast<const Lanes*>(scores + k), value);
    if (hits != 0 && value > kLowest) return k + __builtin_ctz(hits);
  }
  return 0;
}

// scores[t][c] += max over r of partner_scores[t][r] - c.r
VPTQ_INLINE void add_best_partners(const PairLayout& at, const float* table, const float* partner_scores,
                                   float* scores) {
  for (int64_t c = 0; c < at.width; c += kLanes * kPairBlocks) {
    Lanes best[kPairTile][kPairBlocks];
    for (int t = 0; t < kPairTile; ++t) {
      for (int b = 0; b < kPairBlocks; ++b) best[t][b] = nothing();
    }
    for (int64_t r = 0; r < at.partners; ++r) {
      const Lanes* row = reinterpret_cast<const Lanes*>(table + r * at.width + c);
      for (int t = 0; t < kPairTile; ++t) {
        const Lanes score = all(partner_scores[t * at.partner_width + r]);
        for (int b = 0; b < kPairBlocks; ++b) best[t][b] = larger(row[b] + score, best[t][b]);
      }
    }
    for (int t = 0; t < kPairTile; ++t) {
      Lanes* own = reinterpret_cast<Lanes*>(scores + t * at.width + c);
      for (int b = 0; b < kPairBlocks; ++b) own[b] += best[t][b];
    }
  }
}

void search_pairs(const StagesProblem& p, const float* prepared, float* scratch, const float* vectors, int64_t count,
                  int64_t* main, int64_t* residual) {
  const PairLayout at(p);
  const float* residual_rows = prepared + at.residual_at();
  float* scores = scratch;
  float* partner_scores = scores + kPairTile * at.width;
  float* moved = partner_scores + kPairTile * at.partner_width;
  for (int64_t start = 0; start < count; start += kPairTile) {
    const int64_t here = count - start < kPairTile ? count - start : kPairTile;
    for (int64_t t = 0; t < kPairTile; ++t) {
      const float* x = vectors + (start + (t < here ? t : 0)) * at.dim;
      for (int64_t d = 0; d < at.dim; ++d) moved[d] = x[d] - prepared[d];
      score_all(moved, prepared + at.main_at(), at.dim, at.width, scores + t * at.width);
      score_all(moved, residual_rows, at.dim, at.partner_width, partner_scores + t * at.partner_width);
    }
    add_best_partners(at, prepared + at.table_at(), partner_scores, scores);
    for (int64_t t = 0; t < here; ++t) {
      const int64_t winner = best_of(scores + t * at.width, at.width);
      const float* x = vectors + (start + t) * at.dim;
      for (int64_t d = 0; d < at.dim; ++d) moved[d] = x[d] - p.main[winner * at.dim + d];
      score_all(moved, residual_rows, at.dim, at.partner_width, partner_scores);
      main[start + t] = winner;
      residual[start + t] = best_of(partner_scores, at.partner_width);
    }
  }
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
