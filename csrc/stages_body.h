// How the centroids of one or two codebooks are looked for: the nearest, all pairs, or a beam.

namespace vptq {
namespace VPTQ_ISA {
namespace {

constexpr int64_t kCandidatesAtOnce = 2048;

NearestProblem main_problem(const StagesProblem& p) {
  const int64_t beam = p.residual == nullptr ? 1 : p.beam;
  return {nullptr, p.main, p.dim, p.main_centroids, beam, nullptr, nullptr, p.weighted};
}

NearestProblem residual_problem(const StagesProblem& p) {
  return {nullptr, p.residual, p.dim, p.residual_centroids, 1, nullptr, nullptr, p.weighted};
}

int64_t whole_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

// Hands out pieces of one buffer, each on its own cache lines; without a buffer it only adds up what is needed.
struct Pieces {
  float* memory;
  int64_t taken = 0;

  float* floats(int64_t count) {
    float* piece = memory == nullptr ? nullptr : memory + taken;
    taken += whole_lines(count);
    return piece;
  }
  int64_t* integers(int64_t count) { return reinterpret_cast<int64_t*>(floats(2 * count)); }
};

// Scratch of the beam: for each of some vectors `beam` candidates, what they leave, and the partner of each.
struct BeamScratch {
  int64_t vectors;  // at once
  int64_t *candidates, *partners;
  float *distances, *rests, *weights, *nearest;
  int64_t taken;

  BeamScratch(const StagesProblem& p, float* memory) {
    const int64_t beam = main_problem(p).beam;
    vectors = kCandidatesAtOnce / beam > 1 ? kCandidatesAtOnce / beam : 1;
    Pieces pieces{memory};
    distances = pieces.floats(vectors * beam);
    candidates = p.residual == nullptr ? nullptr : pieces.integers(vectors * beam);
    partners = p.residual == nullptr ? nullptr : pieces.integers(vectors * beam);
    rests = p.residual == nullptr ? nullptr : pieces.floats(vectors * beam * p.dim);
    weights = p.residual == nullptr || !p.weighted ? nullptr : pieces.floats(vectors * beam * p.dim);
    nearest = pieces.floats(0);
    taken = pieces.taken;
  }
};

int64_t stages_prepared_floats(const StagesProblem& p) {
  if (p.all_pairs()) return PairLayout(p).prepared_floats();
  const int64_t main = whole_lines(codebook_floats(main_problem(p)));
  return p.residual == nullptr ? main : main + whole_lines(codebook_floats(residual_problem(p)));
}

int64_t stages_scratch_floats(const StagesProblem& p) {
  if (p.all_pairs()) return PairLayout(p).scratch_floats();
  const int64_t main = scratch_floats(main_problem(p));
  const int64_t residual = p.residual == nullptr ? 0 : scratch_floats(residual_problem(p));
  return BeamScratch(p, nullptr).taken + whole_lines(main > residual ? main : residual);
}

void prepare_stages(const StagesProblem& p, float* prepared) {
  if (p.all_pairs()) return prepare_pairs(p, prepared);
  prepare(main_problem(p), prepared);
  if (p.residual != nullptr) {
    prepare(residual_problem(p), prepared + whole_lines(codebook_floats(main_problem(p))));
  }
}

void search_nearest(const StagesProblem& p, const float* prepared, const BeamScratch& room, const float* vectors,
                    const float* weights, int64_t count, int64_t* main) {
  NearestProblem problem = main_problem(p);
  for (int64_t start = 0; start < count; start += room.vectors) {
    problem.vectors = vectors + start * p.dim;
    if (p.weighted) problem.weights = weights + start * p.dim;
    problem.indices = main + start;
    problem.distances = room.distances;
    run(problem, prepared, room.nearest, 0, count - start < room.vectors ? count - start : room.vectors);
  }
}

void search_beam(const StagesProblem& p, const float* prepared, const BeamScratch& room, const float* vectors,
                 const float* weights, int64_t count, int64_t* main, int64_t* residual) {
  NearestProblem first = main_problem(p), second = residual_problem(p);
  const float* residual_prepared = prepared + whole_lines(codebook_floats(first));
  first.indices = room.candidates;
  first.distances = room.distances;
  second.vectors = room.rests;
  second.weights = room.weights;
  second.indices = room.partners;
  second.distances = room.distances;
  for (int64_t start = 0; start < count; start += room.vectors) {
    const int64_t here = count - start < room.vectors ? count - start : room.vectors;
    first.vectors = vectors + start * p.dim;
    if (p.weighted) first.weights = weights + start * p.dim;
    run(first, prepared, room.nearest, 0, here);
    for (int64_t i = 0; i < here * first.beam; ++i) {
      const float* x = first.vectors + i / first.beam * p.dim;
      const float* c = p.main + room.candidates[i] * p.dim;
      for (int64_t d = 0; d < p.dim; ++d) room.rests[i * p.dim + d] = x[d] - c[d];
      if (!p.weighted) continue;
      std::memcpy(room.weights + i * p.dim, first.weights + i / first.beam * p.dim, p.dim * sizeof(float));
    }
    run(second, residual_prepared, room.nearest, 0, here * first.beam);
    for (int64_t i = 0; i < here; ++i) {
      int64_t best = i * first.beam;
      for (int64_t j = best + 1; j < (i + 1) * first.beam; ++j) {
        if (room.distances[j] < room.distances[best]) best = j;
      }
      main[start + i] = room.candidates[best];
      residual[start + i] = room.partners[best];
    }
  }
}

void search_stages(const StagesProblem& p, const float* prepared, float* scratch, const float* vectors,
                   const float* weights, int64_t count, int64_t* main, int64_t* residual) {
  if (p.all_pairs()) return search_pairs(p, prepared, scratch, vectors, count, main, residual);
  const BeamScratch room(p, scratch);
  if (p.residual == nullptr) return search_nearest(p, prepared, room, vectors, weights, count, main);
  search_beam(p, prepared, room, vectors, weights, count, main, residual);
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
