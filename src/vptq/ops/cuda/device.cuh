// What the kernels ask of the machine: 16-bit floats, alone and in pairs, and shifts over two words.
//
// No header of the CUDA toolkit, so that NVRTC's own library is all that an installation needs. The tests compile
// the other files as plain C++ behind a header of the same contents (tests/cuda/shim.h).

#define VPTQ_DEVICE __device__ __forceinline__

// A float16, and a bfloat16, as the bits that tensors hold. `add` adds two pairs of them, each sum rounded to 16 bits.
struct Half {
  static VPTQ_DEVICE float widen(unsigned bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
    return value;
  }
  static VPTQ_DEVICE unsigned short narrow(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
  }
  static VPTQ_DEVICE unsigned add(unsigned a, unsigned b) {
    unsigned sums;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(sums) : "r"(a), "r"(b));
    return sums;
  }
};

struct BFloat16 {
  static VPTQ_DEVICE float widen(unsigned bits) { return __uint_as_float(bits << 16); }
  // Ties to even. In integers, because cards before compute capability 8.0 have no instruction for it.
  static VPTQ_DEVICE unsigned short narrow(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return static_cast<unsigned short>(bits >> 16 | 0x40);
    return static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  static VPTQ_DEVICE unsigned add(unsigned a, unsigned b) {
#if __CUDA_ARCH__ >= 800
    unsigned sums;  // a * 1 + b, since 8.0 multiplies and adds bfloat16, but does not add
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(sums) : "r"(a), "r"(0x3F803F80), "r"(b));
    return sums;
#else
    const unsigned low = narrow(widen(a & 0xFFFF) + widen(b & 0xFFFF));
    return low | static_cast<unsigned>(narrow(widen(a >> 16) + widen(b >> 16))) << 16;
#endif
  }
};

// The 32 bits that begin `shift` (0 to 31) bits above the lowest of `low`.
VPTQ_DEVICE unsigned straddling(unsigned low, unsigned high, unsigned shift) {
  return __funnelshift_r(low, high, shift);
}

// The block's shared memory, as much as its launch asked for.
VPTQ_DEVICE char* shared_memory() {
  extern __shared__ uint4 memory[];
  return reinterpret_cast<char*>(memory);
}

VPTQ_DEVICE float swap_lanes(float value, int distance) { return __shfl_xor_sync(0xFFFFFFFF, value, distance); }
