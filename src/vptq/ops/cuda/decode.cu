// One to eight tokens times a quantized layer, looked up from codebooks in shared memory.
//
// Compiled once for each kind of layer: VPTQ_KERNEL lists the parameters of `Kind`. A launch serves one layer, or up to
// three that read the same input. A block keeps its layer's codebooks, and the inputs of its slice of columns, for as long
// as it lives, and takes row blocks in turn; its warps share the columns of a row block, or take several row blocks at a
// time. Slices are short, because every block gathers its inputs, in the permutation's order, before its first lookup
// (ops/cuda_plan.py weighs that); what they sum to is added by a second kernel.
//
// A lane owns eight columns of a step of 256. It loads their indices, which are whole bytes at any width, a step ahead
// of the arithmetic. Sums are float32, and added in an order that depends on the layer, the number of tokens and the card
// alone.
//
// What binds is the rate of lookups, not bytes: hence as many copies of a codebook as fit (lookup.cuh), and kRows rows
// to a lane, which share its inputs.

template <class FLOAT, int LENGTH, int BITS, int RESIDUAL_BITS, int TOKENS_AT_ONCE, int COPIES, int RESIDUAL_COPIES>
struct Kind {
  using F = FLOAT;
  using Main = Book<F, LENGTH, BITS, COPIES>;
  using Residual = Book<F, LENGTH, RESIDUAL_BITS, RESIDUAL_COPIES>;
  using Indices = LaneIndices<BITS + RESIDUAL_BITS>;
  static constexpr int kLength = LENGTH, kTokens = TOKENS_AT_ONCE, kBits = BITS, kResidualBits = RESIDUAL_BITS;
  static constexpr int kVectorSums = LENGTH * TOKENS_AT_ONCE;
  static constexpr int kRows = kVectorSums <= 8 ? 4 : kVectorSums <= 32 ? 2 : 1;  // what a lane sums stays in registers
  static constexpr int kSums = kRows * kVectorSums;
  static constexpr int kWarps = kSums <= 48 ? 16 : 8;
  static constexpr int kThreads = kWarps * kLanes, kHalf = kThreads / 2;
  static constexpr int kHeld = (kSums + kLanes - 1) / kLanes;  // of the sums, by each lane at the end
};

using K = Kind<VPTQ_KERNEL>;

// Shared memory, in this order; ops/cuda_plan.py adds up the same.
struct Shared {
  K::Main::Piece* book;          // K::Main::kSharedBytes
  K::Residual::Piece* residual;  // K::Residual::kSharedBytes
  float* x;                      // [tokens, slice], scaled, each column in its `place`
  float* parts;                  // [2, warps, sums]
  float* shifted;                // [half of the warps, tokens]; the first line becomes the sum

  VPTQ_DEVICE Shared(char* at, int slice) {
    book = reinterpret_cast<K::Main::Piece*>(at);
    residual = reinterpret_cast<K::Residual::Piece*>(at += K::Main::kSharedBytes);
    x = reinterpret_cast<float*>(at += K::Residual::kSharedBytes);
    parts = x + K::kTokens * slice;
    shifted = parts + 2 * K::kWarps * K::kSums;
  }
};

// Where the input of a column lies: a lane loads its eight by fours, and lanes side by side load fours side by side.
VPTQ_DEVICE int place(int column) {
  const int lane = column % kStepColumns / kLaneColumns, four = column % kLaneColumns / 4;
  return column - column % kStepColumns + (four * kLanes + lane) * 4 + column % 4;
}

struct alignas(16) Four {
  float value[4];
};

// A warp's steps, in the order in which it takes them: the columns that are its own, row block by row block.
struct Walk {
  int block, step, first, end, across, stride;
  VPTQ_DEVICE void next() {
    step += across;
    if (step >= end) {
      step = first;
      block += stride;
    }
  }
};

// The slice's inputs times scales in quantized order, and the sums of inputs times column biases, one a token.
//
// The latter need no order, only that all slices together take every column once. By half of the block, of which this is
// thread `thread`; the block then has to meet, and to call `add_shifted`.
VPTQ_DEVICE void stage_input(const Shared& shared, const unsigned short* x, const Layer& layer, int tokens,
                             int in_features, int before, int count, int slice, int thread) {
  const unsigned short *const perm = layer.perm, *const scale = layer.scale, *const shift = layer.shift;
  float shifted[K::kTokens] = {};
  constexpr int kTogether = K::kTokens <= 2 ? 8 : 4;  // columns of a thread whose loads are on the way together
#pragma unroll 1
  for (int base = thread; base < count; base += kTogether * K::kHalf) {
    int column[kTogether], original[kTogether];
    float factor[kTogether], weight[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int next = base + i * K::kHalf;
      column[i] = next < count ? next : base;  // once more, since loads behind a branch would wait for each other
      original[i] = before + column[i];
      if (perm) original[i] = min(static_cast<int>(perm[original[i]]), in_features - 1);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      factor[i] = scale ? K::F::widen(scale[original[i]]) : 1.0f;
      weight[i] = shift ? K::F::widen(shift[before + column[i]]) : 0.0f;
    }
#pragma unroll
    for (int t = 0; t < K::kTokens; ++t) {
      const unsigned short* const token = x + static_cast<long long>(min(t, tokens - 1)) * in_features;
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const float moved = K::F::widen(token[original[i]]), unmoved = K::F::widen(token[before + column[i]]);
        shared.x[t * slice + place(column[i])] = factor[i] * moved;
        if (shift && (i == 0 || column[i] != base)) shifted[t] += weight[i] * unmoved;
      }
    }
  }
#pragma unroll
  for (int t = 0; t < K::kTokens; ++t) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) shifted[t] += swap_lanes(shifted[t], distance);
    if (thread % kLanes == 0) shared.shifted[thread / kLanes * K::kTokens + t] = shifted[t];
  }
}

VPTQ_DEVICE void add_shifted(const Shared& shared, int thread) {
  if (thread >= K::kTokens) return;
#pragma unroll 1
  for (int warp = 1; warp < K::kWarps / 2; ++warp) shared.shifted[thread] += shared.shifted[warp * K::kTokens + thread];
}

// The indices of the rows of a step.
struct StepIndices {
  K::Indices row[K::kRows];

  VPTQ_DEVICE void load(const unsigned* indices, const Walk& at, int num_rows, int line_length, bool wide, int lane) {
#pragma unroll
    for (int r = 0; r < K::kRows; ++r) {
      const long long number = min(at.block * K::kRows + r, num_rows - 1);
      row[r].load(indices + number * line_length, at.step, line_length, wide, lane);
    }
  }
};

// Adds what a lane's columns of a step give. All eight exist if WHOLE, so that their lookups are on the way together;
// else `valid` of them do. `x` is the first token's first input of the lane.
template <bool WHOLE>
VPTQ_DEVICE void multiply(const K::Main& main, const K::Residual& residual, const float* x, StepIndices indices,
                          int valid, int slice, int lane, float (&sums)[K::kSums]) {
#pragma unroll
  for (int r = 0; r < K::kRows; ++r) indices.row[r].align(lane);
  Four factors[K::kTokens];
#pragma unroll
  for (int c = 0; c < kLaneColumns; ++c) {
    if (!WHOLE && c >= valid) break;  // a vector times 0 is not 0 if it is infinite
    if (c % 4 == 0) {
#pragma unroll
      for (int t = 0; t < K::kTokens; ++t) factors[t] = *reinterpret_cast<const Four*>(x + t * slice + c * kLanes);
    }
#pragma unroll
    for (int r = 0; r < K::kRows; ++r) {
      const unsigned index = indices.row[r][c];
      unsigned pairs[K::kLength / 2];
      main.look_up(index & ((1u << K::kBits) - 1), pairs);
      if constexpr (K::kResidualBits > 0) {
        unsigned more[K::kLength / 2];
        residual.look_up(index >> K::kBits, more);
#pragma unroll
        for (int i = 0; i < K::kLength / 2; ++i) pairs[i] = K::F::add(pairs[i], more[i]);
      }
#pragma unroll
      for (int e = 0; e < K::kLength; ++e) {
        const float value = K::F::widen(pairs[e / 2] >> e % 2 * 16 & 0xFFFF);
#pragma unroll
        for (int t = 0; t < K::kTokens; ++t) {
          sums[(r * K::kTokens + t) * K::kLength + e] += factors[t].value[c % 4] * value;
        }
      }
    }
  }
}

// Sums over the lanes of a warp: at each distance a lane keeps half of its values and gives the others away.
//
// Afterwards it holds the totals `first` to `first + count - 1` in values[0...].
template <int N, int DISTANCE>
VPTQ_DEVICE void sum_lanes(float (&values)[K::kSums], int lane, int& first, int& count) {
  constexpr int kHalf = (N + 1) / 2;
  const bool upper = lane & DISTANCE;
#pragma unroll
  for (int i = 0; i < kHalf; ++i) {
    const float low = values[i], high = i + kHalf < N ? values[i + kHalf] : 0.0f;
    values[i] = (upper ? high : low) + swap_lanes(upper ? low : high, DISTANCE);
  }
  first += upper ? kHalf : 0;
  count = upper ? max(count - kHalf, 0) : min(count, kHalf);
  if constexpr (2 * DISTANCE < kLanes) sum_lanes<kHalf, 2 * DISTANCE>(values, lane, first, count);
}

// out = x W^T + bias of each layer, [tokens, out_features] one after the other; or parts of it in float32, those of each
// slice after the other's.
//
// The grid is (blocks of all layers, slices). `slice` columns, a multiple of kStepColumns, are a block's, and slices do
// not reach over a group's end. Of a block's warps `across` share the steps of a slice, which has at least so many, but
// for a last one.
extern "C" __global__ void __launch_bounds__(K::kThreads, 1)
decode(const unsigned short* __restrict__ x, unsigned short* __restrict__ out, float* __restrict__ parts, int tokens,
       int in_features, int group_size, int line_length, int slice, int slices_a_group, int across, int outputs,
       VPTQ_LAYER(0), VPTQ_LAYER(1), VPTQ_LAYER(2)) {
  long long before = static_cast<long long>(blockIdx.y) * outputs;  // in `parts`; else there is one slice
  int own_block = blockIdx.x;
  const Layer layer = own_layer({VPTQ_TAKE(0), VPTQ_TAKE(1), VPTQ_TAKE(2)}, tokens, own_block, before);
  const Shared shared(shared_memory(), slice);
  const int thread = threadIdx.x, warp = thread / kLanes, lane = thread % kLanes;
  const int group = blockIdx.y / slices_a_group, first = blockIdx.y % slices_a_group * slice;
  const int count = min(slice, group_size - first);
  const int at_once = K::kWarps / across, num_rows = layer.num_rows, out_features = layer.out_features;
  const int row_blocks = (num_rows + K::kRows - 1) / K::kRows;
  const unsigned* const indices = layer.indices + static_cast<long long>(group) * num_rows * line_length;
  const auto codebook = layer.codebook + static_cast<long long>(group) * K::Main::kEntries * K::kLength;
  const auto residual_codebook =
      layer.residual_codebook + static_cast<long long>(group) * K::Residual::kEntries * K::kLength;
  const bool wide = reinterpret_cast<unsigned long long>(indices) % 16 == 0 && line_length % 4 == 0;

  Walk walk;
  walk.first = walk.step = first / kStepColumns + warp % across;
  walk.end = (first + count + kStepColumns - 1) / kStepColumns;
  walk.across = across;
  walk.block = own_block * at_once + warp / across;
  walk.stride = layer.blocks * at_once;
  StepIndices ahead;
  ahead.load(indices, walk, num_rows, line_length, wide, lane);
  const K::Main main(codebook, shared.book, lane);
  const K::Residual residual(residual_codebook, shared.residual, lane);
  // Both wait for memory again and again, so side by side.
  if (thread < K::kHalf) {
    K::Main::fill<K::kHalf>(codebook, shared.book, thread);
    K::Residual::fill<K::kHalf>(residual_codebook, shared.residual, thread);
  } else {
    stage_input(shared, x, layer, tokens, in_features, group * group_size + first, count, slice, thread - K::kHalf);
  }
  __syncthreads();
  add_shifted(shared, thread);
  __syncthreads();

  int side = 0;
  for (int base = own_block * at_once; base < row_blocks; base += walk.stride, side ^= 1) {
    float sums[K::kSums] = {};
    for (const int block = walk.block; walk.block == block;) {
      const StepIndices now = ahead;
      const int before_lane = walk.step * kStepColumns - first;
      const int valid = count - before_lane - lane * kLaneColumns;
      const float* const inputs = shared.x + before_lane + lane * 4;
      walk.next();
      ahead.load(indices, walk, num_rows, line_length, wide, lane);
      if (valid >= kLaneColumns) {
        multiply<true>(main, residual, inputs, now, kLaneColumns, slice, lane, sums);
      } else {
        multiply<false>(main, residual, inputs, now, valid, slice, lane, sums);
      }
    }
    int from = 0, held = K::kSums;
    sum_lanes<K::kSums, 1>(sums, lane, from, held);
    float* const parts_now = shared.parts + side * K::kWarps * K::kSums;
#pragma unroll
    for (int i = 0; i < K::kHeld; ++i) {
      if (i < held) parts_now[warp * K::kSums + from + i] = sums[i];
    }
    __syncthreads();  // one a round: the next round writes the other side
#pragma unroll 1
    for (int i = thread; i < at_once * K::kSums; i += K::kThreads) {
      const int element = i % K::kLength, t = i / K::kLength % K::kTokens;
      const int row = base * K::kRows + i / (K::kLength * K::kTokens);
      const int output = row * K::kLength + element;
      if (t >= tokens || row >= num_rows || output >= out_features) continue;
      float total = shared.shifted[t];
      const float* part = parts_now + i / K::kSums * across * K::kSums + i % K::kSums;
#pragma unroll 1
      for (int w = 0; w < across; ++w) total += part[w * K::kSums];
      if (layer.bias && blockIdx.y == 0) total += K::F::widen(layer.bias[output]);
      const long long place = before + static_cast<long long>(t) * out_features + output;
      if (parts) {
        parts[place] = total;
      } else {
        out[place] = K::F::narrow(total);
      }
    }
  }
}

// out [outputs] = the sum of parts [slices, outputs] in their order.
extern "C" __global__ void add_parts(const float* __restrict__ parts, unsigned short* __restrict__ out, int slices,
                                     int outputs) {
  const int place = blockIdx.x * blockDim.x + threadIdx.x;
  if (place >= outputs) return;
  float total = 0.0f;
#pragma unroll 16  // loads that are on the way together
  for (int slice = 0; slice < slices; ++slice) total += parts[static_cast<long long>(slice) * outputs + place];
  out[place] = K::F::narrow(total);
}
