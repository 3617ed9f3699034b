// The entry at an offset, of one codebook or added up of two.
//
// Where more than two tokens share an entry, or it goes into a tile, the two are added before anything else: half the
// multiplications, and nothing is read back from the tile.

namespace vptq {
namespace VPTQ_ISA {
namespace {

#if VPTQ_LANES == 16

// A register of 16 floats holds one entry of 16, two of 8 or four of 4, of rows that follow each other. Narrower registers
// are full with one entry.
typedef Wide<16>::Floats Sixteen;

// `offsets` is the first row's; the rows after it lie `stride` further each.
template <int W, Float kDtype>
struct Group;

template <Float kDtype>
struct Group<16, kDtype> {
  static VPTQ_INLINE Sixteen load(const uint8_t* entries, const uint32_t* offsets, int64_t) {
    return load_entry<16, kDtype>(entries + *offsets);
  }
};

VPTQ_INLINE Sixteen widen_sixteen(__m256i halves, Float dtype) {
  if (dtype == Float::kFloat16) return (Sixteen)_mm512_cvtph_ps(halves);
  return (Sixteen)upper_sixteen(halves);
}

template <Float kDtype>
struct Group<8, kDtype> {
  static VPTQ_INLINE Sixteen load(const uint8_t* entries, const uint32_t* offsets, int64_t stride) {
    const uint8_t *a = entries + offsets[0], *b = entries + offsets[stride];
    if (kDtype == Float::kFloat32) {
      const __m512 low = _mm512_castps256_ps512(_mm256_loadu_ps(reinterpret_cast<const float*>(a)));
      return (Sixteen)_mm512_insertf32x8(low, _mm256_loadu_ps(reinterpret_cast<const float*>(b)), 1);
    }
    const __m256i low = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
    return widen_sixteen(_mm256_inserti128_si256(low, _mm_loadu_si128(reinterpret_cast<const __m128i*>(b)), 1), kDtype);
  }
};

template <Float kDtype>
struct Group<4, kDtype> {
  static VPTQ_INLINE Sixteen load(const uint8_t* entries, const uint32_t* offsets, int64_t stride) {
    const uint8_t *a = entries + offsets[0], *b = entries + offsets[stride];
    const uint8_t *c = entries + offsets[2 * stride], *d = entries + offsets[3 * stride];
    if (kDtype == Float::kFloat32) {
      __m512 all = _mm512_castps128_ps512(_mm_loadu_ps(reinterpret_cast<const float*>(a)));
      all = _mm512_insertf32x4(all, _mm_loadu_ps(reinterpret_cast<const float*>(b)), 1);
      all = _mm512_insertf32x4(all, _mm_loadu_ps(reinterpret_cast<const float*>(c)), 2);
      return (Sixteen)_mm512_insertf32x4(all, _mm_loadu_ps(reinterpret_cast<const float*>(d)), 3);
    }
    return widen_sixteen(_mm256_inserti128_si256(_mm256_castsi128_si256(two(a, b)), two(c, d), 1), kDtype);
  }

 private:
  static VPTQ_INLINE __m128i two(const uint8_t* a, const uint8_t* b) {
    const __m128i low = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(a));
    return _mm_unpacklo_epi64(low, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(b)));
  }
};

#endif

template <int W, Float kDtype>
struct OneBook {
  static constexpr int kWidth = W;
  typedef typename Wide<W>::Floats Floats;
  const uint8_t* entries;
  const uint32_t* offsets;

  // `piece`: of an entry of several times 16 floats.
  VPTQ_INLINE Floats load(int64_t at, int64_t piece) const {
    return load_entry<W, kDtype>(entries + offsets[at] + piece * W * float_bytes(kDtype));
  }
#if VPTQ_LANES == 16
  VPTQ_INLINE Sixteen load_group(int64_t at, int64_t stride) const { return Group<W, kDtype>::load(entries, offsets + at, stride); }
#endif
};

template <int W, Float kMain, Float kResidual>
struct TwoBooks {
  static constexpr int kWidth = W;
  OneBook<W, kMain> main;
  OneBook<W, kResidual> residual;

  VPTQ_INLINE typename Wide<W>::Floats load(int64_t at, int64_t piece) const {
    return main.load(at, piece) + residual.load(at, piece);
  }
#if VPTQ_LANES == 16
  VPTQ_INLINE Sixteen load_group(int64_t at, int64_t stride) const {
    return main.load_group(at, stride) + residual.load_group(at, stride);
  }
#endif
};

// Entries of `width` floats from the coordinate `skip`. `offsets.residual` is null where there is one codebook.
template <typename Use>
inline void with_books(const PreparedPart& prepared, int64_t width, int64_t skip, Offsets offsets, const Use& use) {
  const Table &main = prepared.main, &residual = prepared.residual;
  with_entry(width, main.dtype, [&](auto entry) {
    typedef decltype(entry) E;
    const OneBook<E::kWidth, E::kFloat> first{main.entries + skip * float_bytes(main.dtype), offsets.main};
    if (offsets.residual == nullptr) {
      use(first);
      return;
    }
    with_entry_of<E::kWidth>(residual.dtype, [&](auto second) {
      typedef decltype(second) R;
      use(TwoBooks<E::kWidth, E::kFloat, R::kFloat>{first, {residual.entries + skip * float_bytes(residual.dtype), offsets.residual}});
    });
  });
}

}  // namespace
}  // namespace VPTQ_ISA
}  // namespace vptq
