// 128-bit vectors: SSE2 on x86-64, NEON on 64-bit ARM, whatever the compiler makes of them elsewhere.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"

#define VPTQ_ISA generic
#define VPTQ_LANES 4
#if defined(__aarch64__)
#define VPTQ_TILE 8
#else
#define VPTQ_TILE 4
#endif
#include "kernels_body.h"
