// What the kernels ask of the machine: 16-bit floats, shifts over two words, copies that run beside the arithmetic.
//
// No header of the CUDA toolkit, so that NVRTC's own library is all that an installation needs. The tests compile
// the other files as plain C++ behind a header of the same contents (tests/cuda/shim.h).

#define VPTQ_DEVICE __device__ __forceinline__

// A float16, and a bfloat16, as the bits that tensors hold.
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
};

struct BFloat16 {
  static VPTQ_DEVICE float widen(unsigned bits) { return __uint_as_float(bits << 16); }
  // Ties to even. In integers, because cards before compute capability 8.0 have no instruction for it.
  static VPTQ_DEVICE unsigned short narrow(float value) {
    const unsigned bits = __float_as_uint(value);
    if (value != value) return static_cast<unsigned short>(bits >> 16 | 0x40);
    return static_cast<unsigned short>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
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

// Copies BYTES (4 or 16) from global to shared memory; done once `wait_copies` says so, and at once before 8.0.
template <int BYTES>
VPTQ_DEVICE void copy_async(unsigned* to, const unsigned* from) {
#if __CUDA_ARCH__ >= 800
  const unsigned place = static_cast<unsigned>(__cvta_generic_to_shared(to));
  if (BYTES == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(place), "l"(from) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(place), "l"(from) : "memory");
  }
#else
  for (int word = 0; word < BYTES / 4; ++word) to[word] = from[word];
#endif
}

// Ends a batch of copies, empty or not.
VPTQ_DEVICE void end_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits for all of this thread's batches but the newest PENDING.
template <int PENDING>
VPTQ_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
