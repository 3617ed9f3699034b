// From packed indices to a vector's values: a lane's share of an index row, and codebooks in shared or global memory.

constexpr int kLanes = 32;
constexpr int kLaneColumns = 8;  // consecutive columns of one lane: their indices are whole bytes at any width
constexpr int kStepColumns = kLanes * kLaneColumns;

// Words that are loaded together.
template <int N>
struct alignas(4 * N) Words {
  unsigned word[N];
};

// The indices of a lane's eight columns, BITS each, in registers.
template <int BITS>
struct LaneIndices {
  static constexpr int kWords = (BITS + 3) / 4;
  static constexpr int kVector = BITS % 16 == 0 ? 4 : BITS % 8 == 0 ? 2 : 1;  // words that a lane's share aligns
  static constexpr bool kWhole = BITS % 4 == 0;  // every lane's share begins with a word
  unsigned word[kWords + !kWhole];

  // From step `step` of a row of `length` words; what lies beyond its end is not read. 16 bytes align `wide` rows.
  VPTQ_DEVICE void load(const unsigned* row, int step, int length, bool wide, int lane) {
    const int first = (step * kLanes + lane) * BITS / 4;
    if (kVector > 1 && wide) {
#pragma unroll
      for (int i = 0; i < kWords; i += kVector) {
        const auto some = *reinterpret_cast<const Words<kVector>*>(row + min(first + i, length - kVector));
#pragma unroll
        for (int j = 0; j < kVector; ++j) word[i + j] = some.word[j];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWords + !kWhole; ++i) word[i] = row[min(first + i, length - 1)];
    }
  }

  // To be called once before indices are taken; apart from `load`, so that nothing waits for what is loaded ahead.
  VPTQ_DEVICE void align(int lane) {
    if constexpr (!kWhole) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) word[i] = straddling(word[i], word[i + 1], lane * BITS % 4 * 8);
    }
  }

  // What stands at bit `first` and above. The caller unrolls, so that all of this is known when compiling.
  VPTQ_DEVICE unsigned above(int first) const {
    const int at = first / 32, shift = first % 32;
    if (shift + BITS <= 32) return word[at] >> shift;
    return straddling(word[at], word[at + 1 < kWords ? at + 1 : at], shift);
  }
  VPTQ_DEVICE unsigned operator[](int column) const {
    return BITS == 32 ? word[column] : above(column * BITS) & ((1ull << BITS) - 1);
  }
};

// How vectors of V are cut for loads: into pieces of 16 bytes where they fill them, or nearly, else of 8.
template <int V>
struct Cut {
  static constexpr int kFloats = V % 8 == 0 || V == 6 ? 8 : 4;
  static constexpr int kPieces = (V + kFloats - 1) / kFloats;
  using Piece = Words<kFloats / 2>;

  // Piece `p` of a stored vector; what is beyond its end is 0.
  static VPTQ_DEVICE Piece read(const unsigned short* vector, int p) {
    if constexpr (V % kFloats == 0) {
      return reinterpret_cast<const Piece*>(vector)[p];
    } else {
      Piece piece;
#pragma unroll
      for (int i = 0; i < kFloats / 2; ++i) {
        const int element = p * kFloats + 2 * i;
        piece.word[i] = element < V ? *reinterpret_cast<const unsigned*>(vector + element) : 0;
      }
      return piece;
    }
  }
};

// A codebook of 2^BITS vectors.
//
// COPIES of it lie in shared memory, one piece of each copy beside the other: with 8 of 16 bytes, or 16 of 8, every lane
// has banks of its own, and no two lookups of a phase collide. 0 copies: it stays in global memory, where the
// second-level cache holds it.
template <class F, int V, int BITS, int COPIES>
struct Book {
  using Piece = typename Cut<V>::Piece;
  static constexpr int kEntries = BITS > 0 ? 1 << BITS : 0;
  static constexpr int kSharedPieces = kEntries * Cut<V>::kPieces * COPIES;
  static constexpr int kSharedBytes = kSharedPieces * static_cast<int>(sizeof(Piece));
  const unsigned short* stored;
  const Piece* shared;  // this lane's copy

  VPTQ_DEVICE Book(const unsigned short* codebook, const Piece* at, int lane)
      : stored(codebook), shared(at + lane % max(COPIES, 1)) {}

  // Fills `at` by THREADS of the block, of which this is number `thread`.
  template <int THREADS>
  static VPTQ_DEVICE void fill(const unsigned short* codebook, Piece* at, int thread) {
    if constexpr (COPIES > 0) {
      constexpr int kTogether = 8;  // loads of a thread that are on the way together
#pragma unroll 1
      for (int base = thread; base < kSharedPieces; base += kTogether * THREADS) {
        Piece pieces[kTogether];
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const int piece = min(base + j * THREADS, kSharedPieces - 1) / COPIES;
          pieces[j] = Cut<V>::read(codebook + piece % kEntries * V, piece / kEntries);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          if (base + j * THREADS < kSharedPieces) at[base + j * THREADS] = pieces[j];
        }
      }
    }
  }

  // pairs [V / 2] = the vector of `entry`, two floats in each.
  VPTQ_DEVICE void look_up(unsigned entry, unsigned (&pairs)[V / 2]) const {
    constexpr int kWords = sizeof(Piece) / 4;
#pragma unroll
    for (int p = 0; p < Cut<V>::kPieces; ++p) {
      Piece piece;
      if constexpr (COPIES > 0) {
        piece = shared[(p * kEntries + entry) * COPIES];
      } else {
        piece = Cut<V>::read(stored + entry * V, p);
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) {
        if (p * kWords + i < V / 2) pairs[p * kWords + i] = piece.word[i];
      }
    }
  }
};
