// The kernels for VPTQ_TOKENS, in a namespace of their own; included by kernels.cpp once for each number.
namespace VPTQ_NAME(tokens_, VPTQ_TOKENS) {

#include "decode.cu"

template <class T>
const T* in(void* pointer) {
  return static_cast<const T*>(pointer);
}

// Layer N of the launch, behind the pointers and numbers that are common to all.
#define VPTQ_PASS(N)                                                                                      \
  in<Float>(p[3 + 7 * N]), in<Float>(p[4 + 7 * N]), in<unsigned>(p[5 + 7 * N]), in<Float>(p[6 + 7 * N]),  \
      in<Float>(p[7 + 7 * N]), in<Float>(p[8 + 7 * N]), in<Float>(p[9 + 7 * N]), n[8 + 3 * N],            \
      n[9 + 3 * N], n[10 + 3 * N]

extern "C" void VPTQ_NAME(run_decode_, VPTQ_TOKENS)(const int* grid, int threads, int shared, void** p, const int* n) {
  using Float = unsigned short;
  shim::launch({grid[0], grid[1]}, threads, shared, [=] {
    decode(in<Float>(p[0]), static_cast<Float*>(p[1]), static_cast<float*>(p[2]), n[0], n[1], n[2], n[3], n[4], n[5],
           n[6], n[7], VPTQ_PASS(0), VPTQ_PASS(1), VPTQ_PASS(2));
  });
}

extern "C" void VPTQ_NAME(run_add_parts_, VPTQ_TOKENS)(const int* grid, int threads, int shared, void** p,
                                                       const int* n) {
  shim::launch({grid[0], grid[1]}, threads, shared,
               [=] { add_parts(in<float>(p[0]), static_cast<unsigned short*>(p[1]), n[0], n[1]); });
}

#undef VPTQ_PASS

}  // namespace
